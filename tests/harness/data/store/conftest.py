"""Shards on a web server and behind a real S3 interface on this machine, with faults."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import json
import multiprocessing
import multiprocessing.forkserver
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

Fault = Callable[[str, int], str | None]
"""What is wrong with the n-th request for the same range of a path, if anything."""
PAUSES = {"stall": 3.0, "far": 0.02}
"""Seconds before an answer; `far` is a network's latency."""


class FaultyHandler(http.server.SimpleHTTPRequestHandler):
    """A file server with byte ranges; `fault` says what is wrong with the n-th request for the same range."""

    folder: str
    fault: Fault
    asked: Counter[str]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args, directory=self.folder)

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if path.suffix != ".tar":
            return super().do_GET()
        self.asked[f"{self.path} {wanted}"] += 1
        if wanted is None or not path.exists():
            return super().do_GET()
        self._answer(path, wanted, type(self).fault(self.path, self.asked[f"{self.path} {wanted}"]))

    def _answer(self, path: Path, wanted: str, fault: str | None) -> None:
        first, last = (int(number) for number in re.findall(r"\d+", wanted))
        data = path.read_bytes()[first : last + 1]
        if fault in PAUSES:
            time.sleep(PAUSES[fault])
        if fault == "503":
            return self.send_error(503)
        time.sleep(PAUSES["far"])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            self.close_connection = True


class Server(http.server.ThreadingHTTPServer):
    """Takes a whole batch's connections at once."""

    request_queue_size = 128


@pytest.fixture
def listen() -> Iterator[Callable[..., tuple[str, Any]]]:
    """Start a server of a kind, with attributes, and return its address and its handler."""
    servers: list[Server] = []

    def start(kind: type[FaultyHandler], fault: Fault, **attributes: Any) -> tuple[str, Any]:
        attributes |= {"fault": staticmethod(fault), "asked": Counter()}
        handler = type("Handler", (kind,), attributes)
        servers.append(Server(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def serve(listen: Callable[..., tuple[str, Any]]) -> Callable[..., tuple[str, Any]]:
    """A web server of a folder."""
    return lambda folder, fault=lambda path, turn: None: listen(FaultyHandler, fault, folder=str(folder))


def tell_fsspec(patch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Where S3 is and how to speak to it, for this process and for those that load."""
    patch.setitem(fsspec.config.conf, "s3", settings)
    patch.setenv("FSSPEC_S3", json.dumps(settings))
    multiprocessing.forkserver._forkserver._stop()  # the next one reads that


class S3Proxy(FaultyHandler):
    """Stands before an S3 server, at `upstream`, and is faulty as `fault` says."""

    protocol_version = "HTTP/1.1"
    upstream: tuple[str, int]

    def _forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection(*self.upstream)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        status, data, wanted, fault = answer.status, answer.read(), self.headers.get("Range"), None
        if self.command == "GET" and wanted and ".tar" in self.path:
            self.asked[f"{self.path} {wanted}"] += 1
            fault = type(self).fault(self.path, self.asked[f"{self.path} {wanted}"])
        if fault == "500":
            status, data = 500, b"<Error><Code>InternalError</Code><Message>an internal error</Message></Error>"
        if fault in PAUSES:
            time.sleep(PAUSES[fault])
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        dropped = ("content-length", "connection", "transfer-encoding", *(("content-range",) if fault == "500" else ()))
        self.send_response(status)
        for name, value in answer.getheaders():
            if name.lower() not in dropped:
                self.send_header(name, value)
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        with contextlib.suppress(OSError):  # who asked has given up
            self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        self.close_connection = fault == "cut"

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward


@pytest.fixture
def faulty_bucket(small_set: Path, listen: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """URL of the small set in a bucket behind moto's S3 server, whose faults a function says."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    store = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    store.start()

    def start(fault: Fault, tries: int) -> str:
        address, _ = listen(S3Proxy, fault, folder="", upstream=store.get_host_and_port())
        settings = {"endpoint_url": address, "key": "test", "secret": "test"}
        tell_fsspec(monkeypatch, {**settings, "config_kwargs": {"retries": {"total_max_attempts": tries}}})
        filesystem = fsspec.filesystem("s3")
        filesystem.makedirs("faulty", exist_ok=True)  # moto's buckets live as long as the process
        for path in small_set.rglob("*"):
            if path.is_file():
                filesystem.put(str(path), f"faulty/{path.relative_to(small_set)}")
        return "s3://faulty"

    yield start
    store.stop()
