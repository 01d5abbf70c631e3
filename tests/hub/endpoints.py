"""What the Hub on localhost answers, one function an endpoint; see :mod:`tests.hub.server`."""

import base64
import hashlib
import json
import re
from typing import Any

from tests.hub.server import Handler, Repo, git_oid, on


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
