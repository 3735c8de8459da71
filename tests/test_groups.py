"""A search held to some groups of a bank's rows: the neighbours that the oracle finds among these, bit for bit."""

from __future__ import annotations

import pickle
import re

import numpy as np
import oracle
import pytest
from feature_sets import FEATURE_SETS, clustered, gaussian

from patchcore_rs import MemoryBank, build_info

LEVELS = build_info()["simd_available"]


def bank_in_groups(counts, width, *, kind="clustered", seed=0, queries=20, **options):
    """A bank, its rows, queries like them, and the group of each row."""
    values = FEATURE_SETS[kind](np.random.default_rng(seed), sum(counts) + queries, width)
    rows = values[: sum(counts)]
    bank = MemoryBank(rows, groups=counts, **options)
    return bank, rows, values[len(rows) :], np.repeat(np.arange(len(counts)), counts)


def expected_among(queries, rows, k, among):
    """(n, k) distances and indices of the nearest of the rows numbered `among`, from the definition."""
    distances, indices = oracle.nearest(queries, rows[among], k)
    return distances, among[indices]


def same(found, expected):
    """Bits, shapes and dtypes of (distances, indices) are equal."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("kind", FEATURE_SETS)
@pytest.mark.parametrize(
    ("counts", "groups", "k"),
    [
        ((50, 1, 300, 17, 700), (4, 1), 3),
        ((1,) * 600, range(0, 600, 7), 9),
        ((256, 256, 256), (1,), 1),
        ((100,) * 8, range(8), 2),
        ((5, 6, 7), (2, 0), 12),
    ],
)
def test_neighbours_are_the_oracles_among_the_rows_of_the_groups(kind, counts, groups, k):
    bank, rows, queries, group = bank_in_groups(counts, 72, kind=kind)
    among = np.flatnonzero(np.isin(group, groups))
    expected = expected_among(queries, rows, k, among)
    assert same(bank.kneighbors(queries, k, groups=groups), expected)
    assert same(bank.kneighbors(queries, k), oracle.nearest(queries, rows, k))


@pytest.mark.parametrize("level", LEVELS)
def test_threads_batches_and_levels_change_no_bit_of_a_search_in_groups(level, monkeypatch):
    monkeypatch.setenv("PATCHCORE_RS_SIMD", level)
    bank, rows, queries, group = bank_in_groups([147] * 9, 90, queries=60)
    groups = [7, 0, 3]
    expected = expected_among(queries, rows, 4, np.flatnonzero(np.isin(group, groups)))
    for threads in (1, 2, 7):
        assert same(bank.kneighbors(queries, 4, groups=groups, threads=threads), expected), f"{threads} threads"
        for size in (1, 16):
            parts = [bank.kneighbors(queries[i : i + size], 4, groups=groups) for i in range(0, 60, size)]
            assert same([np.concatenate(part) for part in zip(*parts, strict=True)], expected), f"batches of {size}"


def test_equal_rows_of_several_groups_come_in_rising_order():
    row = gaussian(np.random.default_rng(1), 1, 30)
    bank = MemoryBank(np.tile(row, (600, 1)), groups=[200, 200, 200])
    _, indices = bank.kneighbors(row + 1, 210, groups=[2, 0])
    assert np.array_equal(indices[0], [*range(200), *range(400, 410)])


def test_rows_stored_as_float16_are_searched_in_groups():
    bank, rows, queries, group = bank_in_groups([300] * 4, 40, dtype="float16")
    rounded = rows.astype(np.float16).astype(np.float32)
    assert same(
        bank.kneighbors(queries, 5, groups=[1, 2]),
        expected_among(queries, rounded, 5, np.flatnonzero((group == 1) | (group == 2))),
    )


def test_a_radius_takes_in_the_rows_of_the_groups_alone():
    bank, rows, queries, group = bank_in_groups([290] * 4, 33)
    among = np.flatnonzero(group == 2)
    exact = oracle.squared_distances(queries, rows)
    radius = float(np.sort(exact[:, among], axis=1)[0, 4])
    distances, indices = bank.radius_neighbors(queries, radius, groups=[2], squared=True)
    assert 5 in {len(found) for found in indices}
    for line, found, near in zip(exact, indices, distances, strict=True):
        order = among[np.argsort(line[among], kind="stable")]
        assert np.array_equal(found, order[line[order] <= radius])
        assert np.array_equal(near, line[found].astype(np.float32))


def test_squared_distances_are_those_of_the_groups():
    bank, rows, queries, _ = bank_in_groups([290, 31], 33)
    squared, indices = bank.kneighbors(queries, 2, groups=[1], squared=True)
    exact = oracle.squared_distances(queries, rows)
    assert np.array_equal(squared, np.take_along_axis(exact, indices, axis=1).astype(np.float32))
    assert indices.min() >= 290


def test_groups_survive_a_pickle_and_are_told():
    bank, _, queries, _ = bank_in_groups([100, 200], 20)
    again = pickle.loads(pickle.dumps(bank))
    assert again.groups.tolist() == [100, 200]
    assert again.groups.dtype == np.int64
    assert same(again.kneighbors(queries, 3, groups=[1]), bank.kneighbors(queries, 3, groups=[1]))
    assert repr(again).startswith("MemoryBank(300 rows in 2 groups x 20 channels, ")
    assert MemoryBank(np.ones((2, 3), np.float32)).groups is None


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([2, 0, 2], ValueError, "groups must be at least one row each; got none for group 1"),
        ([2, 1], ValueError, "groups must be 4 rows in all, those of features; got 3"),
        ([], ValueError, "groups must be 4 rows in all, those of features; got 0"),
        ([5, -1], ValueError, "groups must hold integers from 0 on; got -1"),
        ([[2, 2]], ValueError, "groups must have shape (n,), one integer for each group; got (1, 2)"),
        (4, ValueError, "groups must have shape (n,), one integer for each group; got ()"),
        ([2.0, 2.0], TypeError, "groups must hold integers; got dtype float64"),
        ([2**63, 2**63], ValueError, "groups must be 4 rows in all, those of features; got more than can be counted"),
    ],
)
def test_counts_that_are_none_are_named(groups, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        MemoryBank(np.ones((4, 3), np.float32), groups=groups)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ([], ValueError, "groups is empty: a search needs at least one group"),
        ([0, 2], ValueError, "groups must be below 2, the number of groups of the memory bank; got 2"),
        ([1, 1], ValueError, "groups must be distinct; got 1 twice"),
        ([-1], ValueError, "groups must hold integers from 0 on; got -1"),
        ([True], TypeError, "groups must hold integers; got dtype bool"),
        (1, ValueError, "groups must have shape (n,), one integer for each group; got ()"),
    ],
)
def test_groups_that_are_not_there_are_named(groups, error, message):
    bank = MemoryBank(np.ones((4, 3), np.float32), groups=[1, 3])
    for search in (bank.kneighbors, bank.radius_neighbors):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            search(np.ones((4, 3), np.float32), 1, groups=groups)


def test_what_does_not_go_with_groups_is_refused():
    rows = clustered(np.random.default_rng(2), 6, 3)
    bank, plain = MemoryBank(rows, groups=[2, 4]), MemoryBank(rows)
    with pytest.raises(ValueError, match=r"^k must be between 1 and the 2 rows of the groups; got 3$"):
        bank.kneighbors(rows, 3, groups=[0])
    for search in (bank.kneighbors, bank.radius_neighbors):
        with pytest.raises(ValueError, match=r"^exclude_self must be False where groups are given; got True. "):
            search(rows, 1, groups=[0], exclude_self=True)
    for search in (plain.kneighbors, plain.radius_neighbors):
        with pytest.raises(ValueError, match=r"^groups must be None, since this memory bank has none: "):
            search(rows, 1, groups=[0])
    with pytest.raises(ValueError, match=r"^this bank must have no groups to be joined with other rows; got 2. "):
        bank.with_rows(rows)
    with pytest.raises(ValueError, match=r"^other must have no groups to be joined with other rows; got 2. "):
        plain.merge(bank)
    assert np.array_equal(
        bank.kneighbors(rows, 1, exclude_self=True)[1], plain.kneighbors(rows, 1, exclude_self=True)[1]
    )
