"""PatchCore with a Rust core: exact, fast, and the same bits everywhere.

Importing this package imports numpy and the compiled kernels, nothing else: torch is imported when a
:class:`PatchCore` is used, Pillow when an image is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchcore_rs import metrics
from patchcore_rs._native import build_info
from patchcore_rs.coreset import coreset_for_radius, greedy_coreset
from patchcore_rs.memory_bank import MemoryBank
from patchcore_rs.streaming import StreamedCoreset, StreamingCoreset

if TYPE_CHECKING:
    from patchcore_rs.detector import PatchCore
    from patchcore_rs.prediction import Prediction

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

__version__: str = build_info()["version"]


def __getattr__(name: str) -> Any:
    if name in {"PatchCore", "Prediction"}:
        from patchcore_rs import detector, prediction

        return getattr(detector if name == "PatchCore" else prediction, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
