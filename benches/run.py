"""What every table and every benchmark is given, and what it makes of it: a contest whose answers were checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benches.timing import interleave

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from benches.data import Array, Features, Kind

OURS = "patchcore-rs"

Calls = dict[str, "Callable[[], object]"]


@dataclass(frozen=True)
class Contest:
    """The calls to be timed on one input, ours under `OURS`. Whoever makes one has checked the answers of all.

    `errors` say how far each answer was from the exact one; a rival that is in `errors` only was too far off.
    `shares` are the parts of the work that rivals do whose time is scaled to all of it.
    """

    title: str
    calls: Calls
    errors: dict[str, float]
    cells: dict[str, Any] = field(default_factory=dict)  # of the row, known before anything is timed
    shares: dict[str, float] = field(default_factory=dict)


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

    def race(self, calls: Calls) -> dict[str, Any]:
        """The cells of a row that say how long ours, the fastest rival and all rivals take."""
        times = self.times(calls)
        ours = times.pop(OURS)
        fastest = min(times, key=lambda name: times[name])
        return {
            "ours_ms": ours,
            "fastest": fastest,
            "fastest_ms": times[fastest],
            "ratio": times[fastest] / ours,
            "rivals_ms": times,
        }
