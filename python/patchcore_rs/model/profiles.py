"""The profiles: every choice of arithmetic in which known implementations of PatchCore differ, as one table.

A choice that `PatchCore` is given wins; then comes what the backbone recommends, then the profile. A backbone that
recommends what the paper does (the ResNets, any module of the caller's) leaves the choice to the profile, and so does
the one that the profile names itself.

A preset stands between the caller's choices and what the backbone recommends: a network and settings that go together.

`inspect`, the default, is `paper` on the whole image: what a backbone recommends as a centre crop becomes the exact
(height, width) that images of any size are resized to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

Size = int | tuple[int, int] | None
Embedding = int | Literal["concat"]
Projection = int | Literal["johnson-lindenstrauss"] | None
ProjectionKind = Literal["sparse", "gaussian"]
Start = int | Literal["mean", "mean10"] | None


@dataclass(frozen=True)
class Profile:
    """The choices in which implementations differ, by the names of `PatchCore`'s arguments."""

    backbone: str
    resize: Size
    crop: Size
    resampling: str
    embedding: Embedding
    projection: Projection
    projection_kind: ProjectionKind
    start: Start
    reweight: int | None
    distance: str
    upsampling: str
    border: str
    clip: bool


_PAPER = Profile(
    backbone="wide_resnet50_2",
    resize=256,
    crop=224,
    resampling="pil",
    embedding=1024,
    projection=None,
    projection_kind="sparse",
    start=None,
    reweight=9,
    distance="euclidean",
    upsampling="bilinear",
    border="symmetric",
    clip=False,
)
PROFILES: Mapping[str, Profile] = {
    "inspect": replace(_PAPER, resize=(224, 224), crop=None),
    "paper": _PAPER,
    "amazon": Profile(
        backbone="wide_resnet50_2",
        resize=256,
        crop=224,
        resampling="pil",
        embedding=1024,
        projection=128,
        projection_kind="gaussian",
        start="mean10",
        reweight=None,
        distance="squared",
        upsampling="bilinear",
        border="symmetric",
        clip=False,
    ),
    "anomalib": Profile(
        backbone="timm:wide_resnet50_2.racm_in1k",
        resize=(256, 256),
        crop=None,
        resampling="tensor",
        embedding="concat",
        projection="johnson-lindenstrauss",
        projection_kind="sparse",
        start=None,
        reweight=9,
        distance="euclidean",
        upsampling="nearest",
        border="reflect",
        clip=True,
    ),
}

# By name, the arguments that a preset stands for. Both are what EfficientNet-Lite0 recommends. A bank of 7 % of the
# patches finds as many flaws of the magnetic tiles as one of 10 %, and an image takes at most half as long again as
# with 1 % (README, Results).
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"backbone": "efficientnet_lite0", "coreset": 0.01},
    "accurate": {"backbone": "efficientnet_lite0", "coreset": 0.07},
}
# What is of one network alone.
_OF_NETWORK = frozenset({"layers", "embedding"})
_USUAL: Mapping[str, Any] = {"coreset": 0.1, "standardize": False}


def preset_choices(preset: str | None, backbone: object) -> dict[str, Any]:
    """What "auto" stands for before backbone and profile are asked; `backbone` is the caller's, "auto" for none.

    A backbone of the caller's own in place of the preset's leaves out what only the preset's has.
    """
    found = PRESETS[preset] if preset else {}
    own = isinstance(backbone, str) and backbone in ("auto", found.get("backbone"))
    return {**_USUAL, **{name: value for name, value in found.items() if own or name not in _OF_NETWORK}}
