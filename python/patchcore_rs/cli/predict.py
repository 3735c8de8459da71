"""`patchcore-rs predict`: score images with a model; write heat maps, maps and a report."""

from __future__ import annotations

import codecs
import contextlib
import io
import math
import os
import sys
import warnings
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from patchcore_rs._text import NOTHING, Table, counted, figure
from patchcore_rs._version import __version__
from patchcore_rs.cli.options import require_folder, require_other
from patchcore_rs.cli.program import first_words, kept
from patchcore_rs.cli.terminal import Terminal
from patchcore_rs.images.datasets import DRAWN_SUFFIXES, leave_out_masks
from patchcore_rs.images.files import ImageError, all_pages, split_page
from patchcore_rs.images.levels import Levels
from patchcore_rs.images.pixels import read_as_seen
from patchcore_rs.model.calibration import threshold_origin, warn_of_clipping
from patchcore_rs.model.file import whole_file
from patchcore_rs.model.map_values import MapScale, map_extent

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from patchcore_rs._types import Progress
    from patchcore_rs.detector.estimator import FittedEstimator
    from patchcore_rs.report.page import Report, Stream

    Kind = Literal["overlay", "npy", "png16"]

_OWN_COLOURS = (
    "The model does not know which map values are normal, so these colours are out of these images alone, and other "
    "images have others, and all are scored twice: calibrate it, or choose --scale LOW HIGH."
)
_PLACELESS = (
    "The model says whether an image is anomalous, not where: a map has one value, and a picture of it one tint."
)
_CHUNK = 128  # images between two looks at what can be written already
_DRAWN = 32  # images whose maps are held at a time
_SUFFIXES: dict[Kind, str] = {"overlay": DRAWN_SUFFIXES[0], "npy": ".map.npy", "png16": DRAWN_SUFFIXES[1]}


def predict(
    model: Path,
    paths: Sequence[Path],
    *,
    from_file: Path | None,
    threshold: float | None,
    output: Path | None,
    save: Sequence[Kind],
    scale: tuple[float, float] | None,
    report: Path | None,
    fail_on_anomaly: bool,
    skip_unreadable: bool,
    pages: str,
    as_csv: bool,
    as_json: bool,
    batch_size: int | None,
    quiet: bool,
    **loading: Any,
) -> bool:
    """Score the images at `paths` with `load(model, **loading)`. True where one is anomalous."""
    if scale is not None and not (math.isfinite(scale[1] - scale[0]) and scale[0] < scale[1]):
        raise ValueError(f"--scale must be LOW HIGH with LOW < HIGH; got {scale[0]:g} {scale[1]:g}")
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"--threshold must be a finite score; got {threshold:g}")
    listed = [] if from_file is None else listed_paths(from_file.read_bytes())
    images = list_images([*given_paths(paths), *listed], pages)
    if not images:
        raise ValueError("the list of PATHS must not be empty; name an image or a folder in it")
    if report is not None:
        require_folder(report)
        files = [Path(split_page(str(path))[0]) for path, _ in images]
        require_other("--report", report, [model, *filter(None, [from_file]), *files])
    from patchcore_rs.methods.ensemble import Ensemble
    from patchcore_rs.methods.load import load

    terminal = Terminal(quiet=quiet)
    detector = load(model, **loading)
    if batch_size is not None:
        for member in detector.members_ if isinstance(detector, Ensemble) else (detector,):
            member.batch_size = batch_size
    if fail_on_anomaly and threshold is None and detector.threshold_ is None:
        raise ValueError(
            f"--fail-on-anomaly needs a threshold and {model} has none: pass --threshold, or fit it with --calibrate"
        )
    scored = Scored(threshold=threshold, scale=MapScale(*scale, "option") if scale else None)
    kinds = () if output is None else tuple(dict.fromkeys(save))
    pictures = Pictures(scored, output, kinds, None if report is None else _report(model, detector), detector)
    failures: list[BaseException] = []
    undrawn: list[BaseException] = []
    second = Scored()  # where the model knows no colours, all images are scored again
    printed = 0
    if as_csv:
        terminal.csv([csv_header(kinds)])
    with (
        kept(failures),
        contextlib.closing(score(detector, images, terminal, scored, maps=pictures.wanted)) as parts,
    ):
        for part in parts:
            with kept(undrawn):
                if not undrawn:
                    pictures.take(part)
            if as_csv and not pictures.late:
                printed = print_rows(terminal, scored, kinds, printed)
            _raise_interrupt(undrawn)
        if not skip_unreadable or not scored.scores:
            require_all(scored, len(images))
    if not undrawn and not any(isinstance(failure, KeyboardInterrupt) for failure in failures):
        with kept(undrawn):
            if pictures.late:
                terminal.remark(_OWN_COLOURS)
                pictures.choose_scale()
                again = list(zip(scored.paths, scored.names, strict=True))
                with contextlib.closing(score(detector, again, terminal, second, maps=True)) as parts:
                    for part in parts:
                        pictures.draw(part)
            if report is not None:
                pictures.write_report(report)
            require_all(second, len(scored.scores))
    failures += undrawn
    if pictures.placeless:
        terminal.remark(_PLACELESS)

    if detector.settings_.normalize and detector.settings_.clip:
        warn_of_clipping(np.array(scored.scores), stacklevel=2)
    for unread, reason in scored.skipped if skip_unreadable else ():
        terminal.remark(f"skipped {unread}: {reason}")
    if as_json:
        answer = answer_json(scored, model, report)
        terminal.json(answer | {"error": first_words(failures)})
    elif as_csv:
        print_rows(terminal, scored, kinds, printed)
    elif scored.scores:
        terminal.table(answer_table(scored))
    if failures:
        raise failures[0]
    if not (as_json or as_csv):
        for written in (report, output):
            if written is not None:
                terminal.remark(f"wrote {written}")
    return any(scored.anomalous(i) for i in range(len(scored.scores)))


@dataclass
class Scored:
    """Images in their order with their scores.

    `names` are unique relative paths to write under; `written` are the files of each name by kind; `unseen` is the
    share that the crop cut off, None where that is not known.
    """

    paths: list[Path] = field(default_factory=list)
    names: list[Path] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    unseen: list[float | None] = field(default_factory=list)
    written: dict[Path, dict[str, str]] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    threshold: float | None = None
    scale: MapScale | None = None

    def anomalous(self, i: int) -> bool | None:
        """Whether image `i` scores at or above the threshold; None without one."""
        return None if self.threshold is None else self.scores[i] >= self.threshold


def given_paths(paths: Sequence[Path]) -> Iterator[Path]:
    """The paths, with those that standard input lists in the place of -."""
    for path in paths:
        if str(path) == "-":
            if sys.stdin is None:  # started with it closed, as by `<&-`
                raise ValueError("a PATH of - must find a list on standard input; got a closed one. Use --from-file")
            yield from listed_paths(sys.stdin.buffer.read())
        else:
            yield path


def listed_paths(content: bytes) -> list[Path]:
    """The paths that a list holds, one a line, or ended by NUL, as `find -print0` writes them."""
    names = content.split(b"\0") if b"\0" in content else content.removeprefix(codecs.BOM_UTF8).splitlines()
    return [Path(os.fsdecode(name)) for name in names if name]


def list_images(paths: Iterable[Path], pages: str) -> list[tuple[Path, Path]]:
    """Every image at the paths but masks, each with a relative path that no other one has; or "all" pages of them."""
    found: list[tuple[Path, Path]] = []
    taken: set[str] = set()
    for root in paths:
        images = leave_out_masks(root)
        for image in all_pages(images) if pages == "all" else images:
            name = image.relative_to(root) if root.is_dir() else Path(image.name)
            unique, number = name, 1
            while str(unique).casefold() in taken:  # some file systems do not tell A from a
                number += 1
                unique = name.with_name(f"{name.stem}-{number}{name.suffix}")
            taken.add(str(unique).casefold())
            found.append((image, unique))
    return found


class Part(NamedTuple):
    """Some images with their maps (n, H, W), None where none are wanted."""

    images: Sequence[tuple[Path, Path]]
    scores: NDArray[np.float64]
    maps: NDArray[np.float32] | None


def score(
    model: FittedEstimator, images: Sequence[tuple[Path, Path]], terminal: Terminal, scored: Scored, *, maps: bool
) -> Generator[Part]:
    """Score the images, some at a time, each part told in `scored`; the maps of one part are held at a time.

    Images that cannot be read are listed in `scored.skipped`.

    Raises:
        ValueError, OSError: as `PatchCore.predict`.
    """
    size = min(_CHUNK, _DRAWN) if maps else _CHUNK
    with terminal.progress() as advance, warnings.catch_warnings():
        # Every skipped image is listed by itself; clipped scores are counted at the end.
        warnings.filterwarnings("ignore", message=r"\d+ of \d+ images were left out|normalised scores are clipped")
        for start in range(0, len(images), size):
            chunk = images[start : start + size]
            prediction = model.predict(
                [path for path, _ in chunk],
                progress=partial(_advance_by, advance, start, len(images)),
                on_error="skip",
                maps=maps,
            )
            if scored.threshold is None:
                scored.threshold = prediction.threshold
            if scored.scale is None:
                scored.scale = prediction.map_scale
            scored.skipped += prediction.skipped
            unreadable = {name for name, _ in prediction.skipped}
            read = [(path, name) for path, name in chunk if str(path) not in unreadable]
            scored.paths += [path for path, _ in read]
            scored.names += [name for _, name in read]
            scored.scores += prediction.scores.tolist()
            scored.unseen += [None] * len(read) if prediction.unseen is None else prediction.unseen.tolist()
            scored.written |= {name: {} for _, name in read}
            yield Part(read, prediction.scores, prediction.maps)


class Pictures:
    """What is written of images as they come: maps and pictures to a folder, and the report.

    Where the model knows no colours they wait, `late`, until all images have been seen once.
    """

    def __init__(
        self,
        scored: Scored,
        folder: Path | None,
        kinds: Sequence[Kind],
        report: Report | None,
        detector: FittedEstimator,
    ) -> None:
        """Write to `folder` the files of these kinds, and the `report` where there is one."""
        self._scored, self._folder, self._kinds, self._report = scored, folder or Path(), kinds, report
        self._detector = detector
        self._draws = report is not None or bool({"overlay", "png16"} & set(kinds))
        self._extents: list[NDArray[np.float64]] = []
        self._stream: Stream | None = None
        self._flat: set[bool] = set()  # of the maps that were drawn, whether they have one value
        self.wanted = self._draws or "npy" in kinds
        settings = detector.settings_
        self._whole = partial(read_as_seen, resize=settings.resize, crop=None, levels=Levels.of(settings))
        self._seen = partial(read_as_seen, resize=settings.resize, crop=settings.crop, levels=Levels.of(settings))

    @property
    def late(self) -> bool:
        """Whether pictures wait for colours."""
        return self._draws and bool(self._extents)

    @property
    def placeless(self) -> bool:
        """Whether something was drawn, and all maps of it have one value each."""
        return self._flat == {True}

    def take(self, part: Part) -> None:
        """Write the arrays of maps, and the pictures or what their colours will be chosen from."""
        if part.maps is None:
            return
        if "npy" in self._kinds:
            for (_, name), anomaly_map in zip(part.images, part.maps, strict=True):
                with self._file("npy", name) as temporary:
                    temporary.write_bytes(npy_bytes(anomaly_map))
        if self._draws and self._scored.scale is None:
            self._extents.append(map_extent(part.maps))
        elif self._draws:
            self.draw(part)

    def choose_scale(self) -> None:
        """Colours out of the images that were seen."""
        from patchcore_rs.report.heatmap import colour_scale

        flagged = [bool(self._scored.anomalous(i)) for i in range(len(self._scored.scores))]
        self._scored.scale = colour_scale(np.concatenate(self._extents), np.array(flagged, np.uint8))

    def draw(self, part: Part) -> None:
        """Draw the images in the colours that are known by now."""
        from patchcore_rs.evaluation.inspection import Inspection
        from patchcore_rs.report.heatmap import write_map_png, write_overlay

        scale = self._scored.scale
        if scale is None or part.maps is None:
            return
        self._flat |= {bool(anomaly_map.min() == anomaly_map.max()) for anomaly_map in part.maps}
        for (path, name), anomaly_map in zip(part.images, part.maps, strict=True):
            if "overlay" in self._kinds:
                with self._file("overlay", name) as temporary:
                    write_overlay(temporary, self._seen(path), anomaly_map, scale)
            if "png16" in self._kinds:
                with self._file("png16", name) as temporary:
                    write_map_png(temporary, anomaly_map, scale)
        if self._report is not None:
            self._stream = self._stream or self._report.stream(self._scored.threshold, self._whole, scale)
            paths = tuple(path for path, _ in part.images)
            self._stream.add(Inspection("Images", paths, part.scores, part.maps))

    def write_report(self, target: Path) -> None:
        """Write the HTML report, the most anomalous image first; nothing where no image was drawn."""
        if self._report is None or self._stream is None:
            return
        detector, threshold = self._detector, self._scored.threshold
        calibration = detector.calibration_
        # A threshold set by hand, here or on the model, keeps no word about a calibration.
        calibrated = threshold_origin(detector.threshold_, calibration) == "calibration"
        calibrated = calibrated and (detector.settings_.normalize or threshold == detector.threshold_)
        origin = ""
        if calibration and calibrated:
            parts = f"calibrated on {counted(calibration.images, 'flawless image')}", calibration.forecast
            origin = ": ".join(filter(None, parts))
        self._report.add_stream("Images", self._stream, origin=origin)
        with whole_file(target) as temporary:
            self._report.write(temporary)

    @contextlib.contextmanager
    def _file(self, kind: Kind, name: Path) -> Iterator[Path]:
        """A path to write the file of one kind at for the image called `name`; its folder is made."""
        target = self._folder / name.parent / (name.name + _SUFFIXES[kind])
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as temporary:
            yield temporary
        self._scored.written[name][kind] = str(target)


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


def _report(model: Path, detector: FittedEstimator) -> Report:
    """The report as it begins."""
    from patchcore_rs.report.page import Report

    report = Report(f"Inspection with {model.name}")
    report.add_fact("Model", f"{model.name}: {detector.summary_}, backbone {detector.backbone_name_}")
    report.add_fact("Software", f"patchcore-rs {__version__}")
    return report


def _raise_interrupt(failures: Sequence[BaseException]) -> None:
    for failure in failures:
        if isinstance(failure, KeyboardInterrupt):
            raise failure


def answer_json(scored: Scored, model: Path, report: Path | None) -> dict[str, Any]:
    """The answer for programs."""
    return {
        "model": str(model),
        "threshold": scored.threshold,
        "scale": None if scored.scale is None else scored.scale.to_json(),
        "report": None if report is None else str(report),
        "images": [
            {
                "path": str(path),
                "score": scored.scores[i],
                "anomalous": scored.anomalous(i),
                "unseen": scored.unseen[i],
                "files": scored.written[scored.names[i]],
            }
            for i, path in enumerate(scored.paths)
        ],
        "skipped": [{"path": name, "reason": reason} for name, reason in scored.skipped],
    }


def csv_header(kinds: Sequence[Kind]) -> tuple[str, ...]:
    """The names of the columns: path, score, anomalous (0, 1 or empty), and the files written."""
    return "path", "score", "anomalous", *kinds


def print_rows(terminal: Terminal, scored: Scored, kinds: Sequence[Kind], start: int) -> int:
    """Print a row for each image from the `start`-th on; how many there are now."""
    rows = []
    for i in range(start, len(scored.scores)):
        anomalous = scored.anomalous(i)
        flag = "" if anomalous is None else int(anomalous)
        written = (scored.written[scored.names[i]].get(kind, "") for kind in kinds)
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
