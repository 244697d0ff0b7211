"""The report beside the project's own baselines: a table of gaps, and LoRA called what it is."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from aimscale.analysis.report.page import write_report
from aimscale.analysis.table.schema import results_table, write_table


def entry(kind: str, top1: float, **more: Any) -> dict[str, Any]:
    return {"task": "digits", "kind": kind, "n": 500, "chance": 0.1, "top1": top1} | {
        "top1_lo95": top1 - 0.03,
        "top1_hi95": top1 + 0.03,
        **more,
    }


def test_the_report_has_baselines_and_keeps_lora_apart(tmp_path: Path) -> None:
    # without losses no law is fitted, which is what takes the time
    runs = [
        {"run_id": f"w{n}", "size": f"w{n}", "status": "complete", "params_total": n, "images_seen": 64}
        | {"probes": [entry("attentive", 0.6, last_top1=0.55), entry("lora", 0.9)]}
        for n in (1000, 2000)
    ]
    theirs = [
        {"run_id": "w1000", "size": name, "probes": [entry("attentive", top1), entry("lora", 0.99)]}
        for name, top1 in (("raw-pixels", 0.4), ("random-<w2000>", 0.62))
    ]
    write_table(results_table(runs), tmp_path / "results.parquet")
    write_table(results_table(theirs), tmp_path / "baselines.parquet")
    page = html.unescape(re.sub(r"<[^>]+>", " ", write_report(tmp_path).read_text()))
    text = re.sub(r"\s+", " ", page)
    assert "Beside baselines on the same probes" in text
    assert "raw-pixels 40.0 20.0" in text
    assert "random-<w2000>" in text
    assert "no significant difference" in text
    assert "99.0" not in text  # LoRA is no frozen probe: it stands beside no baseline
    assert "LoRA (not frozen)" in text
    (tmp_path / "baselines.parquet").unlink()
    assert "Beside baselines" not in write_report(tmp_path).read_text()
