"""Say to a webhook that a run failed or a sweep ended: one JSON object a message, which any webhook takes."""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Literal

from aimscale.sweeps.plan.sweepfile import SweepError
from aimscale.sweeps.state.claims import RunRecord
from aimscale.sweeps.state.probe_record import jobs_beside
from aimscale.sweeps.state.sweep_dir import lock_file

VARIABLE = "AIMSCALE_NOTIFY"
"""Environment variable that tells jobs the address."""
TIMEOUT_S = 10.0


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


def leave(record: RunRecord, job_id: str, *, has_failed: bool) -> None:
    """Give back the work of a Slurm job that is over; say that it failed, and that it was the sweep's last."""
    url = os.environ.get(VARIABLE)
    if has_failed:
        post_failure(url, record)
    with lock_file(record.home / "launch.lock"):  # of jobs that end at the same moment, one is the last
        if (claim := record.find_claim()) and claim.job_id == job_id:
            record.drop_claim()
        runs = map(RunRecord, record.run.path.parent.iterdir()) if url else ()
        is_last = not any(map(_is_under_way, runs))
    if is_last:
        post(url, "ended", record.home.name, f"{record.home.name}: nothing waits or runs any more")


def _is_under_way(run: RunRecord) -> bool:
    """Whether a job stands behind training, or beside it where it has not failed: Slurm starts none of those then."""
    try:
        if run.read_claim() is not None:
            return True
        has_failed = run.checked_status().state in ("failed", "diverged")
        return not has_failed and any(job.read_claim() is not None for job in jobs_beside(run.path).values())
    except SweepError:
        return False
