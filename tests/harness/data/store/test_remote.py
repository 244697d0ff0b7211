"""Shards in object stores: a real S3 interface and a web server on this machine, with faults."""

from __future__ import annotations

import contextlib
import functools
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
import torch

from aimscale.harness.data import DataError
from aimscale.harness.data.store import shards
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.indexing import index_shards
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.positions import TrainStream
from aimscale.harness.run.config import RunConfig

_PAUSES = {"stall": 3.0, "far": 0.02}
"""Seconds before an answer; `far` is a network's latency."""


class Server(http.server.ThreadingHTTPServer):
    """Takes a whole batch's connections at once."""

    request_queue_size = 128


class FaultyHandler(http.server.SimpleHTTPRequestHandler):
    """A file server with byte ranges; `fault` says what is wrong with the n-th request for the same range."""

    fault: Callable[[str, int], str | None]
    asked: Counter[str]
    under_way: list[int]

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path, wanted = Path(self.translate_path(self.path)), self.headers.get("Range")
        if wanted is None or path.suffix != ".tar":
            return super().do_GET()
        self.asked[f"{self.path} {wanted}"] += 1
        self.under_way[0] += 1
        self.under_way[1] = max(self.under_way)
        try:
            self._answer(path, wanted, type(self).fault(self.path, self.asked[f"{self.path} {wanted}"]))
        finally:
            self.under_way[0] -= 1

    def _answer(self, path: Path, wanted: str, fault: str | None) -> None:
        first, last = (int(number) for number in re.findall(r"\d+", wanted))
        data = path.read_bytes()[first : last + 1]
        if fault in _PAUSES:
            time.sleep(_PAUSES[fault])
        if fault in ("503", "403"):
            return self.send_error(int(fault))
        time.sleep(_PAUSES["far"])
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            self.close_connection = True


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, type[FaultyHandler]]]]:
    servers: list[http.server.ThreadingHTTPServer] = []

    def start(folder: Path, fault: Callable[[str, int], str | None]) -> tuple[str, type[FaultyHandler]]:
        attributes = {"fault": staticmethod(fault), "asked": Counter(), "under_way": [0, 0]}
        handler = type("Handler", (FaultyHandler,), attributes)
        server = Server(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(shards, "_FIRST_PAUSE_S", 0.001)
    if kind == "stall":
        monkeypatch.setattr(shards, "_STALLED_S", 0.7)


@pytest.mark.parametrize("kind", ["503", "cut", "stall"])
def test_faults_that_pass_leave_no_trace(
    kind: str,
    small_set: Path,
    configure: Callable[..., RunConfig],
    serve: Callable[..., tuple[str, type[FaultyHandler]]],
    impatient: None,
) -> None:
    expected = TrainStream(configure(sources=[{"path": str(small_set)}])).batch(range(32))
    url, handler = serve(small_set, lambda path, turn: kind if turn <= 2 and path.endswith("0.tar") else None)
    stream = TrainStream(configure(sources=[{"path": url}]))
    assert torch.equal(stream.batch(range(32)).images, expected.images)
    assert stream.batch(range(32)).bad_samples == ()
    assert handler.under_way[1] > 4, "the reads of a batch did not go out together"
    counts = {request: count for request, count in handler.asked.items() if "0.tar" in request}
    if kind == "stall":  # on a busy machine a good read may seem to have stalled, too
        assert min(counts.values()) >= 3
        return
    assert {*counts.values()} == {3}
    assert {*(handler.asked - Counter(counts)).values()} == {1}, "good reads were redone"


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("503", r"cannot read shard {url}/shard-000001.tar: .*503"),
        ("stall", r"cannot read shard {url}/shard-000001.tar: stalled: \d+ bytes did not come within 0.7 s"),
    ],
)
def test_faults_that_stay_name_shard_and_url(
    kind: str,
    says: str,
    small_set: Path,
    configure: Callable[..., RunConfig],
    serve: Callable[..., tuple[str, type[FaultyHandler]]],
    impatient: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "_NUM_TRIES", 2)
    url, _ = serve(small_set, lambda path, turn: kind if path.endswith("1.tar") else None)
    stream = TrainStream(configure(sources=[{"path": url}]))
    with pytest.raises(DataError, match=says.format(url=url)):
        stream.batch(range(60))


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
        if fault in _PAUSES:
            time.sleep(_PAUSES[fault])
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
def faulty_bucket(small_set: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """URL of the small set in a bucket behind moto's S3 server, whose faults a function says."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    store = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    store.start()
    proxies: list[Server] = []

    def start(fault: Callable[[str, int], str | None], tries: int, folder: Path = small_set) -> str:
        attributes = {"fault": staticmethod(fault), "asked": Counter(), "upstream": store.get_host_and_port()}
        proxies.append(Server(("127.0.0.1", 0), type("Handler", (S3Proxy,), attributes)))
        threading.Thread(target=proxies[0].serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{proxies[0].server_address[1]}"
        settings = {"endpoint_url": address, "key": "test", "secret": "test"}
        tell_fsspec(monkeypatch, {**settings, "config_kwargs": {"retries": {"total_max_attempts": tries}}})
        filesystem = fsspec.filesystem("s3")
        filesystem.makedirs("faulty", exist_ok=True)  # moto's buckets live as long as the process
        for path in folder.rglob("*"):
            if path.is_file():
                filesystem.put(str(path), f"faulty/{path.relative_to(folder)}")
        return "s3://faulty"

    yield start
    for server in proxies:
        server.shutdown()
        server.server_close()
    store.stop()


def test_faults_of_s3_that_pass_leave_no_trace(
    small_set: Path,
    configure: Callable[..., RunConfig],
    faulty_bucket: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "_STALLED_S", 2.0)
    kinds = {"0.tar": "500", "1.tar": "cut", "2.tar": "stall"}
    url = faulty_bucket(lambda path, turn: kinds.get(path[-5:]) if turn == 1 else None, tries=2)
    expected = TrainStream(configure(sources=[{"path": str(small_set)}])).batch(range(32))
    found = TrainStream(configure(sources=[{"path": url}])).batch(range(32))
    assert torch.equal(found.images, expected.images)
    assert found.bad_samples == ()


@pytest.mark.parametrize(
    ("kind", "says"), [("500", "an internal error"), ("cut", ""), ("stall", "stalled: .* did not come within 1 s")]
)
def test_faults_of_s3_that_stay_name_shard_and_url(
    kind: str,
    says: str,
    configure: Callable[..., RunConfig],
    faulty_bucket: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "_STALLED_S", 1.0 if kind == "stall" else 60.0)
    monkeypatch.setattr(shards, "_NUM_TRIES", 1)
    url = faulty_bucket(lambda path, turn: kind if path.endswith("1.tar") else None, tries=1)
    stream = TrainStream(configure(sources=[{"path": url}]))
    shard = "." if kind == "stall" else "1"  # on a busy machine a good read may seem to have stalled, too
    with pytest.raises(DataError, match=rf"cannot read shard {url}/shard-00000{shard}.tar: .*{says}"):
        stream.batch(range(60))


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of a bucket behind moto's S3 server; fsspec is told where that is."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        tell_fsspec(patch, {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"})
        fsspec.filesystem("s3").mkdir("shards")
        yield "s3://shards"
    server.stop()


def test_s3_gives_the_same_stream_as_files(
    small_set: Path, tmp_path: Path, bucket: str, configure: Callable[..., RunConfig]
) -> None:
    filesystem = fsspec.filesystem("s3")
    for path in small_set.rglob("*"):
        if path.is_file():
            filesystem.put(str(path), f"shards/small/{path.relative_to(small_set)}")
    url = f"{bucket}/small"
    classes = ("ant", "bee", "cat")
    index_shards(url, tmp_path / "index", classes=classes)
    assert open_dataset(tmp_path / "index").fingerprint == open_dataset(small_set).fingerprint
    expected = TrainStream(configure(sources=[{"path": str(small_set)}])).batch(range(40))
    for path, cache in ((str(tmp_path / "index"), None), (url, None), (url, str(tmp_path / "cache"))):
        stream = TrainStream(configure(sources=[{"path": path}]), cache_dir=cache)
        for workers in (0, 2):
            steps = train_batches(stream, start=0, stop=40, batch_size=8, micro_batch=8, num_workers=workers)
            assert torch.equal(torch.cat([batch.images for step in steps for batch in step]), expected.images)
    assert [*(tmp_path / "cache").glob("*/*/index-*/samples.npy")], "the index was not kept in the cache"
    with pytest.raises(DataError, match="has no index"):
        open_dataset(f"{bucket}/nowhere")
    filesystem.rm(f"shards/small/{open_dataset(small_set).shards[0].name}")
    with pytest.raises(DataError, match=rf"shard {url}/shard-000000.tar is missing"):
        TrainStream(configure(sources=[{"path": str(tmp_path / "index")}])).batch(range(60))
