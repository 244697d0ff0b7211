"""Fake tensors and ranks: everything private of torch and DeepSpeed that a rehearsal uses.

Fake tensors have a shape, a precision and a storage, but no values; a fake process group answers every collective at
once. Both are torch's own, for its tests and compilers.
"""

from __future__ import annotations

import contextlib
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import aimscale.aim.layers
from aimscale.aim.errors import UserError
from aimscale.harness.data.images import _moments
from aimscale.harness.distributed.group import Group, Placement, import_deepspeed, stop_group

try:  # private, and all of it that is used
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError as error:
    raise UserError(f"torch {torch.__version__} lacks what a rehearsal needs ({error}); install 2.13") from error


@contextlib.contextmanager
def fake_rank(rank: int, world_size: int, *, on_gpu: bool) -> Iterator[Group]:
    """Be a rank of `world_size` during the block, in which new tensors are fake.

    Args:
        on_gpu: whether attention keeps what a GPU's fused kernel does, or what a CPU does.
    """
    placement = Placement(rank=rank, world_size=world_size, local_rank=0, address="127.0.0.1", port=1)
    names = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu"}
    names |= {"MASTER_ADDR": placement.address, "MASTER_PORT": str(placement.port)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, names))
        stack.enter_context(warnings.catch_warnings(action="ignore", category=UserWarning))  # of fake addresses
        import_deepspeed()
        from deepspeed.accelerator import get_accelerator
        from deepspeed.runtime.zero import partition_parameters, stage3

        # It decides by the memory that is free where parameters are made contiguous: on the host, if it is little.
        stack.enter_context(patch.object(get_accelerator(), "available_memory", lambda device_index=None: 2**60))
        stack.enter_context(patch.object(nn.Module, "_apply", _apply))
        stack.enter_context(patch.object(nn.functional, "linear", nn.functional.linear))  # ZeRO 3 leaves its own there
        stack.enter_context(patch.object(stage3, "reduce_scatter_coalesced", _reduce_scatter))
        stack.enter_context(patch.object(partition_parameters.AllGatherCoalescedHandle, "wait", _take_gathered))
        stack.enter_context(patch.object(Tensor, "narrow", _narrow(Tensor.narrow, world_size)))
        if on_gpu:
            stack.enter_context(patch.object(aimscale.aim.layers, "keeps_scores", lambda heads: False))
        torch.distributed.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        stack.callback(stop_group)
        _moments.cache_clear()  # what it keeps is made in the mode in which it is first asked for
        stack.callback(_moments.cache_clear)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_HostValues())
        yield Group(placement, torch.device("cpu"), None)


class _HostValues(TorchDispatchMode):
    """Mode in which integers made from real ones stay real, since prefix lengths decide shapes, and in which a look at
    a fake value finds 0 or 1: no gradient overflows, and every norm is finite."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(tensors[0], FakeTensor):
            return 1.0 if tensors[0].dtype.is_floating_point else tensors[0].dtype is not torch.bool and 0
        is_whole = not (kwargs.get("dtype") or torch.int64).is_floating_point
        is_host = is_whole and (tensors or func is torch.ops.aten.arange.default)
        if is_host and not any(isinstance(each, FakeTensor) or each.is_floating_point() for each in tensors):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        return func(*args, **kwargs)


def _apply(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Convert a module's tensors as `nn.Module._apply` does; torch's own swaps parameters, which fake ones refuse."""
    for part in module.modules() if recurse else (module,):
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            new = fn(parameter.detach())
            if (new.dtype, new.device) != (parameter.dtype, parameter.device):
                part._parameters[name] = nn.Parameter(new, parameter.requires_grad)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else fn(buffer)
    return module


def _narrow(narrow: Callable[..., Tensor], world_size: int) -> Callable[..., Tensor]:
    """Make the shares of all ranks in a message one view, since DeepSpeed asks for each at every message."""
    last: list[Any] = [None, None]  # weak references to a message and to a view of it

    def shared(tensor: Tensor, dim: int, start: int, length: int) -> Tensor:
        if tensor.dim() != 1 or length * world_size != tensor.numel() or torch.is_grad_enabled():
            return narrow(tensor, dim, start, length)
        message, view = (each and each() for each in last)
        if message is not tensor or view is None:
            view = narrow(tensor, dim, start, length)
            last[:] = weakref.ref(tensor), weakref.ref(view)
        return view

    return shared


def _take_gathered(handle: Any, handle_dependency: bool = True) -> None:
    """Give parameters their gathered values, as DeepSpeed's `AllGatherCoalescedHandle.wait` does."""
    handle.allgather_handle.wait()
    for parameter in () if handle.complete else handle.params:
        gathered = handle.partitions[0].new_empty(parameter.ds_numel)
        parameter.data = gathered.view(parameter.ds_shape).to(parameter.ds_tensor.dtype)
        parameter.ds_status = type(parameter.ds_status).AVAILABLE
    handle.complete = True


def _reduce_scatter(tensors: list[Tensor], group: Any) -> list[Tensor]:
    """Send what DeepSpeed's `reduce_scatter_coalesced` does, without a view for each rank, which is slow."""
    world_size = torch.distributed.get_world_size(group)
    sizes = [-(-each.numel() // world_size) for each in tensors]
    is_even = len(tensors) == 1 and tensors[0].numel() % world_size == 0
    flat = tensors[0].view(-1) if is_even else tensors[0].new_empty(world_size * sum(sizes))
    shard = flat.narrow(0, 0, sum(sizes))
    torch.distributed.reduce_scatter_tensor(shard, flat, group=group)
    return list(shard.split(sizes))
