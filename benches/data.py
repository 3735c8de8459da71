"""The data, seeded: features of images, and values that no kernel looks at.

`Features` are EfficientNet-Lite0's and a SqueezeNet's, of real images or of those that the demo generates. Uncorrelated
noise alone would be the wrong test: nothing can be skipped there, and nobody inspects it.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from benches.images import SURFACE, Image, ImageSet, foreign_images, spread, test_images
from patchcore_rs import MemoryBank, aggregate, greedy_coreset
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.demo.synthetic import render
from patchcore_rs.features.extractor import FeatureExtractor
from patchcore_rs.images.datasets import find_images

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

Array = NDArray[np.float32]

CACHE = Path(__file__).resolve().parent / ".cache"
SAMPLE, IMAGES, SHARE = 160_000, 762, 16  # `quick` takes the SHARE-th part of every size
_QUICK = 3  # test images of a quick run: a good one and two flawed ones
_BATCH = 8
_GREEDY_SHARE = 10  # banks hold up to a tenth of the rows that they are selected from

Kind = Literal["squeezenet", "lite0", "lite0-2", "expanded"]
Which = Literal["test", "hardest", "foreign"]
Network = Literal["squeezenet", "lite0"]
_WIDTHS: dict[Kind, int] = {"squeezenet": 768, "lite0": 344, "lite0-2": 152, "expanded": 912}
# Which of a network's maps make which features.
_GROUPS: dict[Network, dict[Kind, slice]] = {
    "squeezenet": {"squeezenet": slice(0, 2)},
    "lite0": {"lite0": slice(0, 3), "expanded": slice(3, 5)},
}


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
        self.origin = "magnetic-tile" if self._root else "generated"
        self.count = len(self._train()) if self._root else self.size(IMAGES)
        name = f"{self.origin}-{self.count}" + ("" if self._weights else "-without-squeezenet")
        self._folder = CACHE / name

    def size(self, full: int) -> int:
        """A number of rows, picks or images."""
        return max(1, full // SHARE) if self.quick else full

    def describe(self) -> dict[str, Any]:
        """What a record says of the data."""
        return {
            "images": self.origin,
            "training_images": self.count,
            "test_images": dict(Counter(image.kind for image in self.test_images)),
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
        return f"{names[self._kind(kind)]}, {self.origin}"

    def sample(self, kind: Kind) -> Array:
        """160 000 rows drawn with a seed from those of all training images, in their order."""
        return self._rows(kind, "sample")

    def everything(self) -> Array:
        """All rows of EfficientNet-Lite0's three blocks."""
        return self._rows("lite0", "all")

    @cached_property
    def test_images(self) -> list[Image]:
        """The whole test set; a few images of it where the run is quick."""
        found = test_images(self._root)
        return spread(found, 1)[:_QUICK] if self.quick else found

    def images(self, kind: Kind, which: Which = "test") -> ImageSet:
        """The patches of images: of the test set, as many of each kind; or of foreign ones, or the hardest ones.

        "hardest" are the patches of the whole test set that are farthest from `bank_of_everything`, as many as an image
        has, as if they were one image. For "hardest" and "foreign", the features are "lite0".
        """
        if which == "hardest":
            kinds: tuple[str, ...] = ("hardest",)
            patches = self._hardest()[None]
        else:
            kinds = tuple(image.kind for image in self._chosen(which))
            patches = self._patches(kind, which)
        return ImageSet(kinds, np.ascontiguousarray(patches[:, : self.size(patches.shape[1])]))

    def bank(self, kind: Kind, rows: int) -> Array:
        """The first greedy rows of the sample."""
        sample = self.sample(kind)
        count = max(rows, len(sample) // _GREEDY_SHARE)
        path = self._folder / f"{kind}-greedy-{count}.npy"
        picks = self._cached(path, lambda: greedy_coreset(sample, count))
        return np.ascontiguousarray(sample[picks[:rows]])

    def bank_of_everything(self) -> Array:
        """A tenth of all rows of EfficientNet-Lite0's three blocks, greedy."""
        rows = self.everything()
        picks = self._cached(self._folder / "all-greedy.npy", lambda: greedy_coreset(rows, 1 / _GREEDY_SHARE))
        return np.ascontiguousarray(rows[picks])

    def _train(self) -> list[Path]:
        assert self._root is not None
        images = find_images(self._root / "train")
        return images[: self.size(len(images))]

    def _kind(self, kind: Kind) -> Kind:
        return "lite0" if kind == "squeezenet" and self._weights is None else kind

    def _chosen(self, which: Which) -> list[Image]:
        if which == "test":
            return spread(self.test_images)
        found = foreign_images()
        return spread(found, 1)[:_QUICK] if self.quick else found

    def _rows(self, kind: Kind, part: str) -> Array:
        kind = self._kind(kind)
        path = self._folder / f"{_source(kind)}-{part}.npy"
        if not path.exists():
            self._extract_train("squeezenet" if kind == "squeezenet" else "lite0")
        # The two blocks come first among the three.
        return np.ascontiguousarray(np.load(path)[:, : _WIDTHS[kind]])

    def _patches(self, kind: Kind, which: Which) -> Array:
        """(images, patches, channels) of the images that rows are measured on."""
        kind, images = self._kind(kind), self._chosen(which)
        name = f"{which}-{len(images)}.npy"
        path = self._folder / f"{_source(kind)}-{name}"
        if not path.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            batches = [*self._extract("squeezenet" if kind == "squeezenet" else "lite0", _sources(images))]
            for group in batches[0]:
                joined = np.concatenate([batch[group] for batch in batches])
                np.save(self._folder / f"{group}-{name}", joined.reshape(len(images), -1, joined.shape[1]))
        patches: Array = np.load(path)
        return patches[:, :, : _WIDTHS[kind]]

    def _hardest(self) -> Array:
        path = self._folder / "lite0-hardest.npy"
        if not path.exists():
            bank, count = MemoryBank(self.bank_of_everything()), self._patches("lite0", "test").shape[1]
            kept, far = np.empty((0, _WIDTHS["lite0"]), np.float32), np.empty(0, np.float32)
            for batch in self._extract("lite0", _sources(self.test_images)):
                kept = np.concatenate([kept, batch["lite0"]])
                far = np.concatenate([far, bank.kneighbors(batch["lite0"])[0][:, 0]])
                farthest = np.sort(np.argsort(-far, kind="stable")[:count])  # in the order of images and patches
                kept, far = kept[farthest], far[farthest]
            np.save(path, kept)
        hardest: Array = np.load(path)
        return hardest

    def _cached(self, path: Path, make: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
        if not path.exists():
            np.save(path, make())
        picks: NDArray[np.int64] = np.load(path)
        return picks

    def _extract(self, network: Network, images: Sequence[Path | NDArray[np.uint8]]) -> Iterator[dict[Kind, Array]]:
        """Patch features of images, batch by batch."""
        if network == "squeezenet":
            backbone = load_backbone("squeezenet1_1", weights=self._weights)
        else:
            layers = ("blocks.4", "blocks.10", "blocks.14", "blocks.4.bn1", "blocks.10.bn1")
            backbone = load_backbone("efficientnet_lite0", layers=layers)
        extractor = FeatureExtractor(backbone, resize=backbone.resize, crop=backbone.crop, embedding="concat")
        for batch in extractor.batches(images, _BATCH):
            maps = backbone(batch.images)
            maps[3:] = [layer_map.clamp(0, 6) for layer_map in maps[3:]]  # the ReLU6 that follows `bn1`
            yield {kind: aggregate(maps[each])[0].numpy() for kind, each in _GROUPS[network].items()}

    def _extract_train(self, network: Network) -> None:
        """Writes the features of all training images by one network: a sample; all rows of "lite0" too."""
        groups = _GROUPS[network]
        total = self.count * self._patches(network, "test").shape[1]
        chosen = np.sort(np.random.default_rng(0).choice(total, min(self.size(SAMPLE), total), replace=False))
        files = {kind: _Rows(self._folder / f"{kind}-sample.npy", len(chosen), _WIDTHS[kind]) for kind in groups}
        everything = _Rows(self._folder / "lite0-all.npy", total, _WIDTHS["lite0"]) if "lite0" in groups else None
        train = self._train() if self._root else [render(SURFACE, index=i, split="train")[0] for i in range(self.count)]
        first = 0
        for found in self._extract(network, train):
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


def _source(kind: Kind) -> Kind:
    """The features that these are columns of."""
    return "lite0" if kind == "lite0-2" else kind


def _sources(images: Sequence[Image]) -> list[Path | NDArray[np.uint8]]:
    return [image.source for image in images]
