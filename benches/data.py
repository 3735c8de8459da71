"""The data, seeded: features of images, and values that no kernel looks at.

`Features` are EfficientNet-Lite0's and a SqueezeNet's, of real images or of those that the demo generates. Uncorrelated
noise alone would be the wrong test: nothing can be skipped there, and nobody inspects it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from patchcore_rs import greedy_coreset
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.demo.synthetic import render
from patchcore_rs.features.aggregation import aggregate_maps
from patchcore_rs.features.extractor import FeatureExtractor
from patchcore_rs.images.datasets import find_images
from patchcore_rs.images.files import read_image

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Array = NDArray[np.float32]

CACHE = Path(__file__).resolve().parent / ".cache"
SAMPLE, IMAGES, SHARE = 160_000, 762, 16  # `quick` takes the SHARE-th part of every size
_BATCH = 8
_GREEDY_SHARE = 10  # banks hold up to a tenth of the rows that they are selected from

Kind = Literal["squeezenet", "lite0", "lite0-2", "expanded"]
_WIDTHS: dict[Kind, int] = {"squeezenet": 768, "lite0": 344, "lite0-2": 152, "expanded": 912}


def noise(rows: int, width: int, seed: int) -> Array:
    """Gaussian rows: nothing to exploit."""
    return np.random.default_rng(seed).standard_normal((rows, width), dtype=np.float32)


def normal(shape: tuple[int, ...], seed: int) -> Array:
    """Rectified normal values: maps of a backbone, or patch scores, whose values no kernel looks at."""
    return np.maximum(np.random.default_rng(seed).normal(size=shape), 0).astype(np.float32)


class Features:
    """Patch features of the magnetic-tile images, or of generated ones where those are not at hand.

    `PATCHCORE_BENCH_DATA` names the images' folder (MVTec AD layout), `PATCHCORE_BENCH_WEIGHTS` SqueezeNet's weights or
    their folder. "squeezenet" are its features 7 and 12; without weights EfficientNet-Lite0's stand in. "lite0" are the
    outputs of EfficientNet-Lite0's blocks 4, 10 and 14, "lite0-2" of 4 and 10, "expanded" what the depthwise
    convolutions of these two give after ReLU6. All are 3 x 3 means, joined on the first map's grid.

    What is extracted is kept in a folder that git ignores; `quick` takes the 16th part of everything.
    """

    def __init__(self, *, quick: bool) -> None:
        folder, weights = os.environ.get("PATCHCORE_BENCH_DATA"), os.environ.get("PATCHCORE_BENCH_WEIGHTS")
        self.quick = quick
        self._root = Path(folder) if folder else None
        self._weights = _weights_file(Path(weights)) if weights else None
        self.images = "magnetic-tile" if self._root else "generated"
        self.count = len(self._train()) if self._root else self.size(IMAGES)
        name = f"{self.images}-{self.count}" + ("" if self._weights else "-without-squeezenet")
        self._folder = CACHE / name

    def size(self, full: int) -> int:
        """A number of rows, picks or images."""
        return max(1, full // SHARE) if self.quick else full

    def describe(self) -> dict[str, Any]:
        """What a record says of the data."""
        return {
            "images": self.images,
            "training_images": self.count,
            "squeezenet": "ImageNet weights" if self._weights else "no weights: EfficientNet-Lite0's features instead",
        }

    def name(self, kind: Kind) -> str:
        """What a row calls these features: where they come from."""
        names = {
            "squeezenet": "SqueezeNet",
            "lite0": "Lite0",
            "lite0-2": "Lite0, 2 blocks",
            "expanded": "Lite0 expanded",
        }
        return f"{names[self._kind(kind)]}, {self.images}"

    def sample(self, kind: Kind) -> Array:
        """160 000 rows drawn with a seed from those of all training images, in their order."""
        return self._rows(kind, "sample")

    def everything(self) -> Array:
        """All rows of EfficientNet-Lite0's three blocks."""
        return self._rows("lite0", "all")

    def queries(self, kind: Kind) -> Array:
        """The patches of one test image."""
        return self._rows(kind, "queries")

    def bank(self, kind: Kind, rows: int) -> Array:
        """The first greedy rows of the sample."""
        sample = self.sample(kind)
        path = self._folder / f"{kind}-greedy.npy"
        picks = self._cached(path, lambda: greedy_coreset(sample, max(rows, len(sample) // _GREEDY_SHARE)))
        return np.ascontiguousarray(sample[picks[:rows]])

    def bank_of_everything(self) -> Array:
        """A tenth of all rows of EfficientNet-Lite0's three blocks, greedy."""
        rows = self.everything()
        picks = self._cached(self._folder / "all-greedy.npy", lambda: greedy_coreset(rows, 1 / _GREEDY_SHARE))
        return np.ascontiguousarray(rows[picks])

    def test_image(self) -> NDArray[np.uint8]:
        """The pixels of the image that `queries` are the patches of."""
        if self._root is None:
            return render("cloth", index=0, split="test")[0]
        images = find_images(self._root / "test")
        return read_image(images[len(images) // 2])

    def _train(self) -> list[Path]:
        assert self._root is not None
        images = find_images(self._root / "train")
        return images[: self.size(len(images))]

    def _kind(self, kind: Kind) -> Kind:
        return "lite0" if kind == "squeezenet" and self._weights is None else kind

    def _rows(self, kind: Kind, part: str) -> Array:
        kind = self._kind(kind)
        source: Kind = "lite0" if kind == "lite0-2" else kind
        path = self._folder / f"{source}-{part}.npy"
        if not path.exists():
            self._extract("squeezenet" if source == "squeezenet" else "lite0")
        # The two blocks come first among the three.
        return np.ascontiguousarray(np.load(path)[:, : _WIDTHS[kind]])

    def _cached(self, path: Path, make: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
        if not path.exists():
            np.save(path, make())
        picks: NDArray[np.int64] = np.load(path)
        return picks

    def _extract(self, network: Literal["squeezenet", "lite0"]) -> None:
        """Writes the features of one network: a sample and the queries; all rows of "lite0" too."""
        if network == "squeezenet":
            backbone = load_backbone("squeezenet1_1", weights=self._weights)
            groups: dict[Kind, slice] = {"squeezenet": slice(0, 2)}
        else:
            layers = ("blocks.4", "blocks.10", "blocks.14", "blocks.4.bn1", "blocks.10.bn1")
            backbone = load_backbone("efficientnet_lite0", layers=layers)
            groups = {"lite0": slice(0, 3), "expanded": slice(3, 5)}
        extractor = FeatureExtractor(backbone, resize=backbone.resize, crop=backbone.crop, embedding="concat")

        def parts(images: Any, kind_maps: dict[Kind, slice]) -> Iterator[dict[Kind, Array]]:
            for batch in extractor.batches(images, _BATCH):
                maps = backbone(batch.images)
                maps[3:] = [layer_map.clamp(0, 6) for layer_map in maps[3:]]  # the ReLU6 that follows `bn1`
                yield {kind: aggregate_maps(maps[each], 3, 1, None, None)[0] for kind, each in kind_maps.items()}

        self._folder.mkdir(parents=True, exist_ok=True)
        for kind, rows in next(parts([self.test_image()], groups)).items():
            np.save(self._folder / f"{kind}-queries.npy", rows)
            patches = len(rows)
        total = self.count * patches
        chosen = np.sort(np.random.default_rng(0).choice(total, min(self.size(SAMPLE), total), replace=False))
        files = {kind: _Rows(self._folder / f"{kind}-sample.npy", len(chosen), _WIDTHS[kind]) for kind in groups}
        everything = _Rows(self._folder / "lite0-all.npy", total, _WIDTHS["lite0"]) if "lite0" in groups else None
        train = self._train() if self._root else [render("cloth", index=i, split="train")[0] for i in range(self.count)]
        first = 0
        for found in parts(train, groups):
            length = len(next(iter(found.values())))
            low, high = np.searchsorted(chosen, (first, first + length))
            for kind, rows in found.items():
                files[kind].append(rows[chosen[low:high] - first])
            if everything is not None:
                everything.append(found["lite0"])
            first += length
        for file in (*files.values(), everything):
            if file is not None:
                file.finish()


class _Rows:
    """A .npy file that grows, under another name until it is complete."""

    def __init__(self, path: Path, rows: int, width: int) -> None:
        self._path, self._partial = path, path.with_suffix(".partial")
        self._file = np.lib.format.open_memmap(self._partial, mode="w+", dtype=np.float32, shape=(rows, width))
        self._next = 0

    def append(self, rows: Array) -> None:
        self._file[self._next : self._next + len(rows)] = rows
        self._next += len(rows)

    def finish(self) -> None:
        assert self._next == len(self._file)
        self._file.flush()
        del self._file
        self._partial.replace(self._path)


def perturbed(rows: Array, count: int, seed: int) -> Array:
    """`count` rows: the real ones in a random order, then again and again with noise of a tenth of each deviation."""
    rng = np.random.default_rng(seed)
    deviation = rows.std(axis=0, dtype=np.float64).astype(np.float32) / 10
    floor = 0 if rows.min() >= 0 else -np.inf  # rectified features stay so
    result = np.empty((count, rows.shape[1]), np.float32)
    for start in range(0, count, len(rows)):
        part = result[start : start + len(rows)]
        order = rng.permutation(len(rows))[: len(part)]
        for first in range(0, len(part), 8192):
            chunk = rows[order[first : first + 8192]]
            if start:
                chunk = np.maximum(chunk + deviation * rng.standard_normal(chunk.shape, dtype=np.float32), floor)
            part[first : first + 8192] = chunk
    return result


def _weights_file(path: Path) -> Path:
    """SqueezeNet's weights, given as a file or in a folder."""
    return next(iter(sorted(path.glob("squeezenet1_1*.pth")))) if path.is_dir() else path
