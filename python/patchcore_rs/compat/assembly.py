"""A fitted `PatchCore` out of what another program's model consists of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchcore_rs.detector.bank import LearnedBank
from patchcore_rs.detector.extraction import find_backbone, resolve_extractor
from patchcore_rs.detector.method import Fitted
from patchcore_rs.detector.patchcore import PatchCore
from patchcore_rs.model.description import Description, Training
from patchcore_rs.model.settings import check

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray


def assemble(
    arguments: Mapping[str, Any],
    bank: NDArray[np.float32],
    *,
    image_size: tuple[int, int],
    threshold: float | None = None,
) -> PatchCore:
    """`PatchCore(**arguments)` as if it had been fitted, with the rows of `bank`, (N, d), as its memory bank.

    How many images it learnt from is unknown, its patches are counted as those of the bank, and no cover is known.

    Args:
        arguments: of the constructor.
        bank: its rows, finite.
        image_size: (height, width) of images after resizing and cropping.
        threshold: of image scores, without a calibration.

    Raises:
        TypeError, ValueError, ImportError, RuntimeError: as `PatchCore.fit` and `load_backbone` do.
    """
    model = PatchCore(**arguments)
    parameters = check(model.get_params())
    extractor, settings = resolve_extractor(parameters, LearnedBank.view, find_backbone(parameters))
    backbone = extractor.backbone
    description = Description(
        settings=settings,
        backbone=backbone.name,
        named=isinstance(model.backbone, str),
        weights_hash=backbone.weights_hash,
        image_size=image_size,
        training=Training(None, len(bank), None),
        threshold=threshold,
    )
    learned = LearnedBank.load({"bank": bank}, description, parameters["threads"])
    model._learn(Fitted(description, learned, extractor, parameters["threads"]), {})
    return model
