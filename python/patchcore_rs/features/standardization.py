"""Standardisation of patch features: every channel to mean 0 and deviation 1 over the training patches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROWS = 4096  # converted to float64 at once


def channel_statistics(features: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and deviation of each channel of (n, d) `features`, both (d,), summed in float64.

    A constant channel has the deviation 1, so that it stays constant.
    """
    blocks = [features[start : start + _ROWS] for start in range(0, len(features), _ROWS)]
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in blocks) / len(features)
    squares = sum(((block - mean) ** 2).sum(axis=0) for block in blocks)
    deviation = np.sqrt(squares / len(features)).astype(np.float32)
    return mean.astype(np.float32), np.where(deviation > 0, deviation, np.float32(1))


def standardize(features: NDArray[np.float32], mean: NDArray[np.float32], deviation: NDArray[np.float32]) -> None:
    """Standardise (n, d) `features` in place."""
    features -= mean
    features /= deviation
