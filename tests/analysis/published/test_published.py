"""Published numbers agree with themselves; the paper's ablations stand beside ours where settings mean the same."""

import json

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis import fit
from aimscale.analysis.effects.contrasts import contrast, factors
from aimscale.analysis.published.published import (
    TASKS,
    ablations,
    beside_paper,
    best_frozen,
    in_words,
    published_frame,
    table6,
)  # fmt: skip
from aimscale.analysis.table.read import with_setup

PART = {"sizes": ["s3", "s4"], "budgets": [8000]}


def probed(frame: pd.DataFrame, setups: dict[str, dict[str, object]] | None = None) -> pd.DataFrame:
    """Linear and attentive probes on every row, and the set-up of each seed's prefix, head or objective."""
    kinds = ("linear", "attentive", "knn")
    wobble = 0.01 * np.arange(len(frame)) ** 0.5
    entries = [[{"task": "t", "kind": kind, "n": 100, "top1": 0.5 + each} for kind in kinds] for each in wobble]
    setup = [json.dumps((setups or {}).get(run.rsplit("_")[-1], {})) for run in frame["run_id"]]
    return with_setup(frame.assign(probes=entries, setup=setup))


def test_every_printed_mean_is_the_mean_of_its_row():
    assert len(table6()) == 11
    assert len(TASKS) == 15
    assert table6()["mean"].to_numpy() == pytest.approx(table6()["printed_mean"].to_numpy(), abs=0.0006)


def test_sizes_have_the_parameters_of_the_released_files_and_the_flops_of_the_published_runs():
    sizes, last6 = published_frame(), table6()["imagenet-1k"]
    width, depth = sizes["width"], sizes["depth"]
    assert sizes["params_trunk"].to_list() == (depth * (12 * width**2 + 4 * width) + 2 * width).to_list()
    assert sizes["params_total"].to_list() == (width * 591 + sizes["params_trunk"] + sizes["params_head"]).to_list()
    head = width * 2048 + 2048 + 12 * (8 * 2048**2 + 2 * 2048) + 2 * 2048 + 2048 * 588 + 588
    assert sizes["params_head"].to_list() == head.to_list()
    assert 500_000 * 4096 * sizes["flops_per_image"][0] == pytest.approx(3.5e21, rel=0.01)
    assert 1_250_000 * 4096 * sizes["flops_per_image"][3] == pytest.approx(5.4e22, rel=0.01)
    assert sizes["in1k_last6"].to_list() == last6[sizes["size"]].to_list()
    assert last6["aim-7B-best"] == sizes["in1k_best6"][3]
    assert (best_frozen("imagenet-1k"), best_frozen("rxrx1")) == ("dinov2-g14", "aim-7B")


def test_losses_of_the_four_sizes_fall_by_the_exponents_that_the_paper_draws():
    exponents = [
        fit(published_frame(), "power:N", columns={"N": n}).params["a"] for n in ("params_trunk", "params_total")
    ]
    assert exponents == pytest.approx([0.0188, 0.0228], abs=5e-5)


def test_cells_of_one_setting_agree_between_ablations():
    cells = ablations().set_index("setting")
    default = cells.loc[["crops from 0.4", "MLP head", "head of width 2048", "12 head blocks"], ["linear", "attentive"]]
    assert (default == [0.700, 0.782]).all(axis=None)
    assert cells.loc["autoregressive", "attentive"] == 0.782
    assert len(cells) == 22


def test_the_papers_difference_stands_beside_ours_with_its_interval(known_study):
    df = probed(known_study(PART, PART | {"patch_order": "outward_spiral"}, PART | {"patch_order": "inward_spiral"}))
    found = contrast(df, by="patch_order")
    beside = beside_paper(found)
    assert beside["change"].tolist() == ["spiral over raster"] * 2  # inward is not the authors'
    assert dict(zip(beside["kind"], beside["published"], strict=True)) == pytest.approx(
        {"linear": 0.677 - 0.695, "attentive": 0.763 - 0.774}
    )
    ours = next(c for c in found.contrasts if c.measure.name == "top1:t:linear" and c.level == "outward_spiral")
    assert beside.loc[0, ["difference", "low", "high", "N"]].tolist() == [
        *(ours.difference, ours.low, ours.high),
        "120k to 360k",
    ]
    assert f"[{100 * ours.low:+.1f}, {100 * ours.high:+.1f}]" in next(in_words(beside))


def test_heads_are_put_beside_by_their_rule_and_never_by_blocks_of_another_size(known_study):
    heads = {"1": {}, "0": {"model.head_depth": 0}, "6": {"model.head_depth": 6}, "12": {"model.head_depth": 12}}
    parts = [PART | {"head_depth": int(depth)} for depth in heads] + [PART | {"head_depth": 1, "device": "tf"}]
    df = probed(known_study(*parts), heads | {"tf": {"model.head_kind": "transformer"}})
    changes = [*beside_paper(contrast(df, by="head_depth"))["change"]]
    changes += [*beside_paper(contrast(df, by="model.head_kind", measures=["top1"]))["change"]]
    assert set(changes) == {"no head over MLP head", "transformer head over MLP head"}
    for baseline, expected in (
        ("1", {"no head over MLP head": -0.06}),
        ("12", {"6 head blocks over 12 head blocks": -0.047}),
    ):
        beside = beside_paper(contrast(df, by="head_depth", baseline=baseline)).query("kind == 'linear'")
        assert dict(zip(beside["change"], beside["published"], strict=True)) == pytest.approx(expected)


def test_the_width_of_a_head_is_a_change_where_nothing_else_of_it_is(known_study):
    df = probed(known_study(PART | {"head_width": 512}, PART | {"head_width": 2048, "device": "wide"}))
    df = df.assign(**{"model.head_width": df["head_width"].astype(int).astype(str)})
    assert "model.head_width" in factors(df)
    assert set(beside_paper(contrast(df, by="model.head_width"))["change"]) == {
        "head of width 2048 over head of width 512"
    }


def test_masked_models_are_paired_with_the_autoregressive_one(known_study):
    df = probed(known_study(PART, PART | {"prefix": None}), {"None": {"objective.masked": 0.75}})
    beside = beside_paper(contrast(df, by="objective.masked", measures=["top1"]))
    assert set(beside["change"]) == {"75 % masked over autoregressive"}
    assert beside["kind"].tolist() == ["attentive"]
    assert beside["published"].tolist() == pytest.approx([-0.004])
