"""Every stage of PatchCore timed beside the same stage in plain torch, answers compared before times are believed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from patchcore_rs._text import Table, figure
from patchcore_rs.coreset import greedy_coreset
from patchcore_rs.demo import plain_torch
from patchcore_rs.functional import aggregate, anomaly_maps
from patchcore_rs.memory_bank import MemoryBank

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import Tensor

    from patchcore_rs.features.extractor import FeatureExtractor

Answer = TypeVar("Answer")

_BATCH = 16
_PATCH_SIZE = 3
_SIGMA = 4.0
_REPEATS = 3
_FEATURES, _RADII, _DISTANCES, _MAPS = 1e-4, 1e-3, 1e-4, 1e-4  # tolerances, relative and absolute


class WrongAnswerError(RuntimeError):
    """Two implementations of a stage disagree, so their times mean nothing."""


@dataclass(frozen=True)
class StageTime:
    """Milliseconds an image of a stage, here and in torch; None where it is torch in both.

    `fitting` stages see the training images, the others the test images.
    """

    stage: str
    ours: float
    theirs: float | None
    fitting: bool
    compared: str

    @property
    def ratio(self) -> float | None:
        """How many times faster than torch."""
        return None if self.theirs is None else self.theirs / self.ours

    def to_json(self) -> dict[str, Any]:
        """The stage as a JSON object."""
        return {**asdict(self), "ratio": self.ratio}


class Comparison:
    """Runs every stage both ways, on the same input and on `threads` threads each.

    Greedy selection, by far the longest in torch, runs once, the others three times, of which the fastest counts.
    """

    def __init__(self, extractor: FeatureExtractor, threads: int) -> None:
        """Compare on the features of `extractor`."""
        self._extractor, self._threads = extractor, threads
        self.times: list[StageTime] = []

    def run(
        self,
        train: Sequence[Path],
        test: Sequence[Path],
        *,
        coreset: float,
        seed: int,
        progress: Callable[[str, int, int | None], object],
    ) -> list[StageTime]:
        """Time the stages in their order.

        Args:
            train: images that make the coreset.
            test: images that are inspected.
            coreset: the share of rows that is kept.
            seed: of the selection.
            progress: called with (stage, done, total or None).

        Raises:
            WrongAnswerError: the answers differ by more than rounding.
        """
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with torch.inference_mode():
                self._run(train, test, coreset, seed, partial(progress, "timing the stages"))
        finally:
            torch.set_num_threads(before)
        return self.times

    def _run(
        self,
        train: Sequence[Path],
        test: Sequence[Path],
        coreset: float,
        seed: int,
        advance: Callable[[int, int], object],
    ) -> None:
        advance(0, 5)
        features, grid = self._aggregate(test, record=True)
        advance(1, 5)
        learned, _ = self._aggregate(train, record=False)
        advance(2, 5)
        bank = self._select(learned, max(1, int(len(learned) * coreset)), seed, len(train))
        advance(3, 5)
        distances = self._search(features, bank, len(test))
        advance(4, 5)
        size = tuple(self._extractor.prepare(test[0]).shape[1:])
        self._draw(np.ascontiguousarray(distances.reshape(len(test), *grid)), size)
        advance(5, 5)

    def _aggregate(self, images: Sequence[Path], *, record: bool) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """The features of the images and their grid."""
        parts, grid = [], (0, 0)
        backbone = ours = theirs = 0.0
        for batch in self._extractor.batches(list(images), _BATCH):
            took, maps = _timed(partial(self._extractor.backbone, batch.images), repeats=1)
            backbone += took
            if not record:
                features, grid = self._native_features(maps)
                parts.append(features)
                continue
            took, (features, grid) = _timed(partial(self._native_features, maps))
            ours += took
            took, expected = _timed(partial(_torch_features, maps))
            theirs += took
            _require("features", expected.numpy(), features, _FEATURES)
            parts.append(features)
        if record:
            self._record("backbone", len(images), backbone, None, "torch in both")
            self._record("aggregation", len(images), ours, theirs, f"features, to {_FEATURES:g}")
        return np.concatenate(parts), grid

    def _native_features(self, maps: Sequence[Tensor]) -> tuple[NDArray[np.float32], tuple[int, int]]:
        features, grid = aggregate(maps, patch_size=_PATCH_SIZE, threads=self._threads)
        return features.numpy(), grid

    def _select(self, features: NDArray[np.float32], rows: int, seed: int, images: int) -> NDArray[np.float32]:
        """The memory bank's rows. Rounding may order near-equal rows otherwise in float32: the radii are compared."""
        select = partial(greedy_coreset, features, rows, seed=seed, return_radii=True, threads=self._threads)
        ours, (picks, radii) = _timed(select, repeats=1)
        theirs, others = _timed(
            partial(plain_torch.greedy_coreset, torch.from_numpy(features), rows, int(picks[0])), repeats=1
        )
        covering, _ = plain_torch.nearest(torch.from_numpy(features), torch.from_numpy(features)[others])
        _require("coreset radii", covering.max().numpy(), radii[-1], _RADII)
        self._record("coreset selection", images, ours, theirs, f"covering radius, to {_RADII:g}", fitting=True)
        return np.ascontiguousarray(features[picks])

    def _search(self, queries: NDArray[np.float32], rows: NDArray[np.float32], images: int) -> NDArray[np.float32]:
        """The distance of each query to its nearest row."""
        bank = MemoryBank(rows, threads=self._threads)
        ours, (distances, _) = _timed(partial(bank.kneighbors, queries))
        theirs, (expected, _) = _timed(partial(plain_torch.nearest, torch.from_numpy(queries), torch.from_numpy(rows)))
        _require("distances", expected.numpy(), distances[:, 0], _DISTANCES)
        self._record("nearest-neighbour search", images, ours, theirs, f"distances, to {_DISTANCES:g}")
        return distances[:, 0]

    def _draw(self, scores: NDArray[np.float32], size: tuple[int, ...]) -> None:
        height, width = size
        draw = partial(anomaly_maps, scores, (height, width), sigma=_SIGMA, threads=self._threads)
        ours, maps = _timed(draw)
        theirs, expected = _timed(partial(plain_torch.anomaly_maps, torch.from_numpy(scores), height, width, _SIGMA))
        _require("maps", expected.numpy(), maps, _MAPS)
        self._record("anomaly map", len(scores), ours, theirs, f"maps, to {_MAPS:g}")

    def _record(
        self, stage: str, images: int, ours: float, theirs: float | None, compared: str, *, fitting: bool = False
    ) -> None:
        other = None if theirs is None else 1e3 * theirs / images
        self.times.append(StageTime(stage, 1e3 * ours / images, other, fitting, compared))


def stage_table(times: Sequence[StageTime], note: str) -> Table:
    """The times and ratios, and what inspecting an image takes in all."""
    inspecting = [each for each in times if not each.fitting]
    ours = sum(each.ours for each in inspecting)
    theirs = sum(each.ours if each.theirs is None else each.theirs for each in inspecting)
    whole = StageTime("inspecting an image", ours, theirs, fitting=False, compared="")

    def cells(each: StageTime) -> tuple[str, ...]:
        other = each.ours if each.theirs is None else each.theirs
        ratio = "" if each.ratio is None else f"{figure(each.ratio, 2)} x"
        stage = f"{each.stage} (a training image)" if each.fitting else each.stage
        return stage, figure(each.ours), figure(other), ratio, each.compared

    return Table(
        "Milliseconds an image, beside the same stages in plain torch",
        ("stage", "patchcore-rs", "plain torch", "faster", "compared"),
        tuple(cells(each) for each in (*times, whole)),
        words=("stage", "compared"),
        totals=frozenset({len(times)}),
        note=note,
    )


def _torch_features(maps: Sequence[Tensor]) -> Tensor:
    return plain_torch.aggregate(maps, _PATCH_SIZE).contiguous()


def _timed(run: Callable[[], Answer], *, repeats: int = _REPEATS) -> tuple[float, Answer]:
    """The fastest run's seconds, and an answer."""
    began = perf_counter()
    answer = run()
    best = perf_counter() - began
    for _ in range(repeats - 1):
        began = perf_counter()
        answer = run()
        best = min(best, perf_counter() - began)
    return best, answer


def _require(what: str, theirs: Any, ours: Any, tolerance: float) -> None:
    if not np.allclose(theirs, ours, rtol=tolerance, atol=tolerance):
        worst = float(np.abs(theirs - ours).max())
        raise WrongAnswerError(f"{what} differ from plain torch's by up to {worst:.3g}, more than rounding")
