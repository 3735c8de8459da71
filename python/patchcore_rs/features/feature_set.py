"""The patch features of a set of images, and where they come from: what detectors are fitted on and score."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs._arrays import feature_matrix
from patchcore_rs._checks import integer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray


@dataclass(frozen=True, repr=False, eq=False)
class FeatureSet:
    """Patch features of n images that share one grid of patches.

    `PatchCore.extract` makes one. A set of one's own, of features that another program computed, needs no more than
    `features`, `grid` and `image_size`.

    Attributes:
        features: (n * gh * gw, d) float32, the grid row by row, image after image. Nothing here changes them.
        grid: (gh, gw), rows and columns of patches of an image.
        image_size: (H, W) in pixels of the images after resizing and cropping, and so of the anomaly maps.
        names: of the images, for messages; `images[i]` where none are given.
        paths: of the images, None for one that is no file.
        backbone: its name, None for features of one's own.
        weights_hash: sha256 (hex) of the backbone's weights, "" for a plain callable, None where there is no backbone.
        extraction: every choice that decided the features (layers, resize, crop, normalisation, patch size, ...), by
            the names of `PatchCore`'s arguments; None for features of one's own. Detectors refuse features that were
            extracted otherwise than those they were fitted on.
        image_hashes: (n,) int64, those of `images.pixels.image_hash`, by which a detector knows the images that it was
            fitted on; None where they are not known, and then it cannot tell.
        unseen: the share of each image that the crop cut off, 0 to below 1; None where that is not known.
        layer_widths: how many of the d columns each layer has, in order; None where layers are mixed or not known.
        skipped: (name, reason) of images left out by `on_error="skip"`; they have no features.
        seconds: what the stages "backbone" (reading included) and "aggregation" took.

    Raises:
        TypeError: `features` holds no floats, or a count is no integer.
        ValueError: shapes or numbers do not fit each other.
    """

    features: NDArray[np.float32]
    grid: tuple[int, int]
    image_size: tuple[int, int]
    names: tuple[str, ...] = ()
    paths: tuple[Path | None, ...] = ()
    backbone: str | None = None
    weights_hash: str | None = None
    extraction: Mapping[str, Any] | None = None
    image_hashes: NDArray[np.int64] | None = None
    skipped: tuple[tuple[str, str], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    unseen: tuple[float, ...] | None = None
    layer_widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check that everything fits together."""
        rows = feature_matrix(self.features, "features")
        grid, size = _pair(self.grid, "grid"), _pair(self.image_size, "image_size")
        if len(rows) % (grid[0] * grid[1]):
            raise ValueError(
                f"features must have a multiple of {grid[0]} x {grid[1]} rows, the patches of an image; got {len(rows)}"
            )
        images = len(rows) // (grid[0] * grid[1])
        names = tuple(self.names) or tuple(f"images[{i}]" for i in range(images))
        paths = tuple(self.paths) or (None,) * images
        hashes = None if self.image_hashes is None else np.asarray(self.image_hashes)
        if hashes is not None and (hashes.dtype != np.int64 or hashes.ndim != 1):
            raise TypeError(f"image_hashes must be (n,) int64; got {hashes.shape} {hashes.dtype}")
        unseen = None if self.unseen is None else tuple(self.unseen)
        given = (("names", names), ("paths", paths), ("image_hashes", hashes), ("unseen", unseen))
        for name, entries in given:
            if entries is not None and len(entries) != images:
                raise ValueError(f"{name} must have an entry for each of the {images} images; got {len(entries)}")
        widths = None
        if self.layer_widths is not None:
            widths = tuple(integer(width, "layer_widths", minimum=1) for width in self.layer_widths)
            if sum(widths) != rows.shape[1]:
                raise ValueError(f"layer_widths must add up to the {rows.shape[1]} columns of features; got {widths}")
        if (self.backbone is None) != (self.extraction is None):
            raise ValueError("backbone and extraction belong together: give both, or neither for features of your own")
        checked: dict[str, Any] = {"features": rows, "grid": grid, "image_size": size}
        checked |= {"names": names, "paths": paths, "image_hashes": hashes, "unseen": unseen, "layer_widths": widths}
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.features) // self.patches

    def __repr__(self) -> str:
        """One line: how many images, their grid, and whose features."""
        height, width = self.image_size
        source = "features of one's own" if self.backbone is None else self.backbone
        return (
            f"FeatureSet({len(self)} images of {height} x {width} pixels, {self.grid[0]} x {self.grid[1]} patches of "
            f"{self.features.shape[1]} channels, {source})"
        )

    @property
    def patches(self) -> int:
        """Patches of an image, gh * gw."""
        return self.grid[0] * self.grid[1]


def _pair(value: Any, name: str) -> tuple[int, int]:
    items = list(value) if isinstance(value, (tuple, list)) else []
    if len(items) != 2:
        raise (ValueError if items else TypeError)(f"{name} must be a pair of integers; got {value!r:.80}")
    return integer(items[0], name, minimum=1), integer(items[1], name, minimum=1)
