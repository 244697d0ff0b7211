"""Sections of the page: the figures and results of each, in reading order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import pandas as pd

from aimscale.analysis.accuracy.result import Correlations
from aimscale.analysis.effects.plateau import plateau_flags
from aimscale.analysis.fitting.result import Fit
from aimscale.analysis.plots.accuracy import plot_accuracy, plot_loss_accuracy
from aimscale.analysis.plots.scaling import plot_points
from aimscale.analysis.plots.training import plot_curves
from aimscale.analysis.published.comparison import ADAPTED, PROTOCOL, read_baselines, share_cells
from aimscale.analysis.published.published import TASKS, beside_paper, best_frozen, in_words, table6
from aimscale.analysis.report.blocks import Block, PageFigure, html_id, result_block, table_block
from aimscale.analysis.report.pictures import PictureRow, picture_rows
from aimscale.analysis.report.runs import provenance, settings, what_was_run
from aimscale.analysis.report.study import Study
from aimscale.analysis.table.design import DESIGN, design_columns, varies
from aimscale.analysis.table.points import complete
from aimscale.analysis.table.read import loss_unit, probe_frame, read_curves
from aimscale.analysis.table.schema import MFU, described
from aimscale.analysis.words import accuracy_of, flag_words, kind_name

Part = str | PageFigure | Block | PictureRow
"""A paragraph, a figure, a result, or a row of pictures."""
PartT = TypeVar("PartT", str, PageFigure, Block, PictureRow)
MAX_TASKS = 5
"""Tasks in one figure of accuracies; more make further figures, each of which fits a page."""
LEAST_NOISE = 5e-6
"""Fraction of the loss below which a source of spread would be printed as zero."""


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    key: str
    """HTML id."""
    name: str
    """Short name, for the navigation."""
    title: str
    parts: list[Part]

    def of(self, kind: type[PartT]) -> list[PartT]:
        """List its parts of a class."""
        return [part for part in self.parts if isinstance(part, kind)]


def sections(study: Study) -> list[Section]:
    """Lay out what was found; sections without anything are left out."""
    made = [Section(key, name, title, list(build(study))) for key, (name, title, build) in SECTIONS.items()]
    return [section for section in made if section.parts]


def _runs(study: Study) -> Iterator[Part]:
    yield from what_was_run(study)
    frame = study.frame
    if "num_skipped_steps" in frame and not frame["num_skipped_steps"].any():
        frame = frame.drop(columns="num_skipped_steps")
    names = (
        *("size", "params_total", "images_seen", "unique_images", "flops_train", "val_loss", "val_loss_se"),
        *("train_loss", "status", "seed", *(name for name in design_columns(study.frame) if name in DESIGN)),
        *("images_per_s", *MFU, "device_hours", "num_skipped_steps", "run_id"),
    )
    unit = loss_unit(study.usable)
    note = f"One row per run and data budget. D counts {study.samples}."
    note += f" Loss: {unit} per scored target on held-out images." if unit else ""
    frame = frame[[name for name in dict.fromkeys(names) if name in frame]]
    yield table_block("results", "Every measurement", frame, note=note, is_open=False)


def _scaling(study: Study) -> Iterator[Part]:
    """Draw the loss against N and D with the joint law, and against C with the law of the envelope."""
    usable, law, envelope = study.usable, study.get("law"), study.get("law of the envelope")
    for key, x, by, what in (
        ("N", "params_total", "images_seen", "parameters"),
        ("D", "images_seen", "params_total", f"{study.samples} seen"),
        ("C", "flops_train", "params_total", "compute"),
    ):
        if usable.empty or x not in usable or usable[x].isna().all():
            continue
        if key != "C" and law is not None:
            figure = law.plot(x=key)
            caption = _equation(law) if key == "N" else "The same law, a line for each size."
        else:
            others = by if by in usable and usable[by].notna().all() else None
            figure = plot_points(usable, x, by=others, envelope=envelope if key == "C" else None)
            caption = "Lines join a size's budgets." if key == "C" else "No law could be fitted; see what is missing."
            if key == "C" and envelope is not None:
                caption += f" Dashed: the law of the envelope, {_equation(envelope)}"
        yield PageFigure(key=f"loss-{key}", title=f"Loss against {what}", caption=caption, figure=figure)


def _equation(fit: Fit) -> str:
    """Write formula, parameters with intervals, and points of a fit."""
    values = "; ".join(fit.equation(name, name) for name in fit.params if name not in fit.law.derived)
    return f"{fit.law.formula}: {values}. {fit.num_points} points. Brackets and shading: 95 % intervals."


def _accuracy(study: Study) -> Iterator[Part]:
    """Draw accuracies of each kind against size, data and compute, a row of panels per task; list all."""
    for kind in study.kinds:
        rows = study.probes[(study.probes["kind"] == kind) & study.probes["top1"].notna()]
        tasks = list(dict.fromkeys(rows["task"]))
        bars = "" if rows["top1_lo95"].isna().all() else " Bars: 95 % intervals over test images."
        caption = f"One point per run and budget. Lines join points of one size, in the first panel of one D.{bars}"
        for first in range(0, len(tasks), MAX_TASKS):
            some = rows[rows["task"].isin(tasks[first : first + MAX_TASKS])]
            figure = plot_accuracy(some, _levels(study, kind, some))
            key = html_id("accuracy", kind) + (f"-{1 + first // MAX_TASKS}" if first else "")
            yield PageFigure(key=key, title=_capital(accuracy_of(kind)), caption=caption, figure=figure)
    if study.probes.empty:
        return
    frame = study.probes
    note = "Top-1 in per cent."
    if study.is_ours:
        note += " Test splits are scored once; blocks and rates were chosen on a hold-out of the training split."
        if frame["kind"].eq(ADAPTED).any():
            note += " LoRA adapts the backbone and uses the last blocks; all other kinds read frozen features."
    blocks = frame["blocks"].map(lambda blocks: ", ".join(map(str, blocks)), na_action="ignore")
    frame = frame.assign(kind=frame["kind"].map(kind_name), blocks=blocks)
    if len(known := set(blocks.dropna())) == 1 and "," not in known.pop():  # there was nothing to choose
        frame = frame.drop(columns=["blocks", "last_top1"])
    names = ["task", "kind", "size", "params_total", "images_seen", "val_loss", "top1", "top1_lo95", "top1_hi95"]
    names += ["last_top1", "chance", "ideal", "n", "blocks", "lr"]
    title = "Frozen-feature accuracy" if study.is_ours else "Accuracy"
    yield _share_block("probes", title, frame, names, note=note, is_open=False)


def _levels(study: Study, kind: str, rows: pd.DataFrame) -> pd.DataFrame:
    """List what accuracies of a kind may be compared with: the table's own baselines, and on its tasks the paper."""
    same = rows[["task", "n"]].drop_duplicates()
    theirs = read_baselines(study.frame)
    theirs = theirs[theirs["kind"].eq(kind) & (kind != ADAPTED)].rename(columns={"size": "name"})
    own = theirs.merge(same, on=["task", "n"]).reindex(columns=["task", "name", "top1"])
    own = own.drop_duplicates(["task", "name"]).sort_values("top1")
    shared = [task for task in same["task"].unique() if task in TASKS] if kind == PROTOCOL and study.is_ours else []
    paper = [
        {"task": task, "name": f"{key}, published", "top1": table6().loc[key, task]}
        for task in shared
        for key in dict.fromkeys(("aim-7B", best_frozen(task)))
    ]
    return pd.concat([own, pd.DataFrame(paper, columns=own.columns)], ignore_index=True)


def _share_block(key: str, title: str, frame: pd.DataFrame, names: list[str], note: str, is_open: bool = True) -> Block:
    """Lay out columns of a frame whose shares are told in per cent."""
    frame = frame[[name for name in dict.fromkeys(names) if name in frame and frame[name].notna().any()]]
    cells = [{described(head).heading: cell for head, cell in row.items()} for row in share_cells(frame)]
    return table_block(key, title, frame, cells=cells, note=note, is_open=is_open)


def _loss_accuracy(study: Study) -> Iterator[Part]:
    probes, found = study.probes, study.all("correlation of loss with")
    if probes.empty or "val_loss" not in probes or probes["val_loss"].isna().all():
        return
    for kind in study.kinds:
        rows = probes[probes["kind"] == kind]
        mine = {task: f"{task}:{kind}" for task in dict.fromkeys(rows["task"])}
        correlations, links = (
            {task: named[name] for task, name in mine.items() if name in named}
            for named in (found, study.all("link from loss to"))
        )
        caption = (
            f"{_capital(accuracy_of(kind))} and validation loss. Brackets: 95 % intervals of the correlations, "
            "at equal compute first; over all rows both follow compute. "
            "Line and band: a sigmoid above chance with its 95 % interval."
        )
        figure, title = plot_loss_accuracy(rows, correlations, links), f"Loss against {accuracy_of(kind)}"
        yield PageFigure(key=html_id("loss-accuracy", kind), title=title, caption=caption, figure=figure)
        for task, each in correlations.items() if kind == study.kinds[0] else ():  # figures show the others
            title = _correlation_verdict(f"{accuracy_of(kind)} on {task}", each)
            yield result_block(html_id("correlation", mine[task]), title, each, is_open=False)


def _correlation_verdict(what: str, found: Correlations) -> str:
    """Say whether loss and one task's accuracy go together at equal compute, or over all rows."""
    first, *_ = found
    how = f"lower validation loss goes with {'higher' if first.value < 0 else 'LOWER'} {what}"
    if not first.is_significant:
        how = f"no significant correlation of validation loss with {what}"
    place, ends = "At equal compute" if first.partial_on else "Over all rows", f"[{first.low:.2f}, {first.high:.2f}]"
    return f"{place} {how}: {first.value:.2f} {ends}"


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _training(study: Study) -> Iterator[Part]:
    curves = read_curves(study.paths if "run_id" in study.main else ())
    curves = curves[curves["run_id"].isin(study.main.get("run_id", []))].dropna(subset=["params_total"])
    if curves["val_loss"].isna().all():
        return
    probes = probe_frame(curves)
    budgets = complete(study.main).dropna(subset=["val_loss", "params_total"])
    figure = plot_curves(curves.dropna(subset="val_loss"), budgets, probes[probes["kind"].isin(study.kinds[:1])])
    caption = "Validation loss during training, before decays. Markers: budgets, each joined to where its decay began."
    caption = " ".join([caption, *map(str, plateau_flags(budgets))])
    yield PageFigure(key="curves", title="Training curves", caption=caption, figure=figure)


def _best_split(study: Study) -> Iterator[Part]:
    found = study.get("compute-optimal frontier")
    if found is None:
        return
    caption = "Lines: N* as a power of C, dotted beyond the measured compute. Shading: 95 % intervals."
    yield PageFigure(key="frontier", title="Compute-optimal size", caption=caption, figure=found.plot())
    gaps = [gap.sentence() for gap in study.all("best size by").values() if gap is not None]
    yield result_block("approaches", "How the best size grows", found, note=" ".join(gaps))


def _published(study: Study) -> Iterator[Part]:
    """Put the released AIMs beside these runs, on tasks of the paper read by its protocol, and baselines on any."""
    found = study.get("published models")
    if found is None or (found.tasks.empty and found.baselines.empty):
        return
    if len(tasks := found.tasks):
        if "params_total" in tasks:
            caption = (
                "Attentive probe, frozen features: these runs at their largest budgets, AIM on its last six blocks."
            )
            title = "Beside the published AIM models"
            yield PageFigure(key="published-models", title=title, caption=caption, figure=found.plot())
        note = (
            "Attentive probe on frozen features, top-1 in per cent; gaps are ours minus theirs. The last six blocks "
            "stand beside AIM-7B's last six, chosen ones beside its best six."
        )
        names = [str(name) for name in tasks if name not in ("top1_lo95", "top1_hi95")]
        yield _share_block("compare", "The same tasks, ours and theirs", tasks, ["task", *names], note)
    if len(frame := found.baselines):
        frame = frame.sort_values(["params_total", "task", "kind"], ascending=[False, True, True])
        seen = ["images_seen"] if varies(frame["images_seen"]) else []
        names = ["task", "kind", "size", "params_total", *seen, "n", "top1", "baseline", "baseline_top1", "gap"]
        names += ["gap_lo95", "gap_hi95", "p", "detectable", "verdict"]
        note = (
            "Each run at its largest budget and every baseline, on the same images, top-1 in per cent. Gap: ours minus "
            "the baseline's, with a 95 % interval over test images, not over seeds. It is paired where hits were kept "
            "(p: McNemar's exact test). Detectable: the minimum detectable gap at 80 % power."
        )
        title, frame = "Beside baselines on the same probes", frame.assign(kind=frame["kind"].map(kind_name))
        yield _share_block("baselines", title, frame, names, note)
    if lines := flag_words(found.left_out):
        yield Block(key="not-compared", title="Not compared, and why", lines=lines, is_open=False)


def _laws(study: Study) -> Iterator[Part]:
    """Lay out the forecasts, the left-out scales, the laws and the worth of repeats."""
    found, joint, worth = study.get("forecast"), study.get("law"), study.get("worth of repeats")
    if found is not None:
        yield result_block("forecasts", "Forecasts", found)
    if joint is not None and joint.heldout:
        points = [test.predictions.assign(left_out=f"largest {test.variable}") for test in joint.heldout]
        lines = [test.sentence() for test in joint.heldout]
        yield table_block("heldout", "Does the law extrapolate?", pd.concat(points, ignore_index=True), lines=lines)
    for key, fit in (("ND", joint), ("C", study.get("law of the envelope"))):
        if fit is not None:
            whose = f" {study.whose}" if study.whose else ""
            note = f"Rows{whose}{' that no cheaper row beats' * (key == 'C')}." if whose or key == "C" else ""
            facts = [(name, fact) for name, fact in fit.facts() if name != "law" and not name.startswith("held out ")]
            title = f"{fit.law.formula}, fitted to {fit.num_points} points"
            yield result_block(f"law-{key}", title, fit, note=note, facts=facts, is_open=key != "C")
    if worth is not None:
        title, sample = f"What repeated {worth.sample}s are worth", worth.sample
        note = f"{worth.fit.law.formula}. Worth of pass k, and of all k passes, in passes over new {sample}s."
        yield result_block("repeats", title, worth, note=note)


def _changes(study: Study) -> Iterator[Part]:
    """Tell single changes, beside those that the paper tried."""
    contrasts = study.all("contrast by")
    if contrasts:
        yield (
            "Each pair of runs agrees in size, seed, data and every other setting. Intervals are Student's: over sizes "
            "from three on, else over the pairs of runs at these sizes. Losses are in their unit, accuracies are "
            "fractions."
        )
    for name, found in contrasts.items():
        facts = [
            *found.facts(),
            *(("published", line.removeprefix("Paper: ")) for line in in_words(beside_paper(found))),
        ]
        yield result_block(html_id("contrast", name), f"Effect of {name}", found, facts=facts)


def _noise(study: Study) -> Iterator[Part]:
    found = study.get("noise")
    if found is None or (seen := found.table[found.table["value"] > LEAST_NOISE]).empty:
        return
    note = (
        "Standard deviation of the loss by source, as fractions of the loss, with 95 % intervals or ranges. What sizes "
        "share counts as their error in a law's intervals; it may be the law's misfit."
    )
    yield result_block("noise-parts", "Sources of spread", replace(found, table=seen), note=note)


def _pictures(study: Study) -> Iterator[Part]:
    rows = picture_rows(study)
    if rows:
        yield (
            "Held-out images. The model predicts each patch outside the prefix from the true patches before it. A "
            "prediction is shown with the true patch's mean and contrast, which the model does not predict."
        )
    yield from rows


def _methods(study: Study) -> Iterator[Part]:
    yield Block(key="settings", title="Settings and exclusions", facts=[*settings(study)], is_open=False)
    yield Block(key="provenance", title="Provenance", facts=[*provenance(study)], is_open=False)


SECTIONS: dict[str, tuple[str, str, Callable[[Study], Iterator[Part]]]] = {
    "runs": ("Runs and cost", "What was run and what it cost", _runs),
    "scaling": ("Scaling", "Loss against parameters, data and compute", _scaling),
    "accuracy": ("Accuracy", "Accuracy against parameters, data and compute", _accuracy),
    "linked": ("Loss and accuracy", "Loss against accuracy", _loss_accuracy),
    "training": ("Training curves", "Training curves", _training),
    "best-split": ("Best split", "The best split of compute", _best_split),
    "published": ("Published models", "Beside published models and baselines", _published),
    "laws": ("Laws", "Fitted laws", _laws),
    "changes": ("Single changes", "Single changes, everything else equal", _changes),
    "noise": ("Noise", "How much is noise", _noise),
    "pictures": ("Pictures", "Next-patch predictions", _pictures),
    "methods": ("Settings and provenance", "Settings and provenance", _methods),
}
"""Id -> name in the navigation, heading, and what lays the section out."""
