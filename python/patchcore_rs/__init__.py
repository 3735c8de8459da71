"""PatchCore with a Rust core: exact, fast, and the same bits everywhere.

Importing this package imports nothing but the compiled kernels; what a name needs is imported when the name is first
used: numpy for `MemoryBank`, `greedy_coreset`, `metrics` and the steps one by one, torch for `PatchCore`, Pillow where
an image is opened.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from patchcore_rs._version import __version__, build_info

if TYPE_CHECKING:
    from patchcore_rs import methods, metrics
    from patchcore_rs._types import OnError, Progress
    from patchcore_rs.backbones.load import load_backbone
    from patchcore_rs.coreset import coreset_for_radius, greedy_coreset
    from patchcore_rs.detector.estimator import NotFittedError
    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.detector.prediction import Prediction
    from patchcore_rs.evaluation.evaluate import Run, evaluate, evaluate_detector
    from patchcore_rs.features.feature_set import FeatureSet
    from patchcore_rs.functional import aggregate, anomaly_maps, image_scores
    from patchcore_rs.images.files import ImageError
    from patchcore_rs.images.layouts import load_dataset
    from patchcore_rs.memory_bank import MemoryBank
    from patchcore_rs.methods.ensemble import Ensemble
    from patchcore_rs.methods.load import load
    from patchcore_rs.methods.mahalanobis import MahalanobisAD
    from patchcore_rs.methods.padim import PaDiM
    from patchcore_rs.methods.spade import SPADE
    from patchcore_rs.model.file import ModelFileError
    from patchcore_rs.model.profiles import PROFILES
    from patchcore_rs.streaming import StreamedCoreset, StreamingCoreset

__all__ = [
    "PROFILES",
    "SPADE",
    "Ensemble",
    "FeatureSet",
    "ImageError",
    "MahalanobisAD",
    "MemoryBank",
    "ModelFileError",
    "NotFittedError",
    "OnError",
    "PaDiM",
    "PatchCore",
    "Prediction",
    "Progress",
    "Run",
    "StreamedCoreset",
    "StreamingCoreset",
    "__version__",
    "aggregate",
    "anomaly_maps",
    "build_info",
    "coreset_for_radius",
    "evaluate",
    "evaluate_detector",
    "greedy_coreset",
    "image_scores",
    "load",
    "load_backbone",
    "load_dataset",
    "methods",
    "metrics",
]

# The module that each public name lives in, imported when the name is first used; None for a module itself.
# A new public name stands here, in `__all__` and above for type checkers; `make api` then takes it into the snapshot.
_HOMES = {
    "PROFILES": "model.profiles",
    "Ensemble": "methods.ensemble",
    "SPADE": "methods.spade",
    "FeatureSet": "features.feature_set",
    "ImageError": "images.files",
    "MahalanobisAD": "methods.mahalanobis",
    "MemoryBank": "memory_bank",
    "ModelFileError": "model.file",
    "NotFittedError": "detector.estimator",
    "OnError": "_types",
    "PaDiM": "methods.padim",
    "PatchCore": "detector.patchcore",
    "Prediction": "detector.prediction",
    "Progress": "_types",
    "Run": "evaluation.evaluate",
    "StreamedCoreset": "streaming",
    "StreamingCoreset": "streaming",
    "aggregate": "functional",
    "anomaly_maps": "functional",
    "coreset_for_radius": "coreset",
    "evaluate": "evaluation.evaluate",
    "evaluate_detector": "evaluation.evaluate",
    "greedy_coreset": "coreset",
    "image_scores": "functional",
    "load": "methods.load",
    "load_backbone": "backbones.load",
    "load_dataset": "images.layouts",
    "methods": None,
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
