"""Files that list the images of a data set, with what each is: CSV and JSON of your own, and VisA's split."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from patchcore_rs.images.datasets import (
    TEST,
    TRAIN,
    VALIDATION,
    Dataset,
    FolderNames,
    Sample,
    folder_name,
    has_images,
    listed,
    natural,
    plain,
    require_masks,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

LIST_SUFFIXES = (".csv", ".json")

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
    for place, row in _json_rows(file) if file.suffix.lower() == ".json" else _csv_rows(file):
        absent = [column for column in _NEEDED if not row.get(column)]
        if absent:
            raise ValueError(
                f"{place}: expected {', '.join(_NEEDED)} and perhaps mask and part; {absent[0]} is missing"
            )
        path, label, split = file.parent / row["path"], row["label"], plain(row["split"])
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
            mask = file.parent / row["mask"] if row.get("mask") and not good else None
            kind = "good" if good else "anomaly" if plain(label) in _GOOD_NUMBERS else label
            samples.append(Sample(path, 0 if good else 1, kind, mask, part=row.get("part") or None))
            masks += [mask] if mask else []
        elif split not in VALIDATION:
            raise ValueError(f"{place}: split must be train or test (or val, which is left out); got {row['split']!r}")
    missing = [path for path in (*seen, *masks) if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{file}: images or masks that it lists are missing ({len(missing)}): {listed(missing)}"
        )
    if not train:
        raise ValueError(f"{file}: lists no image to train on; write train in the column split")
    require_masks(samples, None)
    return Dataset(file.stem, tuple(train), tuple(samples))


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


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    expected = 'expected a list of objects with "path", "label", "split" and perhaps "mask" and "part"'
    try:
        rows: Any = json.loads(file.read_text("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file ({error}); {expected}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file}: {expected}; got {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        yield f"{file}, entry {number}", {plain(key): str(value) for key, value in row.items() if value is not None}


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
