"""The methods beside PatchCore, each a detector of its own, and one way to load the model of any."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchcore_rs.methods.ensemble import Ensemble
    from patchcore_rs.methods.mahalanobis import MahalanobisAD
    from patchcore_rs.methods.padim import PaDiM
    from patchcore_rs.methods.spade import SPADE

__all__ = ["SPADE", "Ensemble", "MahalanobisAD", "PaDiM"]

# The module of each name, imported when it is first used.
_HOMES = {
    "Ensemble": "methods.ensemble",
    "MahalanobisAD": "methods.mahalanobis",
    "PaDiM": "methods.padim",
    "SPADE": "methods.spade",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"patchcore_rs.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
