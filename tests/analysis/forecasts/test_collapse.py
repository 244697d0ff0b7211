"""A rung at three times its rate is named before half of its training, and no rung falsely."""

import numpy as np
import pandas as pd
import pytest

from aimscale.analysis.errors import AnalysisError
from aimscale.analysis.forecasts.collapse import collapse

WIDTHS = (32, 64, 128, 256, 512, 1024)


def sgd_curve(width: int, rate: float, seed: int, steps: int = 300) -> list[tuple[float, float]]:
    """Gradient descent with noise on a quadratic with a power-law spectrum: warm-up, constant rate, decay."""
    rng = np.random.default_rng(seed * 1000 + width)
    spectrum = np.arange(1, width + 1) ** -1.2
    weights = np.arange(1, width + 1) ** -0.3
    curve = []
    for step in range(steps):
        progress = step / steps
        schedule = min(1.0, progress / 0.05) * (1.0 if progress < 0.8 else (1 - progress) / 0.2)
        noise = 0.15 * np.sqrt(spectrum) * rng.standard_normal(width)
        weights = weights - rate * schedule * (spectrum * weights + noise)
        if step % 5 == 4:
            curve.append(((step + 1) / steps, 0.5 * float(np.sum(spectrum * weights**2)) + 0.3 * width**-0.2))
    return curve


def ladder(tripled: int | None = None, seeds=(0, 1, 2)) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"rung": f"w{width}", "run": f"w{width}-{seed}", "progress": progress, "loss": loss}
            for width in WIDTHS
            for seed in seeds
            for progress, loss in sgd_curve(width, 0.9 if width == tripled else 0.3, seed)
        ]
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_a_rung_at_three_times_its_rate_is_named_before_half_of_its_training(width):
    found = collapse(ladder(width), until=0.45)
    assert found.deviating == [f"w{width}"]
    assert f"w{width} deviates from the other rungs' curve up to 45% of training" in found.headline()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("until", [0.45, None])
def test_no_rung_is_named_falsely(seed, until):
    found = collapse(ladder(seeds=(seed,)), until=until)
    assert found.deviating == []
    assert "collapse" in found.headline()
    assert found.until == (until or 1.0)


def test_the_figure_draws_a_line_a_rung_and_marks_the_one_that_deviates():
    found = collapse(ladder(128), until=0.45)
    (ax,) = found.plot().axes
    labels = [line.get_label() for line in ax.get_lines()]
    assert labels == [f"w{w}, deviates" if w == 128 else f"w{w}" for w in WIDTHS]


def test_curves_without_a_shape_are_refused():
    curves = ladder(seeds=(0,))
    with pytest.raises(AnalysisError, match="over 5 or more"):
        collapse(curves[curves["rung"].isin(["w32", "w64"])])
    with pytest.raises(AnalysisError, match="a run has reached 30%"):
        collapse(curves[(curves["rung"] != "w64") | (curves["progress"] <= 0.3)], until=0.5)
    with pytest.raises(AnalysisError, match="too few logged losses"):
        collapse(curves[(curves["rung"] != "w64") | (curves["progress"] > 0.9)])
