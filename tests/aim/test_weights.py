from pathlib import Path

import pytest
import torch
from variants import VARIANTS

from aimscale.aim.config import ModelConfig, model_config
from aimscale.aim.model import AIM
from aimscale.aim.probes import AttentiveProbe
from aimscale.aim.weights import (
    BACKBONE,
    PROBE,
    WeightsError,
    backbone_state,
    load_model,
    model_shapes,
    read_weights,
    write_weights,
)

NUM_CLASSES = 5
CONFIG = model_config("w16-d2", image_size=12, patch_size=4)


def released_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released backbone file, from the description alone (not from our modules)."""
    d = config.width
    shapes: dict[str, tuple[int, ...]] = {
        "preprocessor.patchifier.proj.weight": (d, config.channels, config.patch_size, config.patch_size),
        "preprocessor.patchifier.proj.bias": (d,),
        "preprocessor.patchifier.norm.weight": (d,),
        "preprocessor.patchifier.norm.bias": (d,),
    }
    for block in range(config.depth):
        shapes |= {
            f"trunk.blocks.{block}.attn.qkv.weight": (3 * d, d),
            f"trunk.blocks.{block}.attn.proj.weight": (d, d),
            f"trunk.blocks.{block}.norm_1.weight": (d,),
            f"trunk.blocks.{block}.norm_1.bias": (d,),
            f"trunk.blocks.{block}.mlp.fc1.weight": (4 * d, d),
            f"trunk.blocks.{block}.mlp.fc2.weight": (d, 4 * d),
            f"trunk.blocks.{block}.norm_2.weight": (d,),
            f"trunk.blocks.{block}.norm_2.bias": (d,),
        }
    return shapes | {"trunk.post_trunk_norm.weight": (d,), "trunk.post_trunk_norm.bias": (d,)}


def released_probe_shapes(config: ModelConfig, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a released attentive-probe file."""
    d = config.width
    return {
        "head.cls_token": (1, 1, d),
        "head.k.weight": (d, d),
        "head.v.weight": (d, d),
        "head.linear.weight": (num_classes, d),
        "head.bn.running_mean": (d,),
        "head.bn.running_var": (d,),
        "head.bn.num_batches_tracked": (),
    }


def released_state(model: AIM, probe: AttentiveProbe | None = None) -> dict[str, torch.Tensor]:
    """Tensors under released names: the backbone's (see `backbone_state`), and the probe's if one is given."""
    state = backbone_state(model.state_dict(), model.config)
    if probe is not None:
        state |= {f"{PROBE}{name}": tensor for name, tensor in probe.state_dict().items()}
    return state


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """A released file of a small size, made from the description, not from our modules."""
    shapes = released_shapes(CONFIG) | released_probe_shapes(CONFIG, NUM_CLASSES)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=generator) - 0.2 for name, shape in shapes.items()}
    state["head.bn.running_var"] += 0.5
    state["head.bn.num_batches_tracked"] = torch.tensor(12)
    return state


@pytest.mark.parametrize(("size", "num_keys"), [("aim-600M", 205), ("aim-1B", 205), ("aim-3B", 205), ("aim-7B", 269)])
def test_released_names_and_shapes_are_exactly_ours(size: str, num_keys: int) -> None:
    config = model_config(size, head_rule="none")
    described = released_shapes(config) | released_probe_shapes(config, 1000)
    with torch.device("meta"):
        ours = released_state(AIM(config), AttentiveProbe(config.width, config.num_heads, 1000))
    assert len(described) == num_keys
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == described


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_so_are_those_of_every_variant_that_can_be_exported(variant: dict) -> None:
    config = model_config("w16-d2", image_size=12, patch_size=4, **variant)
    if config.qk_norm:
        with pytest.raises(WeightsError, match="qk_norm"):
            backbone_state(AIM(config).state_dict(), config)
        return
    ours = {name: shape for name, shape in model_shapes(config).items() if name.startswith(BACKBONE)}
    assert ours == released_shapes(config)


def test_export_of_a_mup_model_keeps_its_features(tmp_path: Path) -> None:
    config = model_config("w16-d2", image_size=12, patch_size=4, parametrisation="mup")
    model = AIM(config)
    assert model.trunk.blocks[0].attn.scale != pytest.approx(8**-0.5)
    torch.save(released_state(model), tmp_path / "model.pth")
    images = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(
        load_model(tmp_path / "model.pth", CONFIG).features(images, [1]), model.features(images, [1])
    )


def test_pickled_code_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"preprocessor.patchifier.proj.weight": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(WeightsError, match=r"trap\.pth"):
        read_weights(tmp_path / "trap.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("edit", "subject"),
    [
        (lambda state: state.pop("trunk.blocks.1.norm_2.bias"), "trunk.blocks.1.norm_2.bias"),
        (lambda state: state.update({"trunk.x": torch.ones(2)}), "trunk.x"),
        (lambda state: state.update({"cls": torch.ones(2)}), "cls"),
        (lambda state: state.update({"trunk.blocks.0.attn.qkv.weight": torch.ones(48, 8)}), "(48, 8)"),
        (lambda state: state["trunk.blocks.1.norm_2.bias"][3:4].fill_(torch.nan), "trunk.blocks.1.norm_2.bias"),
    ],
)
def test_wrong_contents_are_refused_by_name(tmp_path: Path, state: dict, edit, subject: str) -> None:
    edit(state)
    torch.save(state, tmp_path / "wrong.pth")
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path / "wrong.pth", CONFIG)
    assert subject in str(error.value)


@pytest.mark.parametrize("name", ["absent.pth", "cut.pth", "cut.safetensors", "empty.bin"])
def test_unreadable_files_are_refused_by_name(tmp_path: Path, state: dict, name: str) -> None:
    path = tmp_path / name
    if path.stem == "empty":
        path.touch()
    elif path.stem == "cut":
        write_weights(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(WeightsError, match=name):
        read_weights(path)
