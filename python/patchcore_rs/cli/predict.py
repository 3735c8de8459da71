"""`patchcore-rs predict`: score images with a model; write heat maps, maps and a report."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from patchcore_rs._text import NOTHING, Table, counted, figure
from patchcore_rs._version import __version__
from patchcore_rs.cli.options import require_folder
from patchcore_rs.cli.terminal import Terminal
from patchcore_rs.images.datasets import find_images
from patchcore_rs.images.files import read_as_seen
from patchcore_rs.images.levels import Levels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from patchcore_rs._types import Progress
    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.model.settings import Settings
    from patchcore_rs.report.heatmap import ColourScale

    Kind = Literal["overlay", "npy", "png16"]

_CHUNK = 128  # images between two looks at what can be written already
_SUFFIXES: dict[Kind, str] = {"overlay": ".overlay.png", "npy": ".map.npy", "png16": ".map.png"}


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
        raise ValueError(f"--scale must be LOW HIGH with LOW < HIGH; got {scale[0]:g} {scale[1]:g}")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"--threshold must be a finite score; got {threshold:g}")
    images = list_images(paths)
    if report is not None:
        require_folder(report)
    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.report.heatmap import ColourScale, colour_scale

    terminal = Terminal(quiet=quiet)
    detector = PatchCore.load(model, **loading)
    if batch_size is not None:
        detector.batch_size = batch_size
    if fail_on_anomaly and threshold is None and detector.threshold_ is None:
        raise ValueError(
            f"--fail-on-anomaly needs a threshold and {model} has none: pass --threshold, or fit it with --calibrate"
        )
    files = None if output is None else Files(output, tuple(dict.fromkeys(save)))
    draws = files is not None and bool({"overlay", "png16"} & set(files.kinds))
    scored = score(
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
        write_pictures(scored, files, colours, detector.settings_)
    if report is not None and colours is not None:
        write_report(scored, report, model, detector, colours)

    if as_json:
        terminal.json(answer_json(scored, model, colours, report))
    elif as_csv:
        terminal.csv(answer_rows(scored, files))
    else:
        terminal.table(answer_table(scored))
        for written in (report, output):
            if written is not None:
                terminal.remark(f"wrote {written}")
    return any(scored.anomalous(i) for i in range(len(scored.scores)))


@dataclass(frozen=True)
class Files:
    """Where pictures and maps go, and which of them."""

    folder: Path
    kinds: tuple[Kind, ...]

    def path(self, kind: Kind, name: Path) -> Path:
        """The file of one kind for the image called `name`; its folder is made."""
        target = self.folder / name.parent / (name.name + _SUFFIXES[kind])
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


@dataclass
class Scored:
    """Images in their order with their scores. `maps` holds (H, W) maps where pictures are drawn from them later.

    `names` are unique relative paths to write under; `written` are the files of each image by kind.
    """

    paths: list[Path] = field(default_factory=list)
    names: list[Path] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    maps: list[NDArray[np.float32]] = field(default_factory=list)
    written: list[dict[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    threshold: float | None = None

    def anomalous(self, i: int) -> bool | None:
        """Whether image `i` scores at or above the threshold; None without one."""
        return None if self.threshold is None else self.scores[i] >= self.threshold


def list_images(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Every image at the paths, each with a relative path that no other one has."""
    found: list[tuple[Path, Path]] = []
    taken: set[str] = set()
    for root in paths:
        for image in find_images(root):
            name = image.relative_to(root) if root.is_dir() else Path(image.name)
            unique, number = name, 1
            while str(unique).casefold() in taken:  # some file systems do not tell A from a
                number += 1
                unique = name.with_name(f"{name.stem}-{number}{name.suffix}")
            taken.add(str(unique).casefold())
            found.append((image, unique))
    return found


def score(
    model: PatchCore,
    images: Sequence[tuple[Path, Path]],
    terminal: Terminal,
    *,
    files: Files | None,
    keep_maps: bool,
    skip_unreadable: bool,
) -> Scored:
    """Score the images, some at a time, and write their .npy maps where wanted.

    Raises:
        ValueError, OSError: as `PatchCore.predict`, and no image can be read.
    """
    scored = Scored()
    with terminal.progress() as advance, warnings.catch_warnings():
        # Every skipped image is listed below.
        warnings.filterwarnings("ignore", message=r"\d+ of \d+ images were left out")
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            prediction = model.predict(
                [path for path, _ in chunk],
                progress=partial(_advance_by, advance, start, len(images)),
                on_error="skip" if skip_unreadable else "raise",
            )
            unreadable = {name for name, _ in prediction.skipped}
            read = [(path, name) for path, name in chunk if str(path) not in unreadable]
            for (path, name), value, anomaly_map in zip(read, prediction.scores, prediction.maps, strict=True):
                scored.paths.append(path)
                scored.names.append(name)
                scored.scores.append(float(value))
                scored.written.append({})
                if files is not None and "npy" in files.kinds:
                    target = files.path("npy", name)
                    np.save(target, anomaly_map)
                    scored.written[-1]["npy"] = str(target)
                if keep_maps:
                    scored.maps.append(anomaly_map)
            scored.skipped += prediction.skipped
            scored.threshold = prediction.threshold
    for unread, reason in scored.skipped:
        terminal.remark(f"skipped {unread}: {reason}")
    if not scored.scores:
        raise ValueError(f"none of the {counted(len(images), 'image')} can be read")
    return scored


def _advance_by(advance: Progress, before: int, total: int, stage: str, done: int, _: int | None) -> None:
    """Progress of a part as progress of the whole."""
    advance(stage, before + done, total)


def write_pictures(scored: Scored, files: Files, scale: ColourScale, settings: Settings) -> None:
    """Write the overlays and the 16-bit maps, all on one scale."""
    from patchcore_rs.images.files import write_image
    from patchcore_rs.report.heatmap import overlay, write_map_png

    read = partial(
        read_as_seen,
        resize=settings.resize,
        crop=settings.crop,
        levels=Levels(settings.white_level, settings.value_range),
    )
    for path, name, anomaly_map, written in zip(scored.paths, scored.names, scored.maps, scored.written, strict=True):
        if "overlay" in files.kinds:
            target = files.path("overlay", name)
            write_image(target, overlay(read(path), anomaly_map, scale))
            written["overlay"] = str(target)
        if "png16" in files.kinds:
            target = files.path("png16", name)
            write_map_png(target, anomaly_map, scale)
            written["png16"] = str(target)


def write_report(scored: Scored, target: Path, model: Path, detector: PatchCore, scale: ColourScale) -> None:
    """Write the HTML report, the most anomalous image first."""
    from patchcore_rs.evaluation.evaluate import Inspection
    from patchcore_rs.report.page import Report

    calibration, settings = detector.calibration_, detector.settings_
    calibrated = calibration is not None and scored.threshold == detector.threshold_
    rows, channels = detector.memory_bank_.shape
    report = Report(f"Inspection with {model.name}")
    report.add_fact("Model", f"{model.name}: {rows:,} patches of {channels:,} channels, backbone {detector.backbone}")
    report.add_fact("Software", f"patchcore-rs {__version__}")
    report.add_inspection(
        Inspection("Images", tuple(scored.paths), np.array(scored.scores), np.stack(scored.maps)),
        scored.threshold,
        partial(
            read_as_seen,
            resize=settings.resize,
            crop=settings.crop,
            levels=Levels(settings.white_level, settings.value_range),
        ),
        origin=f"calibrated on {counted(calibration.images, 'flawless image')}" if calibration and calibrated else "",
        scale=scale,
    )
    report.write(target)


def answer_json(scored: Scored, model: Path, scale: ColourScale | None, report: Path | None) -> dict[str, Any]:
    """The answer for programs."""
    return {
        "model": str(model),
        "threshold": scored.threshold,
        "scale": None if scale is None else {"low": scale.low, "high": scale.high},
        "report": None if report is None else str(report),
        "images": [
            {"path": str(path), "score": value, "anomalous": scored.anomalous(i), "files": scored.written[i]}
            for i, (path, value) in enumerate(zip(scored.paths, scored.scores, strict=True))
        ],
        "skipped": [{"path": name, "reason": reason} for name, reason in scored.skipped],
    }


def answer_rows(scored: Scored, files: Files | None) -> Iterator[tuple[object, ...]]:
    """The answer for spreadsheets, a row an image: path, score, anomalous (0, 1 or empty), and the files written."""
    kinds = () if files is None else files.kinds
    yield "path", "score", "anomalous", *kinds
    for i, (path, value) in enumerate(zip(scored.paths, scored.scores, strict=True)):
        anomalous = scored.anomalous(i)
        flag = "" if anomalous is None else int(anomalous)
        yield path, repr(value), flag, *(scored.written[i].get(kind, "") for kind in kinds)


def answer_table(scored: Scored) -> Table:
    """The answer for people, the most anomalous image first."""
    words = {None: NOTHING, True: "anomalous", False: "normal"}
    order = sorted(range(len(scored.scores)), key=lambda i: -scored.scores[i])
    rows = tuple((figure(scored.scores[i], 4), words[scored.anomalous(i)], str(scored.paths[i])) for i in order)
    total = counted(len(rows), "image")
    if scored.threshold is None:
        note = f"{total}; the model has no threshold (fit --calibrate sets one, --threshold gives one)"
    else:
        above = sum(value >= scored.threshold for value in scored.scores)
        note = f"{above:,} of {total} anomalous at the threshold {figure(scored.threshold, 4)}"
    return Table("", ("score", "verdict", "image"), rows, words=("verdict", "image"), note=note)
