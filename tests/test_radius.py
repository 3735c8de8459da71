"""Squared distances, searches by radius, rows that do not find themselves: equal to the float64 oracle, bit for bit."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from feature_sets import FEATURE_SETS, clustered, gaussian, grid

from patchcore_rs import MemoryBank, build_info

LEVELS = build_info()["simd_available"]


def expected_within(queries, rows, radius, *, squared=False, exclude_self=False):
    """Per query (distances, indices), from the definition."""
    found = []
    for i, line in enumerate(oracle.squared_distances(queries, rows)):
        distances = line if squared else np.sqrt(line)
        indices = np.argsort(line, kind="stable")
        indices = indices[distances[indices] <= radius]
        if exclude_self:
            indices = indices[indices != i]
        found.append((distances[indices].astype(np.float32), indices))
    return found


def same(found, expected):
    """Bits, shapes and dtypes of per-query (distances, indices) are equal."""
    pairs = list(zip(*found, strict=True))
    assert len(pairs) == len(expected)
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for pair, other in zip(pairs, expected, strict=True)
        for a, b in zip(pair, other, strict=True)
    )


# --- Squared distances -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEATURE_SETS)
def test_squared_distances_are_rounded_once(kind):
    values = FEATURE_SETS[kind](np.random.default_rng(1), 640, 43)
    rows, queries = values[:600], values[600:]
    squared, indices = MemoryBank(rows).kneighbors(queries, 5, squared=True)
    exact = oracle.squared_distances(queries, rows)
    expected = np.argsort(exact, axis=1, kind="stable")[:, :5]
    assert np.array_equal(indices, expected)
    assert squared.tobytes() == np.take_along_axis(exact, expected, axis=1).astype(np.float32).tobytes()


def test_the_square_of_a_rounded_root_is_another_number():
    values = gaussian(np.random.default_rng(2), 400, 20)
    bank, queries = MemoryBank(values[:300]), values[300:]
    squared, roots = bank.kneighbors(queries, squared=True)[0], bank.kneighbors(queries)[0]
    assert (squared != roots * roots).any()
    np.testing.assert_allclose(squared, roots * roots, rtol=3e-7)


# --- By radius ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", FEATURE_SETS)
def test_rows_within_a_radius_are_the_oracles(kind, level, monkeypatch):
    monkeypatch.setenv("PATCHCORE_RS_SIMD", level)
    values = FEATURE_SETS[kind](np.random.default_rng(3), 1300, 75)
    rows, queries = values[:1260], values[1260:]
    exact = oracle.squared_distances(queries, rows)
    for squared in (False, True):
        # As far as the tenth row of the first query, as its distance is in float64: that row lies within.
        radius = float(np.sort(exact[0])[9]) if squared else float(np.sqrt(np.sort(exact[0])[9]))
        expected = expected_within(queries, rows, radius, squared=squared)
        assert len(expected[0][0]) >= 10
        for threads in (1, 2, 7):
            bank = MemoryBank(rows, threads=threads)
            assert same(bank.radius_neighbors(queries, radius, squared=squared), expected), f"{threads} threads"


def test_a_row_on_the_radius_lies_within_and_one_beyond_does_not():
    bank = MemoryBank(np.arange(10, dtype=np.float32)[:, None])
    query = np.array([[5.0]], np.float32)
    assert bank.radius_neighbors(query, 2)[1][0].tolist() == [5, 4, 6, 3, 7]
    assert bank.radius_neighbors(query, np.nextafter(2, 0))[1][0].tolist() == [5, 4, 6]
    assert bank.radius_neighbors(query, 4, squared=True)[0][0].tolist() == [0, 1, 1, 4, 4]
    assert bank.radius_neighbors(query, 0)[1][0].tolist() == [5]
    assert bank.radius_neighbors(query, float("inf"))[1][0].tolist() == [5, 4, 6, 3, 7, 2, 8, 1, 9, 0]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_larger_bank_is_searched_through_its_codes(dtype):
    values = clustered(np.random.default_rng(4), 12_050, 48)
    stored = values[:12_000].astype(dtype).astype(np.float32)
    bank, queries = MemoryBank(values[:12_000], dtype=dtype), values[12_000:]
    assert bank.nbytes > stored.astype(dtype).nbytes  # there are codes
    radius = float(np.median(bank.kneighbors(queries, 20)[0][:, -1]))
    assert same(bank.radius_neighbors(queries, radius), expected_within(queries, stored, radius))


def test_no_queries_find_nothing():
    bank = MemoryBank(np.zeros((3, 2), np.float32))
    assert bank.radius_neighbors(np.empty((0, 2), np.float32), 1) == ([], [])


# --- Rows that do not find themselves ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEATURE_SETS)
@pytest.mark.parametrize("k", [1, 4])
def test_a_query_skips_the_row_of_its_number_only(kind, k):
    rows = FEATURE_SETS[kind](np.random.default_rng(5), 300, 30)
    rows[200:240] = rows[:40]  # equal rows are found, at 0
    exact = oracle.squared_distances(rows, rows)
    np.fill_diagonal(exact, np.inf)
    expected = oracle.smallest(exact, k)
    found = MemoryBank(rows).kneighbors(rows, k, exclude_self=True)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))
    radius = float(np.median(found[0]))
    within = MemoryBank(rows).radius_neighbors(rows, radius, exclude_self=True)
    assert same(within, expected_within(rows, rows, radius, exclude_self=True))


def test_queries_that_are_no_rows_skip_a_row_too():
    rng = np.random.default_rng(6)
    rows, queries = grid(rng, 50, 2), grid(rng, 50, 2)
    exact = oracle.squared_distances(queries, rows)
    np.fill_diagonal(exact, np.inf)
    found = MemoryBank(rows).kneighbors(queries, 3, exclude_self=True, squared=True)
    assert np.array_equal(found[1], oracle.smallest(exact, 3)[1])


def test_no_other_row_within_is_an_empty_answer():
    rows = np.array([[0.0], [0.0], [9.0]], np.float32)
    distances, indices = MemoryBank(rows).radius_neighbors(rows, 1, exclude_self=True)
    assert [found.tolist() for found in indices] == [[1], [0], []]
    assert [found.tolist() for found in distances] == [[0], [0], []]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda bank, rows: bank.kneighbors(rows[:2], exclude_self=True),
            ValueError,
            "queries must be 3, one for each",
        ),
        (
            lambda bank, rows: bank.radius_neighbors(rows[:2], 1, exclude_self=True),
            ValueError,
            "queries must be 3, one for each row",
        ),
        (lambda bank, rows: bank.kneighbors(rows, 3, exclude_self=True), ValueError, "k must be at most 2, the other"),
        (lambda bank, rows: bank.kneighbors(rows, squared=1), TypeError, "squared must be True or False; got 1"),
        (lambda bank, rows: bank.radius_neighbors(rows, -1), ValueError, "radius must be a number >= 0; got -1.0"),
        (lambda bank, rows: bank.radius_neighbors(rows, float("nan")), ValueError, "radius must be a number >= 0"),
        (lambda bank, rows: bank.radius_neighbors(rows, "1"), TypeError, "radius must be a number >= 0; got '1'"),
        (lambda bank, rows: bank.radius_neighbors(rows[:, :1], 1), ValueError, "queries must be 2 values wide"),
    ],
)
def test_a_wrong_argument_is_named(call, kind, message):
    rows = np.eye(3, 2, dtype=np.float32)
    with pytest.raises(kind) as caught:
        call(MemoryBank(rows), rows)
    assert str(caught.value).startswith(message)
