"""A program that trains nothing in milliseconds, and resumes, as a sweep's `trainer`."""

from __future__ import annotations

TRAIN = """
import json, os, pathlib, signal, sys, time
run_dir, width, budget, hold = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
with open(run_dir / "trained-by", "a") as file:
    print(os.getpid(), file=file)
checkpoint = run_dir / "checkpoint"
step = int(checkpoint.read_text()) if checkpoint.exists() else 0
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
for step in range(step + 1, 9):
    D = budget * step // 8
    time.sleep(hold)
    with open(run_dir / "metrics.jsonl", "a") as file:
        loss = 1 + 2 * width ** -0.5 + 3 * D ** -0.3
        print(json.dumps({"D": D, "val_loss": loss * (1 + (D * 7 % 11 - 5) / 5000)}), file=file)
    checkpoint.write_text(str(step))
"""
