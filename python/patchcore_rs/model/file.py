"""The model file, format 2: one safetensors file that holds arrays and text, never code.

    bytes 0-7   the length of the header, little-endian, at most 1 MiB
    header      one JSON object, as safetensors defines it: each array's "dtype", "shape" and "data_offsets", and
                "__metadata__", which has exactly one entry, "patchcore-rs": the text of one JSON object, in ASCII
    the rest    the arrays, little-endian, without gaps

The JSON object holds

    "format"     "patchcore-rs model"
    "version"    [2, minor]
    "method"     a method of `METHOD_ARRAYS` (`model/arrays.py`), whose arrays the file holds: their types, shapes and
                 values are as that table says. An "ensemble" also holds the arrays of its members, named
                 <number from 0>.<method>.<name>, and "members", a list of objects as this one has them: each with its
                 "method", "settings", "requires" and what else `model/description.py` says
    "optional"   the sorted names of all other arrays. No score depends on them: a reader that does not know one keeps
                 it from load to save, and drops it with whatever changes what was learnt. A name is
                 [a-z][a-z0-9_]{0,63}; the types are those of `DTYPES`, any shape of up to 8 axes, none of length 0.
                 "image_hashes" are those of all images learnt from (`images/pixels.py`)
    "settings"   an object, and
    "requires"   the sorted names of those settings in it that change scores; "clip" only where it is false and
                 "normalize" true, as every reader before it clipped. A reader that does not know one of them
                 refuses the file; other unknown settings it ignores, as any other unknown name of the JSON object
    "sha256"     64 lower-case hexadecimal digits, see below

and what else `model/description.py` says. No float is NaN or infinite. No key stands twice in a JSON object.

The digest is the SHA-256 of these bytes: the text as it stands in the file, without the one member
`"sha256":"<digits>",` (no blanks, and never the last member); then for each array, sorted by name, a line
`\\n<name> <dtype> [<sizes, joined by commas>]\\n` and its bytes. The writer's text is compact: sorted keys, no blanks.
So the same model gives the same bytes. The digest finds damage. It is no signature: who changes a file can change it.

Only primary data is stored; whatever follows from it is computed again on loading. A file comes from a stranger until
it is proved harmless: its size, prefix, header and offsets are checked before anything is allocated.

Versions are (major, minor). A minor version adds what older readers may ignore; a newer major version is refused.
Format 1 has no method, optional, requires and sha256: it holds the arrays of "patchcore". 1.1 added "training".
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patchcore_rs.model.arrays import AXES, DTYPES, METHOD_ARRAYS, check_arrays, dtype_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import IO

    from numpy.typing import NDArray

FORMAT = "patchcore-rs model"
VERSION = (2, 0)

_KEY = "patchcore-rs"
_OWN_NAMES = {"format", "version", "method", "optional", "sha256"}  # of the JSON object, written and read here
_DIGEST = re.compile(r"[0-9a-f]{64}")
_ORDER = ("I64", "F64", "F32", "U32", "F16", "U8")  # of types in a file, as safetensors lays them out
_HEADER_LIMIT = 1 << 20  # a model's header is some 2 kB; parsing one must not cost more than a few MB
_HINT = "a model is what the save of a detector writes"
# Containers that can carry code, or are mistaken for models, by their first bytes.
_FOREIGN = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (.pt, .pth, .ckpt)"),
    (b"PK\x05\x06", "an empty zip archive"),
    *((bytes((0x80, protocol)), "a Python pickle") for protocol in (2, 3, 4, 5)),
    (b"\x93NUMPY", "a numpy .npy file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"IxF", "a FAISS index"),
    (b"IwP", "a FAISS index"),
)


class ModelFileError(ValueError):
    """A file that is no usable model: `path` and `reason`."""

    def __init__(self, path: str | os.PathLike[str] | bytes | IO[bytes], reason: str) -> None:
        """Both are kept as arguments, so that the error can be pickled."""
        super().__init__(model_name(path), reason)
        self.path = model_name(path)
        self.reason = reason

    def __str__(self) -> str:
        """The path, then the reason."""
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, eq=False)
class ModelFile:
    """What a model file holds.

    `arrays` are those that the method needs, `optional` those that no score depends on, `metadata` is the JSON object
    but for the names that the format itself gives a meaning. `version` is the one that was read; writing knows one.
    """

    method: str
    arrays: Mapping[str, NDArray[Any]]
    metadata: dict[str, Any]
    optional: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    version: tuple[int, int] = VERSION

    @property
    def later_reader(self) -> str:
        """What to do about a file that this version cannot read."""
        return _later_reader(self.metadata)


def write_model(path: str | os.PathLike[str], model: ModelFile) -> None:
    """Write `model` to `path`, whole or not at all.

    The bytes go to a temporary file in the same folder, are synced, and take the place of `path` in one rename; on
    any failure a file that was there before is untouched and the temporary file is gone.

    Raises:
        IsADirectoryError: `path` is a folder.
        FileNotFoundError: the folder of `path` is missing.
        ValueError: `path` is no regular file (a device, say), JSON cannot hold the metadata, or `read_model` would
            refuse the arrays.
        OSError: the write fails.
    """
    if _OWN_NAMES & model.metadata.keys():
        raise ValueError(f"metadata must not hold {', '.join(sorted(_OWN_NAMES & model.metadata.keys()))}")
    check_arrays(model.method, model.arrays, model.optional)
    given = (*model.arrays.items(), *model.optional.items())
    arrays = dict(sorted(((name, _little_endian(array)) for name, array in given), key=_place))
    entries = {
        **model.metadata,
        "format": FORMAT,
        "version": list(VERSION),
        "method": model.method,
        "optional": sorted(model.optional),
    }
    entries["sha256"] = _digest(_compact(entries), arrays)
    # Through a symbolic link the file it names is replaced, not the link.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a model is saved to a file, this is a folder", os.fspath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"path must be a file or not exist yet; got {os.fspath(path)}, which is a device or pipe")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to save in does not exist", os.fspath(path))
    # Array by array, each as it stands in memory: what is learnt may fill most of it.
    replace_file(target, _header(arrays, _compact(entries)), *map(_bytes, arrays.values()))


def read_model(path: str | os.PathLike[str] | bytes | IO[bytes]) -> ModelFile:
    """Read and check a model: a file, what one holds as bytes, or the rest of an open one.

    Never runs code and never allocates more than the file's size and a few MB; an open file is read as a whole first,
    which takes its size once more.

    Raises:
        ModelFileError: the path and the reason.
        TypeError: it is nothing of these.
        FileNotFoundError, IsADirectoryError, PermissionError: it cannot be opened.
    """
    name = model_name(path)
    try:
        with _opened(path) as (file, size):
            return _read(name, file, size)
    except RecursionError as error:  # of showing a value in a message
        raise ModelFileError(name, f"its header is nested too deeply; {_HINT}") from error


def model_name(path: str | os.PathLike[str] | bytes | IO[bytes]) -> str:
    """What messages call a model: its path, or what it was read from."""
    if isinstance(path, str | os.PathLike):
        return os.fspath(path)
    name = getattr(path, "name", "bytes" if isinstance(path, bytes | bytearray | memoryview) else None)
    return name if isinstance(name, str) else "file object"


def _read(path: str, file: IO[bytes], size: int) -> ModelFile:
    header, size = _read_header(path, file, size)
    texts = header.pop("__metadata__", {})
    text, metadata = _parse_metadata(path, texts)
    version = _check_version(path, metadata)
    arrays = _read_arrays(path, file, header, size)
    method, optional = "patchcore", []
    # A version that damage turned into an older one must not switch the check off.
    if version >= (2, 0) or "sha256" in metadata:
        if len(texts) > 1:
            raise ModelFileError(path, f"its header must have no other metadata than {_KEY!r}; save the model again")
        _check_digest(path, metadata.get("sha256"), text, arrays)
        method = _check_method(path, metadata)
        optional = _check_optional(path, metadata, arrays)
    model = ModelFile(
        method,
        {name: array for name, array in arrays.items() if name not in optional},
        {name: value for name, value in metadata.items() if name not in _OWN_NAMES},
        {name: arrays[name] for name in optional},
        version,
    )
    try:
        check_arrays(model.method, model.arrays, model.optional)
    except ValueError as error:
        raise ModelFileError(path, str(error)) from error
    return model


# --- writing ------------------------------------------------------------------------------------------------


def _little_endian(array: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(array, array.dtype.newbyteorder("<"), order="C")


def _place(item: tuple[str, NDArray[Any]]) -> tuple[int, str]:
    """By which arrays are sorted in a file."""
    name, array = item
    return _ORDER.index(dtype_name(array) or ""), name


def _header(arrays: Mapping[str, NDArray[Any]], text: str) -> bytes:
    """What stands in front of the arrays, which follow in this order; `text` is the metadata."""
    header: dict[str, Any] = {"__metadata__": {_KEY: text}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        header[name] = {"dtype": dtype_name(array), "shape": array.shape, "data_offsets": (start, end)}
    written = json.dumps(header, separators=(",", ":")).encode("ascii")
    written += b" " * (-len(written) % 8)
    return len(written).to_bytes(8, "little") + written


def _bytes(array: NDArray[Any]) -> memoryview:
    """The memory of a C-contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _compact(entries: Mapping[str, Any]) -> str:
    return json.dumps(entries, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(text: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    state = hashlib.sha256(text.encode("ascii"))
    for name, array in sorted(arrays.items()):
        state.update(f"\n{name} {dtype_name(array)} [{','.join(map(str, array.shape))}]\n".encode("ascii"))
        state.update(_bytes(array))
    return state.hexdigest()


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write a file at that takes the place of `target` where the block ends well, and is gone where it fails.

    Raises:
        OSError: what the block raises without the name of a file, as a full disk does, with that of `target`.
    """
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.filename is not None and os.fspath(error.filename) != str(temporary):
            raise
        # Encoders report a failed write without a number of the system.
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(target)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_file(target: Path, *parts: bytes | memoryview) -> None:
    """Write the `parts` in turn to `target`, synced, whole or not at all; on failure what was there is untouched."""
    with whole_file(target) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    if os.name == "posix":  # elsewhere a folder cannot be opened for syncing
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# --- reading: the container ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Any) -> Iterator[tuple[IO[bytes], int]]:
    """A model from its first byte on, and its size in bytes."""
    if isinstance(path, str | os.PathLike):
        _check_kind(path)
        # Opened once: a file that is saved anew meanwhile is not read half and half. Read and not mapped into memory:
        # a mapped file that shrinks kills the process.
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
        return
    if callable(getattr(path, "read", None)):
        path = path.read()
    if not isinstance(path, bytes | bytearray | memoryview):
        raise TypeError(
            f"path must be a path, the bytes of a model or a file object in binary mode; got {type(path).__name__}"
        )
    yield io.BytesIO(path), memoryview(path).nbytes


def _check_kind(path: str | os.PathLike[str]) -> None:
    """Refuse what is no file before it is opened: a pipe would wait for its writer."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a model is one file, this is a folder", os.fspath(path))
    if not stat.S_ISREG(mode):
        raise ModelFileError(path, f"not a regular file but a device or pipe; {_HINT}")


def _read_header(path: str, file: IO[bytes], size: int) -> tuple[dict[str, Any], int]:
    """The header's object and the number of bytes that follow it; what is no safetensors file is refused."""
    prefix = file.read(9)
    if not prefix:
        raise ModelFileError(path, f"the file is empty; {_HINT}")
    length = int.from_bytes(prefix[:8], "little")
    # A safetensors file opens with its header's length, 8 bytes, and the header's "{".
    if len(prefix) < 9 or prefix[8:] != b"{":
        kind = next((kind for magic, kind in _FOREIGN if prefix.startswith(magic)), None)
        if kind is None:
            raise ModelFileError(path, f"not a safetensors file; {_HINT}")
        raise ModelFileError(path, f"this is {kind}, which is never loaded here; {_HINT}")
    if length > size - 8:
        raise ModelFileError(path, f"the header claims {length} bytes, the file has {size}; it is truncated or damaged")
    if length > _HEADER_LIMIT:
        raise ModelFileError(path, f"the header claims {length} bytes, a model's has at most {_HEADER_LIMIT}; {_HINT}")
    try:
        header = _parse((prefix[8:] + file.read(length - 1)).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _not_whole(path, error) from error
    return header, size - 8 - length  # an object, as it begins with "{"


def _read_arrays(path: str, file: IO[bytes], header: Mapping[str, Any], size: int) -> dict[str, NDArray[Any]]:
    """The arrays that the header describes, out of the `size` bytes that come next."""
    try:
        spans = sorted((*_span(name, entry, size), name) for name, entry in header.items())
        end = 0
        for start, stop, name in spans:
            if start != end:
                raise ValueError(f"{name!a:.80} does not begin where the array before it ends")
            end = stop
        if end != size:
            raise ValueError(f"its arrays have {end} bytes, {size} follow the header")
    except ValueError as error:
        raise _not_whole(path, error) from error
    arrays: dict[str, NDArray[Any]] = {}
    for start, stop, name in spans:
        array = np.empty(header[name]["shape"], DTYPES[header[name]["dtype"]])
        if file.readinto(_bytes(array)) != stop - start:  # type: ignore[attr-defined]
            raise _not_whole(path, "it ends early")
        arrays[name] = array
    return arrays


def _span(name: str, entry: Any, size: int) -> tuple[int, int]:
    """Where an array's bytes begin and end; ValueError unless that fits its type and shape, and the `size` bytes."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!a:.80} must be described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name!a:.80} must be of {', '.join(DTYPES)}; got {dtype!a:.80}")
    for numbers, most in ((shape, AXES), (offsets, 2)):
        if not isinstance(numbers, list) or len(numbers) > most or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"{name!a:.80} must have a list of at most {most} integers >= 0; got {numbers!a:.80}")
    length = math.prod(shape) * DTYPES[dtype].itemsize
    if len(offsets) != 2 or offsets[1] > size or offsets[1] - offsets[0] != length:
        raise ValueError(f"{name!a:.80} of the shape {shape!a:.80} cannot have the offsets {offsets!a:.80}")
    if math.prod(n or 1 for n in shape) > sys.maxsize // 8:  # beside a 0; numpy does not build it
        raise ValueError(f"{name!a:.80} must have a smaller shape; got {shape!a:.80}")
    return offsets[0], offsets[1]


def _not_whole(path: str | os.PathLike[str], error: object) -> ModelFileError:
    return ModelFileError(path, f"not a whole safetensors file ({error}); copy or save it again")


def _parse(text: str) -> Any:
    """The JSON value; ValueError for what json reads but JSON has not, and for a key that stands twice."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Of two equal keys one reader takes the first, another the last: they would read two models.
    entries = dict(pairs)
    if len(entries) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!a:.80} stands twice")
    return entries


# --- reading: the metadata ----------------------------------------------------------------------------------


def _parse_metadata(path: str | os.PathLike[str], texts: Any) -> tuple[str, dict[str, Any]]:
    """The text of our entry and the object it holds."""
    text = texts.get(_KEY) if isinstance(texts, dict) else None
    if not isinstance(text, str):
        raise ModelFileError(path, f"a safetensors file, but it has no {_KEY!r} metadata; {_HINT}")
    try:
        metadata = _parse(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"its metadata is no valid JSON ({error}); save the model again") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ModelFileError(path, f"its metadata does not name the format {FORMAT!r}; {_HINT}")
    return text, metadata


def _check_version(path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> tuple[int, int]:
    version: Any = metadata.get("version")
    integers = isinstance(version, list) and [type(number) for number in version] == [int, int]
    if not integers or version[0] < 1 or version[1] < 0:
        raise ModelFileError(path, f"its version must be [major, minor] from [1, 0] on; got {version!r:.80}")
    if version[0] > VERSION[0]:
        raise ModelFileError(
            path,
            f"its format version is {version[0]}.{version[1]}, this patchcore-rs reads up to "
            f"{VERSION[0]}.{VERSION[1]}; {_later_reader(metadata)}",
        )
    return version[0], version[1]


def _check_digest(path: str | os.PathLike[str], digest: object, text: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ModelFileError(path, f"its sha256 must be 64 hexadecimal digits; got {digest!a:.80}. Copy the file again")
    member = f'"sha256":"{digest}",'
    ascii_only = text.isascii() and all(map(str.isascii, arrays))
    if not ascii_only or text.count(member) != 1 or _digest(text.replace(member, ""), arrays) != digest:
        raise ModelFileError(path, "the file is damaged, its sha256 is not that of its contents; copy it again")


def _check_method(path: str | os.PathLike[str], metadata: Mapping[str, Any]) -> str:
    method = metadata.get("method")
    if not isinstance(method, str) or method not in METHOD_ARRAYS:
        known = ", ".join(METHOD_ARRAYS)
        raise ModelFileError(
            path, f"its method is {method!a:.80}, this patchcore-rs knows {known}; {_later_reader(metadata)}"
        )
    return method


def _check_optional(
    path: str | os.PathLike[str], metadata: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
) -> list[str]:
    names = metadata.get("optional")
    plain = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not isinstance(names, list) or not plain or names != sorted(set(names)):
        raise ModelFileError(path, f"optional must be a sorted list of names; got {names!a:.80}. Save the model again")
    missing = [name for name in names if name not in arrays]
    if missing:
        raise ModelFileError(path, f"optional names the array {missing[0]!a:.80}, which is not there; copy it again")
    return names


def _later_reader(metadata: Mapping[str, Any]) -> str:
    writer = metadata.get("writer", "unknown")
    return f"read it with the patchcore-rs that wrote it ({writer!s:.40}) or a later one"
