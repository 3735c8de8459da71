"""Types that public signatures share; a caller may annotate with them what it passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

# What shows how far a long call is: None, True for a bar on stderr, or a function that is called now and then, in the
# caller's thread. What the function raises ends the call, which then has changed nothing.

# Of calls that work in stages: the stage ("features", "coreset", "scores", "metrics"), what of it is done, and all that
# there is to do, None where that is not known.
Progress = Callable[[str, int, int | None], object]
# Of calls that work on rows of features: rows or picks that are done, and all of them.
RowProgress = Callable[[int, int], object]

# What becomes of an image that cannot be read: the call raises, or leaves it out, lists it and warns once.
OnError = Literal["raise", "skip"]

# The order of colours in arrays and tensors; OpenCV's is "bgr". Files, bytes and Pillow images say theirs.
Channels = Literal["rgb", "bgr"]

# What files of several pages, such as TIFFs and animations, stand for: their first page, or an image for each.
Pages = Literal["first", "all"]
