"""Format 2 of the model file: its definition, what it refuses, what damages it survives, and the tables of arrays."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import nullcontext

import numpy as np
import pytest
from model_files import (
    CODES,
    OPTIONAL,
    WHOLE_2,
    bank,
    entry,
    memory_of_reading,
    new_bytes,
    new_text,
    old_text,
    safetensors_bytes,
    standardised,
    with_header,
    with_value,
)
from safetensors import safe_open

from patchcore_rs.model import arrays as model_arrays
from patchcore_rs.model.arrays import ArraySpec, check_arrays
from patchcore_rs.model.file import VERSION, ModelFile, ModelFileError, read_model, write_model

OTHER = hashlib.sha256(b"").hexdigest()
HOSTILE = {
    "no method": (new_bytes(method=None), "its method is None, this patchcore-rs knows patchcore, .*; read it with"),
    "unknown method": (
        new_bytes(method="magic", writer="9.9.9"),
        r"its method is 'magic', this patchcore-rs knows patchcore, .*; .* that wrote it \(9.9.9\) or a later one",
    ),
    "method a list": (new_bytes(method=["patchcore"]), r"its method is \['patchcore'\]"),
    "optional missing": (new_bytes(optional=None), "optional must be a sorted list of names; got None"),
    "optional not sorted": (
        new_bytes(optional=["b", "a"]),
        r"optional must be a sorted list of names; got \['b', 'a'\]",
    ),
    "optional twice": (new_bytes(optional=["a", "a"]), "optional must be a sorted list of names"),
    "optional of numbers": (new_bytes(optional=[1]), "optional must be a sorted list of names"),
    "optional not there": (new_bytes(optional=["note"]), "optional names the array 'note', which is not there"),
    "optional not listed": (
        new_bytes({"bank": bank(), "note": bank(), "other": bank()}, optional=["note"]),
        "it must hold the array bank, with or without mean and deviation; got bank, other",
    ),
    "bank called optional": (new_bytes(optional=["bank"]), "it must hold the array bank, .* got none"),
    "mean called optional": (
        new_bytes(standardised(), optional=["deviation", "mean"]),
        "an optional array must have a plain name .* that is none of the method's; got 'deviation'",
    ),
    **{
        f"optional called {name!r}": (
            new_bytes({"bank": bank(), name: bank()}, optional=[name]),
            "an optional array must have a plain name",
        )
        for name in ("Note", "1note", "../note", "a b", "a" * 65, "")
    },
    "optional not ASCII": (
        safetensors_bytes({"bank": bank(), "ä": bank()}, new_text({"bank": bank()}, optional=["ä"])),
        "the file is damaged",
    ),
    "optional of length 0": (
        new_bytes({"bank": bank(), "note": np.zeros((0, 9), np.uint8)}, optional=["note"]),
        r"note must have at most 8 axes, none of length 0; got \(0, 9\)",
    ),
    "NaN in an optional": (
        new_bytes({"bank": bank(), "note": with_value(np.nan).astype(np.float16)}, optional=["note"]),
        r"note\[3, 2\] is nan: every value must be finite",
    ),
    "no digest": (
        safetensors_bytes(text=old_text((2, 0), method="patchcore", optional=[])),
        "its sha256 must be 64 hexadecimal digits; got None. Copy the file again",
    ),
    "short digest": (safetensors_bytes(text=old_text((2, 0), sha256="abc")), "its sha256 must be 64 hex.* got 'abc'"),
    "wrong digest": (safetensors_bytes(text=old_text((2, 0), sha256=OTHER)), "the file is damaged.*; copy it again"),
    "digest in an old version": (safetensors_bytes(text=old_text((1, 0), sha256=OTHER)), "the file is damaged"),
    "digest with a blank": (
        safetensors_bytes(text=new_text({"bank": bank()}).replace('"sha256":', '"sha256": ')),
        "the file is damaged",
    ),
    "other metadata": (
        with_header(WHOLE_2, b'{"patchcore-rs": "', b'{"x": "y", "patchcore-rs": "'),
        "its header must have no other metadata than 'patchcore-rs'; save the model again",
    ),
    "key twice in the header": (
        with_header(WHOLE_2, b'"bank": {', b'"bank": {}, "bank": {'),
        "not a whole safetensors file .the key 'bank' stands twice",
    ),
    "key twice in an array's entry": (
        with_header(WHOLE_2, b'"dtype": "F32"', b'"dtype": "F32", "dtype": "F32"'),
        "not a whole safetensors file .the key 'dtype' stands twice",
    ),
    "key twice in the header's metadata": (
        with_header(WHOLE_2, b'{"patchcore-rs": "', b'{"patchcore-rs": "", "patchcore-rs": "'),
        "not a whole safetensors file .the key 'patchcore-rs' stands twice",
    ),
    "key twice in the metadata": (
        safetensors_bytes(text=new_text({"bank": bank()}).replace("{", '{"version":[2,0],', 1)),
        "its metadata is no valid JSON .the key 'version' stands twice",
    ),
    "key twice in the settings": (
        safetensors_bytes(text=new_text({"bank": bank()}, settings={"x": 1}).replace('{"x"', '{"x":0,"x"', 1)),
        "its metadata is no valid JSON .the key 'x' stands twice",
    ),
    "a type that no model has": (
        with_header(WHOLE_2, b'"dtype": "F32"', b'"dtype": "I32"'),
        "'bank' must be of F16, F32, F64, I64, U32, U8; got 'I32'",
    ),
    "an entry without a type": (with_header(WHOLE_2, b'"dtype": "F32", ', b""), "'bank' must be described by dtype"),
    "an entry with more": (with_header(WHOLE_2, b'"dtype"', b'"x": 1, "dtype"'), "must be described by dtype"),
    "a shape of floats": (with_header(WHOLE_2, b"[5, 4]", b"[5.0, 4]"), "a list of at most 8 integers >= 0"),
    "a shape of truths": (with_header(WHOLE_2, b"[5, 4]", b"[true, 20]"), "a list of at most 8 integers >= 0"),
    "a shape below 0": (with_header(WHOLE_2, b"[5, 4]", b"[-5, -4]"), "a list of at most 8 integers >= 0"),
    "nine axes": (with_header(WHOLE_2, b"[5, 4]", b"[5, 4, 1, 1, 1, 1, 1, 1, 1]"), "a list of at most 8 integers"),
    "one offset": (with_header(WHOLE_2, b"[0, 80]", b"[80]"), "cannot have the offsets"),
    "nothing of 2**60 axes": (
        safetensors_bytes({}, header=entry([0, 2**60], [0, 0])),
        "'bank' must have a smaller shape",
    ),
    "arrays that overlap": (
        safetensors_bytes(
            header=json.dumps(
                {
                    "__metadata__": {"patchcore-rs": old_text()},
                    "bank": {"dtype": "F32", "shape": [5, 4], "data_offsets": [0, 80]},
                    "mean": {"dtype": "F32", "shape": [4], "data_offsets": [64, 80]},
                }
            ).encode()
        ),
        "'mean' does not begin where the array before it ends",
    ),
    "header of another encoding": (
        safetensors_bytes(header=b"{\x00" + b"}\x00"),
        "not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_of_format_2_are_refused_by_path_and_reason(case, tmp_path):
    contents, reason = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(contents)
    with pytest.raises(ModelFileError, match=reason) as caught:
        read_model(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"


def test_a_file_is_as_the_format_defines_it(tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, ModelFile("patchcore", standardised(), {"name": "ä", "value": 0.1}, OPTIONAL))
    arrays = standardised() | OPTIONAL
    text = new_text(arrays, name="ä", value=0.1, optional=["note", "sizes"])
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"patchcore-rs": text}
        assert set(file.keys()) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(file.get_tensor(name), array, strict=True)


def test_every_flipped_byte_is_refused_or_changes_nothing(tmp_path):
    good, path = tmp_path / "good.safetensors", tmp_path / "damaged.safetensors"
    large = {"bank": bank(50, 8), "mean": bank(1, 8)[0], "deviation": 1 + bank(1, 8)[0]}
    metadata = {"settings": {"sigma": 4.0, "crop": None, "layers": ["a"]}, "threshold": 0.25, "writer": "9.9.9"}
    write_model(good, ModelFile("patchcore", large, metadata, OPTIONAL))
    whole, expected, harmless = good.read_bytes(), read_model(good), 0
    start = 8 + int.from_bytes(whole[:8], "little")
    for position in (*range(start), *range(start, len(whole), 5)):
        for mask in (0x01, 0x20):
            path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
            try:
                read = read_model(path)
            except ModelFileError:
                continue
            harmless += 1
            assert (read.method, read.metadata, read.version) == (expected.method, expected.metadata, expected.version)
            for ours, theirs in ((read.arrays, expected.arrays), (read.optional, expected.optional)):
                assert ours.keys() == theirs.keys()
                assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert harmless < 10  # blanks that pad the header


def test_reading_takes_no_more_memory_than_the_file(tmp_path):
    path = tmp_path / "large.safetensors"
    write_model(path, ModelFile("patchcore", {"bank": np.ones((2**14, 2**10), np.float32)}, {}))
    assert 64 << 20 < memory_of_reading(path) < 65 << 20


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 2), (2, 1, 2, 1, 1, 1, 1, 3)])
def test_every_type_and_shape_of_an_optional_array_comes_back(dtype, shape, tmp_path):
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    array = (100 * np.random.default_rng(0).random(shape)).astype(dtype)
    write_model(path, ModelFile("patchcore", {"bank": bank()}, {}, {"a1_": array, "b": array.T}))
    read = read_model(path)
    np.testing.assert_array_equal(read.optional["a1_"], array, strict=True)
    np.testing.assert_array_equal(read.optional["b"], array.T, strict=True)
    write_model(again, read)
    assert again.read_bytes() == path.read_bytes()


def test_a_later_minor_version_is_read_with_what_it_adds(tmp_path):
    path = tmp_path / "later.safetensors"
    path.write_bytes(new_bytes({"bank": bank()} | OPTIONAL, optional=["note", "sizes"], version=[2, 9], new=1))
    read = read_model(path)
    assert (read.version, read.metadata) == ((2, 9), {"new": 1})
    assert read.optional.keys() == OPTIONAL.keys()
    write_model(path, read)
    assert read_model(path).version == VERSION


def test_old_files_may_have_other_metadata_and_any_names_in_ours(tmp_path):
    path = tmp_path / "old.safetensors"
    contents = safetensors_bytes(text=old_text(method="x", optional=1, writer="0.1.0"))
    path.write_bytes(with_header(contents, b'{"patchcore-rs": "', b'{"x": "y", "patchcore-rs": "'))
    read = read_model(path)
    assert (read.method, read.version, read.metadata) == ("patchcore", (1, 1), {"writer": "0.1.0"})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "magic"}, "method must be one of patchcore, .*; got 'magic'"),
        ({"arrays": {}}, "it must hold the array bank, .* got none"),
        ({"arrays": {"bank": bank().astype(np.float64)}}, "bank must be float32"),
        ({"arrays": {"bank": with_value(np.nan)}}, r"bank\[3, 2\] is nan"),
        ({"metadata": {"sha256": "", "format": ""}}, "metadata must not hold format, sha256"),
        ({"optional": {"bank": bank()}}, "none of the method's; got 'bank'"),
        ({"optional": {"note": np.array(["a"])}}, r"note must be float16 \(F16\) or .*; got <U1"),
        ({"optional": {"note": np.array([1], np.int32)}}, r"note must be .* uint8 \(U8\); got int32"),
    ],
)
def test_what_would_not_be_read_is_not_written(wrong, message, tmp_path):
    right = {"method": "patchcore", "arrays": {"bank": bank()}, "metadata": {}}
    with pytest.raises(ValueError, match=message):
        write_model(tmp_path / "model.safetensors", ModelFile(**right | wrong))
    assert os.listdir(tmp_path) == []


def test_a_header_of_many_values_costs_little(tmp_path):
    path = tmp_path / "hostile.safetensors"
    for item in ("[]", "{}", "1e9", '"a"'):
        values = "[" + ",".join([item] * 200_000) + "]"
        for text, header in ((f'{{"x":{values}}}', None), (None, f'{{"x":{values}}}'.encode())):
            path.write_bytes(safetensors_bytes({}, text, header))
            assert memory_of_reading(path) < 32 << 20


# --- tables of arrays --------------------------------------------------------------------------------------

TABLES = {
    "rows": {
        "rows": ArraySpec(("F32",), ("images", "size", "size")),
        "first": ArraySpec(("U32", "I64"), ("images",), means="the images"),
        "low": ArraySpec(("F64",), ("size",), "bounds"),
        "high": ArraySpec(("F64",), ("size",), "bounds"),
        "extra": ArraySpec(("U8",), ("images", "bytes"), "extras"),
    }
}
ROWS = {"rows": np.ones((2, 3, 3), np.float32), "first": np.array([0, 1])}


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, None),
        ({"first": np.array([0, 1], np.uint32)}, None),
        ({"low": np.ones(3), "high": np.ones(3), "extra": np.ones((2, 32), np.uint8)}, None),
        (
            {"low": np.ones(3)},
            "must hold the arrays rows, first, with or without low and high, .* got first, low, rows",
        ),
        ({"first": np.array([0, 1], np.int32)}, r"first must be uint32 \(U32\) or int64 \(I64\); got int32"),
        ({"first": np.array([0])}, r"first must have the shape \(2,\) of the images; got \(1,\)"),
        ({"rows": np.ones((2, 3, 4), "f4")}, r"must have the shape \(images, size, size\), none 0; got \(2, 3, 4\)"),
        ({"extra": np.ones((2, 0), "u1")}, r"extra must have the shape \(2, bytes\), neither 0; got \(2, 0\)"),
        ({"extra": np.ones((3, 1), "u1")}, r"extra must have the shape \(2, bytes\), neither 0; got \(3, 1\)"),
    ],
)
def test_a_table_of_arrays(arrays, message, monkeypatch):
    monkeypatch.setattr(model_arrays, "METHOD_ARRAYS", TABLES)
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_arrays("rows", ROWS | arrays, {})


def test_an_optional_array_that_is_known_is_checked_too(monkeypatch):
    monkeypatch.setattr(model_arrays, "OPTIONAL_ARRAYS", {"source": ArraySpec(("U32",), ("rows",))})
    check_arrays("patchcore", {"bank": bank()}, {"source": np.zeros(5, np.uint32), "other": bank(7)})
    with pytest.raises(ValueError, match=r"source must have the shape \(5,\); got \(4,\)"):
        check_arrays("patchcore", {"bank": bank()}, {"source": np.zeros(4, np.uint32)})
    with pytest.raises(ValueError, match=r"source must be uint32 \(U32\); got F32"):
        check_arrays("patchcore", {"bank": bank()}, {"source": np.zeros(5, np.float32)})
