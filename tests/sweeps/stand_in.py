"""Stand-in for the trainer: writes a run directory as `harness.attempt` does, in milliseconds a step."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from aimscale.harness.run.directory import EXIT_FINISHED, EXIT_OFF_TRACK, EXIT_PREEMPTED, RunDir
from aimscale.harness.run.files import write_json
from aimscale.harness.run.lock import LockHeld

STEPS = 5


def main(path: str, behaviour: str = "finish") -> int:
    run = RunDir(path)
    config = run.load_config()
    if (run.path / "behaviour").exists():
        behaviour = (run.path / "behaviour").read_text().strip()
    told = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: told.append(True))
    try:
        with run.hold():
            with (run.path / "starts").open("a") as file:
                file.write(f"{os.getpid()}\n")
            done = sum(row["images_seen"] for row in run.read_rows())
            run.write_status(
                state="running", attempt=run.read_status().attempt + 1, images_planned=sum(config.evaluation.budgets)
            )
            for budget in config.evaluation.budgets:
                if any(row["images_seen"] == budget for row in run.read_rows()):
                    continue
                for step in range(30_000 if behaviour in ("wait", "hang", "deviate") else STEPS):
                    time.sleep(0.01)
                    if behaviour == "deviate" and step < 4:
                        with run.curve.open("a") as file:
                            file.write(json.dumps({"images_seen": 128 * (step + 1), "val_loss": 0.9}) + "\n")
                    if told and behaviour != "hang":
                        run.write_status(state="preempted", reason="told to stop")
                        return EXIT_PREEMPTED
                if behaviour == "off track":
                    run.write_status(state="off-track", reason="+4.2 sd above its forecast", images_done=done + 1)
                    return EXIT_OFF_TRACK
                if behaviour == "crash":
                    raise RuntimeError("the user's code is wrong")
                if behaviour == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                done += budget
                run.checkpoint_dir(budget).mkdir(parents=True, exist_ok=True)
                write_json(run.checkpoint_dir(budget) / "manifest.json", {})
                run.record_row(
                    {
                        "run_id": config.run_id,
                        "images_seen": budget,
                        "val_loss": 1 / budget,
                        "finished_at": "2026-01-01",
                    }
                )
                run.write_status(images_seen=budget, images_done=done, loss=1 / budget, heartbeat=time.time())
                if behaviour == "crash later":
                    raise RuntimeError("the user's code is wrong")
            run.write_status(state="finished")
            return EXIT_FINISHED
    except LockHeld as held:
        print(held)
        return held.exit_code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
