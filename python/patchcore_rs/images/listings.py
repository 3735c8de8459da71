"""Files that list the images of a data set, with what each is: CSV and JSON of your own, COCO, Real-IAD, VisA's split.

COCO (https://cocodataset.org/#format-data): an image without annotations is good, one with some has their categories as
its kind; polygons and runs are its mask, and crowds count in no pixel metric. COCO has no split, so that "split" of an
image or a folder train in its file_name says what is trained on; or a folder train and a folder test have a list each.

Real-IAD (https://realiad4ad.github.io/Real-IAD): realiad_jsons holds a list for each category and way to split, with
paths below realiad_RESOLUTION. A part is photographed from five sides, into one folder.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from patchcore_rs._text import counted
from patchcore_rs.images.datasets import (
    TEST,
    TRAIN,
    VALIDATION,
    Dataset,
    FolderNames,
    Polygon,
    Regions,
    Runs,
    Sample,
    folder_name,
    has_images,
    is_image,
    listed,
    natural,
    plain,
    require_masks,
    subfolders,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

_logger = logging.getLogger("patchcore_rs.images")

LIST_SUFFIXES = (".csv", ".json")
_COCO_NAME = re.compile("coco|instances", re.IGNORECASE)

_VISA_SPLIT = Path("split_csv", "1cls.csv")
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")
_NEEDED = ("path", "label", "split")
_GOOD_NUMBERS = {"0": True, "false": True, "1": False, "true": False}


def load_list(file: Path, names: FolderNames) -> Dataset:
    """The data set that a CSV or JSON file lists: path, label and split of every image, and perhaps its mask and part.

    Raises:
        ValueError: the file lists something else, which is named with its line or number.
        FileNotFoundError: images or masks that it lists are missing, or masks of some but not all anomalous images.
    """
    train: list[Path] = []
    samples: list[Sample] = []
    masks: list[Path] = []
    seen: dict[Path, str] = {}
    rows: Iterable[tuple[str, dict[str, str]]]
    if file.suffix.lower() == ".json":
        content = _read_json(file)
        if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
            return _load_coco(file, content, names)
        if isinstance(content, dict) and {"meta", "train", "test"} <= content.keys():
            return _load_realiad(file, content, _realiad_folders(file))
        rows = _json_rows(file, content)
    else:
        rows = _csv_rows(file)
    for place, row in rows:
        absent = [column for column in _NEEDED if not row.get(column)]
        if absent:
            raise ValueError(
                f"{place}: expected {', '.join(_NEEDED)} and perhaps mask and part; {absent[0]} is missing"
            )
        path, label, split = file.parent / _posix(row["path"]), row["label"], plain(row["split"])
        if path in seen:
            raise ValueError(f"{place}: {row['path']} stands in {seen[path]} too; list every image once")
        seen[path] = place
        good = _GOOD_NUMBERS.get(plain(label), names.is_good(label))
        if split in TRAIN:
            if not good:
                raise ValueError(
                    f"{place}: images to train on must be good; got label {label!r}. If it is, say good={label!r}"
                )
            train.append(path)
        elif split in TEST:
            mask = file.parent / _posix(row["mask"]) if row.get("mask") and not good else None
            kind = "good" if good else "anomaly" if plain(label) in _GOOD_NUMBERS else label
            samples.append(Sample(path, 0 if good else 1, kind, mask, part=row.get("part") or None))
            masks += [mask] if mask else []
        elif split not in VALIDATION:
            raise ValueError(f"{place}: split must be train or test (or val, which is left out); got {row['split']!r}")
    _require_files(file, (*seen, *masks))
    if not train:
        raise ValueError(f"{file}: lists no image to train on; write train in the column split")
    require_masks(samples, None)
    return Dataset(file.stem, tuple(train), tuple(samples))


def _posix(path: str) -> str:
    """A path with forward slashes: lists are written on Windows too."""
    return path.replace("\\", "/")


def _require_files(file: Path, paths: Iterable[Path]) -> None:
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{file}: images or masks that it lists are missing ({len(missing)}): {listed(missing)}"
        )


def _csv_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Where a row stands, and what it says by column."""
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            lines = list(opened)
            delimiter = max(",;\t", key=(lines or [""])[0].count)
            reader = csv.DictReader(lines, delimiter=delimiter)
            for row in reader:
                known = {plain(column): value.strip() for column, value in row.items() if column and value}
                yield f"{file}, line {reader.line_num}", known
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a CSV file in UTF-8 ({error}); its columns are path, label, split") from error


_EXPECTED = (
    'expected a list of objects with "path", "label", "split" and perhaps "mask" and "part", or a list as of COCO '
    "or Real-IAD"
)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file ({error}); {_EXPECTED}") from error


def _json_rows(file: Path, rows: Any) -> Iterator[tuple[str, dict[str, str]]]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: {_EXPECTED}; got {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{file}, entry {number}", {plain(key): str(value) for key, value in row.items() if value is not None}


class _Listed(NamedTuple):
    """An image of a COCO list: of no kind where it is good; what "split" or a folder says, None where neither does."""

    path: Path
    kind: str | None
    mask: Regions | None
    split: str | None

    @property
    def sample(self) -> Sample:
        return Sample(self.path, 0, "good") if self.kind is None else Sample(self.path, 1, self.kind, self.mask)


def _load_coco(file: Path, content: dict[str, Any], names: FolderNames) -> Dataset:
    images = _coco_images(file, content, names)
    train = tuple(image.path for image in images if image.split in TRAIN and image.kind is None)
    if not train:
        raise ValueError(
            f"{file}: says of no good image that it is to train on, for which COCO has no word: give images "
            '"split": "train" or "test", or put them into folders of these names, in file_name or with a list each: '
            "then pass the folder that holds both"
        )
    test = tuple(image.sample for image in images if image.split not in TRAIN | VALIDATION)
    return Dataset(file.stem, train, test)


def coco_lists(folder: Path) -> dict[Path, list[Path]]:
    """The lists in each of the folders train and test of a data set; none where no file is called as one of COCO."""
    places = [place for place in subfolders(folder) if plain(place.name) in TRAIN | TEST]
    lists = {place: [file for file in place.glob("*.json") if _COCO_NAME.search(file.name)] for place in places}
    return lists if any(lists.values()) else {}


def load_coco_folders(folder: Path) -> Dataset:
    """A COCO list in train and another in test, beside their images: flawed images in train are not used."""
    train: list[Path] = []
    samples: list[Sample] = []
    for place, lists in coco_lists(folder).items():
        if len(lists) != 1:
            raise ValueError(f"{place}: expected one list of COCO; found {listed(sorted(lists)) or 'none'}")
        images = _coco_images(lists[0], _read_json(lists[0]), FolderNames())
        unlisted = set(filter(is_image, place.rglob("*"))) - {image.path for image in images}
        if unlisted:
            _logger.warning("%s: left out %s that it does not list", lists[0], counted(len(unlisted), "image"))
        if plain(place.name) in TRAIN:
            train += [image.path for image in images if image.kind is None]
        else:
            samples += [image.sample for image in images]
    if not train:
        raise ValueError(f"{folder}: every image in train has annotations, so none is good; train on images without")
    return Dataset(folder_name(folder), tuple(train), tuple(samples))


def _coco_images(file: Path, content: Any, names: FolderNames) -> list[_Listed]:
    """The images that a COCO file lists, in its order."""
    try:
        categories = {entry["id"]: str(entry["name"]) for entry in content.get("categories", ())}
        entries = {entry["id"]: entry for entry in content["images"]}
        sizes = {key: (int(entry["height"]), int(entry["width"])) for key, entry in entries.items()}
        paths = {key: Path(_posix(entry["file_name"])) for key, entry in entries.items()}
        annotations = [
            (entry, entry["image_id"], entry["image_id"] in entries, categories.get(entry["category_id"]))
            for entry in content["annotations"]
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: expected COCO's images (id, file_name, width, height), annotations (image_id, category_id, "
            f"segmentation) and categories (id, name); got {type(error).__name__}: {error}"
        ) from error
    if len(entries) < len(content["images"]) or len(set(paths.values())) < len(paths):
        raise ValueError(f"{file}: an image stands in it twice, by its id or file_name; list every image once")
    kinds: dict[Any, list[str]] = {}
    marks: dict[Any, tuple[list[Polygon | Runs], list[Polygon | Runs]]] = {}
    for entry, image, known, kind in annotations:
        place = f"{file}, annotation {entry.get('id')}"
        if not known or kind is None:
            missing = f"category_id {entry['category_id']}" if known else f"image_id {image}"
            raise ValueError(f"{place}: {missing} is not listed in this file")
        if names.is_good(kind):
            continue
        kinds.setdefault(image, []).append(kind)
        crowd = bool(entry.get("iscrowd"))
        marks.setdefault(image, ([], []))[crowd].extend(_shapes(entry.get("segmentation"), sizes[image], place))
    bases = (base / images for base in (file.parent, file.parent.parent) for images in ("", "images"))
    base = next((base for base in bases if any((base / path).is_file() for path in paths.values())), file.parent)
    _require_files(file, (base / path for path in paths.values()))
    found = []
    for key, path in paths.items():
        said = entries[key].get("split")
        splits = [plain(word) for word in ([str(said)] if said else path.parts[-2::-1])]
        split = next((word for word in splits if word in TRAIN | TEST | VALIDATION), None)
        if said and split is None:
            raise ValueError(f"{file}: split must be train or test (or val, which is left out); got {said!r}")
        if key in kinds:
            flaws, crowds = marks[key]
            mask = Regions(f"{file}, {path.as_posix()}", sizes[key], tuple(flaws), tuple(crowds))
            found.append(_Listed(base / path, "+".join(dict.fromkeys(kinds[key])), mask, split))
        else:
            found.append(_Listed(base / path, None, None, split))
    return found


def _shapes(segmentation: Any, size: tuple[int, int], place: str) -> list[Polygon | Runs]:
    """What an annotation marks on an image of `size` (height, width)."""
    if not segmentation:
        raise ValueError(
            f"{place}: no segmentation, and a box marks flawless pixels too; draw outlines, or list path, label and "
            "split in a CSV file to score images only"
        )
    if isinstance(segmentation, dict):
        runs: Any = segmentation.get("counts")
        runs = _decompressed(runs) if isinstance(runs, str) else runs
        fits = isinstance(runs, list) and all(type(run) is int and run >= 0 for run in runs)
        if not fits or tuple(segmentation.get("size", ())) != size or sum(runs) != size[0] * size[1]:
            raise ValueError(f"{place}: its runs must fill {size[0]} x {size[1]} pixels (height x width), as its image")
        return [Runs(tuple(runs))]
    shapes: list[Polygon | Runs] = []
    for outline in segmentation if isinstance(segmentation, list) else [segmentation]:
        numbers = isinstance(outline, list) and all(type(value) in (int, float) for value in outline)
        if not numbers or len(outline) < 6 or len(outline) % 2 or not all(map(math.isfinite, outline)):
            raise ValueError(f"{place}: a polygon must be x, y, x, y, ... of three points or more; got {outline!r:.80}")
        shapes.append(Polygon(tuple(zip(outline[::2], outline[1::2], strict=True))))
    return shapes


def _decompressed(text: str) -> list[int] | None:
    """The runs of COCO's compressed form, None where it is none.

    A character holds five bits of a number, the lowest first, above "0"; its sixth bit says that more follow, and the
    fifth bit of the last one is the sign. From the fourth run on the number is the difference to the run two before.
    """
    runs: list[int] = []
    number = shift = 0
    for character in text:
        bits = ord(character) - ord("0")
        if not 0 <= bits < 64:
            return None
        number |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = shift = 0
    return None if shift else runs


def realiad_list(folder: Path) -> Path | None:
    """The list of a category of Real-IAD, where its folder lies in the tree as published; of all views."""
    jsons = Path(os.path.abspath(folder)).parent.parent / "realiad_jsons"
    lists = (place / f"{folder_name(folder)}.json" for place in (jsons / "realiad_jsons", jsons))
    return next((file for file in lists if file.is_file()), None)


def load_realiad(folder: Path) -> Dataset:
    """A category of Real-IAD in one resolution, by its list."""
    file = realiad_list(folder)
    assert file is not None, "the caller found it"
    return _load_realiad(file, _read_json(file), [folder.parent])


def _realiad_folders(file: Path) -> list[Path]:
    """The folders of the resolutions beside a list of Real-IAD."""
    above = Path(os.path.abspath(file)).parents[:3]
    return [
        place for parent in above for place in parent.glob("realiad_*") if not place.name.startswith("realiad_jsons")
    ]


def _load_realiad(file: Path, content: Any, folders: Sequence[Path]) -> Dataset:
    """What a list of Real-IAD says of the images in one of these folders."""
    try:
        prefix, normal = str(content["meta"]["prefix"]), content["meta"]["normal_class"]
        entries = {
            split: [(entry["image_path"], entry["anomaly_class"], entry["mask_path"]) for entry in content[split]]
            for split in ("train", "test")
        }
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected Real-IAD's meta (prefix, normal_class), train and test (image_path, anomaly_class, "
            f"mask_path); got {type(error).__name__}: {error}"
        ) from error
    found = [folder / prefix for folder in sorted(folders, key=natural) if (folder / prefix).is_dir()]
    if len(found) != 1:
        raise ValueError(
            f"{file}: its images must lie in one folder beside realiad_jsons, such as realiad_1024/{prefix}; found "
            f"{listed(found) or 'none'}" + (". Load one by its own path, or move the others away" if found else "")
        )
    flawed = [image for image, kind, _ in entries["train"] if kind != normal]
    if flawed:
        raise ValueError(
            f"{file}: images to train on must be of the class {normal}; {len(flawed)} are not: {listed(flawed)}"
        )
    train = tuple(found[0] / image for image, _, _ in entries["train"])
    samples = []
    for image, kind, mask in entries["test"]:
        path, part = found[0] / image, PurePosixPath(image).parent.as_posix()
        if kind == normal:
            samples.append(Sample(path, 0, "good", part=part))
        else:
            samples.append(Sample(path, 1, str(kind), found[0] / mask if mask else None, mask_threshold=0, part=part))
    masks = [sample.mask for sample in samples if isinstance(sample.mask, Path)]
    _require_files(file, (*train, *(sample.path for sample in samples), *masks))
    require_masks(samples, None)
    return Dataset(file.stem, train, tuple(samples))


def load_visa(folder: Path) -> Dataset:
    """VisA as downloaded: its 1-class split file names every image, and masks hold 0 or the number of a defect."""
    name = folder_name(folder)
    split = Path(os.path.abspath(folder)).parent / _VISA_SPLIT
    if not split.is_file():
        raise FileNotFoundError(
            f"{split} is missing: layout 'visa' takes the training images from it; copy it from the VisA archive"
        )
    rows = [row for row in _visa_rows(split) if row["object"] == name]
    if not rows:
        raise ValueError(f"{split}: no row for {name!r} in column object")
    rows.sort(key=lambda row: natural(Path(row["image"])))
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
        raise FileNotFoundError(f"{split}: images it lists are missing ({len(absent)}): {listed(absent)}")
    truth = folder / "Data" / "Masks"
    require_masks(samples, truth if has_images(truth) else None)
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
