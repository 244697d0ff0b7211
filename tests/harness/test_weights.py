"""`aimscale weights`: a file in the released layout, written from its description, goes in and comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aimscale.aim.config import model_config
from aimscale.aim.weights import load_backbone, released_shapes
from aimscale.analysis.tables.schema import results_table
from aimscale.harness.run.directory import RunDir
from aimscale.sweeps.cli.main import main

CONFIG = model_config("w48-d2", image_size=28)


@pytest.fixture
def released(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    state = {name: torch.randn(shape) for name, shape in released_shapes(CONFIG).items()}
    path = tmp_path / "aim_48.pth"
    torch.save(state, path)
    return path, state


def weights(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["weights", *arguments])
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def test_import_gives_a_finished_run_with_the_same_values_and_a_row(
    released: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = released
    target = tmp_path / "run"
    code, _, _ = weights(capsys, "import", str(path), str(target), "--image-size", "28", "--images-seen", "8192")
    assert code == 0
    run = RunDir(target)
    config = run.load_config()
    assert (config.training.model.size, config.training.model.patch_size) == ("w48-d2", 14)
    assert run.read_status().state == "finished"
    imported = load_file(run.model_file(8192))
    assert imported.keys() == state.keys()
    assert all(torch.equal(imported[name], state[name]) for name in state)
    (row,) = run.read_rows()
    table = results_table([row | {"sweep": "s", "status": "complete"}]).to_pylist()
    assert (table[0]["run_id"], table[0]["val_loss"], table[0]["images_seen"]) == (config.run_id, None, 8192)
    assert json.loads(run.provenance.read_text())["starts"][0]["imported"]["bytes"] == path.stat().st_size


def test_export_gives_back_what_was_imported_with_a_card(
    released: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = released
    weights(capsys, "import", str(path), str(tmp_path / "run"), "--image-size", "28", "--images-seen", "8192")
    code, out, _ = weights(capsys, "export", str(tmp_path / "run"), str(tmp_path / "out"))
    assert code == 0
    assert "model.safetensors" in out
    for exported in (
        load_file(tmp_path / "out" / "model.safetensors"),
        torch.load(tmp_path / "out" / "model.pth", weights_only=True),
    ):
        assert exported.keys() == state.keys()
        assert all(torch.equal(exported[name], state[name]) for name in state)
    assert "width 48, 2 blocks" in (tmp_path / "out" / "README.md").read_text()
    images = torch.randn(2, 3, 28, 28)
    again = load_backbone(tmp_path / "out" / "model.pth", CONFIG).features(images, [1])
    torch.testing.assert_close(again, load_backbone(path, CONFIG).features(images, [1]))


def test_info_tells_size_and_parameters(released: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path, state = released
    code, out, _ = weights(capsys, "info", str(path), "--json")
    facts = json.loads(out)
    assert code == 0
    assert (facts["size"], facts["width"], facts["depth"], facts["is_complete_backbone"]) == ("w48-d2", 48, 2, True)
    assert sum(facts["params"].values()) == sum(tensor.numel() for tensor in state.values())


def test_wrong_files_are_refused_and_leave_nothing(
    released: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = released
    save_file({k: v for k, v in state.items() if "blocks.1.mlp.fc2" not in k}, tmp_path / "short.safetensors")
    torch.save({"w": Path("x")}, tmp_path / "pickle.pth")
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        (["import", str(tmp_path / "short.safetensors"), str(tmp_path / "r"), "--images-seen", "8"], "fc2"),
        (
            ["import", str(path), str(tmp_path / "r"), "--size", "rung-64", "--images-seen", "8"],
            "holds w48-d2, not rung-64",
        ),
        (["import", str(path), str(tmp_path / "r")], "--images-seen"),
        (["import", str(tmp_path / "pickle.pth"), str(tmp_path / "r")], "not a plain PyTorch state dict"),
        (["import", str(tmp_path / "none.pth"), str(tmp_path / "r")], "no weight file"),
        (["export", str(tmp_path), str(tmp_path / "o")], "no run directory"),
        (["info", str(tmp_path / "none.pth")], "no weight file"),
    ):
        code, _, err = weights(capsys, *arguments)
        assert (code, err.count("\n")) == (2, 1), arguments
        assert message in err
    assert sorted(tmp_path.iterdir()) == before
