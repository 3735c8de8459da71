"""A detector from a model file, whatever its method."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchcore_rs.detector.patchcore import PatchCore
from patchcore_rs.methods.mahalanobis import MahalanobisAD
from patchcore_rs.methods.padim import PaDiM
from patchcore_rs.model.description import read_description

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    import torch

    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.detector.base import Detector

DETECTORS: Mapping[str, type[Detector]] = {
    detector.method.name: detector for detector in (PatchCore, PaDiM, MahalanobisAD)
}


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "auto",
    weights: str | os.PathLike[str] | None = "default",
    backbone: torch.nn.Module | Callable[[torch.Tensor], Any] | Backbone | str | None = None,
    threads: int | None = None,
) -> Detector:
    """Read a model file of any method: a detector of the class that saved it, which predicts the same to the bit.

    Takes and raises what `PatchCore.load` does.
    """
    stored, description = read_description(path)
    return DETECTORS[stored.method].restore(
        path, stored, description, device=device, weights=weights, backbone=backbone, threads=threads
    )
