"""The coreset for a radius, and that of a stream: prefixes of the greedy sequence, and a cover that is proved."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import oracle
import pytest
from feature_sets import FEATURE_SETS, clustered, gaussian
from test_coreset import CUBE, coreset, same

from patchcore_rs import StreamingCoreset, build_info, coreset_for_radius, greedy_coreset
from patchcore_rs.coreset import add_cover

RNG = np.random.default_rng(0)
CLUSTERED = clustered(RNG, 3000, 24)


def stream(features, amount, *, chunk=None, **options):
    """The stream's coreset of features in chunks of that many rows."""
    collected = StreamingCoreset(amount, **options)
    for start in range(0, len(features), chunk or len(features)):
        collected.add(features[start : start + (chunk or len(features))])
    return collected.finish()


def cover(features, chosen):
    """The exact covering radius."""
    return math.sqrt(oracle.squared_distances(features, chosen).min(axis=1).max())


# --- For a radius ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FEATURE_SETS)
def test_the_sequence_stops_once_the_radius_is_reached(kind):
    features = FEATURE_SETS[kind](np.random.default_rng(1), 400, 20)
    whole = coreset(features, 400, start=3)
    for last in (0, len(whole[1]) // 3, len(whole[1]) - 1):
        for radius in (whole[1][last], np.nextafter(whole[1][last], np.inf)):
            found = coreset_for_radius(features, radius, start=3, return_radii=True)
            count = int((whole[1] > radius).sum()) + 1
            assert same(found, [values[:count] for values in whole])


def test_the_radius_is_kept_and_chosen_rows_are_farther_apart():
    rows = coreset_for_radius(CLUSTERED, 9.5, seed=4)
    assert rows[0] == greedy_coreset(CLUSTERED, 1, seed=4)[0]
    assert cover(CLUSTERED, CLUSTERED[rows]) <= 9.5
    apart = oracle.squared_distances(CLUSTERED[rows], CLUSTERED[rows])
    assert np.sqrt(apart[~np.eye(len(rows), dtype=bool)]).min() > 9.5
    assert len(coreset_for_radius(CLUSTERED, np.inf)) == 1
    assert len(coreset_for_radius(np.repeat(CLUSTERED[:50], 3, axis=0), 0)) == 50


@pytest.mark.parametrize("limit", [30, 0.01])
def test_the_most_rows_there_may_be_are_warned_of(limit):
    with pytest.warns(
        UserWarning, match="ends at max_amount, 30 rows, with the covering radius .* instead of 0.5"
    ) as all_:
        rows, radii = coreset_for_radius(CLUSTERED, 0.5, max_amount=limit, return_radii=True)
    assert all_[0].filename == __file__
    assert same((rows, radii), coreset(CLUSTERED, 30))
    assert len(coreset_for_radius(CLUSTERED, radii[-1], max_amount=30)) == 30


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"radius": -1}, ValueError, "radius must be a number >= 0; got -1.0"),
        ({"radius": np.nan}, ValueError, "radius must be a number >= 0; got nan"),
        ({"radius": "1"}, TypeError, "radius must be a number >= 0; got '1' (str)"),
        ({"radius": None}, TypeError, "radius must be a number >= 0; got None (NoneType)"),
        ({"radius": True}, TypeError, "radius must be a number >= 0; got True (bool)"),
        ({"max_amount": 0}, ValueError, "max_amount must be at least 1; got 0"),
        ({"max_amount": 9}, ValueError, "max_amount must be at most the 5 rows of features; got 9"),
        (
            {"max_amount": 0.1},
            ValueError,
            "max_amount 0.1 of 5 rows is no row at all; take at least 0.2, or a count",
        ),
        (
            {"start": "mean"},
            ValueError,
            "start must be None or a row index where a radius is asked for; got 'mean'",
        ),
        ({"features": np.zeros((0, 3))}, ValueError, "features must have at least one row; got none"),
        ({"progress": 1}, TypeError, "progress must be None, True or callable as progress(done, total); got 1"),
        ({"threads": 0}, ValueError, "threads must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        coreset_for_radius(**{"features": np.eye(5), "radius": 0.5} | arguments)
    assert str(caught.value) == message


# --- A stream that fits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 7, 400])
@pytest.mark.parametrize("kind", FEATURE_SETS)
def test_a_stream_that_fits_into_the_buffer_is_the_greedy_coreset(kind, chunk):
    features = FEATURE_SETS[kind](np.random.default_rng(2), 400, 20)
    found = stream(features, 50, chunk=chunk, seed=3)
    indices, radii = coreset(features, 50, seed=3)
    np.testing.assert_array_equal(found.indices, indices)
    np.testing.assert_array_equal(found.features, features[indices])
    assert (found.radius, found.levels, found.rows) == (radii[-1], 1, 400)
    assert (found.indices.dtype, found.features.dtype) == (np.int64, np.float32)
    assert found.factor <= 2 * (1 + 1e-12)


def test_fewer_rows_than_the_amount_are_all_chosen():
    found = stream(CLUSTERED[:20], 30)
    assert sorted(found.indices) == list(range(20))
    assert (found.radius, found.factor, found.lower_bound) == (0, 1, 0)
    assert repr(found) == "StreamedCoreset(20 of 20 rows, radius <= 0, at most 1 times the best)"
    assert len(stream(np.ones((500, 4)), 30)) == 1


# --- A stream that does not --------------------------------------------------------------------------------


@pytest.mark.parametrize("buffer_rows", [80, 100, 160, 333])
@pytest.mark.parametrize("kind", FEATURE_SETS)
def test_the_cover_and_the_factor_hold(kind, buffer_rows):
    features = FEATURE_SETS[kind](np.random.default_rng(3), 2500, 12)
    found = stream(features, 20, chunk=171, buffer_rows=buffer_rows)
    np.testing.assert_array_equal(found.features, features[found.indices])
    assert len(set(found.indices.tolist())) == len(found) <= 20
    exact = cover(features, found.features)
    assert exact <= found.radius
    # The greedy cover is at most twice the best, so the best is at least half of it and at most all.
    greedy = coreset(features, 20)[1][-1]
    assert found.lower_bound <= greedy <= exact * 2 * (1 + 1e-12)
    assert found.radius == pytest.approx(found.factor * found.lower_bound) or found.radius == 0
    assert found.factor <= 2 * found.levels * (1 + 1e-12)


@pytest.mark.parametrize("places", [4, 5, 8])
def test_levels_are_as_few_as_the_header_says(places):
    features = gaussian(np.random.default_rng(4), 4000, 3)
    for rows in (places * 10, places * 10 + 1, 1200, 4000):
        levels = next(n for n in range(99) if math.comb(places + n - 1, n) * 10 >= rows)
        assert stream(features[:rows], 10, buffer_rows=places * 10).levels <= levels + 1


def test_neither_chunks_nor_threads_nor_levels_of_simd_change_a_bit(monkeypatch):
    expected = stream(CLUSTERED, 40, buffer_rows=200)
    for chunk in (1, 13, 200, 201, 999):
        for threads in (1, 3):
            found = stream(CLUSTERED, 40, chunk=chunk, buffer_rows=200, threads=threads)
            np.testing.assert_array_equal(found.indices, expected.indices)
            assert found.radius == expected.radius
    for level in build_info()["simd_available"]:
        monkeypatch.setenv("PATCHCORE_RS_SIMD", level)
        np.testing.assert_array_equal(stream(CLUSTERED, 40, buffer_rows=200).indices, expected.indices)


def test_a_stream_goes_on_after_it_was_finished():
    collected = StreamingCoreset(40, buffer_rows=200).add(CLUSTERED[:1700])
    early = collected.finish()
    assert early.indices.max() < 1700 == len(collected) == early.rows
    late = collected.add(CLUSTERED[1700:]).add(CLUSTERED[:0]).finish()
    np.testing.assert_array_equal(late.indices, stream(CLUSTERED, 40, buffer_rows=200).indices)
    assert repr(collected) == "StreamingCoreset(40, buffer_rows=200): 3000 rows arrived"


def test_covers_add_up_with_room_for_rounding():
    assert add_cover(0, 1.5, 768) == add_cover(1.5, 0, 768) == 1.5
    assert 3 < add_cover(1, 2, 768) < 3 * (1 + 1e-13)
    # On a line the triangle inequality is an equality, and canonical distances are rounded.
    for step in np.random.default_rng(5).uniform(1, 2, size=(200, 37)).astype(np.float32):
        line = np.stack([0 * step, step, step + step * np.float32(0.5)])
        (near, far), end = np.sqrt(oracle.squared_distances(line[:1], line))[0, 1:], line[2:]
        assert far <= add_cover(near, np.sqrt(oracle.squared_distances(line[1:2], end))[0, 0], 37)


# --- Faults ------------------------------------------------------------------------------------------------


def spoilt(row, value):
    chunk = CLUSTERED[100:900].copy()
    chunk[row, 5] = value
    return chunk


@pytest.mark.parametrize(
    ("chunk", "error", "message"),
    [
        (spoilt(0, np.nan), ValueError, "chunk[0, 5] is nan: every value must be finite; look at what produced that"),
        (spoilt(799, -np.inf), ValueError, "chunk[799, 5] is -inf: every value must be finite"),
        (spoilt(700, 3e16), ValueError, "chunk[700, 5] is 3e+16: magnitudes above 1e+16 overflow float32 distances"),
        (CLUSTERED[:, :5], ValueError, "chunk must have the 24 channels of the chunks before; got 5"),
        (CLUSTERED[0], ValueError, "chunk must be a 2-D array (rows, channels); got 1-D with shape (24,)"),
        (CLUSTERED.astype(int), TypeError, "chunk must hold floating-point values; got dtype int64"),
    ],
)
def test_a_bad_chunk_is_named_and_changes_nothing(chunk, error, message):
    for before in (100, 190, 1000):
        collected = StreamingCoreset(40, buffer_rows=200).add(CLUSTERED[:before])
        with pytest.raises(error) as caught:
            collected.add(chunk)
        assert str(caught.value).startswith(message)
        assert len(collected) == before
        found = collected.add(CLUSTERED[before:]).finish()
        np.testing.assert_array_equal(found.indices, stream(CLUSTERED, 40, buffer_rows=200).indices)


def test_the_first_chunk_may_fail_too():
    collected = StreamingCoreset(3)
    with pytest.raises(ValueError, match=r"chunk\[0, 0\] is nan"):
        collected.add([[np.nan, 1.0]])
    assert len(collected.add(np.eye(3)).finish()) == 3


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_an_interrupted_call_changes_nothing(stop):
    collected = StreamingCoreset(2000, buffer_rows=8000).add(CUBE[:5000])
    calls = []

    def progress(done, total):
        calls.append((done, total))
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collected.add(CUBE[5000:], progress=progress)
    assert len(calls) == stop
    assert calls == sorted(calls)
    assert {total for _, total in calls} == {35_000}
    assert len(collected) == 5000
    np.testing.assert_array_equal(collected.finish().indices, greedy_coreset(CUBE[:5000], 2000))


def test_an_interrupted_finish_consumes_nothing():
    collected = StreamingCoreset(10_000, buffer_rows=len(CUBE)).add(CUBE)
    with pytest.raises(KeyboardInterrupt):
        collected.finish(progress=lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    np.testing.assert_array_equal(collected.finish().indices, greedy_coreset(CUBE, 10_000))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"amount": 0}, ValueError, "amount must be at least 1; got 0"),
        ({"amount": 0.1}, TypeError, "amount must be an integer; got 0.1 (float)"),
        (
            {"buffer_rows": 39},
            ValueError,
            "buffer_rows must be at least four times the amount, 40; got 39. Pass None for eight times",
        ),
        ({"buffer_rows": 1e6}, TypeError, "buffer_rows must be an integer; got 1000000.0 (float)"),
        ({"seed": -1}, ValueError, "seed must be at least 0; got -1"),
        ({"threads": 0}, ValueError, "threads must be at least 1; got 0"),
    ],
)
def test_bad_options_are_named(arguments, error, message):
    with pytest.raises(error) as caught:
        StreamingCoreset(**{"amount": 10} | arguments)
    assert str(caught.value) == message


def test_what_a_call_needs_is_named():
    collected = StreamingCoreset(10)
    with pytest.raises(ValueError, match=r"no row has arrived: call add\(chunk\)"):
        collected.finish()
    with pytest.raises(TypeError, match=r"progress must be None, True or callable as progress\(done, total\)"):
        collected.add(np.eye(3), progress=3)
    with pytest.raises(TypeError, match="chunk must be float32 when strict=True; got dtype float64"):
        StreamingCoreset(10, strict=True).add(np.eye(3))
    with pytest.raises(ValueError, match="no row has arrived"):
        collected.add(np.zeros((0, 3))).finish()


# --- Memory ------------------------------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path):
    """A memmap of 20 MB, read-only."""
    path = tmp_path / "features.f32"
    features = clustered(np.random.default_rng(6), 80_000, 64)
    features.tofile(path)
    return features, np.memmap(path, np.float32, "r", shape=features.shape)


def test_a_memmap_is_read_where_it_lies(mapped):
    features, memmap = mapped
    expected = stream(features, 200)
    tracemalloc.start()
    try:
        rows = greedy_coreset(memmap, 20)
        of_greedy = tracemalloc.get_traced_memory()[1]
        found = stream(memmap, 200)
        of_stream = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(rows, greedy_coreset(features, 20))
    np.testing.assert_array_equal(found.indices, expected.indices)
    assert of_greedy < 0.01 * memmap.nbytes  # numpy's share: no copy
    assert of_stream < 4 * 1600 * (64 * 4 + 8)


def test_what_cannot_fit_is_refused_before_it_is_taken(monkeypatch):
    features = np.broadcast_to(np.float32(0), (10**9, 64))  # 256 GB, if it were copied
    monkeypatch.setattr("patchcore_rs._limits.available_memory", lambda: 30 * 10**6)
    with pytest.raises(MemoryError) as caught:
        greedy_coreset(features, 10)
    assert str(caught.value) == (
        "a C-contiguous float32 copy of features, float32 of shape (1000000000, 64), takes about 256.00 GB of memory, "
        "0.03 GB are available; store features as such an array, or pass fewer rows at a time"
    )
    features = np.empty((10**6, 64), np.float32)  # 256 MB of addresses, none of them touched
    needed = r"selecting a coreset of 1000000 rows of 64 channels, besides these rows, takes about 0\.31 GB of memory, "
    remedy = r"0\.03 GB are available; use StreamingCoreset, which holds a limited number of rows, or fewer rows"
    for call in (lambda: greedy_coreset(features, 10), lambda: coreset_for_radius(features, 1.0)):
        with pytest.raises(MemoryError, match=needed + remedy):
            call()
    with pytest.raises(MemoryError, match=r"takes about 0\.51 GB of memory, 0\.03 GB"):
        greedy_coreset(features, 10, projection=128)
    with pytest.raises(
        MemoryError, match=r"a buffer of 8000000 rows of 64 channels, twice while .* smaller buffer_rows"
    ):
        StreamingCoreset(10**6).add(CLUSTERED[:1].repeat(3, axis=1)[:, :64])


def test_what_fits_is_not_refused(monkeypatch):
    monkeypatch.setattr("patchcore_rs._limits.available_memory", lambda: 0)
    assert len(greedy_coreset(CLUSTERED, 10)) == 10  # too little to ask for
    monkeypatch.setattr("patchcore_rs._limits.available_memory", lambda: None)
    assert len(greedy_coreset(CUBE, 10)) == 10  # the system does not say
