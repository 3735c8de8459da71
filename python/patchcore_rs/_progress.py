"""Progress of long calls: what `progress=` may be, and the bars on stderr, or in a notebook, of `progress=True`."""

from __future__ import annotations

import io
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from patchcore_rs._text import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from rich.console import Console

    from patchcore_rs._types import Progress, RowProgress

_PAUSE = 0.1  # seconds between two pictures of the bars in a notebook

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

    They are drawn on `console`, by default on stderr or below the cell of a notebook, from the first call on, with
    their `counts` or a percentage. On what is no terminal only finished bars are drawn, when they are left.
    A stage that is not in `stages` is shown by its own name.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Drawing

    show = _below_cell() if console is None else None
    drawing = Drawing(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn() if counts else TaskProgressColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console or _console(hidden=show is not None),
        transient=transient,
    )
    tasks: dict[str, TaskID] = {}
    shown = 0.0

    def advance(stage: str, done: int, total: int | None) -> None:
        nonlocal shown
        if not tasks and show is None:
            drawing.start()
        if stage not in tasks:
            tasks[stage] = drawing.add_task(printable(prefix + stages.get(stage, stage)))
        drawing.update(tasks[stage], completed=done, total=total)
        if show is not None and (done == total or time.monotonic() - shown > _PAUSE):
            with drawing.console.capture() as picture:
                drawing.console.print(drawing.get_renderable())
            show(picture.get())
            shown = time.monotonic()

    try:
        yield advance
    finally:
        if tasks and show is None:
            drawing.stop()


def _console(*, hidden: bool) -> Console:
    """stderr, or nothing where it is `hidden`. FORCE_COLOR makes rich call a file a terminal, and it is none."""
    from rich.console import Console

    terminal = sys.stderr is not None and sys.stderr.isatty()
    return Console(
        file=io.StringIO() if hidden else None,
        stderr=not hidden,
        force_terminal=None if terminal and not hidden else False,
        force_jupyter=False,
        highlight=False,
        markup=False,
        emoji=False,
    )


def _below_cell() -> Callable[[str], object] | None:
    """What shows a text below the cell of a notebook, in place of the one before; None outside of one.

    rich itself would need ipywidgets.
    """
    ipython = sys.modules.get("IPython")
    if ipython is None or not hasattr(ipython.get_ipython(), "kernel"):
        return None
    handle = sys.modules["IPython.display"].display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)
