"""Progress of long calls (replaced when branches meet)."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def reporting(progress: Any) -> Iterator[Any]:
    yield progress
