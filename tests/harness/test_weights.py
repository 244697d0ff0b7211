"""`aimscale weights`: a file in the released layout, written from its description, goes in and comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.aim.probes import AttentiveProbe
from aimscale.aim.weights import BACKBONE, known_heads, load_backbone
from aimscale.analysis.table.schema import results_table
from aimscale.harness.data.store.pack import pack_folder
from aimscale.harness.probe.features.images import open_task
from aimscale.harness.run.config import ProbeSection
from aimscale.harness.run.directory import RunDir
from aimscale.harness.run.row import model_of
from aimscale.sweeps.cli.main import main

CONFIG = model_config("w48-d2", image_size=28)


@pytest.fixture
def released(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    state = {name: torch.randn(tensor.shape) for name, tensor in AIM(CONFIG).state_dict().items()
             if name.startswith(BACKBONE)}  # fmt: skip
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
    code, _, _ = weights(
        capsys, "import", str(path), str(target), "--image-size", "28", "--images-seen", "8192", "--num-heads", "3"
    )
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
    assert run.read_starts()[0]["imported"]["bytes"] == path.stat().st_size


def test_export_gives_back_what_was_imported_with_a_card(
    released: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = released
    options = ["--image-size", "28", "--images-seen", "8192", "--num-heads", "2"]
    weights(capsys, "import", str(path), str(tmp_path / "run"), *options)
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


def test_wrong_files_are_refused_and_leave_nothing(
    released: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, state = released
    save_file({k: v for k, v in state.items() if "blocks.1.mlp.fc2" not in k}, tmp_path / "short.safetensors")
    torch.save({"w": Path("x")}, tmp_path / "pickle.pth")
    before = sorted(tmp_path.iterdir())
    few = "--images-seen 8 --num-heads 2"
    for arguments, message in (
        (["import", str(tmp_path / "short.safetensors"), str(tmp_path / "r"), *few.split()], "fc2"),
        (["import", str(path), str(tmp_path / "r"), "--num-heads", "3"], "--images-seen"),
        (["import", str(path), str(tmp_path / "r"), "--images-seen", "8"], "say --num-heads"),
        (["import", str(tmp_path / "pickle.pth"), str(tmp_path / "r")], "not a plain PyTorch state dict"),
        (["import", str(tmp_path / "none.pth"), str(tmp_path / "r")], "no weight file"),
        (["export", str(tmp_path), str(tmp_path / "o")], "no run directory"),
    ):
        code, _, err = weights(capsys, *arguments)
        assert (code, err.count("\n")) == (2, 1), arguments
        assert message in err
    assert sorted(tmp_path.iterdir()) == before


def test_attention_heads_are_told_by_a_published_size_by_our_own_export_or_by_the_user_alone(
    released: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = released
    options = ["--image-size", "28", "--images-seen", "8192"]
    weights(capsys, "import", str(path), str(tmp_path / "run"), *options, "--num-heads", "6")
    config = RunDir(tmp_path / "run").load_config()
    assert config.training.model.size == "w48-d2-h6"
    assert model_of(config.training).num_heads == 6
    weights(capsys, "export", str(tmp_path / "run"), str(tmp_path / "out"))
    again = str(tmp_path / "out" / "model.safetensors")
    assert weights(capsys, "import", again, str(tmp_path / "again"), *options)[0] == 0
    assert RunDir(tmp_path / "again").load_config().training.model.size == "w48-d2-h6"
    assert known_heads(path, 1536, 24) == 12
    assert known_heads(path, 768, 16) is None  # rung-768's shape, and perhaps another's heads


def test_a_released_head_is_kept_and_scored_on_its_task(
    released: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = released
    pictures = tmp_path / "pictures"
    for number, name in enumerate(("bird", "cat", "dog")):
        (pictures / name).mkdir(parents=True)
        for index in range(7):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / name / f"{index}.png")
    pack_folder(pictures, tmp_path / "test")
    probe = AttentiveProbe(CONFIG.width, CONFIG.num_heads, 3)
    head = {f"head.{name}": torch.rand(tensor.shape) for name, tensor in probe.state_dict().items()}
    head["head.bn.num_batches_tracked"] = torch.tensor(3)
    save_file(head, tmp_path / "head.safetensors")
    options = ["--image-size", "28", "--images-seen", "8192", "--num-heads", str(CONFIG.num_heads)]
    weights(capsys, "import", str(path), str(tmp_path / "run"), *options, "--head", str(tmp_path / "head.safetensors"))
    run = RunDir(tmp_path / "run")
    tasks = tmp_path / "tasks.yaml"

    def task(name: str) -> list[str]:
        test = str(tmp_path / name)
        tasks.write_text(json.dumps([{"task": "animals", "train": test, "test": test}]))  # JSON is YAML
        return ["--kind", "released", "--tasks", str(tasks), "--device", "cpu"]

    with pytest.raises(SystemExit) as ended:
        main(["probe", str(run.path), *task("test"), "--json"])
    assert ended.value.code == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["kind"], entry["blocks"], entry["n"]) == ("released", [0, 1], 21)
    assert run.read_rows()[0]["probes"] == [{k: v for k, v in entry.items() if k != "images_seen"}]
    # the same by the written-out modules
    config = run.load_config()
    section = ProbeSection(task="animals", train=str(tmp_path / "test"), test=str(tmp_path / "test"))
    _, test = open_task(section, config.training.model)
    model = load_backbone(path, CONFIG).to(torch.bfloat16)
    probe = AttentiveProbe(CONFIG.width, CONFIG.num_heads, 3)
    probe.load_state_dict({name.removeprefix("head."): tensor for name, tensor in head.items()})
    with torch.no_grad():
        tokens = model.features(test.images(range(21)), [0, 1]).float().mean(0)
        right = (probe.eval()(tokens).argmax(1) == test.labels).float().mean()
    assert entry["top1"] == pytest.approx(float(right))

    def refused(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        assert ended.value.code == 2
        return capsys.readouterr().err

    shutil.rmtree(pictures / "dog")
    pack_folder(pictures, tmp_path / "two")
    assert "has 2 classes and the released head 3" in refused("probe", str(run.path), *task("two"))
    weights(capsys, "import", str(path), str(tmp_path / "bare"), *options)
    assert "has no released head" in refused("probe", str(tmp_path / "bare"), *task("test"))
    wide = {f"head.{name}": tensor for name, tensor in AttentiveProbe(64, 4, 3).state_dict().items()}
    save_file(wide, tmp_path / "wide.safetensors")
    _, _, error = weights(
        capsys, "import", str(path), str(tmp_path / "r"), *options, "--head", str(tmp_path / "wide.safetensors")
    )
    assert "head.bn.running_mean has the shape (64,)" in error
    assert not (tmp_path / "r").exists()
