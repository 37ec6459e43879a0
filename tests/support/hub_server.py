"""A loopback server that speaks as much of the Hugging Face hub's protocol as its client needs: revisions, listings,
files with ranges.

    with HubServer({"model/Org/Tiny": folder, "dataset/Org/Rows": folder}) as hub: ... hub.url ...

Faults: `cut[file] = n` ends the connection after n bytes, once; `flip` changes the last byte on the way, so many times;
`status[file or repository] = code`. Every request is in `log` as (method, path, range).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.loopback import LoopbackServer

LARGE_BYTES = 1000  # files above are listed with a SHA-256, as the hub keeps weights


def git_blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer(LoopbackServer):
    def __init__(self, repos: Mapping[str, Path]) -> None:
        self.repos = dict(repos)
        self.log: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}
        self.flip: dict[str, int] = {}
        self.status: dict[str, int] = {}
        super().__init__()

    def files(self, repo: str) -> dict[str, bytes]:
        root = self.repos[repo]
        return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}

    def commit(self, repo: str) -> str:
        """A hash of the content."""
        parts = [f"{name} {git_blob(data)}" for name, data in self.files(repo).items()]
        return hashlib.sha1("\n".join(parts).encode()).hexdigest()

    def fetched(self) -> list[str]:
        """The files whose bytes were asked for."""
        return [path.split("/resolve/")[1].partition("/")[2] for method, path, _ in self.log if is_file(method, path)]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.log.append((request.command, path, request.headers.get("Range")))
        if found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            kind, repo, verb, revision = found.groups()
            self._describe(request, f"{kind}/{repo}", verb, revision)
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repo = f"{'dataset' if found[1] else 'model'}/{found[2]}"
            self._send_file(request, repo, found[3], found[4])
        else:
            _reply(request, 404, {"error": "not found"})

    def _describe(self, request: BaseHTTPRequestHandler, repo: str, verb: str | None, revision: str | None) -> None:
        if not self._has(request, repo, revision):
            return
        if verb == "tree":
            _reply(request, 200, [_entry(name, data) for name, data in self.files(repo).items()])
            return
        siblings = [{"rfilename": name} for name in self.files(repo)]
        name = repo.partition("/")[2]
        _reply(request, 200, {"_id": "0", "id": name, "sha": self.commit(repo), "siblings": siblings, "tags": []})

    def _has(self, request: BaseHTTPRequestHandler, repo: str, revision: str | None) -> bool:
        if repo in self.status:
            code = self.status[repo]
            _reply(request, code, {"error": "as told"}, {"X-Error-Code": "GatedRepo"} if code == 403 else {})
        elif repo not in self.repos:
            _reply(request, 404, {"error": "RepoNotFound"}, {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", self.commit(repo)):
            _reply(request, 404, {"error": "RevisionNotFound"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return True
        return False

    def _send_file(self, request: BaseHTTPRequestHandler, repo: str, revision: str, name: str) -> None:
        if not self._has(request, repo, revision):
            return
        if name not in self.files(repo):
            _reply(request, 404, {"error": "EntryNotFound"}, {"X-Error-Code": "EntryNotFound"})
            return
        if name in self.status:
            _reply(request, self.status[name], {"error": "as told"})
            return
        data = self.files(repo)[name]
        etag, size = _digest(data), len(data)
        if self.flip.get(name, 0) > 0 and request.command == "GET":
            self.flip[name] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        start, end = (int(part[1]), min(size, int(part[2] or size) + 1)) if part else (0, size)
        request.send_response(206 if part else 200)
        headers = {"X-Repo-Commit": self.commit(repo), "ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"'}
        headers |= {"X-Linked-Size": str(size), "Accept-Ranges": "bytes", "Content-Length": str(end - start)}
        if part:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        for key, value in headers.items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "HEAD":
            return
        cut = self.cut.pop(name, None)
        request.wfile.write(data[start:end] if cut is None else data[start : start + cut])
        request.wfile.flush()
        if cut is not None:
            request.close_connection = True
            request.connection.shutdown(2)


def is_file(method: str, path: str) -> bool:
    return method == "GET" and "/resolve/" in path


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if len(data) > LARGE_BYTES else git_blob(data)


def _entry(name: str, data: bytes) -> dict[str, Any]:
    large = {"lfs": {"oid": _digest(data), "size": len(data), "pointerSize": 134}} if len(data) > LARGE_BYTES else {}
    return {"type": "file", "path": name, "size": len(data), "oid": git_blob(data), **large}


def _reply(request: BaseHTTPRequestHandler, code: int, value: object, headers: Mapping[str, str] | None = None) -> None:
    data = json.dumps(value).encode()
    request.send_response(code)
    for key, text in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
        request.send_header(key, text)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)
