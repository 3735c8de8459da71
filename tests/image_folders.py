"""Folders of tiny images and masks that the tests of data sets share, and what was made of them as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs.images.files import write_image

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from patchcore_rs.images.datasets import Dataset

MASK_FOLDERS = ("ground_truth", "Masks", "drawn")
IMAGE = np.full((4, 6, 3), 90, np.uint8)
MASK = np.zeros((4, 6), np.uint8)
MASK[1:3, 2:5] = 255


def make(root: Path, names: Iterable[str]) -> Path:
    """Write an image or, in a folder of masks, a mask at each name that ends in .png, an empty file at any other."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".png":
            path.touch()
        else:
            write_image(path, MASK if any(word in name for word in MASK_FOLDERS) else IMAGE)
    return root


def names(root: Path, paths: Iterable[Path]) -> list[str]:
    return [path.relative_to(root).as_posix() for path in paths]


def table(root: Path, dataset: Dataset) -> list[tuple[str, int, str, str | None]]:
    rows = [(sample.path, sample.label, sample.kind, sample.mask) for sample in dataset.test]
    return [(*names(root, [path]), label, kind, mask and names(root, [mask])[0]) for path, label, kind, mask in rows]
