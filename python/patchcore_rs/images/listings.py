"""Files that list the images of a data set, with what each is: VisA's split."""

from __future__ import annotations

import csv
import os
from pathlib import Path, PurePosixPath

from patchcore_rs.images.datasets import Dataset, Sample, folder_name, listed, natural, require_masks

_VISA_SPLIT = Path("split_csv", "1cls.csv")
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")


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
    require_masks(samples, folder / "Data" / "Masks")
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
