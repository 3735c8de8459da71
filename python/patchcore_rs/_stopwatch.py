"""How long the stages of a call take."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Stopwatch:
    """Wall-clock seconds spent in named stages, summed over the times each was entered."""

    def __init__(self, spent: Mapping[str, float] | None = None) -> None:
        """Begin with the seconds `spent` already."""
        self.seconds: dict[str, float] = dict(spent or {})

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what happens inside as part of `stage`."""
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - began
