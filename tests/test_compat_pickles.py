"""Pickles and torch's files are read as plain data: nothing runs, nothing is believed, memory stays in bounds."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import struct
import subprocess
import sys
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
import torch

from patchcore_rs.compat.pickles import read_pickle, read_torch_file
from patchcore_rs.compat.plain_objects import Record
from patchcore_rs.model.file import ModelFileError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
PLAIN = [
    *(None, True, False, 1, -5, 2**40, -(2**70), 1.5, float("inf"), "x", "é", b"", b"abc", b"\xff", bytearray(b"xy")),
    *([1, [2]], [], (), (1,), (1, 2, 3, 4), {}, {"a": 1, (1, 2): 3}, set(), {1, 2}, frozenset([3]), slice(1, 2)),
    *(1 + 2j, collections.OrderedDict(a=1, b=[2]), np.float32(3), np.int64(-3)),
]
ARRAYS = [
    np.arange(6.0).reshape(2, 3),
    np.arange(6, dtype=">i4"),
    np.zeros((0, 3), np.float16),
    np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    np.array(True),
    np.arange(2000, dtype=np.uint8).reshape(40, 50),
]
RAN = []


def ran(*arguments):
    """What a hostile pickle would call."""
    RAN.append(arguments)


class Hostile:
    def __init__(self, function, *arguments):
        self.answer = function, arguments

    def __reduce__(self):
        return self.answer


class Stateful:
    def __init__(self, value=1):
        self.value = value

    def __setstate__(self, state):
        ran(state)


class Slotted:
    __slots__ = ("left", "right")

    def __init__(self):
        self.left, self.right = 1, [2]


class Dictionary(dict):
    pass


# --- what is read -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_what_pickle_reads(protocol):
    found = read_pickle(pickle.dumps(PLAIN, protocol))
    assert found == PLAIN
    assert [type(value) for value in found] == [type(value) for value in PLAIN]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
def test_arrays_are_what_pickle_reads(array, protocol):
    contents = pickle.dumps([array, array.dtype, array], protocol)
    expected, dtype, _ = pickle.loads(contents)
    found = read_pickle(contents)
    assert found[2] is found[0]
    assert found[1] == dtype
    assert (found[0].dtype, found[0].shape) == (expected.dtype, expected.shape)
    np.testing.assert_array_equal(found[0], expected)


def test_a_binary_file_is_read_from_where_it_stands():
    file = io.BytesIO(b"head" + pickle.dumps({"a": 1}))
    file.seek(4)
    assert read_pickle(file) == {"a": 1}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_unknown_object_is_a_record_of_its_attributes(protocol):
    found = read_pickle(pickle.dumps(Stateful(7), protocol))
    assert isinstance(found, Record)
    assert (found.module, found.name) == (__name__, "Stateful")
    assert found.attributes == {"value": 7}
    assert RAN == []


def test_slots_and_items_of_unknown_objects_are_kept():
    slotted, items = read_pickle(pickle.dumps([Slotted(), Dictionary(a=1)]))
    assert slotted.attributes == {"left": 1, "right": [2]}
    assert items.pairs == [("a", 1)]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_structures_that_hold_themselves_are_read(protocol):
    itself = []
    itself.append({"again": itself})
    found = read_pickle(pickle.dumps(itself, protocol))
    assert found[0]["again"] is found


@pytest.mark.parametrize("protocol", PROTOCOLS[2:])  # older ones cannot write such
def test_records_that_hold_each_other_are_read(protocol):
    first, second = Dictionary(), Dictionary()
    first["other"], second["other"] = second, first
    found = read_pickle(pickle.dumps(first, protocol))
    assert dict(dict(found.pairs)["other"].pairs)["other"] is found
    assert repr(found) == f"Record({__name__}.Dictionary)"


# --- what never runs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_that_a_pickle_calls_runs(protocol, tmp_path):
    mark = tmp_path / "mark"
    attacks = [
        Hostile(ran, 1),
        Hostile(os.system, f"touch {mark}"),
        Hostile(eval, f"open({str(mark)!r}, 'w')"),
        Hostile(getattr, Hostile(ran, 2), "__class__"),
        Hostile(map, ran, [1]),
        Stateful(),
        {"deep": [Hostile(exec, "import this")]},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = [read_pickle(pickle.dumps(attack, protocol)) for attack in attacks]
    assert RAN == []
    assert not mark.exists()
    assert [type(value) for value in found[:6]] == [Record] * 6
    assert found[1].args == (f"touch {mark}",)


def test_a_name_is_never_imported(tmp_path):
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "from patchcore_rs.compat.pickles import read_pickle;"
        "print(read_pickle(b'ctrap\\nCLASS\\n.'), read_pickle(b'(itrap\\nCLASS\\n.'), 'torch' in sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert out.split() == ["Record(trap.CLASS)", "Record(trap.CLASS)", "False"]


@pytest.mark.parametrize(
    "contents",
    [
        b"cbuiltins\neval\n(S'1'\ntR(S'2'\ntR.",  # what a call gave, called again
        b"(cbuiltins\neval\nS'1'\no.",
        b"(S'1'\nibuiltins\neval\n.",
        b"\x80\x02cbuiltins\neval\n(S'1'\nt\x81.",
        b"\x80\x04cbuiltins\neval\n(S'1'\nt}\x92.",
        b"cos\nsystem\n(S'true'\ntR}S'a'\nS'b'\nsb.",
        b"Pos.system\n.",
    ],
)
def test_every_instruction_that_would_call_makes_a_record(contents):
    assert isinstance(read_pickle(contents), Record)


def test_a_name_that_looks_known_is_not_called_with_what_does_not_fit():
    for attack in (
        b"ccollections\nOrderedDict\n(I5\ntR.",
        b"c_codecs\nencode\n(S'a'\nS'rot13'\ntR.",
        b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(I1\nI2\ntR.",
        b"cbuiltins\nset\n(I1\ntR.",
        b"cbuiltins\nbytearray\n(I1000000000000\ntR.",
    ):
        with pytest.raises(ValueError, match="no pickle that can be read"):
            read_pickle(attack)


# --- what is refused ----------------------------------------------------------------------------------------


def test_every_truncation_is_refused():
    contents = pickle.dumps(PLAIN + ARRAYS[:2])
    for end in range(len(contents)):
        with pytest.raises(ValueError, match=r"no (whole )?pickle"):
            read_pickle(contents[:end])


def test_damage_gives_a_value_or_a_value_error():
    contents = bytearray(pickle.dumps([*PLAIN, *ARRAYS[:3], Stateful()]))
    generator = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(contents)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        try:
            read_pickle(bytes(damaged))
        except ValueError:
            continue
    assert RAN == []


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "no whole pickle|exhausted"),
        (b"\x80\x06N.", "protocol is 6"),
        (b".", "a value is missing"),
        (b"(.", "a value is missing"),
        (b"(0t.", "a mark is missing"),
        (b"t.", "a mark is missing"),
        (b"h\x05.", "number 5 of the memo is missing"),
        (b"}(Ntu.", "a list|cannot|has no items|mark|key"),
        (b"}(Nu.", "a key has no value"),
        (b"N]a.", "a NoneType cannot be appended to"),
        (b"}]Ns.", "a list cannot be a key here"),
        (b"\x80\x02\x82\x01.", "the instruction EXT1 is not read"),
        (b"\x80\x05\x97.", "the instruction NEXT_BUFFER is not read"),
    ],
)
def test_what_is_no_pickle_is_refused_with_its_reason(contents, reason):
    with pytest.raises(ValueError, match=reason):
        read_pickle(contents)


def refused_within(limit, contents, reason):
    """A pickle that must be refused, with no more memory than `limit` taken on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=reason):
            read_pickle(contents)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("instruction", [b"\x8e", b"\x96", b"\x8d"])
def test_a_length_is_checked_before_it_is_believed(instruction):
    refused_within(1 << 20, b"\x80\x05" + instruction + struct.pack("<Q", 1 << 40) + b"abc.", "only 4 remain")


def test_a_memo_of_large_numbers_takes_no_memory():
    tracemalloc.start()
    try:
        assert read_pickle(b"Nr\xff\xff\xff\xff" * 100 + b"j\xff\xff\xff\xff.") is None
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_memo_cannot_make_much_of_little():
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x01cnumpy\nndarray\nq\x020"
    dtype = b"0cnumpy\ndtype\n(S'u1'\ntRq\x03" + b"0" + pickle.dumps(bytes(1 << 16), 3)[2:-3] + b"q\x040"
    fill = b"h\x01(h\x02I0\ntR(I1\n(I65536\nth\x03I0\nh\x04tb"
    assert isinstance(read_pickle(array + dtype + fill + b"."), np.ndarray)
    refused_within(1 << 20, array + dtype + (fill + b"0") * 1000 + b"N.", "makes more of its data than it holds")


def test_nested_keys_are_refused_where_hashing_them_would_take_for_ever():
    bomb = b"Nq\x00" + b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(60)).replace(b"\x86", b"h\x00\x86")
    with pytest.raises(ValueError, match="a tuple cannot be a key here"):
        read_pickle(b"}(" + bomb + b"Nu.")


def test_too_many_instructions_are_refused():
    with pytest.raises(ValueError, match="more than 1048576 instructions"):
        read_pickle(b"N0" * (1 << 20) + b"N.")


# --- torch's files ------------------------------------------------------------------------------------------


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.register_buffer("bank", torch.arange(6.0).reshape(2, 3))


TENSORS = {
    "float": torch.arange(12.0).reshape(3, 4),
    "transposed": torch.arange(12.0).reshape(3, 4).T,
    "part": torch.arange(12.0)[5:9],
    "double": torch.tensor(1.5, dtype=torch.float64),
    "half": torch.tensor([1.5, -2.0]).half(),
    "bfloat16": torch.tensor([1.5, -2.0, 3.140625]).bfloat16(),
    "long": torch.tensor([[1, -2]]),
    "bool": torch.tensor([True, False]),
    "empty": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}
if hasattr(torch, "uint16"):  # torch 2.3
    TENSORS["uint16"] = torch.tensor([1, 65535], dtype=torch.uint16)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved.pt"

    def save(value, **options):
        torch.save(value, path, **options)
        return path

    return save


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_are_what_torch_reads(name, saved):
    tensor = TENSORS[name]
    found = read_torch_file(saved({name: tensor}))[name]
    expected = tensor.detach()
    expected = expected.float().numpy() if tensor.dtype == torch.bfloat16 else expected.numpy()
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_a_module_that_was_saved_whole_is_records_and_tensors(saved):
    network = Network()
    found = read_torch_file(saved({"model": network}))["model"]
    assert (found.module, found.name) == (__name__, "Network")
    np.testing.assert_array_equal(found.attributes["_buffers"]["bank"], network.bank)
    layer = found.attributes["_modules"]["layer"]
    np.testing.assert_array_equal(layer.attributes["_parameters"]["weight"], network.layer.weight.detach())


def test_a_state_dict_is_a_dict_of_arrays(saved):
    network = Network()
    found = read_torch_file(saved(network.state_dict()))
    assert list(found) == ["bank", "layer.weight", "layer.bias"]
    np.testing.assert_array_equal(found["bank"], network.bank)


def test_nothing_that_a_torch_file_calls_runs(saved):
    found = read_torch_file(saved({"a": Hostile(ran, 1), "b": torch.ones(2)}))
    assert RAN == []
    assert found["a"].args == (1,)


def test_formats_that_are_not_read_are_refused_with_the_remedy(saved, tmp_path):
    with pytest.raises(ModelFileError, match=r"before torch 1\.6; save it again with torch\.save"):
        read_torch_file(saved(torch.ones(2), _use_new_zipfile_serialization=False))
    other = tmp_path / "other"
    other.write_bytes(b"text")
    with pytest.raises(ModelFileError, match=r"no file that torch\.save writes"):
        read_torch_file(other)
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_torch_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "missing")


def rewrite(path, change, **options):
    """The archive again, each entry's name and bytes as `change` gives them, None for none."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a name that stands twice
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, contents in change(entries):
                archive.writestr(name, contents)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda entries: entries + entries[:1], "a name stands twice"),
        (lambda entries: [*entries, ("saved/code/a.py", b"1")], "TorchScript"),
        (lambda entries: [*entries, ("other/data.pkl", b"N.")], "must have one data.pkl"),
        (lambda entries: [e for e in entries if "/data/" not in e[0]], "the storage '0' is missing"),
        (lambda entries: [(n, c[:4] if "/data/" in n else c) for n, c in entries], "values of float32 are claimed"),
        (lambda entries: [(n, b"odd" if n.endswith("byteorder") else c) for n, c in entries], "byte order"),
    ],
)
def test_an_archive_that_torch_would_not_write_is_refused(saved, change, reason):
    path = saved(torch.arange(8.0))
    rewrite(path, change)
    with pytest.raises(ModelFileError, match=reason):
        read_torch_file(path)


def test_a_compressed_archive_is_refused_before_it_is_unpacked(saved):
    path = saved(torch.zeros(1 << 20))
    rewrite(path, lambda entries: entries, compression=zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(ModelFileError, match="is compressed"):
        read_torch_file(path)


def test_every_truncation_of_an_archive_is_refused(saved):
    contents = saved(torch.arange(8.0)).read_bytes()
    path = saved(0)
    for end in range(0, len(contents), 7):
        path.write_bytes(contents[:end])
        with pytest.raises(ModelFileError):
            read_torch_file(path)


def test_a_damaged_archive_gives_a_value_or_is_refused(saved):
    contents = saved({"a": torch.arange(8.0), "b": [torch.ones(2, 3).bfloat16()]}).read_bytes()
    path = saved(0)
    generator = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(contents)
        for _ in range(generator.randrange(1, 4)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            read_torch_file(path)
        except ModelFileError:
            refused += 1
    assert refused > 100


def hostile_tensor(size, stride, offset=0, length=8):
    """The pickle of a tensor on a storage of 8 floats."""
    fields = [offset, tuple(size), tuple(stride)]
    body = b"ctorch._utils\n_rebuild_tensor_v2\n((S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\n"
    body += b"I%d\ntQ" % length + b"".join(pickle.dumps(field, 0)[:-1] for field in fields) + b"I00\nNtR."
    return body


@pytest.mark.parametrize(
    ("pickled", "reason"),
    [
        (hostile_tensor((1 << 40,), (0,)), "does not fit its storage"),
        (hostile_tensor((9,), (1,)), "does not fit its storage"),
        (hostile_tensor((2, 2), (7, 1)), "does not fit its storage"),
        (hostile_tensor((2,), (1,), offset=7), "does not fit its storage"),
        (hostile_tensor((2,), (1,), offset=-1), "must have an offset"),
        (hostile_tensor((2,), (-1,)), "integers >= 0"),
        (hostile_tensor((2,), ()), "as many strides as sizes"),
        (hostile_tensor((2,), (1,), length=1 << 40), "values of float32 are claimed"),
        (hostile_tensor((2,), (1,), length=-1), "a storage must have"),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(saved, pickled, reason):
    path = saved(torch.arange(8.0))
    rewrite(path, lambda entries: [(n, pickled if n.endswith("data.pkl") else c) for n, c in entries])
    with pytest.raises(ModelFileError, match=reason):
        read_torch_file(path)


def test_a_tensor_within_its_storage_is_read(saved):
    path = saved(torch.arange(8.0))
    pickled = hostile_tensor((2, 2), (3, 1), offset=1)
    rewrite(path, lambda entries: [(n, pickled if n.endswith("data.pkl") else c) for n, c in entries])
    np.testing.assert_array_equal(read_torch_file(path), [[1, 2], [4, 5]])
