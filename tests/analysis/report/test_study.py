"""One page of a whole study: laws from the main grid, single changes, repeats, noise, in words first."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from tables import law_grid

from aimscale.analysis import correlate, link
from aimscale.analysis.forecasts.forecaster import DOF
from aimscale.analysis.report.page import write_report
from aimscale.analysis.report.study import Study, correlate_probes, study_tables
from aimscale.analysis.report.verdict import verdict
from aimscale.analysis.table.schema import results_table, write_table
from aimscale.analysis.words import percent

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
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", text)).replace("&#39;", "'")


def test_the_page_and_the_verbs_have_one_interval(known_study):
    rows = [row | {"probes": [probe | {"ideal": 0.0} for probe in row["probes"]]} for row in rows_of(known_study, {})]
    frame = pd.DataFrame(rows)
    found = Study(paths=(), frame=frame, main=frame, usable=frame)
    correlate_probes(found)
    for (task, kind), group in found.probes.groupby(["task", "kind"]):
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
    study = study_tables((), pd.concat(frames, ignore_index=True), {})
    assert study.get("law").num_points == 30
    assert [flag.subject for flag in study.get("law").flags if flag.kind == "tuned"] == ["lr_multiplier"]
    assert any("60 rows not the best lr_multiplier" in each for each in study.exclusions)
    _, _, split, forecast, bought = verdict(study)
    half = float(student.ppf(0.975, DOF)) * study.get("next runs").sd_before
    assert f"from ±{percent(half)} to" in bought.answer, "it was one standard deviation"
    assert "passes over the pool of 16k, beyond the 4 that were seen" in forecast.answer
    frontier = study.get("compute-optimal frontier")
    assert ("passes" in split.answer) == (frontier.frontiers[-1].at(frontier.largest_budget)["D"][0] > 64e3)


def test_two_experiments_in_one_table_are_noticed_and_told_once():
    """They were green; and then a second flag said less of the same column."""
    first, second = (law_grid(noise=0.002, rng=seed).assign(sweep=name) for seed, name in ((1, "one"), (2, "two")))
    second["val_loss"] *= 1.02
    frame = pd.concat([first, second], ignore_index=True)
    names = {"N": "params_total", "D": "images_seen", "C": "flops_train"}
    study = study_tables((), frame.rename(columns=names).assign(schema_version=1, status="complete"), {})
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
    assert "a repeat is worth half of a new image" in text
    assert "between seeds" in text
    assert "within size" in text
    for key in ("changes", "noise", "contrast-prefix", "contrast-kind", "repeats"):
        assert f'id="{key}"' in page, key
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
