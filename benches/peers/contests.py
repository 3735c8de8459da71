"""How a rival's call and ours are made ready for a clock, and what a record says of their times."""

from __future__ import annotations

from collections.abc import Callable

import torch

Call = Callable[[], object]


def without_gradients(call: Call) -> Call:
    """The call in torch's inference mode, as both programs predict."""

    def run() -> object:
        with torch.inference_mode():
            return call()

    return run


def pair(theirs: float, ours: float, unit: str) -> str:
    """A rival's time, ours, and how many times as fast ours is."""
    return f"{theirs:.3g} -> {ours:.3g} {unit} ({theirs / ours:.2f} times)"
