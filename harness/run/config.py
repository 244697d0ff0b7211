"""The configuration of one run, in three parts: training, evaluation (`harness.run.evaluation`) and runtime.

`run_id` names what was trained (`harness.run.section`): measuring more, or moving to other hardware, leaves it as it
is. Torch is not imported here.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from aimscale.aim.config import (
    HeadKind,
    HeadRule,
    ModelConfig,
    Parametrisation,
    PatchOrder,
    QkvInit,
    Target,
    model_config,
)
from aimscale.harness.run.evaluation import EvaluationConfig
from aimscale.harness.run.evaluation import ProbeSection as ProbeSection
from aimscale.harness.run.evaluation import ValidationSection as ValidationSection
from aimscale.harness.run.init import InitSection
from aimscale.harness.run.section import ConfigError as ConfigError
from aimscale.harness.run.section import Section, parse, read_yaml, refuse_unknown, training_digest


class ModelSection(Section):
    """The model to train; `aim.config.model_config` turns this into the model's own configuration."""

    size: str
    """Named size: `aim-600M`, `aim-1B`, `aim-3B`, `aim-7B`, a rung `rung-<width>`, or `w<width>-d<depth>`, with
    `-h<heads>` for another number of attention heads than the ladder's."""
    image_size: int = Field(224, gt=0)
    """Side of the square input, pixels."""
    patch_size: int = Field(14, gt=0)
    """Side of a square patch, pixels; must divide `image_size`."""
    channels: int = Field(3, gt=0)
    """Colour channels of the input."""
    head_rule: HeadRule = "proportional"
    """Rule by which the pixel head follows the backbone: `released`, 12 blocks of width 2048; `proportional`,
    aim-600M's share of the backbone (width 4/3 d, half of the blocks); `none`, one linear layer."""
    head_width: int | None = Field(None, gt=0)
    """Width of the pixel head, in place of the one that `head_rule` gives."""
    head_depth: int | None = Field(None, ge=0)
    """Number of blocks of the pixel head, in place of the one that `head_rule` gives."""
    head_kind: HeadKind = "mlp"
    """Blocks of the pixel head: MLPs, token by token (the paper's), or transformer blocks under the backbone's mask."""
    ln_residual: bool = False
    """Whether head blocks add LN(x) before the MLP residual, as the authors' trainer does."""
    patch_order: PatchOrder = "raster"
    """Order in which patches are predicted (`aim.model`); `outward_spiral` and `checkerboard` are the authors'."""
    parametrisation: Parametrisation = "standard"
    """`standard`: the paper's constant learning rate and xavier init; `mup`: width-aware rates and scales."""
    norm_eps: float = Field(1e-6, gt=0)
    """Epsilon of every LayerNorm: 1e-6 in the authors' inference code, 1e-5 in their trainer."""
    qk_norm: bool = False
    """Whether each attention head normalises its queries and keys (a LayerNorm over their channels): the usual cure for
    losses that spike in large models. Such a model cannot be exported as a released one."""
    qkv_init: QkvInit = "fused"
    """Initial query, key and value: drawn as one (3 d, d) matrix, or, as in the authors' trainer, as three of (d, d),
    whose values are sqrt(2) times as wide."""


MAX_LOADERS = 16
"""Maximum loader processes that `num_workers: auto` takes: they decode some 16,000 photographs a second."""
UNINDEXED = "wds://"
"""Prefix of paths to webdataset shards without an index."""


class SourceSection(Section):
    """A packed or indexed data set and how often it is drawn."""

    path: str
    """Folder of indexed shards (`aimscale data pack` or `aimscale data index` makes one), local or an fsspec URL. Or
    `wds://` and the path or URL of shards without an index, `wds://https://host/part-{0000..0999}.tar`: a stream that
    cannot be resumed exactly, counted, cut to unique images or compared with the validation images."""
    fingerprint: str | None = None
    """Hash of its content, as in `dataset.json`; filled in when a run is planned. A run refuses images of another."""
    probability: float = Field(1.0, gt=0, le=1)
    """Probability of drawing from this source; the probabilities of a run add up to 1."""


class DataSection(Section):
    """The training stream: which images, how many different ones, and their augmentation."""

    sources: Annotated[tuple[SourceSection, ...], Field(min_length=1)]
    """Data sets that the images come from."""
    unique_images: int | None = Field(None, gt=0)
    """U: number of different images, the first of one fixed order of the pool, equally many of every shard; null takes
    the whole pool."""
    shuffle_shards: int = Field(100, gt=0, le=10**6)
    """Number of shards read side by side, over all sources: each image comes from any of them, and an epoch reads a
    shard once. A source with no more shards is shuffled as a whole. A batch mixes the classes of this many shards,
    which matters if shards are sorted by class; a cache of remote shards (`runtime.cache_gb`) should hold all of
    them."""
    crop_scale: tuple[float, float] = (0.4, 1.0)
    """Area range of the random resized crop (paper, section 3)."""
    horizontal_flip: bool = True
    """Random flips, left to right, of half of the images."""
    color_jitter: bool = False
    """ColorJitter(0.4, 0.4, 0.2, 0.1) with probability 0.8, as in the authors' trainer but not in the paper."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of undecodable samples above which the run stops."""
    shuffle_buffer: int = Field(1000, gt=0)
    """Size of the shuffle buffer of a `wds://` stream, images per loader process, kept as files in memory."""

    @property
    def is_unindexed(self) -> bool:
        """Whether a source is a stream without an index."""
        return any(source.path.startswith(UNINDEXED) for source in self.sources)

    @model_validator(mode="after")
    def _parts_fit(self) -> DataSection:
        """Check the area range, and that sources can be mixed and their probabilities add up to 1."""
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is a smaller and a larger share of the image, not {list(self.crop_scale)}")
        if self.is_unindexed and (len(self.sources) > 1 or self.unique_images is not None):
            raise ValueError(
                f"a {UNINDEXED} stream has no index, so it cannot be mixed or cut to unique_images; "
                "index the shards first (`aimscale data index`)"
            )
        total = sum(source.probability for source in self.sources)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the probabilities of the data sources add up to {total:g}; make them add up to 1")
        return self


class ObjectiveSection(Section):
    """The targets, and the prefixes that they are predicted from."""

    target: Target = "normalised"
    """Targets of the regression: pixels normalised per patch (paper), or the image-normalised pixels themselves."""
    masked: float | None = Field(None, gt=0, lt=1)
    """Share of the patches that a masked model hides behind a learned mask token and predicts, drawn anew for every
    image seen, with bidirectional attention (paper, section 5.2: 0.5 and 0.75); null predicts next patches. A masked
    model has no prefixes, so `prefix` is kept at its default."""
    prefix: Literal["paired", "uniform", "none"] = "paired"
    """Distribution of prefix lengths S. `paired`: positions 2i and 2i+1 get S and N - S, each uniform on 1..N-1, so
    that every pair scores exactly N targets; `uniform`: independently; `none`: S = 1, plain causal attention."""

    @field_validator("prefix")
    @classmethod
    def _means_nothing_if_masked(cls, prefix: str, others: ValidationInfo) -> str:
        """Reset `prefix` to its default for masked models."""
        return prefix if others.data.get("masked") is None else "paired"


class OptimiserSection(Section):
    """AdamW and the batch (paper, Table 9)."""

    batch_size: int = Field(4096, gt=0, le=10**9)
    """Images per optimiser step, over all ranks and micro-batches."""
    lr_peak: float = Field(1e-3, gt=0)
    """Learning rate after warm-up."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """AdamW's moment decays."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled decay of matrices; biases and norms have none."""
    clip_norm: float = Field(1.0, gt=0)
    """Bound to which the global gradient norm is clipped."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of training; `bf16` keeps fp32 master weights, fp32 gradient accumulation, and LayerNorm and loss in
    fp32."""


class ScheduleSection(Section):
    """Learning rate against images seen."""

    kind: Literal["wsd", "cosine"] = "wsd"
    """`wsd`: warm-up, stable, and a decay branched off for every budget; `cosine`: one run per budget."""
    warmup_images: int = Field(128_000_000, ge=0, le=10**15)
    """Linear warm-up from `lr_start`, images (paper: 31,250 iterations of 4096)."""
    lr_start: float = Field(1e-6, ge=0)
    """Learning rate at the first image."""
    lr_end: float = Field(0.0, ge=0)
    """Learning rate at a budget's last image."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """Share of a budget spent decaying (wsd)."""


class TrainingConfig(Section):
    """The part of a configuration that identifies a run: a change here is another run."""

    model: ModelSection
    """The model."""
    data: DataSection
    """The training stream."""
    objective: ObjectiveSection = ObjectiveSection()
    """The objective."""
    optimiser: OptimiserSection = OptimiserSection()
    """The optimiser."""
    schedule: ScheduleSection = ScheduleSection()
    """The learning-rate schedule."""
    init: InitSection | None = None
    """Weights to start from; null draws them."""
    seed: int = Field(0, ge=0, lt=2**53)
    """Seeds the initial weights and the stream."""


class RuntimeConfig(Section):
    """Hardware and execution of a run; none of this may change its result."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the ranks; `auto` takes CUDA if there is a GPU."""
    zero_stage: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage; `auto` takes 2, 3 where that does not fit, and on one rank 1 (0 in fp32)."""
    micro_batch: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Maximum images per forward pass and rank; `auto` takes a divisor of a rank's images, so that all passes are of
    one size and blocks are compiled once."""
    activation_checkpointing: Literal["auto"] | bool = "auto"
    """Activation checkpointing: recompute block activations in the backward pass."""
    compile: Literal["auto"] | bool = "auto"
    """Compilation of the blocks by torch.compile; `auto` compiles on a GPU, but not at ZeRO 3. It is refused on a CPU,
    being slower."""
    num_workers: Literal["auto"] | Annotated[int, Field(ge=0, le=4096)] = "auto"
    """Loader processes per rank; 0 loads in the trainer itself, between its steps. `auto` takes the rank's cores but
    one, at most 16, beside a GPU, and 0 on a CPU, whose cores compute."""
    num_threads: int = Field(1, ge=1, le=4096)
    """Torch threads per rank (CPU)."""
    cache_dir: str | None = None
    """Local cache of remote shards."""
    cache_gb: float = Field(100.0, gt=0)
    """Size limit of that cache, GB."""
    checkpoint_every_images: int | None = Field(None, gt=0)
    """Distance between checkpoints, in images, beside those at branch points; null leaves them to the time."""
    checkpoint_every_min: float | None = Field(30, gt=0)
    """Minutes between checkpoints. They are written while training goes on, from a copy in host memory: 12 bytes per
    parameter over all ranks."""
    log_every_steps: int = Field(10, gt=0)
    """Steps between metric lines."""
    profile: int | None = Field(None, gt=0, le=1000)
    """Number of steps, after the first few of each start, whose trace every rank writes into `profile/`, for
    ui.perfetto.dev; on a GPU with a snapshot of its memory, for pytorch.org/memory_viz."""
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers beside `metrics.jsonl`, which is always written; docs/loggers.md says what they show."""

    def loader_processes(self, *, is_gpu: bool, cores: int) -> int:
        """Return the loader processes of a rank that has so many cores."""
        if self.num_workers != "auto":
            return self.num_workers
        return min(MAX_LOADERS, max(0, cores - 1)) if is_gpu else 0


class RunConfig(Section):
    """Configuration of one run, as stored in `config.yaml` of its run directory."""

    version: int = Field(1, ge=1, le=1, strict=True)
    """Version of this file format."""
    training: TrainingConfig
    """Model, data, objective, optimiser and schedule."""
    evaluation: EvaluationConfig
    """Budgets, validation and probes."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Devices and execution."""

    @model_validator(mode="after")
    def _parts_fit(self) -> RunConfig:
        """Check budgets and prefixes against the batch size and the schedule."""
        batch, budgets = self.training.optimiser.batch_size, self.evaluation.budgets
        if list(budgets) != sorted(set(budgets)):
            raise ValueError(f"budgets {list(budgets)} must increase")
        for budget in budgets:
            if budget <= 0 or budget % batch:
                near = max(1, round(budget / batch)) * batch
                raise ValueError(f"budget {budget} is not a multiple of the batch size {batch}; use {near}")
        if self.training.schedule.kind == "cosine" and len(budgets) > 1:
            raise ValueError("a cosine run decays to one budget; give each budget its own run, or use wsd")
        objective = self.training.objective
        if objective.prefix == "paired" and objective.masked is None and batch % 2:
            raise ValueError(f"paired prefixes need an even batch size, not {batch}")
        if (init := self.training.init) and init.freeze_images >= budgets[0]:
            raise ValueError(
                f"init.freeze_images {init.freeze_images} holds the backbone for all of the budget {budgets[0]}; "
                "free it before the smallest budget ends"
            )
        return self

    @property
    def run_id(self) -> str:
        """Readable slug and eight hex digits, e.g. `rung-64_u12000_s0_1a2b3c4d`; of a warm start with `_warm`."""
        training = self.training
        unique = "all" if training.data.unique_images is None else str(training.data.unique_images)
        warm = "_warm" * (training.init is not None)
        return f"{training.model.size}_u{unique}_s{training.seed}{warm}_{self.training_hash}"

    @property
    def training_hash(self) -> str:
        """Eight hex digits that identify what is trained."""
        horizon = self.evaluation.budgets[0] if self.training.schedule.kind == "cosine" else None
        return training_digest(self.training.model_dump(mode="json", exclude_defaults=True), horizon)

    def to_yaml(self) -> str:
        """Return the file's text; `load_run_config` reads it back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def build_model_config(training: TrainingConfig) -> ModelConfig:
    """Return the model that a run trains."""
    return cached_model_config(training.model, training.objective)


@functools.cache
def cached_model_config(section: ModelSection, objective: ObjectiveSection) -> ModelConfig:
    """Build the model of these parts of a configuration; cached, since planners ask for few models often."""
    return model_config(**dict(section), **objective.model_dump(exclude={"prefix"}))


def run_config(fields: dict[str, Any], where: str, runtime: RuntimeConfig | None = None) -> RunConfig:
    """Build a run from the fields of `training` and `evaluation` in one mapping.

    Raises:
        ConfigError: a key that neither part has, or a value that cannot be used; the sentence starts with `where`.
    """
    refuse_unknown(fields, {**TrainingConfig.model_fields, **EvaluationConfig.model_fields}, where)
    parts = {}
    for name, kind in (("training", TrainingConfig), ("evaluation", EvaluationConfig)):
        parts[name] = parse(kind, {key: value for key, value in fields.items() if key in kind.model_fields}, where)
    return parse(RunConfig, parts | {"runtime": runtime or RuntimeConfig()}, where)


def load_run_config(path: Path) -> RunConfig:
    """Read `config.yaml`."""
    values = read_yaml(path)
    if isinstance(values, dict) and "program" in values:
        raise ConfigError(f"{path} is of a run that another program trains (`trainer`); aimscale has no model of it")
    return parse(RunConfig, values, str(path))


def check_loggers(config: RunConfig) -> None:
    """Raise ConfigError if a logger is asked for that is not installed."""
    if "wandb" in config.runtime.loggers and find_spec("wandb") is None:
        raise ConfigError("runtime.loggers names wandb, which is not installed; pip install 'aimscale[wandb]'")
