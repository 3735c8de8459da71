"""What `PatchCore.predict` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, repr=False, eq=False)
class Prediction:
    """Scores of n images, in their order; higher is more anomalous everywhere.

    Attributes:
        scores: (n,) float64 image scores.
        maps: (n, H, W) float32 anomaly maps at the size of the images after resizing and cropping.
        labels: (n,) int8, 1 where score >= threshold, else 0; None for a detector without threshold.
        threshold: the threshold on the scale of `scores`, or None.
        paths: the images' files, None for one that is no file.
        skipped: (name, reason) of images left out by `on_error="skip"`; they have no place in the arrays.
    """

    scores: NDArray[np.float64]
    maps: NDArray[np.float32]
    labels: NDArray[np.int8] | None
    threshold: float | None
    paths: tuple[Path | None, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        """The number of images."""
        return len(self.scores)

    def __repr__(self) -> str:
        """One line: how many images, the range of their scores, how many are anomalous."""
        parts = [f"{len(self)} images"]
        if len(self):
            parts.append(f"scores {self.scores.min():.4g} to {self.scores.max():.4g}")
            parts.append(f"maps {self.maps.shape[1]} x {self.maps.shape[2]}")
        if self.labels is not None:
            parts.append(f"{int(self.labels.sum())} anomalous at threshold {self.threshold:.4g}")
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped")
        return f"Prediction({', '.join(parts)})"
