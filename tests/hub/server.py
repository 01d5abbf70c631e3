"""A small Hugging Face Hub on localhost: the endpoints that huggingface_hub's client uses.

It keeps repositories in memory as lists of commits, answers as the Hub's API does, and can be
told to break: see :class:`Fault`. Files over ``lfs_from`` bytes and all safetensors go through
LFS; those over ``part_size`` bytes in parts.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

WRITE_TOKEN = "hf_writer"
READ_TOKEN = "hf_reader"
# Of somebody who has no right to the repositories of "me".
STRANGER_TOKEN = "hf_stranger"

Files = dict[str, tuple[str, bytes]]
"""Path in the repository: ("regular" or "lfs", content)."""


@dataclass
class Repo:
    private: bool
    commits: list[tuple[str, Files, str]] = field(default_factory=list)

    def commit(self, files: Files, message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits.append((oid, files, message))
        return oid

    def at(self, revision: str) -> tuple[str, Files, str] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


@dataclass
class Fault:
    """Break the connection of the next ``times`` requests that match.

    ``when``: "in the middle" of the body that is sent; "before" it has any effect, with all of
    it read; "after" it had its effect, without an answer. Or a status to answer with.
    """

    method: str
    path: str
    when: str | int = "before"
    times: int = 1


class Hub:
    """The server; use as a context manager. ``log`` has (method, path, status) of all requests."""

    def __init__(self, lfs_from: int = 1_000_000, part_size: int = 10_000_000) -> None:
        self.lfs_from = lfs_from
        self.part_size = part_size
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []
        self.lock = threading.RLock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo_id: str) -> dict[str, bytes]:
        """What a visitor of the repository sees now."""
        repo = self.repos.get(repo_id)
        if repo is None:
            return {}
        return {path: content for path, (_, content) in repo.commits[-1][1].items()}

    def writes(self) -> list[tuple[str, str, int]]:
        return [entry for entry in self.log if entry[0] not in ("GET", "HEAD")]


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    routes: list[tuple[str, str, Callable[..., None]]] = []

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_one(self) -> None:
        self.status = 0
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        fault = next(
            (
                fault
                for fault in self.hub.faults
                if fault.times > 0 and fault.method == self.command and re.search(fault.path, path)
            ),
            None,
        )
        try:
            if fault is not None:
                fault.times -= 1
            if fault is not None and fault.when == "in the middle":
                next(self.chunks(1000), None)
                self.drop()
                return
            self.body = b"".join(self.chunks())
            if fault is not None and fault.when == "before":
                self.drop()
                return
            if fault is not None and isinstance(fault.when, int):
                self.answer(fault.when, {"error": "as the test wants it"})
                return
            self.muted = fault is not None
            self.route(path)
            if self.muted:
                self.drop()
        finally:
            with self.hub.lock:
                self.hub.log.append((self.command, path, self.status))

    muted = False
    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def chunks(self, size: int = 1 << 20) -> Any:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left > 0:
            data = self.rfile.read(min(left, size))
            if not data:
                return
            left -= len(data)
            yield data

    def answer(
        self, status: int, content: Any = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.status = status
        if self.muted:
            return
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self.answer(status, {"error": message}, headers)

    def user(self) -> dict[str, Any] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        name, role = {
            WRITE_TOKEN: ("me", "write"),
            READ_TOKEN: ("me", "read"),
            STRANGER_TOKEN: ("stranger", "write"),
        }.get(token, ("", ""))
        if not name:
            return None
        access = {"displayName": f"{role} token", "role": role}
        return {"name": name, "type": "user", "auth": {"accessToken": access}}

    def may_write(self, repo_id: str) -> bool:
        user = self.user()
        if user is None:
            self.refuse(401, "Invalid credentials in Authorization header")
        elif user["name"] != repo_id.split("/")[0]:
            self.refuse(403, "Forbidden: you must have write access")
        elif user["auth"]["accessToken"]["role"] != "write":
            self.refuse(403, "Forbidden: the token has the role read")
        else:
            return True
        return False

    def repo(self, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get(repo_id)
        user = self.user()
        owner = user is not None and user["name"] == repo_id.split("/")[0]
        if repo is None or (repo.private and not owner):
            self.refuse(404 if user else 401, "Repository not found", "RepoNotFound")
            return None
        return repo

    def route(self, path: str) -> None:
        with self.hub.lock:
            for method, pattern, function in self.routes:
                if self.command in method.split() and (match := re.fullmatch(pattern, path)):
                    function(self, *match.groups())
                    return
            self.refuse(501, f"this test's Hub has no {self.command} {path}")


def on(method: str, pattern: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        Handler.routes.append((method, pattern.replace("REPO", r"([\w.-]+/[\w.-]+)"), function))
        return function

    return register


def card(hub: Hub, repo_id: str = "me/saes") -> str:
    return hub.files(repo_id)["README.md"].decode()
