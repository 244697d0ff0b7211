from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from aimscale.aim.errors import UserError
from aimscale.sweeps.plan.planner import plan
from aimscale.sweeps.state.claims import RunRecord, claim_run, own_claim
from aimscale.sweeps.state.notify import VARIABLE, check_url, leave, post
from aimscale.sweeps.state.probe_record import EvaluationRecord
from aimscale.sweeps.state.sweep_dir import prepare


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server that keeps the JSON it is sent."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/hook", got
    server.shutdown()


def test_a_launch_tells_of_each_failure_and_of_its_end(
    webhook: Any, write_sweep: Any, launch: Any, stand_in: Any
) -> None:
    url, got = webhook
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    bad = plan(sweep)[1].run_id
    prepare(sweep)
    RunRecord.create(sweep.run_dir(bad), plan(sweep)[1].config)
    (sweep.run_dir(bad) / "behaviour").write_text("crash")
    launch(sweep, slots=2, command=stand_in(), notify=url)
    assert [message["event"] for message in got] == ["failed", "ended"]
    assert (got[0]["sweep"], got[0]["run_id"], got[0]["reason_class"]) == ("tiny", bad, "code")
    assert "the user's code is wrong" in got[0]["text"]
    assert (got[1]["finished"], got[1]["failed"]) == (1, 1)


def test_the_last_slurm_job_of_a_sweep_tells_of_the_end(
    webhook: Any, write_sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got = webhook
    monkeypatch.setenv(VARIABLE, url)
    sweep = write_sweep(sizes=["rung-32"], seeds=[0, 1])
    prepare(sweep)
    records = [RunRecord(sweep.run_dir(run.run_id)) for run in plan(sweep)]
    for i, (record, run) in enumerate(zip(records, plan(sweep), strict=True)):
        claim_run(record, run, own_claim("slurm", 1, f"7_{i}"))
    for record in records:
        record.write_status(state="finished")  # at the same moment
    leave(records[0], "7_0", has_failed=False)
    assert got == []
    records[1].write_status(state="failed", reason="r", reason_class="code")
    leave(records[1], "7_1", has_failed=True)
    assert [message["event"] for message in got] == ["failed", "ended"]


def test_an_evaluation_that_fails_is_named_by_its_run_and_one_that_waits_keeps_the_sweep_from_its_end(
    webhook: Any, write_sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, got = webhook
    monkeypatch.setenv(VARIABLE, url)
    sweep = write_sweep(sizes=["rung-32"])
    (run,) = plan(sweep)
    prepare(sweep)
    trained = RunRecord(sweep.run_dir(run.run_id))
    claim_run(trained, run, own_claim("slurm", 1, "7"))
    job = EvaluationRecord.of(trained.path)
    job.write_status(state="queued")
    job.write_claim(own_claim("slurm", 1, "8"))
    trained.write_status(state="finished")
    leave(trained, "7", has_failed=False)
    assert got == []
    job.write_status(state="failed", reason="r", reason_class="code")
    leave(job, "8", has_failed=True)
    assert [message["event"] for message in got] == ["failed", "ended"]
    assert got[0]["text"] == f"tiny: the evaluation of {run.run_id} failed (code: r)"
    assert (got[0]["run_id"], got[1]["sweep"]) == (run.run_id, "tiny")


def test_a_webhook_that_does_not_answer_stops_nothing(capsys: Any) -> None:
    assert not post("http://127.0.0.1:9/", "ended", "s", "text")
    assert "did not take the message" in capsys.readouterr().err
    assert not post(None, "ended", "s", "text")


@pytest.mark.parametrize("url", ["file:///etc/passwd", "example.org", "http://", "http://a b", "http://a\nb"])
def test_what_is_no_webhook_is_refused(url: str) -> None:
    with pytest.raises(UserError, match="--notify"):
        check_url(url)
