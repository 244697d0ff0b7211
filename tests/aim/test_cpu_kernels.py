"""The CPU's faster linear layer and attention equal PyTorch's own, forwards and backwards, and step aside elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aimscale.aim import cpu_kernels
from aimscale.aim.config import model_config
from aimscale.aim.cpu_kernels import Choice, Linear, attend, float32_matmul
from aimscale.aim.model import AIM
from aimscale.aim.objective import prefix_causal_mask


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Use oneDNN whatever the processor; the shapes of its products."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no such operator")
    seen: list[tuple[int, ...]] = []
    multiply = cpu_kernels._multiply

    def noted(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((*left.shape, len(right)))
        return multiply(left, right, bias)

    monkeypatch.setattr(cpu_kernels, "choice", lambda: Choice(products=True, weight_gradients=True))
    monkeypatch.setattr(cpu_kernels, "_multiply", noted)
    return seen


def gradients(layer: nn.Linear, x: Tensor, probe: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and of every parameter that has one."""
    x = x.detach().requires_grad_(x.requires_grad)
    wanted = [each for each in (x, *layer.parameters()) if each.requires_grad]
    out = layer(x)
    return [out.detach(), *torch.autograd.grad(out, wanted, probe)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("x_learns", "weight_learns"), [(True, True), (False, True), (True, False)])
def test_linear_equals_pytorchs(calls: list, bias: bool, x_learns: bool, weight_learns: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 192, bias=bias)
    plain.weight.requires_grad_(weight_learns)
    ours = Linear(96, 192, bias=bias)
    ours.load_state_dict(plain.state_dict())
    ours.weight.requires_grad_(weight_learns)
    x = torch.randn(6, 40, 96).transpose(0, 1)  # not contiguous
    x.requires_grad_(x_learns)
    probe = torch.randn(40, 6, 192)
    for got, expected in zip(gradients(ours, x, probe), gradients(plain, x, probe), strict=True):
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    assert calls == [(240, 96, 192)] + [(192, 240, 96)] * weight_learns + [(240, 192, 96)] * x_learns


def test_the_same_product_has_the_same_bits(calls: list) -> None:
    layer, x, probe = Linear(96, 192), torch.randn(256, 96, requires_grad=True), torch.randn(256, 192)
    first, second = gradients(layer, x, probe), gradients(layer, x, probe)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    assert len(calls) == 6


def test_other_inputs_take_pytorchs_way(calls: list) -> None:
    layer = Linear(96, 192)
    x = torch.randn(512, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        layer(x)
    layer(x[:2])
    assert Linear(96, 192, dtype=torch.float64)(x.double()).dtype == torch.float64
    assert Linear(96, 192, device="meta")(x.to("meta")).is_meta
    assert not calls
    layer(x)
    assert len(calls) == 1


def test_matmul_by_either_library() -> None:
    left, right = torch.randn(64, 48), torch.randn(48, 80)
    torch.testing.assert_close(float32_matmul(left, right), left @ right, rtol=1e-5, atol=1e-5)


def test_both_libraries_are_measured_once_and_every_process_takes_what_was_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another choice in a rank, or after a restart, would end a run with other bits."""
    monkeypatch.setenv("AIMSCALE_CACHE", str(tmp_path))
    found = iter([Choice(products=True, weight_gradients=False), Choice(products=False, weight_gradients=True)])
    monkeypatch.setattr(cpu_kernels, "_measure", lambda: next(found))
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no such operator")
    monkeypatch.setattr(cpu_kernels, "_choice", cpu_kernels._choice.__wrapped__)  # a process that knows nothing yet
    assert [cpu_kernels.choice() for _ in range(2)] == [Choice(products=True, weight_gradients=False)] * 2
    (file,) = tmp_path.iterdir()
    file.write_text("damaged")
    assert cpu_kernels.choice() == Choice(products=False, weight_gradients=True)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_as_exact_as_the_fused_kernel(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    shape, scale = (3, 2, 16, 8), 8**-0.5
    parts = [torch.randn(shape).to(dtype) for _ in range(3)]
    mask = None
    if masked:
        attended = prefix_causal_mask(torch.tensor([1, 5, 15]), 16)
        mask = torch.zeros(attended.shape, dtype=dtype).masked_fill_(~attended, -torch.inf)
    probe = torch.randn(shape).to(dtype)

    def outcome(function: object, wide: bool) -> list[Tensor]:
        leaves = [(part.double() if wide else part).detach().requires_grad_() for part in parts]
        added = mask.double() if wide and mask is not None else mask
        out = function(*leaves, added)  # type: ignore[operator]
        return [out, *torch.autograd.grad(out, leaves, probe.to(out.dtype))]

    def fused(q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=scale)

    exact = outcome(fused, wide=True)
    theirs = outcome(fused, wide=False)
    ours = outcome(lambda q, k, v, added: attend(q, k, v, added, scale), wide=False)
    unit = 2e-6 if dtype == torch.float32 else 2e-2
    for got, usual, truth in zip(ours, theirs, exact, strict=True):
        error, usual_error = ((each.double() - truth).abs().max().item() for each in (got, usual))
        assert error < 2 * usual_error + unit


def test_long_sequences_take_the_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [torch.randn(1, 1, 129, 4) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*parts, scale=0.5)
    monkeypatch.setattr(torch, "bmm", None)
    assert torch.equal(attend(*parts, None, 0.5), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_model_has_the_same_loss_and_gradients(
    calls: list, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, tolerance: float
) -> None:
    monkeypatch.setattr(cpu_kernels, "MIN_LINEAR_FLOPS", 0)
    model = AIM(model_config("w32-d2", image_size=16, patch_size=4)).to(dtype)
    images, prefix_len = torch.randn(4, 3, 16, 16), torch.tensor([1, 5, 11, 15])

    def outcome() -> tuple[float, Tensor]:
        loss_sum, _ = model(images, prefix_len)
        found = torch.autograd.grad(loss_sum, list(model.parameters()))
        return loss_sum.item(), torch.cat([each.flatten().float() for each in found])

    loss, gradient = outcome()
    assert bool(calls) == (dtype == torch.float32)
    monkeypatch.setattr(cpu_kernels, "MAX_DENSE_TOKENS", {})
    with torch.backends.mkldnn.flags(enabled=dtype == torch.bfloat16):
        plain_loss, plain_gradient = outcome()
    assert loss == pytest.approx(plain_loss, rel=tolerance)
    assert (gradient - plain_gradient).norm() < tolerance * plain_gradient.norm()
