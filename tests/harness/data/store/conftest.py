"""Shards on a web server, with faults, and behind a real S3 interface on this machine."""

from __future__ import annotations

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
def serve() -> Iterator[Callable[..., tuple[str, Any]]]:
    """Start a web server of a folder, and return its address and its handler."""
    servers: list[Server] = []

    def start(folder: Path, fault: Fault = lambda path, turn: None) -> tuple[str, Any]:
        attributes = {"folder": str(folder), "fault": staticmethod(fault), "asked": Counter()}
        handler = type("Handler", (FaultyHandler,), attributes)
        servers.append(Server(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def tell_fsspec(patch: pytest.MonkeyPatch, settings: dict[str, Any]) -> None:
    """Where S3 is and how to speak to it, for this process and for those that load."""
    patch.setitem(fsspec.config.conf, "s3", settings)
    patch.setenv("FSSPEC_S3", json.dumps(settings))
    multiprocessing.forkserver._forkserver._stop()  # the next one reads that


@pytest.fixture
def bucket(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of the small set in a bucket of moto's S3 server."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    store = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    store.start()
    host, port = store.get_host_and_port()
    tell_fsspec(monkeypatch, {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"})
    filesystem = fsspec.filesystem("s3")
    filesystem.makedirs("bucket")
    for path in small_set.rglob("*"):
        if path.is_file():
            filesystem.put(str(path), f"bucket/{path.relative_to(small_set)}")
    yield "s3://bucket"
    store.stop()
