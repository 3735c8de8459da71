"""What data sets are made of: images found in folders, what names of folders and files say, and samples.

`layouts.py` puts them together, by the folders that it finds or from a file that lists them.
"""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from patchcore_rs._text import counted, shortened
from patchcore_rs.images.files import IMAGE_SUFFIXES, split_page

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_logger = logging.getLogger("patchcore_rs.images")

# What `patchcore-rs predict` draws is called after its image, as in part.png.overlay.png, and is none itself.
DRAWN_SUFFIXES = (".overlay.png", ".map.png")
_SHOWN = 5  # entries an error message lists before it counts the rest


def composed(name: str) -> str:
    """A name with its accents in one form: systems differ in that, so a mask may spell it otherwise than its image."""
    return unicodedata.normalize("NFC", name)


def plain(name: str) -> str:
    """A name without case, spaces and signs: Defect-Free and defect_free are one."""
    return re.sub(r"[\W_]+", "", composed(name).casefold())


def _plain_names(names: str) -> frozenset[str]:
    return frozenset(map(plain, names.split()))


# What names of folders mean, compared as `plain` leaves them. "i.O." and "n.i.O." are what German lines write.
GOOD = _plain_names(
    "good ok okay normal nominal pass passed accept accepted defect-free defectless no-defect no-defects non-defective "
    "flawless fault-free anomaly-free no-anomaly clean perfect healthy intact undamaged io"
)
FLAWED = _plain_names(
    "bad ko nok not-ok ng no-good not-good nio fail failed reject rejected defect defects defective flaw flaws flawed "
    "fault faults faulty anomaly anomalies anomalous abnormal damaged broken"
)
MASKS = _plain_names("ground-truth ground-truths gt mask masks annotation annotations segmentation segmentations")
TRAIN = _plain_names("train training")
TEST = _plain_names("test testing test-public")
VALIDATION = _plain_names("val valid validation")
RESERVED = TRAIN | TEST | VALIDATION | MASKS
_NOT = frozenset({"not", "no", "non", "un", "in", "anti", "without", "almost", "nearly"})
LABELS = _plain_names("label labels")  # masks too, where a folder cannot be one of a flaw called so
_MASK_WORD = r"(?:masks?|gt|labels?|ground[-_ ]?truths?|annotations?|segmentations?)"
_MASK_NAME = re.compile(rf"(?<=.)[-_. ]{_MASK_WORD}$|^{_MASK_WORD}[-_. ](?=.)", re.IGNORECASE)


@dataclass(frozen=True)
class FolderNames:
    """The names that stand for good images and for masks, as `plain` leaves them: the known ones, or a caller's."""

    good: frozenset[str] = GOOD
    masks: frozenset[str] = MASKS

    def is_good(self, name: str) -> bool:
        """Whether a folder of that name holds good images."""
        return plain(name) in self.good

    def may_be_good(self, name: str) -> bool:
        """Whether a name has a word for good in it and none that denies it: good_2, "OK lot 7"."""
        words = set(re.split(r"[\W\d_]+", name.casefold()))
        return plain(re.sub(r"\d", "", name)) in self.good or (bool(words & self.good) and not words & (_NOT | FLAWED))

    def is_mask(self, name: str) -> bool:
        """Whether a folder of that name holds masks: gt, and gt_2 too, but GT3 may be a product."""
        return not self.masks.isdisjoint((plain(name), plain(re.sub(r"[\W_]+\d+$", "", name))))

    def may_be_mask(self, name: str) -> bool:
        """Whether a name has a word for masks in it: hole_masks."""
        return not self.masks.isdisjoint(re.split(r"[\W\d_]+", name.casefold()))


NAMES = FolderNames()


class Polygon(NamedTuple):
    """An outline: (x, y) in pixels from the image's top left corner; pixels whose centre it encloses are inside."""

    points: tuple[tuple[float, float], ...]


class Runs(NamedTuple):
    """How many pixels are outside, inside, outside, ... column by column from the top left."""

    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Regions:
    """A mask that a list states in place of a file.

    Attributes:
        origin: the list and the image in it, for messages.
        size: (height, width) of the image that it was drawn on.
        anomalous: what is anomalous: all of these together.
        ignored: what counts neither as anomalous nor as normal.
    """

    origin: str
    size: tuple[int, int]
    anomalous: tuple[Polygon | Runs, ...]
    ignored: tuple[Polygon | Runs, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A test image.

    Attributes:
        path: the image.
        label: 0 normal, 1 anomalous.
        kind: "good" or the defect's name.
        mask: the ground truth of an anomalous image, several files that hold a part of it each, or what a list states
            of it; None for a normal image, and for all images of a data set without ground truth.
        mask_threshold: the mask is anomalous where > this, on the scale to 255.
        ignore: the value of pixels of the mask that count neither as anomalous nor as normal, as stored; all others
            but 0 are anomalous then.
        part: the part that the image is a view of, whose score is the largest of its views; None for an image alone.
    """

    path: Path
    label: int
    kind: str
    mask: Path | tuple[Path, ...] | Regions | None = None
    mask_threshold: int = 127
    ignore: int | None = None
    part: str | None = None


@dataclass(frozen=True)
class Dataset:
    """Normal images to fit on and labelled images to test on (empty where there are none)."""

    name: str
    train: tuple[Path, ...]
    test: tuple[Sample, ...]


def describe(dataset: Dataset) -> str:
    """What was taken for what: "train: 30, good: 20, hole: 8, masks: 8 of 8"."""
    kinds = Counter(sample.kind for sample in dataset.test if sample.label)
    masked = sum(sample.mask is not None for sample in dataset.test)
    found = [("train", len(dataset.train)), ("good", len(dataset.test) - kinds.total()), *kinds.items()]
    return ", ".join([*(f"{name}: {count:,}" for name, count in found), f"masks: {masked:,} of {kinds.total():,}"])


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """The images in a folder and its subfolders, or the one image file `path` is, or the page of one, `file.tif#2`.

    Sorted by path with numbers in numeric order (2.png before 10.png), the same on every system. Files and folders
    whose name starts with a dot are ignored; links are followed. Files in a folder that are no images, and pictures
    that `patchcore-rs predict` drew of some, are left out, and counted in the log "patchcore_rs.images", as INFO.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is not an image (by its suffix) or a folder without any.
    """
    file, page = split_page(os.fspath(path))
    root = Path(present(file))
    looked_for = ", ".join(sorted(IMAGE_SUFFIXES))
    if not root.is_dir():
        if not is_image(root):
            raise ValueError(f"{root}: expected a folder or an image file ({looked_for}); got suffix {root.suffix!r}")
        return [root if page is None else Path(path)]
    files = list(_files(root, frozenset({os.path.realpath(root)})))
    images = [file for file in files if is_image(file) and not _is_drawn(file)]
    suffixes = Counter(_kind(file) for file in files if not is_image(file) or _is_drawn(file))
    found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(_SHOWN)) or "no files"
    if images and suffixes:
        _logger.info("%s: left out %s, no images: %s", root, counted(suffixes.total(), "file"), found)
    if not images:
        raise ValueError(
            f"{root}: no images in this folder or its subfolders; looked for {looked_for}, found {found} "
            "(hidden files are ignored)"
        )
    return sorted(images, key=lambda image: natural(image.relative_to(root)))


def present(path: str | os.PathLike[str]) -> str:
    """The path, where there is something; else the error, with what may have been meant."""
    text = os.fspath(path)
    if not text:  # it would stand for the folder that the program is in
        raise ValueError("the path of images must not be empty; got ''")
    try:
        os.stat(text)
    except FileNotFoundError as error:
        meant = [
            ("://" in text, "download it first, a path is read"),
            (text.startswith("~"), "expand ~ first: Path(...).expanduser()"),
            (any(sign in text for sign in "*?["), 'expand the pattern first: Path(...).glob("*.png")'),
        ]
        hint = next((f"; {remedy}" for fits, remedy in meant if fits), "")
        raise FileNotFoundError(error.errno, f"{error.strerror}{hint}", text) from None
    return text


def split_masks(images: Sequence[Path], folder: Path, names: FolderNames = NAMES) -> tuple[list[Path], list[Path]]:
    """Images of parts, and masks among them: in a folder called so, or named as an image beside or above and _mask."""
    stems = {image.with_name(composed(image.stem)) for image in images}

    def is_mask(image: Path) -> bool:
        if any(map(names.is_mask, image.relative_to(folder).parts[:-1])):
            return True
        part = image.with_name(part_stem(image.stem))
        return part.name != composed(image.stem) and not stems.isdisjoint((part, part.parent.parent / part.name))

    masks = set(filter(is_mask, images))
    return [image for image in images if image not in masks], [image for image in images if image in masks]


def find_parts(folder: str | os.PathLike[str], names: FolderNames = NAMES) -> tuple[list[Path], list[Path]]:
    """As `find_images`: the images of parts, one at least, and the masks that lie among them, by the names below.

    Raises:
        FileNotFoundError, ValueError: as `find_images`, and ValueError where all are masks.
    """
    parts, masks = split_masks(find_images(folder), Path(folder), names)
    if not parts:
        raise ValueError(
            f"{folder}: no images in this folder but masks, by their names: {_mask_places(masks, Path(folder), names)}"
        )
    return parts, masks


def leave_out_masks(folder: str | os.PathLike[str]) -> list[Path]:
    """The images of `find_parts`; masks are counted and named in the log "patchcore_rs.images", as WARNING."""
    parts, masks = find_parts(folder)
    if masks:
        places = _mask_places(masks, Path(folder), NAMES)
        _logger.warning(
            "%s: left out %s, masks by their names: %s; pass what is none by its own path",
            os.fspath(folder),
            counted(len(masks), "image"),
            places,
        )
    return parts


def _mask_places(masks: Sequence[Path], folder: Path, names: FolderNames) -> str:
    """The folders of masks below a folder, and the masks that lie among images."""
    places: dict[str, None] = {}
    for mask in masks:
        relative = mask.relative_to(folder)
        folders = [parent for parent in reversed(relative.parents) if names.is_mask(parent.name)]
        places[(folders or [relative])[0].as_posix()] = None
    return listed(list(places))


def part_stem(stem: str) -> str:
    """The stem of the image that a mask of this stem is of: part_7 of part_7_mask and of mask_part_7."""
    return _MASK_NAME.sub("", composed(stem), count=1)


def require_masks(samples: Sequence[Sample], truth: Path | None) -> None:
    """Refuse ground truth that covers only some anomalous images: metrics over the rest would be wrong in silence."""
    anomalous = [sample for sample in samples if sample.label == 1]
    absent = [sample for sample in anomalous if sample.mask is None]
    if not absent or (truth is None and len(absent) == len(anomalous)):
        return
    masked = {sample.kind for sample in anomalous if sample.mask is not None}
    bare = [kind for kind in dict.fromkeys(sample.kind for sample in absent) if kind not in masked]
    place = absent[0].path.parent if truth is None else truth
    raise FileNotFoundError(
        f"{place}: {len(absent)} of {len(anomalous)} anomalous images have no mask: "
        f"{listed([sample.path for sample in absent])}; a mask has the image's name, with _mask after it or without; "
        f"add them, or remove {'the others' if truth is None else truth.name} to score images only"
        + (f", or, where the images of {bare[0]} are good, say so: good={bare[0]!r}" if masked and bare else "")
    )


def require_own_masks(samples: Sequence[Sample]) -> None:
    """Refuse a mask of two images: they have one name, and the folder of masks has no folders for the kinds."""
    owner: dict[Path, Sample] = {}
    for sample in samples:
        if isinstance(sample.mask, Path) and (other := owner.setdefault(sample.mask, sample)) is not sample:
            raise ValueError(
                f"{sample.mask}: may be the mask of {other.path} and of {sample.path}; put masks into folders named "
                "after the kinds"
            )


def tell_unused(truth: Path, samples: Sequence[Sample], names: FolderNames) -> None:
    """Say which masks belong to no image: one of the two may have another name than was meant."""
    used = {file for sample in samples for file in (sample.mask if isinstance(sample.mask, tuple) else (sample.mask,))}
    left = [file.relative_to(truth) for file in find_images(truth) if file not in used]
    left = [file for file in left if not any(map(names.is_good, file.parts[:-1]))]
    if left:
        _logger.info("%s: left out %s of no test image: %s", truth, counted(len(left), "mask"), listed(left))


def require_flawless(images: Sequence[Path], folder: Path, names: FolderNames = NAMES, remedy: str = "") -> None:
    """Raise ValueError where names say that some of the images below a folder are masks, flawed or to test on."""
    wrong = not_flawless(images, folder, names)
    if wrong:
        remedy = remedy or f"pass the folder of the flawless ones, such as {folder / 'train' / 'good'}"
        raise ValueError(f"{folder}: holds {listed(wrong)}, so not all of its images are flawless; {remedy}")


def not_flawless(images: Sequence[Path], folder: Path, names: FolderNames = NAMES) -> list[str]:
    """Folders and files below `folder` that no training image can come from, by their names: relative, sorted."""
    found = {file.relative_to(folder) for file in split_masks(images, folder, names)[1]}
    below = {part for image in images for part in image.relative_to(folder).parents if part.name}
    siblings: dict[Path, list[str]] = {}
    for part in below:
        siblings.setdefault(part.parent, []).append(part.name)
    wrong = {part for part in below if plain(part.name) in TEST | names.masks | FLAWED and not names.is_good(part.name)}
    for parent, children in siblings.items():
        if any(map(names.is_good, children)):
            wrong |= {parent / child for child in children if not names.is_good(child) and not names.may_be_good(child)}
    found |= wrong
    return [path.as_posix() for path in sorted(found, key=natural) if not wrong & set(path.parents)]


def _files(folder: Path, ancestors: frozenset[str]) -> Iterator[Path]:
    """Every file below a folder but the hidden ones; a link to a folder that contains it ends the walk there."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                yield folder / entry.name
            elif (real := os.path.realpath(entry.path)) not in ancestors:
                yield from _files(folder / entry.name, ancestors | {real})


def has_images(folder: Path) -> bool:
    """Whether an image lies in a folder or below it."""
    return folder.is_dir() and any(map(is_image, _files(folder, frozenset({os.path.realpath(folder)}))))


def subfolders(folder: Path) -> list[Path]:
    """The folders right in a folder but hidden ones, in natural order."""
    children = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
    return sorted(children, key=lambda child: natural(Path(child.name)))


def is_image(path: Path) -> bool:
    """Whether a file is an image, by its suffix."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def _is_drawn(path: Path) -> bool:
    """Whether a file is a picture that was drawn of an image, by its name."""
    drawn = next((path.name[: -len(suffix)] for suffix in DRAWN_SUFFIXES if path.name.endswith(suffix)), "")
    return is_image(Path(drawn))


def _kind(path: Path) -> str:
    """What is counted among files that are left out."""
    if _is_drawn(path):
        return "pictures drawn of images"
    return path.suffix.lower() or "without suffix"


def relative_stem(path: Path, folder: Path) -> str:
    """The path below a folder, with forward slashes and without suffix."""
    return path.relative_to(folder).with_suffix("").as_posix()


def folder_name(folder: Path) -> str:
    """The name of a folder, of "." too."""
    return os.path.basename(os.path.abspath(folder))


def natural(path: Path) -> tuple[list[list[str | int]], tuple[str, ...]]:
    """Sort key: runs of digits compare as numbers; the plain parts decide between 1.png and 01.png."""
    # re.split with a group alternates text and digits, so equal positions always hold equal types.
    parts = [[int(run) if index % 2 else run for index, run in enumerate(re.split(r"(\d+)", p))] for p in path.parts]
    return parts, path.parts


def listed(names: Sequence[object]) -> str:
    """Names for an error message, the first few of many."""
    return shortened(names, _SHOWN)
