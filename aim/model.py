"""AIM: an autoregressive image model as El-Nouby et al. (arXiv 2401.08541) describe it, section 3.

`AIM.forward` is the training objective; `per_patch_loss`, `predict` and `complete` return the same predictions in other
forms; `features` returns the inputs of probes. Parameter names are those of the released models, plus `pixel_head.*`,
which was never released.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from aimscale.aim.config import ModelConfig, ModelConfigError
from aimscale.aim.layers import Block, HeadBlock, MaskToken, Patchifier, sincos_positions
from aimscale.aim.mup import MatrixScale, matrix_scale
from aimscale.aim.objective import in_prefix, normalise_patches, patchify, prefix_causal_mask
from aimscale.aim.orders import patch_order

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""`precision` of a configuration -> type in which a model computes."""


class Preprocessor(nn.Module):
    """Embedding of images (B, C, H, W) to tokens (B, N, d) in sequence order, with fixed positions."""

    order: Tensor
    positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patchifier = Patchifier(config.channels, config.patch_size, config.width, config.norm_eps)
        self.register_buffer("order", torch.empty(config.num_tokens, dtype=torch.int64), persistent=False)
        self.register_buffer("positions", torch.empty(config.num_tokens, config.width), persistent=False)

    def patches(self, images: Tensor) -> Tensor:
        """Cut images into patches (B, N, o) in sequence order, in their own precision."""
        raster = patchify(images, self.config.patch_size)
        return raster if self.config.patch_order == "raster" else raster.index_select(1, self.order)

    def embed(self, patches: Tensor, hide: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Embed patches (B, N, o) in sequence order; `hide` may replace some tokens before positions are added."""
        tokens: Tensor = self.patchifier(patches)
        return (hide(tokens) if hide else tokens) + self.positions

    def forward(self, images: Tensor) -> Tensor:
        """Embed the patches of images."""
        return self.embed(self.patches(images))


class Trunk(nn.Module):
    """The transformer and its last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.post_trunk_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.recompute = False

    def forward(self, x: Tensor, mask: Tensor | None, token_indices: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, d) to normed tokens (B, N, d), or with flat indices `token_indices` (M,) to those alone,
        (M, d).

        `mask` is added to the attention scores; None lets every token attend to all.
        """
        out: Tensor = self.post_trunk_norm(_run_all(self.blocks, x, mask, token_indices, recompute=self.recompute))
        return out


class PixelHead(nn.Module):
    """Head that predicts the pixels of patches, token by token or by transformer blocks over all tokens."""

    positions: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        head = config.head
        self.proj_in = None if head.is_linear else nn.Linear(config.width, head.width)
        self.blocks = nn.ModuleList(
            Block(config, in_head=True) if head.num_heads else HeadBlock(config) for _ in range(head.depth)
        )
        self.norm = None if head.is_linear else nn.LayerNorm(head.width, eps=config.norm_eps)
        self.proj_out = nn.Linear(head.width, config.patch_dim)
        self.register_buffer("positions", torch.empty(config.num_tokens, head.width), persistent=False)
        self.recompute = False

    def forward(self, x: Tensor, token_indices: Tensor, mask: Tensor | None) -> Tensor:
        """Predict patches (M, o) at flat indices `token_indices` (M,) from their tokens (M, d) alone.

        A transformer head takes all tokens (B, N, d) and the trunk's `mask`.
        """
        if self.proj_in is not None and self.norm is not None:
            x = self.proj_in(x)
            if self.config.head.num_heads:
                x = _run_all(self.blocks, x + self.positions, mask, token_indices, recompute=self.recompute)
            else:
                x = x + self.positions[token_indices % self.config.num_tokens]
                for block in self.blocks:
                    x = _run(block, x, recompute=self.recompute)
            x = self.norm(x)
        out: Tensor = self.proj_out(x)
        return out


class AIM(nn.Module):
    """Autoregressive image model.

    Images are float32 (B, C, H, W), already normalised by the data's mean and standard deviation. `prefix_lengths` are
    int64 (B,), in 1..N-1; a masked model takes its visible patches in their place, bool (B, N). Kept on the CPU, they
    cost no device synchronisation. Weights may be bfloat16; the loss is computed in float32.

    `AIM(config)` starts from `init_weights(0)`; built under `torch.device("meta")`, it has no values until `to_empty`
    and `init_weights`, or `aim.weights`, give it some.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.preprocessor = Preprocessor(config)
        self.trunk = Trunk(config)
        self.pixel_head = PixelHead(config)
        self.mask = None if config.masked is None else MaskToken(config.width)
        self.shapes = {name: parameter.shape for name, parameter in self.named_parameters()}
        if not self.preprocessor.order.is_meta:
            self.init_weights(0)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Set every weight to its `initial_value` and fill in the constants; parts on the meta device stay there."""
        for name, parameter in self.named_parameters():
            if not parameter.is_meta:
                parameter.copy_(self.initial_value(name, seed))
        self.fill_constants()

    def initial_value(self, name: str, seed: int) -> Tensor:
        """Draw one parameter, float32 on the CPU: matrices (the patch convolution counts as one) are Xavier-uniform,
        biases 0, norms 1.

        Each parameter has its own generator, seeded by its name, so that values depend on `seed` alone: not on the
        device, the world size or the model's other parts. The shape comes from `self.shapes`, wherever the values are
        now.
        """
        shape = self.shapes[name]
        if len(shape) < 2:
            return torch.ones(shape) if name.endswith(".weight") else torch.zeros(shape)
        module = name.removesuffix(".weight")
        bound = self._scale_of(module, shape).init_bound
        return torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator_for(seed, module))

    def param_groups(self, weight_decay: float, *, backbone_apart: bool = False) -> list[dict[str, Any]]:
        """Return parameter groups for an optimiser: `params`, `weight_decay`, `lr_scale`, a factor on every step's
        learning rate, and `is_backbone`, which is known if these are kept apart from the head.

        Matrices decay; biases and norms do not. In the standard parametrisation every `lr_scale` is 1; see `aim.mup`.
        """
        groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.named_parameters():
            shape, is_backbone = self.shapes[name], backbone_apart and name.startswith(("preprocessor.", "trunk."))
            if len(shape) < 2:
                key = (0.0, 1.0, is_backbone)
            else:
                lr_scale = self._scale_of(name.removesuffix(".weight"), shape).lr_scale
                key = (weight_decay / lr_scale, lr_scale, is_backbone)
            groups.setdefault(key, []).append(parameter)
        names = ("weight_decay", "lr_scale", "is_backbone")
        return [{"params": params, **dict(zip(names, key, strict=True))} for key, params in groups.items()]

    @torch.no_grad()
    def fill_constants(self) -> None:
        """Compute the fixed positions and the order, which no state dict holds; needed after `to_empty`."""
        config, order = self.config, torch.tensor(patch_order(self.config.patch_order, self.config.grid))
        self.preprocessor.order.copy_(order)
        self.preprocessor.positions.copy_(sincos_positions(config.grid, config.width)[order])
        self.pixel_head.positions.copy_(sincos_positions(config.grid, config.head.width)[order])

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Recompute the activations of every block in the backward pass instead of storing them; losses stay equal."""
        self.trunk.recompute = enabled
        self.pixel_head.recompute = enabled

    def compile_blocks(self) -> None:
        """Run torch.compile on each block, in place; blocks of a kind share their graphs."""
        for block in (*self.trunk.blocks, *self.pixel_head.blocks):
            block.compile()

    def forward(self, images: Tensor, prefix_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss of a batch as a sum and a count, so that any split of a batch adds up exactly.

        Returns:
            loss_sum: float32 scalar, the sum over scored targets of each target's mean squared error.
            num_targets: float32 scalar, how many targets were scored: the patches that are not visible.
        """
        losses, _ = self._scored_losses(images, prefix_lengths)
        return losses.sum(), losses.new_full((), losses.numel())

    def per_patch_loss(self, images: Tensor, prefix_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss patch by patch, in sequence order: float32 (B, N) losses, 0 where a patch is not scored, and
        float32 (B, N), 1 where it is scored and 0 where it is visible."""
        losses, targets = self._scored_losses(images, prefix_lengths)
        by_patch = losses.new_zeros(2, len(images) * self.config.num_tokens)
        by_patch[:, targets] = torch.stack([losses, torch.ones_like(losses)])
        losses, is_scored = by_patch.view(2, len(images), -1)
        return losses, is_scored

    def predict(self, images: Tensor, prefix_lengths: Tensor) -> Tensor:
        """Predict patches, float32 (B, N, o) in sequence order, in the scale of the targets.

        Entry j is the prediction of patch j, made at position j - 1, or at j by a masked model. Visible patches, which
        are never scored, are NaN.
        """
        is_visible = self._visible_patches(prefix_lengths).to(images.device)
        everything = torch.arange(is_visible.numel(), device=images.device)
        out = self._predicted(self.preprocessor.patches(images), is_visible, everything).unflatten(0, is_visible.shape)
        return (out.roll(1, dims=1) if self.mask is None else out).masked_fill(is_visible[:, :, None], torch.nan)

    def features(self, images: Tensor, blocks: Sequence[int], *, is_causal: bool = False) -> Tensor:
        """Return the raw outputs of some blocks (0-based; negative numbers count from the last), (len(blocks), B, N,
        d).

        As in the released models, attention is bidirectional, unless `is_causal`, and the last norm is not applied.
        Tokens are in sequence order.

        Raises:
            ModelConfigError: a block that the model does not have.
        """
        depth = self.config.depth
        for block in blocks:
            if not -depth <= block < depth:
                raise ModelConfigError(f"{self.config.name} has no block {block}; its blocks are 0 to {depth - 1}")
        wanted = [block % depth for block in blocks]
        outputs: dict[int, Tensor] = {}
        x = self.preprocessor(images)
        first = torch.ones(1, dtype=torch.int64, device=x.device)  # a prefix of one patch
        mask = prefix_causal_mask(in_prefix(first, self.config.num_tokens), x.dtype) if is_causal else None
        for index in range(max(wanted) + 1):
            x = _run(self.trunk.blocks[index], x, mask, recompute=self.trunk.recompute)
            if index in wanted:
                outputs[index] = x
        return torch.stack([outputs[index] for index in wanted])

    def _scale_of(self, name: str, shape: torch.Size) -> MatrixScale:
        parts = 3 if name.endswith("attn.qkv") and self.config.qkv_init == "separate" else 1
        return matrix_scale(self.config, name, fan_in=shape[1:].numel(), fan_out=shape[0] // parts)

    def _visible_patches(self, prefix_lengths: Tensor) -> Tensor:
        """Return which patches are visible, bool (B, N), on the device of `prefix_lengths`."""
        num_tokens = self.config.num_tokens
        if self.mask is not None:
            if prefix_lengths.dtype != torch.bool or prefix_lengths.shape[1:] != (num_tokens,):
                raise ValueError(
                    f"a masked model is given bool (B, {num_tokens}), not {prefix_lengths.dtype} {prefix_lengths.shape}"
                )
            return prefix_lengths
        # On a GPU, the check would wait for the device.
        if not prefix_lengths.is_cuda and ((prefix_lengths < 1) | (prefix_lengths >= num_tokens)).any():
            raise ValueError(f"prefix lengths run from 1 to {num_tokens - 1}")
        return in_prefix(prefix_lengths, num_tokens)

    def _predicted(self, patches: Tensor, is_visible: Tensor, token_indices: Tensor) -> Tensor:
        """Predict patches, float32 (M, o), at flat indices `token_indices`, b * N + k, from patches (B, N, o)."""
        tokens = self.preprocessor.embed(patches, self.mask and functools.partial(self.mask, is_visible=is_visible))
        mask = None if self.mask else prefix_causal_mask(is_visible, tokens.dtype)
        tokens = self.trunk(tokens, mask, None if self.config.head.num_heads else token_indices)
        return self.pixel_head(tokens, token_indices, mask).float()

    def _scored_losses(self, images: Tensor, prefix_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the mean squared error of every scored target, float32 (M,), and the flat index b * N + j of its
        patch.

        An MLP head works token by token, so it sees scored tokens alone: the same loss for about half of its work.
        """
        if images.dtype != torch.float32:
            raise ValueError(f"targets are computed from float32 pixels, not {images.dtype}")
        is_visible = self._visible_patches(prefix_lengths)
        scored = copy_to((~is_visible).flatten().nonzero().squeeze(1), images.device)
        patches = self.preprocessor.patches(images)
        predicted_from = scored - 1 if self.mask is None else scored
        predicted = self._predicted(patches, copy_to(is_visible, images.device), predicted_from)
        targets = patches.flatten(0, 1).index_select(0, scored)
        if self.config.target == "normalised":
            targets = normalise_patches(targets)
        return (predicted - targets).square().mean(dim=1), scored


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for the work queued there.

    CUDA finishes its queue before it copies from memory that is not page-locked (CUDA Driver API, "API synchronization
    behavior"), whatever `non_blocking` says.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def generator_for(seed: int, name: str) -> torch.Generator:
    """Make a CPU generator whose state depends on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _run_all(
    blocks: nn.ModuleList, x: Tensor, mask: Tensor | None, token_indices: Tensor | None, *, recompute: bool
) -> Tensor:
    """Run transformer blocks, (B, N, d) to (B, N, d), or with flat indices `token_indices` (M,) to (M, d)."""
    *first, last = blocks
    for block in first:
        x = _run(block, x, mask, recompute=recompute)
    return _run(last, x, mask, token_indices, recompute=recompute)


def _run(module: Callable[..., Tensor], *args: Tensor | None, recompute: bool) -> Tensor:
    """Call a block, storing its activations or, with `recompute`, only its input."""
    if recompute and torch.is_grad_enabled():
        out: Tensor = checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
        return out
    return module(*args)
