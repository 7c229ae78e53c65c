"""A small server that speaks the endpoints of the Hub that `huggingface_hub` needs to push and pull a model."""

import base64
import hashlib
import json
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants, file_download, hf_api, repocard
from huggingface_hub.utils import _http
from transformers import dynamic_module_utils
from transformers.utils import hub

TOKEN = "hf_test"


class HubServer(ThreadingHTTPServer):
    """
    Repositories of models in memory, each with one revision for each commit.

    Attributes:
        repos (`dict[str, Repo]`): by id.
        collections (`dict[str, dict]`): by slug.
        cut_after (`int` or `None`): downloads of weights break off after so many bytes.
        requests (list of `str`): methods and paths of all requests.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, bytes] = {}
        self.collections: dict[str, dict] = {}
        self.cut_after: int | None = None
        self.requests: list[str] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Repo:
    def __init__(self, private: bool):
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {"0" * 40: {}}

    @property
    def head(self) -> str:
        return list(self.commits)[-1]

    def revision(self, name: str) -> str | None:
        return self.head if name == "main" else name if name in self.commits else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *args):
        pass

    def _reply(self, status: int, body=b"", headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _error(self, status: int, code: str, message: str):
        self._reply(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _handle(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        body = self._body()
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        parts = path.strip("/").split("/")
        is_open = parts[0] == "uploads" or path == "/api/validate-yaml"
        if self.command in ("POST", "PUT") and not authorized and not is_open:
            return self._error(401, "Unauthorized", "Invalid user token.")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._reply(200, {"errors": [], "warnings": []})
        if parts[:2] == ["api", "collections"]:
            return self._collections("/".join(parts[2:4]), json.loads(body or b"{}"))
        if path == "/api/whoami-v2":
            return self._reply(200, {"type": "user", "name": "me", "orgs": [], "auth": {"type": "access_token"}})
        if parts[0] == "uploads":
            self.server.uploads[parts[1]] = body
            return self._reply(200)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._lfs_batch(json.loads(body))
        is_api = parts[:2] == ["api", "models"]
        repo_id = "/".join(parts[2:4] if is_api else parts[:2])
        action, rest = (parts[4:5], parts[5:]) if is_api else (parts[2:3], parts[3:])
        repo = self.server.repos.get(repo_id)
        if repo is None or (repo.private and not authorized):
            return self._error(401, "RepoNotFound", "Repository not found")
        return self._repo(repo_id, repo, action[0] if action else "revision", rest or ["main"], body)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815

    def _create(self, request: dict):
        repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
        if repo_id in self.server.repos:
            return self._reply(409, {"error": "exists", "url": f"{self.server.url}/{repo_id}"})
        self.server.repos[repo_id] = Repo(request.get("private") or request.get("visibility") == "private")
        return self._reply(200, {"url": f"{self.server.url}/{repo_id}", "name": repo_id})

    def _collections(self, slug: str, request: dict):
        if not slug:
            slug = f"{request['namespace']}/{request['title'].lower().replace(' ', '-')}"
            if slug in self.server.collections:
                return self._reply(409, {"error": "exists", "slug": slug})
            self.server.collections[slug] = request | {
                "slug": slug,
                "owner": {"name": request["namespace"]},
                "items": [],
                "lastUpdated": "2026-01-01T00:00:00.000Z",
                "position": 0,
                "theme": "blue",
                "upvotes": 0,
            }
        collection = self.server.collections[slug]
        if item := request.get("item"):
            if item["id"] in [x["id"] for x in collection["items"]]:
                return self._reply(409, {"error": "exists"})
            note = {"html": request["note"], "text": request["note"]}
            position = len(collection["items"])
            collection["items"].append({"_id": item["id"], "position": position, "note": note, **item})
        return self._reply(200, collection)

    def _lfs_batch(self, request: dict):
        objects = [
            x | {"actions": {"upload": {"href": f"{self.server.url}/uploads/{x['oid']}"}}} for x in request["objects"]
        ]
        return self._reply(200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/json"})

    def _repo(self, repo_id: str, repo: Repo, action: str, rest: list[str], body: bytes):
        revision = repo.revision(rest[0])
        if revision is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {rest[0]}")
        files = repo.commits[revision]
        if action == "preupload":
            modes = [
                {"path": x["path"], "uploadMode": "lfs" if x["path"].endswith(".safetensors") else "regular"}
                for x in json.loads(body)["files"]
            ]
            return self._reply(200, {"files": [x | {"shouldIgnore": False} for x in modes]})
        if action == "commit":
            return self._commit(repo_id, repo, dict(files), body)
        if action == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self._reply(200, {"id": repo_id, "sha": revision, "private": repo.private, "siblings": siblings})
        if action == "tree":
            tree = [{"type": "file", "path": x, "size": len(y), "oid": _oid(y)} for x, y in files.items()]
            return self._reply(200, tree)
        if action == "resolve":
            return self._resolve(revision, files, "/".join(rest[1:]))
        return self._reply(404, {"error": f"unknown endpoint {self.path}"})

    def _commit(self, repo_id: str, repo: Repo, files: dict[str, bytes], body: bytes):
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.uploads[value["oid"]]
        commit = hashlib.sha1(body + repo.head.encode()).hexdigest()
        repo.commits[commit] = files
        url = f"{self.server.url}/{repo_id}/commit/{commit}"
        return self._reply(200, {"success": True, "commitOid": commit, "commitUrl": url})

    def _resolve(self, revision: str, files: dict[str, bytes], name: str):
        if name not in files:
            return self._error(404, "EntryNotFound", f"{name} does not exist")
        data, cut = files[name], self.server.cut_after
        headers = {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": revision, "Accept-Ranges": "bytes"}
        status = 200
        if first := int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0] or 0):
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            data, status = data[first:], 206
        if self.command == "GET" and cut is not None and name.endswith(".safetensors"):
            self.send_response(status)
            for key, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[:cut])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.close()
        return self._reply(status, data, headers)


def in_environment(
    server: HubServer, home: Path, token: str | None = TOKEN, is_offline: bool = False
) -> dict[str, str]:
    """Variables by which the client of the Hub in another process talks to the server, with a cache of its own."""
    offline = {"HF_HUB_OFFLINE": str(int(is_offline)), "TRANSFORMERS_OFFLINE": str(int(is_offline))}
    where = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    return offline | where | ({"HF_TOKEN": token} if token else {})


@dataclass
class _Session:
    """Sends what is for the Hub to a server: before its version 2, the client always validates cards at the Hub."""

    url: str

    def post(self, url: str, **kwargs: Any) -> Any:
        return _http.get_session().post(url.replace("https://huggingface.co", self.url), **kwargs)


def connect(
    patch: pytest.MonkeyPatch, server: HubServer, home: Path, token: str | None = TOKEN, is_offline: bool = False
) -> None:
    """Does the same for the client in this process, which has read its variables already, and lets it never wait."""
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
        patch.delenv(name, raising=False)
    for name, value in in_environment(server, home, token, is_offline).items():
        patch.setenv(name, value)
    for name, value in {
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": is_offline,
        "HF_HUB_DISABLE_XET": True,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
    }.items():
        patch.setattr(constants, name, value)
    patch.setattr(hf_api.api, "endpoint", server.url)
    patch.setattr(repocard, "get_session", lambda: _Session(server.url))
    patch.setattr(hub, "_hf_api", None, raising=False)  # which is made once, by transformers from 5.24 on
    patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(home / "modules"))
    for module in (_http, file_download):
        patch.setattr(module, "time", SimpleNamespace(**vars(time) | {"sleep": lambda _: None}))


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
