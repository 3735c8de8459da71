"""The masks of a test set: looked at before any work, and laid on the images as they are and as a model sees them."""

from __future__ import annotations

import contextlib
import math
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs import _native, metrics
from patchcore_rs._limits import require_memory
from patchcore_rs._text import counted
from patchcore_rs.images.files import ImageError, check_header
from patchcore_rs.images.masks import Marks, judge_masks, measure_mask, read_sample_marks
from patchcore_rs.images.pixels import geometry, resize_crop_mask
from patchcore_rs.images.read_ahead import read_ahead
from patchcore_rs.images.sources import Item

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from patchcore_rs._types import OnError
    from patchcore_rs.images.datasets import Dataset, Sample
    from patchcore_rs.model.settings import Settings

_KEPT = 10  # bytes of a pixel besides those of a metric, measured: its map, float32, flags, and room for more marks


@dataclass(frozen=True)
class GroundTruth:
    """The marks of n images, each in the image's own pixels (h, w), and the geometry in which a model sees them."""

    marks: tuple[Marks, ...]
    resize: int | tuple[int, int] | None
    crop: int | tuple[int, int] | None

    @classmethod
    def of(cls, samples: Sequence[Sample], settings: Settings) -> GroundTruth:
        """Read the masks of images that a model of these settings inspects."""
        return cls(tuple(map(read_sample_marks, samples)), settings.resize, settings.crop)

    def as_seen(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
        """(n, H, W) anomalous pixels, and those to leave out, None where there are none, as the model sees them."""
        masks = np.stack([resize_crop_mask(marks.anomalous, self.resize, self.crop) for marks in self.marks])
        if not any(marks.ignored.any() for marks in self.marks):
            return masks, None
        return masks, np.stack([resize_crop_mask(marks.ignored, self.resize, self.crop) for marks in self.marks])

    def bring_back(
        self, index: int, anomaly_map: NDArray[np.float32], unseen: float, threads: int | None
    ) -> NDArray[np.float32]:
        """The map (H, W) of an image in its own pixels (h, w), bilinear; `unseen` where the crop had cut it off."""
        size = self.marks[index].anomalous.shape
        resized, offset, _ = geometry(size, self.resize, self.crop)
        return _native.undo_resize(anomaly_map, size, resized, offset, unseen, threads)

    def is_unseen(self, index: int) -> bool:
        """Whether the crop cuts off all that is marked on an image."""
        anomalous = self.marks[index].anomalous
        if self.crop is None or not anomalous.any():
            return False
        seen = np.zeros(geometry(anomalous.shape, self.resize, self.crop).crop, dtype=np.float32)
        return bool(self.bring_back(index, seen, 1.0, None)[anomalous].all())


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


def require_memory_for_masks(dataset: Dataset) -> None:
    """Announce what judging the test images in their own pixels takes; MemoryError where that is not there.

    Only their headers are read, and a damaged one is left to whoever reads the image.
    """
    if all(sample.mask is None for sample in dataset.test):
        return
    pixels = 0
    for sample in dataset.test:
        with contextlib.suppress(ImageError, OSError):
            pixels += math.prod(check_header(sample.path))
    require_memory(
        metrics.pixel_memory(pixels) + _KEPT * pixels,
        f"judging {counted(pixels, 'pixel')} of {counted(len(dataset.test), 'test image')}",
        'judge at the size at which the model sees them: pixels="model"',
    )
