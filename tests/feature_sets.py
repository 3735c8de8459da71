"""Generated features of the kinds that matter to exact search, each (n, d) float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


def clustered(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """Close to what a backbone returns: few directions carry the variance, values are rectified."""
    rank = max(1, d // 8)
    centres = rng.normal(size=(12, rank)) * 3
    latent = centres[rng.integers(12, size=n)] + rng.normal(size=(n, rank))
    return np.maximum(latent @ rng.normal(size=(rank, d)) + 0.1 * rng.normal(size=(n, d)), 0).astype(np.float32)


def gaussian(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    return rng.normal(size=(n, d)).astype(np.float32)


def grid(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """Small integers: ties everywhere."""
    return rng.integers(0, 3, size=(n, d)).astype(np.float32)


def duplicated(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """A quarter of the rows, each several times."""
    return gaussian(rng, max(1, n // 4), d)[rng.integers(max(1, n // 4), size=n)]


def offset(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """A common offset that cancels where norms and products are subtracted."""
    return (gaussian(rng, n, d) + 1e6).astype(np.float32)


def denormal(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    return rng.integers(0, 2**23, size=(n, d), dtype=np.uint32).view(np.float32)


def zeros(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    return np.zeros((n, d), np.float32)


def extreme(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """All magnitudes up to the largest that is accepted, 1e16."""
    return (rng.choice([-1, 1], size=(n, d)) * 10.0 ** rng.uniform(-20, 16, size=(n, d))).astype(np.float32)


def quantised(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """Clustered features that went through float16."""
    return clustered(rng, n, d).astype(np.float16).astype(np.float32)


def outliers(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """Clustered, but for rows and columns of quite another size."""
    values = clustered(rng, n, d)
    values[rng.integers(n, size=1 + n // 100)] *= np.float32(1e9)
    values[:, rng.integers(d)] += np.float32(1e5)
    return values


def tiny(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """Clustered, of a size whose squares underflow float32."""
    return clustered(rng, n, d) * np.float32(1e-28)


def sparse(rng: np.random.Generator, n: int, d: int) -> NDArray[np.float32]:
    """Zeros but for few values: no direction carries more than another."""
    return np.where(rng.random((n, d)) < 0.03, rng.normal(size=(n, d)), 0).astype(np.float32)


FEATURE_SETS: dict[str, Callable[[np.random.Generator, int, int], NDArray[np.float32]]] = {
    kind.__name__: kind
    for kind in (
        clustered,
        gaussian,
        grid,
        duplicated,
        offset,
        denormal,
        zeros,
        extreme,
        quantised,
        outliers,
        tiny,
        sparse,
    )
}
