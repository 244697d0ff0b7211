"""Comparison with the published models: right gaps, nothing averaged or compared that is not the same."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from commands import say

from aimscale.analysis.published import beside_runs, compare
from aimscale.analysis.table.schema import results_table, write_table

PROBE = {"task": "dtd", "kind": "attentive", "evaluation": "a-b", "chance": 0.1}


def rows(tasks, kinds=("attentive",)):
    """4 sizes x 4 budgets of a known law, with accuracy a steep function of loss."""
    out = []
    for n in (1e5, 4e5, 1.6e6, 6.4e6):
        for d in (1e4, 4e4, 1.6e5, 6.4e5):
            loss = 0.2 + 20 * n**-0.4 + 30 * d**-0.5
            top1 = 0.1 + 0.89 / (1 + np.exp(9 * (loss - 0.42)))
            probes = [PROBE | {"task": t, "kind": k, "n": 1000, "top1": top1} for t in tasks for k in kinds]
            run = {"run_id": f"n{n:g}", "size": f"n{n:g}", "status": "complete", "image_size": 32, "val_loss": loss}
            counts = {"params_total": n, "params_trunk": 0.6 * n, "images_seen": d, "flops_train": 6 * n * d}
            out.append(run | counts | {"probes": probes})
    return out


def table(tasks, **options):
    return results_table(rows(tasks, **options)).to_pandas()


def test_gaps_are_ours_minus_theirs_at_the_largest_budget():
    found = compare(table(["cifar10", "my-own"], kinds=("attentive", "knn")))
    assert found.tasks["task"].unique().tolist() == ["cifar10"]
    assert found.tasks["images_seen"].unique().tolist() == [640_000]
    last = found.tasks.iloc[-1]
    assert last["gap_to_aim_7b"] == pytest.approx(last["top1"] - 0.986)
    assert (last["best_frozen"], last["best_frozen_top1"]) == ("dinov2-g14", 0.996)
    left_out = {flag.kind: flag.subject for flag in found.left_out}
    assert (left_out["other_tasks"], left_out["other_probes"], left_out["other_sides"]) == ("my-own", "knn", "32")
    assert "loss_levels" in left_out
    lora = compare(table(["cifar10"], kinds=("attentive", "lora")))  # adapts the trunk: no frozen probe
    pd.testing.assert_frame_equal(lora.tasks, found.tasks)


def with_last_blocks(entry, drop):
    """A probe entry as our own prober writes it: the last six blocks are worth `drop` less than the chosen ones."""
    last = entry["top1"] - drop
    return entry | {"last_top1": last, "last_top1_lo95": last - 0.03, "last_top1_hi95": last + 0.03}


def test_each_choice_of_blocks_stands_beside_the_papers_row_of_that_choice():
    ours = rows(["cifar10", "dtd"])
    for row in ours:
        row["probes"] = [with_last_blocks(entry, 0.05) for entry in row["probes"]]
    found = compare(results_table(ours).to_pandas())
    largest = found.tasks[found.tasks["size"] == "n6.4e+06"].set_index(["task", "blocks"])
    assert largest["aim_7b"].to_dict() == {
        ("cifar10", "last"): 0.986, ("cifar10", "chosen"): 0.989, ("dtd", "last"): 0.823, ("dtd", "chosen"): 0.856,
    }  # fmt: skip
    gap = largest["top1"]["cifar10", "chosen"] - largest["top1"]["cifar10", "last"]
    assert gap == pytest.approx(0.05)
    assert (largest["top1"] - largest["aim_7b"]).to_list() == pytest.approx(largest["gap_to_aim_7b"].to_list())


def test_gaps_to_baselines_have_newcombes_interval():
    # Newcombe, Statistics in Medicine 17:873 (1998), table II, (a): 56/70 and 48/80, method 10: 0.0524 to 0.3339
    probes = pd.DataFrame(
        {"task": "t", "kind": "knn", "size": ["w64"], "params_total": [1e5], "images_seen": [8], "n": [100],
         "top1": [56 / 70], "top1_lo95": [0.6919], "top1_hi95": [0.8769]}
    )  # fmt: skip
    baselines = pd.DataFrame(
        {"task": "t", "kind": "knn", "size": ["raw-pixels"], "n": [100],
         "top1": [48 / 80], "top1_lo95": [0.4905], "top1_hi95": [0.7003]}
    )  # fmt: skip
    (row,) = beside_runs(probes, baselines).to_dict("records")
    assert (row["gap_lo95"], row["gap_hi95"]) == pytest.approx((0.0524, 0.3339), abs=2e-4)
    # (1.9600 + 0.8416) standard errors are seen in 80 % of repetitions, where 1.9600 of them are the half-width
    assert row["detectable"] == pytest.approx((0.3339 - 0.0524) / 2 * 2.8016 / 1.9600, abs=2e-4)
    assert (row["baseline"], row["verdict"]) == ("raw-pixels", "above")
    turned = baselines.assign(params_total=1e5, images_seen=8), probes.drop(columns=["params_total", "images_seen"])
    assert beside_runs(*turned)["verdict"].tolist() == ["below"]
    assert beside_runs(probes, baselines.assign(n=99)).empty  # other test images


def test_the_command_shows_our_own_baselines(tmp_path):
    table = rows(["dtd"])
    write_table(results_table(table), tmp_path / "results.parquet")
    baseline = {"size": "raw-pixels", "run_id": "like", "probes": table[0]["probes"]}
    write_table(results_table([baseline]), tmp_path / "baselines.parquet")
    arguments = ["compare", tmp_path]
    assert re.search(r"significant +0 of \d exclude zero, where \S+ would by chance", say(*arguments))
    text = say(*arguments, "--json")
    shown = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert len(shown["tasks"]) == 4
    assert {row["baseline"] for row in shown["baselines"]} == {"raw-pixels"}
