"""A generated inspection set: procedural photographs of three surfaces, with and without known flaws.

Woven cloth, brushed metal and printed tiles, each with the variation of real production (pose, light, colour,
material) and each with four kinds of flaw whose difficulty runs from obvious to faint. `generate` writes them in the
layout of MVTec AD, so a demo, a test or a benchmark has images, labels and exact masks without a download.

A picture is a pure function of (seed, surface, split, kind, index, size): it draws from its own
`numpy.random.SeedSequence`, never from a stream shared with its neighbours.
"""

from __future__ import annotations

import json
import math
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from patchcore_rs._checks import integer
from patchcore_rs.demo.surfaces import DRAW, Flaw, photograph
from patchcore_rs.images.files import write_image

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterator, Sequence

    from numpy.typing import NDArray

__all__ = ["KINDS", "SURFACES", "Kind", "generate", "render"]

SURFACES: dict[str, str] = {
    "cloth": "plain-woven cloth, pale warp and blue weft, threads uneven in thickness and dye",
    "metal": "brushed steel sheet under a lamp, streaked along the brushing direction",
    "tiles": "glazed wall tiles with a two-colour printed ornament and grout lines",
}

_GRADES = {1: "obvious", 2: "clear", 3: "subtle", 4: "faint"}


@dataclass(frozen=True)
class Kind:
    """A kind of flaw: its surface, its name (the folder under `test`), its difficulty from 1 to 4, a line about it."""

    surface: str
    name: str
    difficulty: int
    description: str

    @property
    def grade(self) -> str:
        """The difficulty in words: obvious, clear, subtle or faint."""
        return _GRADES[self.difficulty]


KINDS: tuple[Kind, ...] = (
    Kind("cloth", "hole", 1, "a torn hole with frayed edges"),
    Kind("cloth", "stain", 2, "a dried stain with a darker rim"),
    Kind("cloth", "missing_thread", 3, "a weft thread missing over part of the width"),
    Kind("cloth", "thin_thread", 4, "a stretch of one weft thread spun a little too thin"),
    Kind("metal", "blowholes", 1, "a cluster of dark pores"),
    Kind("metal", "scratch", 2, "a thin scratch across the brushing direction"),
    Kind("metal", "dent", 3, "a shallow dent, seen by its shading only"),
    Kind("metal", "smudge", 4, "a faint finger mark that dulls the brushing"),
    Kind("tiles", "chip", 1, "glaze chipped off at a tile's edge, the clay showing"),
    Kind("tiles", "crack", 2, "a hairline crack through the glaze"),
    Kind("tiles", "misprint", 3, "the second colour of one tile printed out of register"),
    Kind("tiles", "faded_print", 4, "one tile printed with a little less ink"),
)

_MANIFEST = "inspection_set.json"
_GENERATION = 1  # of the pictures: raise it when the same arguments give other pixels
_SMALLEST = 64
_THREADS = 4  # half of the time goes to the PNG encoder, which releases the GIL as numpy does
_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def generate(
    root: str | os.PathLike[str],
    *,
    seed: int = 0,
    size: int = 256,
    train: int = 36,
    test_good: int = 20,
    test_per_kind: int = 8,
    surfaces: Sequence[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[Path]:
    """Write the inspection set under `root` and return its category folders, one per surface.

    A category is laid out as in MVTec AD: `train/good/000.png`, `test/good/000.png`, `test/KIND/000.png` and
    `ground_truth/KIND/000_mask.png` (0 or 255). The same arguments give the same pixels, and no picture depends on
    how many others there are.

    Args:
        root: a new or empty folder, or one that holds this very set, which is then written again.
        seed: non-negative; another seed gives another set.
        size: side of the square RGB pictures in pixels, at least 64.
        train: pictures in `train/good` of each surface, at least 1.
        test_good: pictures in `test/good` of each surface, at least 1.
        test_per_kind: pictures of each kind of flaw, at least 1.
        surfaces: names from `SURFACES`; None for all.
        progress: called as progress(done, total) after each picture.

    Raises:
        TypeError: a number is no integer, or `surfaces` a single string.
        ValueError: a number is out of range, or a surface unknown.
        FileExistsError: `root` is a file, or a folder that holds anything else. It is left as it was.
    """
    if isinstance(surfaces, str):
        raise TypeError(f"surfaces must be a list of names; got the string {surfaces!r}, pass [{surfaces!r}]")
    chosen = list(SURFACES if surfaces is None else dict.fromkeys(surfaces))
    if not chosen:
        raise ValueError(f"surfaces must name at least one of {', '.join(SURFACES)}; got none")
    for surface in chosen:
        _check_known(surface, "surfaces", SURFACES)
    settings = {
        "generation": _GENERATION,
        "seed": integer(seed, "seed", minimum=0),
        "size": integer(size, "size", minimum=_SMALLEST),
        "train": integer(train, "train", minimum=1),
        "test_good": integer(test_good, "test_good", minimum=1),
        "test_per_kind": integer(test_per_kind, "test_per_kind", minimum=1),
        "surfaces": chosen,
    }
    folder = Path(root)
    _claim(folder, settings)

    def draw(picture: tuple[str, str, str, int]) -> None:
        surface, split, kind, index = picture
        image, mask = render(surface, kind, index, split=split, seed=seed, size=size)
        _write(folder / surface / split / kind / f"{index:03d}.png", image)
        if kind != "good":
            _write(folder / surface / "ground_truth" / kind / f"{index:03d}_mask.png", mask.astype(np.uint8) * 255)

    pictures = list(_pictures(chosen, train, test_good, test_per_kind))
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            for done, _ in enumerate(pool.map(draw, pictures), 1):
                if progress is not None:
                    progress(done, len(pictures))
        except BaseException:  # Ctrl-C among them: what is not begun is not drawn
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [folder / surface for surface in chosen]


def render(
    surface: str,
    kind: str = "good",
    index: int = 0,
    *,
    split: str = "test",
    seed: int = 0,
    size: int = 256,
    flawless: bool = False,
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Draw one picture of the set, number `index` of its folder: (size, size, 3) uint8 and its mask (size, size) bool.

    The mask is the region of the flaw, nothing for `kind="good"`. The severity of the flaw is spread evenly over the
    pictures of its kind. `flawless=True` gives the same picture, to the noise of the camera, without its flaw.

    Raises:
        TypeError: a number is no integer.
        ValueError: a number is out of range, or the surface, or this kind on it, unknown.
    """
    _check_known(surface, "surface", SURFACES)
    _check_known(split, "split", ("train", "test"))
    flaws = [k.name for k in KINDS if k.surface == surface and split == "test"]
    _check_known(kind, f"kind (of {surface}, in {split})", ["good", *flaws])
    size = integer(size, "size", minimum=_SMALLEST)
    folder = zlib.crc32(f"{surface}/{split}/{kind}".encode())
    entropy = (integer(seed, "seed", minimum=0), folder, integer(index, "index", minimum=0))
    scene, camera, fault = (np.random.default_rng(child) for child in np.random.SeedSequence(entropy).spawn(3))
    # Multiples of the golden ratio fill [0, 1) evenly however many they are: a small set meets mild and severe flaws.
    flaw = None if kind == "good" or flawless else Flaw(kind, fault, (index + 0.5) * _GOLDEN % 1.0)
    light, mask = DRAW[surface](size, scene, flaw)
    return photograph(light, camera), mask


def _pictures(
    surfaces: list[str], train: int, test_good: int, test_per_kind: int
) -> Iterator[tuple[str, str, str, int]]:
    """Yield (surface, split, kind, index) of every picture of the set."""
    for surface in surfaces:
        folders = [("train", "good", train), ("test", "good", test_good)]
        folders += [("test", kind.name, test_per_kind) for kind in KINDS if kind.surface == surface]
        for split, kind, count in folders:
            yield from ((surface, split, kind, index) for index in range(count))


def _claim(folder: Path, settings: dict[str, object]) -> None:
    """Create `folder` with its manifest, or refuse one that holds anything but the set of these settings."""
    manifest = folder / _MANIFEST
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"root must be a folder; got the file {str(folder)!r}. Name a new folder")
    if manifest.is_file():
        try:
            found = json.loads(manifest.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if found != settings:
            raise FileExistsError(
                f"root {str(folder)!r} holds an inspection set made with other settings; got {found}, expected "
                f"{settings}. Name another folder or delete this one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"root {str(folder)!r} is not empty and holds no inspection set. Name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _write(path: Path, array: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, array)


def _check_known(value: str, name: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
