"""`patchcore-rs evaluate` and `reproduce`: measure quality and speed on known flaws, freely or as the paper did."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

from patchcore_rs._version import build_info
from patchcore_rs.cli.options import PATCHCORE, require_folder
from patchcore_rs.cli.program import PROGRAM, first_words, kept
from patchcore_rs.cli.terminal import Terminal
from patchcore_rs.images.datasets import describe
from patchcore_rs.images.files import ImageError
from patchcore_rs.images.layouts import find_categories, load_dataset
from patchcore_rs.model.file import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from patchcore_rs.detector.base import Detector
    from patchcore_rs.evaluation.evaluate import Run
    from patchcore_rs.evaluation.judging import Pixels
    from patchcore_rs.images.datasets import Dataset


def evaluate(
    dataset_root: Path,
    method: str,
    arguments: dict[str, Any],
    *,
    categories: Sequence[str],
    layout: str,
    good: Sequence[str],
    masks: str | None,
    ignore: int | None,
    coresets: Sequence[float | None],
    seeds: Sequence[int],
    report: Path | None,
    strict: bool,
    pixels: Pixels,
    fpr_limit: float,
    metrics: Sequence[str],
    skip_unreadable: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fit a detector of the method to every category with every coreset and seed, inspect, judge."""
    if arguments.get("normalize"):
        raise ValueError("--normalize needs a calibrated model, and evaluate does not calibrate: leave it out")
    names: dict[str, Any] = {"good": good or None, "masks": masks}
    chosen = [
        load_dataset(dataset_root, layout=layout, category=category, ignore=ignore, **names)
        for category in _categories(dataset_root, categories, names)
    ]
    for dataset in chosen:
        if not dataset.test:
            raise ValueError(f"{dataset_root}: {dataset.name} has no test images to evaluate on")
    if report is not None:
        require_folder(report)
    from patchcore_rs.evaluation import tables as results
    from patchcore_rs.report.evaluation import EvaluationReport

    terminal = Terminal(quiet=quiet)
    for dataset in chosen:
        terminal.remark(f"{dataset.name}: {describe(dataset)}")
    page = EvaluationReport(dataset_root.absolute().name, sections=len(chosen)) if report else None
    rows: list[results.Row] = []
    failures: list[BaseException] = []
    for dataset in chosen:
        # What is finished is told, and another category need not have the same broken file.
        if not all(isinstance(failure, ImageError) for failure in failures):
            break
        prefix = f"{dataset.name}: " if len(chosen) > 1 else ""
        with kept(failures), terminal.progress(prefix) as advance:
            call: dict[str, Any] = {
                "progress": advance,
                "on_error": "skip" if skip_unreadable else "raise",
                "strict": strict,
                "pixels": pixels,
                "fpr_limit": fpr_limit,
            }
            runs = _runs(dataset, method, arguments, coresets=coresets, seeds=seeds, call=call)
            rows += map(results.Row.of, runs)
            if page is not None:
                page.add(runs[0])  # one gallery a category
    for failure in failures[1:]:
        terminal.remark(f"failed too: {failure}")
    if failures and not rows and not as_json:
        raise failures[0]
    columns = tuple(results.COLUMNS) if "all" in metrics else tuple(dict.fromkeys(metrics)) or results.DEFAULT
    tables = [results.quality_table(rows, columns), results.time_table(rows)]
    if page is not None and report is not None and rows:
        with kept(failures), whole_file(report) as temporary:
            page.write(temporary, tables)
    if as_json:
        terminal.json(
            {
                "dataset": str(dataset_root),
                "runs": [row.to_json() for row in rows],
                "error": first_words(failures),
                "build": build_info(),
            }
        )
    else:
        for table in tables:
            terminal.table(table)
    if failures:
        raise failures[0]
    if report is not None and not as_json:
        terminal.remark(f"wrote {report}")


def _runs(
    dataset: Dataset,
    method: str,
    arguments: dict[str, Any],
    *,
    coresets: Sequence[float | None],
    seeds: Sequence[int],
    call: dict[str, Any],
) -> list[Run]:
    """A run for each coreset and seed; of PatchCore they share one pass of the backbone."""
    from patchcore_rs.evaluation import evaluate
    from patchcore_rs.methods.detectors import DETECTORS

    if method == PATCHCORE:
        return evaluate.evaluate(dataset, coresets=coresets, seeds=seeds, **call, **arguments)
    constructor: Callable[..., Detector] = DETECTORS[method]
    return [evaluate.evaluate_detector(constructor(seed=seed, **arguments), dataset, **call) for seed in seeds]


def reproduce(
    study: str,
    data: Path,
    running: dict[str, Any],
    *,
    categories: Sequence[str],
    backbones: Sequence[str],
    weights_dir: Path | None,
    seeds: Sequence[int],
    output: Path,
    sweep: bool,
    keep_cache: bool,
    skip_unreadable: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run a table or a figure of the paper, or all, on a data set, and set it beside what the paper states."""
    from patchcore_rs.reproduce.experiments import Setup
    from patchcore_rs.reproduce.reproduction import Reproduction

    terminal = Terminal(quiet=quiet)
    setup = Setup(
        output,
        {},
        running,
        on_error="skip" if skip_unreadable else "raise",
        keep_cache=keep_cache,
        command=shlex.join([PROGRAM, *sys.argv[1:]]),
    )
    reproduction = Reproduction(
        study,
        data,
        setup,
        terminal,
        categories=() if "all" in categories else tuple(dict.fromkeys(categories)),
        backbones=tuple(dict.fromkeys(backbones)),
        weights_dir=weights_dir,
        seeds=tuple(dict.fromkeys(seeds)),
        sweep=sweep,
    )
    failures: list[BaseException] = []
    with kept(failures):
        reproduction.run(terminal)
    left_out = reproduction.left_out()
    if not reproduction.runner.results:  # nothing to write, and nothing to write over what was there
        raise failures[0] if failures else ValueError(f"no row of {study} ran; {left_out[0][0]}: {left_out[0][1]}")
    written = reproduction.write()
    if as_json:
        terminal.json(reproduction.to_json() | {"error": first_words(failures)})
    else:
        for table in reproduction.tables():
            terminal.table(table)
    if failures:
        raise failures[0]
    if not as_json:
        for title, best in reproduction.best().items():
            terminal.remark(f"best of {title}: {best}")
        terminal.remark(f"wrote {', '.join(map(str, written))}")


def _categories(root: Path, wanted: Sequence[str], names: dict[str, Any]) -> list[str | None]:
    """The categories asked for; None for a root that is a data set itself."""
    if "all" not in wanted:
        return list(wanted) or [None]
    found = find_categories(root, names["good"] or ())
    if not found:
        raise ValueError(f"{root}: --category all finds no data set in its subfolders; leave it out where this is one")
    return list(found)
