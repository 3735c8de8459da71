"""The goals of the tables: the only place where they stand. README.md says what a goal is and how it is judged."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

# How many times faster than the fastest rival, by case and SIMD level. A level that is not named has no goal.
_LEVELS = ("amx", "avx512vnni", "avx512", "avxvnni", "avx2")
# The ratio of mean times over the images.
SEARCH: dict[str, tuple[float | None, ...]] = {
    "lite0 59740": (18, 15, None, 8, 8),
    "lite0 59740, k 9": (6.5, 6.5, None, 6.5, 6.5),
    "lite0 59740, foreign images": (0.5, 0.5, 0.5, 0.5, 0.5),
    "squeezenet 1600": (10, 6, None, 4, 4),
    "squeezenet 16000": (35, 15, None, 8, 8),
    "squeezenet 16000, k 9": (12, 6, None, 3, 3),
    "squeezenet 160000": (40, 25, None, 10, 10),
    "expanded 16000": (15, 7, None, 4, 4),
    "lite0-2 16000": (25, 10, None, 5, 5),
    "noise 16000": (10, 3, None, 1, 1),
    "noise 16000, 1 query": (1, 1, None, 1, 1),
    "noise 16000, 2 queries": (1, 1, None, 1, 1),
    "noise 16000, 4 queries": (1, 1, None, 1, 1),
    "noise 16000, 8 queries": (1, 1, None, 1, 1),
}
# The smallest ratio of any image.
SEARCH_EVERY: dict[str, tuple[float | None, ...]] = {
    "lite0 59740": (12, 5, None, 3, 3),
    "lite0 59740, foreign images": (0.5, 0.5, 0.5, 0.5, 0.5),
    "squeezenet 160000": (20, 12, None, None, None),
}
# The rival is anomalib's sampler.
CORESET: dict[str, tuple[float | None, ...]] = {
    "squeezenet 10 % of 160000": (600, 350, 350, 100, 100),
    "squeezenet 1 % of 160000": (200, 100, 100, 40, 40),
    "squeezenet 25 % of 160000": (600, 350, 350, 100, 100),
    "squeezenet 10 % of 40000": (250, 150, 150, 60, 60),
    "noise 10 % of 40000": (150, 50, 50, 15, 15),
    "lite0 1 % of 597408": (200, 100, 100, 40, 40),
    "lite0 10 % of 597408": (200, 100, 100, 40, 40),
}

# The same, at every level.
APPROXIMATE = {"squeezenet 10 % of 160000": 100.0}  # of patchcore-inspection's sampler
AGGREGATE = 3.0  # of torch's fastest form
PROJECTED = 1.0  # of selection in the full dimension
HOSTILE_SEARCH = 0.9  # of the plain tile of distances, on any data
HOSTILE_CORESET = 0.8  # of the naive loop, on any data

# Limits: at most so much.
BUILD_IMAGES = 20  # images of the fastest rival, in whose mean time a bank is built
OVERHEAD = 0.6  # of the float32 rows, that a bank takes besides them
HALF = 0.8  # of the float32 rows, that a bank of float16 rows takes
EXPONENT = 0.8  # of search time over rows of the bank


def at(goals: Mapping[str, tuple[float | None, ...]], case: str, level: str) -> float | None:
    """The goal of a case at a SIMD level."""
    return dict(zip(_LEVELS, goals[case], strict=True)).get(level) if case in goals else None


def judged(ratio: float, goal: float | None) -> dict[str, float | bool | None]:
    """The cells of a row that say its goal and whether its ratio reaches it."""
    return {"ratio": ratio, "goal": goal, "reached": None if goal is None else ratio >= goal}


def judged_every(smallest: float, goal: float | None) -> dict[str, float | bool | None]:
    """The same of the smallest ratio of any image."""
    return {"smallest": smallest, "every_goal": goal, "every_reached": None if goal is None else smallest >= goal}
