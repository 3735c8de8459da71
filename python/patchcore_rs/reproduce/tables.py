"""Our numbers beside the paper's: of every row and metric, by category and as means, and the tables of that."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from patchcore_rs._text import NOTHING, Table, figure, listing
from patchcore_rs.evaluation.judging import mean_metric
from patchcore_rs.reproduce import paper
from patchcore_rs.reproduce.experiments import STAGES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from patchcore_rs.reproduce.experiments import Experiment, Result
    from patchcore_rs.reproduce.studies import Group, Row, Study

    Results = Mapping[tuple[str, Experiment], Result]
    Found = Mapping[tuple[str, str, str, str], "Number"]

MEAN = "mean"

# The heading of each metric. Shares are in percent, as the paper has them; counts are summed over categories.
HEADINGS = {
    "image_auroc": "image\nAUROC",
    "pixel_auroc": "pixel\nAUROC",
    "pro": "\nPRO",
    "misclassified": "mis-\nclassified",
    "full_recall_false_alarms": "at full\nrecall",
    "seconds": "seconds\nan image",
    **{f"{stage}_ms": f"{stage}\nms" for stage in STAGES},
}
_KEPT_AUROC = 0.1  # points that approximate search may differ by and still count as one that keeps the AUROC
_COUNTS = frozenset({"misclassified", "full_recall_false_alarms"})


class Number(NamedTuple):
    """A metric of a row on a category, or as the mean: ours and the paper's, None where there is none.

    `categories` are how many of them ours is of.
    """

    group: str
    row: str
    category: str
    metric: str
    ours: float | None
    paper: float | None
    categories: int


def numbers(study: Study, results: Results, categories: Sequence[str]) -> list[Number]:
    """Every number of a study, row by row: by category, then the mean."""
    return [
        number
        for group in study.groups
        for row in group.rows
        for metric in study.columns
        for number in _of_row(group, row, metric, results, categories)
    ]


def _of_row(group: Group, row: Row, metric: str, results: Results, categories: Sequence[str]) -> list[Number]:
    found: dict[str, float] = {}
    for category in categories:
        values = [_value(results.get((category, experiment)), metric) for experiment in row.experiments]
        known = [value for value in values if value is not None]
        if known and len(known) == len(values):  # of all seeds, or of none
            found[category] = sum(known) / len(known)
    each = [
        Number(
            group.title,
            row.label,
            category,
            metric,
            found.get(category),
            row.by_category.get(category, {}).get(metric),
            int(category in found),
        )
        for category in categories
    ]
    total = sum(found.values())
    mean = None if not found else total if metric in _COUNTS else total / len(found)
    return [*each, Number(group.title, row.label, MEAN, metric, mean, row.paper.get(metric), len(found))]


def _value(result: Result | None, metric: str) -> float | None:
    if result is None:
        return None
    if metric == "seconds":
        return None if result.seconds is None else sum(result.seconds.values())
    if metric.endswith("_ms"):
        return None if result.seconds is None else 1e3 * result.seconds[metric.removesuffix("_ms")]
    value: float | None = getattr(result.metrics, metric)
    return value if value is None or metric in _COUNTS else 100 * value


def tables_of(study: Study, group: Group, found: Sequence[Number], categories: Sequence[str]) -> list[Table]:
    """The tables of a group: with a line a category where the study has such a one, then with a line a row.

    `found` are the study's `numbers`.
    """
    known = {number[:4]: number for number in found}
    made = [_by_category(study.by_category, group, known, categories)] if study.by_category else []
    return [*made, _means(study, group, known, categories)]


def _by_category(metric: str, group: Group, found: Found, categories: Sequence[str]) -> Table:
    """Categories downwards; ours, and the paper's where it has them, of every row that is measured."""
    columns, lines = ["category"], [[name] for name in (*categories, MEAN)]
    for row in group.rows:
        if not row.experiments:
            continue
        mine = [found[group.title, row.label, category, metric] for category in categories]
        columns.append(f"{row.label}\nours")
        _extend(lines, [number.ours for number in mine])
        if any(number.paper is not None for number in mine):
            columns.append("\npaper")
            _extend(lines, [number.paper for number in mine])
    return Table(
        f"{group.title}, by category",
        tuple(columns),
        tuple(map(tuple, lines)),
        words=("category",),
        totals=frozenset({len(categories)}),
        note=f"Percent; means are of the categories above that have the number. Paper: {paper.SOURCE}.",
    )


def _extend(lines: Sequence[list[str]], values: Sequence[float | None]) -> None:
    """A cell more for every line: the values, then their mean."""
    for line, value in zip(lines, (*values, mean_metric(values)), strict=True):
        line.append(_figure(value))


def _means(study: Study, group: Group, found: Found, categories: Sequence[str]) -> Table:
    """Rows downwards: their means, and beside them what the paper states of any row."""
    rows = _ranked(study, group, found) if study.ranked else group.rows
    stated = {metric for row in rows for metric in row.paper}
    columns, lines = [""], [[row.label] for row in rows]
    for metric in study.columns:
        mine = [found[group.title, row.label, MEAN, metric] for row in rows]
        columns.append(HEADINGS[metric])
        for line, number in zip(lines, mine, strict=True):
            line.append(_figure(number.ours, metric))
            if metric in stated:
                line.append(_figure(number.paper, metric))
        if metric in stated:
            columns.append("\npaper")
    return Table(
        group.title,
        tuple(columns),
        tuple(map(tuple, lines)),
        words=("",),
        note=" ".join(_notes(study, group, found, categories)),
    )


def _ranked(study: Study, group: Group, found: Found) -> list[Row]:
    """The rows by the mean of the study's first column, the largest first, those without it last."""

    def place(row: Row) -> float:
        mean = found[group.title, row.label, MEAN, study.columns[0]].ours
        return math.inf if mean is None else -mean

    return sorted(group.rows, key=place)


def best_row(study: Study, group: Group, found: Sequence[Number]) -> Row | None:
    """The row of a group whose mean of the study's first column is the largest; None where no row has one."""
    known = {number[:4]: number for number in found}
    best, *_ = _ranked(study, group, known)
    return None if known[group.title, best.label, MEAN, study.columns[0]].ours is None else best


def _notes(study: Study, group: Group, found: Found, categories: Sequence[str]) -> list[str]:
    means = ", means over categories; images are summed over them" if len(categories) > 1 else ""
    notes = [*([group.note] if group.note else []), f"AUROC and PRO are percent{means}."]
    if any(row.paper for row in group.rows) and study.name != "mtd" and set(categories) != set(paper.CATEGORIES):
        notes.append("The paper's are of the 15 categories of MVTec AD.")
    if any(not row.experiments and row.paper for row in group.rows):
        notes.append("What is cited was not measured here.")
    short = [
        row.label
        for row in group.rows
        if row.experiments and found[group.title, row.label, MEAN, study.columns[0]].categories < len(categories)
    ]
    if short:
        notes.append(f"Not of all categories: {listing(short)}.")
    if study.timed:
        notes += _verdict(group, found)
    return notes


def _verdict(group: Group, found: Found) -> list[str]:
    """Whether exact search in all patches beats approximate search in them, in a sentence; none without both."""
    values = [
        found[group.title, f"PatchCore 100 %{suffix}", MEAN, metric].ours
        for suffix in ("", " + IVFPQ")
        for metric in ("seconds", "image_auroc")
    ]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return []
    exact, auroc, approximate, approximate_auroc = known
    lost = auroc - approximate_auroc
    kept = f"within {_KEPT_AUROC} of each other" if abs(lost) <= _KEPT_AUROC else f"{abs(lost):.2f} apart"
    return [
        f"Exact search in all patches is {'faster' if exact < approximate else 'slower'} than IVFPQ: "
        f"{figure(1e3 * exact)} beside {figure(1e3 * approximate)} ms an image, at an image AUROC of {auroc:.2f} "
        f"beside {approximate_auroc:.2f}, {kept}."
    ]


def left_out(study: Study, failures: Mapping[tuple[str, Experiment], str]) -> list[tuple[str, str]]:
    """Rows without a number of ours, or with fewer than there are categories: each with the reason."""
    found: dict[tuple[str, str], None] = {}
    for group in study.groups:
        for row in group.rows:
            if row.missing:
                found[row.label, row.missing] = None
            for (category, experiment), reason in failures.items():
                if experiment in row.experiments:
                    found[f"{row.label}, {category}", reason] = None
    return list(found)


def _figure(value: float | None, metric: str = "") -> str:
    if value is None:
        return NOTHING
    if metric in _COUNTS:
        return f"{value:,.4g}"
    return figure(value) if metric.startswith("seconds") or metric.endswith("_ms") else f"{value:.2f}"
