"""Good images and synthetic flaws to choose settings by, so that no test image has a say in the choice.

Part of the training images is held out: each as it is, and once more with a flaw. The flaws are of kinds that need no
knowledge of the product: spots, scratches, parts of the image moved elsewhere (CutPaste, Li et al., CVPR 2021), foreign
texture (as in DRAEM, Zavrtanik et al., ICCV 2021), smears, and wide faint shades, each from hardly visible to clear.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from patchcore_rs.images.datasets import Dataset, Sample
from patchcore_rs.images.files import ImageError, read_image, write_image
from patchcore_rs.model.file import whole_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_rs._types import OnError

    Pixels = NDArray[np.uint8]
    Values = NDArray[np.float32]
    Region = Callable[[tuple[int, ...], np.random.Generator], Values]
    Draw = Callable[[Values, float, np.random.Generator], Values]

HELD_OUT = 0.2  # of the training images
LEAST = 2  # images on each side
_VISIBLE = 0.25  # weight of a flaw from where on a pixel belongs to its mask
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def validation_set(dataset: Dataset, folder: Path, seed: int, on_error: OnError = "raise") -> Dataset:
    """The data set with a part of its training images, drawn with the seed, in place of its test images.

    Flawed copies and their masks are written to `folder` as PNG. An image that cannot be read is left out where
    `on_error` is "skip".

    Raises:
        ValueError: there are fewer than four training images.
        ImageError, OSError: one cannot be read, or a copy not be written.
    """
    count = max(LEAST, round(HELD_OUT * len(dataset.train)))
    if len(dataset.train) < 2 * LEAST:
        raise ValueError(
            f"{dataset.name}: settings are chosen by held-out training images; needs {2 * LEAST} of them, got "
            f"{len(dataset.train)}"
        )
    order = np.random.default_rng(seed).permutation(len(dataset.train))
    held = [dataset.train[i] for i in sorted(order[:count])]
    kept = tuple(dataset.train[i] for i in sorted(order[count:]))
    folder.mkdir(parents=True, exist_ok=True)
    names = list(KINDS)
    good, flawed = [], []
    for number, path in enumerate(held):
        try:
            original = read_image(path)
        except ImageError:
            if on_error == "raise":
                raise
            continue
        kind = names[number % len(names)]
        # Multiples of the golden ratio fill [0, 1) evenly, whatever the number of images.
        image, mask = flaw(original, kind, (number + 0.5) * _GOLDEN % 1.0, np.random.default_rng([seed, number]))
        files = folder / f"{number:04d}_{kind}.png", folder / f"{number:04d}_{kind}_mask.png"
        for file, pixels in zip(files, (image, mask), strict=True):
            _keep(file, pixels)
        good.append(Sample(path, 0, "good"))
        flawed.append(Sample(files[0], 1, kind, files[1]))
    return replace(dataset, train=kept, test=(*good, *flawed))


def _keep(file: Path, pixels: Pixels) -> None:
    """Write pixels, unless the file has them: results are known by when their files were written."""
    # What is not there, or broken since a run was interrupted, is written anew.
    with suppress(OSError, SyntaxError), Image.open(file) as there:
        if np.array_equal(np.asarray(there), pixels):
            return
    with whole_file(file) as temporary:
        write_image(temporary, pixels)


def flaw(image: Pixels, kind: str, severity: float, rng: np.random.Generator) -> tuple[Pixels, Pixels]:
    """An image (h, w, 3) with a flaw of that kind, and its mask (h, w), 255 where it is. Severity is in [0, 1)."""
    pixels = image.astype(np.float32)
    region, draw = KINDS[kind]
    weights = region(pixels.shape[:2], rng)
    drawn = draw(pixels, severity, rng)
    if (image == image[:, :, :1]).all():  # a camera without colours sees none in a flaw
        drawn = drawn.mean(axis=2, keepdims=True)
    blended = pixels + weights[:, :, None] * (drawn - pixels)
    return np.rint(blended).clip(0, 255).astype(np.uint8), np.where(weights >= _VISIBLE, np.uint8(255), np.uint8(0))


def _blob(size: tuple[int, ...], rng: np.random.Generator) -> Values:
    """An uneven round region with soft edges, 3 to 15 % of the shorter side across: 1 inside, 0 outside."""
    height, width = size
    radius = min(height, width) * rng.uniform(0.015, 0.075) + 1.5
    # Whole in the image.
    y, x = (rng.uniform(min(1.5 * radius, side / 2), max(side - 1.5 * radius, side / 2)) for side in size)
    rows, columns = np.ogrid[:height, :width]
    down, right = rows - y, columns - x
    angle, stretch, turn = np.arctan2(down, right), rng.uniform(0.6, 1.0), rng.uniform(0, math.pi)
    along, across = np.cos(turn) * right + np.sin(turn) * down, np.cos(turn) * down - np.sin(turn) * right
    rim = radius * (1 + 0.2 * np.sin(2 * angle + rng.uniform(0, 6)) + 0.15 * np.sin(5 * angle + rng.uniform(0, 6)))
    inside = (rim - np.hypot(along, across / stretch)) / (0.2 * radius)
    weights: Values = (inside + 0.5).clip(0, 1).astype(np.float32)
    return weights


def _line(size: tuple[int, ...], rng: np.random.Generator) -> Values:
    """A bent line, one to three pixels of a 256-pixel image wide and a tenth to a third of its shorter side long."""
    height, width = size
    short = min(height, width)
    length, heading = short * rng.uniform(0.1, 0.33), rng.uniform(0, 2 * math.pi)
    at = np.array([rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height])
    points = [at]
    for _ in range(8):
        heading += rng.normal(0, 0.25)
        at = at + length / 8 * np.array([math.cos(heading), math.sin(heading)])
        points.append(at)
    zoom = 4  # drawn larger and made smaller again: lines without steps
    canvas = Image.new("L", (zoom * width, zoom * height))
    stroke = max(zoom, round(zoom * rng.uniform(1, 3) * short / 256))
    ImageDraw.Draw(canvas).line([tuple(zoom * point) for point in points], fill=255, width=stroke, joint="curve")
    weights: Values = np.asarray(canvas.resize((width, height), Image.Resampling.BOX), dtype=np.float32) / np.float32(
        255
    )
    return weights


def _wide(size: tuple[int, ...], rng: np.random.Generator) -> Values:
    """A round region without edges, a third to all of the shorter side across: 1 in its middle, falling to 0."""
    height, width = size
    radius = min(height, width) * rng.uniform(0.16, 0.5)
    rows, columns = np.ogrid[:height, :width]
    distance = np.hypot(rows - rng.uniform(0.2, 0.8) * height, columns - rng.uniform(0.2, 0.8) * width)
    weights: Values = (0.5 + 0.5 * np.cos(math.pi * (distance / radius).clip(0, 1))).astype(np.float32)
    return weights


def _tone(pixels: Values, severity: float, rng: np.random.Generator) -> Values:
    """The same, lighter or darker by 6 to 40 % of the range, each colour a little otherwise."""
    step = (0.06 + 0.34 * severity) * 255 * rng.choice([-1, 1])
    drawn: Values = pixels + (step * rng.uniform(0.8, 1.2, 3)).astype(np.float32)
    return drawn


def _shade(pixels: Values, severity: float, rng: np.random.Generator) -> Values:
    """The same, all colours lighter or darker by 4 to 20 % of the range."""
    drawn: Values = pixels + np.float32((0.04 + 0.16 * severity) * 255 * rng.choice([-1, 1]))
    return drawn


def _moved(pixels: Values, severity: float, rng: np.random.Generator) -> Values:
    """Another part of the image, turned by a right angle or two, with up to 1.8 times its contrast."""
    shift = [int(side * rng.uniform(0.25, 0.75)) for side in pixels.shape[:2]]
    turns = int(rng.integers(1, 4)) if pixels.shape[0] == pixels.shape[1] else 2
    other = np.roll(np.rot90(pixels, turns), shift, axis=(0, 1))
    drawn: Values = other + (other - other.mean()) * np.float32(0.8 * severity)
    return drawn


def _foreign(pixels: Values, severity: float, rng: np.random.Generator) -> Values:
    """Smooth noise of some grain, mixed in by 15 to 80 %."""
    height, width = pixels.shape[:2]
    grain = float(np.exp2(rng.uniform(0, 3)))
    small = rng.uniform(0, 255, (max(2, int(height / grain)), max(2, int(width / grain)), 3)).astype(np.uint8)
    noise = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    drawn: Values = pixels + np.float32(0.15 + 0.65 * severity) * (np.asarray(noise, dtype=np.float32) - pixels)
    return drawn


def _smeared(pixels: Values, severity: float, _: np.random.Generator) -> Values:
    """What lies there, blurred."""
    sharp = Image.fromarray(pixels.astype(np.uint8))
    radius = min(pixels.shape[:2]) / 256 * (1 + 5 * severity)
    return np.asarray(sharp.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32)


KINDS: Mapping[str, tuple[Region, Draw]] = {
    "spot": (_blob, _tone),
    "scratch": (_line, _tone),
    "moved": (_blob, _moved),
    "foreign": (_blob, _foreign),
    "smear": (_blob, _smeared),
    "shade": (_wide, _shade),
}
