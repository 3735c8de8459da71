"""Progress of long calls: what `progress=` may be, and the bars on stderr that `progress=True` draws."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from patchcore_rs._text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from rich.console import Console

    from patchcore_rs._types import Progress, RowProgress

# What people read for the stages of a detector.
STAGES: Mapping[str, str] = {
    "features": "looking at images",
    "test features": "looking at test images",
    "coreset": "selecting the coreset",
    "model": "learning",
    "scale": "finding the scale",
    "scores": "inspecting",
    "metrics": "judging",
}


def require_progress(progress: object, form: str = "progress(done, total)") -> None:
    """Refuse a `progress` that is neither None, a bool nor callable, as `form` says.

    Raises:
        TypeError: it is none of these.
    """
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(f"progress must be None, True or callable as {form}; got {progress!r:.80}")


@contextmanager
def reporting(
    progress: Progress | bool | None,  # noqa: FBT001 - what the caller was given
    *,
    stages: Mapping[str, str] = STAGES,
) -> Iterator[Progress | None]:
    """What a call in stages reports to: the caller's function, bars under the names in `stages`, or nobody, None.

    Enter it before any work: that is where `progress` is checked. On leaving, finished bars stay on the screen.

    Raises:
        TypeError: `progress` is neither None, a bool nor callable.
    """
    require_progress(progress, "progress(stage, done, total)")
    if progress is True:
        with bars(stages) as advance:
            yield advance
    else:
        yield None if isinstance(progress, bool) else progress


@contextmanager
def reporting_rows(
    progress: RowProgress | bool | None,  # noqa: FBT001 - what the caller was given
    label: str,
    total: int,
) -> Iterator[RowProgress | None]:
    """As `reporting`, for a call without stages: its bar is called `label`, and the call takes `total` at most."""
    require_progress(progress)
    if progress is True:
        with bars({}, counts=False) as advance:
            advance(label, 0, total)  # a short call may report nothing
            yield lambda done, total: advance(label, done, total)
            advance(label, total, total)
    else:
        yield None if isinstance(progress, bool) else progress


@contextmanager
def bars(
    stages: Mapping[str, str],
    *,
    prefix: str = "",
    counts: bool = True,
    console: Console | None = None,
    transient: bool = False,
) -> Iterator[Progress]:
    """Bars that move with calls of (stage, done, total), one a stage; `transient` ones vanish on leaving.

    They are drawn on `console`, by default on stderr, from the first call on, with their `counts` or a percentage.
    A stage that is not in `stages` is shown by its own name.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Drawing

    drawing = Drawing(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn() if counts else TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console or Console(stderr=True, highlight=False, markup=False, emoji=False),
        transient=transient,
    )
    tasks: dict[str, TaskID] = {}

    def advance(stage: str, done: int, total: int | None) -> None:
        if not tasks:
            drawing.start()
        if stage not in tasks:
            tasks[stage] = drawing.add_task(printable(prefix + stages.get(stage, stage)))
        drawing.update(tasks[stage], completed=done, total=total)

    try:
        yield advance
    finally:
        if tasks:
            drawing.stop()
