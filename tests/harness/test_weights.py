"""`aimscale weights`: a file in the released layout, written from its description, goes in and comes out."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from commands import answer, refused, say
from huggingface_hub import PyTorchModelHubMixin
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.aim.probes import AttentiveProbe
from aimscale.aim.weights import BACKBONE, WeightsError, load_model
from aimscale.analysis.table.schema import results_table
from aimscale.harness.data.store.listing import list_folder
from aimscale.harness.data.store.pack import pack_images
from aimscale.harness.probe.features.images import open_labelled
from aimscale.harness.probe.released import read_head_blocks
from aimscale.harness.probe.run import load_budget
from aimscale.harness.run.config import ProbeSection
from aimscale.harness.run.directory import RunDir

CONFIG = model_config("w48-d2", image_size=28)


@pytest.fixture
def released(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    state = {name: torch.randn(tensor.shape) for name, tensor in AIM(CONFIG).state_dict().items()
             if name.startswith(BACKBONE)}  # fmt: skip
    path = tmp_path / "aim_48.pth"
    torch.save(state, path)
    return path, state


def test_import_gives_a_finished_run_with_a_row_and_export_gives_the_values_back(released: Any, tmp_path: Path) -> None:
    path, state = released
    options = ["--image-size", "28", "--images-seen", "8192", "--num-heads", "2"]
    say("weights", "import", path, tmp_path / "run", *options)
    run = RunDir(tmp_path / "run")
    config = run.load_config()
    assert config.training.model.patch_size == 14
    assert run.read_status().state == "finished"
    (row,) = run.read_rows()
    table = results_table([row | {"sweep": "s", "status": "complete"}]).to_pylist()
    assert (table[0]["run_id"], table[0]["val_loss"], table[0]["images_seen"]) == (config.run_id, None, 8192)
    assert run.read_starts()[0]["imported"]["bytes"] == path.stat().st_size
    say("weights", "export", run.path, tmp_path / "out")
    for held in (run.model_file(8192), tmp_path / "out" / "model.safetensors"):
        held_state = load_file(held)
        assert held_state.keys() == state.keys()
        assert all(torch.equal(held_state[name], state[name]) for name in state)


class MakesFolder:
    """What makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._path),)


def test_wrong_files_are_refused_and_leave_nothing(released: Any, tmp_path: Path) -> None:
    path, state = released
    save_file({k: v for k, v in state.items() if "blocks.1.mlp.fc2" not in k}, tmp_path / "short.safetensors")
    torch.save({"w": Path("x")}, tmp_path / "pickle.pth")
    torch.save({"w": MakesFolder(tmp_path / "made")}, tmp_path / "evil.pth")
    (tmp_path / "old.bin").write_bytes(pickle.dumps(MakesFolder(tmp_path / "made")))
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pth")
    torch.save({k: v * torch.nan if "blocks.1.mlp.fc2" in k else v for k, v in state.items()}, tmp_path / "nan.pth")
    before = sorted(tmp_path.iterdir())
    few = "--images-seen 8 --num-heads 2"
    for arguments, message in (
        (["import", tmp_path / "short.safetensors", tmp_path / "r", *few.split()], "fc2"),
        (["import", path, tmp_path / "r", "--num-heads", "3"], "--images-seen"),
        (["import", path, tmp_path / "r", "--images-seen", "8"], "add --num-heads"),
        (["import", tmp_path / "pickle.pth", tmp_path / "r"], "not a plain PyTorch state dict"),
        (["import", tmp_path / "evil.pth", tmp_path / "r"], "not a plain PyTorch state dict"),
        (["import", tmp_path / "old.bin", tmp_path / "r"], "not a plain PyTorch state dict"),
        (["import", tmp_path / "none.pth", tmp_path / "r"], "no weight file"),
        (["export", tmp_path, tmp_path / "o"], "no run directory"),
        (["import", tmp_path / "other.pth", tmp_path / "r", *few.split()], "other.pth"),
        (["import", tmp_path / "nan.pth", tmp_path / "r", *few.split()], "blocks.1.mlp.fc2"),
        (["import", tmp_path, tmp_path / "r"], "holds no model.safetensors or pytorch_model.bin"),
    ):
        assert message in refused("weights", *arguments)
    assert sorted(tmp_path.iterdir()) == before


class AIMForImageClassification(nn.Module, PyTorchModelHubMixin):
    """A model that is built from `config.json` as the authors' class of this name is: no other keys are known."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self._build(**config)

    def _build(
        self, img_size: int, patch_size: int, embed_dim: int, num_blocks: int, num_heads: int, num_channels: int = 3,
        probe_layers: int | list[int] = 6, num_classes: int = 1000,
    ) -> None:  # fmt: skip
        size = f"w{embed_dim}-d{num_blocks}-h{num_heads}"
        model = AIM(model_config(size, image_size=img_size, patch_size=patch_size, channels=num_channels))
        self.preprocessor, self.trunk = model.preprocessor, model.trunk
        self.head = AttentiveProbe(embed_dim, num_heads, num_classes)
        last = isinstance(probe_layers, int)
        self.layers = range(num_blocks - probe_layers, num_blocks) if last else probe_layers  # type: ignore[operator]

    def forward(self, images: Tensor) -> Tensor:
        x, outputs = self.preprocessor(images), []
        for block in self.trunk.blocks:
            x = block(x, None)
            outputs.append(x)
        logits: Tensor = self.head(torch.stack([outputs[layer] for layer in self.layers]).mean(0))
        return logits


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("layers", [[1, 2], 3])
def test_a_folder_of_the_hub_comes_in_with_its_head_and_goes_out_as_its_class_reads_it(
    tmp_path: Path, name: str, layers: Any
) -> None:
    torch.manual_seed(0)
    config = {"img_size": 28, "patch_size": 14, "embed_dim": 48, "num_blocks": 4, "num_heads": 6, "num_classes": 5}
    theirs = AIMForImageClassification(config | {"probe_layers": layers}).eval()
    with torch.no_grad():
        for value in (*theirs.parameters(), theirs.head.bn.running_mean):
            value.add_(torch.randn_like(value) * 0.2)
    (tmp_path / "hub").mkdir()
    write = save_file if name.endswith("safetensors") else torch.save
    write(theirs.state_dict(), tmp_path / "hub" / name)
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config | {"probe_layers": layers}))
    for source in ("hub", f"hub/{name}"):
        run = RunDir(tmp_path / f"run-{source[-1]}")
        say("weights", "import", tmp_path / source, run.path, "--images-seen", "8192")
        section = run.load_config().training.model
        assert (section.size, section.image_size) == ("w48-d4-h6", 28)
        assert read_head_blocks(run.path / "released_head.safetensors") == [1, 2] + [3] * (layers == 3)
    say("weights", "export", run.path, tmp_path / "out")
    images = torch.randn(3, 3, 28, 28)
    again = AIMForImageClassification.from_pretrained(tmp_path / "out", strict=True).eval()
    with torch.no_grad():
        assert torch.equal(again(images), theirs(images))
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config | {"num_blocks": 5}))
    said = refused("weights", "import", tmp_path / "hub", tmp_path / "r", "--images-seen", "8192")
    assert "config.json beside it describes another model" in said
    for odd in ("[" * 50_000, '{"img_size": 1e400, "embed_dim": 1, "num_blocks": 1, "num_heads": 1}'):
        (tmp_path / "hub" / "config.json").write_text(odd)
        assert "does not describe an AIM" in refused("weights", "import", tmp_path / "hub", tmp_path / "r")


def test_what_a_file_does_not_tell_is_asked_for(released: Any, tmp_path: Path) -> None:
    path, state = released
    probe = AttentiveProbe(CONFIG.width, CONFIG.num_heads, 3)
    torch.save(state | {f"head.{name}": tensor for name, tensor in probe.state_dict().items()}, path)
    arguments = ["import", path, tmp_path / "run", "--image-size", "28", "--images-seen", "8192"]
    assert "add --num-heads" in refused("weights", *arguments)
    arguments += ["--num-heads", "6"]
    assert "add --head-blocks" in refused("weights", *arguments)
    for blocks, message in (("best", "no best blocks"), ("1-2", "it has 0 to 1"), ("all", "names no blocks")):
        assert message in refused("weights", *arguments, "--head-blocks", blocks)
    say("weights", *arguments, "--head-blocks", "1")
    assert RunDir(tmp_path / "run").load_config().training.model.size == "w48-d2-h6"
    assert read_head_blocks(tmp_path / "run" / "released_head.safetensors") == [1]


def test_a_cut_budget_is_refused(released: Any, tmp_path: Path) -> None:
    path, _ = released
    say("weights", "import", path, tmp_path / "run", "--image-size", 28, "--images-seen", 8192, "--num-heads", 2)
    run = RunDir(tmp_path / "run")
    os.truncate(run.model_file(8192), 3000)
    with pytest.raises(WeightsError, match=r"8192/model\.safetensors is not a whole safetensors file"):
        load_budget(run, run.load_config(), 8192, "cpu")


def test_a_released_head_is_kept_and_scored_on_its_task(released: Any, tmp_path: Path) -> None:
    path, _ = released
    pictures = tmp_path / "pictures"
    for number, name in enumerate(("bird", "cat", "dog")):
        (pictures / name).mkdir(parents=True)
        for index in range(7):
            pixels = np.random.default_rng([number, index]).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / name / f"{index}.png")
    pack_images(list_folder(pictures), tmp_path / "test")
    probe = AttentiveProbe(CONFIG.width, CONFIG.num_heads, 3)
    head = {f"head.{name}": torch.rand(tensor.shape) for name, tensor in probe.state_dict().items()}
    head["head.bn.num_batches_tracked"] = torch.tensor(3)
    save_file(head, tmp_path / "head.safetensors")
    options = ["--image-size", "28", "--images-seen", "8192", "--num-heads", str(CONFIG.num_heads)]
    say("weights", "import", path, tmp_path / "run", *options, "--head", tmp_path / "head.safetensors",
        "--head-blocks", "last")  # fmt: skip
    run = RunDir(tmp_path / "run")

    def tasks_of(name: str, folder: Path) -> list[str]:
        tasks = tmp_path / f"{name}.yaml"
        tasks.write_text(yaml.safe_dump([{"task": name, "train": str(folder), "test": str(folder)}]))
        return ["--tasks", str(tasks)]

    task = tasks_of("animals", tmp_path / "test")
    (entry,) = answer("probe", run.path, "--kind", "released", *task, "--device", "cpu")
    assert (entry["kind"], entry["blocks"], entry["n"]) == ("released", [0, 1], 21)
    assert run.read_rows()[0]["probes"] == [{k: v for k, v in entry.items() if k != "images_seen"}]
    # the same by the written-out modules
    config = run.load_config()
    section = ProbeSection(task="animals", train=str(tmp_path / "test"), test=str(tmp_path / "test"))
    test = open_labelled(section.test, section, config.training.model, config.runtime, 0.0)
    model = load_model(path, CONFIG).to(torch.bfloat16)
    probe = AttentiveProbe(CONFIG.width, CONFIG.num_heads, 3)
    probe.load_state_dict({name.removeprefix("head."): tensor for name, tensor in head.items()})
    with torch.no_grad():
        tokens = model.features(test.images(range(21)), [0, 1]).float().mean(0)
        right = (probe.eval()(tokens).argmax(1) == test.labels).float().mean()
    assert entry["top1"] == pytest.approx(float(right))

    shutil.rmtree(pictures / "dog")
    pack_images(list_folder(pictures), tmp_path / "two")
    error = refused("probe", run.path, "--kind", "released", *tasks_of("pairs", tmp_path / "two"))
    assert "has 2 classes and the released head 3" in error
    say("weights", "import", path, tmp_path / "bare", *options)
    assert "has no released head" in refused("probe", tmp_path / "bare", "--kind", "released", *task)
    wide = {f"head.{name}": tensor for name, tensor in AttentiveProbe(64, 4, 3).state_dict().items()}
    save_file(wide, tmp_path / "wide.safetensors")
    error = refused("weights", "import", path, tmp_path / "r", *options, "--head", tmp_path / "wide.safetensors")
    assert "head.bn.running_mean has the shape (64,)" in error
    assert not (tmp_path / "r").exists()
