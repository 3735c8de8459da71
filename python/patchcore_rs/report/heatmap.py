"""Anomaly maps as colours: the heat map laid over an image, the outline of the ground truth.

Colour and opacity rise together: what looks normal shows the untouched image, what looks unusual glows. One
`MapScale` serves all images of a model, so they can be compared by eye.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs.images.files import write_grey16, write_image
from patchcore_rs.images.pixels import crop_offset
from patchcore_rs.model.map_values import MapScale

if TYPE_CHECKING:
    import os

    from numpy.typing import NDArray

__all__ = [
    "centre",
    "colour_scale",
    "colour_table",
    "framed",
    "legend",
    "outline",
    "overlay",
    "spotlight",
    "write_map_png",
    "write_overlay",
]

# Equal steps of lightness in OKLCH from violet over red to yellow, each at the highest chroma sRGB holds there up to
# 0.2: distances in value look like distances in colour, to colour-blind eyes and on grey printers too.
_ANCHORS = ("190c46", "400673", "77007f", "ae0d6e", "d63b58", "ef6b4b", "ff9944", "ffca6c", "fff69d")
_OPACITY = 0.85
_OPAQUE_FROM = 0.45  # the share of the scale at which the heat map reaches its full opacity
_OUTLINE = np.array([0, 240, 255], dtype=np.uint8)
_FRAME = np.array([255, 255, 255], dtype=np.uint8)
_HALO = np.array([0, 20, 40], dtype=np.uint8)


@lru_cache(maxsize=1)
def colour_table() -> NDArray[np.uint8]:
    """The (256, 3) RGB colours of the heat map, perceptually uniform, dark to light."""
    anchors = np.array([[int(anchor[i : i + 2], 16) for i in (0, 2, 4)] for anchor in _ANCHORS], dtype=np.float64)
    at = np.linspace(0.0, len(anchors) - 1.0, 256)
    channels = [np.interp(at, np.arange(len(anchors)), anchors[:, channel]) for channel in range(3)]
    return np.rint(np.stack(channels, axis=1)).astype(np.uint8)


def colour_scale(extent: NDArray[np.float64], labels: NDArray[np.uint8] | None = None) -> MapScale:
    """One scale for n maps of this `map_extent`, (n, 2), out of these alone: for a model that knows no `MapScale`.

    `low` is the median of the maps' medians: ordinary surface stays clear. `high` is the median of the anomalous ones'
    maxima, so that subtle flaws still glow where a few blatant ones would set the scale, but never below the hottest
    pixel of 95 % of the normal images. Without `labels` (n,), or without anomalous images, it is the largest value.

    Raises:
        ValueError: there is no map.
    """
    if len(extent) == 0:
        raise ValueError("extent must be of at least one map; got none")
    peaks = extent[:, 1]
    low, high = float(np.median(extent[:, 0])), float(peaks.max())
    if labels is not None and labels.any():
        high = float(np.median(peaks[labels != 0]))
        if not labels.all():
            high = max(high, float(np.quantile(peaks[labels == 0], 0.95)))
    return MapScale.between(low, high, "images")


def overlay(image: NDArray[np.uint8], anomaly_map: NDArray[np.floating], scale: MapScale) -> NDArray[np.uint8]:
    """The heat map over its image: (H, W, 3) uint8 and (H, W) values -> (H, W, 3) uint8.

    Raises:
        ValueError: the two differ in size.
    """
    if image.shape[:2] != anomaly_map.shape:
        raise ValueError(f"anomaly_map must have the image's size {image.shape[:2]}; got {anomaly_map.shape}")
    share = _share(anomaly_map, scale)
    colours = colour_table()[np.rint(share * 255.0).astype(np.int64)]
    opacity = _OPACITY * np.clip(share / _OPAQUE_FROM, 0.0, 1.0)[..., None]
    heat: NDArray[np.uint8] = np.rint(image + opacity * (colours.astype(np.float64) - image)).astype(np.uint8)
    return heat


def write_overlay(
    path: str | os.PathLike[str], image: NDArray[np.uint8], anomaly_map: NDArray[np.float32], scale: MapScale
) -> None:
    """Write the `overlay` as PNG, with the scale as the JSON object of its text "map_scale"."""
    write_image(path, overlay(image, anomaly_map, scale), {"map_scale": json.dumps(scale.to_json())})


def write_map_png(path: str | os.PathLike[str], anomaly_map: NDArray[np.float32], scale: MapScale) -> None:
    """Write an (H, W) map as 16-bit grey PNG: 0 at the low end of `scale`, 65535 at the high end.

    The text "map_scale" holds the scale as a JSON object.
    """
    share = _share(anomaly_map, scale)
    write_grey16(path, np.rint(share * 65535.0).astype(np.uint16), {"map_scale": json.dumps(scale.to_json())})


def outline(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image with a line drawn just outside the (H, W) mask; the region itself stays visible."""
    line = _grown(mask) & ~mask
    drawn: NDArray[np.uint8] = image.copy()
    drawn[_grown(line | mask) & ~mask & ~line] = _HALO
    drawn[line] = _OUTLINE
    return drawn


def spotlight(image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The image dimmed and greyed outside the (H, W) mask, and the mask's outline: the ground truth at a glance."""
    grey = image.mean(axis=2, keepdims=True)
    dimmed: NDArray[np.uint8] = np.rint(np.where(mask[..., None], image, 0.35 * grey)).astype(np.uint8)
    return outline(dimmed, mask)


def centre(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """A view of the (H, W) = `size` in the middle of the image, as a crop cuts it out."""
    top, left = crop_offset(image.shape[:2], size)
    return image[top : top + size[0], left : left + size[1]]


def framed(image: NDArray[np.uint8], seen: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The image dimmed but for `seen` in its middle, within a frame; `seen` itself where the crop cut nothing off."""
    if seen.shape == image.shape:
        return seen
    drawn: NDArray[np.uint8] = image // 2
    line = max(1, max(image.shape) // 112)  # two pixels of a thumbnail
    top, left = crop_offset(image.shape[:2], seen.shape[:2])
    bottom, right = top + seen.shape[0], left + seen.shape[1]
    drawn[max(0, top - line) : bottom + line, max(0, left - line) : right + line] = _FRAME
    drawn[top:bottom, left:right] = seen
    return drawn


def legend(width: int, height: int) -> NDArray[np.uint8]:
    """The colours from the low to the high end of a scale over mid-grey, (height, width, 3) uint8."""
    values = np.broadcast_to(np.linspace(0.0, 1.0, width), (height, width))
    return overlay(np.full((height, width, 3), 128, dtype=np.uint8), values, MapScale(0.0, 1.0))


def _share(anomaly_map: NDArray[np.floating], scale: MapScale) -> NDArray[np.float64]:
    """Where the values of a map lie on the scale: 0 at its low end and below, 1 at its high end and above."""
    share: NDArray[np.float64] = (anomaly_map.astype(np.float64) - scale.low) / (scale.high - scale.low)
    return np.clip(share, 0.0, 1.0)


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and its 8-neighbours."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    grown: NDArray[np.bool_] = rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
    return grown
