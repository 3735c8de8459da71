"""PatchCore with a Rust core: exact, fast, and the same bits everywhere.

Importing this package imports nothing but the compiled kernels; what a name needs is imported when the name is first
used: numpy for `MemoryBank`, `greedy_coreset` and `metrics`, torch for `PatchCore`, Pillow where an image is opened.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from patchcore_rs._version import __version__, build_info

if TYPE_CHECKING:
    from patchcore_rs import metrics
    from patchcore_rs.coreset import coreset_for_radius, greedy_coreset
    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.detector.prediction import Prediction
    from patchcore_rs.memory_bank import MemoryBank
    from patchcore_rs.streaming import StreamedCoreset, StreamingCoreset

__all__ = [
    "MemoryBank",
    "PatchCore",
    "Prediction",
    "StreamedCoreset",
    "StreamingCoreset",
    "__version__",
    "build_info",
    "coreset_for_radius",
    "greedy_coreset",
    "metrics",
]

# Where each public name lives; None for a module.
_HOMES = {
    "MemoryBank": "memory_bank",
    "PatchCore": "detector.patchcore",
    "Prediction": "detector.prediction",
    "StreamedCoreset": "streaming",
    "StreamingCoreset": "streaming",
    "coreset_for_radius": "coreset",
    "greedy_coreset": "coreset",
    "metrics": None,
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f"{__name__}.{name}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
