"""AIM: an autoregressive image model as El-Nouby et al. (arXiv 2401.08541) describe it, section 3.

An image is a sequence of N patches in the model's order. Some are visible; the others are predicted and scored.
Autoregressive: the first S patches, the prefix, are visible, 1 <= S <= N - 1. They attend to each other both ways,
later patches attend to those before them, and the token at position k predicts patch k + 1. Masked (the paper's
comparison, section 5.2): patches anywhere are hidden behind a learned mask token, all see each other, and the token at
position k predicts patch k.

`AIM.forward` is the training objective; `per_patch_loss` and `predict` return the same predictions in other
forms; `features` returns the inputs of probes. Parameter names are those of the released models, plus `pixel_head.*`,
which was never released.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from aimscale.aim.config import ModelConfig, ModelConfigError, PatchOrder
from aimscale.aim.layers import (
    MaskToken,
    MatrixScale,
    PixelHead,
    Preprocessor,
    Trunk,
    matrix_scale,
    run_block,
    sincos_positions,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""`precision` of a configuration -> type in which a model computes."""
VARIANCE_EPS = 1e-6
"""Epsilon added to a patch's variance, so that a flat patch has the target 0."""


def patch_order(order: PatchOrder, grid: int) -> tuple[int, ...]:
    """Return the raster indices (row * grid + column) of the `grid` x `grid` patches in sequence order (section 5.2,
    "Autoregression pattern").

    The paper names raster, spiral, checkerboard and a fixed random order without defining them. `outward_spiral` and
    `checkerboard` are those of the authors' trainer; the random one, `hashed`, is ours.

    - `raster`: row by row from the top left;
    - `outward_spiral`: from the centre outwards, the inward one reversed and transposed;
    - `inward_spiral`: clockwise from the top-left corner inwards;
    - `checkerboard`: the "black" cells, those with an even row + column, in raster order, then the "white" ones;
    - `hashed`: one fixed permutation for each grid, the same on every machine and in every run.
    """
    raster = range(grid * grid)
    if order == "raster":
        return tuple(raster)
    if order == "inward_spiral":
        return _inward_spiral(grid)
    if order == "outward_spiral":
        return tuple(index % grid * grid + index // grid for index in reversed(_inward_spiral(grid)))
    if order == "checkerboard":
        return tuple(sorted(raster, key=lambda index: (sum(divmod(index, grid)) % 2, index)))
    # A hash as the sort key, because random generators may change between library versions.
    return tuple(sorted(raster, key=lambda index: hashlib.sha256(f"{grid}/{index}".encode()).digest()))


def _inward_spiral(grid: int) -> tuple[int, ...]:
    rows = [[row * grid + column for column in range(grid)] for row in range(grid)]
    order: list[int] = []
    while rows:
        order += rows.pop(0)
        rows = [list(column) for column in zip(*rows, strict=True)][::-1]  # turn the rest anticlockwise
    return tuple(order)


def in_prefix(prefix_len: Tensor, num_tokens: int) -> Tensor:
    """Return which patches lie in prefixes of these lengths, int64 (B,), as bool (B, N)."""
    return torch.arange(num_tokens, device=prefix_len.device) < prefix_len[:, None]


def prefix_causal_mask(is_visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Build the additive attention mask: every query attends to the whole prefix and to all positions up to its own.

    Args:
        is_visible: bool (B, N), the prefix of each image.

    Returns:
        (B, 1, N, N), indexed by image, head (broadcast), query, key: 0 where the query attends, else minus infinity.
    """
    position = torch.arange(is_visible.shape[1], device=is_visible.device)
    sees = ((position <= position[:, None]) | is_visible[:, None, :])[:, None]
    return torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, -torch.inf)


def patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and standard deviation, sqrt(unbiased variance + eps), of each patch (..., o), both (..., 1)."""
    mean = patches.mean(dim=-1, keepdim=True)
    # torch.var_mean takes ten times as long on a CPU (256 patches of 192 values: 0.32 against 0.03 ms)
    variance = (patches - mean).square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return mean, (variance + VARIANCE_EPS).sqrt()


def normalise_patches(patches: Tensor) -> Tensor:
    """Standardise each patch (..., o) by its own mean and standard deviation."""
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


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
        self.num_tokens = config.num_tokens
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

        Matrices decay; biases and norms do not. In the standard parametrisation every `lr_scale` is 1 (`aim.layers`).
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
        by_patch = losses.new_zeros(2, len(images) * self.num_tokens)
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
        mask = prefix_causal_mask(in_prefix(first, self.num_tokens), x.dtype) if is_causal else None
        for index in range(max(wanted) + 1):
            x = run_block(self.trunk.blocks[index], x, mask, recompute=self.trunk.recompute)
            if index in wanted:
                outputs[index] = x
        return torch.stack([outputs[index] for index in wanted])

    def _scale_of(self, name: str, shape: torch.Size) -> MatrixScale:
        parts = 3 if name.endswith("attn.qkv") and self.config.qkv_init == "separate" else 1
        return matrix_scale(self.config, name, fan_in=shape[1:].numel(), fan_out=shape[0] // parts)

    def _visible_patches(self, prefix_lengths: Tensor) -> Tensor:
        """Return which patches are visible, bool (B, N), on the device of `prefix_lengths`."""
        num_tokens = self.num_tokens
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
