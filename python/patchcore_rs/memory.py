"""How much memory a fit takes, whether it is there, and the array that the training features grow in."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_logger = logging.getLogger("patchcore_rs")


def estimate_memory(rows: int, dimensions: int, bank_rows: int) -> int:
    """Bytes that fitting takes at its peak: (rows, dimensions) float32 features and the bank, while it is copied."""
    copies = 2 if bank_rows < rows else 1
    return 4 * dimensions * (rows + copies * bank_rows) + 16 * rows


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

    Raises MemoryError, before anything is allocated, where the fit would not fit into the memory there is.
    """

    def __init__(self, images: int | None, coreset: float | None) -> None:
        """Expect `images` images, None where that is not known; the bank takes the coreset of their patches."""
        self._images, self._coreset = images, coreset
        self._array = np.empty((0, 0), np.float32)
        self._rows = 0

    def append(self, features: NDArray[np.float32], images: int) -> None:
        """Add the (rows, d) features of the next `images` images."""
        rows = self._rows + len(features)
        if rows > len(self._array):
            expected = len(features) // images * self._images if self._images is not None else 0
            self._grow(max(rows + rows // 2 if self._rows else rows, expected), features.shape[1])
        self._array[self._rows : rows] = features
        self._rows = rows

    def finish(self) -> NDArray[np.float32]:
        """The features, (n, d); the store is empty afterwards."""
        array, self._array = self._array, np.empty((0, 0), np.float32)
        array.resize((self._rows, array.shape[1]), refcheck=False)
        return array

    def _grow(self, rows: int, dimensions: int) -> None:
        share = 1.0 if self._coreset is None else self._coreset
        bank_rows = round(rows * share) if isinstance(share, float) else min(rows, share)
        needed = estimate_memory(rows, dimensions, bank_rows)
        _logger.info("fit takes about %s for %d patches of %d channels", _gigabytes(needed), rows, dimensions)
        available = available_memory()
        held = self._array.nbytes
        if available is not None and needed - held > available:
            raise MemoryError(
                f"fit takes about {_gigabytes(needed)} for {rows} patches of {dimensions} float32 channels and their "
                f"memory bank, {_gigabytes(available + held)} are available; use fewer or smaller images (crop=, "
                "resize=), a narrower embedding= or a smaller coreset="
            )
        if self._rows == 0:
            self._array = np.empty((rows, dimensions), np.float32)
        else:  # in place: the operating system moves pages where it can, and no second array is held
            self._array.resize((rows, dimensions), refcheck=False)


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"
