"""How much memory a call takes, whether it is there, and the array that the training features grow in."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_logger = logging.getLogger("patchcore_rs")

_UNASKED = 1 << 26  # a call that takes less does not ask the system


def estimate_memory(rows: int, dimensions: int, bank_rows: int) -> int:
    """Bytes that fitting takes at its peak: (rows, dimensions) float32 features and what follows them.

    That is the selection of the bank's rows, or the bank while it is copied.
    """
    features = 4 * dimensions * rows
    if bank_rows >= rows:
        return 2 * features + 16 * rows
    return features + max(selection_memory(rows, dimensions), 8 * dimensions * bank_rows + 16 * rows)


def selection_memory(rows: int, dimensions: int) -> int:
    """Bytes that a greedy selection takes besides the (rows, dimensions) float32 features: codes and state of rows."""
    return rows * (9 * dimensions // 5 + 192)  # 0.45 of the features, and what every row has however narrow


def require_memory(needed: int, purpose: str, remedy: str) -> None:
    """Announce in the log that `purpose` takes `needed` bytes; MemoryError with the `remedy` where they are not there.

    Nothing has been allocated then. A small need is not looked at.
    """
    if needed < _UNASKED:
        return
    _logger.info("%s takes about %s", purpose, gigabytes(needed))
    available = available_memory()
    if available is not None and needed > available:
        raise MemoryError(
            f"{purpose} takes about {gigabytes(needed)} of memory, {gigabytes(available)} are available; {remedy}"
        )


def available_memory() -> int | None:
    """Bytes this process may still take, the control group's limit included; None where the system does not say."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text("ascii").splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit, used = (group.joinpath(name).read_text("ascii") for name in ("memory.max", "memory.current"))
        limits.append(int(limit) - int(used))
    except (OSError, ValueError):
        pass  # no such file, or a limit of "max"
    if not limits and "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", ()):
        limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


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
        available = available_memory()
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


def gigabytes(nbytes: int) -> str:
    """A size as text."""
    return f"{nbytes / 1e9:.2f} GB"
