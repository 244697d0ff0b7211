"""The configuration of a run that a program of the user trains, as `config.yaml` of its run directory has it.

Everything is filled in: the words of its commands are those that the system is given, and no shell reads them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from aimscale.harness.run.section import ConfigError, Section, parse, read_yaml

PROGRAM_FILE = "program.json"
"""File of a run directory with what the program has told so far: N, the largest D, and the time of training."""


class StopSection(Section):
    """How the program is asked to end."""

    signal: Literal["TERM", "INT", "HUP", "USR1", "USR2"] = "TERM"
    """Signal that asks it to save and end."""
    seconds: int = Field(120, gt=0, le=86400)
    """Time until it is killed, s."""


class MetricsSection(Section):
    """Where its numbers stand, if not as JSON lines in `metrics.jsonl` of the run directory."""

    pattern: str | None = None
    """Regular expression that is searched in every line of the output; its named groups are the keys of a line."""
    D: str = "D"
    """Formula of D from these keys and the values of the run, such as `step*batch*block`."""


class ProgramSection(Section):
    """One run of a program."""

    run_id: str
    """Name of the run, as its directory's."""
    size: str
    """Named size."""
    seed: int
    """Seed."""
    directory: str
    """Working directory."""
    words: tuple[str, ...]
    """Command."""
    resume_if_exists: str | None = None
    """File of an earlier attempt; where it exists, the command goes on with `resume_words`."""
    resume_words: tuple[str, ...] = ()
    """Further words of the command that resumes."""
    metrics: MetricsSection = MetricsSection()
    """Where its numbers stand."""
    budgets: tuple[int, ...]
    """Budgets D, ascending; a row of results each."""
    together: bool
    """Whether the program tells by `budget` in a line which budget the loss is of; else its last loss is."""
    num_params: int | None = None
    """N by the formula of the sweep file; null if the program tells it."""
    flops: str = "6*N*D"
    """Formula of C from N, D and the values of the run."""
    unit: str = "samples"
    """What D counts."""
    evaluate: dict[str, dict[int, tuple[str, ...]]] = Field(default_factory=dict)
    """Name -> budget -> command that writes `evaluations/BUDGET/NAME.json`."""
    stop: StopSection = StopSection()
    """How the program is asked to end."""
    devices: int = 1
    """Devices that it uses."""
    threads: int = 1
    """Threads of the CPU that it uses."""
    values: dict[str, Any] = Field(default_factory=dict)
    """Values of the run by name, those of its size included."""
    setup: dict[str, Any] = Field(default_factory=dict)
    """Those of them that the sweep may vary, beside size and seed."""


class ProgramConfig(Section):
    """Contents of `config.yaml` of such a run."""

    version: int = Field(1, ge=1, le=1, strict=True)
    """Version of this file format."""
    program: ProgramSection
    """The run."""

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return self.program.run_id

    def to_yaml(self) -> str:
        """Return the file's text; `load_program` reads it back to an equal object."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def load_program(path: Path) -> ProgramConfig:
    """Read `config.yaml`."""
    values = read_yaml(path)
    if isinstance(values, dict) and "program" not in values:
        raise ConfigError(f"{path} is no run of a program; it is one of aimscale's own")
    return parse(ProgramConfig, values, str(path))
