"""Tables and figures as text, the same in the terminal and in the HTML report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patchcore_rs._version import __version__, build_info

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTHING = "-"


@dataclass(frozen=True)
class Table:
    """Cells of text under `columns`; those named in `words` are set flush left, the others are figures.

    A newline in a column's name is where its heading may break. `totals` are the indices of rows that sum up others.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: tuple[str, ...] = ()
    totals: frozenset[int] = frozenset()
    note: str = ""


def printable(text: str) -> str:
    """`text` with control, bidirectional and undecodable characters spelled out: file names come from strangers."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def share(value: float | None) -> str:
    """A metric in [0, 1] with the digits results tables carry."""
    return NOTHING if value is None else f"{value:.4f}"


def count(value: int | None) -> str:
    """A whole number with its thousands set apart."""
    return NOTHING if value is None else f"{value:,}"


def figure(value: float | None, digits: int = 3) -> str:
    """`value` to `digits` significant digits, without an exponent where it is of everyday size."""
    if value is None:
        return NOTHING
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    leading = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(digits - 1 - leading, 0)}f}"


def told_apart(value: float, other: float) -> tuple[str, str]:
    """Both values with as many digits as it takes to see which is larger, three at least."""
    for digits in range(3, 17):
        pair = figure(value, digits), figure(other, digits)
        if value == other or pair[0] != pair[1]:
            break
    return pair


def listing(names: Sequence[str], conjunction: str = "and") -> str:
    """a, b and c."""
    return f" {conjunction} ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def shortened(names: Sequence[object], most: int = 3) -> str:
    """a, b, c and 4 more."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def amount(coreset: float | None) -> str:
    """A coreset in words."""
    return "all" if coreset is None else f"{coreset:g}" if isinstance(coreset, float) else f"{coreset:,}"


def machine(threads: int | None = None) -> str:
    """What times were measured on, by so many threads; None for as many as there are by default."""
    build = build_info()
    return f"patchcore-rs {__version__}, {build['simd']}, {counted(threads or build['threads'], 'thread')}."
