"""The commands of README and docs/ are run as written, page by page, in order, in a folder of their own.

Comments that a reader does not see say what a fenced block is:

    <!-- page: slow -->           (first line) the page's commands take long; or `slurm`: they need a cluster
    <!-- run -->                  the next block (bash or python) is run
    <!-- not run: REASON -->      the next block is not, and why
    <!-- file: NAME -->           the next block is written to a file
    <!-- given: images -->        the reader has something already; `GIVEN` makes it
    <!-- shows -->                the next block is what the last run printed, line by line, numbers within 5 %;
                                  `...` stands for anything

Every bash and python block must say which it is, or that it is a file.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import PAGES, ROOT
from PIL import Image

MARK = re.compile(r"<!-- (run|not run|file|given|shows|page)(?:: (.*?))? -->")
FENCE = re.compile(r"(`{3,})([^\s`]*)(?: .*)?")
NUMBER = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?![\d.]*\.\.\.)"
TIMEOUT_S = 900


@dataclass(frozen=True, kw_only=True)
class Block:
    """Fenced block of a page, or a `given` comment without one."""

    kind: str
    """run, not run, file, given, shows, or empty where nothing is said."""
    detail: str
    """What stands behind the colon."""
    language: str
    """Of the fence."""
    text: str
    """Inside the fence."""
    line: int
    """Of the fence, counted from 1."""


def read_blocks(text: str) -> Iterator[Block]:
    """Return the blocks of a page in order."""
    lines, kind, detail, i = text.splitlines(), "", "", 0
    while i < len(lines):
        if mark := MARK.fullmatch(lines[i].strip()):
            kind, detail = mark[1], mark[2] or ""
            if kind in ("given", "page"):
                yield Block(kind=kind, detail=detail, language="", text="", line=i + 1)
                kind = ""
        elif fence := FENCE.fullmatch(lines[i].strip()):
            end = next(j for j in range(i + 1, len(lines)) if lines[j].strip() == fence[1])
            indent = len(lines[i]) - len(lines[i].lstrip())
            inside = "\n".join(line[indent:] for line in lines[i + 1 : end]) + "\n"
            yield Block(kind=kind, detail=detail, language=fence[2], text=inside, line=i + 1)
            kind, i = "", end
        elif lines[i].strip():
            kind = ""  # a mark belongs to the very next block
        i += 1


def images(home: Path) -> None:
    """Make `~/images`: crops of two photographs in four disjoint parts, as folders of classes."""
    from aimscale.harness.data.store.bundled import photographs

    pictures = {name: photographs()[name].permute(1, 2, 0).numpy() for name in ("chelsea", "rocket")}
    parts = {
        "pretrain": (0.0, 0.4, 40),
        "validation": (0.4, 0.6, 8),
        "photos-train": (0.6, 0.8, 20),
        "photos-test": (0.8, 1.0, 10),
    }
    rng = np.random.default_rng(0)
    for part, (left, right, num) in parts.items():
        for label, picture in pictures.items():
            region = picture[:, int(left * picture.shape[1]) : int(right * picture.shape[1])]
            folder = home / "images" / part / label
            folder.mkdir(parents=True)
            for i in range(num):
                side = int(rng.integers(40, 80))
                y, x = (int(rng.integers(0, extent - side)) for extent in region.shape[:2])
                Image.fromarray(region[y : y + side, x : x + side]).save(folder / f"{i:03d}.jpg")


def results(home: Path) -> None:
    """Write `results.parquet` with our columns: a law with noise over a grid."""
    import pandas as pd

    rng = np.random.default_rng(1)
    rows = []
    for size, n in {"rung-64": 3e5, "rung-96": 8e5, "rung-128": 2e6, "rung-192": 6e6, "rung-256": 2e7}.items():
        for d in (3e4, 1e5, 3e5, 1e6, 3e6):
            loss = (0.2 + 3 * n**-0.3 + 2 * d**-0.25) * np.exp(rng.normal(0, 0.003))
            flops = 6 * 64 * n * d
            row = {"run_id": f"{size}_s0", "size": size, "seed": 0, "params_total": int(n), "params_trunk": int(n)}
            row |= {"images_seen": int(d), "val_loss": loss, "flops_train": flops, "flops_6nd": flops}
            rows.append(row)
    pd.DataFrame(rows).to_parquet(home.parent / "work" / "results.parquet")


def study(home: Path) -> None:
    """The tables of the studies that the repository keeps."""
    for table in (ROOT / "tests" / "studies").glob("*/*.parquet"):
        shutil.copy(table, home.parent / "work")


def clone(home: Path) -> None:
    """A public table, where a clone has it."""
    table = Path("tests/board/chinchilla-kyo.csv")
    (home.parent / "work" / table.parent).mkdir(parents=True)
    shutil.copy(ROOT / table, home.parent / "work" / table)


GIVEN: dict[str, Callable[[Path], None]] = {
    "clone": clone,
    "images": images,
    "results.parquet": results,
    "study": study,
}


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reader who follows a page in a folder of its own."""

    folder: Path
    """Holds `home`, `work` (where commands run) and `bin`."""
    environment: dict[str, str]
    """Of the commands."""

    def run(self, block: Block, where: str) -> str:
        """Run a block and return what it printed; a failure ends the test with its output."""
        program = [sys.executable, "-"] if block.language == "python" else ["bash", "-euo", "pipefail", "-s"]
        done = subprocess.run(
            program,
            input=block.text,
            cwd=self.folder / "work",
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{where} ended with {done.returncode}\n{block.text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def follow(self, page: Path) -> None:
        """Run the commands of a page and compare their output with what it shows."""
        printed = ""
        for block in read_blocks(page.read_text()):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            if block.kind == "run":
                printed = self.run(block, where)
            elif block.kind == "file":
                (self.folder / "work" / block.detail).write_text(block.text)
            elif block.kind == "given":
                GIVEN[block.detail](self.folder / "home")
            elif block.kind == "shows":
                missing = first_difference(block.text, printed)
                assert missing is None, f"{where}: no line like\n{missing}\nin\n{printed}"


def first_difference(shown: str, printed: str) -> str | None:
    """Return the first line shown that was not printed in this order; other lines may lie between.

    `...` matches anything, and a number any within 5 % of it: torch and processors differ.
    """
    lines = iter(" ".join(line.split()) for line in printed.splitlines())
    for line in shown.splitlines():
        words = " ".join(line.split())
        if words.strip(".") and not any(looks_like(words, other) for other in lines):
            return line
    return None


def looks_like(shown: str, printed: str) -> bool:
    numbers = [float(number.replace(",", "")) for number in re.findall(NUMBER, shown)]
    parts = [".*".join(re.escape(words) for words in part.split("...")) for part in re.split(NUMBER, shown)]
    found = re.search(f"({NUMBER})".join(parts), printed)
    return found is not None and all(
        float(one.replace(",", "")) == pytest.approx(other, rel=0.05)
        for one, other in zip(found.groups(), numbers, strict=True)
    )


def page_mark(page: Path) -> str:
    return next((block.detail for block in read_blocks(page.read_text()) if block.kind == "page"), "")


def cases() -> list[Any]:
    """Return every page with commands as a test case, with the markers that it names."""
    found = [page for page in PAGES if any(block.kind == "run" for block in read_blocks(page.read_text()))]
    marks = [[getattr(pytest.mark, mark)] if (mark := page_mark(page)) else [] for page in found]
    return [pytest.param(page, marks=each, id=page.stem) for page, each in zip(found, marks, strict=True)]


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    for name in ("home", "work", "bin"):
        (tmp_path / name).mkdir()
    wrapper = tmp_path / "bin" / "aimscale"
    # The reader's checkout is clean; the one under test may hold changes, which a launch on Slurm would refuse.
    wrapper.write_text(
        '#!/bin/sh\ncase "$*" in "launch first.yaml"*) set -- "$@" --allow-dirty;; esac\n'
        f'exec {sys.executable} -m aimscale "$@"\n'
    )
    wrapper.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONOPTIMIZE": "1",  # as `python -O`: no assert of the product does work
    }
    return Reader(folder=tmp_path, environment=environment)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_says_whether_it_is_run(page: Path) -> None:
    for block in read_blocks(page.read_text()):
        where = f"{page.relative_to(ROOT)}:{block.line}"
        if block.language in ("bash", "sh", "shell", "console", "python"):
            assert block.kind in ("run", "not run", "file"), f"{where}: say <!-- run --> or <!-- not run: REASON -->"
        assert block.kind != "not run" or block.detail, f"{where}: say why it is not run"
        assert block.kind != "given" or block.detail in GIVEN, f"{where}: nobody makes '{block.detail}'"
    assert page_mark(page) in ("", "slow", "slurm")


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", cases())
def test_a_page_can_be_followed(page: Path, reader: Reader, request: pytest.FixtureRequest) -> None:
    if page_mark(page) == "slurm":
        reader.environment["SLURM_CONF"] = str(request.getfixturevalue("slurm_conf"))
    reader.follow(page)
