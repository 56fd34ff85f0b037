"""An S3 server on the loopback interface, and a proxy before it that counts requests and injects faults."""

from __future__ import annotations

import http.client
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from nemo_prolong.data.storage import stores

_ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code} was injected</Message></Error>"
_CODES = {"503": "ServiceUnavailable", "403": "AccessDenied"}
_HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "server", "date"}


@dataclass
class Proxy:
    """State of the proxy; ``faults`` are used up by the next GETs (of objects and of listings), one each.

    A fault is ``503``, ``403``, ``cut`` (the connection ends in the middle of the body), ``stall`` (the second half of
    the body waits for ``resume``) or ``slow`` (the answer comes after half a second).
    """

    upstream: tuple[str, int]
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    resume: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def gets(self, key: str) -> list[dict[str, str]]:
        """Return the headers of every GET of an object, in lower case."""
        return [headers for method, path, headers in self.requests if method == "GET" and path.endswith(f"/{key}")]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def do_GET(self) -> None:
        proxy = self.proxy
        with proxy.lock:
            proxy.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
            fault = proxy.faults.pop(0) if self.command == "GET" and proxy.faults else ""
        if fault == "slow":
            time.sleep(0.5)
        if fault in _CODES:
            self._answer(int(fault), {}, _ERROR.format(code=_CODES[fault]).encode())
        else:
            self._answer(*self._forwarded(), fault)

    do_HEAD = do_GET

    def _forwarded(self) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(*self.proxy.upstream, timeout=20)
        connection.request(self.command, self.path, headers=dict(self.headers.items()))
        response = connection.getresponse()
        headers = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
        if self.command == "HEAD":
            headers["Content-Length"] = response.getheader("Content-Length", "0")
        body = response.read()
        connection.close()
        return response.status, headers, body

    def _answer(self, status: int, headers: dict[str, str], body: bytes, fault: str = "") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.wfile.flush()
        if fault == "cut":
            self.close_connection = True
            return
        if fault == "stall":
            self.proxy.resume.wait(20)
        self.wfile.write(body[half:])

    def log_message(self, *_: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing: clients that are killed leave broken pipes behind."""


@dataclass
class Store:
    """A bucket of its own for one test."""

    bucket: str
    client: Any
    proxy: Proxy

    def put(self, key: str, content: bytes) -> str:
        """Store an object and return its address."""
        self.client.put_object(Bucket=self.bucket, Key=key, Body=content)
        return self.url(key)

    def url(self, key: str) -> str:
        """Return the address of a key."""
        return f"s3://{self.bucket}/{key}"

    def deny(self, *actions: str) -> None:
        """Refuse these actions to everybody."""
        place = f"arn:aws:s3:::{self.bucket}"
        statement = {"Effect": "Deny", "Principal": "*", "Action": list(actions), "Resource": [place, f"{place}/*"]}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
        self.client.put_bucket_policy(Bucket=self.bucket, Policy=policy)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[tuple[str, int]]:
    """An S3 server that keeps its objects in memory, on a free port."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server.get_host_and_port()
    server.stop()


@pytest.fixture(scope="session")
def s3_client(s3_server) -> Any:
    """A client that talks to the server directly."""
    import boto3

    endpoint = f"http://{s3_server[0]}:{s3_server[1]}"
    return boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="a", aws_secret_access_key="b"
    )


@pytest.fixture(scope="session")
def proxy_server(s3_server) -> Iterator[tuple[Proxy, str]]:
    """The proxy and its address; one for all tests, since a client of S3 takes long to make."""
    from s3fs import S3FileSystem

    # A client of other tests in this process would go to their server, which is gone.
    S3FileSystem.clear_instance_cache()
    proxy = Proxy(s3_server)
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": proxy}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield proxy, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(s3_client, proxy_server, monkeypatch, request) -> Iterator[Store]:
    """A bucket; the environment leads to it through the proxy."""
    proxy, endpoint = proxy_server
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    settings = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(stores, "_FIRST_DELAY_SECONDS", 0.01)
    bucket = re.sub(r"[^a-z0-9]+", "-", request.node.name)[:60].strip("-")
    s3_client.create_bucket(Bucket=bucket)
    proxy.requests, proxy.faults, proxy.resume = [], [], threading.Event()
    yield Store(bucket, s3_client, proxy)
    proxy.resume.set()


@pytest.fixture
def new_clients(store) -> Iterator[None]:
    """Let this test's settings be read: clients are kept from test to test."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    yield
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def start_python() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a Python process with a script and arguments; killed at the end of the test."""
    processes = []

    def start(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()
