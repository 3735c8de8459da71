"""What every table is given: the data, the sizes and the threads of its process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benches.timing import interleave

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benches.data import Array, Features, Kind


@dataclass(frozen=True)
class Run:
    """One process: its data, its threads, and its SIMD level."""

    features: Features
    threads: int
    level: str

    def size(self, full: int) -> int:
        """A number of rows, queries or picks; less where the run is quick."""
        return self.features.size(full)

    def queries(self, kind: Kind) -> Array:
        """The patches of one test image."""
        found = self.features.queries(kind)
        return found[: self.size(len(found))]

    def times(self, calls: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """The best milliseconds of each call, see `timing.interleave`."""
        return interleave(calls, quick=self.features.quick)


def noise(rows: int, width: int, seed: int) -> Array:
    """Gaussian rows: nothing to exploit."""
    return np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)
