"""The face of FAISS: `IndexFlatL2` answers as FAISS's own does, and reads and writes its files."""

from __future__ import annotations

import copy
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from patchcore_rs.compat.faiss import METRIC_L2, IndexFlatL2, read_index, write_index
from patchcore_rs.model.file import ModelFileError

faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed (pip install patchcore-rs[faiss])")

MISSING = np.float32(3.4028235e38)


def both(rows):
    """Our index and FAISS's of the same rows."""
    ours, theirs = IndexFlatL2(rows.shape[1]), faiss.IndexFlatL2(rows.shape[1])
    for part in np.array_split(rows, 3):
        ours.add(part)
        theirs.add(part)
    return ours, theirs


def gaussian(rows, channels, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, channels), dtype=np.float32)


def whole(rows, channels, seed=0):
    """Rows of small whole numbers, whose distances have no rounding anywhere."""
    return np.random.default_rng(seed).integers(-40, 41, (rows, channels)).astype(np.float32)


@pytest.mark.parametrize("queries", [1, 7, 64])
@pytest.mark.parametrize("k", [1, 5, 300])
def test_a_search_finds_what_faiss_finds(queries, k):
    ours, theirs = both(whole(300, 17))
    found, expected = ours.search(whole(queries, 17, 1), k), theirs.search(whole(queries, 17, 1), k)
    assert [array.dtype for array in found] == [np.float32, np.int64]
    np.testing.assert_array_equal(found[0], expected[0])
    near = ours.reconstruct_n()[found[1]] - whole(queries, 17, 1)[:, None]
    np.testing.assert_array_equal(np.square(near).sum(axis=2), found[0])


def test_distances_are_those_of_faiss_within_its_rounding():
    rows, queries = gaussian(500, 64), gaussian(40, 64, 1)
    ours, theirs = both(rows)
    found, expected = ours.search(queries, 4), theirs.search(queries, 4)
    exact = np.square(queries[:, None].astype(np.float64) - rows[None]).sum(axis=2)
    np.testing.assert_array_equal(found[0], np.sort(exact, axis=1)[:, :4].astype(np.float32))
    np.testing.assert_array_equal(found[1], expected[1])
    norms = np.square(queries).sum(axis=1, keepdims=True) + np.square(rows[expected[1]]).sum(axis=2)
    assert (np.abs(found[0] - expected[0]) <= 64 * 2.0**-23 * norms).all()


def test_ties_go_to_the_lowest_index():
    index = IndexFlatL2(3)
    index.add(np.ones((6, 3), np.float32))
    assert index.search(np.zeros((2, 3), np.float32), 4)[1].tolist() == [[0, 1, 2, 3]] * 2


def test_neighbours_that_are_not_there_are_marked_as_faiss_marks_them():
    ours, theirs = both(whole(3, 4))
    for found, expected in zip(ours.search(whole(2, 4, 1), 5), theirs.search(whole(2, 4, 1), 5), strict=True):
        np.testing.assert_array_equal(found, expected)
    distances, indices = IndexFlatL2(4).search(whole(2, 4), 2)
    assert (distances == MISSING).all()
    assert (indices == -1).all()
    assert faiss.IndexFlatL2(4).search(whole(2, 4), 2)[0].tolist() == distances.tolist()


def test_answers_go_into_arrays_that_are_given():
    ours, _ = both(whole(9, 4))
    distances, indices = np.empty((2, 3), np.float32), np.empty((2, 3), np.int64)
    found = ours.search(whole(2, 4, 1), 3, D=distances, I=indices)
    assert found[0] is distances
    assert found[1] is indices
    expected = ours.search(whole(2, 4, 1), 3)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_array_equal(ours.assign(whole(2, 4, 1), 3), expected[1])
    with pytest.raises(ValueError, match=r"D must be a float32 array of shape \(2, 3\); got float32 \(2, 2\)"):
        ours.search(whole(2, 4, 1), 3, D=np.empty((2, 2), np.float32))


@pytest.mark.parametrize("queries", [3, 40])
@pytest.mark.parametrize("radius", [-1.0, 0.0, 500.0, 2000.0, 1e30])
def test_a_range_search_finds_what_faiss_finds(queries, radius):
    ours, theirs = both(whole(60, 5))
    found, expected = ours.range_search(whole(queries, 5, 1), radius), theirs.range_search(whole(queries, 5, 1), radius)
    for own, their in zip(found, expected, strict=True):
        assert own.dtype == their.dtype
        np.testing.assert_array_equal(own, their)


def test_a_range_is_open_at_its_radius():
    index = IndexFlatL2(1)
    index.add(np.float32([[0], [1], [2]]))
    assert index.range_search(np.float32([[0]]), 1.0)[2].tolist() == [0]
    assert index.range_search(np.float32([[0]]), np.nextafter(np.float32(1), np.float32(2)))[2].tolist() == [0, 1]
    assert index.range_search(np.float32([[0]]), float("inf"))[2].tolist() == [0, 1, 2]
    assert IndexFlatL2(1).range_search(np.float32([[0]]), 1.0)[0].tolist() == [0, 0]


def test_rows_come_back_as_they_were_added():
    rows = gaussian(9, 4)
    ours, theirs = both(rows)
    for searched in (False, True):
        if searched:
            ours.search(rows, 1)
        np.testing.assert_array_equal(ours.reconstruct_n(), rows)
        np.testing.assert_array_equal(ours.reconstruct_n(2, 3), theirs.reconstruct_n(2, 3))
        np.testing.assert_array_equal(ours.reconstruct(8), theirs.reconstruct(8))
    ours.add(rows[:2])
    np.testing.assert_array_equal(ours.reconstruct_n(8), rows[[8, 0, 1]])
    np.testing.assert_array_equal(ours.search(rows[:1], 2)[1], [[0, 9]])
    with pytest.raises(ValueError, match="key must be below 11; got 11"):
        ours.reconstruct(11)


def test_rows_are_copied():
    rows = gaussian(4, 3)
    index = IndexFlatL2(3)
    index.add(rows)
    index.reconstruct_n()[:] = 7
    expected = rows.copy()
    rows[:] = 9
    np.testing.assert_array_equal(index.reconstruct_n(), expected)


def test_an_index_says_what_faiss_says_of_itself():
    ours, theirs = both(gaussian(9, 4))
    for name in ("d", "ntotal", "is_trained", "metric_type"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert METRIC_L2 == faiss.METRIC_L2
    ours.train(gaussian(9, 4))
    ours.reset()
    assert ours.ntotal == 0
    assert ours.search(gaussian(1, 4), 1)[1].tolist() == [[-1]]


def test_integers_and_doubles_are_converted_as_faiss_does():
    ours, theirs = both(whole(9, 4))
    for queries in (whole(2, 4).astype(np.int64), whole(2, 4).astype(np.float64), whole(4, 2).T):
        np.testing.assert_array_equal(ours.search(queries, 2)[0], theirs.search(queries, 2)[0])


def test_an_index_can_be_copied_and_pickled():
    ours, _ = both(gaussian(9, 4))
    expected = ours.search(gaussian(3, 4, 1), 2)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        ours.reset()
        np.testing.assert_array_equal(other.search(gaussian(3, 4, 1), 2)[0], expected[0])
        ours = other


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda index: index.add(np.ones((2, 3), np.float32)), "x must have the 4 channels of the index; got 3"),
        (lambda index: index.add(np.ones(4, np.float32)), "x must be a 2-D array"),
        (lambda index: index.add(np.full((1, 4), np.nan)), r"x\[2, 0\] is nan"),
        (lambda index: index.add(np.full((1, 4), -np.inf)), r"x\[2, 0\] is -inf"),
        (lambda index: index.add(np.full((1, 4), 1e17)), r"x\[2, 0\] is 1e\+?17"),
        (lambda index: index.search(np.full((1, 4), np.nan), 1), r"queries\[0, 0\] is nan"),
        (lambda index: index.search(np.full((1, 4), np.inf), 1), r"queries\[0, 0\] is inf"),
        (lambda index: index.search(np.full((1, 4), 1e17), 1), r"queries\[0, 0\] is 1e\+?17"),
        (lambda index: index.range_search(np.full((1, 4), np.inf), 1.0), r"queries\[0, 0\] is inf"),
        (lambda index: index.search(np.ones((1, 4), np.float32), 0), "k must be at least 1; got 0"),
        (lambda index: index.reconstruct_n(0, 3), "ni must be below 3; got 3"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    index = IndexFlatL2(4)
    index.add(np.ones((2, 4), np.float32))
    with pytest.raises(ValueError, match=message):
        call(index)
    assert index.ntotal == 2


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 50])
def test_files_are_those_of_faiss(rows, tmp_path):
    ours, theirs = both(gaussian(rows, 6))
    write_index(ours, tmp_path / "ours")
    faiss.write_index(theirs, str(tmp_path / "theirs"))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    np.testing.assert_array_equal(faiss.read_index(str(tmp_path / "ours")).reconstruct_n(), ours.reconstruct_n())
    found = read_index(tmp_path / "theirs")
    assert (found.d, found.ntotal) == (6, rows)
    np.testing.assert_array_equal(found.reconstruct_n(), theirs.reconstruct_n())


def test_another_index_of_faiss_is_refused_with_the_remedy(tmp_path):
    path = tmp_path / "index"
    for index in (faiss.IndexFlatIP(4), faiss.index_factory(4, "IVF1,Flat"), faiss.index_factory(4, "HNSW4")):
        faiss.write_index(index, str(path))
        with pytest.raises(ModelFileError, match="read it with faiss, and add its rows to an IndexFlatL2"):
            read_index(path)


@pytest.mark.parametrize(
    ("offset", "change", "reason"),
    [
        (0, b"IxFI", "a flat index by inner product"),
        (0, b"text", "no flat index by Euclidean distance"),
        (4, struct.pack("<i", 0), "it claims 5 rows of 0 channels"),
        (4, struct.pack("<i", 2**31 - 1), "rows of 2147483647 channels"),
        (4, struct.pack("<i", -4), "rows of -4 channels"),
        (8, struct.pack("<q", 2**60), f"it claims {2**60} rows"),
        (8, struct.pack("<q", -5), "it claims -5 rows"),
        (33, struct.pack("<i", 0), "its metric must be 1"),
        (37, struct.pack("<Q", 2**62), f"{2**62} values"),
        (45, struct.pack("<f", np.nan), r"x\[0, 0\] is nan"),
    ],
)
def test_no_length_is_believed(offset, change, reason, tmp_path):
    ours, _ = both(gaussian(5, 4))
    path = tmp_path / "index"
    write_index(ours, path)
    contents = bytearray(path.read_bytes())
    contents[offset : offset + len(change)] = change
    path.write_bytes(contents)
    with pytest.raises(ModelFileError, match=reason):
        read_index(path)


def test_every_truncation_and_every_longer_file_is_refused(tmp_path):
    ours, _ = both(gaussian(5, 4))
    path = tmp_path / "index"
    write_index(ours, path)
    contents = path.read_bytes()
    for damaged in [*(contents[:end] for end in range(len(contents))), contents + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(ModelFileError):
            read_index(path)
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_index(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_index(tmp_path / "missing")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    ours, _ = both(gaussian(5, 4))
    path = tmp_path / "index"
    write_index(ours, path)
    before = path.read_bytes()
    with pytest.raises(TypeError, match="index must be an IndexFlatL2; got IndexFlat"):
        write_index(faiss.IndexFlatL2(4), path)
    with pytest.raises(FileNotFoundError):
        write_index(ours, tmp_path / "missing" / "index")
    assert [file.name for file in tmp_path.iterdir()] == ["index"]
    assert path.read_bytes() == before


def test_faiss_is_never_imported():
    code = (
        "import sys, numpy as np; from patchcore_rs.compat.faiss import IndexFlatL2; index = IndexFlatL2(3);"
        "index.add(np.ones((2, 3), np.float32)); index.search(np.ones((1, 3), np.float32), 1);"
        "print({'faiss', 'torch', 'sklearn'} & sys.modules.keys())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.strip() == "set()"
