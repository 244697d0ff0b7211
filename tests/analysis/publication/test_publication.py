"""A published folder verifies, says what was altered, and is described for machines and hubs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.publication.card import About, energy, model_cards, sha256
from aimscale.analysis.publication.folder import _copy_tables, publish
from aimscale.analysis.publication.verification import compare_numbers, verify

ROOT = Path(__file__).parents[3]
ABOUT = About("Losses of a law", "CC-BY-4.0", "some pictures, CC0", ("A. Author",), watts=500, g_co2_per_kwh=100)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Publish a table of another tool, with columns of its own."""
    home = tmp_path_factory.mktemp("publication")
    rng = np.random.default_rng(0)
    rows = [(n, d) for n in (1e5, 4e5, 2e6, 8e6) for d in (1e5, 1e6, 1e7)]
    losses = [(0.3 + 5 * n**-0.3 + 3 * d**-0.25) * rng.normal(1, 1e-4) for n, d in rows]
    frame = pd.DataFrame(rows, columns=["params", "images"]).assign(loss=losses, device_hours=1.0, run_id=range(12))
    frame.to_csv(home / "losses.csv", index=False)
    publish([home / "losses.csv"], home / "out", ABOUT, columns={"N": "params", "D": "images", "L": "loss"})
    return home / "out"


@pytest.fixture
def copied(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def test_a_folder_verifies_wherever_it_is(copied: Path) -> None:
    found = verify(copied)
    assert found.is_verified
    assert found.num_numbers > 200
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=copied, check=False).returncode == 0


def alter_number(folder: Path) -> None:
    text = json.loads((folder / "numbers.json").read_text())
    text["numbers"]["law"][""]["params"]["alpha"] *= 1.01
    (folder / "numbers.json").write_text(json.dumps(text))


def alter_table(folder: Path) -> None:
    table = pd.read_csv(folder / "data" / "losses.csv")
    table.loc[0, "loss"] *= 1.01
    table.to_csv(folder / "data" / "losses.csv", index=False)


@pytest.mark.parametrize(
    ("alter", "damaged", "place"),
    [(alter_number, "numbers.json", "law.params.alpha"), (alter_table, "data/losses.csv", "law.params.alpha")],
)
def test_what_was_altered_is_named(alter: Callable[[Path], None], damaged: str, place: str, copied: Path) -> None:
    alter(copied)
    found = verify(copied)
    assert found.damaged == (damaged,)
    assert place in set(found.table["place"])
    assert damaged in found.summary()


def rewrite_checksums(folder: Path) -> None:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = [f"{sha256(folder / name)}  {name}\n" for name in names if name != "SHA256SUMS"]
    (folder / "SHA256SUMS").write_text("".join(lines))


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def test_what_is_altered_with_its_checksum_is_found_when_it_is_made_again(copied: Path) -> None:
    alpha = f"{json.loads((copied / 'numbers.json').read_text())['numbers']['law']['']['params']['alpha']:.3g}"
    for name, old, new in (
        ("report.html", alpha, "0.123"),
        ("README.md", "12 device-hours", "13 device-hours"),
        ("CITATION.cff", "A. Author", "B. Author"),
        ("tables/law.tex", alpha, "0.123"),
        ("tables/forecast.tex", "0.", "1."),
        ("models/3/README.md", "An autoregressive image model", "A diffusion model"),
    ):
        replace(copied / name, old, new)
    figure = copied / "figures" / "loss-N.pdf"
    figure.write_bytes(figure.read_bytes()[:-1] + b"\x0b")
    for name in ("more.csv", "data/more.csv", "models/3/weights/a.safetensors", "models/none/weights/a.safetensors"):
        (copied / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / name).touch()
    rewrite_checksums(copied)
    replace(copied / "SHA256SUMS", f"{sha256(copied / 'CITATION.cff')}  CITATION.cff\n", "")
    found = verify(copied)
    assert (found.damaged, found.differences, found.not_compared) == ((), (), "")
    assert {*found.altered} == {
        "report.html", "README.md", "CITATION.cff", "tables/law.tex", "tables/forecast.tex", "models/3/README.md",
        "figures/loss-N.pdf",
    }  # fmt: skip
    assert {*found.unlisted} == {"CITATION.cff", "more.csv", "data/more.csv", "models/none/weights/a.safetensors"}


def test_a_small_change_of_a_number_or_a_sentence_is_found(copied: Path) -> None:
    record = json.loads((copied / "numbers.json").read_text())
    law = record["numbers"]["law"][""]
    law["params"]["alpha"] *= 1.0009
    law["flags"][0]["text"] = f"not {law['flags'][0]['text']}" if "text" in law["flags"][0] else ""
    (copied / "numbers.json").write_text(json.dumps(record))
    rewrite_checksums(copied)
    assert {"law.params.alpha"} < {place for place, *_ in verify(copied).differences}


def test_by_other_versions_numbers_alone_are_compared_and_it_says_so(copied: Path) -> None:
    record = json.loads((copied / "numbers.json").read_text())
    record["made"]["versions"]["scipy"] = "0.1"
    (copied / "numbers.json").write_text(json.dumps(record))
    rewrite_checksums(copied)
    found = verify(copied)
    assert found.is_verified
    assert "which were made with scipy 0.1" in found.not_compared
    assert dict(found.facts())["not compared"] == found.not_compared


HOSTILE: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "code": lambda folder, record: record["source"]["columns"].update(
        zz="N.__class__.__init__.__globals__['sys'].modules['os'].system('touch made')"
    ),
    "an absolute table": lambda folder, record: record["source"].update(tables=[str(folder.parent / "t.csv")]),
    "a table above": lambda folder, record: record["source"].update(tables=["../t.csv"]),
    "a table in disguise": lambda folder, record: record["source"].update(tables=["data/../../t.csv"]),
    "no table": lambda folder, record: record["source"].update(tables=[]),
    "a linked table": lambda folder, record: (
        (folder / "data/losses.csv").unlink(), (folder / "data/losses.csv").symlink_to(folder.parent / "t.csv")
    ),
    "a linked folder": lambda folder, record: (folder / "more").symlink_to("/etc"),
    "a pipe": lambda folder, record: os.mkfifo(folder / "data/curves.parquet"),
    "sparse": lambda folder, record: os.truncate(folder / "report.html", 2 * 10**12),
    "a large text": lambda folder, record: os.truncate(folder / "SHA256SUMS", 2 * 10**8),
    "nothing": lambda folder, record: (folder / "SHA256SUMS").write_text(""),
    "no lines": lambda folder, record: (folder / "SHA256SUMS").write_text("abc\n" * 9),
    "no text": lambda folder, record: (folder / "SHA256SUMS").write_bytes(b"\xff" * 9),
    "words for a version": lambda folder, record: record.update(version="x"),
    "null for a version": lambda folder, record: record.update(version=None),
    "a list for a version": lambda folder, record: record.update(version=[1]),
    "an old version": lambda folder, record: record.update(version=1),
    "a number for where": lambda folder, record: record["source"].update(where=3),
    "a number in where": lambda folder, record: record["source"].update(where=[3]),
    "a list for numbers": lambda folder, record: record.update(numbers=[[]]),
    "a text for results": lambda folder, record: record["numbers"].update(law="x"),
    "more": lambda folder, record: record.update(more=1),
    "a run of its own": lambda folder, record: (folder / "data/losses.csv").write_text(
        "params,images,loss,run_id\n1e5,1e5,2,../../../victim\n2e5,1e5,1.9,b\n"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_refused_in_one_sentence(kind: str, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copied.parent)
    Path("t.csv").write_text("params,images,loss\n1,2,3\n")
    record = json.loads((copied / "numbers.json").read_text())
    HOSTILE[kind](copied, record)
    (copied / "numbers.json").write_text(json.dumps(record))
    with pytest.raises(AnalysisError) as caught:
        verify(copied)
    assert "\n" not in str(caught.value)
    assert {path.name for path in copied.parent.iterdir()} == {"copy", "t.csv"}


@pytest.mark.parametrize("run_id", ["../../../victim/proj", "a\nb", "<script>", "..", ""])
def test_a_run_with_an_id_that_is_no_name_is_not_published(run_id: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"N": [1e5, 2e5], "D": [1e5, 2e5], "L": [2.0, 1.9], "run_id": [run_id, "b"]})
    frame.to_parquet(tmp_path / "t.parquet")
    with pytest.raises(AnalysisError, match="run_id"):
        publish([tmp_path / "t.parquet"], tmp_path / "deep" / "er" / "out", ABOUT)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "t.parquet"]


def test_cards_escape_what_a_table_says(tmp_path: Path) -> None:
    size = "w9\n---\n# [x](javascript:y) <script>z</script> | a"
    frame = pd.DataFrame({"run_id": ["a"], "size": [size], "images_seen": [8], "val_loss": [1.0], "probes": [[]]})
    (card,) = model_cards(frame, ABOUT).values()
    assert "w9 --- # [x]\\(javascript:y) &lt;script&gt;z&lt;/script&gt; \\| a" in card


def test_a_missing_file_is_named_and_half_a_folder_is_refused(copied: Path) -> None:
    (copied / "report.html").unlink()
    assert verify(copied).damaged == ("report.html",)
    (copied / "SHA256SUMS").unlink()
    with pytest.raises(AnalysisError, match="aimscale publish"):
        verify(copied)


def test_numbers_and_words_are_compared_but_no_sentences() -> None:
    """A release may say the same in other words."""
    before: dict[str, Any] = {"a": [1.0, 2.0], "law": "kaplan", "is_better": True, "said": "alpha is 0.31"}
    assert compare_numbers(before, before | {"a": [1.0000001, 2.0], "said": "0.31 is alpha"}) == (4, ())
    _, found = compare_numbers(before, before | {"a": [1.0, 2.1], "law": "coupled", "is_better": False})
    assert [place for place, *_ in found] == ["a[1]", "law", "is_better"]
    _, found = compare_numbers(before, before | {"a": [1.0]})
    assert found == (("a[1]", "2.0", "nothing"),)


def test_the_card_is_the_hubs_and_counts_a_runs_hours_once(published: Path) -> None:
    _, head, body = (published / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(head)["configs"][0]["data_files"] == "data/losses.csv"
    assert "12 device-hours" in body
    assert "This folder: CC-BY-4.0, A. Author.\n\nImages that were trained on (not part of it): some pictures" in body
    assert {path.suffix for path in (published / "figures").iterdir()} == {".pdf", ".png"}
    frame = pd.DataFrame({"run_id": ["a", "a", "b"], "device_hours": [1.0, 3.0, 2.0]})
    assert energy(frame, ABOUT)[0].startswith("5 device-hours")
    assert energy(frame, ABOUT)[1].startswith("2.5 kWh")
    assert energy(frame, ABOUT)[2].startswith("0.25 kg CO2")


def test_what_the_page_reads_beside_its_table_goes_along(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.csv").write_text("N,D,L\n1,2,3\n")
        pd.DataFrame({"task": [name]}).to_parquet(tmp_path / name / "baselines.parquet")
    (tmp_path / "out").mkdir()
    assert _copy_tables([tmp_path / "one" / "one.csv"], tmp_path / "out") == ("data/one.csv",)
    there = {path.name for path in (tmp_path / "out" / "data").iterdir()}
    assert there == {"one.csv", "baselines.parquet"}
    (tmp_path / "both").mkdir()
    with pytest.raises(AnalysisError, match=r"two folders hold a baselines\.parquet"):
        _copy_tables([tmp_path / name / f"{name}.csv" for name in ("one", "two")], tmp_path / "both")


def test_nothing_is_overwritten(published: Path) -> None:
    with pytest.raises(AnalysisError, match="exists already"):
        publish([published / "data" / "losses.csv"], published, ABOUT)
    assert not list(published.parent.glob(".out*"))
