"""Results as prose that fills in the (Mis)fitting checklist (Li et al. 2025) from what the result itself recorded."""

from __future__ import annotations

from aimscale.analysis.fitting.result import NOT_IDENTIFIED, Correlation, Fit, HeldOut

UNITS = {
    "params_total": "all parameters, head included",
    "params_trunk": "parameters of the trunk",
    "params_head": "parameters of the pixel head",
    "images_seen": "images seen, repeats counted",
    "unique_images": "different images in the training pool",
    "flops_train": "training FLOPs as counted (attention and head included)",
    "flops_6nd": "training FLOPs as 6 N D",
}
"""What a column of the results table counts."""


def kind_name(kind: str) -> str:
    """A kind of probe in a table: LoRA is none, because it adapts the trunk."""
    return "LoRA (not frozen)" if kind == "lora" else kind


def accuracy_of(kind: str) -> str:
    """What a kind of probe measures, in prose."""
    return "accuracy after LoRA adaptation (not frozen)" if kind == "lora" else f"{kind}-probe accuracy"


def fit_sentence(fit: Fit) -> str:
    """Law, what its variables count, objective, optimiser, n, exclusions, range, intervals, held-out error, flags."""
    y = variable_words(fit, "y")
    numbers = ", ".join(_number(fit, name) for name in fit.params)
    variables = ", ".join(f"{v} = {variable_words(fit, v)}" for v in fit.law.variables)
    ranges = ", ".join(f"{v} from {low:.3g} to {high:.3g}" for v, (low, high) in fit.ranges.items())
    parts = [
        f"{fit.law.formula} with {numbers}, where L = {y} and {variables}.",
        f"Fitted to {fit.num_points} of {fit.num_rows} points over {ranges} by minimising the {fit.objective.label} "
        f"(value {fit.objective_value:.6g}), {_weights(fit)}, with a {fit.optimiser}; no starting values are needed.",
        f"Left out: {'; '.join(map(str, fit.exclusions)) if fit.exclusions else 'nothing'}.",
        f"Intervals: {fit.confidence:.0%}, {fit.interval_method}." if fit.intervals else "No intervals were computed.",
    ]
    parts += [held_out_sentence(h) for h in fit.heldout] or ["Not tested on a held-out scale."]
    parts += list(fit.flags)
    return " ".join(parts)


def variable_words(fit: Fit, variable: str) -> str:
    """What a variable (or "y") is: their name in a foreign table, ours with what it counts in a results table."""
    column = fit.columns[variable]
    name = fit.names.get(column, column)
    return f"{name} ({UNITS[column]})" if fit.loss_unit and name == column and column in UNITS else name


def _weights(fit: Fit) -> str:
    weight = fit.data["weight"]
    if weight.min() == weight.max():
        return "every point with weight 1"
    return f"points weighted from {weight.min():.3g} to {weight.max():.3g}"


def _number(fit: Fit, name: str) -> str:
    shown = fit.shown(name)
    return f"{name} {NOT_IDENTIFIED}" if shown == NOT_IDENTIFIED else f"{name} = {shown}"


def held_out_sentence(h: HeldOut) -> str:
    """Error on the held-out scale beside the naive baseline."""
    verdict = "better" if h.log_rmse < h.naive_log_rmse else "no better"
    return (
        f"Held out {h.variable} >= {min(h.values):.3g}: fitted on {h.num_train} points, the law predicts the other "
        f"{h.num_test} with mean error {h.mean_abs_relative_error:.2%} (log-RMSE {h.log_rmse:.4f}), {verdict} than "
        f"{h.naive} ({h.naive_mean_abs_relative_error:.2%}, {h.naive_log_rmse:.4f}); {h.num_inside} of {h.num_test} "
        f"lie inside their prediction interval.{_farthest(h)}"
    )


def _farthest(h: HeldOut) -> str:
    """The point at the largest scale: forecast, interval, measurement with its own error."""
    rows = h.predictions
    if rows["pi_lo"].isna().all():
        return ""
    at = list(rows.columns[: list(rows.columns).index("measured")])
    last = rows.sort_values([h.variable, *at] if h.variable in rows else at).iloc[-1]
    scale = ", ".join(f"{v} = {last[v]:.4g}" for v in at)
    error = f" ± {1.96 * last['measured_se']:.4g} (its images)" if last["measured_se"] > 0 else ""
    return (
        f" At {scale}: forecast {last['predicted']:.4g} [{last['pi_lo']:.4g}, {last['pi_hi']:.4g}], measured "
        f"{last['measured']:.4g}{error}: {'inside' if last['inside'] else 'outside'}."
    )


def correlation_sentence(c: Correlation) -> str:
    """Coefficient, interval, n and what was held equal."""
    partial = f", {c.adjusted}" if c.partial_on else ""
    partial += f", within {c.within}" if c.within else ""
    left = f" Left out: {'; '.join(map(str, c.exclusions))}." if c.exclusions else ""
    return (
        f"{c.method.capitalize()} correlation of {c.x} and {c.y}{partial}: {c.value:.3f}{_nothing(c)} "
        f"({c.confidence:.0%} interval {c.low:.3f} to {c.high:.3f}; n = {c.num_points}; {c.interval_method}).{left}"
    )


def _nothing(c: Correlation) -> str:
    """Words where an interval holds zero."""
    return ", nothing shown" if not (c.low > 0 or c.high < 0) else ""
