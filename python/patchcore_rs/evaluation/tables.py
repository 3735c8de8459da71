"""Runs of an evaluation as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from patchcore_rs._text import NOTHING, Table, amount, count, figure, machine, share
from patchcore_rs.evaluation.judging import OF_MAPS, PRO_LIMIT, KindMetrics, Metrics, mean_metric
from patchcore_rs.model.settings import PatchCoreSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from patchcore_rs.evaluation.evaluate import Run
    from patchcore_rs.model.settings import Settings


_FEATURE_STAGES = ("backbone", "aggregation")
_INSPECT_STAGES = (*_FEATURE_STAGES, "scoring")
_HEADINGS = ("category", "core-\nset", "seed")
_MEANS = "Means are over categories and seeds; misclassified are summed over categories."
_SIZES = {"mask": "those of the masks", "model": "those that the model sees, after resize and crop"}


class Column(NamedTuple):
    """A metric in the table of `quality_table`."""

    heading: str
    cell: Callable[[Metrics], str]
    note: str = ""


def _share(name: str) -> Callable[[Metrics], str]:
    return lambda metrics: share(getattr(metrics, name))


def _interval(metrics: Metrics) -> str:
    return NOTHING if metrics.image_auroc_interval is None else "{:.3f}-{:.3f}".format(*metrics.image_auroc_interval)


def _mistakes(metrics: Metrics) -> str:
    if metrics.misclassified is None:
        return NOTHING
    return f"{metrics.misclassified} ({metrics.false_alarms} + {metrics.misses})"


# By the name that the JSON has.
COLUMNS = {
    "image_auroc": Column("image\nAUROC", _share("image_auroc")),
    "image_auroc_interval": Column(
        "its 95 %\ninterval",
        _interval,
        "The interval says what other images of these kinds may give (DeLong).",
    ),
    "image_average_precision": Column("image\nAP", _share("image_average_precision")),
    "part_auroc": Column("part\nAUROC", _share("part_auroc"), "A part has the largest score of its images."),
    "pixel_auroc": Column("pixel\nAUROC", _share("pixel_auroc")),
    "pixel_average_precision": Column("pixel\nAP", _share("pixel_average_precision")),
    "pixel_f1": Column("pixel\nF1", _share("pixel_f1"), "Pixel F1 is the largest of all thresholds."),
    "pro": Column("\nPRO", _share("pro")),
    "aupimo": Column(
        "\nAUPIMO", _share("aupimo"), "AUPIMO: the mean over flawed images, false positive rates from 1e-5 to 1e-4."
    ),
    "misclassified": Column(
        "mis-\nclassified",
        _mistakes,
        "Misclassified at the F1-optimal threshold, in brackets false alarms + misses.",
    ),
    "full_recall_false_alarms": Column(
        "at full\nrecall",
        lambda metrics: count(metrics.full_recall_false_alarms),
        "At full recall: false alarms at the highest threshold that misses nothing.",
    ),
}
DEFAULT = ("image_auroc", "image_auroc_interval", "pixel_auroc", "pro", "misclassified", "full_recall_false_alarms")
_COUNTS = frozenset({"misclassified", "full_recall_false_alarms"})


@dataclass(frozen=True)
class Row:
    """What is kept of a run: its numbers, without scores and maps. Times are milliseconds an image, by stage.

    `method` is the name in model files, "patchcore"; `coreset` is None for other methods too.
    """

    category: str
    method: str
    coreset: float | None
    seed: int
    metrics: Metrics
    kinds: tuple[KindMetrics, ...]
    bank_rows: int | None
    channels: int | None
    fit_ms: dict[str, float]
    inspect_ms: dict[str, float]

    @classmethod
    def of(cls, run: Run) -> Row:
        """The row of a run."""
        tested_on = len(run.inspection.scores)
        bank_rows, channels = run.bank or (None, None)
        return cls(
            run.inspection.name,
            run.settings.method,
            getattr(run.settings, "coreset", None),
            run.settings.seed,
            run.metrics,
            run.kinds,
            bank_rows,
            channels,
            {stage: 1e3 * spent / run.trained_on for stage, spent in run.fit_seconds.items() if stage != "scoring"},
            {stage: 1e3 * run.inspect_seconds.get(stage, 0.0) / tested_on for stage in _INSPECT_STAGES},
        )

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        return asdict(self) | {"metrics": self.metrics.to_json()}


def quality_table(rows: Sequence[Row], names: Sequence[str] = DEFAULT) -> Table:
    """How well each run tells good from anomalous; and the mean of each coreset over categories and seeds.

    `names` are the columns, some of `COLUMNS`.
    """
    coresets = list(dict.fromkeys((row.method, row.coreset) for row in rows))
    groups = [[row for row in rows if (row.method, row.coreset) == coreset] for coreset in coresets]
    means = [_mean(group, names) for group in groups if len(group) > 1]
    return Table(
        "How well flaws are found",
        (
            *_HEADINGS,
            "good",
            "anom-\nalous",
            *(COLUMNS[name].heading for name in names),
        ),
        (*(_quality(row, names) for row in rows), *means),
        words=("category",),
        totals=frozenset(range(len(rows), len(rows) + len(means))),
        note=" ".join((*_notes(rows, names), *([_MEANS] if means else []))),
    )


def _notes(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    notes = [COLUMNS[name].note for name in names if COLUMNS[name].note]
    pixels = {row.metrics.pixels for row in rows} - {None}
    if pixels and not set(OF_MAPS).isdisjoint(names):
        notes += [f"Pixels are {_SIZES[size]}." for size in sorted(filter(None, pixels))]
    limits = {row.metrics.fpr_limit for row in rows}
    if "pro" in names and limits != {PRO_LIMIT}:
        notes += [f"PRO up to a false positive rate of {limit:g}." for limit in sorted(limits)]
    values = [[getattr(row.metrics, name) is None for row in rows] for name in names]
    if any(any(lacking) and not all(lacking) for lacking in values):
        notes.append("A mean is of the rows that have the number.")
    return notes


def time_table(rows: Sequence[Row]) -> Table:
    """Where the time goes: milliseconds an image by stage."""

    def cells(row: Row) -> tuple[str, ...]:
        fitting = [row.fit_ms[stage] for stage in _FEATURE_STAGES]
        fitting.append(sum(row.fit_ms.values()) - sum(fitting))  # all that the method does with features
        inspecting = [row.inspect_ms[stage] for stage in _INSPECT_STAGES]
        times = (*fitting, sum(fitting), *inspecting, sum(inspecting))
        return *_heads(row), count(row.bank_rows), *map(figure, times)

    learning = "\ncore-\nset" if all(row.method == PatchCoreSettings.method for row in rows) else "\n\nmodel"
    return Table(
        "Milliseconds an image, by stage",
        (
            *_HEADINGS,
            "bank\nrows",
            *("fit:\nback-\nbone", "\naggre-\ngation", learning, "fit:\n\nall"),
            *("inspect:\nback-\nbone", "\naggre-\ngation ", "\n\nscoring", "inspect:\n\nall"),
        ),
        tuple(map(cells, rows)),
        words=("category",),
        note=f"Fit: an image trained on. Inspect: an image tested. Reading is part of backbone. {machine()}",
    )


def describe(settings: Settings, backbone: str, summary: str) -> list[tuple[str, str]]:
    """The choices that decide the numbers, in words."""
    shared = [
        ("Backbone", f"{backbone}, layers {', '.join(settings.layers) or 'its own'}"),
        ("Images", f"resize {settings.resize}, crop {settings.crop}, {_levels(settings)}"),
    ]
    maps = f"map {settings.upsampling}, sigma {settings.sigma:g}"
    if not isinstance(settings, PatchCoreSettings):
        return [*shared, ("Method", f"{settings.method}: {summary}, {maps}"), ("Profile", settings.profile)]
    standardized = ", standardised" if settings.standardize else ""
    score = "Eq. 6" if settings.reweight in (None, 1) else f"Eq. 7, b = {settings.reweight}"
    return [
        *shared,
        ("Patch feature", f"{settings.patch_size} x {settings.patch_size}, {settings.embedding}{standardized}"),
        ("Memory bank", f"{settings.coreset_method} coreset {amount(settings.coreset)}, seed {settings.seed}"),
        ("Score", f"{settings.distance} distance, {score}; {maps}"),
        ("Profile", settings.profile),
    ]


def _levels(settings: Settings) -> str:
    ranged = "" if settings.value_range is None else f", values {settings.value_range}"
    return f"white {settings.white_level}{ranged}"


def _quality(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    metrics = row.metrics
    # Where there is no number stands why.
    cells = (metrics.reasons.get(name, COLUMNS[name].cell(metrics)) for name in names)
    return (*_heads(row), count(metrics.good), count(metrics.anomalous), *cells)


def _heads(row: Row) -> tuple[str, str, str]:
    return row.category, _coreset(row), str(row.seed)


def _coreset(row: Row) -> str:
    return amount(row.coreset) if row.method == PatchCoreSettings.method else NOTHING


def _mean(rows: Sequence[Row], names: Sequence[str]) -> tuple[str, ...]:
    """The mean of rows of one coreset."""
    seeds = len({row.seed for row in rows})
    every = [row.metrics for row in rows]

    def total(values: Iterable[int | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / seeds:.4g}" if known else NOTHING

    def mean(name: str) -> str:
        values = [getattr(metrics, name) for metrics in every]
        if name in _COUNTS:
            return total(values)
        return NOTHING if name == "image_auroc_interval" else share(mean_metric(values))

    return (
        "mean",
        _coreset(rows[0]),
        f"{seeds} seeds" if seeds > 1 else str(rows[0].seed),
        total(metrics.good for metrics in every),
        total(metrics.anomalous for metrics in every),
        *map(mean, names),
    )
