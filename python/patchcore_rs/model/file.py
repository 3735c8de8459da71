"""The model file: one safetensors file that holds arrays and text, never code.

    bank        (N, d) float32   the memory bank
    mean        (d,)   float32   only where the model standardises: the training patches' mean of each channel
    deviation   (d,)   float32   with `mean`: their deviation, > 0
    __metadata__["patchcore-rs"]   one JSON object: "format", "version" and what the detector needs to rebuild itself

Only primary data is stored; whatever follows from it is computed again on loading. The same model gives the same
bytes: JSON keys are sorted, and there is one metadata entry because safetensors keeps several in no fixed order.

A file comes from a stranger until it is proved harmless: its size, prefix and header are checked before anything is
allocated, safetensors checks every offset, and then shapes, types, finiteness and relations are checked here.

Versions are (major, minor). A minor version adds what older readers may ignore; a newer major version is refused.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

FORMAT = "patchcore-rs model"
VERSION = (1, 1)  # 1.1 adds "training"

_KEY = "patchcore-rs"
_HEADER_LIMIT = 1 << 20  # a model's header is some 2 kB; parsing one must not cost more than a few MB
_HINT = "a model is what PatchCore.save writes"
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

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        """Both are kept as arguments, so that the error can be pickled."""
        super().__init__(os.fspath(path), reason)
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        """The path, then the reason."""
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds: `bank` (N, d) float32, `mean` and `deviation` (d,) float32 or None, `metadata` JSON."""

    bank: NDArray[np.float32]
    mean: NDArray[np.float32] | None
    deviation: NDArray[np.float32] | None
    metadata: dict[str, Any]


def write_model(path: str | os.PathLike[str], model: ModelFile) -> None:
    """Write `model` to `path`, whole or not at all.

    The bytes go to a temporary file in the same folder, are synced, and take the place of `path` in one rename; on
    any failure a file that was there before is untouched and the temporary file is gone.

    Raises `IsADirectoryError` for a folder, `FileNotFoundError` where the folder of `path` is missing, `ValueError`
    for a path that is no regular file (a device, say) and for metadata that JSON cannot hold, and the `OSError` of a
    write that fails.
    """
    from safetensors.numpy import save

    text = json.dumps({**model.metadata, "format": FORMAT, "version": list(VERSION)}, sort_keys=True, allow_nan=False)
    arrays = {"bank": model.bank, "mean": model.mean, "deviation": model.deviation}
    contents = save(
        {name: np.ascontiguousarray(array, "<f4") for name, array in arrays.items() if array is not None},
        metadata={_KEY: text},
    )
    # Through a symbolic link the file it names is replaced, not the link.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, "a model is saved to a file, this is a folder", os.fspath(path))
    if target.exists() and not target.is_file():
        raise ValueError(f"path must be a file or not exist yet; got {os.fspath(path)}, which is a device or pipe")
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to save in does not exist", os.fspath(path))
    _replace(target, contents)


def read_model(path: str | os.PathLike[str]) -> ModelFile:
    """Read and check a model file.

    Never runs code and never allocates more than the file's size and a few MB. Raises `ModelFileError` naming the
    path and the reason; `FileNotFoundError`, `IsADirectoryError` or `PermissionError` where it cannot be opened.
    """
    from safetensors import SafetensorError, safe_open

    _check_prefix(path)
    try:
        # pread and not mmap: a file that shrinks while it is mapped kills the process.
        with safe_open(os.fspath(path), framework="np", backend="pread") as file:
            metadata = _metadata(path, file.metadata())
            _check_arrays(path, {name: _shape(path, file, name) for name in file.keys()})  # noqa: SIM118
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ModelFileError(path, f"not a whole safetensors file ({error}); copy or save it again") from error
    for name, array in arrays.items():
        _check_finite(path, name, array)
    deviation = arrays.get("deviation")
    if deviation is not None and not (deviation > 0).all():
        raise ModelFileError(path, f"deviation must be > 0, its smallest value is {deviation.min()}")
    return ModelFile(arrays["bank"], arrays.get("mean"), deviation, metadata)


def _replace(target: Path, contents: bytes) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened for syncing
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _check_prefix(path: str | os.PathLike[str]) -> None:
    """Refuse what is no safetensors file from its size and first bytes, before anything is allocated."""
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "a model is one file, this is a folder", os.fspath(path))
    if not stat.S_ISREG(mode):
        raise ModelFileError(path, f"not a regular file but a device or pipe; {_HINT}")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(9)
    if not prefix:
        raise ModelFileError(path, f"the file is empty; {_HINT}")
    header = int.from_bytes(prefix[:8], "little")
    # A safetensors file opens with its header's length, 8 bytes, and the header's "{".
    if len(prefix) < 9 or prefix[8:] != b"{":
        kind = next((kind for magic, kind in _FOREIGN if prefix.startswith(magic)), None)
        if kind is None:
            raise ModelFileError(path, f"not a safetensors file; {_HINT}")
        raise ModelFileError(path, f"this is {kind}, which is never loaded here; {_HINT}")
    if header > size - 8:
        raise ModelFileError(path, f"the header claims {header} bytes, the file has {size}; it is truncated or damaged")
    if header > _HEADER_LIMIT:
        raise ModelFileError(path, f"the header claims {header} bytes, a model's has at most {_HEADER_LIMIT}; {_HINT}")


def _metadata(path: str | os.PathLike[str], stored: Mapping[str, str] | None) -> dict[str, Any]:
    text = (stored or {}).get(_KEY)
    if text is None:
        raise ModelFileError(path, f"a safetensors file, but it has no {_KEY!r} metadata; {_HINT}")
    try:
        metadata = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"its metadata is no valid JSON ({error}); save the model again") from error
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise ModelFileError(path, f"its metadata does not name the format {FORMAT!r}; {_HINT}")
    version: Any = metadata.get("version")
    integers = isinstance(version, list) and [type(number) for number in version] == [int, int]
    if not integers or version[0] < 1 or version[1] < 0:
        raise ModelFileError(path, f"its version must be [major, minor] from [1, 0] on; got {version!r:.80}")
    if version[0] > VERSION[0]:
        known, writer = f"{VERSION[0]}.{VERSION[1]}", metadata.get("writer", "unknown")
        raise ModelFileError(
            path,
            f"its format version is {version[0]}.{version[1]}, this patchcore-rs reads up to {known}; "
            f"read it with the patchcore-rs that wrote it ({writer!s:.40}) or a later one",
        )
    return metadata


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not allowed")


def _shape(path: str | os.PathLike[str], file: Any, name: str) -> tuple[int, ...]:
    array = file.get_slice(name)
    if array.get_dtype() != "F32":
        raise ModelFileError(path, f"{name:.40} must be float32 (F32); got {array.get_dtype()}")
    return tuple(array.get_shape())


def _check_arrays(path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]]) -> None:
    names = set(shapes)
    if names not in ({"bank"}, {"bank", "mean", "deviation"}):
        held = ", ".join(sorted(names))[:200] or "none"
        raise ModelFileError(path, f"it must hold the array bank, or bank, mean and deviation; got {held}")
    bank = shapes["bank"]
    if len(bank) != 2 or 0 in bank:
        raise ModelFileError(path, f"bank must have the shape (rows, dimensions), neither 0; got {bank}")
    for name in ("mean", "deviation"):
        if shapes.get(name, bank[1:]) != bank[1:]:
            raise ModelFileError(path, f"{name} must have the shape {bank[1:]} of a bank row; got {shapes[name]}")


def _check_finite(path: str | os.PathLike[str], name: str, array: NDArray[np.float32]) -> None:
    # The sum of finite float32 values stays finite in float64, and needs no array of the file's size.
    if not np.isfinite(array.sum(dtype=np.float64)):
        rows = array.reshape(-1, array.shape[-1])
        row = next(i for i in range(len(rows)) if not np.isfinite(rows[i]).all())
        column = int(np.argmin(np.isfinite(rows[row])))
        at = [row, column] if array.ndim == 2 else [column]
        raise ModelFileError(path, f"{name}{at} is {rows[row, column]}: every value must be finite")
