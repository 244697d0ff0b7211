"""Communication of a rank in one optimiser step, by ZeRO stage, as DeepSpeed 0.19 does it with the configuration of
`harness.step.deepspeed_setup`; torch is not imported.

Gradients travel in float32 at every stage, weights in their own precision. What else travels (norms, a flag for
overflow, the counts of `harness.step.feed`) is a few bytes. tests/harness/step/test_communication.py counts all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["fp32", "bf16"]

ELEMENT_BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}
"""Bytes of a value."""
GRADIENT_BYTES = 4
MAX_BUCKET_VALUES = 50_000_000
"""Largest reduction bucket (`harness.step.deepspeed_setup`): 200 MB messages are long enough for any network."""
MAX_BUFFER_VALUES = 500_000_000
"""Maximum values per piece in which DeepSpeed flattens gradients that wait for the last backward pass."""
NUM_GROUPS = 2
"""Parameter groups: weights that decay, and those that do not. Widths that scale rates (muP) add some."""


@dataclass(frozen=True, kw_only=True)
class Communication:
    """Communication of one rank in one optimiser step; all zero on a single rank, which at most copies."""

    payload_bytes: int
    """Bytes of the reduced or gathered tensors, whole, counted as often as they travel."""
    sent_bytes: int
    """Bytes that a rank sends in a ring. Divided by the group's bus bandwidth (as nccl-tests prints it), they are
    seconds."""
    exposed_bytes: int
    """Bytes among `sent_bytes` that are sent after the last backward pass, when nothing is computed meanwhile."""
    num_calls: int
    """Number of collectives, of scalars too; a lower bound, since a bucket is rarely full."""


def step_communication(
    num_params: int, *, precision: Precision, zero_stage: int, world_size: int, micro_batches: int
) -> Communication:
    """Count what a rank sends in a step of a model with so many parameters.

    Stage 0, and stage 1 in bf16, reduce all gradients after the last backward pass. Stage 1 in fp32 reduces them bucket
    by bucket during that pass, stages 2 and 3 during every pass: all but the last bucket overlap with computation.
    Stages 1 and 2 then gather the new weights. Stage 3 gathers weights before their use, and again if their second use
    is far away.

    Args:
        micro_batches: backward passes per step.
    """
    if world_size == 1:
        return Communication(payload_bytes=0, sent_bytes=0, exposed_bytes=0, num_calls=0)
    num_backwards = micro_batches if zero_stage >= 2 else 1
    reduces_late = zero_stage == 0 or (zero_stage == 1 and precision == "bf16")
    bucket = min(num_params, MAX_BUFFER_VALUES if reduces_late else MAX_BUCKET_VALUES)
    num_buckets = num_backwards * -(-num_params // bucket)
    gradients = num_backwards * GRADIENT_BYTES * num_params
    # DeepSpeed's stages 1 and 2 reduce a bucket on all ranks, though only one keeps it.
    times_sent = 1 if zero_stage == 3 else 2

    num_gathers, gathered = 0, 0
    if zero_stage == 3:
        again = max(0, num_params - MAX_BUFFER_VALUES)  # at most: kept if both uses are within 1e9 values
        gathered = micro_batches * (num_params + again)
        num_gathers = -(-gathered // MAX_BUCKET_VALUES)
    elif zero_stage:
        gathered, num_gathers = num_params, NUM_GROUPS
    weights = gathered * ELEMENT_BYTES[precision]

    scalars = 0 if reduces_late else NUM_GROUPS + (zero_stage == 2 and precision == "bf16")
    others = (world_size - 1) / world_size
    late_gradients = gradients if reduces_late else GRADIENT_BYTES * bucket
    return Communication(
        payload_bytes=gradients + weights,
        sent_bytes=int(others * (times_sent * gradients + weights)),
        exposed_bytes=int(others * (times_sent * late_gradients + (weights if zero_stage < 3 else 0))),
        num_calls=num_buckets + num_gathers + scalars,
    )
