"""What every table and every benchmark is given, and what it makes of it: a contest whose answers were checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from benches.timing import interleave

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benches.data import Features

OURS = "patchcore-rs"

Calls = dict[str, "Callable[[], object]"]


@dataclass(frozen=True)
class Contest:
    """The calls to be timed on each image, ours under `OURS`. Whoever makes one has checked the answers of all.

    A task that is not about images has one set of calls. `errors` say how far the answers were from the exact ones; a
    rival that is in `errors` only was too far off. `shares` are the parts of the work that rivals do whose time is
    scaled to all of it.
    """

    title: str
    calls: tuple[Calls, ...]
    errors: dict[str, float]
    cells: dict[str, Any] = field(default_factory=dict)  # of the row, known before anything is timed
    shares: dict[str, float] = field(default_factory=dict)
    kinds: tuple[str, ...] = ("",)  # of each image


@dataclass(frozen=True)
class Run:
    """One process: its data, its threads, and its SIMD level."""

    features: Features
    threads: int
    level: str

    def size(self, full: int) -> int:
        """A number of rows, queries or picks; less where the run is quick."""
        return self.features.size(full)

    def times(self, images: Sequence[Mapping[str, Callable[[], object]]]) -> list[dict[str, float]]:
        """The best milliseconds of each call on each image, see `timing.interleave`."""
        return interleave(images, quick=self.features.quick)

    def race(self, calls: Calls) -> dict[str, Any]:
        """The cells of a row without images that say how long ours, the fastest rival and all rivals take."""
        (times,) = self.times([calls])
        ours = times.pop(OURS)
        fastest = min(times, key=lambda name: times[name])
        return {
            "ours_ms": ours,
            "fastest": fastest,
            "fastest_ms": times[fastest],
            "ratio": times[fastest] / ours,
            "rivals_ms": times,
        }


def distribution(times: Sequence[float]) -> dict[str, float]:
    """The median, mean and worst of the times of some images."""
    return {"images": len(times), "median": median(times), "mean": fmean(times), "worst": max(times)}


def by_image(kinds: Sequence[str], ours: Sequence[float]) -> dict[str, Any]:
    """The cells of a row that say how long ours takes over images: all, and those of each kind."""
    groups: dict[str, list[float]] = {}
    for kind, took in zip(kinds, ours, strict=True):
        groups.setdefault(kind, []).append(took)
    return {
        "images": len(ours),
        "ours_ms": distribution(ours),
        "kinds": {kind: distribution(times) for kind, times in groups.items()},
    }


def compare(kinds: Sequence[str], times: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The cells of a row that compare ours with its rivals over images; these may have been timed on some only.

    A ratio is that of the mean times over the images that both were timed on; the fastest rival is the one with the
    smallest. `smallest` is the smallest ratio to any rival on any image.
    """
    rivals: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(name for each in times for name in each if name != OURS):
        both = [each for each in times if name in each]
        took = [each[name] for each in both]
        rivals[name] = {**distribution(took), "ratio": sum(took) / sum(each[OURS] for each in both)}
    fastest = min(rivals, key=lambda name: rivals[name]["ratio"])
    ratios = [
        (each[name] / each[OURS], kind)
        for kind, each in zip(kinds, times, strict=True)
        for name in each.keys() - {OURS}
    ]
    smallest, kind = min(ratios)
    return {
        **by_image(kinds, [each[OURS] for each in times]),
        "fastest": fastest,
        "fastest_ms": rivals[fastest],
        "ratio": rivals[fastest]["ratio"],
        "smallest": smallest,
        "smallest_kind": kind,
        "rivals_ms": rivals,
    }
