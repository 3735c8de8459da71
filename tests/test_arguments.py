"""What comes in wrong is refused by name, and what can be read is read; arguments are never modified or kept."""

from __future__ import annotations

import types
import warnings

import numpy as np
import pytest

from patchcore_rs import MemoryBank, aggregate, anomaly_maps, greedy_coreset, image_scores

RNG = np.random.default_rng(0)
# Eighths, so that every float dtype holds them exactly.
BASE = (RNG.integers(-128, 128, size=(12, 4)) / 8).astype(np.float32)
BANK = MemoryBank(BASE[:5])
STRICT = MemoryBank(BASE[:5], strict=True)

# The doors through which features come, with the name of the argument.
DOORS = {
    "MemoryBank": ("features", lambda array, **options: MemoryBank(array, **options).kneighbors(BASE)),
    "kneighbors": ("queries", lambda array, strict=False: (STRICT if strict else BANK).kneighbors(array)),
    "greedy_coreset": ("features", lambda array, **options: (greedy_coreset(array, 6, start=2, **options),)),
}


def raises(error, message, call):
    """`call` raises exactly `error` with exactly `message`."""
    with pytest.raises(error) as caught:
        call()
    assert (type(caught.value), str(caught.value)) == (error, message)


def base_with(value, dtype=np.float32):
    array = BASE.astype(dtype)
    array[1, 2] = value
    array[3, 0] = np.nan
    return array


def tensor(**options):
    torch = pytest.importorskip("torch")
    return torch.tensor(BASE.tolist(), **options)


def tensor_subclass():
    torch = pytest.importorskip("torch")
    return torch.tensor(BASE).as_subclass(type("Features", (torch.Tensor,), {}))


def tensor_of_negative_bit():
    torch = pytest.importorskip("torch")
    values = torch.complex(torch.zeros(12, 4), torch.tensor(-BASE)).conj().imag
    assert values.is_neg()
    return values


def sparse_tensor(layout):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its compressed layouts a beta
        return getattr(tensor(), layout)()


def cuda_tensor():
    """A stub, since few machines have a device."""
    device = type("device", (), {"type": "cuda", "__str__": lambda self: "cuda:0"})()
    return type("Tensor", (), {"__module__": "torch", "device": device})()


def misaligned():
    buffer = np.zeros(BASE.nbytes + 1, np.uint8)
    array = buffer[1:].view(np.float32).reshape(BASE.shape)
    array[:] = BASE
    assert not array.flags.aligned
    return array


def read_only():
    array = BASE.copy()
    array.setflags(write=False)
    return array


class Frame:
    """What a data frame is to numpy."""

    def __array__(self, dtype=None, copy=None):
        return np.array(BASE, np.float64 if dtype is None else dtype)


class Sparse:
    """What a matrix of scipy.sparse is to numpy."""

    def toarray(self):
        return BASE.copy()


class Exchanged:
    """An array that speaks DLPack alone."""

    def __init__(self, on="cpu"):
        self.on = on

    def __dlpack__(self, **options):
        if self.on != "cpu":
            raise BufferError(f"the data are on {self.on}")
        return BASE.copy().__dlpack__(**options)

    def __dlpack_device__(self):
        return BASE.__dlpack_device__()


class Subclass(np.ndarray):
    def __array_finalize__(self, other):
        self.label = getattr(other, "label", "none")

    def __getitem__(self, at):
        raise AssertionError("a subclass's methods are not called")


# --- Refused -----------------------------------------------------------------------------------------------

NOT_FINITE = "every value must be finite; look at what produced that row"
HUGE = "magnitudes above 1e16 overflow float32 distances; scale the features"
NOT_FLOATS = "must hold floating-point values; got dtype {}. Convert with .astype(np.float32)"
NO_ARRAY = "must be an array, a tensor or nested lists of numbers; got {}. Make one of it, "
NO_ARRAY += "numpy.array(list(...)) of a generator"
NO_CHANNELS = "must have at least one channel; got shape {}. A backbone that returned empty features is the usual cause"

REFUSED_ARRAYS = {
    "nan": (lambda: base_with(np.nan), ValueError, f"{{}}[1, 2] is nan: {NOT_FINITE}"),
    "inf": (lambda: base_with(np.inf), ValueError, f"{{}}[1, 2] is inf: {NOT_FINITE}"),
    "-inf": (lambda: base_with(-np.inf), ValueError, f"{{}}[1, 2] is -inf: {NOT_FINITE}"),
    "float64 inf": (lambda: base_with(np.inf, np.float64), ValueError, f"{{}}[1, 2] is inf: {NOT_FINITE}"),
    "float16 inf": (lambda: base_with(np.inf, np.float16), ValueError, f"{{}}[1, 2] is inf: {NOT_FINITE}"),
    "huge": (lambda: base_with(2e16), ValueError, f"{{}}[1, 2] is 2e16: {HUGE}"),
    "huge negative": (lambda: base_with(-3e38), ValueError, f"{{}}[1, 2] is -3e38: {HUGE}"),
    "too large for float32": (
        lambda: base_with(1e300, np.float64),
        ValueError,
        "{}[1, 2] is 1e+300: it overflows float32; scale the features",
    ),
    "0-D": (lambda: np.float32(1), ValueError, "{} must be a 2-D array (rows, channels); got 0-D with shape ()"),
    "1-D": (lambda: BASE[0], ValueError, "{} must be a 2-D array (rows, channels); got 1-D with shape (4,)"),
    "3-D": (lambda: BASE[None], ValueError, "{} must be a 2-D array (rows, channels); got 3-D with shape (1, 12, 4)"),
    "no channels": (lambda: BASE[:, :0], ValueError, "{} " + NO_CHANNELS.format("(12, 0)")),
    "nothing": (lambda: BASE[:0, :0], ValueError, "{} " + NO_CHANNELS.format("(0, 0)")),
    "None": (lambda: None, TypeError, "{} " + NO_ARRAY.format("NoneType")),
    "generator": (lambda: (row for row in BASE), TypeError, "{} " + NO_ARRAY.format("generator")),
    "sparse matrix": (Sparse, TypeError, "{0} is a sparse matrix, Sparse; pass {0}.toarray()"),
    "DLPack of another device": (
        lambda: Exchanged(on="rocm"),
        TypeError,
        "{} cannot be read by numpy: the data are on rocm. Pass it as float32 on the CPU",
    ),
    "tensor unknown to numpy": (
        lambda: tensor().to(pytest.importorskip("torch").float8_e4m3fn),
        TypeError,
        "{} is a tensor that numpy cannot read: Got unsupported ScalarType Float8_e4m3fn",
    ),
    "integer tensor": (lambda: tensor().int(), TypeError, "{} " + NOT_FLOATS.format("int32")),
    "cuda tensor": (cuda_tensor, TypeError, "{0} is a tensor on cuda:0; pass {0}.cpu()"),
    "meta tensor": (lambda: tensor(device="meta"), TypeError, "{0} is a tensor on meta; pass {0}.cpu()"),
    "sparse tensor": (lambda: sparse_tensor("to_sparse"), TypeError, "{0} is a sparse tensor; pass {0}.to_dense()"),
    "CSR tensor": (lambda: sparse_tensor("to_sparse_csr"), TypeError, "{0} is a sparse tensor; pass {0}.to_dense()"),
    "masked values": (
        lambda: np.ma.masked_greater(BASE, 0),
        TypeError,
        "{} has masked values; fill or drop them first",
    ),
}
for dtype in ("int64", "int8", "uint8", "bool", "object", "complex64", "complex128", "<U6", "S6", "M8[s]"):
    REFUSED_ARRAYS[dtype] = (
        lambda dtype=dtype: BASE.astype("i8").astype(dtype),
        TypeError,
        "{} " + NOT_FLOATS.format(np.dtype(dtype)),
    )


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", REFUSED_ARRAYS)
@pytest.mark.filterwarnings("ignore:Casting complex")
def test_an_array_is_refused(case, door):
    make, error, message = REFUSED_ARRAYS[case]
    name, call = DOORS[door]
    array = make()
    raises(error, message.format(name), lambda: call(array))


@pytest.mark.parametrize("door", DOORS)
def test_the_first_bad_value_is_named(door):
    name, call = DOORS[door]
    features = np.ones((40, 4), np.float32)
    features[17, 3] = features[18, 0] = features[39] = np.nan
    raises(ValueError, f"{name}[17, 3] is nan: {NOT_FINITE}", lambda: call(features))
    # In the middle of what the check reads as one block, far behind its first.
    wide = np.zeros((300, 700), np.float32)
    wide[170, 301] = -np.inf
    raises(ValueError, f"features[170, 301] is -inf: {NOT_FINITE}", lambda: MemoryBank(wide))


@pytest.mark.parametrize("door", DOORS)
def test_ragged_lists_are_refused(door):
    name, call = DOORS[door]
    with pytest.raises(ValueError, match=f"^{name} cannot be read as one array: .*inhomogeneous"):
        call([[1.0], [1.0, 2.0]])


def test_shapes_that_no_memory_holds_are_a_memory_error():
    endless = np.broadcast_to(np.float32(1), (2**40, 4))
    for _, call in DOORS.values():
        with pytest.raises(MemoryError):
            call(endless)


BIG = 2**70
REFUSED_CALLS = {
    "no rows": (
        lambda: MemoryBank(BASE[:0]),
        ValueError,
        "features is empty: a memory bank needs at least one row",
    ),
    "no rows to choose from": (
        lambda: greedy_coreset(BASE[:0], 1),
        ValueError,
        "features must have at least one row; got none",
    ),
    "other width": (
        lambda: BANK.kneighbors(BASE[:, :3]),
        ValueError,
        "queries must be 4 values wide, as the rows of the memory bank; got 3",
    ),
    "other width, no queries": (
        lambda: BANK.kneighbors(BASE[:0, :3]),
        ValueError,
        "queries must be 4 values wide, as the rows of the memory bank; got 3",
    ),
    "k over the rows": (
        lambda: BANK.kneighbors(BASE, 6),
        ValueError,
        "k must be between 1 and the 5 rows of the memory bank; got 6",
    ),
    "k 0": (lambda: BANK.kneighbors(BASE, 0), ValueError, "k must be at least 1; got 0"),
    "k -1": (lambda: BANK.kneighbors(BASE, -1), ValueError, "k must be at least 1; got -1"),
    "k huge": (lambda: BANK.kneighbors(BASE, BIG), ValueError, f"k must be below {2**63}; got {BIG}"),
    "k float": (lambda: BANK.kneighbors(BASE, 2.0), TypeError, "k must be an integer; got 2.0 (float)"),
    "k bool": (lambda: BANK.kneighbors(BASE, True), TypeError, "k must be an integer; got True"),
    "k numpy bool": (
        lambda: BANK.kneighbors(BASE, np.bool_(1)),
        TypeError,
        f"k must be an integer; got {np.bool_(1)!r}",
    ),
    "k str": (lambda: BANK.kneighbors(BASE, "1"), TypeError, "k must be an integer; got '1' (str)"),
    "k None": (lambda: BANK.kneighbors(BASE, None), TypeError, "k must be an integer; got None (NoneType)"),
    "threads 0": (lambda: MemoryBank(BASE, threads=0), ValueError, "threads must be at least 1; got 0"),
    "threads -2": (lambda: BANK.kneighbors(BASE, threads=-2), ValueError, "threads must be at least 1; got -2"),
    "threads float": (
        lambda: greedy_coreset(BASE, 1, threads=1.0),
        TypeError,
        "threads must be an integer; got 1.0 (float)",
    ),
    "dtype": (
        lambda: MemoryBank(BASE, dtype="float64"),
        ValueError,
        'dtype must be "float32" or "float16"; got \'float64\'',
    ),
    "amount 0": (lambda: greedy_coreset(BASE, 0), ValueError, "amount must be at least 1; got 0"),
    "amount over the rows": (
        lambda: greedy_coreset(BASE, 13),
        ValueError,
        "amount must be at most the 12 rows of features; got 13",
    ),
    "amount of no row": (
        lambda: greedy_coreset(BASE, 0.01),
        ValueError,
        "amount 0.01 of 12 rows is no row at all; take at least 0.0833, or a count",
    ),
    "amount bool": (lambda: greedy_coreset(BASE, True), TypeError, "amount must be an integer; got True"),
    "amount str": (lambda: greedy_coreset(BASE, "0.1"), TypeError, "amount must be an integer; got '0.1' (str)"),
    "start over the rows": (
        lambda: greedy_coreset(BASE, 1, start=12),
        ValueError,
        "start must be a row index below 12; got 12",
    ),
    "start -1": (lambda: greedy_coreset(BASE, 1, start=-1), ValueError, "start must be at least 0; got -1"),
    "start float": (
        lambda: greedy_coreset(BASE, 1, start=1.0),
        TypeError,
        "start must be an integer; got 1.0 (float)",
    ),
    "start unknown": (
        lambda: greedy_coreset(BASE, 1, start="median"),
        ValueError,
        'start must be None, a row index, row indices, "mean" or "mean10"; got \'median\'',
    ),
    "seed -1": (lambda: greedy_coreset(BASE, 1, seed=-1), ValueError, "seed must be at least 0; got -1"),
    "seed 2**64": (
        lambda: greedy_coreset(BASE, 1, seed=2**64),
        ValueError,
        f"seed must be below {2**64}; got {2**64}",
    ),
    "projection 0": (
        lambda: greedy_coreset(BASE, 1, projection=0),
        ValueError,
        "projection must be at least 1; got 0",
    ),
    "projection kind": (
        lambda: greedy_coreset(BASE, 1, projection=2, projection_kind="dense"),
        ValueError,
        'projection_kind must be "sparse" or "gaussian"; got "dense"',
    ),
    "progress": (
        lambda: greedy_coreset(BASE, 1, progress=3),
        TypeError,
        "progress must be None, True or callable as progress(done, total); got 3",
    ),
}
for amount in (0.0, -0.1, 1.5, np.nan, np.inf):
    REFUSED_CALLS[f"amount {amount}"] = (
        lambda amount=amount: greedy_coreset(BASE, amount),
        ValueError,
        f"amount must be a fraction in (0, 1] when it is a float, or a count when it is an int; got {amount}",
    )


@pytest.mark.parametrize("case", REFUSED_CALLS)
def test_a_call_is_refused(case):
    call, error, message = REFUSED_CALLS[case]
    raises(error, message, call)


def test_a_refused_call_leaves_the_bank_as_it_was():
    before = [values.tobytes() for values in BANK.kneighbors(BASE, 3)]
    for case in ("other width", "k over the rows"):
        call, error, message = REFUSED_CALLS[case]
        raises(error, message, call)
    assert [values.tobytes() for values in BANK.kneighbors(BASE, 3)] == before


# --- Read --------------------------------------------------------------------------------------------------

READ = {
    "float64": lambda: BASE.astype(np.float64),
    "float16": lambda: BASE.astype(np.float16),
    "long double": lambda: BASE.astype(np.longdouble),
    "other byte order": lambda: BASE.astype(BASE.dtype.newbyteorder()),
    "float64 of the other byte order": lambda: BASE.astype(np.dtype(np.float64).newbyteorder()),
    "Fortran order": lambda: np.asfortranarray(BASE),
    "every other column": lambda: np.repeat(BASE, 2, axis=1)[:, ::2],
    "negative strides": lambda: BASE[::-1, ::-1].copy()[::-1, ::-1],
    "misaligned": misaligned,
    "read-only": read_only,
    "subclass": lambda: BASE.copy().view(Subclass),
    "nothing masked": lambda: np.ma.masked_greater(BASE, 1000),
    "list": BASE.tolist,
    "frame": Frame,
    "DLPack": Exchanged,
    "tensor": tensor,
    "float64 tensor": lambda: tensor().double(),
    "float16 tensor": lambda: tensor().half(),
    "bfloat16 tensor": lambda: tensor().bfloat16(),
    "tensor with gradient": lambda: tensor(requires_grad=True),
    "strided tensor": lambda: tensor().t().contiguous().t(),
    "tensor subclass": tensor_subclass,
    "tensor of negative bit": tensor_of_negative_bit,
}
FLOAT32 = {
    "Fortran order",
    "every other column",
    "negative strides",
    "misaligned",
    "read-only",
    "subclass",
    "nothing masked",
    "DLPack",
    "tensor",
    "tensor with gradient",
    "strided tensor",
    "tensor subclass",
    "tensor of negative bit",
}


def contents(array):
    """What can be compared of an argument before and after a call."""
    if isinstance(array, np.ndarray):
        return np.ndarray.tobytes(array), array.strides, array.flags.writeable
    return array.tolist() if hasattr(array, "tolist") else repr(array)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", READ)
def test_an_array_is_read_as_what_it_holds(kind, door):
    call = DOORS[door][1]
    array = READ[kind]()
    before = contents(array) if kind not in ("frame", "DLPack") else None
    for found, expected in zip(call(array), call(BASE), strict=True):
        assert found.tobytes() == expected.tobytes()
        assert type(found) is np.ndarray
    assert before is None or contents(array) == before


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", READ)
def test_strict_takes_float32_only(kind, door):
    name, call = DOORS[door]
    array = READ[kind]()
    if kind in FLOAT32:
        assert call(array, strict=True)[0].tobytes() == call(BASE)[0].tobytes()
    else:
        with pytest.raises(TypeError, match=f"^{name} must be float32 when strict=True; got dtype "):
            call(array, strict=True)


def test_values_too_small_for_float32_are_rounded_whatever_numpy_is_told_to_raise():
    tiny = np.array([[1e-300, 1.0], [-1e-40, 2.0]])
    with np.errstate(all="ignore"):
        expected = MemoryBank(tiny.astype(np.float32)).features
    with np.errstate(all="raise"):
        bank = MemoryBank(tiny)
        distances, indices = bank.kneighbors(tiny)
        np.testing.assert_array_equal(bank.features, expected)
        assert distances.tolist() == [[0.0], [0.0]]
        assert indices.ravel().tolist() == [0, 1]
        assert sorted(greedy_coreset(tiny, 2).tolist()) == [0, 1]
        np.testing.assert_array_equal(
            image_scores(bank, tiny, np.full(2, 1e-300), indices, patches=1, reweight=None), [0, 0]
        )
        assert not anomaly_maps(np.full((1, 4, 4), 1e-300), (8, 8)).any()
        for side in (4, 400):  # copied at once, and image by image
            assert not aggregate([np.full((1, 2, side, side), 1e-300)])[0].any()
        raises(
            ValueError,
            "features[0, 0] is 1e+300: it overflows float32; scale the features",
            lambda: MemoryBank(np.array([[1e300, 1e-300]])),
        )


def test_a_matrix_of_scipy_is_told_apart_from_what_holds_no_floats():
    matrix = pytest.importorskip("scipy.sparse").csr_matrix(BASE)
    raises(TypeError, "features is a sparse matrix, csr_matrix; pass features.toarray()", lambda: MemoryBank(matrix))
    assert len(MemoryBank(matrix.toarray())) == len(BASE)


@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_memory_mapped_file_is_read(mode, tmp_path):
    BASE.tofile(tmp_path / "features")
    array = np.memmap(tmp_path / "features", np.float32, mode, shape=BASE.shape)
    for _, call in DOORS.values():
        assert call(array)[0].tobytes() == call(BASE)[0].tobytes()
    assert (tmp_path / "features").read_bytes() == BASE.tobytes()


def test_values_at_the_limit_are_read():
    limit = np.full((2, 300), 1e16, np.float32)
    limit[1] *= -1
    distances, indices = MemoryBank(limit).kneighbors(limit, 2)
    assert indices.tolist() == [[0, 1], [1, 0]]
    assert distances[0].tolist() == [0, np.float32(2 * np.float64(limit[0, 0]) * np.sqrt(300.0))]


@pytest.mark.parametrize("k", [1, np.int8(1), np.uint64(1), np.array(1), types.SimpleNamespace])
def test_whatever_is_an_integer_counts(k):
    if k is types.SimpleNamespace:
        k = type("One", (), {"__index__": lambda self: 1})()
    assert BANK.kneighbors(BASE, k)[1].shape == (12, 1)


@pytest.mark.parametrize("k", [1, 5])
def test_no_queries_give_an_empty_answer_of_the_right_shape(k):
    distances, indices = BANK.kneighbors(np.zeros((0, 4), np.float32), k)
    assert (distances.shape, distances.dtype) == ((0, k), np.float32)
    assert (indices.shape, indices.dtype) == ((0, k), np.int64)


def test_answers_share_no_memory_with_arguments():
    features, queries = BASE.copy(), BASE[3:].copy()
    kept = features.copy(), queries.copy()
    bank = MemoryBank(features)
    answers = [*bank.kneighbors(queries, 2), bank.features, *greedy_coreset(features, 4, return_radii=True)]
    for answer in answers:
        assert not np.shares_memory(answer, features)
        assert not np.shares_memory(answer, queries)
        assert answer.flags.writeable
        answer[:] = 0
    assert np.array_equal(features, kept[0])
    assert np.array_equal(queries, kept[1])
    assert np.array_equal(bank.features, kept[0])
