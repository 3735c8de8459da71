"""Types that public signatures share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

# Called with the stage, what is done of it, and all there is to do (None where that is not known).
Progress = Callable[[str, int, int | None], object]
OnError = Literal["raise", "skip"]
