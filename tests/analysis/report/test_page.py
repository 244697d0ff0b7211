"""The report says what the table holds and what is missing, lets nothing hostile through, and asks nobody."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from commands import say

from aimscale.analysis.display import human
from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.report.blocks import sort_key
from aimscale.analysis.report.page import _description, maths, write_report
from aimscale.analysis.report.study import read_study
from aimscale.analysis.report.summary import verdict
from aimscale.analysis.table.schema import OF_CURVES, results_table, write_table

E, A, ALPHA, B, BETA = 0.3, 5.0, 0.35, 20.0, 0.5
SIZES = {"small": 3e4, "medium": 2e5, "large": 1e6, "huge": 4e6}


def sweep_rows(name: str = "known", probes: bool = True) -> list[dict[str, Any]]:
    """4 sizes x 4 budgets; loss = E + A N^-alpha + B D^-beta with 0.2 % noise, accuracy falling with it."""
    rng = np.random.default_rng(7)
    rows = []
    for size, n in SIZES.items():
        for d in (4000, 8000, 16000, 32000):
            loss = (E + A * n**-ALPHA + B * d**-BETA) * float(np.exp(0.002 * rng.standard_normal()))
            entries = [
                {"task": task, "kind": kind, "blocks": [0, 1], "num_classes": 10, "chance": 0.1, "n": 500, "lr": 1e-3}
                | {"top1": 1.1 - loss, "top1_lo95": 1.08 - loss, "top1_hi95": 1.12 - loss}
                for task in ("pets", "digits")
                for kind in ("attentive", "linear")
            ]
            row = {"sweep": name, "run_id": f"{size}_s0", "size": size, "status": "complete", "seed": 0}
            row |= {"images_seen": d, "unique_images": 4000, "params_total": int(n), "params_trunk": int(0.6 * n)}
            row |= {"flops_per_image": 400.0 * n, "flops_train": 400.0 * n * d, "val_loss": loss, "val_loss_se": 0.004}
            row |= {"val_num_images": 300, "device_hours": n * d / 1e12, "device": "cpu", "mfu": 0.4, "schedule": "wsd"}
            rows.append(row | {"probes": entries if probes else []})
    return rows


def write_sweep(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """`results.parquet` and `collect.json`, as `aimscale collect` leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_table(results_table(rows), folder / "results.parquet")
    (folder / "collect.json").write_text(json.dumps({"description": "A known law."}))
    return folder


HOSTILE = """<script>alert(1)</script>"><img src=x onerror=alert(2)>$x^2$ & 'it'"""


class Page(HTMLParser):
    """Tags with their attributes, and the words a reader sees."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.skipping = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.skipping = tag in ("style", "script")

    def handle_endtag(self, tag):
        self.skipping = False

    def handle_data(self, data):
        if not self.skipping:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def ids(self) -> set[str]:
        return {str(attrs["id"]) for _, attrs in self.tags if "id" in attrs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A sweep with points during training, and a forecast that was registered before its largest run."""
    folder = write_sweep(tmp_path_factory.mktemp("sweep"), sweep_rows())
    points = []
    for size, n in SIZES.items():
        for d in np.geomspace(200, 30_000, 24).round().astype(int):
            loss = 1.1 * (E + A * n**-ALPHA + B * max(d, 2000) ** -BETA)
            points.append({"run_id": f"{size}_s0", "size": size, "params_total": int(n), "images_seen": int(d)})
            points[-1] |= {"status": "during", "val_loss": float(loss), "lr": 1e-3}
    write_table(results_table(points, OF_CURVES), folder / "curves.parquet")
    at = {"at": {"N": 4e6, "D": 32_000}, "columns": {"N": "params_total", "D": "images_seen"}, "law": "chinchilla"}
    told = {"registered": "2026-01-01", "quantity": "val_loss", "value": 0.4, "pi_lo": 0.1, "pi_hi": 0.9}
    (folder / "forecasts.jsonl").write_text(json.dumps(at | told) + "\n")
    return folder


@pytest.fixture(scope="module")
def page(folder) -> Page:
    write_report(folder, figures=folder / "figures")
    return Page((folder / "report.html").read_text())


def test_every_section_figure_and_table_is_there(page):
    sections = {"summary", "runs", "scaling", "accuracy", "linked", "laws"}
    sections |= {"published", "methods", "provenance"}
    kinds = {f"{what}-{kind}" for what in ("accuracy", "loss-accuracy") for kind in ("attentive", "linear")}
    figures = {f"loss-{v}" for v in "NDC"} | kinds | {"frontier", "curves", "trajectory", "published-models"}
    tables = {"results", "law-ND", "heldout", "probes", "registered"}
    assert sections | figures | tables <= page.ids()
    assert sum(tag == "svg" for tag, _ in page.tags) >= len(figures)
    assert "What is missing" not in page.text
    assert "1 of 1 runs inside their registered intervals, 0 not measured yet" in page.text
    assert "from 3 finished runs of 3 sizes, 4 times their largest N" in page.text
    assert "^" not in page.text, "a formula is not set"
    hours = human(sum(SIZES.values()) * 32_000 / 1e12)  # what the budgets of a run share counts once
    assert f"Training to the largest budget of each run took {hours} device-hours on cpu." in page.text


def test_each_figure_leaves_for_a_paper(page, folder):
    figures = {attrs["id"] for tag, attrs in page.tags if tag == "figure"}
    names = {path.name for path in (folder / "figures").iterdir()}
    assert names == {f"{key}.{suffix}" for key in figures for suffix in ("svg", "pdf", "png")}


def test_the_summary_tells_the_known_law(page):
    found = re.search(r"α = ([\d.]+) \[([\d.]+), ([\d.]+)\], β = ([\d.]+) \[([\d.]+), ([\d.]+)\]", page.text)
    assert found is not None
    alpha, alpha_lo, alpha_hi, beta, beta_lo, beta_hi = map(float, found.groups())
    assert alpha_lo <= ALPHA <= alpha_hi
    assert beta_lo <= BETA <= beta_hi
    assert alpha == pytest.approx(ALPHA, abs=0.1)
    assert beta == pytest.approx(BETA, abs=0.15)
    assert "16 rows, 4 model sizes (30k to 4M parameters)" in page.text
    assert re.search(r"Lower loss, better features: at equal compute r = −\d\.\d\d \[−\S+, −\S+\] on digits", page.text)


def test_the_page_asks_nobody_for_anything(page):
    for tag, attrs in page.tags:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
            value = attrs.get(name) or ""
            assert value == "" or value.startswith(("data:", "#")), (tag, name, value[:80])
    downloads = [attrs["download"] for tag, attrs in page.tags if tag == "a" and "download" in attrs]
    assert {"results.csv", "probes.csv"} <= set(downloads)


def test_it_opens_with_the_findings_beside_their_figures_then_says_how_far_to_trust_them(page):
    ids = [attrs["id"] for tag, attrs in page.tags if tag == "figure"]
    assert ids[:2] == ["loss-N", "finding-accuracy"]
    opening = page.text[page.text.index("Can it be trusted?") : page.text.index("What was run and")]
    questions = ["Can it be trusted?", "a straight line with", "Lower loss, better features on "]
    questions += [
        "How precise",
        "How it predicts",
        "How far off",
        "The law",
        "Compute-optimal",
        "Forecast",
        "What to run next",
    ]
    places = [opening.index(question) for question in questions]
    assert places == sorted(places)
    assert re.search(r"[✓!] ?Can it be trusted\?", page.text)
    assert re.search(
        r"At 5.12×10¹³ FLOP: N = \S+ \[\S+, \S+\], D = \S+, by approach 3 on the \w+ law. N grows as C", opening
    )
    assert re.search(r"At N = 8M, D = 64k \(4 times beyond the table\) a loss of 0\.\d+ \[0\.\d+, 0\.\d+\]\.", opening)
    assert re.search(
        r"a run at N = 8M, D = 64k, the expected half-width of its forecast is \S+ %, now \S+ % \(95 %\)", opening
    )
    assert "a second seed of the cheapest size (30k parameters)" in opening
    assert not re.search(r"\de[+-]\d", page.text)


def test_loss_and_accuracies_are_forecast(page):
    table = page.text[page.text.index("Fitted laws") : page.text.index("Does the law extrapolate?")]
    table = table[: table.index("2026-01-01")]  # then the registered ones
    assert len(re.findall(r"N = \S+, D = \S+", table)) == 2 * 3  # the loss and two tasks by the first kind of probe
    assert "3 to 10 times beyond" in table, "the record at the distance of the nearer forecast"
    assert "30 to 100 times beyond" in table
    assert re.search(r"digits:attentiveN = 40M, D = 320k0\.\d+\[0\.\d+, 0\.\d+\].*100", table)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    """The page of a sweep whose names are markup."""
    rows = sweep_rows(name=HOSTILE)
    for row in rows:
        row["run_id"] = row["size"] = f"{row['size']} {HOSTILE}"
        row["probes"] = [probe | {"task": f"{probe['task']}{HOSTILE}"} for probe in row["probes"][:1]]
    return write_report(write_sweep(tmp_path_factory.mktemp("hostile"), rows)).read_text()


def test_hostile_names_are_only_text(hostile):
    page = Page(hostile)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(attrs.get("src") != "x" for _, attrs in page.tags)
    assert HOSTILE in page.text


@pytest.mark.parametrize("content", ["{", "[]", '{"description": 1}', "\xff"])
def test_a_damaged_description_is_one_sentence(tmp_path, content):
    folder = write_sweep(tmp_path, [])
    (folder / "collect.json").write_text(content, encoding="latin-1")
    with pytest.raises(AnalysisError, match="collect the sweep again"):
        _description([folder])


def test_partial_tables_say_what_is_missing(tmp_path):
    failed = [row | {"status": "failed", "val_loss": None} for row in sweep_rows(probes=False)[2:5]]
    few = write_report(write_sweep(tmp_path / "few", [*sweep_rows(probes=False)[:2], *failed]))
    text = Page(few.read_text()).text
    assert "What is missing" in text
    assert "no probe results" in text
    assert "3 rows not complete" in text
    assert "Can it be trusted? No: no joint law of parameters and data could be fitted." in text

    imported = [row | {"val_loss": None} for row in sweep_rows()[:3]]
    text = Page(write_report(write_sweep(tmp_path / "imported", imported)).read_text()).text
    assert "no law is fitted" in text
    assert "Frozen-feature accuracy" in text


def test_an_unidentified_law_prints_words_not_digits(tmp_path):
    rng = np.random.default_rng(2)
    rows = sweep_rows(probes=False)
    for row in rows:  # the loss does not depend on N at all
        row["val_loss"] = (0.5 + 2.0 * row["images_seen"] ** -0.5) * (1 + 1e-3 * rng.standard_normal())
    page = Page(write_report(write_sweep(tmp_path, rows)).read_text())
    assert re.search(r"✗ ?Can it be trusted\? No: .*α is not identified", page.text)
    assert "More sizes: α is not identified by 4 of them" in page.text
    assert "α not identified, β = " in page.text


def test_foreign_csv_with_mapped_columns(tmp_path):
    frame = pd.DataFrame(sweep_rows())[["params_total", "images_seen", "val_loss"]]
    frame.set_axis(["size_m", "tokens", "loss"], axis=1).to_csv(tmp_path / "theirs.csv", index=False)
    options = ["--columns", "N=size_m,D=tokens,L=loss", "--out", tmp_path / "page.html"]
    last = say("report", tmp_path / "theirs.csv", *options).splitlines()[-1]
    assert re.fullmatch(r"next: aimscale forecast \S+ --columns \S+ --at N=[\de+.]+,D=[\de+.]+", last), (
        "no placeholders"
    )
    page = Page((tmp_path / "page.html").read_text())
    assert {"loss-N", "loss-D", "law-ND", "frontier"} <= page.ids()
    assert "The table counts no training FLOPs, so C is 6 N D." in page.text
    assert not {"published", "changes"} & page.ids()
    assert not any(ours in page.text for ours in ("AIM", "image", "MFU", "pixel head", "next-patch", "val_loss"))
    assert "N = size_m, D = tokens" in page.text
    with pytest.raises(AnalysisError, match=r"absent\.csv"):
        write_report(tmp_path / "absent.csv")
    with pytest.raises(AnalysisError, match=re.escape('columns={"D": "tokens", "L": "loss"}')):
        write_report(tmp_path / "theirs.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "theirs.csv"]


def test_a_lettered_table_with_repeats_and_a_law_of_its_own(tmp_path):
    """Its sizes are seen, pools that are worn out are left out, the law that predicts best forecasts."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(1e7, 3e9, 8), np.geomspace(1e9, 1e11, 6)))
    rng = np.random.default_rng(0)
    clean = 0.3 + np.sqrt(60 * n**-0.4 + 300 * d**-0.5) * np.exp(1e-3 * rng.standard_normal(n.size))
    fresh = pd.DataFrame({"N": n, "D": d, "U": d, "L": clean})
    worn = fresh.assign(U=1e8, L=1.1 * fresh["L"])
    pd.concat([fresh, worn, fresh.iloc[:1]]).to_csv(tmp_path / "theirs.csv", index=False)
    write_report(tmp_path / "theirs.csv", columns={"C": "6*N*D"}, out=tmp_path / "page.html")
    text = Page((tmp_path / "page.html").read_text()).text
    assert "8 model sizes (10M to 3B parameters), 6 data budgets" in text
    assert "fitted to 48 of 48 rows with at most 4 passes over their pool" in text
    assert f"The lowest validation loss is {clean.min():.4f}" in text
    truth = 0.3 + np.sqrt(60 * 3e10**-0.4 + 300 * 1e12**-0.5)
    loss = re.search(r"30B, D = \S+ \(100 times beyond the table\) a loss of (0\.\d+) \[(0\.\d+), (0\.\d+)\]", text)
    assert 0.999 * float(loss[2]) < truth < 1.001 * float(loss[3])
    assert "1 row that repeat another row exactly" in text
    assert "Left out nothing" not in text
    assert "R_D is 15.4 for language" in text
    assert not any(ours in text for ours in ("image", "all parameters", "val_loss", "params_total"))


def test_sizes_and_budgets_on_one_line_are_told_to_leave_it(tmp_path):
    n = np.geomspace(1e7, 1e10, 8)
    loss = (1.8 + 400 * n**-0.34 + 2000 * (20 * n) ** -0.37) * np.exp(1e-3 * np.sin(99 * np.arange(8)))
    pd.DataFrame({"N": n, "D": 20 * n, "L": loss}).to_csv(tmp_path / "line.csv", index=False)
    (tmp_path / "pages").mkdir()
    page = write_report(tmp_path / "line.csv", out=tmp_path / "pages")
    assert page == tmp_path / "pages" / "report.html"
    text = Page(page.read_text()).text
    assert re.search(r"What to run next ?More (sizes|budgets)", text)


def test_cells_sort_by_the_numbers_that_they_show():
    shown = ["10¹³", "1.21M", "27.6k", "[0.31, 0.38]", "−0.5", "3×10⁻⁴", "3 of 4", "12.5 %", "262,144"]
    numbers = [1e13, 1.21e6, 27_600, 0.31, -0.5, 3e-4, 3, 12.5, 262_144]
    assert [sort_key(text) for text in shown] == pytest.approx(numbers)
    words = ["w104-d2", "3f0bc81e", "2.5x_s0", "not identified"]
    assert [sort_key(text) for text in ["–", *words]] == ["", *words]


def test_formulas_become_html_only_after_escaping():
    assert str(maths("L = A N^-alpha <b> -0.5 at 3 %")) == "L = A N<sup>−α</sup> &lt;b&gt; −0.5 at 3\u00a0%"
    assert str(maths("((Nc/N)^(aN/aD) + x)^aD")) == "((Nc/N)<sup>aN/aD</sup> + x)<sup>aD</sup>"
    assert str(maths("B D^-exp(a N^alpha + b)")) == "B D<sup>−exp(a N<sup>α</sup> + b)</sup>"


SELF_CHECK = """
<pre id="self-check"></pre>
<script>
const problems = window.problems;
document.querySelectorAll("details").forEach((details) => { details.open = true; });
const cells = (table, column) => [...table.tBodies[0].rows].map((row) => row.cells[column].textContent);
const table = document.querySelector("#results table");
const head = [...table.tHead.rows[0].cells].findIndex((cell) => cell.textContent.trim() === "loss");
const button = table.tHead.rows[0].cells[head].querySelector("button");
button.click();
const up = cells(table, head);
button.click();
const down = cells(table, head);
const boxes = [...document.querySelectorAll("figure svg")].map((svg) => svg.getBoundingClientRect());
document.getElementById("self-check").textContent = JSON.stringify({
  problems, up, down,
  figures: document.querySelectorAll("figure").length,
  drawn: boxes.filter((box) => box.height > 100 && box.width > 100).length,
  requests: performance.getEntriesByType("resource").filter((entry) => !entry.name.startsWith("data:")).length,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
});
</script>
"""
WATCH = """
<script>
window.problems = [];
addEventListener("error", (event) => window.problems.push(String(event.message || event.target)), true);
addEventListener("securitypolicyviolation", (event) => window.problems.push(event.blockedURI));
for (const level of ["error", "warn"]) console[level] = (...words) => window.problems.push(words.join(" "));
</script>
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1200])
def test_a_browser_draws_every_figure_and_sorts_every_table(tmp_path, width, hostile):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    checked = hostile.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{SELF_CHECK}</body>", 1)
    (tmp_path / "checked.html").write_text(checked)
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --hide-scrollbars --window-size={width},2000"
    command = [chromium, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    run = subprocess.run([*command, (tmp_path / "checked.html").as_uri()], capture_output=True, text=True)
    found = re.search(r'<pre id="self-check">(.*?)</pre>', run.stdout, re.DOTALL)
    assert found is not None, run.stderr[-2000:]
    state = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert state["problems"] == []
    assert state["requests"] == 0
    assert state["figures"] >= 6
    assert state["drawn"] == state["figures"]
    losses = sorted(f"{row['val_loss']:.4f}" for row in sweep_rows())
    assert state["up"] == losses
    assert state["down"] == losses[::-1]
    assert state["overflow"] <= 0


def test_an_unfinished_sweep_says_so_first(tmp_path: Path) -> None:
    """It said "No: run a grid of three sizes by three budgets" of a sweep that was at work."""
    rows = [row | {"schema_version": 1} for row in sweep_rows(probes=False)]
    sizes = sorted({row["size"] for row in rows})
    still_open = [row | {"status": "unfinished", "val_loss": None} if row["size"] != sizes[0] else row for row in rows]
    first, *_, last = verdict(read_study([write_sweep(tmp_path, still_open)], {}, ()))
    num = len({row["run_id"] for row in rows})
    num_open = len({row["run_id"] for row in still_open if row["status"] == "unfinished"})
    assert first.answer.startswith(f"Not yet. {num_open} of {num} runs have not finished: ")
    assert first.colour == "amber"
    assert last.answer == "The rest of the sweep."
