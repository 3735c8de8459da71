"""What `progress=` may be on every long call: nothing, a function, or True for a bar on stderr."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from patchcore_rs import StreamingCoreset, coreset_for_radius, greedy_coreset
from patchcore_rs._progress import STAGES, bars, reporting, reporting_rows

ROWS = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)

CALLS = {
    "greedy_coreset": lambda progress, rows=ROWS: greedy_coreset(rows, 50, progress=progress),
    "coreset_for_radius": lambda progress, rows=ROWS: coreset_for_radius(rows, 2.0, progress=progress),
    "add": lambda progress, rows=ROWS: StreamingCoreset(50).add(rows, progress=progress),
    "finish": lambda progress: StreamingCoreset(50).add(ROWS).finish(progress=progress),
}


@pytest.mark.parametrize("call", CALLS)
def test_true_draws_a_bar_that_stays(call, capsys):
    CALLS[call](True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("taking in rows" if call == "add" else "selecting the coreset")
    assert captured.err.count("100%") == len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("nobody", [None, False])
def test_none_and_false_draw_nothing(call, nobody, capsys):
    CALLS[call](nobody)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("call", ["greedy_coreset", "coreset_for_radius", "add"])
@pytest.mark.parametrize("wrong", [1, "yes", [], np.True_])
def test_anything_else_is_refused_before_any_work(call, wrong):
    class Untouched:
        def __array__(self, *_, **__):
            raise AssertionError("the features are read")

    message = f"progress must be None, True or callable as progress(done, total); got {wrong!r}"
    with pytest.raises(TypeError) as caught:
        CALLS[call](wrong, Untouched())
    assert str(caught.value) == message


def test_a_call_that_fails_draws_nothing(capsys):
    with pytest.raises(ValueError, match="at most the 3000 rows"):
        greedy_coreset(ROWS, 3001, progress=True)
    assert capsys.readouterr() == ("", "")


def test_stages_are_reported_to_whoever_listens(capsys):
    heard = []
    with reporting(lambda *step: heard.append(step)) as report:
        report("features", 1, 2)
    assert heard == [("features", 1, 2)]
    for nobody in (None, False):
        with reporting(nobody) as report:
            assert report is None
        with reporting_rows(nobody, "rows", 3) as report:
            assert report is None
    assert capsys.readouterr() == ("", "")
    with reporting(True) as report:
        for stage in STAGES:
            report(stage, 1, 2)
            report(stage, 2, 2)
        report("packing", 3, None)
    drawn = capsys.readouterr().err
    assert [drawn.count(label) for label in (*STAGES.values(), "packing")] == [1] * (len(STAGES) + 1)
    assert drawn.count("2/2") == len(STAGES)
    with (
        pytest.raises(TypeError, match=r"None, True or callable as progress\(stage, done, total\); got 1"),
        reporting(1),
    ):
        raise AssertionError("work has begun")


def test_the_call_ends_with_what_the_function_raises():
    with pytest.raises(KeyboardInterrupt), reporting(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)) as report:
        report("features", 1, 2)


def test_a_terminal_shows_the_finished_bar_last_unless_it_is_transient():
    for transient in (False, True):
        console = Console(file=io.StringIO(), force_terminal=True, width=80)
        with bars({}, prefix="metal: ", console=console, transient=transient) as advance:
            advance("\x1b[31mred", 5, 5)
        text = console.file.getvalue()
        assert "metal: \\x1b[31mred" in text
        assert text.endswith("\x1b[2K") == transient


def test_rich_is_imported_for_a_bar_only():
    code = (
        "import sys, numpy as np; from patchcore_rs import greedy_coreset\n"
        "rows = np.random.default_rng(0).normal(size=(50, 3))\n"
        "for progress in (None, False, print, True):\n"
        "    greedy_coreset(rows, 5, progress=progress); print('rich' in sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    said = [line for line in result.stderr.splitlines() if line in ("True", "False")]
    assert said == ["False", "False", "False", "True"]
