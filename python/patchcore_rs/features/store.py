"""The array that the features of a fit grow in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs import _limits
from patchcore_rs._limits import estimate_memory, gigabytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

_logger = logging.getLogger("patchcore_rs")


class FeatureStore:
    """The training features in one float32 array: of its final size at once where the number of images is known.

    `images` counts those whose features are there. Raises MemoryError, before anything is allocated, where the fit
    would not fit into the memory there is.
    """

    def __init__(self, images: int | None, coreset: float | None, *, first: NDArray[np.float32] | None = None) -> None:
        """Expect `images` images, None where that is not known; the bank takes the coreset of their patches.

        The rows of `first` come before theirs, and are copied when those of the first images are there.
        """
        self._expected, self._coreset, self._first = images, coreset, first
        self._array = np.empty((0, 0), np.float32)
        self._rows = 0
        self.images = 0

    def append(self, features: NDArray[np.float32], images: int) -> None:
        """Add the (rows, d) features of the next `images` images."""
        first, self._first = self._first, None
        before = self._rows if first is None else len(first)
        rows = before + len(features)
        if rows > len(self._array):
            expected = before + len(features) // images * self._expected if self._expected is not None else 0
            self._grow(max(rows + rows // 2 if self._rows else rows, expected), features.shape[1])
        if first is not None:
            self._array[:before] = first
        self._array[before:rows] = features
        self._rows = rows
        self.images += images

    def finish(self) -> NDArray[np.float32]:
        """The features, (n, d); the store is empty afterwards."""
        array, self._array = self._array, np.empty((0, 0), np.float32)
        array.resize((self._rows, array.shape[1]), refcheck=False)
        return array

    def _grow(self, rows: int, dimensions: int) -> None:
        share = 1.0 if self._coreset is None else self._coreset
        bank_rows = round(rows * share) if isinstance(share, float) else min(rows, share)
        needed = estimate_memory(rows, dimensions, bank_rows)
        _logger.info("fit takes about %s for %d patches of %d channels", gigabytes(needed), rows, dimensions)
        available = _limits.available_memory()
        held = self._array.nbytes
        if available is not None and needed - held > available:
            raise MemoryError(
                f"fit takes about {gigabytes(needed)} for {rows} patches of {dimensions} float32 channels and their "
                f"memory bank, {gigabytes(available + held)} are available; use fewer or smaller images (crop=, "
                "resize=), a narrower embedding= or a smaller coreset="
            )
        if self._rows == 0:
            self._array = np.empty((rows, dimensions), np.float32)
        else:  # in place: the operating system moves pages where it can, and no second array is held
            self._array.resize((rows, dimensions), refcheck=False)
