"""What the commands of `patchcore-rs` do; their options and help are in `cli.py`.

Results go to stdout as a table, CSV or JSON, everything else to stderr. torch is imported where a model is fitted or
used.
"""

from __future__ import annotations

import errno
import math
import sys
from dataclasses import asdict
from importlib import metadata
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs import __version__, build_info, datasets, predicting
from patchcore_rs.datasets import find_images, load_dataset
from patchcore_rs.tables import Table, counted, figure
from patchcore_rs.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from patchcore_rs.predicting import Kind


def fit(
    train_dir: Path,
    output: Path,
    arguments: dict[str, Any],
    *,
    add_to: Path | None,
    calibrate: Path | None,
    false_alarm_rate: float,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fit `PatchCore(**arguments)` to the images in `train_dir` and write it to `output`.

    Or let the model in the file `add_to` learn from them too, loaded with those arguments.
    """
    inside = [name for name in ("test", "ground_truth") if (train_dir / name).is_dir()]
    if inside:
        raise ValueError(
            f"{train_dir}: holds {' and '.join(inside)}, so not all of its images are flawless; "
            f"fit takes the folder of the flawless ones, such as {train_dir / 'train' / 'good'}"
        )
    images = find_images(train_dir)
    flawless = [] if calibrate is None else find_images(calibrate)
    require_folder(output)
    from patchcore_rs.detector import PatchCore

    terminal = Terminal(quiet=quiet)
    began = perf_counter()
    if add_to is None:
        model = PatchCore(**arguments)
    else:
        batch_size = arguments.pop("batch_size", None)
        model = PatchCore.load(add_to, **arguments)
        if batch_size is not None:
            model.batch_size = batch_size
        if flawless:  # a new threshold follows: nothing to warn of
            model.threshold_ = model.calibration_ = None
    with terminal.progress() as advance:
        model.partial_fit(images, progress=advance)
        if flawless:
            model.calibrate(flawless, false_alarm_rate=false_alarm_rate, progress=advance)
    model.save(output)
    seconds = perf_counter() - began

    rows, channels = model.memory_bank_.shape
    calibration = model.calibration_
    if as_json:
        terminal.json(
            {
                "model": str(output),
                "images": len(images),
                "training": asdict(model.training_),
                "bank": {"rows": rows, "channels": channels, "bytes": model.memory_bank_.nbytes},
                "image_size": list(model.image_size_),
                "threshold": model.threshold_,
                "calibration": None if calibration is None else calibration.to_json(),
                "settings": model.settings_.to_json(),
                "seconds": seconds,
                "stages": model.timings_,
            }
        )
        return
    terminal.say(
        f"{output}: {rows:,} patches of {channels:,} channels from {counted(len(images), 'image')}, {figure(seconds)} s"
    )
    if calibration is None:
        terminal.remark("No threshold yet: --calibrate with flawless images that were not trained on would set one.")
    else:
        terminal.say(
            f"threshold {figure(calibration.threshold, 6)}: {calibration.reached_rate:.2%} of "
            f"{counted(calibration.images, 'flawless image')} would raise a false alarm"
        )


def predict(
    model: Path,
    paths: Sequence[Path],
    *,
    threshold: float | None,
    output: Path | None,
    save: Sequence[Kind],
    scale: tuple[float, float] | None,
    report: Path | None,
    fail_on_anomaly: bool,
    skip_unreadable: bool,
    as_csv: bool,
    as_json: bool,
    batch_size: int | None,
    quiet: bool,
    **loading: Any,
) -> bool:
    """Score the images at `paths` with `PatchCore.load(model, **loading)`. True where one is anomalous."""
    if scale is not None and not (math.isfinite(scale[1] - scale[0]) and scale[0] < scale[1]):
        raise ValueError(f"--scale must be LOW HIGH with LOW < HIGH, got {scale[0]:g} {scale[1]:g}")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"--threshold must be a finite score, got {threshold:g}")
    images = predicting.list_images(paths)
    if report is not None:
        require_folder(report)
    from patchcore_rs.detector import PatchCore
    from patchcore_rs.heatmap import ColourScale, colour_scale

    terminal = Terminal(quiet=quiet)
    detector = PatchCore.load(model, **loading)
    if batch_size is not None:
        detector.batch_size = batch_size
    if fail_on_anomaly and threshold is None and detector.threshold_ is None:
        raise ValueError(
            f"--fail-on-anomaly needs a threshold and {model} has none: pass --threshold, or fit it with --calibrate"
        )
    files = None if output is None else predicting.Files(output, tuple(dict.fromkeys(save)))
    draws = files is not None and bool({"overlay", "png16"} & set(files.kinds))
    scored = predicting.score(
        detector,
        images,
        terminal,
        files=files,
        keep_maps=draws or report is not None,
        skip_unreadable=skip_unreadable,
    )
    if threshold is not None:
        scored.threshold = threshold
    colours = None
    if scored.maps:
        flagged = [bool(scored.anomalous(i)) for i in range(len(scored.scores))]
        colours = ColourScale(*scale) if scale else colour_scale(np.stack(scored.maps), np.array(flagged, np.uint8))
    if files is not None and draws and colours is not None:
        predicting.write_pictures(scored, files, colours, detector.settings_)
    if report is not None and colours is not None:
        predicting.write_report(scored, report, model, detector, colours)

    if as_json:
        terminal.json(predicting.answer_json(scored, model, colours, report))
    elif as_csv:
        predicting.print_csv(scored, files)
    else:
        terminal.table(predicting.answer_table(scored))
        for written in (report, output):
            if written is not None:
                terminal.remark(f"wrote {written}")
    return any(scored.anomalous(i) for i in range(len(scored.scores)))


def evaluate(
    dataset_root: Path,
    arguments: dict[str, Any],
    *,
    categories: Sequence[str],
    layout: str,
    coresets: Sequence[float | None],
    seeds: Sequence[int],
    report: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fit, inspect and judge every category with every coreset and seed."""
    chosen = [
        load_dataset(dataset_root, layout=layout, category=name) for name in _categories(dataset_root, categories)
    ]
    for dataset in chosen:
        if not dataset.test:
            raise ValueError(f"{dataset_root}: {dataset.name} has no test images to evaluate on")
    if report is not None:
        require_folder(report)
    from patchcore_rs import evaluation, results

    terminal = Terminal(quiet=quiet)
    page = results.EvaluationReport(dataset_root.absolute().name, sections=len(chosen)) if report else None
    rows: list[results.Row] = []
    total = len(chosen) * len(coresets) * len(seeds)
    for dataset in chosen:
        for coreset in coresets:
            for seed in seeds:
                prefix = f"{len(rows) + 1}/{total} {dataset.name}: " if total > 1 else ""
                with terminal.progress(prefix) as advance:
                    run = evaluation.run(dataset, {**arguments, "coreset": coreset, "seed": seed}, progress=advance)
                rows.append(results.Row.of(run))
                if page is not None and coreset == coresets[0] and seed == seeds[0]:
                    page.add(run)  # one gallery a category
    tables = [results.quality_table(rows), results.time_table(rows)]
    if page is not None and report is not None:
        page.write(report, tables)
    if as_json:
        terminal.json({"dataset": str(dataset_root), "runs": [row.to_json() for row in rows], "build": build_info()})
        return
    for table in tables:
        terminal.table(table)
    if report is not None:
        terminal.remark(f"wrote {report}")


def _categories(root: Path, names: Sequence[str]) -> list[str | None]:
    """The categories asked for; None for a root that is a data set itself."""
    if "all" not in names:
        return list(names) or [None]
    found = datasets.find_categories(root)
    if not found:
        raise ValueError(f"{root}: --category all finds no data set in its subfolders; leave it out where this is one")
    return list(found)


def info(model: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Show the build, or what a model file says of itself."""
    terminal = Terminal(quiet=quiet)
    facts = build_facts() if model is None else model_facts(model)
    if as_json:
        terminal.json(facts)
        return
    rows = [(name.replace("_", " "), _plain(value)) for name, value in _flat(facts)]
    terminal.table(Table("", ("", ""), tuple(rows), words=("",)))


def build_facts() -> dict[str, Any]:
    """What this installation is made of; packages are looked up, not imported."""
    build = build_info()
    packages: dict[str, str | None] = {}
    for package in ("torch", "torchvision", "numpy", "pillow", "timm", "faiss-cpu"):
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = None
    return {**build, "version": __version__, "python": sys.version.split()[0], "packages": packages}


def model_facts(path: Path) -> dict[str, Any]:
    """What a model file says of itself, checked as loading checks it; neither torch nor the backbone is loaded."""
    from patchcore_rs.description import Description
    from patchcore_rs.model_file import ModelFileError, read_model

    stored = read_model(path)
    rows, channels = stored.bank.shape
    try:
        description = Description.from_json(
            stored.metadata, bank=stored.bank.shape, standardized=stored.mean is not None
        ).to_json()
    except ValueError as error:
        raise ModelFileError(path, f"{error}; save the model again") from error
    return {
        "model": str(path),
        "bytes": path.stat().st_size,
        "written_by": str(stored.metadata.get("writer")),
        "format_version": ".".join(map(str, stored.metadata["version"])),
        "bank": {"rows": rows, "channels": channels},
        **description,
    }


def require_folder(file: Path) -> None:
    """Raise FileNotFoundError where the folder to write `file` in is missing: better now than after the work."""
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write to does not exist", str(file))


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested objects as dotted names."""
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
