"""`patchcore-rs predict`: score images with a model; write heat maps, maps and a report."""

from __future__ import annotations

import io
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
from patchcore_rs.cli.program import first_words, kept
from patchcore_rs.cli.terminal import Terminal
from patchcore_rs.images.datasets import DRAWN_SUFFIXES, find_images
from patchcore_rs.images.files import ImageError, read_as_seen
from patchcore_rs.images.levels import Levels
from patchcore_rs.model.file import whole_file
from patchcore_rs.model.map_values import MapScale

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from patchcore_rs._types import Progress
    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.model.settings import Settings

    Kind = Literal["overlay", "npy", "png16"]

_OWN_COLOURS = (
    "The model does not know which map values are normal, so these colours are out of these images alone, and other "
    "images have others: fit it again, best with --calibrate, or choose --scale LOW HIGH."
)
_CHUNK = 128  # images between two looks at what can be written already
_SUFFIXES: dict[Kind, str] = {"overlay": DRAWN_SUFFIXES[0], "npy": ".map.npy", "png16": DRAWN_SUFFIXES[1]}


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
    from patchcore_rs.report.heatmap import colour_scale

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
    scored = Scored(threshold=threshold, scale=MapScale(*scale, "option") if scale else None)
    failures: list[BaseException] = []
    printed = 0
    if as_csv:
        terminal.csv([csv_header(files)])
    with kept(failures):
        for _ in score(detector, images, terminal, scored, files=files, keep_maps=draws or report is not None):
            if as_csv and not draws:
                printed = print_rows(terminal, scored, files, printed)
        if not skip_unreadable or not scored.scores:
            require_all(scored, len(images))
    interrupted = any(isinstance(failure, KeyboardInterrupt) for failure in failures)
    with kept(failures):
        if scored.maps and not interrupted:
            if scored.scale is None:
                flagged = [bool(scored.anomalous(i)) for i in range(len(scored.scores))]
                scored.scale = colour_scale(np.stack(scored.maps), np.array(flagged, np.uint8))
                terminal.remark(_OWN_COLOURS)
            if files is not None and draws:
                write_pictures(scored, files, scored.scale, detector.settings_)
            if report is not None:
                write_report(scored, report, model, detector, scored.scale)

    for unread, reason in scored.skipped if skip_unreadable else ():
        terminal.remark(f"skipped {unread}: {reason}")
    if as_json:
        answer = answer_json(scored, model, report)
        terminal.json(answer | {"error": first_words(failures)})
    elif as_csv:
        print_rows(terminal, scored, files, printed)
    elif scored.scores:
        terminal.table(answer_table(scored))
    if failures:
        raise failures[0]
    if not (as_json or as_csv):
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
    scale: MapScale | None = None

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
    scored: Scored,
    *,
    files: Files | None,
    keep_maps: bool,
) -> Iterator[None]:
    """Score the images, some at a time, and write their .npy maps where wanted; yields where some more are `scored`.

    Images that cannot be read are listed in `scored.skipped`.

    Raises:
        ValueError, OSError: as `PatchCore.predict`, or a map cannot be written.
    """
    with terminal.progress() as advance, warnings.catch_warnings():
        # Every skipped image is listed by itself.
        warnings.filterwarnings("ignore", message=r"\d+ of \d+ images were left out")
        for start in range(0, len(images), _CHUNK):
            chunk = images[start : start + _CHUNK]
            prediction = model.predict(
                [path for path, _ in chunk],
                progress=partial(_advance_by, advance, start, len(images)),
                on_error="skip",
            )
            if scored.threshold is None:
                scored.threshold = prediction.threshold
            if scored.scale is None:
                scored.scale = prediction.map_scale
            scored.skipped += prediction.skipped
            unreadable = {name for name, _ in prediction.skipped}
            read = [(path, name) for path, name in chunk if str(path) not in unreadable]
            for (path, name), value, anomaly_map in zip(read, prediction.scores, prediction.maps, strict=True):
                scored.paths.append(path)
                scored.names.append(name)
                scored.scores.append(float(value))
                scored.written.append({})
                if keep_maps:
                    scored.maps.append(anomaly_map)
            if files is not None and "npy" in files.kinds:
                first = len(scored.scores) - len(read)
                for i, anomaly_map in enumerate(prediction.maps, first):
                    target = files.path("npy", scored.names[i])
                    with whole_file(target) as temporary:
                        temporary.write_bytes(npy_bytes(anomaly_map))
                    scored.written[i]["npy"] = str(target)
            yield


def npy_bytes(array: NDArray[np.float32]) -> bytes:
    """The array as a .npy file; numpy itself does not say why a write failed."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def require_all(scored: Scored, images: int) -> None:
    """Raise ImageError where images could not be read."""
    if not scored.skipped:
        return
    _, reason = scored.skipped[0]
    if not scored.scores:
        raise ValueError(f"none of the {counted(images, 'image')} can be read; the first: {reason}")
    raise ImageError(reason if len(scored.skipped) == 1 else f"{len(scored.skipped)} of {images} images: {reason}")


def _advance_by(advance: Progress, before: int, total: int, stage: str, done: int, _: int | None) -> None:
    """Progress of a part as progress of the whole."""
    advance(stage, before + done, total)


def write_pictures(scored: Scored, files: Files, scale: MapScale, settings: Settings) -> None:
    """Write the overlays and the 16-bit maps, all on one scale."""
    from patchcore_rs.report.heatmap import write_map_png, write_overlay

    read = partial(
        read_as_seen,
        resize=settings.resize,
        crop=settings.crop,
        levels=Levels.of(settings),
    )
    for path, name, anomaly_map, written in zip(scored.paths, scored.names, scored.maps, scored.written, strict=True):
        if "overlay" in files.kinds:
            target = files.path("overlay", name)
            with whole_file(target) as temporary:
                write_overlay(temporary, read(path), anomaly_map, scale)
            written["overlay"] = str(target)
        if "png16" in files.kinds:
            target = files.path("png16", name)
            with whole_file(target) as temporary:
                write_map_png(temporary, anomaly_map, scale)
            written["png16"] = str(target)


def write_report(scored: Scored, target: Path, model: Path, detector: PatchCore, scale: MapScale) -> None:
    """Write the HTML report, the most anomalous image first."""
    from patchcore_rs.evaluation.evaluate import Inspection
    from patchcore_rs.report.page import Report

    calibration, settings = detector.calibration_, detector.settings_
    # A threshold set by hand, here or on the model, keeps no word about a calibration.
    calibrated = calibration is not None and detector.threshold_ == calibration.threshold
    calibrated = calibrated and (settings.normalize or scored.threshold == detector.threshold_)
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
            crop=None,
            levels=Levels.of(settings),
        ),
        origin=f"calibrated on {counted(calibration.images, 'flawless image')}" if calibration and calibrated else "",
        scale=scale,
    )
    with whole_file(target) as temporary:
        report.write(temporary)


def answer_json(scored: Scored, model: Path, report: Path | None) -> dict[str, Any]:
    """The answer for programs."""
    return {
        "model": str(model),
        "threshold": scored.threshold,
        "scale": None if scored.scale is None else scored.scale.to_json(),
        "report": None if report is None else str(report),
        "images": [
            {"path": str(path), "score": value, "anomalous": scored.anomalous(i), "files": scored.written[i]}
            for i, (path, value) in enumerate(zip(scored.paths, scored.scores, strict=True))
        ],
        "skipped": [{"path": name, "reason": reason} for name, reason in scored.skipped],
    }


def csv_header(files: Files | None) -> tuple[str, ...]:
    """The names of the columns: path, score, anomalous (0, 1 or empty), and the files written."""
    return "path", "score", "anomalous", *(() if files is None else files.kinds)


def print_rows(terminal: Terminal, scored: Scored, files: Files | None, start: int) -> int:
    """Print a row for each image from the `start`-th on; how many there are now."""
    kinds = () if files is None else files.kinds
    rows = []
    for i in range(start, len(scored.scores)):
        anomalous = scored.anomalous(i)
        flag = "" if anomalous is None else int(anomalous)
        written = (scored.written[i].get(kind, "") for kind in kinds)
        rows.append((scored.paths[i], repr(scored.scores[i]), flag, *written))
    terminal.csv(rows)
    return len(scored.scores)


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
