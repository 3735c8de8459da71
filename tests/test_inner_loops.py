"""The inner loops are compiled as they should be: with other link-time settings one of them runs ten times slower."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from patchcore_rs import _native

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

# 60 where the loop keeps its sums in registers (AVX2, the slowest level with products of codes), 6 where it does not.
LEAST_RATIO = 15


needs_simd = pytest.mark.skipif(_native.build_info()["simd"] == "scalar", reason="without SIMD there are no such loops")


def data() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows of few dimensions, and queries like them."""
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((20_400, 16)) @ rng.standard_normal((16, 256))
    values = (latent + 0.05 * rng.standard_normal((20_400, 256))).astype(np.float32)
    return values[:20_000], values[20_000:]


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of this process for a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@needs_simd
def test_a_search_with_codes_is_many_times_faster_than_one_without():
    rows, queries = data()
    banks = [_native.MemoryBank(rows, 1, codes=codes) for codes in (True, False)]
    assert banks[0].nbytes > banks[1].nbytes, "the probe should choose codes"
    # In turns, the best of each: a busy machine slows both.
    times = [[cpu_seconds(lambda bank=bank: bank.kneighbors(queries, 1, 1)) for bank in banks] for _ in range(5)]
    with_codes, without = (min(each) for each in zip(*times, strict=True))
    assert without > LEAST_RATIO * with_codes, f"{1e3 * with_codes:.1f} ms with codes, {1e3 * without:.1f} ms without"


@needs_simd
def test_distances_are_taken_faster_than_by_numpy():
    rows, queries = (values[:400] for values in data())  # which numpy finds in the cache
    bank = _native.MemoryBank(rows, 1, codes=False)

    def by_numpy() -> None:
        for query in queries:
            np.square(rows - query).sum(1)

    # Ours takes a quarter of numpy's time, in float64, and with link-time optimisation off three times as long.
    times = [[cpu_seconds(lambda: bank.kneighbors(queries, 1, 1)), cpu_seconds(by_numpy)] for _ in range(5)]
    ours, numpys = (min(each) for each in zip(*times, strict=True))
    assert ours < numpys, f"{1e3 * ours:.1f} ms, {1e3 * numpys:.1f} ms by numpy"
