"""The detector of each method, by the name that stands in the model file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patchcore_rs.detector.patchcore import PatchCore
from patchcore_rs.methods.mahalanobis import MahalanobisAD
from patchcore_rs.methods.padim import PaDiM
from patchcore_rs.methods.spade import SPADE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from patchcore_rs.detector.base import Detector

DETECTORS: Mapping[str, type[Detector]] = {
    detector.method.name: detector for detector in (PatchCore, PaDiM, MahalanobisAD, SPADE)
}
