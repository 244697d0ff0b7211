"""What runs on a GPU, run without one: tensors that say they are there and compute on the CPU.

A mix of devices raises, as there, and what would wait for the GPU is noted. What a GPU alone computes otherwise
(kernels, streams, compiled graphs, DeepSpeed) is left to `tests/cuda`.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from aimscale.aim.config import model_config
from aimscale.aim.model import AIM
from aimscale.harness.bench.train import random_batches
from aimscale.harness.data.images import _moments
from aimscale.harness.data.stream.stream import Batch
from aimscale.harness.device.execution import EngineOptions
from aimscale.harness.distributed.group import ALONE, Group, find_placement
from aimscale.harness.run.config import OptimiserSection
from aimscale.harness.step.engine import make_optimiser

GPU = torch.device("cuda", 0)
CONFIG = model_config("w64-d2", image_size=32, patch_size=4)
WAITS: Counter[str] = Counter()
"""Operations that wait for the GPU, since it was cleared."""
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
"""The host needs what they give."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""They take indices on either device; those of the CPU, and a mask, are waited for."""
FROM_EVERYWHERE = {"aten::copy_", "aten::_to_copy", "aten::lift_fresh"}
"""They take tensors of two devices."""


class OnGpu(Tensor):
    """Says that it is on the GPU; `values` are on the CPU."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        made = Tensor._make_wrapper_subclass(
            cls, values.size(), strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype
        )
        made.values = values
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__:
            return GPU
        if func == Tensor.is_cuda.__get__:
            return True
        if func in (Tensor.numpy, Tensor.__array__):
            raise AssertionError("numpy reads no memory of a GPU")
        if func == Tensor.tolist:
            return moved(args[0], "cpu").tolist()
        if func in (Tensor.to, Tensor.cpu):
            return moved(*args, **(kwargs if func == Tensor.to else {"device": "cpu"}))
        return torch._C._disabled_torch_function_impl(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def moved(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to`, of or after a tensor on the GPU."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype)
    if not isinstance(tensor, OnGpu):
        return tensor.to(*args, **kwargs)
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **{k: v for k, v in kwargs.items() if k != "copy"})
    if device is not None and device.type == "cpu":
        if not non_blocking:
            WAITS["to the host"] += 1
        return tensor.detach().values.to(dtype or tensor.dtype, copy=True)
    if dtype in (None, tensor.dtype):
        return tensor.clone() if kwargs.get("copy") else tensor
    with torch._C.DisableTorchFunctionSubclass():
        return torch.ops.aten._to_copy.default(tensor, dtype=dtype)


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operation on tensors of which some are on the GPU, or that is to give one there."""
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    on_gpu = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    hosts = [tensor for tensor in tensors if not isinstance(tensor, OnGpu) and tensor.dim()]
    indices = [each for each in args[1] if each is not None] if name in INDEXING else []
    if on_gpu and hosts and not indices and name not in FROM_EVERYWHERE:
        raise AssertionError(f"{name} of tensors on two devices")
    if on_gpu and (name in WAITING or any(each.dtype == torch.bool or not isinstance(each, OnGpu) for each in indices)):
        WAITS[name] += 1
    moves_in = hosts and (is_there(kwargs.get("device")) or (name == "aten::copy_" and on_gpu))
    is_prompt = kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
    if moves_in and not (is_prompt and all(each.is_pinned() for each in hosts)):
        WAITS["from the host"] += 1
    is_result_there = is_there(kwargs.get("device")) or bool(on_gpu)
    inner = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if "device" in inner:
        inner["device"] = torch.device("cpu")
    known = {id(gpu.values): gpu for gpu in on_gpu}
    bare_args, bare_kwargs = tree_map(lambda leaf: getattr(leaf, "values", leaf) if isinstance(leaf, OnGpu) else leaf,
                                      (args, inner))  # fmt: skip
    result = func(*bare_args, **bare_kwargs)
    if name == "aten::copy_" and not isinstance(args[0], OnGpu):
        return result
    return tree_map(lambda leaf: there(leaf, known) if is_result_there else leaf, result)


def is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def there(leaf: Any, known: dict[int, OnGpu]) -> Any:
    if not isinstance(leaf, Tensor) or isinstance(leaf, OnGpu):
        return leaf
    return known.get(id(leaf)) if id(leaf) in known else OnGpu(leaf)


class Gpu(TorchDispatchMode):
    """Makes tensors on the GPU where that is asked for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        touches = any(isinstance(leaf, OnGpu) for leaf in tree_leaves((args, kwargs)))
        return computed(func, args, kwargs) if touches or is_there(kwargs.get("device")) else func(*args, **kwargs)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    """The group of one rank on a GPU that is not there."""

    def on_the_host_first(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            values = data if isinstance(data, OnGpu) else make(data, *args, **kwargs)
            return values if device is None else values.to(device)

        return made

    def pinned(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        copy._pinned = True  # type: ignore[attr-defined]
        return copy

    for name, value in {
        "_lazy_init": lambda: None,
        "get_device_properties": lambda device: types.SimpleNamespace(total_memory=80 << 30),
        "max_memory_allocated": lambda device: 0,
        "reset_peak_memory_stats": lambda device: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "tensor", on_the_host_first(torch.tensor))
    monkeypatch.setattr(torch, "as_tensor", on_the_host_first(torch.as_tensor))
    monkeypatch.setattr(Tensor, "pin_memory", pinned)
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: hasattr(tensor, "_pinned"))
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _moments.cache_clear()
    WAITS.clear()
    with Gpu():
        yield Group(find_placement({}), GPU, None)
    _moments.cache_clear()
    torch.__future__.set_overwrite_module_params_on_conversion(False)


def test_a_mix_of_devices_and_a_wait_are_seen(gpu: Group) -> None:
    there = torch.ones(3, device=GPU)
    assert (there.device, there.is_cuda, (2 * there).device) == (GPU, True, GPU)
    with pytest.raises(AssertionError, match="two devices"):
        there + torch.ones(3)
    assert not WAITS
    assert there.sum().item() == 3
    assert there[there > 0].cpu().tolist() == [1, 1, 1]
    torch.ones(3).to(GPU, non_blocking=True)
    assert set(WAITS) == {"aten::_local_scalar_dense", "aten::index", "to the host", "from the host"}
    WAITS.clear()
    torch.ones(3).pin_memory().to(GPU, non_blocking=True)
    assert not WAITS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_forward_and_a_backward_pass_stay_on_the_gpu_and_wait_for_nothing(gpu: Group, dtype: torch.dtype) -> None:
    (batch,) = random_batches(CONFIG, 8, 8)
    expected, _ = AIM(CONFIG).to(dtype)(batch.images_on("cpu"), batch.prefix_lengths)
    model, batch = AIM(CONFIG).to(GPU, dtype), batch.on(GPU)
    WAITS.clear()
    loss_sum, _ = model(batch.images_on(GPU), batch.prefix_lengths)
    loss_sum.backward()
    assert not WAITS
    assert loss_sum.item() == pytest.approx(expected.item(), rel=1e-6 if dtype == torch.float32 else 1e-3)
    assert all(isinstance(parameter.grad, OnGpu) for parameter in model.parameters())


def test_a_step_waits_for_its_norm_alone(gpu: Group) -> None:
    model = AIM(CONFIG).to(GPU)
    adamw = make_optimiser(model, OptimiserSection(batch_size=8, precision="fp32"), EngineOptions(zero_stage=0))
    (batch,) = random_batches(CONFIG, 8, 8)
    model(batch.images_on(GPU), batch.prefix_lengths)[0].backward()
    WAITS.clear()
    adamw.step()
    assert dict(WAITS) == {"aten::_local_scalar_dense": 1}


def test_images_of_the_loader_reach_the_gpu_without_a_wait(gpu: Group) -> None:
    images = random_batches(CONFIG, 8, 8)[0].images
    batch = Batch(images=images.pin_memory(), prefix_lengths=torch.ones(8), positions=torch.arange(8))
    found = batch.images_on(GPU)
    assert not WAITS
    assert isinstance(found, OnGpu)
    assert torch.equal(found.values, images)


def test_an_evaluation_has_the_cpus_numbers(evaluations: Callable[..., list[list[float]]], gpu: Group) -> None:
    """Validation and every kind of probe, tokens kept and computed again."""
    expected, *found = evaluations([(ALONE, 0.1), (gpu, 0.1), (gpu, 0.0)], num_images=48, epochs=1)
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-6)
