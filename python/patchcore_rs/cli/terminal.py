"""What the command line says: tables and results on stdout, progress and remarks on stderr, errors in one line.

stdout holds the answer and nothing else, so it can be piped; progress shows only where stderr is a terminal.
"""

from __future__ import annotations

import contextlib
import csv
import json
import sys
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from patchcore_rs._progress import STAGES, bars
from patchcore_rs._text import Table, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from patchcore_rs._types import Progress

_TABLE_WIDTH = 500


class _Stdout(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the program what a reader that has gone means; rich would exit with 1."""
        raise BrokenPipeError


class Terminal:
    """Where a command writes. `quiet` silences progress and remarks, never results or errors."""

    def __init__(self, *, quiet: bool = False) -> None:
        """Write to what stdout and stderr are now."""
        self._quiet = quiet
        self._out = _Stdout(file=sys.stdout, highlight=False, markup=False, emoji=False)
        # A row too long for the terminal goes on in the next line; a figure is never cut.
        self._wide = _Stdout(file=sys.stdout, highlight=False, markup=False, emoji=False, width=_TABLE_WIDTH)
        self._err = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)

    def say(self, text: str) -> None:
        """A line of the answer."""
        self._out.print(Text(printable(text)), soft_wrap=True)

    def remark(self, text: str) -> None:
        """A line beside the answer."""
        if not self._quiet:
            self._err.print(Text(printable(text)), soft_wrap=True)

    def table(self, table: Table) -> None:
        """A table of the answer."""
        drawn = RichTable(
            box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False, show_header=any(table.columns)
        )
        if table.title:
            self._out.print(Text(printable(table.title)), style="bold")
        for column in table.columns:
            words = column in table.words
            heading = Text("\n".join(map(printable, column.split("\n"))))
            drawn.add_column(heading, justify="left" if words else "right", no_wrap=True)
        for i, row in enumerate(table.rows):
            if i not in table.totals and i - 1 in table.totals:
                drawn.add_section()
            drawn.add_row(*(Text(printable(cell)) for cell in row), style="bold" if i in table.totals else None)
        self._wide.print(drawn)
        if table.note:
            self._out.print(Text(printable(table.note)), style="dim")
        self._out.print()

    def json(self, answer: dict[str, Any]) -> None:
        """The whole answer as one JSON object; NaN and infinity have no place in it."""
        sys.stdout.write(json.dumps(answer, indent=2, allow_nan=False) + "\n")

    def csv(self, rows: Iterable[Sequence[object]]) -> None:
        """Rows of CSV, out at once: whoever reads them need not wait, and no failure takes them back."""
        csv.writer(sys.stdout, lineterminator="\n").writerows(rows)
        sys.stdout.flush()

    @contextlib.contextmanager
    def progress(self, prefix: str = "") -> Iterator[Progress]:
        """Bars that move with calls of (stage, done, total), one a stage; silent unless stderr is a terminal."""
        # FORCE_COLOR makes rich call a file a terminal, and a log has no use for bars that move.
        if self._quiet or not (self._err.is_terminal and self._err.file.isatty()):
            yield lambda *_: None
            return
        with bars(STAGES, prefix=prefix, console=self._err, transient=True) as advance:
            yield advance
