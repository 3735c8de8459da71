"""Folders of images in, one small dataclass out.

Layouts (any suffix of `IMAGE_SUFFIXES`, for masks too; hidden files are ignored; KIND names a defect):

    mvtec    train/good   test/good   test/KIND   ground_truth/KIND/STEM_mask.png
    btad     train/ok     test/ok     test/ko     ground_truth/ko/STEM.png
    visa     CATEGORY/Data/Images/Normal, CATEGORY/Data/Images/Anomaly, CATEGORY/Data/Masks/Anomaly,
             and split_csv/1cls.csv beside the categories, which says what is trained on
    folder   train (or train/good), and where wanted test/good, test/KIND and ground_truth as in mvtec;
             or good beside the other kinds, which then are the test images

A folder called good, ok or normal holds normal images, under any other name in test anomalous ones. A mask may be
called STEM_mask or STEM, so VisA reorganised into train, test and ground_truth loads as mvtec.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs._text import counted, shortened
from patchcore_rs.images.files import IMAGE_SUFFIXES, ImageError, image_size, read_mask

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

_logger = logging.getLogger("patchcore_rs.images")

_LAYOUTS = ("auto", "mvtec", "visa", "btad", "folder")
_REQUIRED = {"mvtec": ("train/good", "test"), "btad": ("train/ok", "test"), "folder": ()}
_NORMAL = ("good", "ok", "normal")
_RESERVED = ("train", "test", "ground_truth")
_VISA_SPLIT = Path("split_csv", "1cls.csv")
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")
# What `patchcore-rs predict` draws is called after its image, as in part.png.overlay.png, and is none itself.
DRAWN_SUFFIXES = (".overlay.png", ".map.png")
_SHOWN = 5  # entries an error message lists before it counts the rest


@dataclass(frozen=True)
class Sample:
    """A test image.

    Attributes:
        path: the image.
        label: 0 normal, 1 anomalous.
        kind: "good" or the defect's name.
        mask: the ground truth of an anomalous image; None for a normal image, and for all images of a data set without
            ground truth.
        mask_threshold: the mask is anomalous where > this, on the scale to 255.
    """

    path: Path
    label: int
    kind: str
    mask: Path | None = None
    mask_threshold: int = 127


@dataclass(frozen=True)
class Dataset:
    """Normal images to fit on and labelled images to test on (empty where there are none)."""

    name: str
    train: tuple[Path, ...]
    test: tuple[Sample, ...]


def find_images(path: str | os.PathLike[str]) -> list[Path]:
    """The images in a folder and its subfolders, or the one image file `path` is.

    Sorted by path with numbers in numeric order (2.png before 10.png), the same on every system. Files and folders
    whose name starts with a dot are ignored; links are followed. Files in a folder that are no images, and pictures
    that `patchcore-rs predict` drew of some, are left out, and counted in the log "patchcore_rs.images", as INFO.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: it is not an image (by its suffix) or a folder without any.
    """
    root = Path(_present(path))
    looked_for = ", ".join(sorted(IMAGE_SUFFIXES))
    if not root.is_dir():
        if not _is_image(root):
            raise ValueError(f"{root}: expected a folder or an image file ({looked_for}); got suffix {root.suffix!r}")
        return [root]
    files = list(_files(root, frozenset({os.path.realpath(root)})))
    images = [file for file in files if _is_image(file) and not _is_drawn(file)]
    suffixes = Counter(_kind(file) for file in files if not _is_image(file) or _is_drawn(file))
    found = ", ".join(f"{count} {suffix}" for suffix, count in suffixes.most_common(_SHOWN)) or "no files"
    if images and suffixes:
        _logger.info("%s: left out %s, no images: %s", root, counted(suffixes.total(), "file"), found)
    if not images:
        raise ValueError(
            f"{root}: no images in this folder or its subfolders; looked for {looked_for}, found {found} "
            "(hidden files are ignored)"
        )
    return sorted(images, key=lambda image: _natural(image.relative_to(root)))


def _present(path: str | os.PathLike[str]) -> str:
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


def load_dataset(root: str | os.PathLike[str], *, layout: str = "auto", category: str | None = None) -> Dataset:
    """List the training and test images of a data set in one of the layouts above; no image is opened.

    Args:
        root: the folder.
        layout: "mvtec", "visa", "btad" or "folder"; "auto" recognises it by its folders.
        category: a subfolder of `root` where that holds several data sets, as the MVTec AD, VisA and BTAD downloads do.

    Raises:
        ValueError: no layout or category fits; it names what was found.
        FileNotFoundError: `root`, images of a split file, or the masks of some but not all anomalous images are
            missing.
        NotADirectoryError: `root` is a file.
    """
    if layout not in _LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(_LAYOUTS)}; got {layout!r}")
    root = Path(_present(root))
    categories = find_categories(root)
    folder = root
    if category is not None:
        if category not in categories:
            raise ValueError(
                f"{root}: no category {category!r}; found {_listed(categories) if categories else 'none'}"
                + ("" if _detect(root) is None else "; this folder is a data set itself, leave category out")
            )
        folder = root / category
    detected = _detect(folder)
    if detected is None:
        raise ValueError(_unrecognised(root, categories))
    if layout == "auto":
        layout = detected
    return _load_visa(folder) if layout == "visa" else _load_folders(folder, layout)


def read_sample_mask(sample: Sample) -> NDArray[np.bool_]:
    """The (height, width) bool ground truth of a test image, in the image's own size; all False for a normal one.

    Raises:
        ValueError: an anomalous sample has no mask.
        ImageError: image or mask cannot be read, or their sizes differ.
    """
    size = image_size(sample.path)
    if sample.label == 0:
        return np.zeros(size, dtype=np.bool_)
    if sample.mask is None:
        raise ValueError(f"{sample.path}: no ground truth; pixel metrics need a mask for every anomalous image")
    mask = read_mask(sample.mask, threshold=sample.mask_threshold)
    if mask.shape != size:
        raise ImageError(
            f"{sample.mask}: the mask is {mask.shape[0]} x {mask.shape[1]} (height x width) and its image "
            f"{sample.path} is {size[0]} x {size[1]}; save the mask in the size of the image"
        )
    return mask


def _load_folders(folder: Path, layout: str) -> Dataset:
    """The layouts made of folders named after what they hold: mvtec, btad, folder."""
    absent = [name for name in _REQUIRED[layout] if not (folder / name).is_dir()]
    if absent:
        raise ValueError(
            f"{folder}: layout {layout!r} expects the folders {' and '.join(_REQUIRED[layout])}; "
            f"missing {' and '.join(absent)}; layout='auto' would read it as {_detect(folder)!r}"
        )
    choices = (*(f"train/{name}" for name in _NORMAL), "train", *_NORMAL)
    train = next((folder / name for name in choices if (folder / name).is_dir()), None)
    if train is None:
        raise ValueError(f"{folder}: layout {layout!r} expects the training images in train or good")
    if (folder / "test").is_dir():
        kinds = _subfolders(folder / "test")
        loose = [file.name for file in sorted((folder / "test").iterdir()) if _is_image(file) and not file.is_dir()]
        if loose:
            raise ValueError(
                f"{folder / 'test'}: images outside a subfolder have no label ({len(loose)}): {_listed(loose)}; "
                "move them into test/good or a folder named after the defect"
            )
    elif train.parent == folder and train.name in _NORMAL:
        kinds = [kind for kind in _subfolders(folder) if kind.name not in _RESERVED and kind != train]
    else:
        kinds = []
    samples = [sample for kind in kinds for sample in _kind_samples(kind, folder / "ground_truth" / kind.name)]
    _require_masks(samples, folder / "ground_truth")
    return Dataset(_name(folder), tuple(find_images(train)), tuple(samples))


def _kind_samples(kind: Path, truth: Path) -> Iterator[Sample]:
    images = find_images(kind)
    if kind.name in _NORMAL:
        yield from (Sample(image, 0, "good") for image in images)
        return
    masks: dict[str, Path] = {}
    for mask in find_images(truth) if _has_images(truth) else []:
        stem = _stem(mask, truth)
        if stem in masks:
            raise ValueError(f"{truth}: two masks for one image, {masks[stem].name} and {mask.name}; keep one of them")
        masks[stem] = mask
    for image in images:
        stem = _stem(image, kind)
        yield Sample(image, 1, kind.name, masks.get(f"{stem}_mask", masks.get(stem)))


def _load_visa(folder: Path) -> Dataset:
    """VisA as downloaded: its 1-class split file names every image, and masks hold 0 or the number of a defect."""
    name = _name(folder)
    split = Path(os.path.abspath(folder)).parent / _VISA_SPLIT
    if not split.is_file():
        raise FileNotFoundError(
            f"{split} is missing: layout 'visa' takes the training images from it; copy it from the VisA archive"
        )
    rows = [row for row in _visa_rows(split) if row["object"] == name]
    if not rows:
        raise ValueError(f"{split}: no row for {name!r} in column object")
    rows.sort(key=lambda row: _natural(Path(row["image"])))
    train = [_visa_path(folder, row["image"]) for row in rows if row["split"] == "train"]
    samples = []
    for row in rows:
        image, mask = _visa_path(folder, row["image"]), _visa_path(folder, row["mask"])
        if row["label"] == "anomaly":
            samples.append(Sample(image, 1, "anomaly", mask if mask.is_file() else None, mask_threshold=0))
        elif row["split"] == "test":
            samples.append(Sample(image, 0, "good"))
    absent = [path for path in (*train, *(sample.path for sample in samples)) if not path.is_file()]
    if absent:
        raise FileNotFoundError(f"{split}: images it lists are missing ({len(absent)}): {_listed(absent)}")
    _require_masks(samples, folder / "Data" / "Masks")
    return Dataset(name, tuple(train), tuple(samples))


def _visa_rows(split: Path) -> list[dict[str, str]]:
    """The rows of the split file, checked."""
    try:
        with open(split, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = [{column: row.get(column) or "" for column in _VISA_COLUMNS} for row in reader]
            columns = reader.fieldnames or ()
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{split}: not a CSV file ({error}); copy it from the VisA archive") from error
    if not set(_VISA_COLUMNS) <= set(columns):
        raise ValueError(
            f"{split}: expected the columns {', '.join(_VISA_COLUMNS)}; got {', '.join(columns) or 'none'}"
        )
    for number, row in enumerate(rows, start=2):
        if (row["split"], row["label"]) not in {("train", "normal"), ("test", "normal"), ("test", "anomaly")}:
            raise ValueError(
                f"{split}, line {number}: expected train,normal or test,normal or test,anomaly (the 1-class split); "
                f"got {row['split']},{row['label']}"
            )
        # A split file from elsewhere must not reach outside its category.
        for path in filter(None, (row["image"], row["mask"])):
            if PurePosixPath(path).parts[0] != row["object"] or ".." in PurePosixPath(path).parts:
                raise ValueError(
                    f"{split}, line {number}: expected a path that starts with {row['object']}/; got {path}"
                )
    return rows


def _visa_path(folder: Path, listed: str) -> Path:
    """The split file lists paths from the parent of `folder`, with forward slashes."""
    return folder.joinpath(*PurePosixPath(listed).parts[1:])


def _require_masks(samples: Sequence[Sample], truth: Path) -> None:
    """Refuse ground truth that covers only some anomalous images: metrics over the rest would be wrong in silence."""
    anomalous = [sample for sample in samples if sample.label == 1]
    absent = [sample.path for sample in anomalous if sample.mask is None]
    if absent and _has_images(truth):
        raise FileNotFoundError(
            f"{truth}: {len(absent)} of {len(anomalous)} anomalous images have no mask: {_listed(absent)}; a mask has "
            f"the image's name, with _mask after it or without; add them, or remove {truth.name} to score images only"
        )


def _detect(folder: Path) -> str | None:
    """The layout a folder has by the names of its subfolders; None where it has none."""
    for layout in ("mvtec", "btad"):
        if all((folder / name).is_dir() for name in _REQUIRED[layout]):
            return layout
    if (folder / "Data" / "Images").is_dir():
        return "visa"
    return "folder" if any((folder / name).is_dir() for name in ("train", *_NORMAL)) else None


def find_categories(root: Path) -> list[str]:
    """Subfolders that are data sets themselves."""
    return [child.name for child in _subfolders(root) if child.name not in _RESERVED and _detect(child)]


def _unrecognised(root: Path, categories: list[str]) -> str:
    if categories:
        return f"{root}: holds the data sets {', '.join(categories)}; choose one, such as category={categories[0]!r}"
    found = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith("."))
    return (
        f"{root}: no data set here; expected train/good and test (mvtec), train/ok and test (btad), Data/Images "
        f"(visa), or train or good (folder); found {_listed(found) if found else 'nothing'}"
    )


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


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(map(_is_image, _files(folder, frozenset({os.path.realpath(folder)}))))


def _subfolders(folder: Path) -> list[Path]:
    children = [child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")]
    return sorted(children, key=lambda child: _natural(Path(child.name)))


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _is_drawn(path: Path) -> bool:
    """Whether a file is a picture that was drawn of an image, by its name."""
    drawn = next((path.name[: -len(suffix)] for suffix in DRAWN_SUFFIXES if path.name.endswith(suffix)), "")
    return _is_image(Path(drawn))


def _kind(path: Path) -> str:
    """What is counted among files that are left out."""
    if _is_drawn(path):
        return "pictures drawn of images"
    return path.suffix.lower() or "without suffix"


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _name(folder: Path) -> str:
    return os.path.basename(os.path.abspath(folder))


def _natural(path: Path) -> tuple[list[list[str | int]], tuple[str, ...]]:
    """Sort key: runs of digits compare as numbers; the plain parts decide between 1.png and 01.png."""
    # re.split with a group alternates text and digits, so equal positions always hold equal types.
    parts = [[int(run) if index % 2 else run for index, run in enumerate(re.split(r"(\d+)", p))] for p in path.parts]
    return parts, path.parts


def _listed(names: Sequence[object]) -> str:
    return shortened(names, _SHOWN)
