"""A bit or a digit that is flipped in a file of a finished run is found before it is measured or collected."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aimscale.aim.errors import UserError
from aimscale.harness.results import add_probes, check_rows, finished_probes
from aimscale.harness.run.config import ProbeSection, run_config
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.files import file_crc32, sealed, write_json
from aimscale.harness.run.schedule import WEIGHTS_CRC32, check_weights
from aimscale.harness.step.checkpoint import complete_checkpoints, read_manifest

OPTIMISER = {"batch_size": 64, "lr_peak": 1e-3}
ROW: dict[str, Any] = {"images_seen": 64, "val_loss": 0.4971656, "params_total": 12345, "probes": []}


def digits_changed(path: Path) -> list[bytes]:
    """Change each digit of a file, one at a time."""
    whole = path.read_bytes()
    places = [i for i, byte in enumerate(whole) if byte in b"0123456789"]
    return [whole[:i] + (b"1" if whole[i : i + 1] != b"1" else b"2") + whole[i + 1 :] for i in places]


def test_no_digit_of_the_results_changes_unseen(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.record_row(ROW)
    assert run.read_rows() == [ROW]
    for damaged in digits_changed(run.results):
        run.results.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            run.read_rows()
    run.results.write_text(json.dumps({"version": 1, "starts": [], "rows": [ROW]}))  # of an earlier release
    assert run.read_rows() == [ROW]


def test_no_digit_of_a_curve_changes_unseen(tmp_path: Path) -> None:
    run, line = RunDir(tmp_path), {"images_seen": 64, "lr": 0.001, "val_loss": 0.4971656}
    run.curve.write_text(json.dumps(sealed(line)) + "\n" + '{"images_seen": 128, "val_lo')
    assert run.read_curve() == [line]
    for damaged in digits_changed(run.curve)[:-3]:  # those of the line that a kill cut off
        run.curve.write_bytes(damaged)
        with pytest.raises(UserError, match=r"curve\.jsonl is damaged"):
            run.read_curve()


def test_no_line_of_a_curve_is_lost_unseen(tmp_path: Path) -> None:
    run, lines = RunDir(tmp_path), [{"images_seen": 64 * i, "val_loss": 0.5 / i} for i in range(1, 4)]
    texts = [json.dumps(sealed(line)) + "\n" for line in lines]
    run.curve.write_text("".join(texts[:2]))
    run.record_row(ROW)
    assert run.read_curve() == lines[:2], "of an earlier release, of which nothing is recorded"
    run.record_curve()
    run.record_row(ROW | {"images_seen": 128})
    for text in ("", texts[0], texts[1], texts[1] + texts[0], "".join(texts[:2])[:-9]):
        run.curve.write_text(text)
        with pytest.raises(UserError, match=r"curve\.jsonl is damaged"):
            run.read_curve()
    run.curve.unlink()
    with pytest.raises(UserError, match=r"curve\.jsonl is damaged"):
        run.read_curve()
    run.curve.write_text("".join(texts))  # a longer budget went on
    assert run.read_curve() == lines


def test_no_digit_of_a_manifest_changes_unseen(tmp_path: Path) -> None:
    path, files = tmp_path / "64" / "manifest.json", {"rank-0.safetensors": {"size": 3, "crc32": 907060870}}
    values = {"run_id": "a", "images_seen": 64, "branch": None, "adam_step": 5, "progress": {"images_done": 64}}
    path.parent.mkdir()
    (path.parent / "rank-0.safetensors").write_bytes(b"abc")
    write_json(path, sealed(values | {"files": files}))
    assert read_manifest(path.parent)
    for damaged in digits_changed(path):
        path.write_bytes(damaged)
        assert read_manifest(path.parent) is None
    assert complete_checkpoints(tmp_path) == []
    write_json(path, values | {"files": files})  # of an earlier release
    assert [each.name for each, _ in complete_checkpoints(tmp_path)] == ["64"]


def test_no_digit_of_a_probes_file_changes_unseen(tmp_path: Path) -> None:
    section, key = ProbeSection(task="pets", train="a", test="b"), {"backbone": "x", "evaluation": "e1-e2", "seed": 3}
    detail = {"task": "pets", "kind": "knn", "top1": 0.75, "per_class": [0.5, 1.0], "hits": {"5": 1, "10": 2}}
    add_probes(tmp_path, section, key, {"knn": detail})
    assert finished_probes(tmp_path, "pets", key) == {"knn": detail}
    (path,) = tmp_path.glob("*.json")
    for damaged in digits_changed(path):
        path.write_bytes(damaged)
        assert finished_probes(tmp_path, "pets", key) == {}


def test_no_pickle_in_validation_losses_is_loaded(tmp_path: Path) -> None:
    class MakesFolder:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    fields = {"data": {"sources": [{"path": "x"}]}, "validation": {"path": "y"}, "budgets": [64]}
    fields |= {"model": {"size": "rung-24"}, "optimiser": OPTIMISER, "schedule": {"warmup_images": 0}}
    run, config = RunDir(tmp_path), run_config(fields, "test")
    path = run.validation_file(64)
    path.parent.mkdir()
    for whole in (False, True):
        if whole:
            path.write_bytes(pickle.dumps(MakesFolder()))
        else:
            np.savez(path, name="x", val_loss=0.5, loss_sum=np.array([MakesFolder()], object))
        with pytest.raises(UserError, match=r"64\.npz is damaged"):
            check_rows(run, config, [ROW])
    assert not (tmp_path / "made").exists()


def test_a_flipped_bit_of_weights_is_found_before_they_are_measured(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    path = run.model_file(64)
    path.parent.mkdir(parents=True)
    path.write_bytes(bytes(1000))
    run.record_row(ROW)
    assert check_weights(run, 64) == path, "of an earlier release, without a checksum"
    run.record_row(ROW | {WEIGHTS_CRC32: file_crc32(path)})
    assert check_weights(run, 64) == path
    path.write_bytes(bytes(500) + b"\1" + bytes(499))
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        check_weights(run, 64)
