"""Ground truth: masks as files hold them, laid on their images, and whether those of a test set can be meant so.

A pixel is anomalous where the mask is above the sample's threshold. What would be guessed is refused by file: class
numbers or a third value beside white, and a mask of which nothing tells whether it was drawn on the image before its
EXIF turn or after. Pixels that a mask says to ignore, and all of a flawed image on which nothing is marked, count in no
pixel metric.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from patchcore_rs._checks import integers
from patchcore_rs.images.datasets import Polygon, Regions, listed
from patchcore_rs.images.files import ORIENTATION, ImageError, decode, to_rgb
from patchcore_rs.images.levels import Levels, deep_grey

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_rs.images.datasets import Sample

_PLAIN = Levels()
_BLACK = (0, 0, 0)
_IGNORED, _ANOMALOUS = 1, 255  # in masks that are drawn
_CLASSES = 15  # values up to this are class numbers, where nothing but white is beside them
_threshold = integers(0, 254)
# What turns stored pixels upright, by EXIF orientation.
_TURNS: dict[int, Callable[[NDArray[np.uint32]], NDArray[np.uint32]]] = {
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.T,
    6: lambda stored: stored.T[:, ::-1],
    7: lambda stored: stored[::-1, ::-1].T,
    8: lambda stored: stored.T[::-1],
}


class _Mask(NamedTuple):
    """The largest channel of every pixel (height, width), upright by the file's own EXIF orientation."""

    path: str
    values: NDArray[np.uint32]
    white: int
    orientation: int | None
    lossy: bool


class Marks(NamedTuple):
    """Which pixels of an image are anomalous, and which count in no pixel metric: (height, width) bool each."""

    anomalous: NDArray[np.bool_]
    ignored: NDArray[np.bool_]


def read_mask(path: str | os.PathLike[str], *, threshold: int = 127) -> NDArray[np.bool_]:
    """Read a ground-truth mask as (height, width) bool: True where any colour channel is > `threshold`.

    Samples are compared on the 8-bit scale whatever their depth; transparent pixels are not anomalous.

    Raises:
        ImageError: as `read_image`; and where the mask has marks but none above `threshold`, or class numbers beside
            white: class numbers such as 0 and 1 would otherwise read as a mask without anomaly.
        OSError: the file cannot be opened.
    """
    return _marks(_read(path), _threshold(threshold, "threshold"), None).anomalous


def read_sample_mask(sample: Sample) -> NDArray[np.bool_]:
    """The (height, width) bool ground truth of a test image, in the image's own size; all False for a normal one.

    Raises:
        ValueError: an anomalous sample has no mask.
        ImageError: image or mask cannot be read, or it is not certain how one lies on the other.
    """
    return read_sample_marks(sample).anomalous


def read_sample_marks(sample: Sample) -> Marks:
    """As `read_sample_mask`, with the pixels that count in no metric: all of them where a flaw is marked nowhere."""
    image = decode(sample.path)
    size, orientation = (image.height, image.width), image.info[ORIENTATION]
    anomalous, ignored = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.bool_)
    if sample.label == 0:
        return Marks(anomalous, ignored)
    if sample.mask is None:
        raise ValueError(f"{sample.path}: no ground truth; pixel metrics need a mask for every anomalous image")
    if isinstance(sample.mask, Regions):
        drawn = _laid_on(_draw(sample.mask), sample.path, size, orientation).values
        anomalous, ignored = drawn == _ANOMALOUS, drawn == _IGNORED
    else:
        for file in sample.mask if isinstance(sample.mask, tuple) else (sample.mask,):
            mask = _laid_on(_read(file), sample.path, size, orientation)
            marks = _marks(mask, sample.mask_threshold, sample.ignore)
            anomalous |= marks.anomalous
            ignored |= marks.ignored
    return Marks(anomalous, ignored & ~anomalous if anomalous.any() else ~anomalous)


class Marked(NamedTuple):
    """What `judge_masks` needs of a mask: the share of pixels that are anomalous, and whether some are ignored."""

    share: float
    ignores: bool


def measure_mask(sample: Sample) -> Marked:
    """The share of anomalous pixels of a test image; raises as `read_sample_marks` does."""
    anomalous, ignored = read_sample_marks(sample)
    return Marked(float(anomalous.mean()), bool(ignored.any()) and not ignored.all())


def judge_masks(marked: Mapping[Sample, Marked]) -> None:
    """Warn of masks of flawed images that are black, and of a value to ignore that no mask holds; refuse inverted ones.

    Raises:
        ValueError: more than half of the pixels are anomalous in most of the masks.
    """
    inverted = [_mask_name(sample) for sample, mask in marked.items() if mask.share > 0.5]
    if 2 * len(inverted) > len(marked):
        raise ValueError(
            f"more than half of the image is marked in {len(inverted)} of {len(marked)} masks, so they seem to be "
            f"inverted: {listed(inverted)}; save them with flaws white on black, or remove them to score images only"
        )
    black = [_mask_name(sample) for sample, mask in marked.items() if mask.share == 0]
    if black:
        warnings.warn(
            f"{len(black)} of {len(marked)} masks of flawed images mark nothing: {listed(black)}; these images count "
            "as flawed, and their pixels in no pixel metric",
            stacklevel=4,
        )
    ignore = next((sample.ignore for sample in marked), None)
    if ignore is not None and not any(mask.ignores for mask in marked.values()):
        warnings.warn(f"no mask holds the value to ignore, ignore={ignore}", stacklevel=4)


def _mask_name(sample: Sample) -> Path | str | None:
    if isinstance(sample.mask, Regions):
        return sample.mask.origin
    return sample.mask[0].parent if isinstance(sample.mask, tuple) else sample.mask


def _draw(regions: Regions) -> _Mask:
    """A mask of `_ANOMALOUS` and `_IGNORED` pixels."""
    values = np.zeros(regions.size, dtype=np.uint32)
    for value, shapes in ((_IGNORED, regions.ignored), (_ANOMALOUS, regions.anomalous)):
        for shape in shapes:
            if isinstance(shape, Polygon):
                _fill(values, np.array(shape.points), value)
            else:
                inside = np.arange(len(shape.lengths)) % 2 == 1
                values[np.repeat(inside, shape.lengths).reshape(regions.size, order="F")] = value
    return _Mask(regions.origin, values, _ANOMALOUS, None, lossy=False)


def _fill(values: NDArray[np.uint32], points: NDArray[np.float64], value: int) -> None:
    """Set the pixels whose centres a polygon of (k, 2) points encloses, by the even-odd rule."""
    x, y = points.T
    next_x, next_y = np.roll(points, -1, axis=0).T
    height, width = values.shape
    first, last = (int(np.clip(np.ceil(bound - 0.5), 0, height)) for bound in (y.min(), y.max()))
    for row in range(first, last):
        centre = row + 0.5
        crosses = (y <= centre) != (next_y <= centre)
        share = (centre - y[crosses]) / (next_y - y)[crosses]
        bounds = np.sort(x[crosses] + share * (next_x - x)[crosses])
        columns = np.clip(np.ceil(bounds - 0.5), 0, width).astype(int)
        for left, right in zip(columns[::2], columns[1::2], strict=True):
            values[row, left:right] = value


def _read(path: str | os.PathLike[str]) -> _Mask:
    image = decode(path)
    values, white = deep_grey(image, _PLAIN) or (
        to_rgb(image, path, _BLACK, _PLAIN).max(axis=2).astype(np.uint32),
        255,
    )
    return _Mask(os.fspath(path), values, white, image.info[ORIENTATION], image.format == "JPEG")


def _marks(mask: _Mask, threshold: int, ignore: int | None) -> Marks:
    """What is anomalous in a mask; with a value to ignore, all but that and 0."""
    path, values, white, _, lossy = mask
    if ignore is not None:
        if lossy:
            raise ImageError(f"{path}: a JPEG keeps values only nearly, so ignore={ignore} cannot hold; save it as PNG")
        ignored = values == ignore
        return Marks((values > 0) & ~ignored, ignored)
    anomalous: NDArray[np.bool_] = values * 255 > threshold * white
    if not anomalous.any() and values.any():
        raise ImageError(
            f"{path}: the largest value of this mask is {values.max()} of {white}, and a pixel is "
            f"anomalous where it is > {threshold} on the scale to 255; save the mask as 0 and {white}"
        )
    if threshold and not lossy:
        found = np.flatnonzero(np.bincount(values.ravel(), minlength=white + 1)[1:]) + 1
        *lower, highest = found.tolist() or [0]
        few = len(lower) == 1 or (lower and lower[-1] <= _CLASSES and highest == white)  # and no soft edge
        if few and lower[0] * 255 <= threshold * white:
            raise ImageError(
                f"{path}: this mask holds {lower[0]} beside {highest}, and only values above {threshold} of 255 count "
                f"as anomalous; save it as 0 and {white}, or say which value means nothing: ignore={highest} or "
                f"ignore={lower[0]}"
            )
    return Marks(anomalous, np.zeros_like(anomalous))


def _laid_on(mask: _Mask, image: Path, size: tuple[int, int], orientation: int | None) -> _Mask:
    """The mask as it lies on its upright image of `size`: turned as that was, where it has the size from before."""
    values = mask.values
    turn = _TURNS.get(orientation or 1)
    turned = values if turn is None else turn(values)
    if values.shape == turned.shape == size and mask.orientation is None and not np.array_equal(values, turned):
        raise ImageError(
            f"{mask.path}: its image {image} has an EXIF orientation, {orientation}, and the size does not tell "
            "whether the mask was drawn before that turn or after; save the image turned, without EXIF orientation, "
            "and the mask as it lies on that"
        )
    if values.shape == size:
        return mask
    if turned.shape == size:
        return mask._replace(values=turned)
    note = "" if turn is None else f" (turned by its EXIF orientation, {orientation})"
    raise ImageError(
        f"{mask.path}: the mask is {values.shape[0]} x {values.shape[1]} (height x width) and its image "
        f"{image} is {size[0]} x {size[1]}{note}; save the mask in the size of the image"
    )
