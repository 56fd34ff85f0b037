"""The Hub's HTTP API as far as an upload needs it, on the loopback interface; everything it receives is kept."""

from __future__ import annotations

import base64
import hashlib
import json
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class FakeHub(ThreadingHTTPServer):
    """A Hub with one repository.

    Args:
        token: The only one that may write.
        existing: Names of files in the repository.
    """

    def __init__(self, token: str, existing: tuple[str, ...] = ()) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.existing = existing
        self.created: dict[str, Any] | None = None
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.deleted: set[str] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def fake_hub(token: str, existing: tuple[str, ...] = ()):
    hub = FakeHub(token, existing)
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""

    def _answer(self, value: Any, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            self._answer([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in self.server.existing])
        else:
            files = [{"rfilename": name} for name in self.server.existing]
            self._answer({"id": "org/name", "sha": "0" * 40, "siblings": files})

    def do_PUT(self) -> None:
        data = self._body()
        self.server.blobs[hashlib.sha256(data).hexdigest()] = data
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self._answer({"url": f"{self.server.url}/org/name"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            self._answer({"files": [_upload_mode(file) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._action(file) for file in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            self._commit(body)
        else:
            self._answer({"error": self.path}, 404)

    def _action(self, file: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.server.url}/blob/{file['oid']}", "header": {}}
        return {"oid": file["oid"], "size": file["size"], "actions": {"upload": upload}}

    def _commit(self, body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                self.server.deleted.add(value["path"])
        self._answer({"commitUrl": f"{self.server.url}/org/name/commit/1", "commitOid": "1" * 40})


def _upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
