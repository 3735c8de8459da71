"""A detector from a model file, whatever its method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchcore_rs.methods.detectors import DETECTORS
from patchcore_rs.methods.ensemble import Ensemble
from patchcore_rs.model.arrays import ENSEMBLE
from patchcore_rs.model.description import read_description
from patchcore_rs.model.file import model_name

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from typing import IO

    import torch

    from patchcore_rs.detector.base import Detector
    from patchcore_rs.methods.ensemble import Network, Weights


def load(
    path: str | os.PathLike[str] | bytes | IO[bytes],
    *,
    device: str | torch.device = "auto",
    weights: Weights | Sequence[Weights] = "default",
    backbone: Network | Sequence[Network] = None,
    threads: int | None = None,
) -> Detector | Ensemble:
    """Read a model of any method: a detector of the class that saved it, which predicts the same to the bit.

    Takes and raises what `PatchCore.load` does; of an `Ensemble`, `weights` and `backbone` may be lists, one a member.
    """
    stored, description = read_description(path)
    detector = Ensemble if stored.method == ENSEMBLE else DETECTORS[stored.method]
    return detector.restore(
        model_name(path), stored, description, device=device, weights=weights, backbone=backbone, threads=threads
    )
