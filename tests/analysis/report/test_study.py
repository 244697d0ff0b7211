"""One page of a whole study: laws from the main grid, single changes, repeats, in words first."""

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from tables import law_grid

from aimscale.analysis import correlate, laws, link
from aimscale.analysis.display import percent
from aimscale.analysis.forecasts.forecaster import DOF
from aimscale.analysis.report.page import write_report
from aimscale.analysis.report.study import CORRELATION, Study, correlate_probes, next_scales, study_tables
from aimscale.analysis.report.summary import findings, verdict
from aimscale.analysis.table.runs import Runs
from aimscale.analysis.table.schema import results_table, write_table

DIRECTION = {"sizes": ["s3"], "budgets": [8000, 32000]}


def rows_of(known_study, *parts):
    """Row dictionaries with probes of two kinds."""
    rows = known_study(*parts).to_dict("records")
    for i, row in enumerate(rows):
        for name in ("params_total", "params_trunk", "params_head", "params_preprocessor"):
            row[name] = round(row[name])
        row["probes"] = [
            {"task": "pets", "kind": kind, "blocks": [1], "num_classes": 10, "n": 1000, "chance": 0.1}
            | {"top1": 0.9 - 0.5 * row["val_loss"] + gain + 0.001 * np.sin(i)}
            | {"top1_lo95": 0.1, "top1_hi95": 0.9, "last_top1": 0.88 - 0.5 * row["val_loss"] + gain}
            for kind, gain in (("attentive", 0.02), ("linear", 0.0))
        ]
    return rows


def written(known_study, tmp_path: Path) -> str:
    """The page of a main grid, repeats and single changes."""
    folders = []
    for name, parts in (
        ("main", [{"sizes": ["s1", "s2", "s3", "s4"]}, {"sizes": ["s5"], "seeds": [0]}]),
        ("repeats", [{"sizes": ["s2", "s4"], "uniques": [1000, 4000], "seeds": [0, 1]}]),
        ("changes", [DIRECTION | {"prefix": "none", "effect": 0.04}, DIRECTION | {"target": "raw", "effect": 0.5}]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        rows = [row | {"sweep": name} for row in rows_of(known_study, *parts)]
        write_table(results_table(rows), folder / "results.parquet")
        (folder / "collect.json").write_text(json.dumps({"description": f"The {name}.", "machines": [{"cpu": "one"}]}))
        folders.append(folder)
    return write_report(folders).read_text()


def words(page: str) -> str:
    text = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", text)))


def test_the_page_and_the_verbs_have_one_interval(known_study):
    rows = [row | {"probes": [probe | {"ideal": 0.0} for probe in row["probes"]]} for row in rows_of(known_study, {})]
    frame = pd.DataFrame(rows)
    found = Study(paths=(), runs=Runs(frame), main=Runs(frame), usable=Runs(frame))
    correlate_probes(found)
    for (task, kind), group in found.probes.frame.groupby(["task", "kind"]):
        by_verb = correlate(frame, y=f"{task}:{kind}")
        assert [c.value for c in found.get("correlation of loss with", f"{task}:{kind}")][: len(by_verb.table)] == [
            c.value for c in by_verb
        ]
        group = group.reset_index(drop=True)
        alone = link(group, chance=0.1, ideal=0.0)
        assert found.get("link from loss to", f"{task}:{kind}").intervals == alone.intervals


def test_the_page_says_what_was_tuned_and_how_often_data_repeat(known_study):
    """Rates were fitted as one law and a forecast at 40 passes was told as one at four, both green."""
    tuned = [(0.5, 1.01), (1.0, 1.0), (2.0, 1.01)]
    frames = [
        known_study({"seeds": [0], "uniques": [16000], "lr_multiplier": rate}).assign(lr_peak=1e-3 * rate)
        for rate, _ in tuned
    ]
    for frame, (_, worse) in zip(frames, tuned, strict=True):
        frame["val_loss"] *= worse
    study = study_tables((), Runs(pd.concat(frames, ignore_index=True)))
    assert study.get("law").num_points == 30
    kinds = {flag.kind for flag in study.flags}
    assert not kinds & {"tuned", "few_groups", "unseen"}  # corrected, not merely chosen; nor what the rates' law lacks
    assert study.tuning == "the largest size is tuned within 0.1 % of its loss"
    told = {line.question: line.answer for line in verdict(study)}
    assert f"Learning rates: {study.tuning}." in told["The law"]
    assert any("60 rows not the best lr_multiplier" in each for each in study.exclusions)
    half = float(student.ppf(0.975, DOF)) * study.get("next runs").sd_before
    assert f", now {percent(half)} (95 %)" in told["What to run next"], "it was one standard deviation"
    assert "passes over the pool of 16k, beyond the 4 that were seen" in told["Forecast"]
    frontier = study.get("compute-optimal frontier")
    assert ("passes" in told["Compute-optimal"]) == (frontier.frontiers[-1].at(frontier.largest_budget)["D"][0] > 64e3)


def test_two_experiments_in_one_table_are_noticed_and_told_once():
    """They were green; and then a second flag said less of the same column."""
    first, second = (law_grid(noise=0.002, rng=seed).assign(sweep=name) for seed, name in ((1, "one"), (2, "two")))
    second["val_loss"] *= 1.02
    frame = pd.concat([first, second], ignore_index=True)
    names = {"N": "params_total", "D": "images_seen", "C": "flops_train"}
    study = study_tables((), Runs(frame.rename(columns=names).assign(schema_version=1, status="complete")))
    assert [flag.kind for flag in study.get("law").flags if flag.subject == "sweep"] == ["experiments"]
    assert verdict(study)[0].colour == "amber"


@pytest.mark.slow
def test_laws_are_of_the_main_grid_alone_and_every_answer_has_its_section(known_study, tmp_path):
    page = written(known_study, tmp_path)
    text = words(page)
    assert "<h1>main, repeats, changes</h1>" in page
    assert "The 3 tables hold 117 rows" in text
    assert re.search(r"fitted to 65 of \d+ rows of the main experiment", text)
    found = re.search(r"α = ([\d.]+) \[([\d.]+), ([\d.]+)\], β = ([\d.]+) \[([\d.]+), ([\d.]+)\]", text)
    assert found is not None
    alpha, beta = float(found[1]), float(found[4])
    assert alpha == pytest.approx(0.4, abs=0.08)
    assert beta == pytest.approx(0.5, abs=0.05)
    assert "prefix paired, target normalised" in text
    assert "The main.; The repeats.; The changes." in text
    assert re.search(r"loss ?none ?\+0\.\d+ ?\[.*?worse", text)
    worth = re.search(r"R_D ?(\d[.\d]*) ?\[([.\d]+), ([.\d]+)\]", text)
    assert float(worth[2]) < 6 < float(worth[3])
    for key in ("changes", "contrast-prefix", "law-U"):
        assert f'id="{key}"' in page, key
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


TRUE_LAW = laws.COUPLED.centred(laws.Columns({"N": np.array([1e6]), "D": np.array([2e7])}))
LOSS = {"E": 0.2, "K": 2.5, "alpha": 0.5, "beta": 0.45, "c": 0.6, "w": 1.1}
ERROR = {"E": 0.1, "A": 20.0, "B": 3.0, "alpha": 0.40, "beta": 0.30}


@pytest.fixture(scope="module")
def isoflop():
    """Six sizes about 20 D per N at six budgets of compute; the loss follows the coupled law, a probe another."""
    flops, ratios = (a.ravel() for a in np.meshgrid(np.geomspace(1e12, 1e15, 6), np.geomspace(0.2, 5, 6)))
    n = np.sqrt(flops / 120) * ratios
    d = flops / 6 / n
    rng, at = np.random.default_rng(0), {"N": n, "D": d}
    loss = TRUE_LAW.value(at, LOSS)
    error = laws.CHINCHILLA.value(at, ERROR) * np.exp(1e-3 * rng.standard_normal(len(n)))
    probes = [[{"task": "pets", "kind": "linear", "top1": 1 - e, "chance": 0.03}] for e in error]
    frame = pd.DataFrame(
        {"params_total": n, "images_seen": d, "flops_train": flops * 1.01 ** rng.uniform(-1, 1, len(n))}
    )
    frame = frame.assign(val_loss=loss * np.exp(1e-3 * rng.standard_normal(len(n))), probes=probes)
    return study_tables([], Runs(frame))


def test_an_iso_flop_table_is_held_out_and_forecast_by_compute(isoflop):
    top = isoflop.budgets.max()
    assert top == pytest.approx(1e15, rel=0.01)
    [test] = isoflop.get("law").heldout
    assert (test.variable, test.num_test) == ("C", 6)
    places = next_scales(isoflop)
    np.testing.assert_allclose([6 * at["N"] * at["D"] for at in places], [2 * top, 10 * top], rtol=0.02)
    best = isoflop.get("compute-optimal frontier").frontiers[-1].at(2 * top).iloc[0]
    assert places[0]["N"] == pytest.approx(best["N"])
    assert isoflop.get("next runs").target["N"] == pytest.approx(best["N"])
    truth = TRUE_LAW.value({v: np.array([at[v] for at in places]) for v in ("N", "D")}, LOSS)
    found = isoflop.get("forecast").table[isoflop.get("forecast").table["quantity"] == "val_loss"]
    assert ((found["pi_lo"] < truth) & (truth < found["pi_hi"])).all()


def test_the_split_is_by_the_law_that_forecasts(isoflop):
    assert isoflop.get("compute-optimal frontier").frontiers[-1].law is isoflop.get("law")
    assert isoflop.get("law").law.name == isoflop.get("forecaster").law.name == "coupled"
    by_question = {line.question: line.answer for line in verdict(isoflop)}
    assert "by approach 3 on the coupled law" in by_question["Compute-optimal"]
    assert "better than the chinchilla law" in by_question["The law"]
    assert isoflop.get("forecast").table["distance"].max() == pytest.approx(10, rel=0.05)


def test_a_grid_is_held_out_by_its_sides(grid):
    study = study_tables([], Runs(grid))
    assert study.budgets is None
    assert [test.variable for test in study.get("law").heldout] == ["N", "D"]
    top = grid[["params_total", "images_seen"]].max()
    assert [at["N"] / top["params_total"] for at in next_scales(study)] == pytest.approx([2.0, 10.0])
    assert [at["D"] / top["images_seen"] for at in next_scales(study)] == pytest.approx([2.0, 10.0])


def test_the_findings_are_the_numbers_of_the_test_and_the_correlation(known_study):
    """Where nothing goes with the loss at equal compute, the finding says so; where no probe ran, it is of the law."""
    study = study_tables((), Runs(pd.DataFrame(rows_of(known_study, {"seeds": [0]}))))
    by_size = study.get("law").heldout[0]
    law, features = findings(study)
    assert by_size.variable == "N"
    errors = by_size.mean_abs_relative_error, by_size.naive_mean_abs_relative_error
    told = "Fitted without the largest size, the law predicts its loss with a mean error of {}, a straight line with {}"
    assert law.title == told.format(*map(percent, errors))
    first = next(iter(study.get(CORRELATION, "pets:attentive")))
    words = f"Lower loss, better features: at equal compute r = {first.value:.2f} [{first.low:.2f}, {first.high:.2f}]"
    assert features.title == f"{words} on pets (attentive-probe accuracy)"
    attentive = study.probes["top1"][study.probes["kind"] == "attentive"]
    least, most = (percent(top1).removesuffix(" %") for top1 in attentive.agg(["min", "max"]))
    assert features.caption.startswith(f"The attentive-probe accuracy is {least} to {most} % on pets.")
    study.results[CORRELATION] = {}
    assert [each.key for each in findings(study)] == ["loss-N"]


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
    text = words(write_report(tmp_path).read_text())
    assert "Beside baselines on the same probes" in text
    assert re.search(r"raw-pixels ?40\.0 ?20\.0", text)
    assert "random-<w2000>" in text
    assert "no significant difference" in text
    assert "99.0" not in text  # LoRA is no frozen probe: it stands beside no baseline
    assert "LoRA (not frozen)" in text
    (tmp_path / "baselines.parquet").unlink()
    assert "Beside baselines" not in write_report(tmp_path).read_text()


@pytest.mark.parametrize("odd", [{"top1": np.inf}, {"top1_hi95": None}, {"chance": np.inf}, {"n": None, "top1": 1e300}])
def test_a_page_is_made_of_probes_that_nobody_means(odd, tmp_path):
    """`top1: 1e999` and a lower end without an upper one ended in tracebacks."""
    rows = [
        {"run_id": f"w{n}", "size": f"w{n}", "status": "complete", "params_total": n, "images_seen": 64}
        | {"probes": [entry("attentive", 0.6) | odd, {"task": "pets", "kind": "knn", "top1": 0.5}]}
        for n in (1000, 2000)
    ]
    write_table(results_table(rows), tmp_path / "results.parquet")
    assert "digits" in write_report(tmp_path).read_text()
