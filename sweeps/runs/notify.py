"""Say to a webhook that a run failed or a sweep ended: one JSON object a message, which any webhook takes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any, Literal

from aimscale.sweeps.plan.sweepfile import SweepError
from aimscale.sweeps.runs.claims import RunRecord
from aimscale.sweeps.runs.probe_record import jobs_beside

VARIABLE = "AIMSCALE_NOTIFY"
"""Environment variable that tells jobs the address."""
TIMEOUT_S = 10.0
UNDER_WAY = ("queued", "running", "preempted")


def check_url(url: str) -> str:
    """An address that can be posted to.

    Raises:
        SweepError: it is none of http or https.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise SweepError(f"--notify takes an address that begins with http:// or https://, not '{url}'")
    return url


def post(url: str | None, event: Literal["failed", "ended"], sweep: str, text: str, **facts: Any) -> bool:
    """Post `event`, `sweep`, `text` and facts; a webhook that does not answer is said on stderr and nothing else."""
    if not url:
        return False
    body = json.dumps({"event": event, "sweep": sweep, "text": text, **facts}).encode()
    request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S):
            return True
    except (OSError, ValueError) as error:  # urllib's own errors are OSErrors
        print(f"the webhook did not take the message ({error})", file=sys.stderr)
        return False


def post_failure(url: str | None, record: RunRecord) -> bool:
    """Say that a run failed for good."""
    status, sweep = record.checked_status(), record.home.name
    text = f"{sweep}: {record.title} failed ({status.reason_class}: {status.reason})"
    facts = {"run_id": record.run.path.name, "reason": status.reason, "reason_class": status.reason_class}
    return post(url, "failed", sweep, text, **facts)


def post_from_job(record: RunRecord, *, has_failed: bool) -> None:
    """Say from a Slurm job that its work failed, and that the sweep ended where it was the last work under way."""
    url = os.environ.get(VARIABLE)
    if not url:
        return
    if has_failed:
        post_failure(url, record)
    others = (each for path in record.run.path.parent.iterdir() for each in _work_under_way(RunRecord(path)))
    if not any(each.path != record.path for each in others):
        post(url, "ended", record.home.name, f"{record.home.name}: nothing waits or runs any more")


def _work_under_way(run: RunRecord) -> Iterator[RunRecord]:
    """Training, and the jobs beside it where training has not failed: Slurm starts none of those then."""
    with contextlib.suppress(SweepError):
        state = run.checked_status().state
        if state in UNDER_WAY and run.read_claim() is not None:
            yield run
        for job in jobs_beside(run.path).values() if state not in ("failed", "diverged") else ():
            if job.checked_status().state in UNDER_WAY and job.read_claim() is not None:
                yield job
