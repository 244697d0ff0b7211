import pytest

from aimscale.aim.config import ModelConfigError, model_config


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ("aim-600M", (1536, 24, 12)),
        ("aim-1B", (2048, 24, 16)),
        ("aim-3B", (3072, 24, 24)),
        ("aim-7B", (4096, 32, 32)),
        ("rung-24", (24, 4, 3)),
        ("rung-32", (32, 4, 2)),
        ("rung-128", (128, 6, 2)),
        ("rung-768", (768, 16, 12)),
        ("w80-d3", (80, 3, 5)),
    ],
)
def test_size_has_its_width_depth_and_heads(size: str, shape: tuple[int, int, int]) -> None:
    config = model_config(size)
    assert (config.width, config.depth, config.num_heads) == shape


def test_head_rules() -> None:
    assert (model_config("aim-600M").head.width, model_config("aim-600M").head.depth) == (2048, 12)
    assert (model_config("aim-7B", head_rule="released").head.width, model_config("aim-7B").head.depth) == (2048, 16)
    assert model_config("rung-32").head.width == 48
    assert model_config("rung-32", head_rule="none").head.is_linear
    override = model_config("rung-32", head_rule="released", head_width=64, head_depth=0).head
    assert (override.width, override.depth) == (64, 0)


@pytest.mark.parametrize(
    ("arguments", "subject"),
    [
        ({"size": "rung96"}, "rung-96"),
        ({"size": "AIM-600m"}, "aim-600M"),
        ({"size": "resnet50"}, "resnet50"),
        ({"size": "w0-d2"}, "known sizes: aim-7B, aim-3B, aim-1B, aim-600M, rung-1024, "),
        ({"size": "w30-d2"}, "30"),
        ({"size": "rung-32", "head_width": 50}, "50"),
        ({"size": "rung-32", "image_size": 32}, "image_size 28"),
        ({"size": "rung-32", "image_size": 14}, "patch"),
        ({"size": "rung-32", "head_rule": "big"}, "big"),
        ({"size": "rung-32", "head_rule": "none", "head_depth": 3}, "head_depth"),
        ({"size": "rung-32", "head_kind": "transformer", "head_depth": 0}, "needs a block"),
        ({"size": "rung-32", "masked": 1.0}, "masked"),
        ({"size": "rung-32", "image_size": 4, "patch_size": 1, "channels": 1}, "patch_size"),
    ],
)
def test_mistake_is_one_sentence(arguments: dict, subject: str) -> None:
    with pytest.raises(ModelConfigError) as error:
        model_config(**arguments)
    assert subject in str(error.value)
    assert error.value.exit_code == 2
