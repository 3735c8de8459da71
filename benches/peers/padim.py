"""anomalib's PaDiM and the usual numpy loop beside ours, on the same features, without the network.

    python -m benches.peers.padim                                   100 channels at 3 136 positions
    python -m benches.peers.padim --network squeezenet --channels 550 --every 4     550 channels at 196 positions

Features are raw maps of the network's last layers at strides 4, 8 and 16, of which channels are drawn. Answers are
compared before times: see `agree`. The loop fits some positions and is scaled: each takes the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benches.data import Array, Features
from benches.images import GOOD, spread
from benches.peers.contests import Call, pair, without_gradients
from benches.timing import interleave, timed
from patchcore_rs import FeatureSet, PaDiM
from patchcore_rs.images.datasets import find_images

if TYPE_CHECKING:
    from collections.abc import Sequence

IMAGES, BATCHES = 100, (1, 8, 32)
EPSILON = 0.01001  # what anomalib adds to the diagonal, in two steps
LOOP = 128  # positions at most that the loop fits
ROUNDING = {"anomalib": 2e-2, "numpy": 1e-9}  # relative: anomalib inverts in float32
OURS, ANOMALIB, NUMPY, INVERTING = "ours", "anomalib", "numpy loop", "numpy loop, inverting as it predicts"

Gaussians = list[tuple[NDArray[Any], NDArray[Any]]]


@dataclass(frozen=True)
class Shots:
    """Features of images, (images, rows, columns, channels), and the kind of each."""

    features: Array
    kinds: tuple[str, ...]

    def own(self, first: int = 0, count: int | None = None) -> FeatureSet:
        """Some of them as ours takes them: a row for each position."""
        part = self.features[first:][:count]
        grid: tuple[int, int] = part.shape[1:3]
        return FeatureSet(part.reshape(-1, part.shape[3]), grid, (224, 224))

    def maps(self, first: int = 0, count: int | None = None) -> Tensor:
        """Some of them as anomalib takes them: (images, channels, rows, columns)."""
        return torch.from_numpy(self.features[first:][:count]).permute(0, 3, 1, 2).contiguous()


def shots(name: str, channels: int, every: int, *, images: int, quick: bool) -> tuple[Shots, Shots]:
    """Training images and test images, each second position or all, some channels or all."""
    if name == "lite0":
        model = PaDiM(backbone="efficientnet_lite0")
    else:
        weights = Path(os.environ["PATCHCORE_BENCH_WEIGHTS"])
        file = next(weights.glob("squeezenet1_1*.pth")) if weights.is_dir() else weights
        model = PaDiM(backbone="squeezenet1_1", weights=file)
    train = find_images(Path(os.environ["PATCHCORE_BENCH_DATA"], "train"))[: IMAGES // 10 if quick else IMAGES]
    test = spread(Features(quick=quick).test_images, images)
    found = []
    for sources, kinds in ((train, [GOOD] * len(train)), ([image.source for image in test], [i.kind for i in test])):
        features = model.extract(sources)
        rows = features.features.reshape(len(features), *features.grid, -1)
        chosen = np.sort(np.random.default_rng(0).permutation(rows.shape[3])[:channels])
        found.append(Shots(np.ascontiguousarray(rows[:, ::every, ::every, chosen]), tuple(kinds)))
    return found[0], found[1]


def loop_fit(rows: Array) -> Gaussians:
    """The usual loop over (images, positions, channels): mean and inverse covariance of each position."""
    ridge = EPSILON * np.eye(rows.shape[2])
    return [
        (rows[:, i].mean(axis=0, dtype=np.float64), np.linalg.inv(np.cov(rows[:, i], rowvar=False) + ridge))
        for i in range(rows.shape[1])
    ]


def loop_distances(rows: Array, gaussians: Gaussians) -> NDArray[np.float64]:
    """The usual loop over positions and images, (images, positions)."""
    found = np.empty(rows.shape[:2])
    for i, (mean, inverse) in enumerate(gaussians):
        for image, row in enumerate(rows[:, i]):
            difference = row - mean
            found[image, i] = np.sqrt(difference @ inverse @ difference)
    return found


def flat(features: Array) -> Array:
    """(images, positions, channels)."""
    return features.reshape(len(features), -1, features.shape[3])


def fit(train: Shots, *, quick: bool) -> tuple[PaDiM, Any, Gaussians, float, dict[str, Any]]:
    """What each learns, the loop's seconds for all inverses, and a row of seconds."""
    from anomalib.models.components import MultiVariateGaussian

    own, maps, rows = train.own(), train.maps(), flat(train.features)
    count = rows.shape[1]
    some = rows[:, :: -(-count // LOOP)]
    model = PaDiM(channels="all", epsilon=EPSILON, border="reflect", threads=torch.get_num_threads())
    gaussian = MultiVariateGaussian()
    inverting_on = _threads_that_invert(gaussian, maps)
    covariances = [np.cov(some[:, i], rowvar=False) + EPSILON * np.eye(rows.shape[2]) for i in range(some.shape[1])]
    took: dict[str, list[float]] = {OURS: [], ANOMALIB: [], NUMPY: [], INVERTING: []}
    for _ in range(1 if quick else 2):
        took[OURS] += [timed(partial(model.fit_features, own))[0] for _ in range(2)]
        took[ANOMALIB].append(timed(partial(_on_threads, inverting_on, partial(gaussian.fit, maps)))[0])
        for name, call in ((NUMPY, partial(loop_fit, some)), (INVERTING, partial(_invert, covariances))):
            took[name].append(timed(call)[0] * count / some.shape[1])
    ours, inverting = min(took[OURS]), min(took[INVERTING])
    row: dict[str, Any] = {"images": len(rows), "positions": count, "channels": rows.shape[2]}
    row |= {name: pair(min(took[name]), ours, "s") for name in (ANOMALIB, NUMPY)}
    row |= {"anomalib fitted on threads": inverting_on, "the loop fitted positions": some.shape[1]}
    return model, gaussian, loop_fit(rows), inverting, row


def _invert(covariances: list[NDArray[Any]]) -> list[NDArray[Any]]:
    return [np.linalg.inv(covariance) for covariance in covariances]


def _threads_that_invert(gaussian: Any, maps: Tensor) -> int:
    """All threads; or one, where torch cannot invert large matrices together on more (2.15 with MKL, from 256 on)."""
    threads = torch.get_num_threads()
    try:
        gaussian.fit(maps[:, :, :2, :2].contiguous())
    except RuntimeError:
        return 1
    return threads


def _on_threads(count: int, call: Call) -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def predict(
    test: Shots, model: PaDiM, gaussian: Any, gaussians: Gaussians, inverting: float, *, quick: bool
) -> list[dict[str, Any]]:
    """Rows of milliseconds: an image at a time, good and defective, and batches of all kinds."""
    from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

    generator, stats = AnomalyMapGenerator(sigma=4), [gaussian.mean, gaussian.inv_covariance]
    learned: Any = model._require_fitted().learned
    threads, grid = torch.get_num_threads(), test.features.shape[1:3]
    rows: list[dict[str, Any]] = []
    differences: list[dict[str, float]] = []
    for batch in BATCHES:
        calls: list[dict[str, Call]] = []
        starts = range(0, len(test.features) - batch + 1, batch)
        for first in starts:
            own, maps, plain = test.own(first, batch), test.maps(first, batch), flat(test.features[first:][:batch])
            each: dict[str, Call] = {
                OURS: partial(learned.score, own.features, grid, threads),
                ANOMALIB: partial(generator.compute_distance, maps, stats),
                NUMPY: partial(loop_distances, plain, gaussians),
                f"{OURS}, maps": partial(model.predict_features, own),
                f"{ANOMALIB}, maps": partial(
                    generator, embedding=maps, mean=stats[0], inv_covariance=stats[1], image_size=(224, 224)
                ),
            }
            if batch == 1:
                differences.append(agree(each))
            calls.append({name: without_gradients(call) for name, call in each.items()})
        best = interleave(calls, quick=quick)
        labels = [test.kinds[first] == GOOD if batch == 1 else None for first in starts]
        for label in dict.fromkeys(labels):
            times = [took for took, other in zip(best, labels, strict=True) if other == label]
            rows.append(_row(times, batch, {True: "good", False: "defective", None: "of all kinds"}[label], inverting))
    worst = {name: max(each[name] for each in differences) for name in ROUNDING}
    factors = torch.from_numpy(learned.factors)
    took = interleave([{"sum": factors.sum}], quick=quick)[0]["sum"]
    rows.append({"torch sums the factors up in": f"{took:.3g} ms, {factors.nbytes / took / 1e6:.1f} GB/s"})
    return [*rows, {"largest relative differences of an image alone": worst}]


def agree(calls: dict[str, Call]) -> dict[str, float]:
    """The largest relative differences from our distances; AssertionError beyond `ROUNDING`."""
    ours: Any = calls[OURS]()
    scores, distances = ours
    anomalib, loop = np.asarray(calls[ANOMALIB]()), np.asarray(calls[NUMPY]())
    # Ours keeps float64 for the largest of an image alone.
    pairs = {"anomalib": (distances, anomalib[:, 0]), "numpy": (scores, loop.max(axis=1))}
    found = {name: float((np.abs(one - other) / other).max()) for name, (one, other) in pairs.items()}
    for name, difference in found.items():
        assert difference < ROUNDING[name], (name, difference)
    return found


def _row(times: Sequence[dict[str, float]], batch: int, label: str, inverting: float) -> dict[str, Any]:
    """Mean, median and worst of the batches, in milliseconds of a batch."""
    row: dict[str, Any] = {"batch": batch, "batches": f"{len(times)} {label}"}
    added = 1e3 * inverting
    for name, more, ours in (
        (ANOMALIB, 0.0, OURS),
        (NUMPY, 0.0, OURS),
        (INVERTING, added, OURS),
        (f"{ANOMALIB}, maps", 0.0, f"{OURS}, maps"),
    ):
        theirs = np.array([took[name if more == 0 else NUMPY] + more for took in times])
        own = np.array([took[ours] for took in times])
        row[name] = {
            "mean": pair(theirs.mean(), own.mean(), "ms"),
            "median": pair(float(np.median(theirs)), float(np.median(own)), "ms"),
            "slowest of each": pair(theirs.max(), own.max(), "ms"),
            "least ratio": f"{(theirs / own).min():.2f} times",
        }
    return row


def main() -> int:
    """The program; prints JSON at the end."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["lite0", "squeezenet"], default="lite0")
    parser.add_argument("--channels", type=int, default=100)
    parser.add_argument("--every", type=int, default=1, help="take each second (third, ...) row and column of the grid")
    parser.add_argument("--images", type=int, default=32, help="test images at least, as many of each kind")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    began = perf_counter()
    train, test = shots(
        arguments.network, arguments.channels, arguments.every, images=arguments.images, quick=arguments.quick
    )
    *learnt, row = fit(train, quick=arguments.quick)
    rows = predict(test, *learnt, quick=arguments.quick)
    answer = {"network": arguments.network, "threads": arguments.threads, "fit": row, "predict": rows}
    print(json.dumps(answer, indent=1, ensure_ascii=False))
    print(f"{perf_counter() - began:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
