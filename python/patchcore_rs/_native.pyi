from collections.abc import Callable
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

def build_info() -> dict[str, Any]: ...
@final
class MemoryBank:
    def __new__(cls, features: NDArray[np.float32], threads: int | None) -> MemoryBank: ...
    @property
    def rows(self) -> int: ...
    @property
    def dim(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def features(self) -> NDArray[np.float32]: ...
    def kneighbors(
        self, queries: NDArray[np.float32], k: int, threads: int | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]: ...

def greedy_coreset(
    features: NDArray[np.float32],
    count: int,
    start: int | str | None,
    seed: int,
    threads: int | None,
    progress: Callable[[int, int], object] | None,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
def project(
    features: NDArray[np.float32], width: int, kind: str, seed: int, threads: int | None
) -> NDArray[np.float32]: ...
