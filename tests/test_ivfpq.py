"""The hand-off to FAISS: the distances are exact, only the choice of rows is approximate."""

from __future__ import annotations

import builtins

import numpy as np
import pytest

from patchcore_rs import MemoryBank
from patchcore_rs.detector.ivfpq import IVFPQ, build_index

pytest.importorskip("faiss", reason="faiss-cpu is not installed (pip install patchcore-rs[faiss])")


def clustered(rows, width, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, width)) * 4
    return (centres[rng.integers(0, 40, rows)] + rng.normal(size=(rows, width))).astype(np.float32)


@pytest.fixture(scope="module")
def features():
    return clustered(3000, 24)


@pytest.fixture(scope="module")
def bank(features):
    return MemoryBank(features)


@pytest.fixture(scope="module")
def index(bank, features):
    return build_index(bank, features, seed=3, threads=1)


def test_distances_are_those_of_the_rows_named(index, features):
    queries = clustered(50, 24, seed=1)
    distances, indices = index.kneighbors(queries, 3)
    assert (distances.dtype, indices.dtype, distances.shape) == (np.float32, np.int64, (50, 3))
    exact = np.sqrt(((queries[:, None].astype(np.float64) - features[indices]) ** 2).sum(axis=2))
    np.testing.assert_allclose(distances, exact, rtol=1e-7)
    assert (np.diff(distances, axis=1) >= 0).all()
    assert all(len(set(row)) == 3 for row in indices.tolist())


def test_most_neighbours_are_the_exact_ones(index, bank):
    queries = clustered(200, 24, seed=2)
    found, exact = index.kneighbors(queries)[1], bank.kneighbors(queries)[1]
    assert (found == exact).mean() > 0.7


def test_rows_of_the_bank_find_themselves(index, features):
    distances, indices = index.kneighbors(features[:300])
    assert (distances == 0).mean() > 0.95
    assert (indices[distances == 0] == np.arange(300)[distances[:, 0] == 0]).all()


def test_the_same_seed_gives_the_same_answer(index, bank, features):
    queries = clustered(100, 24, seed=4)
    again = build_index(bank, features, seed=3, threads=1).kneighbors(queries, 2)
    for first, second in zip(index.kneighbors(queries, 2), again, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_query_does_not_depend_on_its_neighbours_in_the_batch(index):
    queries = clustered(600, 24, seed=5)
    whole = index.kneighbors(queries)[1]
    alone = np.concatenate([index.kneighbors(queries[i : i + 1])[1] for i in range(0, 600, 37)])
    np.testing.assert_array_equal(whole[::37], alone)


def test_ties_go_to_the_lowest_index():
    rows = np.repeat(clustered(400, 8), 3, axis=0)
    indices = IVFPQ(MemoryBank(rows), rows, threads=1).kneighbors(rows[::30])[1]
    assert (indices[:, 0] % 3 == 0).all()


def test_more_neighbours_than_the_lists_hold_are_found_exactly(index, bank):
    queries = clustered(5, 24, seed=6)
    distances, indices = index.kneighbors(queries, 2500)
    np.testing.assert_array_equal(indices, bank.kneighbors(queries, 2500)[1])
    assert np.isfinite(distances).all()


@pytest.mark.parametrize(
    ("rows", "width", "lists", "bits", "subquantisers"),
    [(624, 7, 16, 4, 7), (1300, 100, 33, 5, 64), (9984, 4, 99, 8, 4)],
)
def test_the_parameters_follow_the_bank(rows, width, lists, bits, subquantisers):
    features = clustered(rows, width)
    index = IVFPQ(MemoryBank(features), features, threads=1)
    assert (index.lists, index.bits, index.subquantisers) == (lists, bits, subquantisers)
    assert index.kneighbors(features[:4])[0].shape == (4, 1)


def test_a_small_bank_is_searched_exactly_with_one_warning():
    features = clustered(100, 8)
    bank = MemoryBank(features)
    with pytest.warns(UserWarning, match="at least 624 rows, this one has 100: searching exactly") as caught:
        assert build_index(bank, features, seed=0) is bank
    assert len(caught) == 1
    with pytest.raises(ValueError, match="at least 624 rows to train IVFPQ; got 100"):
        IVFPQ(bank, features)


def test_no_query_no_answer(index):
    distances, indices = index.kneighbors(np.empty((0, 24), np.float32))
    assert distances.shape == indices.shape == (0, 1)


def test_bad_queries_are_refused_by_position(index):
    queries = clustered(5, 24)
    queries[3, 7] = np.nan
    with pytest.raises(ValueError, match=r"queries\[3, 7\] is nan"):
        index.kneighbors(queries)
    with pytest.raises(ValueError, match="24"):
        index.kneighbors(clustered(5, 20))


def test_a_missing_faiss_is_named_with_its_remedy(monkeypatch):
    real = builtins.__import__

    def without_faiss(name, *args, **extra):
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *args, **extra)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    features = clustered(700, 8)
    with pytest.raises(ImportError, match=r"pip install patchcore-rs\[faiss\]"):
        build_index(MemoryBank(features), features, seed=0)
