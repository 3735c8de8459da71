"""Model files by hand, whole and wrong ones, by the definition of the format; their tests share them."""

from __future__ import annotations

import hashlib
import json
import tracemalloc

import numpy as np

from patchcore_rs.model.file import FORMAT, ModelFile, ModelFileError, read_model

CODES = {"float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "uint32": "U32", "uint8": "U8"}


def bank(rows=5, width=4):
    return np.arange(rows * width, dtype=np.float32).reshape(rows, width)


def standardised():
    return {"bank": bank(), "mean": np.zeros(4, np.float32), "deviation": np.ones(4, np.float32)}


def model(**metadata):
    return ModelFile("patchcore", standardised(), metadata)


def old_text(version=(1, 1), **metadata):
    """The metadata of format 1."""
    return json.dumps({"format": FORMAT, "version": list(version), **metadata})


def new_text(arrays, **metadata):
    """The metadata of format 2 with the digest of these arrays, by the definition of the format."""
    metadata = {"format": FORMAT, "version": [2, 0], "method": "patchcore", "optional": [], **metadata}
    contents = json.dumps(metadata, sort_keys=True, separators=(",", ":")).encode()
    for name in sorted(arrays):
        sizes = ",".join(map(str, arrays[name].shape))
        contents += f"\n{name} {CODES[arrays[name].dtype.name]} [{sizes}]\n".encode() + arrays[name].tobytes()
    metadata["sha256"] = hashlib.sha256(contents).hexdigest()
    return json.dumps(metadata, sort_keys=True, separators=(",", ":"))


def safetensors_bytes(arrays=None, text=None, header=None):
    """A safetensors file by hand: `header` replaces the JSON header, `text` the metadata entry."""
    arrays = {"bank": bank()} if arrays is None else arrays
    if text is None:
        text = old_text()
    entries, data = {}, b""
    for name, array in arrays.items():
        offsets = [len(data), len(data) + array.nbytes]
        entries[name] = {"dtype": CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    if header is None:
        header = json.dumps({"__metadata__": {"patchcore-rs": text}, **entries}).encode()
    return len(header).to_bytes(8, "little") + header + data


def new_bytes(arrays=None, **metadata):
    """A file of format 2 by hand, its digest right."""
    arrays = {"bank": bank()} if arrays is None else arrays
    return safetensors_bytes(arrays, new_text(arrays, **metadata))


def entry(shape, offsets, dtype="F32"):
    metadata = {"patchcore-rs": old_text()}
    bank_entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps({"__metadata__": metadata, "bank": bank_entry}).encode()


def with_value(value):
    array = bank()
    array[3, 2] = value
    return array


def with_header(contents, old, new):
    """The file with its header's first `old` replaced."""
    end = 8 + int.from_bytes(contents[:8], "little")
    assert old in contents[8:end]
    header = contents[8:end].replace(old, new, 1)
    return len(header).to_bytes(8, "little") + header + contents[end:]


OPTIONAL = {
    "note": np.arange(6, dtype=np.uint8).reshape(1, 2, 3),
    "sizes": np.array(7, np.int64),
}
WHOLE = safetensors_bytes()
WHOLE_2 = new_bytes({"bank": bank()} | OPTIONAL, optional=sorted(OPTIONAL), writer="9.9.9")


def memory_of_reading(path):
    """The most bytes that reading a file holds at once, by Python and numpy; a wrong file is refused."""
    tracemalloc.start()
    try:
        read_model(path)
    except ModelFileError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak
