"""Whether a verb answers what it does not expect with one sentence: odd files, environments, quotas and disks.

    python tests/experiments/odd_inputs.py ['WORDS OF A CASE|OF ANOTHER']

Each case is a forked process with its own folder, which has `SECONDS`. Counts tracebacks, signals and cases without an
answer, and prints them. Needs root, for file systems that are full or read-only.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import gzip
import io
import itertools
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

SECONDS = 240
"""Time after which a case has no answer, s; on an idle machine cases take less than two."""
CLONE_NEWNS = 0x20000
TABLE = "size,params_total,images_seen,val_loss,linear_top1\n" + "".join(
    f"s{n},{10**n},{d},{1 + 10 ** (-0.1 * n) + d**-0.3:.4f},{20 + n + d**0.1:.3f}\n"
    for n in (4, 5, 6)
    for d in (1000, 4000, 16000)
)
SWEEP = {
    "name": "odd",
    "sizes": ["rung-32"],
    "budgets": [640],
    "base": {
        "model": {"image_size": 16, "patch_size": 4},
        "data": {"sources": [{"path": "train"}]},
        "optimiser": {"batch_size": 64},
        "validation": {"path": "validation"},
    },
}
OF_TABLE = ("fit", "report", "correlate", "contrast", "compare", "frontier", "rates")


def archive(name: str, content: bytes, depth: int = 1) -> bytes:
    """Pack a file into a zip of a zip of ..., or a tar if its name ends so."""
    for _ in range(depth):
        out = io.BytesIO()
        if name.endswith(".tar"):
            with tarfile.open(fileobj=out, mode="w") as tar:
                info = tarfile.TarInfo("inner.csv")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        else:
            with zipfile.ZipFile(out, "w") as inner:
                inner.writestr("inner.csv", content)
        content = out.getvalue()
    return content


def odd_tables() -> dict[str, bytes]:
    """Return file name -> content."""
    plain = TABLE.encode()
    sheet = b"PK\x03\x04" + archive("x.zip", b"<worksheet/>")[4:]
    frame = pd.read_csv(io.StringIO(TABLE))
    parquet = io.BytesIO()
    frame.to_parquet(parquet)
    npy = io.BytesIO()
    np.save(npy, frame["val_loss"].to_numpy())
    return {
        "book.xlsx": sheet,
        "book.xls": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500),
        "book.ods": archive("x.zip", b"<office/>"),
        "renamed.csv": sheet,
        "renamed.parquet": plain,
        "half.parquet": parquet.getvalue()[: len(parquet.getvalue()) // 2],
        "parquet.csv": parquet.getvalue(),
        "once.zip": archive("x.zip", plain),
        "nested.zip": archive("x.zip", plain, 5),
        "nested.tar": archive("x.tar", plain, 3),
        "packed.csv.gz": gzip.compress(plain),
        "packed.csv": gzip.compress(gzip.compress(plain)),
        "utf16.csv": TABLE.encode("utf-16"),
        "latin.csv": TABLE.replace("s4", "größe").encode("latin-1"),
        "nul.csv": plain.replace(b"4000", b"4\x0000"),
        "old-mac.csv": plain.replace(b"\n", b"\r"),
        "twice.csv": plain.replace(b"linear_top1", b"val_loss"),
        "header.csv": plain.splitlines()[0],
        "labels.csv": plain.replace(b"s5", "\u202e\x1b[31m\u0000s".encode() * 200),
        "wide.csv": plain + b"," * 100_000 + b"\n",
        "numbers.npy": npy.getvalue(),
        "frame.pkl": pickle.dumps(frame),
        "lines.jsonl": b'{"val_loss": 1}\n[1]\nnull\n{"val_loss": [1]}\n',
        "deep.json": b"[" * 50_000,
        "infinite.csv": plain.replace(b"4000", b"1e999"),
        "page.html": b"<table><tr><td>1</td></tr></table>",
        "quoted.csv": plain + b'"never closed\n1,2',
        "empty.csv": b"",
    }


ENVIRONMENTS: tuple[dict[str, str | None], ...] = (
    {"HOME": "/nowhere"},
    {"HOME": None, "XDG_CACHE_HOME": None},
    {"XDG_CACHE_HOME": "/dev/null"},
    {"TMPDIR": "/nowhere"},
    {"COLUMNS": "0"},
    {"COLUMNS": "many"},
    {"COLUMNS": "-5", "LINES": "x"},
    {"TERM": "no such", "FORCE_COLOR": "1"},
    {"LANG": "xx_YY.utf9", "LC_ALL": "xx"},
    {"PYTHONIOENCODING": "ascii"},
    {"CUDA_VISIBLE_DEVICES": "99,-1,,x"},
    {"CUDA_VISIBLE_DEVICES": "GPU-\x1b[31m"},
    {"SLURM_JOB_ID": "x", "SLURM_JOB_NODELIST": "node[1-"},
    {"SLURM_JOB_END_TIME": "tomorrow", "SLURM_STEP_NUM_TASKS": "all"},
    {"RANK": "0", "WORLD_SIZE": "two"},
    {"RANK": "7", "WORLD_SIZE": "2", "MASTER_PORT": "99999999"},
    {"OMP_NUM_THREADS": "zero"},
    {"AIMSCALE_HOST_SHARE": "most", "AIMSCALE_DEVICE": "tpu", "AIMSCALE_CLAIM": "\x7f"},
    {"MPLBACKEND": "none such", "MPLCONFIGDIR": "/dev/null"},
    {"TZ": "Mars/Olympus"},
    {"PATH": ""},
    {"AIMSCALE_GIT_COMMIT": "x" * 100_000, "AIMSCALE_GIT_DIRTY": "perhaps"},
    {"SOURCE_DATE_EPOCH": "never"},
    {"SOURCE_DATE_EPOCH": "9" * 20},
    {"TERMINAL_WIDTH": "wide"},
    {"PYTHONWARNINGS": "error"},
    {"TORCH_LOGS": "none such"},
    {"TORCH_DISTRIBUTED_DEBUG": "none such"},
    {"TORCH_FR_BUFFER_SIZE": "many"},
    {"SLURM_STEP_NUM_TASKS": "2"},
    {"OMPI_COMM_WORLD_LOCAL_RANK": "1"},
)


def quotas() -> dict[str, Callable[[Path], None]]:
    """Return name -> function that limits this process in its folder."""

    def limit(what: int, value: int) -> Callable[[Path], None]:
        return lambda folder: resource.setrlimit(what, (value, value))

    def mounted(options: str, where: str = "root", *, read_only: bool = False) -> Callable[[Path], None]:
        def mount(folder: Path) -> None:
            place = Path(where) if where.startswith("/") else folder / where
            place.mkdir(exist_ok=True)
            assert ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0  # it goes with this process
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True)
            if read_only:
                subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)

        return mount

    return {
        "no file grows": limit(resource.RLIMIT_FSIZE, 0),
        "files of 2 kB": limit(resource.RLIMIT_FSIZE, 2000),
        "files of 100 kB": limit(resource.RLIMIT_FSIZE, 100_000),
        "20 open files": limit(resource.RLIMIT_NOFILE, 20),
        "60 open files": limit(resource.RLIMIT_NOFILE, 60),
        "no child": limit(resource.RLIMIT_NPROC, 0),
        "no core time": limit(resource.RLIMIT_CPU, 600),
        "a full disk": mounted("size=4k"),
        "a small disk": mounted("size=64k"),
        "no inodes": mounted("size=1m,nr_inodes=2"),
        "a read-only disk": mounted("size=1m", read_only=True),
        "no /dev/shm": mounted("size=4k", "/dev/shm", read_only=True),
        "a read-only /tmp": mounted("size=4k", "/var/tmp", read_only=True),
    }


def odd_sweeps() -> dict[str, bytes]:
    """Return file name -> content of a sweep file."""
    text = yaml.safe_dump(SWEEP).encode()
    tables = odd_tables()
    return {
        "xlsx.yaml": tables["book.xlsx"],
        "zip.yaml": tables["nested.zip"],
        "gz.yaml": gzip.compress(text),
        "utf16.yaml": text.decode().encode("utf-16"),
        "tabs.yaml": text.replace(b"  ", b"\t"),
        "two.yaml": text + b"---\n" + text,
        "tag.yaml": text + b"x: !!python/object/apply:os.system [touch pwned]\n",
        "date.yaml": text.replace(b"odd", b"2026-01-01"),
        "octal.yaml": text.replace(b"640", b"0640"),
        "price.yaml": text + b"cost: {price_per_device_hour: [1, EUR]}\n",
        "shape.yaml": text + b"slurm: {probe_on_one_node_above: -1}\n",
        "long.yaml": text.replace(b"odd", b"o" * 3000),
        "nul.yaml": text.replace(b"train", b"tr\x00ain"),
        "dots.yaml": text.replace(b"odd", b"../../odd"),
        "half.yaml": text + b'description: "\\ud800"\n',
        "yes.yaml": text.replace(b"64", b"yes"),
        "merged.yaml": b"both: &both {seeds: [0]}\n<<: *both\n" + text,
        "itself.yaml": text + b"axes: &axes [*axes]\n",
        "windows.yaml": b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"),
    }


Case = tuple[str, list[str], dict[str, str | None], Callable[[Path], None] | None]
"""Name, words of the command, environment, and limits of its process."""


def cases(folder: Path) -> Iterator[Case]:
    """Yield every case; `folder` holds the files that they name."""
    (folder / "good.csv").write_text(TABLE)
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    sweep = str(folder / "sweep.yaml")
    for (name, content), verb in itertools.product(odd_tables().items(), OF_TABLE):
        (folder / name).write_bytes(content)
        yield f"{verb} {name}", [verb, str(folder / name)], {}, None
    for (name, content), verb in itertools.product(odd_sweeps().items(), ("plan", "status", "launch --dry-run")):
        (folder / name).write_bytes(content)
        yield f"{verb} {name}", words_of(verb, str(folder / name)), {}, None
    for environment in ENVIRONMENTS:
        for verb in ("plan", "launch --on local", "status"):
            yield f"{verb} with {environment}", words_of(verb, sweep), environment, None
        yield f"report with {environment}", ["report", str(folder / "good.csv")], environment, None
    for (name, limit), verb in itertools.product(quotas().items(), ("launch", "collect", "plan", "status")):
        yield f"{verb} with {name}", words_of(verb, sweep), {}, limit
    for name, limit in quotas().items():
        out = ["report", str(folder / "good.csv"), "--out", "root/page.html"]
        yield f"report with {name}", out, {}, limit
    for label in ("", "\x00", "\x1b]0;x\x07", "x" * 100_000, "\u202e", "a=b=c", "/", "-", "N", "\udcff"):
        figure = ["fit", str(folder / "good.csv"), "--figure", "law.svg", "--label", label]
        yield f"fit --label {label[:9]!r}", figure, {}, None


def words_of(verb: str, sweep: str) -> list[str]:
    """Return the words of a verb of a sweep, whose directory is in the process's folder."""
    name, *options = verb.split()
    return [name, sweep, *options, "--root", "root"]


def execute(case: Case, folder: Path, out: int) -> None:
    """Be the process of a case, which writes to a pipe."""
    _, words, environment, limit = case
    os.chdir(folder)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ["XDG_CACHE_HOME"] = str(folder)  # no device is leased by another launch
    for name, value in environment.items():
        os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    if environment:  # libraries read it when they are imported
        os.execv(sys.executable, [sys.executable, "-m", "aimscale", *words])
    from aimscale.sweeps.cli.main import main

    if limit:  # runs end at once
        from aimscale.sweeps.engine import launch
        from aimscale.sweeps.planning.aim_run import AimRun

        launch.raise_on_problems = lambda *_: None  # type: ignore[assignment]
        stand_in = str(Path(__file__).parents[1] / "sweeps" / "stand_in.py")
        AimRun.command = lambda run, stage, run_dir: [stand_in, str(run_dir)]  # type: ignore[method-assign]
        limit(folder)

    sys.argv = ["aimscale", *words]
    main(words)


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """Execute a case in a process of its own, and return how it ended and what it said."""
    back, out = os.pipe()
    os.set_blocking(back, False)
    child = os.fork()
    if child == 0:
        os.setsid()
        code = 99
        try:
            execute(case, folder, out)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code)
    os.close(out)
    deadline, said, ended = time.monotonic() + SECONDS, b"", (0, 0)
    while ended == (0, 0):
        time.sleep(0.02)
        ended = os.waitpid(child, os.WNOHANG)
        with contextlib.suppress(BlockingIOError):
            said += os.read(back, 1 << 20)
        if ended == (0, 0) and time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            said += b"no answer"
    os.close(back)
    text = said.decode(errors="replace")
    if text.endswith("no answer"):
        return "no answer", text
    if "Traceback (most recent" in text:
        return "traceback", text
    if os.WIFSIGNALED(ended[1]):
        return f"signal {os.WTERMSIG(ended[1])}", text
    return f"exit code {os.WEXITSTATUS(ended[1])}", text


def main() -> None:
    """Try all cases, and print the bad ones and a count of each outcome."""
    import aimscale.analysis.cli.laws  # imported once, and not by each case
    import aimscale.analysis.report.page
    import aimscale.sweeps.cli.launch
    import aimscale.sweeps.cli.main
    import aimscale.sweeps.cli.plan
    import aimscale.sweeps.cli.sweep  # noqa: F401

    only = sys.argv[1] if len(sys.argv) > 1 else ""
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as place:
        files = Path(place) / "files"
        files.mkdir()
        for number, case in enumerate(cases(files)):
            if not any(words in case[0] for words in only.split("|")):
                continue
            folder = Path(place) / str(number)
            folder.mkdir()
            how, said = outcome(case, folder)
            counts[how] += 1
            if how not in ("exit code 0", "exit code 1", "exit code 2"):
                print(f"{how}: {case[0][:120]}\n{said[-1500:]}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
    print(dict(counts))


if __name__ == "__main__":
    main()
