"""The HTML report of an evaluation."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from patchcore_rs._text import machine
from patchcore_rs.evaluation.tables import describe
from patchcore_rs.images.levels import Levels
from patchcore_rs.images.pixels import read_as_seen
from patchcore_rs.report.page import Report

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from patchcore_rs._text import Table
    from patchcore_rs.evaluation.evaluate import Run


_ORIGIN = "F1-optimal on these images"


class EvaluationReport:
    """The HTML report of an evaluation: the tables, and a gallery for each run added."""

    def __init__(self, title: str, *, sections: int) -> None:
        """Expect `sections` runs."""
        self._report = Report(f"Evaluation on {title}", sections=sections)
        self._described = False

    def add(self, run: Run, note: str = "") -> None:
        """A section for the run, images and all."""
        settings = run.settings
        self._report.add_inspection(
            run.inspection,
            run.metrics.threshold,
            partial(
                read_as_seen,
                resize=settings.resize,
                crop=None,
                levels=Levels.of(settings),
            ),
            origin=_ORIGIN,
            note=note,
        )
        if not self._described:
            for name, value in describe(settings, run.backbone, run.summary):
                self._report.add_fact(name, value)
            self._report.add_fact("Software", machine())
            self._described = True

    def write(self, path: Path, tables: Iterable[Table]) -> None:
        """Write the page with the tables on top."""
        for table in tables:
            self._report.add_table(table)
        self._report.write(path)
