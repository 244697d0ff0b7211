"""Sections of the page: the figures and results of each, in reading order."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pandas as pd

from aimscale.analysis.display import MFU, accuracy_of, by_chance, capital, flag_words, human, told_apart
from aimscale.analysis.forecasts.forecast import REGISTER, score_words, scores
from aimscale.analysis.plots.accuracy import plot_accuracy, plot_loss_accuracy
from aimscale.analysis.plots.scaling import plot_points
from aimscale.analysis.published import ADAPTED
from aimscale.analysis.report.blocks import Block, PageFigure, feature_words, html_id, levels, result_block
from aimscale.analysis.report.study import CORRELATION, LINK, Study
from aimscale.analysis.table.files import files_of
from aimscale.analysis.table.points import usable_rows
from aimscale.analysis.table.schema import COLUMNS, DESIGN, described
from aimscale.analysis.table.select import read_curves

SETTINGS = (*(column.name for column in COLUMNS if column.role == "design"), "lr_peak", "batch_size")
COUNTED = ("num_skipped_steps", "num_bad_samples", "num_loss_spikes")
PACKAGES = ("numpy", "scipy", "pandas", "seaborn", "matplotlib")
"""Packages whose versions may change a number or a figure."""
Part = str | PageFigure | Block
"""A paragraph, a figure, or a result."""
WORTH = "After 0.69 R_D repeats another one is worth half of a new sample; R_D is 15.4 for language (Muennighoff 2023)."
"""Note on the law of repeated data, whose worth after r repeats is exp(-r / R_D)."""


def _known(frame: pd.DataFrame, *names: str) -> bool:
    return all(name in frame and frame[name].notna().any() for name in names)


def _values(frame: pd.DataFrame, name: str) -> str:
    """Write the first few different values of a column; one with gaps has floats for integers."""
    values = frame[name].dropna().unique().tolist()
    shown = [f"{v:.0f}" if isinstance(v, float) and v.is_integer() else v for v in values[:8]]
    shown = [human(v, 4) if isinstance(v, float) else str(v) for v in shown]
    return ", ".join(shown) + (" and more" if len(values) > 8 else "")


def _counted(frame: pd.DataFrame, named: str, noun: str, name: str, what: str) -> str:
    """Say how many different values there are, and their range."""
    num, ends = frame[named].nunique(), (frame[name].min(), frame[name].max())
    return f"{num} {noun}{'s' * (num != 1)} ({' to '.join(told_apart(dict.fromkeys(ends), human, 3))} {what})"


def what_was_run(study: Study) -> Iterator[str]:
    """Say how many rows, sizes and budgets there are, what they cost, and which loss is the lowest."""
    frame = study.frame
    parts = [f"{len(frame)} row{'s' * (len(frame) != 1)}"]
    if _known(frame, "params_total"):
        named = "size" if _known(frame, "size") else "params_total"  # another head makes another N, not another size
        parts.append(_counted(frame, named, "model size", "params_total", "parameters"))
    if _known(frame, "images_seen"):
        parts.append(_counted(frame, "images_seen", "data budget", "images_seen", f"{study.samples} seen"))
    one = "The table holds" if len(study.paths) == 1 else f"The {len(study.paths)} tables hold"
    losses = f"{len(usable_rows(study.runs).rows)} of the rows have a validation loss."
    yield " ".join([f"{one} {', '.join(parts)};", losses, *_cost(frame)])
    if not len(study.usable):
        return
    main = usable_rows(study.main).rows.frame
    best = main.iloc[int(main["val_loss"].argmin())]
    error = f" ± {1.96 * best['val_loss_se']:.4f}" if _known(main, "val_loss_se") and best["val_loss_se"] > 0 else ""
    place = f" by {best['size']}" if _known(main, "size") else ""
    place += f" after {human(best['images_seen'])} {study.samples}" if _known(main, "images_seen") else ""
    yield f"The lowest validation loss is {best['val_loss']:.4f}{error}{', reached' * bool(place)}{place}."


def _cost(frame: pd.DataFrame) -> Iterator[str]:
    """Count each run once, at its largest budget, which includes what its smaller ones trained."""
    if not _known(frame, "run_id", "images_seen"):
        return
    last = frame.dropna(subset="run_id").sort_values("images_seen").drop_duplicates("run_id", keep="last")
    if _known(last, "device_hours"):
        devices = _values(frame, "device") if _known(frame, "device") else "the devices named below"
        hours = human(last["device_hours"].sum())
        yield f"Training to the largest budget of each run took {hours} device-hours on {devices}."
    if _known(last, "flops_train"):
        yield f"The runs used {human(last['flops_train'].sum())} FLOP up to their largest budgets."


def settings(study: Study) -> Iterator[tuple[str, str]]:
    """Yield the settings that the runs had, what was counted over them, and which rows were left out."""
    frame = study.frame
    yield from ((described(name).heading, _values(frame, name)) for name in SETTINGS if _known(frame, name))
    counted = {name: int(frame[name].sum()) for name in COUNTED if _known(frame, name)}
    yield from ((described(name).heading, f"{number} over all rows") for name, number in counted.items() if number)
    law = study.get("law")
    with_laws = {f"{each}." for each in law.exclusions} if law else {}
    yield from (("left out", line) for line in study.exclusions or ["nothing"] if line not in with_laws)


def provenance(study: Study) -> Iterator[tuple[str, str]]:
    """Yield where the numbers come from."""
    frame = study.frame
    for path in study.paths:
        yield "table", path.name if len(study.paths) == 1 else f"{path.resolve().parent.name}/{path.name}"
        if path.is_file():
            yield "SHA-256 of the table", hashlib.sha256(path.read_bytes()).hexdigest()
    sources = [column.name for column in COLUMNS if column.role == "source"] + ["seed"]
    yield from ((described(name).heading, _values(frame, name)) for name in sources if _known(frame, name))
    if _known(frame, "finished_at"):
        stamps = frame["finished_at"].dropna().astype(str)
        yield "measured", f"{stamps.min()} to {stamps.max()}"
    yield from ((f"analysed with {name}", importlib.metadata.version(name)) for name in PACKAGES)


class Section(NamedTuple):
    """A section of the page."""

    key: str
    """HTML id."""
    name: str
    """Short name, for the navigation."""
    title: str
    parts: defaultdict[str, list[Any]]
    """Class -> its parts of that class."""


def sections(study: Study) -> list[Section]:
    """Lay out what was found; sections without anything are left out."""
    made = []
    for key, (name, title, build) in SECTIONS.items():
        parts = defaultdict[str, list[Any]](list)
        for part in build(study):
            parts[type(part).__name__].append(part)
        made += [Section(key, name, title, parts)] if parts else []
    return made


def _runs(study: Study) -> Iterator[Part]:
    yield from what_was_run(study)
    frame, unit = study.frame, study.usable.loss_unit
    names = ["size", "params_total", "images_seen", "unique_images", "flops_train", "val_loss", "val_loss_se"]
    names += ["train_loss", "status", "seed", *(name for name in study.runs.design_columns() if name in DESIGN)]
    names += [*["images_per_s"] * study.is_ours, *MFU, "device_hours", "run_id"]
    note = f"One row per run and data budget. D counts {study.samples}."
    note += f" Loss: {unit} per scored target on held-out images." if unit else ""
    yield Block("results", "Every measurement", _columns(frame, names), note=note, is_open=False)


def _columns(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Choose the columns that a frame has of these, each once, without those that hold nothing."""
    return frame[[n for n in dict.fromkeys(names) if n in frame and frame[n].notna().any()]]


def _scaling(study: Study) -> Iterator[Part]:
    """Draw the loss against D with the joint law (N is among the findings), and against C."""
    usable, law = study.usable.frame, study.get("law")
    for key, x, by, what in (
        ("N", "params_total", "images_seen", "parameters"),
        ("D", "images_seen", "params_total", f"{study.samples} seen"),
        ("C", "flops_train", "params_total", "compute"),
    ):
        if x not in _columns(usable, [x]) or (law is not None and key == "N"):
            continue
        if law is not None and key == "D":
            values = "; ".join(law.equation(name, name) for name in law.params.index if name not in law.law.derived)
            caption = f"A line for each size. {law.law.formula}: {values}. Brackets and shading: 95 % intervals."
            draw = partial(law.plot, x="D")
        else:
            others = by if by in usable and usable[by].notna().all() else None
            draw = partial(plot_points, study.usable, x, by=others)
            caption = "Lines join a size's budgets." if key == "C" else "No law could be fitted; see what is missing."
        yield PageFigure(f"loss-{key}", f"Loss against {what}", caption, draw)


def _accuracy(study: Study) -> Iterator[Part]:
    """Draw accuracies of each kind against size, data and compute, a row of panels per task; list all."""
    probes = study.probes
    for kind in study.kinds:
        rows = probes[(probes["kind"] == kind) & probes["top1"].notna()]
        bars = "" if rows["top1_lo95"].isna().all() else " Bars: 95 % intervals over test images."
        caption = f"One point per run and budget. Lines join points of one size, in the first panel of one D.{bars}"
        draw = partial(plot_accuracy, rows, levels(study, kind, rows.frame))
        yield PageFigure(html_id("accuracy", kind), capital(accuracy_of(kind)), caption, draw)
    if not len(probes):
        return
    note = "Top-1 in per cent."
    if study.is_ours:
        note += " Test splits are scored once; blocks and rates were chosen on a hold-out of the training split."
        if ADAPTED in study.kinds:
            note += " LoRA adapts the backbone and uses the last blocks; all other kinds read frozen features."
    blocks = probes["blocks"].map(lambda blocks: ", ".join(map(str, blocks)), na_action="ignore")
    names = ["task", "kind", "size", "params_total", "images_seen", "val_loss", "top1", "top1_lo95", "top1_hi95"]
    names += ["last_top1", "chance", "ideal", "n", "blocks", "lr"]
    listed = probes.assign(blocks=blocks, kind=probes["kind"].replace({ADAPTED: "LoRA (not frozen)"})).frame
    title = "Frozen-feature accuracy" if study.is_ours else "Accuracy"
    yield Block("probes", title, _columns(listed, names), note=note, is_open=False)


def _loss_accuracy(study: Study) -> Iterator[Part]:
    """Draw accuracies of each kind against the loss, and lay out the correlations of the first."""
    caption = (
        "Brackets: 95 % intervals of the correlations, at equal compute first; over all rows both follow compute. "
        "Line and band: a sigmoid above chance with its 95 % interval."
    )
    for kind in study.kinds if _known(study.probes.frame, "val_loss") else ():
        rows = study.probes[study.probes["kind"] == kind]
        correlations, links = (study.by_task(name, kind) for name in (CORRELATION, LINK))
        draw = partial(plot_loss_accuracy, rows, correlations, links)
        yield PageFigure(html_id("loss-accuracy", kind), f"Loss against {accuracy_of(kind)}", caption, draw)
        for task, correlation in correlations.items() if kind == study.kinds[0] else ():  # figures show the others
            title = feature_words(kind, {task: next(iter(correlation))})
            yield result_block(html_id("correlation", f"{task}:{kind}"), title, correlation, is_open=False)


def _training(study: Study) -> Iterator[Part]:
    curves, budgets = read_curves(study.paths if "run_id" in study.main else ()).frame, study.main.complete()
    curves = curves[curves["run_id"].isin(budgets.frame.get("run_id", []))].dropna(subset=["params_total", "val_loss"])
    if len(curves):
        caption = "Validation loss during training, before decays. Markers: budgets."
        draw = partial(plot_points, budgets, "images_seen", by="params_total", curves=curves)
        yield PageFigure("curves", "Training curves", caption, draw)
    if (trajectory := study.get("trajectory")) and not trajectory.table["is_budget"].all():
        measured = study.run_points[study.run_points["params_total"] == trajectory.num_params]
        caption = f"The largest size beside its forecast from {trajectory.basis}; grey: these runs."
        yield PageFigure(
            "trajectory", "Is the largest size on track?", caption, partial(trajectory.plot, measured=measured)
        )


def _best_split(study: Study) -> Iterator[Part]:
    if frontiers := study.get("compute-optimal frontier"):
        caption = "Lines: N* as a power of C, dotted beyond the measured compute. Shading: 95 % intervals."
        yield PageFigure("frontier", "Compute-optimal size", caption, frontiers.plot)
        yield result_block("approaches", "How the best size grows", frontiers)


def _published(study: Study) -> Iterator[Part]:
    """Put the released AIMs beside these runs, on tasks of the paper read by its protocol, and baselines on any."""
    comparison = study.get("published models")
    if comparison is None or (comparison.tasks.empty and comparison.baselines.empty):
        return
    if len(comparison.tasks):
        if "params_total" in comparison.tasks:
            caption = "Attentive probe: these runs at their largest budgets, AIM on its last six blocks."
            yield PageFigure("published-models", "Beside the published AIM models", caption, comparison.plot)
        note = (
            "Attentive probe on frozen features, top-1 in per cent; gaps are ours minus theirs. The last six blocks "
            "are compared with AIM-7B's last six, chosen ones with its best six."
        )
        yield Block("compare", "The same tasks, ours and theirs", comparison.tasks, note=note)
    if len(comparison.baselines):
        note = (
            "Each run at its largest budget and every baseline, on the same images, top-1 in per cent. Gap: ours minus "
            "the baseline's, with a 95 % interval over test images, not over seeds. Detectable: the minimum detectable "
            "gap at 80 % power."
        )
        note += f" Of these intervals, not corrected for their number, {dict(comparison.facts())['significant']}."
        rows = comparison.baselines.sort_values(["params_total", "task", "kind"], ascending=[False, True, True])
        yield Block("baselines", "Beside baselines on the same probes", rows, note=note)
    if lines := flag_words(comparison.left_out):
        yield Block("not-compared", "Not compared, and why", lines=lines, is_open=False)


def _laws(study: Study) -> Iterator[Part]:
    """Lay out the forecasts, the left-out scales, and the laws."""
    if forecast := study.get("forecast"):
        yield result_block("forecasts", "Forecasts", forecast)
    for register in (file for each in {path.parent: None for path in study.paths} for file in files_of(each, REGISTER)):
        scored = scores(register, study.runs)
        yield Block("registered", "Registered forecasts and their scores", scored, lines=[score_words(scored)])
    if tests := joint.heldout if (joint := study.get("law")) else ():
        points = pd.concat([test.predictions.assign(left_out=f"largest {test.variable}") for test in tests])
        lines = [test.sentence() for test in tests]
        yield Block("heldout", "Does the law extrapolate?", points, lines=lines)
    if rates := study.get("tuning"):
        caption = "Crosses: the best rates of cells of one N and D, and their law with its 95 % interval."
        yield PageFigure("rates", "Loss against the learning rate", caption, rates.plot)
        yield result_block("tuning", "Was each size trained at its best rate?", rates, is_open=False)
    whose = f"Rows{study.whose}."
    for key, name, note in (
        ("ND", "law", whose if study.whose else ""),
        ("U", "law of repeated data", f"Rows of all pools of the main experiment. {WORTH}"),
    ):
        if (fit := study.get(name)) is not None:
            facts = [(name, fact) for name, fact in fit.facts() if name != "law" and not name.startswith("held out ")]
            title = f"{fit.law.formula}, fitted to {fit.num_points} points"
            yield result_block(f"law-{key}", title, fit, note=note, facts=facts)


def _changes(study: Study) -> Iterator[Part]:
    """Tell single changes."""
    contrasts = study.all("contrast by")
    every = [each.is_significant for of_column in contrasts.values() for each in of_column.contrasts if each.over]
    if contrasts:
        yield (
            "Each pair of runs agrees in size, seed, data and every other setting. Intervals are Student's: over sizes "
            "from three on, else over the pairs of runs at these sizes. Losses are in their unit, accuracies in per "
            f"cent, differences in points. Of all these intervals, not corrected for their number, {by_chance(every)}."
        )
    for name, of_column in contrasts.items():
        yield result_block(html_id("contrast", name), f"Effect of {name}", of_column)


def _methods(study: Study) -> Iterator[Part]:
    yield Block("settings", "Settings and exclusions", facts=[*settings(study)], is_open=False)
    yield Block("provenance", "Provenance", facts=[*provenance(study)], is_open=False)


SECTIONS: dict[str, tuple[str, str, Callable[[Study], Iterator[Part]]]] = {
    "runs": ("Runs and cost", "What was run and what it cost", _runs),
    "scaling": ("Scaling", "Loss against parameters, data and compute", _scaling),
    "accuracy": ("Accuracy", "Accuracy against parameters, data and compute", _accuracy),
    "linked": ("Loss and accuracy", "Loss against accuracy", _loss_accuracy),
    "training": ("Training curves", "Training curves", _training),
    "best-split": ("Optimum", "The compute-optimal size and amount of data", _best_split),
    "published": ("Published models", "Beside published models and baselines", _published),
    "laws": ("Laws", "Fitted laws", _laws),
    "changes": ("Single changes", "Single changes, everything else equal", _changes),
    "methods": ("Settings and provenance", "Settings and provenance", _methods),
}
"""Id -> name in the navigation, heading, and what lays the section out."""
