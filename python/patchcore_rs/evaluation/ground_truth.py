"""The masks of a test set, before any work: whether they can be read, can be meant so, and fit into memory."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

from patchcore_rs.images.masks import judge_masks, measure_mask
from patchcore_rs.images.read_ahead import read_ahead
from patchcore_rs.images.sources import Item

if TYPE_CHECKING:
    from patchcore_rs._types import OnError
    from patchcore_rs.images.datasets import Dataset


def with_readable_masks(dataset: Dataset, on_error: OnError) -> Dataset:
    """The data set without the test images whose mask cannot be read; or ImageError, before any work is done."""
    masked = [Item(str(sample.path), sample.path, sample) for sample in dataset.test if sample.mask is not None]
    if not masked:
        return dataset
    bad: dict[str, Exception] = {}
    skip = bad.__setitem__ if on_error == "skip" else None
    # Masks are read again where they are needed: kept, those of a test set take as much memory as its maps.
    read = read_ahead(iter(masked), measure_mask, None, ahead=0, on_failure=skip)
    marked = {name: mask for name, _, mask in read}
    judge_masks({sample: marked[str(sample.path)] for sample in dataset.test if str(sample.path) in marked})
    if not bad:
        return dataset
    name, error = next(iter(bad.items()))
    warnings.warn(f"{len(bad)} of {len(dataset.test)} images were left out; the first: {name} ({error})", stacklevel=3)
    return replace(dataset, test=tuple(sample for sample in dataset.test if str(sample.path) not in bad))
