"""What a model file says besides its arrays: the settings, the backbone's identity, sizes and calibration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchcore_rs.calibration import Calibration
from patchcore_rs.settings import Settings, check_number, check_pair

if TYPE_CHECKING:
    from patchcore_rs.backbones import Backbone

# A name only: a path, an address or a second scheme must not come out of a stranger's file.
_NAME = re.compile(r"(timm:)?[A-Za-z0-9_.]{1,100}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Description:
    """Everything but arrays that a fitted detector consists of.

    `backbone` is a name that `load_backbone` knows where `named`, else what the caller's own network calls itself;
    `weights_hash` is empty for a plain callable. `image_size` is the (height, width) of images after resizing and
    cropping.
    """

    settings: Settings
    backbone: str
    named: bool
    weights_hash: str
    image_size: tuple[int, int]
    threshold: float | None = None
    calibration: Calibration | None = None

    def to_json(self) -> dict[str, Any]:
        """The description as a JSON object."""
        return {
            "settings": self.settings.to_json(),
            "backbone": {"name": self.backbone, "named": self.named, "weights_sha256": self.weights_hash},
            "image_size": list(self.image_size),
            "threshold": self.threshold,
            "calibration": None if self.calibration is None else self.calibration.to_json(),
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any], *, dimensions: int, standardized: bool) -> Description:
        """Check what :meth:`to_json` gave after its way through a file, and that it fits the arrays beside it.

        `dimensions` is the width of the bank and `standardized` says whether mean and deviation are there.
        Raises ValueError: what is wrong, what was expected, what came.
        """
        settings = Settings.from_json(stored.get("settings"))
        if settings.standardize != standardized:
            raise ValueError(f"standardize is {settings.standardize}, mean and deviation say {standardized}")
        if settings.embedding not in ("concat", dimensions):
            raise ValueError(f"embedding is {settings.embedding}, the bank has {dimensions} dimensions")
        backbone = stored.get("backbone")
        if not isinstance(backbone, dict):
            raise ValueError(f"backbone must be an object, got {backbone!r:.80}")
        name, named, digest = (backbone.get(key) for key in ("name", "named", "weights_sha256"))
        if not isinstance(named, bool) or not isinstance(name, str) or (named and not _NAME.fullmatch(name)):
            raise ValueError(f"backbone must have a plain name and say whether it is a known one, got {backbone!r:.80}")
        if not isinstance(digest, str) or (not _DIGEST.fullmatch(digest) and (named or digest)):
            raise ValueError(f"backbone weights_sha256 must be 64 hexadecimal digits, got {digest!r:.80}")
        threshold, calibration = stored.get("threshold"), stored.get("calibration")
        return cls(
            settings=settings,
            backbone=name,
            named=named,
            weights_hash=digest,
            image_size=check_pair("image_size", stored.get("image_size")),
            threshold=None if threshold is None else check_number("threshold", threshold),
            calibration=None if calibration is None else Calibration.from_json(calibration),
        )

    def check_backbone(self, loaded: Backbone) -> None:
        """ValueError unless `loaded` is the backbone the bank was built with, as far as its layers and weights tell."""
        if loaded.layers != self.settings.layers:
            raise ValueError(
                f"it was fitted on the layers {self.settings.layers}, those of the backbone given are {loaded.layers}; "
                f"{self.remedy}"
            )
        if loaded.weights_hash != self.weights_hash:
            raise ValueError(
                f"it was fitted with weights of the sha256 {self.weights_hash or 'of a plain callable'}, those of "
                f"backbone {loaded.name!r} have {loaded.weights_hash or 'none'}; {self.remedy}"
            )

    @property
    def remedy(self) -> str:
        """What a caller does who has not got the right backbone."""
        if self.named:
            return "pass weights=PATH with the weights it was fitted with"
        return f"pass backbone= with the network it was fitted with, {self.backbone}"
