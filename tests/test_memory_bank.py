"""Exact search: equal to the float64 oracle, and the same bits whatever the threads, batches and SIMD level."""

from __future__ import annotations

import copy
import pickle
import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import oracle
import pytest
from feature_sets import FEATURE_SETS, clustered, gaussian

from patchcore_rs import MemoryBank, build_info

LEVELS = build_info()["simd_available"]

# What a CPU lists where it has a level.
LEVEL_FLAGS = {
    "scalar": set[str](),
    "neon": {"asimd"},
    "neondot": {"asimd", "asimddp"},
    "avx2": {"avx2", "fma"},
    "avxvnni": {"avx2", "fma", "avx_vnni"},
    "avx512": {"fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512vnni": {"fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"},
}
LEVEL_FLAGS["amx"] = LEVEL_FLAGS["avx512vnni"] | {"amx_tile", "amx_int8"}
X86 = platform.machine().lower() in {"x86_64", "amd64"}


def same(found, expected):
    """Bits, shapes and dtypes of (distances, indices) are equal."""
    for a, b in zip(found, expected, strict=True):
        if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
            return False
    return True


# --- Exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEATURE_SETS)
@pytest.mark.parametrize(
    ("rows", "width", "queries", "k"),
    [(1, 1, 3, 1), (50, 7, 9, 50), (300, 33, 40, 9), (257, 152, 17, 1), (1100, 64, 33, 3), (2500, 344, 24, 2)],
)
def test_neighbours_are_the_oracles(kind, rows, width, queries, k):
    values = FEATURE_SETS[kind](np.random.default_rng(rows), rows + queries, width)
    features, queries = values[:rows], values[rows:]
    assert same(MemoryBank(features).kneighbors(queries, k), oracle.nearest(queries, features, k))


def test_a_larger_bank_is_exact():
    values = clustered(np.random.default_rng(0), 20_040, 48)
    features, queries = values[:20_000], values[20_000:]
    for k in (1, 9):
        assert same(MemoryBank(features).kneighbors(queries, k), oracle.nearest(queries, features, k))


def test_queries_unlike_the_bank_are_exact():
    rng = np.random.default_rng(1)
    features = clustered(rng, 3000, 100)
    queries = np.concatenate([1000 * gaussian(rng, 8, 100), np.zeros((1, 100), np.float32), features[:8] + 1e-6])
    assert same(MemoryBank(features).kneighbors(queries, 2), oracle.nearest(queries, features, 2))


def test_rows_of_the_bank_find_themselves_at_zero():
    features = gaussian(np.random.default_rng(2), 500, 40) + np.float32(1e6)
    _, first = np.unique(features, axis=0, return_index=True)
    assert len(first) == 500
    distances, indices = MemoryBank(features).kneighbors(features)
    assert not distances.any()
    assert np.array_equal(indices[:, 0], np.arange(500))


def test_equal_rows_come_in_rising_order():
    features = np.tile(gaussian(np.random.default_rng(3), 1, 12), (40, 1))
    distances, indices = MemoryBank(features).kneighbors(features[:3] + 1, 40)
    assert np.array_equal(indices, np.tile(np.arange(40), (3, 1)))
    assert (distances == distances[0, 0]).all()


def test_distances_do_not_depend_on_the_order_of_the_rows():
    rng = np.random.default_rng(4)
    features, queries = clustered(rng, 900, 60), clustered(rng, 30, 60)
    order = rng.permutation(900)
    distances, indices = MemoryBank(features).kneighbors(queries, 5)
    permuted, where = MemoryBank(features[order]).kneighbors(queries, 5)
    assert permuted.tobytes() == distances.tobytes()
    assert np.array_equal(order[where], indices)


# --- The same bits everywhere ------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", FEATURE_SETS)
def test_threads_batches_and_levels_change_no_bit(kind, level, monkeypatch):
    values = FEATURE_SETS[kind](np.random.default_rng(5), 1300, 75)
    features, queries = values[:1200], values[1200:]
    expected = oracle.nearest(queries, features, 4)
    monkeypatch.setenv("PATCHCORE_RS_SIMD", level)
    for threads in (1, 2, 7):
        bank = MemoryBank(features, threads=threads)
        assert same(bank.kneighbors(queries, 4), expected), f"{threads} threads"
        for size in (1, 64):
            parts = [bank.kneighbors(queries[i : i + size], 4) for i in range(0, 100, size)]
            assert same([np.concatenate(part) for part in zip(*parts, strict=True)], expected), f"batches of {size}"


@pytest.mark.parametrize("level", LEVELS)
def test_distances_that_differ_by_rounding_alone_are_ordered_alike(level, monkeypatch):
    """Rows of the same values in other orders are equally far from a constant query, but for the last bits."""
    rng = np.random.default_rng(10)
    features = rng.permuted(np.tile(gaussian(rng, 1, 75), (400, 1)), axis=1)
    queries = np.repeat(gaussian(rng, 20, 1), 75, axis=1)
    expected = oracle.nearest(queries, features, 12)
    assert (np.diff(expected[1]) < 0).any()
    monkeypatch.setenv("PATCHCORE_RS_SIMD", level)
    assert same(MemoryBank(features).kneighbors(queries, 12), expected)


def test_a_bank_built_at_one_level_answers_at_another(monkeypatch):
    values = clustered(np.random.default_rng(6), 700, 90)
    features, queries = values[:650], values[650:]
    expected = oracle.nearest(queries, features, 3)
    for built in LEVELS:
        monkeypatch.setenv("PATCHCORE_RS_SIMD", built)
        bank = MemoryBank(features)
        for used in LEVELS:
            monkeypatch.setenv("PATCHCORE_RS_SIMD", used)
            assert same(bank.kneighbors(queries, 3), expected), f"built at {built}, used at {used}"


def test_concurrent_calls_on_one_bank_agree():
    values = clustered(np.random.default_rng(7), 2100, 50)
    bank, queries = MemoryBank(values[:2000]), values[2000:]
    expected = bank.kneighbors(queries, 3)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: bank.kneighbors(queries, 3, threads=1 + i % 3), range(32)))
    assert all(same(answer, expected) for answer in answers)


# --- SIMD levels -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="this system does not list the CPU's features")
def test_every_level_of_this_cpu_is_available(monkeypatch):
    monkeypatch.setenv("PATCHCORE_RS_SIMD", "none")
    with pytest.raises(ValueError, match="one of") as caught:
        build_info()
    known = re.search("one of (.*); got", str(caught.value)).group(1).split(", ")
    assert set(known) <= set(LEVEL_FLAGS), "LEVEL_FLAGS does not know every level"
    flags = set(Path("/proc/cpuinfo").read_text().replace(":", " ").split())
    assert [level for level in known if LEVEL_FLAGS[level] <= flags] == LEVELS


def test_the_fastest_level_is_the_default(monkeypatch):
    monkeypatch.delenv("PATCHCORE_RS_SIMD", raising=False)
    assert build_info()["simd"] == LEVELS[-1]
    monkeypatch.setenv("PATCHCORE_RS_SIMD", "scalar")
    assert build_info()["simd"] == "scalar"


def test_an_empty_level_is_as_none_and_any_case_will_do(monkeypatch):
    monkeypatch.setenv("PATCHCORE_RS_SIMD", "")
    assert build_info()["simd"] == LEVELS[-1]
    for name in ("SCALAR", "Scalar"):
        monkeypatch.setenv("PATCHCORE_RS_SIMD", name)
        assert build_info()["simd"] == "scalar"


def test_a_level_that_this_cpu_lacks_is_refused_by_every_call(monkeypatch):
    bank = MemoryBank([[0.0]])
    foreign = "neon" if X86 else "avx2"
    monkeypatch.setenv("PATCHCORE_RS_SIMD", foreign)
    usable = f"this CPU has {', '.join(LEVELS)}; unset PATCHCORE_RS_SIMD to use the fastest"
    for call in (build_info, lambda: bank.kneighbors([[0.0]]), lambda: MemoryBank([[0.0]])):
        with pytest.raises(ValueError, match="PATCHCORE_RS_SIMD") as caught:
            call()
        assert str(caught.value) == f"PATCHCORE_RS_SIMD={foreign}: not available, {usable}"
    monkeypatch.delenv("PATCHCORE_RS_SIMD")
    assert bank.kneighbors([[0.0]])[0] == 0


@pytest.mark.parametrize("name", ["sse9", "avx 2"])
def test_an_unknown_level_is_refused(name, monkeypatch):
    monkeypatch.setenv("PATCHCORE_RS_SIMD", name)
    with pytest.raises(ValueError, match=r"^PATCHCORE_RS_SIMD: SIMD level must be one of scalar, ") as caught:
        MemoryBank([[0.0]])
    assert f'; got "{name}" (this CPU has scalar' in str(caught.value)


# --- The object --------------------------------------------------------------------------------------------


def test_a_bank_describes_itself():
    bank = MemoryBank(np.ones((1024, 256), np.float32))
    assert (len(bank), bank.shape) == (1024, (1024, 256))
    assert bank.nbytes >= 2**20
    assert repr(bank).startswith("MemoryBank(1024 rows x 256 channels, ")


def test_a_bank_is_a_copy_of_its_rows():
    rng = np.random.default_rng(8)
    features = gaussian(rng, 30, 5)
    queries = gaussian(rng, 4, 5)
    kept = features.copy()
    bank = MemoryBank(features)
    expected = bank.kneighbors(queries, 2)
    features[:] = 7
    assert same(bank.kneighbors(queries, 2), expected)
    rows = bank.features
    assert np.array_equal(rows, kept)
    rows[:] = 7
    assert np.array_equal(bank.features, kept)
    assert same(bank.kneighbors(queries, 2), expected)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda bank: pickle.loads(pickle.dumps(bank))])
def test_copies_and_pickles_answer_alike(clone):
    rng = np.random.default_rng(9)
    bank, queries = MemoryBank(gaussian(rng, 200, 20), strict=True, threads=1), gaussian(rng, 10, 20)
    twin = clone(bank)
    assert same(twin.kneighbors(queries, 3), bank.kneighbors(queries, 3))
    with pytest.raises(TypeError, match="strict"):
        twin.kneighbors(queries.astype(np.float64))


# --- Larger banks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEATURE_SETS)
def test_banks_grow_into_new_ones(kind):
    values = FEATURE_SETS[kind](np.random.default_rng(10), 1300, 40)
    features, queries = values[:1260], values[1260:]
    bank, other = MemoryBank(features[:900]), MemoryBank(features[900:])
    before = bank.kneighbors(queries, 3)
    expected = MemoryBank(features).kneighbors(queries, 3)
    for whole in (bank.with_rows(features[900:]), bank.merge(other), bank.with_rows(features[900:].tolist())):
        assert whole.shape == (1260, 40)
        assert same(whole.kneighbors(queries, 3), expected)
        assert whole.features.tobytes() == features.tobytes()
    assert same(bank.kneighbors(queries, 3), before)
    assert len(bank.with_rows(features[:0])) == len(bank) == 900


def test_a_grown_bank_has_the_options_of_the_first():
    bank = MemoryBank(np.eye(4, dtype=np.float32), strict=True, threads=1)
    twin = pickle.loads(pickle.dumps(bank))
    for grown in (bank.with_rows(np.ones((1, 4), np.float32)), bank.merge(MemoryBank(np.ones((1, 4)))), twin):
        assert grown._options() == bank._options() == {"dtype": "float32", "strict": True, "threads": 1}
        with pytest.raises(TypeError, match="strict"):
            grown.kneighbors(np.eye(4))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda b: b.with_rows(np.ones((2, 3))), ValueError, "more must have the 4 channels of the bank; got 3"),
        (lambda b: b.with_rows([[1, 2, 3, np.nan]]), ValueError, r"more\[0, 3\] is nan: every value must be finite"),
        (lambda b: b.with_rows([[1, 2e16, 3, 4]]), ValueError, r"more\[0, 1\] is 2e\+16: magnitudes above 1e\+16"),
        (
            lambda b: b.with_rows(np.ones((2, 4), int)),
            TypeError,
            "more must hold floating-point values; got dtype int64",
        ),
        (lambda b: b.merge(MemoryBank([[1.0]])), ValueError, "other must have the 4 channels of this bank; got 1"),
        (lambda b: b.merge(np.eye(4)), TypeError, "other must be a MemoryBank; got ndarray. Rows go into with_rows"),
    ],
)
def test_what_does_not_fit_into_a_bank_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call(MemoryBank(np.eye(4)))


def test_a_larger_bank_that_cannot_fit_is_refused(monkeypatch):
    bank = MemoryBank(np.zeros((1, 64), np.float32))
    monkeypatch.setattr("patchcore_rs._limits.available_memory", lambda: 10**8)
    monkeypatch.setattr("patchcore_rs.memory_bank.require_finite", lambda *_: None)  # which would touch every page
    with pytest.raises(MemoryError, match=r"a memory bank of 1000001 rows of 64 channels, .* 0\.10 GB are available"):
        bank.with_rows(np.empty((10**6, 64), np.float32))


@pytest.mark.slow
def test_more_than_2_to_the_31_values(tmp_path):
    """Sizes are not cut to 32 bits: the last of 2**21 + 3 queries of 1024 values is answered by its own values."""
    count, width = 2**21 + 3, 1024
    with (tmp_path / "queries").open("wb") as file:
        file.truncate(4 * count * width)  # a sparse file of zeros
    queries = np.memmap(tmp_path / "queries", np.float32, "r+", shape=(count, width))
    queries[-1] = 3
    distances, indices = MemoryBank(np.zeros((1, width), np.float32)).kneighbors(queries)
    assert distances[-1] == 3 * 32
    assert not distances[:-1].any()
    assert not indices.any()


@pytest.mark.parametrize("rows", [200, 4000])
def test_a_float16_bank_is_exact_for_the_rows_it_stores(rows: int) -> None:
    rng = np.random.default_rng(rows)
    features = rng.normal(size=(rows, 96)).astype(np.float32)
    queries = features[:50] + rng.normal(scale=0.1, size=(50, 96)).astype(np.float32)
    bank = MemoryBank(features, dtype="float16")
    stored = features.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(bank.features, stored)
    for found, expected in zip(bank.kneighbors(queries, 3), MemoryBank(stored).kneighbors(queries, 3), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert bank.nbytes <= 0.8 * features.nbytes + 2**16
    with pytest.raises(ValueError, match="features must be below 65520 in magnitude to be stored as float16"):
        MemoryBank(features * 1e5, dtype="float16")


# --- Image scores ------------------------------------------------------------------------------------------


def test_image_scores_take_what_kneighbors_gives():
    rng = np.random.default_rng(11)
    bank, features = MemoryBank(gaussian(rng, 40, 6)), gaussian(rng, 12, 6)
    distances, indices = bank.kneighbors(features)
    expected = bank.image_scores(features, distances[:, 0].copy(), indices[:, 0].copy(), patches=4, reweight=3)
    assert expected.shape == (3,)
    forms = (
        (features, distances, indices),
        (features.astype(np.float64), distances.astype(np.float64), indices.astype(np.int32)),
        (features.tolist(), distances.ravel().tolist(), indices.ravel().tolist()),
        (np.asfortranarray(features), np.repeat(distances, 2, axis=1)[:, :1], indices[::-1][::-1]),
    )
    for form in forms:
        assert np.array_equal(bank.image_scores(*form, patches=4, reweight=3), expected)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"features": np.eye(4, dtype=int)}, TypeError, "features must hold floating-point values; got dtype int64"),
        ({"features": np.eye(3)}, ValueError, "features must be 4 values wide, as the rows of the memory bank; got 3"),
        ({"distances": np.arange(4)}, TypeError, "distances must hold floating-point values; got dtype int64"),
        (
            {"distances": np.zeros((4, 2))},
            ValueError,
            r"distances must have shape \(n,\) or \(n, 1\), .*; got \(4, 2\)",
        ),
        ({"distances": np.zeros(3)}, ValueError, "distances must be 4 values, one per row of features; got 3"),
        ({"distances": [0, 0, 0, np.nan]}, ValueError, "distances must be numbers; got nan at 3"),
        ({"indices": np.zeros(4)}, TypeError, "indices must hold integers; got dtype float64"),
        ({"indices": np.zeros((2, 2), int)}, ValueError, r"indices must have shape \(n,\) or \(n, 1\)"),
        ({"indices": [0, 1, 2, 5]}, ValueError, "indices must be below the 5 rows of the memory bank; got 5"),
        ({"patches": 3}, ValueError, "patches must be a divisor of the 4 rows of features; got 3"),
        ({"patches": 2.0}, TypeError, r"patches must be an integer; got 2.0 \(float\)"),
        ({"reweight": 0}, ValueError, "reweight must be at least 1; got 0"),
        ({"reweight": "9"}, TypeError, r"reweight must be an integer; got '9' \(str\)"),
    ],
)
def test_image_scores_name_what_does_not_fit(changed, error, message):
    bank = MemoryBank(np.ones((5, 4)))
    given = {"features": np.eye(4), "distances": np.zeros(4), "indices": [0, 1, 2, 3], "patches": 2, "reweight": 1}
    assert len(bank.image_scores(**given)) == 2
    with pytest.raises(error, match=message):
        bank.image_scores(**(given | changed))
