"""The array that features grow in."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs import _limits
from patchcore_rs._limits import gigabytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

_logger = logging.getLogger("patchcore_rs")

_REMEDY = (
    "a narrower embedding= or a smaller coreset=, or fit some of the images and let partial_fit learn from the rest in "
    "parts"
)


class FeatureStore:
    """Features in one float32 array that grows: of its final size at once where the number of images is known.

    Raises MemoryError, before anything is allocated, where what is
    asked for would not fit into the memory there is.
    """

    def __init__(
        self,
        images: int | None,
        needed: Callable[[int, int], int] | None = None,
        *,
        first: NDArray[np.float32] | None = None,
        remedy: str = _REMEDY,
    ) -> None:
        """Expect `images` images, None where that is not known.

        `needed(rows, channels)` are the bytes that a fit to so many patches takes, None where there will be no fit.
        The rows of `first` come before the images', and are copied in front on the first `append`. `remedy` is what,
        beside fewer or smaller images, makes a fit smaller.
        """
        self._expected, self._needed, self._first, self._remedy = images, needed, first, remedy
        self._array = np.empty((0, 0), np.float32)
        self._rows = 0

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

    def finish(self) -> NDArray[np.float32]:
        """The features, (n, d); the store is empty afterwards."""
        array, self._array = self._array, np.empty((0, 0), np.float32)
        array.resize((self._rows, array.shape[1]), refcheck=False)
        return array

    def _grow(self, rows: int, dimensions: int) -> None:
        if self._needed is None:
            needed, purpose, also = 4 * rows * dimensions, "extract", ""
            remedy = "a narrower embedding= or images in parts"
        else:
            needed, purpose = self._needed(rows, dimensions), "fit"
            also, remedy = "and what is learnt from them ", self._remedy
        if needed >= _limits.LARGE:
            _logger.info(
                "%s takes about %s for %d patches of %d channels", purpose, gigabytes(needed), rows, dimensions
            )
        available = _limits.available_memory()
        held = self._array.nbytes
        if available is not None and needed - held > available:
            raise MemoryError(
                f"{purpose} takes about {gigabytes(needed)} for {rows} patches of {dimensions} float32 channels {also}"
                f"where {gigabytes(available + held)} are available; use fewer or smaller images (crop=, resize=), "
                f"{remedy}"
            )
        if self._rows == 0:
            self._array = np.empty((rows, dimensions), np.float32)
        else:  # in place: the operating system moves pages where it can, and no second array is held
            self._array.resize((rows, dimensions), refcheck=False)
