"""The page of a reproduction: tables, and charts of the groups that have an axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchcore_rs.report.charts import lines
from patchcore_rs.report.page import Report
from patchcore_rs.reproduce.studies import QUALITY
from patchcore_rs.reproduce.tables import HEADINGS, MEAN, numbers, tables_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from patchcore_rs._text import Table
    from patchcore_rs.reproduce.studies import Group, Study
    from patchcore_rs.reproduce.tables import Number, Results


def write_page(
    path: Path,
    title: str,
    studies: Iterable[Study],
    results: Results,
    categories: Sequence[str],
    *,
    left_out: Iterable[Table],
    facts: Iterable[tuple[str, str]],
    mistakes: Sequence[str],
) -> None:
    """Write the page of these studies; `left_out` the table of what is missing, if any, `facts` how all was made.

    `mistakes` are the paths, from this page, of pages that picture mistakes.
    """
    report = Report(title)
    for study in studies:
        found = numbers(study, results, categories)
        for group in study.groups:
            for table in tables_of(study, group, found, categories):
                report.add_table(table)
            drawn = _charts(group, found) if group.axis else []
            if drawn:
                report.add_charts(drawn)
    for table in left_out:
        report.add_table(table)
    if mistakes:
        report.add_pages("Mistakes in pictures", mistakes)
    for name, value in facts:
        report.add_fact(name, value)
    report.write(path)


def _charts(group: Group, found: Sequence[Number]) -> list[tuple[str, str]]:
    """A chart for each metric, a line for each series; none of a metric that no row has."""
    ticks = {row.x: row.tick for row in group.rows if row.x is not None and row.tick}
    means = {(each.row, each.metric): each.ours for each in found if (each.group, each.category) == (group.title, MEAN)}
    drawn = []
    for metric in QUALITY:
        series: dict[str, list[tuple[float, float]]] = {}
        for row in group.rows:
            value = means.get((row.label, metric))
            if value is not None and row.x is not None:
                series.setdefault(row.series, []).append((row.x, value))
        if series:
            heading = f"{HEADINGS[metric]} in percent".replace("\n", " ").strip()
            said = f"{heading} against {group.axis}"
            drawn.append((heading, lines(series, group.axis, said, ticks=ticks, logarithmic=group.logarithmic)))
    return drawn
