"""The images that rows are measured on, by kind: good ones, and flawed ones by the name of their flaw."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from patchcore_rs.demo.synthetic import KINDS, render
from patchcore_rs.images.datasets import find_images
from patchcore_rs.images.files import read_image

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benches.data import Array

Pixels = NDArray[np.uint8]

LEAST = 30  # images of a row
GOOD = "good"
SURFACE = "cloth"  # of the generated images
_OTHERS = ("metal", "tiles")
_GENERATED_GOOD, _GENERATED_FLAWED = 20, 8  # test images: as many as the demo's
_SIDE = 256


@dataclass(frozen=True)
class Image:
    """An image, as a file or in memory, and its kind: "good", or the name of its flaw."""

    kind: str
    source: Path | Pixels

    @property
    def pixels(self) -> Pixels:
        """(height, width, 3), read anew each time."""
        return read_image(self.source) if isinstance(self.source, Path) else self.source


@dataclass(frozen=True)
class ImageSet:
    """The patches of some images, (images, patches, channels), and the kind of each image."""

    kinds: tuple[str, ...]
    patches: Array

    def one_of_each_kind(self) -> list[int]:
        """The place of the first image of each kind."""
        return [self.kinds.index(kind) for kind in dict.fromkeys(self.kinds)]


def test_images(root: Path | None) -> list[Image]:
    """The whole test set, good images first: of a folder in MVTec AD's layout, or generated where that is None."""
    if root is None:
        counts = {GOOD: _GENERATED_GOOD}
        counts |= {kind.name: _GENERATED_FLAWED for kind in KINDS if kind.surface == SURFACE}
        return [Image(kind, render(SURFACE, kind, i)[0]) for kind, count in counts.items() for i in range(count)]
    folder = root / "test"
    found = [Image(path.relative_to(folder).parts[0], path) for path in find_images(folder)]
    return sorted(found, key=lambda image: image.kind != GOOD)


def foreign_images() -> list[Image]:
    """Images of nothing that the memory bank has seen: noise, smooth colours, and parts of other categories."""
    kinds: dict[str, Callable[[int], Pixels]] = {"noise": _noise, "colours": _colours}
    kinds |= {surface: partial(_part, surface) for surface in _OTHERS}
    return [Image(kind, draw(i)) for kind, draw in kinds.items() for i in range(-(-LEAST // len(kinds)))]


def spread(images: Sequence[Image], least: int = LEAST) -> list[Image]:
    """At least so many of the images, where there are enough: as many of each kind, evenly spread over those of it."""
    by_kind: dict[str, list[Image]] = {}
    for image in images:
        by_kind.setdefault(image.kind, []).append(image)
    each = -(-least // len(by_kind))
    return [found[i] for found in by_kind.values() for i in _places(len(found), each)]


def _places(count: int, chosen: int) -> list[int]:
    """Places of `chosen` out of `count`, from the middle of equal parts; all where there are no more."""
    chosen = min(chosen, count)
    return [(2 * i + 1) * count // (2 * chosen) for i in range(chosen)]


def _part(surface: str, index: int) -> Pixels:
    return render(surface, index=index)[0]


def _noise(index: int) -> Pixels:
    values = np.random.default_rng(index).normal(128, 64, (_SIDE, _SIDE, 3))
    return values.clip(0, 255).astype(np.uint8)


def _colours(index: int) -> Pixels:
    """Waves of each colour, one to four over the image, in directions of their own."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:_SIDE, :_SIDE] / _SIDE
    waves, phases = rng.uniform(-4, 4, (3, 2)), rng.uniform(0, 1, 3)
    planes = [np.sin(2 * np.pi * (a * x + b * y + c)) for (a, b), c in zip(waves, phases, strict=True)]
    return (127.5 + 127.5 * np.stack(planes, axis=2)).astype(np.uint8)
