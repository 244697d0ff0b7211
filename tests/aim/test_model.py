"""The model against an independent implementation that goes token by token through plain numpy, and its guarantees."""

import functools
import math

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import Attention as TimmAttention
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from aimscale.aim.config import ModelConfig, model_config
from aimscale.aim.layers import Attention
from aimscale.aim.model import AIM

ORDERS = ["raster", "inward_spiral", "outward_spiral", "checkerboard", "hashed"]


def small(**options) -> ModelConfig:
    return model_config("w16-d2", image_size=12, patch_size=4, **{"head_width": 24, "head_depth": 2} | options)


def make(config: ModelConfig, seed: int = 0) -> AIM:
    model = AIM(config)
    model.init_weights(seed)
    with torch.no_grad():  # biases and norms away from 0 and 1, so that a forgotten one shows
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


def batch(config: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """One image for every prefix length, or as many masks."""
    given = torch.arange(1, config.num_tokens)
    generator = torch.Generator().manual_seed(2)
    shape = (len(given), config.channels, config.image_size, config.image_size)
    images = torch.randn(shape, generator=generator)
    if config.masked is not None:
        given = torch.rand(len(given), config.num_tokens, generator=generator).argsort(1) >= config.num_masked
    return images, given


ORDERS_3_BY_3 = {
    "raster": [0, 1, 2, 3, 4, 5, 6, 7, 8],
    "inward_spiral": [0, 1, 2, 5, 8, 7, 6, 3, 4],
    "outward_spiral": [4, 1, 2, 5, 8, 7, 6, 3, 0],
    "checkerboard": [0, 2, 4, 6, 8, 1, 3, 5, 7],
}


class Reference:
    """AIM for one image, written from the description with no tensor library: lists of token vectors."""

    def __init__(self, model: AIM) -> None:
        self.config = model.config
        self.weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
        if model.config.patch_order == "hashed":
            self.order = model.preprocessor.order.tolist()
        else:
            self.order = ORDERS_3_BY_3[model.config.patch_order]

    def norm(self, x, name):
        centred = x - x.mean()
        scaled = centred / math.sqrt((centred**2).mean() + 1e-6)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def mlp(self, x, name):
        hidden = self.weights[f"{name}.fc1.weight"] @ x
        hidden = np.array([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in hidden])
        return self.weights[f"{name}.fc2.weight"] @ hidden

    def position(self, raster_index, width):
        row, column = divmod(raster_index, self.config.grid)
        omega = [10000 ** (-i / (width // 4)) for i in range(width // 4)]
        halves = [[f(at * w) for w in omega] for at in (column, row) for f in (math.sin, math.cos)]
        return np.concatenate(halves)

    def patch(self, image, raster_index):
        p = self.config.patch_size
        row, column = divmod(raster_index, self.config.grid)
        return image[:, row * p : (row + 1) * p, column * p : (column + 1) * p].double().numpy()  # (C, p, p)

    def tokens(self, image, given):
        weight, bias = (self.weights[f"preprocessor.patchifier.proj.{part}"] for part in ("weight", "bias"))
        embedded = [(weight * self.patch(image, index)).sum((1, 2, 3)) + bias for index in self.order]
        embedded = [self.norm(x, "preprocessor.patchifier.norm") for x in embedded]
        if self.config.masked is not None:
            token = self.weights["mask.token"]
            embedded = [x if is_visible else token for x, is_visible in zip(embedded, given, strict=True)]
        return [x + self.position(index, self.config.width) for x, index in zip(embedded, self.order, strict=True)]

    def block(self, xs, name, may_see, heads):
        d = len(xs[0])
        qkv = [self.weights[f"{name}.attn.qkv.weight"] @ self.norm(x, f"{name}.norm_1") for x in xs]
        out = []
        for query, x in enumerate(xs):
            seen = [key for key in range(len(xs)) if may_see(query, key)]
            mixed = []
            for head in range(heads):
                at = slice(head * d // heads, (head + 1) * d // heads)
                queries, keys = ([each[part * d :][:d][at] for each in qkv] for part in (0, 1))
                if self.config.qk_norm:
                    queries = [self.norm(each, f"{name}.attn.q_norm") for each in queries]
                    keys = [self.norm(each, f"{name}.attn.k_norm") for each in keys]
                scores = [queries[query] @ keys[key] / math.sqrt(d / heads) for key in seen]
                softmax = np.exp(scores) / np.exp(scores).sum()
                mixed.append(sum(p * qkv[key][2 * d :][at] for p, key in zip(softmax, seen, strict=True)))
            y = x + self.weights[f"{name}.attn.proj.weight"] @ np.concatenate(mixed)
            out.append(y + self.mlp(self.norm(y, f"{name}.norm_2"), f"{name}.mlp"))
        return out

    def features(self, image, block, num_tokens, may_see):
        xs = self.tokens(image, [True] * self.config.num_tokens)[:num_tokens]
        for index in range(block + 1):
            xs = self.block(xs, f"trunk.blocks.{index}", may_see, self.config.num_heads)
        return np.stack(xs)

    def head(self, xs, may_see):
        head, w = self.config.head, self.weights
        if not head.is_linear:
            xs = [w["pixel_head.proj_in.weight"] @ x + w["pixel_head.proj_in.bias"] for x in xs]
            xs = [x + self.position(index, head.width) for x, index in zip(xs, self.order, strict=True)]
            for index in range(head.depth):
                name = f"pixel_head.blocks.{index}"
                if head.num_heads:
                    xs = self.block(xs, name, may_see, head.num_heads)
                    continue
                if head.ln_residual:
                    xs = [x + self.norm(x, f"{name}.norm_1") for x in xs]
                xs = [x + self.mlp(self.norm(x, f"{name}.norm_2"), f"{name}.mlp") for x in xs]
            xs = [self.norm(x, "pixel_head.norm") for x in xs]
        return [w["pixel_head.proj_out.weight"] @ x + w["pixel_head.proj_out.bias"] for x in xs]

    def target(self, image, raster_index):
        values = self.patch(image, raster_index).transpose(1, 2, 0).reshape(-1)  # row, column, channel
        if self.config.target == "raw":
            return values
        return (values - values.mean()) / math.sqrt(values.var(ddof=1) + 1e-6)

    def scored(self, image, given):
        """Patch -> (prediction, its mean squared error) for every patch that is not given."""
        masked = self.config.masked is not None
        if not masked:
            given = [position < given for position in range(self.config.num_tokens)]

        def may_see(query, key):
            return masked or given[key] or key <= query

        xs = self.tokens(image, given)
        for index in range(self.config.depth):
            xs = self.block(xs, f"trunk.blocks.{index}", may_see, self.config.num_heads)
        predictions = self.head([self.norm(x, "trunk.post_trunk_norm") for x in xs], may_see)
        out = {}
        for patch in (patch for patch, is_visible in enumerate(given) if not is_visible):
            prediction = predictions[patch if masked else patch - 1]
            out[patch] = prediction, ((prediction - self.target(image, self.order[patch])) ** 2).mean()
        return out


@pytest.mark.parametrize(
    "options",
    [
        *({"patch_order": order} for order in ORDERS),
        {"ln_residual": True, "target": "raw", "channels": 1},
        {"head_rule": "none", "head_width": None, "head_depth": None},
        {"head_kind": "transformer", "patch_order": "outward_spiral"},
        {"head_kind": "transformer", "qk_norm": True},
        {"masked": 0.75, "patch_order": "checkerboard"},
        {"masked": 0.5, "head_kind": "transformer", "head_depth": 1},
    ],
    ids=str,
)
def test_losses_and_predictions_equal_the_reference(options: dict) -> None:
    config = small(**options)
    model = make(config)
    reference = Reference(model)
    images, given = batch(config)
    with torch.no_grad():
        loss_sum, num_targets = model(images, given)
        losses, is_scored = model.per_patch_loss(images, given)
        predictions = model.predict(images, given)
    for index, (image, its) in enumerate(zip(images, given.tolist(), strict=True)):
        scored = reference.scored(image, its)
        assert is_scored[index].sum() == len(scored) == (config.num_masked or config.num_tokens - its)
        assert predictions[index].isnan().all(1).sum() == config.num_tokens - len(scored)
        assert losses[index][is_scored[index] == 0].sum() == 0
        for patch, (prediction, loss) in scored.items():
            assert losses[index, patch].item() == pytest.approx(loss, rel=1e-5)
            np.testing.assert_allclose(predictions[index, patch], prediction, atol=1e-5)
    torch.testing.assert_close(loss_sum, losses.sum())
    assert num_targets == is_scored.sum()


def test_features_equal_the_reference() -> None:
    config = small(patch_order="inward_spiral")
    model = make(config)
    images = batch(config)[0][:2]
    with torch.no_grad():
        features = model.features(images, [1, 0, -1])
    assert features.shape == (3, 2, config.num_tokens, config.width)
    for index, block in enumerate([1, 0, 1]):
        expected = Reference(model).features(images[1], block, 9, lambda query, key: True)
        np.testing.assert_allclose(features[index, 1], expected, atol=1e-5)
    causal = model.features(images, [0, 1], is_causal=True).detach()
    for cut in (1, 4, 9):  # later patches are not there at all
        expected = Reference(model).features(images[1], 1, cut, lambda query, key: key <= query)
        np.testing.assert_allclose(causal[1, 1, :cut], expected, atol=1e-5)


def leaks(model: AIM, image: torch.Tensor, prefix: int) -> list[tuple[int, int]]:
    """(changed patch k, scored patch j <= k whose prediction moved) for one prefix length: empty if nothing leaks."""
    config = model.config
    num_tokens, p = config.num_tokens, config.patch_size
    changed = image.expand(num_tokens, -1, -1, -1).clone()
    for k, raster_index in enumerate(model.preprocessor.order.tolist()):
        row, column = divmod(raster_index, config.grid)
        changed[k, :, row * p : (row + 1) * p, column * p : (column + 1) * p] += 1.0
    with torch.no_grad():
        moved = model.predict(changed, torch.full((num_tokens,), prefix))
        before = model.predict(image[None], torch.tensor([prefix]))
    difference = (moved - before).abs().amax(2)  # (k, j); NaN in the prefix
    return [(k, j) for k in range(num_tokens) for j in range(prefix, k + 1) if not difference[k, j] <= 1e-6]


@pytest.mark.parametrize(
    "options", [*({"patch_order": order} for order in ORDERS), {"head_kind": "transformer"}], ids=str
)
def test_no_target_leaks_for_every_prefix_length(options: dict) -> None:
    config = small(**options)
    model = make(config)
    images, prefix_lens = batch(config)
    for prefix in prefix_lens.tolist():
        assert leaks(model, images[0], prefix) == []


def test_gradients_of_a_masked_model_come_from_masked_patches_alone() -> None:
    config = small(masked=0.75, patch_order="hashed")
    model = make(config)
    images, given = batch(config)
    shown = images.clone().requires_grad_()
    model.predict(shown, given).nan_to_num().sum().backward()
    patches = model.preprocessor.patches(shown.grad).abs().sum(2)
    assert torch.equal(patches > 0, given)  # nothing reads what is hidden
    assert model.state_dict(keep_vars=True)["mask.token"].grad.abs().min() > 0
    with pytest.raises(ValueError, match="bool"):
        model(images, torch.arange(1, 9))


@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
@pytest.mark.parametrize("options", [{"ln_residual": True}, {"masked": 0.5, "head_kind": "transformer"}], ids=str)
def test_other_ways_to_compute_change_neither_loss_nor_gradients(
    way: str, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs as torch.compile takes them, without code for CPUs, which takes a minute; code for GPUs: tests/cuda."""
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="aot_eager"))
    config = small(**options)
    model = make(config)
    images, prefix_len = batch(config)

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        loss, _ = model(images, prefix_len)
        loss.backward()
        return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    plain = step()
    model.set_activation_checkpointing(True) if way == "checkpointed" else model.compile_blocks()
    tolerance = {"rtol": 0, "atol": 0} if way == "checkpointed" else {"rtol": 1e-4, "atol": 1e-5}
    for before, after in zip(plain, step(), strict=True):
        torch.testing.assert_close(after, before, **tolerance)


@pytest.mark.parametrize(
    ("prefix", "new"), [("paired", [3, 0, 0, 3, 0, 0, 1, 0]), ("uniform", [3, 2, 0, 3, 0, 0, 1, 0])]
)
def test_graphs_of_a_sweep_are_few_whatever_the_depth_and_none_breaks(
    prefix: str, new: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block, the last block and a head block have a graph each. Training, validation and probing have graphs of their
    own; another batch size, and from the second step on another number of targets, have none."""
    counter = CompileCounter()  # graphs as dynamo hands them to a compiler, whatever that is
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend=counter))
    torch._dynamo.reset()
    counters.clear()
    config = model_config("w16-d4", image_size=16, patch_size=4, head_width=24, head_depth=3)
    model = make(config)
    model.compile_blocks()
    generator = torch.Generator().manual_seed(3)

    def prefix_lengths(number: int, way: str) -> torch.Tensor:
        drawn = torch.randint(1, config.num_tokens, (number,), generator=generator)
        half = drawn[: number // 2]
        return drawn if way == "uniform" else torch.cat([half, config.num_tokens - half])

    def images(number: int) -> torch.Tensor:
        return torch.randn(number, 3, 16, 16, generator=generator)

    def train() -> None:
        model(images(8), prefix_lengths(8, prefix))[0].backward()

    def validate(number: int) -> None:
        with torch.no_grad():
            model.per_patch_loss(images(number), prefix_lengths(number, "uniform"))

    def probe(number: int) -> None:
        with torch.no_grad():
            model.features(images(number), [-2, -1])

    found = []
    for call in (
        train,
        train,
        train,
        lambda: validate(16),
        lambda: validate(10),
        train,
        lambda: probe(16),
        lambda: probe(7),
    ):
        before = counter.frame_count
        call()
        found.append(counter.frame_count - before)
    assert found == new
    assert not counters["graph_break"]


def test_bfloat16_weights_keep_norm_and_loss_in_float32() -> None:
    config = small()
    model = make(config)
    images, prefix_len = batch(config)
    expected = model(images, prefix_len)[0]
    model.to(torch.bfloat16)
    loss, num_targets = model(images, prefix_len)
    loss.backward()
    assert loss.dtype == num_targets.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())

    norm = model.trunk.blocks[0].norm_1
    x = torch.randn(64, config.width).mul(50).add(100).bfloat16()  # bfloat16 statistics would be off by percents
    exact = torch.nn.functional.layer_norm(
        x.float(), (config.width,), norm.weight.float(), norm.bias.float(), config.norm_eps
    )
    torch.testing.assert_close(norm(x).float(), exact, rtol=2**-7, atol=2**-7)
    with pytest.raises(ValueError, match="float32 pixels"):
        model(images.bfloat16(), prefix_len)


def test_init_depends_on_the_seed_alone() -> None:
    config = small()
    torch.manual_seed(5)
    first = AIM(config)
    torch.manual_seed(6)
    with torch.device("meta"):
        second = AIM(config)
    second.to_empty(device="cpu")
    second.init_weights(0)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    images, prefix_len = batch(config)
    assert torch.equal(first(images, prefix_len)[0], second(images, prefix_len)[0])
    second.init_weights(1)
    assert not torch.equal(first.trunk.blocks[0].attn.qkv.weight, second.trunk.blocks[0].attn.qkv.weight)


def test_query_key_and_value_may_start_as_three_matrices() -> None:
    fused, separate = (
        AIM(model_config("w32-d1", image_size=12, patch_size=4, qkv_init=init)).state_dict()
        for init in ("fused", "separate")
    )
    for name, value in fused.items():
        if name.endswith("attn.qkv.weight"):
            torch.testing.assert_close(separate[name], value * 2**0.5)  # xavier's bounds of (d, d) and (3 d, d)
            assert separate[name].abs().max() <= (6 / 64) ** 0.5
        else:
            assert torch.equal(separate[name], value)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_attention_with_qk_norm_is_that_of_timm(precision: torch.dtype) -> None:
    torch.manual_seed(0)
    theirs = TimmAttention(32, num_heads=4, qkv_bias=False, proj_bias=False, qk_norm=True, norm_layer=nn.LayerNorm)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    ours = Attention(32, 4, scale=8**-0.5, qk_norm_eps=1e-5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 9, 32, dtype=precision)
    found, expected = ours.to(precision)(x, None), theirs.to(precision)(x)
    torch.testing.assert_close(found, expected, **({} if precision == torch.float32 else {"atol": 0.03, "rtol": 0.03}))
