"""Runs of an evaluation as tables and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from patchcore_rs._text import NOTHING, Table, amount, count, figure, machine, share
from patchcore_rs.evaluation.judging import KindMetrics, Metrics, mean_metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from patchcore_rs.evaluation.evaluate import Run
    from patchcore_rs.model.settings import Settings


_FIT_STAGES = ("backbone", "aggregation", "coreset")
_INSPECT_STAGES = ("backbone", "aggregation", "scoring")
_HEADINGS = ("category", "core-\nset", "seed")


@dataclass(frozen=True)
class Row:
    """What is kept of a run: its numbers, without scores and maps. Times are milliseconds an image, by stage."""

    category: str
    coreset: float | None
    seed: int
    metrics: Metrics
    kinds: tuple[KindMetrics, ...]
    bank_rows: int
    channels: int
    fit_ms: dict[str, float]
    inspect_ms: dict[str, float]

    @classmethod
    def of(cls, run: Run) -> Row:
        """The row of a run."""
        tested_on = len(run.inspection.scores)
        return cls(
            run.inspection.name,
            run.settings.coreset,
            run.settings.seed,
            run.metrics,
            run.kinds,
            *run.bank,
            {stage: 1e3 * run.fit_seconds.get(stage, 0.0) / run.trained_on for stage in _FIT_STAGES},
            {stage: 1e3 * run.inspect_seconds.get(stage, 0.0) / tested_on for stage in _INSPECT_STAGES},
        )

    def to_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        answer = asdict(self)
        answer["metrics"]["misclassified"] = self.metrics.misclassified
        return answer


def quality_table(rows: Sequence[Row]) -> Table:
    """How well each run tells good from anomalous; and the mean of each coreset over categories and seeds."""
    coresets = list(dict.fromkeys(row.coreset for row in rows))
    groups = [[row for row in rows if row.coreset == coreset] for coreset in coresets]
    means = [_mean(group) for group in groups if len(group) > 1]
    return Table(
        "How well flaws are found",
        (
            *_HEADINGS,
            "good",
            "anom-\nalous",
            "image\nAUROC",
            "pixel\nAUROC",
            "\nPRO",
            "mis-\nclassified",
            "at full\nrecall",
        ),
        (*map(_quality, rows), *means),
        words=("category",),
        totals=frozenset(range(len(rows), len(rows) + len(means))),
        note="Misclassified at the F1-optimal threshold, in brackets false alarms + misses. At full recall: false "
        "alarms at the highest threshold that misses nothing."
        + (" Means are over categories and seeds; misclassified are summed over categories." if means else ""),
    )


def time_table(rows: Sequence[Row]) -> Table:
    """Where the time goes: milliseconds an image by stage."""

    def cells(row: Row) -> tuple[str, ...]:
        fitting = [row.fit_ms[stage] for stage in _FIT_STAGES]
        inspecting = [row.inspect_ms[stage] for stage in _INSPECT_STAGES]
        times = (*fitting, sum(fitting), *inspecting, sum(inspecting))
        return *_heads(row), count(row.bank_rows), *map(figure, times)

    return Table(
        "Milliseconds an image, by stage",
        (
            *_HEADINGS,
            "bank\nrows",
            *("fit:\nback-\nbone", "\naggre-\ngation", "\ncore-\nset", "fit:\n\nall"),
            *("inspect:\nback-\nbone", "\naggre-\ngation ", "\n\nscoring", "inspect:\n\nall"),
        ),
        tuple(map(cells, rows)),
        words=("category",),
        note=f"Fit: an image trained on. Inspect: an image tested. Reading is part of backbone. {machine()}",
    )


def describe(settings: Settings, backbone: str) -> list[tuple[str, str]]:
    """The choices that decide the numbers, in words."""
    standardized = ", standardised" if settings.standardize else ""
    score = "Eq. 6" if settings.reweight in (None, 1) else f"Eq. 7, b = {settings.reweight}"
    return [
        ("Backbone", f"{backbone}, layers {', '.join(settings.layers) or 'its own'}"),
        ("Images", f"resize {settings.resize}, crop {settings.crop}, {_levels(settings)}"),
        ("Patch feature", f"{settings.patch_size} x {settings.patch_size}, {settings.embedding}{standardized}"),
        ("Memory bank", f"{settings.coreset_method} coreset {amount(settings.coreset)}, seed {settings.seed}"),
        ("Score", f"{settings.distance} distance, {score}; map {settings.upsampling}, sigma {settings.sigma:g}"),
        ("Profile", settings.profile),
    ]


def _levels(settings: Settings) -> str:
    ranged = "" if settings.value_range is None else f", values {settings.value_range}"
    return f"white {settings.white_level}{ranged}"


def _quality(row: Row) -> tuple[str, ...]:
    metrics = row.metrics
    mistakes = NOTHING
    if metrics.misclassified is not None:
        mistakes = f"{metrics.misclassified} ({metrics.false_alarms} + {metrics.misses})"
    return (
        *_heads(row),
        count(metrics.good),
        count(metrics.anomalous),
        share(metrics.image_auroc),
        share(metrics.pixel_auroc),
        share(metrics.pro),
        mistakes,
        count(metrics.full_recall_false_alarms),
    )


def _heads(row: Row) -> tuple[str, str, str]:
    return row.category, amount(row.coreset), str(row.seed)


def _mean(rows: Sequence[Row]) -> tuple[str, ...]:
    """The mean of rows of one coreset."""
    seeds = len({row.seed for row in rows})

    def total(values: Iterable[int | None]) -> str:
        known = [value for value in values if value is not None]
        return f"{sum(known) / seeds:.4g}" if known else NOTHING

    every = [row.metrics for row in rows]
    return (
        "mean",
        amount(rows[0].coreset),
        f"{seeds} seeds" if seeds > 1 else str(rows[0].seed),
        total(metrics.good for metrics in every),
        total(metrics.anomalous for metrics in every),
        share(mean_metric(metrics.image_auroc for metrics in every)),
        share(mean_metric(metrics.pixel_auroc for metrics in every)),
        share(mean_metric(metrics.pro for metrics in every)),
        total(metrics.misclassified for metrics in every),
        total(metrics.full_recall_false_alarms for metrics in every),
    )
