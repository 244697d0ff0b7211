"""Results as prose that fills in the (Mis)fitting checklist (Li et al. 2025) from what the result itself recorded."""

from __future__ import annotations

from aimscale.analysis.fitting.result import NOT_IDENTIFIED, Fit

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
    names = {"L": variable_words(fit, "y"), **{v: variable_words(fit, v) for v in fit.law.variables}}
    where = ", ".join(f"{letter} = {name}" for letter, name in names.items() if letter != name)
    numbers = ", ".join(_number(fit, name) for name in fit.params)
    ranges = ", ".join(f"{v} from {low:.3g} to {high:.3g}" for v, (low, high) in fit.ranges.items())
    parts = [
        f"{fit.law.formula} with {numbers}{f', where {where}' if where else ''}.",
        f"Fitted to {fit.num_points} of {fit.num_rows} points over {ranges} by minimising the {fit.objective.label} "
        f"(value {fit.objective_value:.6g}), {_weights(fit)}, with a {fit.optimiser}; no starting values are needed.",
        f"Left out: {'; '.join(map(str, fit.exclusions)) if fit.exclusions else 'nothing'}.",
        f"Intervals: {fit.confidence:.0%}, {fit.interval_method}." if fit.intervals else "No intervals were computed.",
    ]
    parts += [h.sentence() for h in fit.heldout] or ["Not tested on a held-out scale."]
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
