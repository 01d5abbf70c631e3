"""A small Hugging Face Hub on localhost: the endpoints that huggingface_hub's client uses.

It keeps repositories in memory as lists of commits, answers as the Hub's API does, and can be
told to break: see :class:`Fault`. Files over ``lfs_from`` bytes and all safetensors go through
LFS; those over ``part_size`` bytes in parts.
"""

import base64
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


@on("GET", "/api/whoami-v2")
def whoami(handler: Handler) -> None:
    user = handler.user()
    if user is None:
        handler.refuse(401, "Invalid credentials in Authorization header")
    else:
        handler.answer(200, user)


@on("POST", "/api/repos/create")
def create(handler: Handler) -> None:
    wanted = json.loads(handler.body)
    repo_id = f"{wanted['organization']}/{wanted['name']}"
    if not handler.may_write(repo_id):
        return
    url = {"url": f"{handler.hub.url}/{repo_id}"}
    if repo_id in handler.hub.repos:
        handler.answer(409, url)
        return
    # Clients before 1.0 say it in the second way.
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    repo = handler.hub.repos[repo_id] = Repo(private)
    repo.commit({".gitattributes": ("regular", b"*.safetensors filter=lfs\n")}, "initial commit")
    handler.answer(200, url)


@on("POST", "/api/validate-yaml")
def validate_yaml(handler: Handler) -> None:
    handler.answer(200, {"errors": [], "warnings": []})


@on("GET", "/api/models/REPO")
def info(handler: Handler, repo_id: str) -> None:
    info_at(handler, repo_id, "main")


@on("GET", r"/api/models/REPO/revision/([\w.-]+)")
def info_at(handler: Handler, repo_id: str, revision: str) -> None:
    if (repo := handler.repo(repo_id)) is None:
        return
    if (commit := repo.at(revision)) is None:
        handler.refuse(404, "Revision not found", "RevisionNotFound")
        return
    siblings = [{"rfilename": path} for path in commit[1]]
    handler.answer(
        200,
        {"id": repo_id, "sha": commit[0], "private": repo.private, "siblings": siblings},
    )


@on("GET", r"/api/models/REPO/tree/([\w.-]+)")
def tree(handler: Handler, repo_id: str, revision: str) -> None:
    if (repo := handler.repo(repo_id)) is None:
        return
    commit = repo.at(revision)
    if commit is None:
        handler.refuse(404, "Revision not found", "RevisionNotFound")
        return
    entries: list[dict[str, Any]] = []
    for path, (mode, content) in commit[1].items():
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if mode == "lfs":
            sha256 = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
        entries.append(entry)
    handler.answer(200, entries)


@on("POST", r"/api/models/REPO/preupload/([\w.-]+)")
def preupload(handler: Handler, repo_id: str, revision: str) -> None:
    if handler.repo(repo_id) is None or not handler.may_write(repo_id):
        return
    files = [
        {
            "path": file["path"],
            "shouldIgnore": False,
            "uploadMode": "lfs"
            if file["path"].endswith(".safetensors") or file["size"] > handler.hub.lfs_from
            else "regular",
        }
        for file in json.loads(handler.body)["files"]
    ]
    handler.answer(200, {"files": files})


@on("POST", r"/REPO\.git/info/lfs/objects/batch")
def lfs_batch(handler: Handler, repo_id: str) -> None:
    if not handler.may_write(repo_id):
        return
    hub = handler.hub
    objects: list[dict[str, Any]] = []
    for wanted in json.loads(handler.body)["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer = {"oid": oid, "size": size}
        if oid not in hub.objects:
            upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{oid}"}
            if size > hub.part_size:
                n_parts = -(-size // hub.part_size)
                upload["href"] = f"{hub.url}/lfs/{oid}/complete"
                upload["header"] = {
                    "chunk_size": str(hub.part_size),
                    **{str(n): f"{hub.url}/lfs/{oid}/part/{n}" for n in range(1, n_parts + 1)},
                }
            verify = {"href": f"{hub.url}/lfs/{oid}/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    handler.answer(200, {"transfer": "basic", "objects": objects})


@on("PUT", "/lfs/([0-9a-f]{64})")
def lfs_put(handler: Handler, oid: str) -> None:
    store(handler, oid, handler.body)


@on("PUT", "/lfs/([0-9a-f]{64})/part/([0-9]+)")
def lfs_put_part(handler: Handler, oid: str, number: str) -> None:
    handler.hub.parts.setdefault(oid, {})[int(number)] = handler.body
    handler.answer(200, headers={"ETag": f'"{hashlib.md5(handler.body).hexdigest()}"'})


@on("POST", "/lfs/([0-9a-f]{64})/complete")
def lfs_complete(handler: Handler, oid: str) -> None:
    parts = handler.hub.parts.get(oid, {})
    content = b""
    for part in json.loads(handler.body)["parts"]:
        data = parts[part["partNumber"]]
        if part["etag"].strip('"') != hashlib.md5(data).hexdigest():
            handler.refuse(400, "wrong etag")
            return
        content += data
    store(handler, oid, content)


def store(handler: Handler, oid: str, content: bytes) -> None:
    if hashlib.sha256(content).hexdigest() != oid:
        handler.refuse(400, "the content is not what its oid says")
        return
    handler.hub.objects[oid] = content
    handler.answer(200)


@on("POST", "/lfs/([0-9a-f]{64})/verify")
def lfs_verify(handler: Handler, oid: str) -> None:
    if len(handler.hub.objects.get(oid, b"")) == json.loads(handler.body)["size"]:
        handler.answer(200)
    else:
        handler.refuse(404, "no such object")


@on("POST", r"/api/models/REPO/commit/([\w.-]+)")
def commit(handler: Handler, repo_id: str, revision: str) -> None:
    repo = handler.repo(repo_id)
    if repo is None or not handler.may_write(repo_id):
        return
    oid, files, _ = repo.commits[-1]
    files = dict(files)
    message = ""
    for line in handler.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            message = value["summary"]
            if value.get("parentCommit", oid) != oid:
                handler.refuse(412, "A commit has happened since. Please refresh and try again.")
                return
        elif item["key"] == "file":
            files[value["path"]] = ("regular", base64.b64decode(value["content"]))
        elif item["key"] == "lfsFile":
            if value["oid"] not in handler.hub.objects:
                handler.refuse(400, f"LFS pointer of {value['path']} to nothing")
                return
            files[value["path"]] = ("lfs", handler.hub.objects[value["oid"]])
        elif item["key"] == "deletedFile":
            del files[value["path"]]
        else:
            raise AssertionError(item["key"])
    new = repo.commit(files, message)
    url = f"{handler.hub.url}/{repo_id}/commit/{new}"
    handler.answer(200, {"success": True, "commitOid": new, "commitUrl": url})


@on("GET HEAD", r"/REPO/resolve/([\w.-]+)/(.+)")
def resolve(handler: Handler, repo_id: str, revision: str, path: str) -> None:
    if (repo := handler.repo(repo_id)) is None:
        return
    commit = repo.at(revision)
    if commit is None:
        handler.refuse(404, "Revision not found", "RevisionNotFound")
        return
    if path not in commit[1]:
        handler.refuse(404, "Entry not found", "EntryNotFound")
        return
    mode, content = commit[1][path]
    headers = {"X-Repo-Commit": commit[0], "Accept-Ranges": "bytes"}
    if mode == "lfs":
        sha256 = hashlib.sha256(content).hexdigest()
        headers |= {
            "X-Linked-Etag": f'"{sha256}"',
            "X-Linked-Size": str(len(content)),
            # As on the Hub, on another host than the API.
            "Location": f"http://localhost:{handler.hub.server.server_port}/storage/{sha256}",
        }
        handler.answer(302, headers=headers)
    else:
        send(handler, content, {**headers, "ETag": f'"{git_oid(content)}"'})


@on("GET HEAD", "/storage/([0-9a-f]{64})")
def storage(handler: Handler, oid: str) -> None:
    send(handler, handler.hub.objects[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def send(handler: Handler, content: bytes, headers: dict[str, str]) -> None:
    if match := re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or ""):
        first, last = int(match[1]), int(match[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        handler.answer(206, content[first : last + 1], headers)
    else:
        handler.answer(200, content, {**headers, "Content-Length": str(len(content))})
