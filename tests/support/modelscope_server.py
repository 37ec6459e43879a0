"""A loopback server that speaks as much of ModelScope's protocol as its client needs: listings, files with ranges.

    with ModelScopeServer({"model/Org/Tiny": folder}) as hub: ... hub.url ...

Faults: `flip` changes the last byte of a file on the way. Every request is in `log` as (path, file).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from tests.support.loopback import LoopbackServer


class ModelScopeServer(LoopbackServer):
    def __init__(self, repos: Mapping[str, Path]) -> None:
        self.repos = dict(repos)
        self.log: list[tuple[str, str | None]] = []
        self.flip: set[str] = set()
        super().__init__()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        asked = dict(parse_qsl(url.query))
        self.log.append((unquote(url.path), asked.get("FilePath")))
        found = re.fullmatch(r"/api/v1/(model|dataset)s/([^/]+/[^/]+)/repo(/files|/tree)?", unquote(url.path))
        root = self.repos.get(f"{found[1]}/{found[2]}") if found else None
        if found is None or root is None or asked.get("Revision", "master") != "master":
            _send(request, 404, json.dumps({"Code": 404, "Message": "not found", "Success": False}).encode())
        elif found[3]:
            entries = [_entry(root, path) for path in sorted(root.rglob("*")) if path.is_file()]
            _send(request, 200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": entries}}).encode())
        else:
            data = (root / asked["FilePath"]).read_bytes()
            if asked["FilePath"] in self.flip:
                data = data[:-1] + bytes([data[-1] ^ 1])
            _send_part(request, data)


def _entry(root: Path, path: Path) -> dict[str, object]:
    data = path.read_bytes()
    facts = {"Path": path.relative_to(root).as_posix(), "Name": path.name, "Type": "blob", "Size": len(data)}
    return {**facts, "Sha256": hashlib.sha256(data).hexdigest(), "Revision": "0" * 40, "IsLFS": False}


def _send_part(request: BaseHTTPRequestHandler, data: bytes) -> None:
    part = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
    if part is None:
        _send(request, 200, data)
        return
    start, end = int(part[1]), min(len(data), int(part[2] or len(data)) + 1)
    _send(request, 206, data[start:end], {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"})


def _send(request: BaseHTTPRequestHandler, code: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
    request.send_response(code)
    for key, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
        request.send_header(key, text)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(data)
