"""The part of a run's configuration that says what is measured; more of it never trains a run again."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from aimscale.harness.run.section import Section, config_digest, short_hash


class ValidationSection(Section):
    """Held-out images on which the pre-training loss is measured, the same for every run of a sweep."""

    path: str
    """Folder of indexed shards."""
    num_images: int | None = Field(None, gt=0)
    """Number of images, the first of the folder; null uses all."""
    num_prefixes: int = Field(4, gt=0, le=4096)
    """Prefix lengths per image, stratified over 1..N-1 and a function of the image's position alone; for a masked
    model, masks per image."""
    centre_crop: float = Field(0.875, ge=0.1, le=1)
    """Share of the shorter side that the centre crop keeps: images are resized to ceil(image_size / centre_crop) first.
    0.875 is the authors' (224 of 256); 1 keeps the whole shorter side, which suits tiny pictures."""
    every_images: Literal["auto"] | Annotated[int, Field(gt=0)] | None = "auto"
    """Distance, in images, at which the loss is also measured during the stable phase (under cosine: all of training);
    `auto` spends 3 % of the FLOPs of training, on 100 points at most, and null measures at budgets alone."""

    @property
    def digest(self) -> str:
        """Eight hex digits that identify how the loss is measured, but not where the images lie or when it is
        measured."""
        fields = self.model_dump(mode="json", exclude_defaults=True, exclude={"path", "every_images"})
        return config_digest("validation", fields)


class ProbeSection(Section):
    """A frozen-feature task."""

    task: str = Field(pattern=r"^\w[\w .+-]{0,79}$")
    """Name of the task in tables, plots and file names: letters, digits, spaces and . _ + -."""
    train: str
    """Folder of labelled, indexed shards to fit on (part of it is held out to choose blocks and rates)."""
    test: str
    """Folder of labelled, indexed shards, scored once."""
    kinds: Annotated[tuple[Literal["linear", "attentive", "efficient", "knn", "lora"], ...], Field(min_length=1)] = (
        "linear",
        "attentive",
    )
    """Probes to fit. `efficient`: 32 queries over whole tokens (arXiv 2506.10178). `lora` is not frozen: it adapts the
    backbone (rank 8; paper, Table 8) under an attentive head."""
    augmentation: Literal["none", "published"] = "none"
    """Training views: one centre crop, or the published recipe (random resized crops of scale 0.08 to 1, flips,
    RandAugment m9 mstd0.5 inc1), from which attentive and linear heads learn; k-NN sees centre crops alone."""
    centre_crop: float = Field(0.875, ge=0.1, le=1)
    """Share of the shorter side that the centre crop keeps, as for `validation`."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Attention of the backbone while it is probed; the paper drops the causal mask after pre-training."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision in which the backbone computes and features are kept; the heads train in fp32. How far bf16 features
    are from fp32 ones is measured on a few images, printed, and written beside the results."""
    epochs: int | None = Field(None, gt=0, le=10**6)
    """Passes over the training split; null takes 20, or if fewer as many as make 6.5 million images (5 of
    ImageNet-1k)."""
    iterations: int | None = Field(None, gt=0, le=10**9)
    """Steps of the probe's optimiser, instead of `epochs` (12,500 of batch 1024 are CAPI's for ImageNet-1k)."""
    batch_size: int = Field(256, gt=0, le=10**9)
    """Images per step of the probe's optimiser."""
    lrs: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates of heads that are trained (linear ones only with `augmentation: published`), chosen on a fifth of
    the training split, held out. The grid grows by its own ratio if the choice is at its end."""

    @model_validator(mode="before")
    @classmethod
    def _without_former_key(cls, values: Any) -> Any:
        """Drop `every_images: null`, which stands in `config.yaml` of runs that began before December 2026."""
        if isinstance(values, dict) and "every_images" in values and values["every_images"] is None:
            return {key: value for key, value in values.items() if key != "every_images"}
        return values

    def evaluation_id(self, train: str | None, test: str | None) -> str:
        """Return the identifier of this evaluation in files and tables, on data of these fingerprints; it ends with `*`
        if one is None.

        Adding a kind of probe changes nothing about the others, so kinds do not count.
        """
        settings = self.model_dump(mode="json", exclude_defaults=True, exclude={"train", "test", "kinds"})
        data = short_hash(f"{train} {test}") if train and test else "*"
        return f"{config_digest('probe', settings)}-{data}"


class EvaluationConfig(Section):
    """Measurements of a run: changing them never trains it again."""

    budgets: Annotated[tuple[int, ...], Field(min_length=1)]
    """D: images seen at each of which a row of results is recorded; multiples of the batch size. Under `wsd` another
    budget extends a run; under `cosine` the budget shapes the schedule and so is part of what is trained."""
    validation: ValidationSection
    """Images and settings of the pre-training loss."""
    probes: tuple[ProbeSection, ...] = ()
    """Tasks on which the features are measured."""
