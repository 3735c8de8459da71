from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "MAX_MAGNITUDE",
    "VERSION",
    "MemoryBank",
    "accumulate_gaussians",
    "aggregate",
    "anomaly_maps",
    "aupimo",
    "available_threads",
    "average_precision",
    "build_info",
    "count_regions",
    "f1_optimal",
    "factorize_gaussians",
    "full_recall",
    "greedy_coreset",
    "mahalanobis",
    "pro",
    "project",
    "resize",
    "roc_auc",
    "undo_resize",
]

MAX_MAGNITUDE: float
VERSION: str

def available_threads() -> int: ...
def build_info() -> dict[str, Any]: ...

@final
class MemoryBank:
    def __new__(
        cls,
        features: NDArray[np.float32],
        threads: int | None,
        *,
        half: bool = False,
        codes: bool = True,
        groups: NDArray[np.uintp] | None = None,
    ) -> MemoryBank: ...
    @property
    def rows(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def features(self) -> NDArray[np.float32]: ...
    def kneighbors(
        self,
        queries: NDArray[np.float32],
        k: int,
        threads: int | None,
        *,
        squared: bool = False,
        groups: NDArray[np.uintp] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]: ...
    def radius_neighbors(
        self,
        queries: NDArray[np.float32],
        radius: float,
        threads: int | None,
        *,
        squared: bool = False,
        groups: NDArray[np.uintp] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]: ...
    def image_scores(
        self,
        features: NDArray[np.float32],
        distances: NDArray[np.float32],
        indices: NDArray[np.int64],
        patches: int,
        b: int,
        threads: int | None = None,
    ) -> NDArray[np.float64]: ...

def greedy_coreset(
    features: NDArray[np.float32],
    count: int,
    start: int | str | NDArray[np.uintp] | None,
    seed: int,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
    *,
    radius: float = 0.0,
) -> tuple[NDArray[np.int64], NDArray[np.float64], int]: ...
def project(
    features: NDArray[np.float32], width: int, kind: str, seed: int, threads: int | None
) -> NDArray[np.float32]: ...
def aggregate(
    maps: Sequence[NDArray[np.float32]], patch_size: int, stride: int, width: int | None, threads: int | None
) -> tuple[NDArray[np.float32], tuple[int, int]]: ...
def accumulate_gaussians(
    features: NDArray[np.float32],
    shift: NDArray[np.float32],
    sums: NDArray[np.float64],
    packed: NDArray[np.float64],
    threads: int | None,
) -> None: ...
def factorize_gaussians(
    shift: NDArray[np.float32],
    sums: NDArray[np.float64],
    packed: NDArray[np.float64],
    images: int,
    scale: float,
    epsilon: float,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> None: ...
def mahalanobis(
    features: NDArray[np.float32], mean: NDArray[np.float64], packed: NDArray[np.float64], threads: int | None
) -> NDArray[np.float64]: ...
def anomaly_maps(
    scores: NDArray[np.float32],
    height: int,
    width: int,
    sigma: float,
    upsampling: str,
    border: str,
    threads: int | None,
) -> NDArray[np.float32]: ...
def resize(
    pixels: NDArray[np.uint8],
    resized: tuple[int, int],
    offset: tuple[int, int] = ...,
    crop: tuple[int, int] | None = None,
) -> NDArray[np.uint8]: ...
def undo_resize(
    anomaly_map: NDArray[np.float32],
    image: tuple[int, int],
    resized: tuple[int, int],
    offset: tuple[int, int],
    unseen: float,
    threads: int | None,
) -> NDArray[np.float32]: ...
def roc_auc(
    labels: NDArray[np.uint8],
    scores: NDArray[np.float32] | NDArray[np.float64],
    sizes: Sequence[tuple[int, int]] | None,
    threads: int | None,
) -> float: ...
def average_precision(
    labels: NDArray[np.uint8],
    scores: NDArray[np.float32] | NDArray[np.float64],
    sizes: Sequence[tuple[int, int]] | None,
    threads: int | None,
) -> float: ...
def f1_optimal(
    labels: NDArray[np.uint8],
    scores: NDArray[np.float32] | NDArray[np.float64],
    sizes: Sequence[tuple[int, int]] | None,
    threads: int | None,
) -> tuple[float, float, int, int]: ...
def full_recall(
    labels: NDArray[np.uint8],
    scores: NDArray[np.float32] | NDArray[np.float64],
    sizes: Sequence[tuple[int, int]] | None,
    threads: int | None,
) -> tuple[float, int]: ...
def pro(
    masks: NDArray[np.uint8],
    maps: NDArray[np.float32] | NDArray[np.float64],
    sizes: Sequence[tuple[int, int]],
    fpr_limit: float,
    threads: int | None,
) -> float: ...
def aupimo(
    masks: NDArray[np.uint8],
    maps: NDArray[np.float32] | NDArray[np.float64],
    sizes: Sequence[tuple[int, int]],
    fpr_limits: tuple[float, float],
    threads: int | None,
) -> NDArray[np.float64]: ...
def count_regions(masks: NDArray[np.uint8], sizes: Sequence[tuple[int, int]], threads: int | None) -> int: ...
