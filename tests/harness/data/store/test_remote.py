"""Shards in object stores: a real S3 interface and a web server on this machine, with faults."""

from __future__ import annotations

import functools
import http.server
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from aimscale.harness.data.errors import DataError
from aimscale.harness.data.store import shards
from aimscale.harness.data.store.index import open_dataset
from aimscale.harness.data.store.indexing import index_shards
from aimscale.harness.data.stream.loader import train_batches
from aimscale.harness.data.stream.positions import TrainStream
from aimscale.harness.run.config import RunConfig


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
        if fault == "stall":
            time.sleep(3)
        if fault in ("503", "403"):
            return self.send_error(int(fault))
        time.sleep(0.02)  # a network's latency
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


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """URL of a bucket behind moto's S3 server; fsspec is told where that is."""
    server_module = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import fsspec

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"endpoint_url": f"http://{host}:{port}", "key": "test", "secret": "test"}
    before = dict(fsspec.config.conf)
    fsspec.config.conf["s3"] = settings
    fsspec.filesystem("s3").mkdir("shards")
    yield "s3://shards"
    fsspec.config.conf.clear()
    fsspec.config.conf.update(before)
    server.stop()


def test_s3_gives_the_same_stream_as_files(
    small_set: Path, tmp_path: Path, bucket: str, configure: Callable[..., RunConfig]
) -> None:
    import fsspec

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
