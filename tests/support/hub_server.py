"""A hub of data sets on loopback: the requests by which the hub's client reads, uploads and commits.

It keeps to the documented protocol (preupload, LFS batch with basic transfers, commits as lines of JSON); a repository
is a folder. Files of text up to `SMALL` bytes are "regular", the rest go through LFS, as on the hub.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from tests.support.loopback import Loopback, Quiet
from tests.support.places import ROOT

SMALL = 100_000


class Hub(Quiet, BaseHTTPRequestHandler):
    """One repository, `me/set`; `asked` lists the requests, `failures` the statuses that the next commits answer."""

    folder: Path
    asked: list[str]
    blobs: dict[str, bytes]
    failures: list[int]
    token: str = ""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append(f"PUT {self.path}")
        oid = self.path.rsplit("/", 1)[1]
        if hashlib.sha256(data).hexdigest() != oid:
            return self._json({"error": "content is not its oid"}, 400)
        self.blobs[oid] = data
        return self._json({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlparse(self.path).path)
        self.asked.append(f"POST {path}")
        if self.token and self.headers.get("Authorization") != f"Bearer {self.token}" and "/paths-info/" not in path:
            return self._json({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            return self._json({"url": f"{self._origin()}/datasets/me/set", "name": "me/set", "id": "1"})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if "/preupload/" in path:
            return self._json({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        if path.endswith("/info/lfs/objects/batch"):
            return self._json({"transfer": "basic", "objects": [self._action(o) for o in json.loads(body)["objects"]]})
        if "/commit/" in path:
            if self.failures:
                return self._json({"error": "try later"}, self.failures.pop(0))
            return self._commit([json.loads(line) for line in body.splitlines() if line])
        names = json.loads(body).get("paths", []) if body.startswith(b"{") else []
        return self._json([self._entry(name) for name in names if (self.folder / name).exists()])

    def _origin(self) -> str:
        return f"http://{self.headers['Host']}"

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        is_text = file["size"] <= SMALL and b"\0" not in base64.b64decode(file["sample"])
        return {"path": file["path"], "uploadMode": "regular" if is_text else "lfs", "shouldIgnore": False}

    def _action(self, wanted: dict[str, Any]) -> dict[str, Any]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.blobs:
            return answer  # held already: nothing to upload
        return {**answer, "actions": {"upload": {"href": f"{self._origin()}/upload/{wanted['oid']}", "header": {}}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self._write(value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                self._write(value["path"], self.blobs[value["oid"]])
            elif line["key"] == "deletedFile":
                (self.folder / value["path"]).unlink()
        self._json({"commitUrl": f"{self._origin()}/datasets/me/set/commit/c", "commitOid": "c" * 40, "success": True})

    def _write(self, name: str, data: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.asked.append(path)
        if "/resolve/" in path:
            file = self.folder / path.split("/resolve/")[1].split("/", 1)[1]
            if not file.is_file():
                return self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            data = file.read_bytes()
            if "Range" in self.headers:
                a, b = self.headers["Range"].removeprefix("bytes=").split("-")
                data = data[int(a) : int(b) + 1 if b else None]
            self._send(data, 206 if "Range" in self.headers else 200, {"X-Repo-Commit": "c" * 40, "ETag": '"e"'})
            return None
        if "/tree/" in path:
            inside = path.split("/tree/")[1].partition("/")[2]
            recursive = "recursive=true" in self.path.lower()
            if not (self.folder / inside).is_dir():
                return self._json({"error": "not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            below = sorted((self.folder / inside).rglob("*") if recursive else (self.folder / inside).iterdir())
            return self._json([self._entry(p.relative_to(self.folder).as_posix()) for p in below])
        return self._json({"id": "me/set", "sha": "c" * 40, "siblings": [], "tags": []})

    def _entry(self, name: str) -> dict[str, object]:
        path = self.folder / name
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        data = path.read_bytes()
        oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": name, "size": len(data), "oid": oid}
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 in self.blobs:
            entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 130}
        return entry

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def serving(folder: Path, *, token: str = "", failures: tuple[int, ...] = ()) -> Any:
    """A handler class for a hub whose repository is `folder`; with `token`, writing needs it."""
    settings = {"folder": folder, "asked": [], "blobs": {}, "failures": list(failures), "token": token}
    return type("ThisHub", (Hub,), settings)


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """Variables by which a process of its own finds the hub: the client reads them when it is imported."""
    ours = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home / "hf")}
    return {**os.environ, **ours}


def on_hub(folder: Path, code: str, *arguments: str) -> str:
    """What `code` prints in a process of its own, with `folder` on the hub."""
    handler = serving(folder)
    with Loopback(handler) as server:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True, text=True, env=hub_environment(server.url, Path(arguments[0])), timeout=100, cwd=ROOT,
        )  # fmt: skip
    assert done.returncode == 0, (done.stderr[-2000:], handler.asked[-5:])
    return done.stdout
