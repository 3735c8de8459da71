"""The greedy coreset: the textbook sequence, and the same bits whatever the threads and SIMD level."""

from __future__ import annotations

import warnings

import numpy as np
import oracle
import pytest
from feature_sets import FEATURE_SETS, clustered, gaussian, grid

from patchcore_rs import build_info, greedy_coreset

LEVELS = build_info()["simd_available"]


def expected_sequence(features, count, **beginning):
    """The oracle's (indices, radii) as arrays."""
    indices, radii = oracle.greedy(features, count, **beginning)
    return np.array(indices, np.int64), np.array(radii)


def coreset(features, amount, **options):
    """(indices, radii), without the warning about a set that ran out of different rows."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the coreset has", UserWarning)
        return greedy_coreset(features, amount, return_radii=True, **options)


def same(found, expected):
    """Bits and dtypes of (indices, radii) are equal."""
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(found, expected, strict=True))


# --- Exactness ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEATURE_SETS)
@pytest.mark.parametrize(
    ("rows", "width", "count"), [(1, 1, 1), (7, 3, 7), (60, 17, 30), (2600, 40, 40), (300, 152, 300)]
)
def test_the_sequence_is_the_textbooks(kind, rows, width, count):
    features = FEATURE_SETS[kind](np.random.default_rng(rows), rows, width)
    start = rows // 2
    assert same(coreset(features, count, start=start), expected_sequence(features, count, start=start))


def test_a_larger_set_is_exact():
    features = clustered(np.random.default_rng(0), 6000, 32)
    assert same(coreset(features, 0.02, start=3), expected_sequence(features, 120, start=3))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("kind", FEATURE_SETS)
def test_threads_and_levels_change_no_bit(kind, level, monkeypatch):
    features = FEATURE_SETS[kind](np.random.default_rng(1), 2600, 75)
    monkeypatch.setenv("PATCHCORE_RS_SIMD", "scalar")
    expected = coreset(features, 130, threads=1)
    monkeypatch.setenv("PATCHCORE_RS_SIMD", level)
    for threads in (1, 2, 7):
        assert same(coreset(features, 130, threads=threads), expected), f"{threads} threads"


def test_a_smaller_coreset_is_a_prefix():
    features = clustered(np.random.default_rng(2), 3000, 30)
    whole = coreset(features, 400)
    part = coreset(features, 100)
    assert same(part, [values[:100] for values in whole])


def test_radii_cover_every_row_and_fall():
    rng = np.random.default_rng(3)
    features = clustered(rng, 500, 20)
    indices, radii = coreset(features, 50)
    assert (np.diff(radii) <= 0).all()
    for count in (1, 10, 50):
        nearest = oracle.squared_distances(features, features[indices[:count]]).min(axis=1)
        assert radii[count - 1] == np.sqrt(nearest.max())


# --- Beginnings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**64 - 1])
def test_the_seeded_row_comes_first_and_counts(seed):
    features = gaussian(np.random.default_rng(4), 211, 8)
    first = oracle.splitmix64(seed) % 211
    indices = greedy_coreset(features, 10, seed=seed)
    assert len(indices) == 10
    assert indices[0] == first
    assert np.array_equal(indices, greedy_coreset(features, 10, start=first))


@pytest.mark.parametrize("kind", [clustered, grid])
def test_mean_picks_the_row_farthest_from_all_first(kind):
    features = kind(np.random.default_rng(5), 150, 9)
    means = np.sqrt(oracle.squared_distances(features, features)).mean(axis=1)
    indices, radii = coreset(features, 12, start="mean")
    # The oracle's mean is summed in another order, so the values may differ in their last bits.
    assert means[indices[0]] >= means.max() * (1 - 1e-12)
    picks, covered = [], means**2
    for index, radius in zip(indices, radii, strict=True):
        assert covered[index] >= covered.max() * (1 - 1e-12)
        picks.append(index)
        covered = np.minimum(covered, oracle.squared_distances(features[index : index + 1], features)[0])
        covered[index] = -1
        assert radius == pytest.approx(np.sqrt(covered.max()), rel=1e-12)
    assert len(set(picks)) == 12


def test_mean10_depends_on_the_seed_and_on_nothing_else():
    features = clustered(np.random.default_rng(6), 400, 16)
    sequences = {seed: coreset(features, 20, start="mean10", seed=seed) for seed in range(6)}
    assert all(same(coreset(features, 20, start="mean10", seed=s, threads=1), found) for s, found in sequences.items())
    assert len({found[1].tobytes() for found in sequences.values()}) > 1
    # With ten rows at most, those ten are all rows.
    few = features[:10]
    assert same(coreset(few, 5, start="mean10", seed=1)[:1], coreset(few, 5, start="mean")[:1])


@pytest.mark.parametrize("rows", [[0], [3, 299, 7], [5, 5, 80]])
def test_the_mean_distance_to_given_rows_can_begin(rows):
    features = clustered(np.random.default_rng(8), 300, 20)
    means = np.sqrt(oracle.squared_distances(features, features[rows])).sum(axis=1) / len(rows)
    found = coreset(features, 60, start=np.array(rows))
    expected = expected_sequence(features, 60, value=means**2)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(coreset(features, 60, start=rows)[0], expected[0])


@pytest.mark.parametrize(
    ("start", "kind", "message"),
    [
        ([], ValueError, "start is empty: a mean distance needs at least one row"),
        ([0, 300], ValueError, "start must be row indices below 300; got 300"),
        ([-1], ValueError, "start must hold row indices >= 0; got -1"),
        ([0.5], TypeError, "start must hold row indices, integers of shape (n,); got float64 of shape (1,)"),
        ([[0]], TypeError, "start must hold row indices, integers of shape (n,); got int64 of shape (1, 1)"),
    ],
)
def test_rows_that_cannot_begin_are_refused(start, kind, message):
    with pytest.raises(kind) as caught:
        greedy_coreset(gaussian(np.random.default_rng(9), 300, 4), 5, start=start)
    assert str(caught.value) == message


@pytest.mark.parametrize("start", [None, 17, "mean"])
def test_other_rows_fill_up_a_set_without_more_different_ones(start):
    features = np.repeat(grid(np.random.default_rng(10), 12, 2), 5, axis=0)
    picks, radii = coreset(features, 60, start=start)
    assert 0 < len(picks) < 40
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, covered = greedy_coreset(features, 40, start=start, fill=True, return_radii=True)
    assert found.dtype == np.int64
    assert np.array_equal(found[: len(picks)], picks)
    others = [row for row in range(60) if row not in set(picks.tolist())]
    assert found[len(picks) :].tolist() == others[: 40 - len(picks)]
    assert np.array_equal(covered, np.concatenate([radii, np.zeros(40 - len(picks))]))
    few = greedy_coreset(features, 3, start=start, fill=True)
    assert np.array_equal(few, picks[:3])


# --- Amounts, and sets that run out ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("amount", "count"),
    [(1, 1), (40, 40), (np.int32(7), 7), (1.0, 40), (0.5, 20), (0.99, 39), (0.025, 1), (np.float32(0.5), 20)],
)
def test_an_int_is_a_count_and_a_float_a_fraction(amount, count):
    features = gaussian(np.random.default_rng(7), 40, 6)
    indices = greedy_coreset(features, amount)
    assert indices.dtype == np.int64
    assert len(indices) == len(set(indices.tolist())) == count


@pytest.mark.parametrize(("rows", "different"), [(np.ones((20, 4)), 1), (np.arange(30.0)[:, None] % 6, 6)])
def test_a_set_without_more_different_rows_ends_with_a_warning(rows, different):
    message = f"the coreset has {different} rows instead of 20: every other row equals a chosen one"
    with pytest.warns(UserWarning, match=message) as caught:
        indices, radii = greedy_coreset(rows, 20, return_radii=True)
    assert caught[0].filename == __file__
    assert len(indices) == len(radii) == different
    assert len(np.unique(rows[indices], axis=0)) == different
    assert radii[-1] == 0


def test_all_rows_can_be_chosen():
    features = gaussian(np.random.default_rng(8), 90, 5)
    indices, radii = coreset(features, 1.0)
    assert sorted(indices) == list(range(90))
    assert radii[-1] == 0
    assert (radii[:-1] > 0).all()


# --- Projections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sparse", "gaussian"])
def test_a_projection_is_seeded_and_roughly_keeps_the_cover(kind):
    features = clustered(np.random.default_rng(9), 800, 200)
    options = {"projection": 64, "projection_kind": kind}
    indices = greedy_coreset(features, 40, seed=3, **options)
    assert np.array_equal(indices, greedy_coreset(features, 40, seed=3, threads=1, **options))
    assert not np.array_equal(indices, greedy_coreset(features, 40, seed=4, start=int(indices[0]), **options))

    def radius(chosen):
        return np.sqrt(oracle.squared_distances(features, features[chosen]).min(axis=1).max())

    assert radius(indices) < 1.6 * radius(greedy_coreset(features, 40, seed=3))


# --- Progress ----------------------------------------------------------------------------------------------

# Corners of a cube, whose many equal distances no bound can skip: a call that lasts until it is stopped.
CUBE = np.random.default_rng(10).integers(0, 2, size=(40_000, 24)).astype(np.float32)


def test_progress_is_reported_in_order():
    seen = []

    def progress(done, total):
        seen.append((done, total))
        if len(seen) == 4:
            raise StopIteration

    with pytest.raises(StopIteration):
        greedy_coreset(CUBE, 30_000, progress=progress)
    assert seen == sorted(seen)
    assert all(0 <= done <= total == 30_000 for done, total in seen)


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt(), SystemExit(3), StopIteration()])
def test_what_progress_raises_ends_the_call(error):
    kept = CUBE.copy()
    calls = []

    def progress(done, total):
        calls.append(done)
        raise error

    with pytest.raises(type(error)) as caught:
        greedy_coreset(CUBE, 30_000, progress=progress)
    assert caught.value is error
    assert len(calls) == 1
    assert np.array_equal(CUBE, kept)


def test_progress_may_call_back():
    inner = []

    def progress(done, total):
        inner.append(greedy_coreset(CUBE[:50], 5).tolist())
        if len(inner) == 3:
            raise StopIteration

    with pytest.raises(StopIteration):
        greedy_coreset(CUBE, 30_000, progress=progress)
    assert inner[0] == inner[1] == inner[2]
