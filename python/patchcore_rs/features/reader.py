"""Images of any source in, the patch features of one batch after the other out."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patchcore_rs._checks import one_of
from patchcore_rs.features.feature_set import FeatureSet
from patchcore_rs.images.files import check_header
from patchcore_rs.images.levels import Peak

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_rs._stopwatch import Stopwatch
    from patchcore_rs._types import OnError, Progress
    from patchcore_rs.features.extractor import FeatureExtractor, ImageBatch
    from patchcore_rs.features.store import FeatureStore
    from patchcore_rs.images.sources import Source


_DARK = 1 / 16  # where the brightest image reaches a smaller share of white, the camera has fewer bits than the file


def check_on_error(on_error: object) -> None:
    """TypeError or ValueError for what is neither "raise" nor "skip"."""
    one_of("raise", "skip", expected='"raise" or "skip"')(on_error, "on_error")


def check_headers(source: Source) -> None:
    """ImageError or OSError for the first of several files that its header shows to be no image."""
    for file in source.files if len(source.files) > 1 else ():
        check_header(file)


def warn_of_skipped(skipped: Sequence[tuple[str, str]], read: int, *, stacklevel: int) -> None:
    """Say how many images were left out beside those that were `read`, where some were."""
    if skipped:
        name, reason = skipped[0]
        warnings.warn(
            f"{len(skipped)} of {read + len(skipped)} images were left out; the first: {name} ({reason})",
            stacklevel=stacklevel + 1,
        )


class Collected(NamedTuple):
    """The images whose features were taken in: names, paths, their grid of patches and their size in pixels.

    `unseen` are the shares of the images that the crop cut off, `image_hashes` (n,) those of `image_hash`.
    """

    names: tuple[str, ...]
    paths: tuple[Path | None, ...]
    grid: tuple[int, int]
    image_size: tuple[int, int]
    unseen: tuple[float, ...]
    image_hashes: NDArray[np.int64]


class Reader:
    """The patch features of images, batch by batch, by one extractor.

    `image_size` is the (height, width) of the prepared images once the first is read; all must share it. `skipped`
    lists (name, reason) of those that `on_error="skip"` left out.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        batch_size: int,
        stopwatch: Stopwatch,
        *,
        on_error: OnError = "raise",
        progress: Progress | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        """Expect images of `image_size`, or of the first one's size; ValueError where `on_error` is no known word."""
        check_on_error(on_error)
        self.extractor, self.stopwatch = extractor, stopwatch
        self.batch_size = max(batch_size, extractor.side_by_side)  # or threads would have nothing to do
        self.on_error, self.progress = on_error, progress
        self.image_size = image_size
        self.skipped: list[tuple[str, str]] = []
        self.peak = Peak()

    def read(
        self, stage: str, source: Source, *, hashes: bool = False
    ) -> Iterator[tuple[ImageBatch, NDArray[np.float32], tuple[int, int]]]:
        """Each batch with its (n * gh * gw, d) features and their grid (gh, gw); progress goes by as `stage`.

        A batch holds the `hashes` of its images where they are asked for.

        Raises:
            ValueError, OSError: where `on_error` is "raise", an image, which is named, cannot be read or has another
                size than those before. What the headers of files tell is raised before any work.
        """
        if self.on_error == "raise":
            check_headers(source)
        on_failure = self._skip if self.on_error == "skip" else None
        batches = self.extractor.batches(source, self.batch_size, on_failure=on_failure, peak=self.peak, hashes=hashes)
        done = 0
        while True:
            with self.stopwatch("backbone"):
                batch = next(batches, None)
            if batch is None:
                break
            if not self._fits(batch):
                continue
            features, grid = self.extractor.extract(batch.images, batch.names, stopwatch=self.stopwatch)
            yield batch, features, grid
            done += len(batch.names)
            if self.progress is not None:
                self.progress(stage, done + len(self.skipped), source.count)

    def gather(self, store: FeatureStore, source: Source) -> FeatureSet:
        """The features of all images, as the stage "features".

        Raises:
            ValueError, OSError: as `read`, and no image can be read.
        """
        names, paths, grid, image_size, unseen, hashes = self.collect(store.append, source)
        backbone = self.extractor.backbone
        return FeatureSet(
            store.finish(),
            grid,
            image_size,
            names,
            paths,
            backbone.name,
            backbone.weights_hash,
            self.extractor.extraction,
            image_hashes=hashes,
            unseen=unseen,
            layer_widths=self.extractor.layer_widths,
            skipped=tuple(self.skipped),
            seconds=dict(self.stopwatch.seconds),
        )

    def collect(self, take: Callable[[NDArray[np.float32], int], object], source: Source) -> Collected:
        """Hand the features of all images to `take`, part after part, as the stage "features".

        `take` gets (n * gh * gw, d) features and n. Warns once of images left out. Raises what `gather` does.
        """
        names: list[str] = []
        paths: list[Path | None] = []
        unseen: list[float] = []
        hashes: list[int] = []
        grid = (1, 1)
        for batch, patches, shape in self.read("features", source, hashes=True):
            grid = shape
            take(patches, len(batch.names))
            names += batch.names
            paths += batch.paths
            unseen += batch.unseen
            hashes += batch.hashes or ()
        warn_of_skipped(self.skipped, len(names), stacklevel=3)
        if self.image_size is None or not names:
            name, reason = self.skipped[0]
            raise ValueError(f"none of the {len(self.skipped)} images can be read; the first: {name} ({reason})")
        peak = self.peak
        if peak.share < _DARK and peak.white_level < peak.white:
            warnings.warn(
                f"the largest of all 16-bit samples is {peak.value} where white is {peak.white}: of 256 levels these "
                f"images use {round(peak.share * 255) + 1}. Pass white_level={peak.white_level} where that is the "
                'white of the camera, or white_level="auto"',
                stacklevel=4,
            )
        return Collected(
            tuple(names), tuple(paths), grid, self.image_size, tuple(unseen), np.array(hashes, dtype=np.int64)
        )

    def _skip(self, name: str, error: Exception) -> None:
        self.skipped.append((name, str(error)))

    def _fits(self, batch: ImageBatch) -> bool:
        """Whether the images of a batch have the size of those before; else they fail as unreadable ones do."""
        height, width = batch.images.shape[2:]
        self.image_size = self.image_size or (height, width)
        if (height, width) == self.image_size:
            return True
        for name in batch.names:
            error = ValueError(
                f"{name}: {height} x {width} pixels (height x width) after resizing and cropping, where "
                f"{self.image_size[0]} x {self.image_size[1]} is expected as of the images before; set resize= to an "
                "exact (height, width), or crop="
            )
            if self.on_error == "raise":
                raise error
            self._skip(name, error)
        return False
