"""The model file: what is written comes back, nothing hostile gets through, and saving is all or nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from model_files import (
    OPTIONAL,
    WHOLE,
    WHOLE_2,
    bank,
    entry,
    memory_of_reading,
    model,
    new_bytes,
    safetensors_bytes,
    with_value,
)

from patchcore_rs.model.file import FORMAT, VERSION, ModelFile, ModelFileError, read_model, write_model


def zip_bytes():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02.")
    return buffer.getvalue()


HOSTILE = {
    "empty": (b"", "the file is empty"),
    "eight bytes": (WHOLE[:8], "not a safetensors file"),
    "random bytes": (bytes(range(7, 107)), "not a safetensors file"),
    "torch.save archive": (
        zip_bytes(),
        r"zip archive, as torch.save writes \(.*\.ckpt\), which is never loaded",
    ),
    "pickle": (pickle.dumps({"bank": [1.0] * 20}), "a Python pickle, which is never loaded"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(100), "numpy .npy file"),
    "truncated data": (WHOLE[:-1], "not a whole safetensors file .*copy or save it again"),
    "truncated header": (WHOLE[:40], "the header claims .* bytes, the file has 40; it is truncated"),
    "data after the end": (WHOLE + b"x", "not a whole safetensors file"),
    "header of 2**63 bytes": (
        (2**63).to_bytes(8, "little") + b"{" + bytes(100),
        "the header claims 9223372036854775808",
    ),
    "header over the limit": ((2 << 20).to_bytes(8, "little") + b"{" + bytes(3 << 20), "a model's has at most 1048576"),
    "header no JSON": (safetensors_bytes(header=b"{" + b"x" * 50), "not a whole safetensors file"),
    "header not UTF-8": (safetensors_bytes(header=b'{"\xff\xfe"}'), "not a whole safetensors file"),
    "deep header": (safetensors_bytes(header=b'{"a":' * 90_000 + b"}" * 90_000), "not a whole safetensors file"),
    "claims 2**62 values": (safetensors_bytes(header=entry([2**31, 2**31], [0, 80])), "not a whole safetensors file"),
    "shape overflows": (safetensors_bytes(header=entry([2**40, 2**40], [0, 80])), "not a whole safetensors file"),
    "offsets out of range": (safetensors_bytes(header=entry([5, 4], [80, 160])), "not a whole safetensors file"),
    "offsets backwards": (safetensors_bytes(header=entry([5, 4], [80, 0])), "not a whole safetensors file"),
    "no metadata": (safetensors_bytes(header=b"{}", arrays={}), "it has no 'patchcore-rs' metadata"),
    "metadata no JSON": (safetensors_bytes(text="{"), "its metadata is no valid JSON"),
    "metadata with NaN": (
        safetensors_bytes(text=f'{{"format": "{FORMAT}", "x": NaN}}'),
        "its metadata is no valid JSON .NaN is not allowed",
    ),
    "deep metadata": (safetensors_bytes(text="[" * 200_000 + "]" * 200_000), "its metadata is no valid JSON"),
    "metadata a list": (safetensors_bytes(text="[]"), "does not name the format"),
    "another format": (safetensors_bytes(text='{"format": "x", "version": [1, 0]}'), "does not name the format"),
    "no version": (safetensors_bytes(text=json.dumps({"format": FORMAT})), r"its version must be \[major, minor\]"),
    "version of floats": (
        safetensors_bytes(text=json.dumps({"format": FORMAT, "version": [1.0, True]})),
        r"its version must be \[major, minor\]",
    ),
    "newer major version": (
        safetensors_bytes(text=json.dumps({"format": FORMAT, "version": [3, 3], "writer": "9.9.9"})),
        r"format version is 3.3, this patchcore-rs reads up to 2.0; .*\(9.9.9\)",
    ),
}
HOSTILE_ARRAYS = {
    "bank float64": ({"bank": bank().astype(np.float64)}, r"bank must be float32 \(F32\); got F64"),
    "bank 1-D": (
        {"bank": np.zeros(4, np.float32)},
        r"bank must have the shape \(rows, dim",
    ),
    "bank without rows": ({"bank": np.zeros((0, 4), np.float32)}, "neither 0; got"),
    "bank without width": ({"bank": np.zeros((4, 0), np.float32)}, "neither 0; got"),
    "no bank": ({"mean": np.zeros(4, np.float32)}, "it must hold the array bank, .* got mean"),
    "no arrays": ({}, "it must hold the array bank, .* got none"),
    "array too many": (
        {"bank": bank(), "extra": bank()},
        "it must hold the array bank, .* got bank, extra",
    ),
    "mean without deviation": (
        {"bank": bank(), "mean": np.zeros(4, np.float32)},
        "it must hold the array bank, .* got bank, mean",
    ),
    "mean of another width": (
        {"bank": bank(), "mean": np.zeros(3, np.float32), "deviation": np.ones(4, np.float32)},
        r"mean must have the shape \(4,\) of a bank row; got \(3,\)",
    ),
    "NaN in the bank": (
        {"bank": with_value(np.nan)},
        r"bank\[3, 2\] is nan: every value must be",
    ),
    "Inf in the bank": ({"bank": with_value(-np.inf)}, r"bank\[3, 2\] is -inf"),
    "NaN in the mean": (
        {"bank": bank(), "mean": with_value(np.nan)[3], "deviation": np.ones(4, np.float32)},
        r"mean\[2\] is nan",
    ),
    "deviation of 0": (
        {"bank": bank(), "mean": np.zeros(4, np.float32), "deviation": np.zeros(4, np.float32)},
        "deviation must be > 0, its smallest value is 0",
    ),
    "a value above the kernels' limit": (
        {"bank": with_value(2e16)},
        r"bank\[3, 2\] is 2e\+16: no magnitude may be above",
    ),
}
HOSTILE |= {f"{case}, format 1": (safetensors_bytes(held), reason) for case, (held, reason) in HOSTILE_ARRAYS.items()}
HOSTILE |= {f"{case}, format 2": (new_bytes(held), reason) for case, (held, reason) in HOSTILE_ARRAYS.items()}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_path_and_reason(case, tmp_path):
    contents, reason = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(contents)
    with pytest.raises(ModelFileError, match=reason) as caught:
        read_model(path)
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"


def test_the_table_starts_from_a_file_that_loads(tmp_path):
    path = tmp_path / "whole.safetensors"
    path.write_bytes(WHOLE)
    assert read_model(path).arrays["bank"].shape == (5, 4)
    path.write_bytes(WHOLE_2)
    read = read_model(path)
    assert read.arrays.keys() == {"bank"}
    assert read.optional.keys() == OPTIONAL.keys()
    assert (read.method, read.version, read.metadata) == ("patchcore", (2, 0), {"writer": "9.9.9"})


@pytest.mark.parametrize("position", range(0, len(WHOLE), 7))
def test_every_truncation_and_many_damages_are_refused_or_harmless(position, tmp_path):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(WHOLE[:position])
    with pytest.raises(ModelFileError):
        read_model(path)
    path.write_bytes(WHOLE[:position] + bytes([WHOLE[position] ^ 0xFF]) + WHOLE[position + 1 :])
    try:
        damaged = read_model(path)
    except ModelFileError:
        return
    assert np.isfinite(damaged.arrays["bank"]).all()


def test_a_huge_claim_allocates_nothing(tmp_path):
    path = tmp_path / "claim.safetensors"
    with path.open("wb") as file:
        header = entry([2**20, 2**10], [0, 2**32])
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2**32 - 4)
    assert memory_of_reading(path) < 1 << 20


def test_what_is_written_comes_back(tmp_path):
    path = tmp_path / "model.safetensors"
    written = model(name="ä", value=0.1)
    write_model(path, written)
    read = read_model(path)
    for name in ("bank", "mean", "deviation"):
        np.testing.assert_array_equal(read.arrays[name], written.arrays[name])
    assert read.metadata == {"name": "ä", "value": 0.1}
    assert (read.method, read.version, dict(read.optional)) == ("patchcore", VERSION, {})
    write_model(path, ModelFile("patchcore", {"bank": bank()}, {}))
    assert read_model(path).arrays.keys() == {"bank"}


def test_the_same_model_gives_the_same_bytes(tmp_path):
    write_model(tmp_path / "a", model(b=1, a=2))
    write_model(tmp_path / "b", model(a=2, b=1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_layouts_and_byte_orders_are_stored_alike(tmp_path):
    write_model(tmp_path / "plain", ModelFile("patchcore", {"bank": bank()}, {}))
    fortran = np.asfortranarray(bank()).astype(">f4")
    write_model(tmp_path / "fortran", ModelFile("patchcore", {"bank": fortran}, {}))
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "fortran").read_bytes()


def test_later_minor_versions_are_read(tmp_path):
    path = tmp_path / "later.safetensors"
    path.write_bytes(safetensors_bytes(text=json.dumps({"format": FORMAT, "version": [1, 99], "new": 1})))
    assert read_model(path).metadata["new"] == 1


def test_paths_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_model(tmp_path / "missing.safetensors")
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        read_model(tmp_path)
    with pytest.raises(ModelFileError, match="not a regular file but a device or pipe"):
        read_model("/dev/null")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_model(fifo)


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(IsADirectoryError, match="this is a folder"):
        write_model(tmp_path, model())
    with pytest.raises(FileNotFoundError, match="the folder to save in does not exist"):
        write_model(tmp_path / "no" / "model.safetensors", model())
    with pytest.raises(ValueError, match="a device or pipe"):
        write_model("/dev/null", model())
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_failed_save_keeps_the_old_file_and_leaves_nothing(function, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    write_model(path, model(generation=1))
    before = path.read_bytes()

    def fail(*args):
        raise OSError("disk on fire")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="disk on fire"):
        write_model(path, model(generation=2))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_keeps_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_model(path, model(generation=1))
    before = path.read_bytes()
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from patchcore_rs.model.file import ModelFile, write_model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n    write_model(sys.argv[1], ModelFile('patchcore', {'bank': np.zeros((999, 9), 'f4')}, {}))\n"
        "except OSError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True, timeout=60)
    assert "too large" in result.stdout
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_kill_while_saving_leaves_a_whole_file(tmp_path):
    path = tmp_path / "model.safetensors"
    code = (
        "import sys, numpy as np\n"
        "from patchcore_rs.model.file import ModelFile, write_model\n"
        "for i in range(10**6):\n"
        "    bank = np.full((2000, 64), i, np.float32)\n"
        "    write_model(sys.argv[1], ModelFile('patchcore', {'bank': bank}, {'i': i}))\n"
        "    print(i, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            process.stdout.readline()
        process.kill()
    read = read_model(path)
    assert (read.arrays["bank"] == read.metadata["i"]).all()


def test_a_link_is_followed_and_a_reader_keeps_the_old_file(tmp_path):
    target, link = tmp_path / "target.safetensors", tmp_path / "link.safetensors"
    write_model(target, model(generation=1))
    link.symlink_to(target)
    with target.open("rb") as reader:
        before = target.read_bytes()
        write_model(link, model(generation=2))
        assert reader.read() == before
    assert link.is_symlink()
    assert read_model(target).metadata["generation"] == 2


def test_the_file_has_the_permissions_of_any_new_file(tmp_path):
    write_model(tmp_path / "model.safetensors", model())
    (tmp_path / "other").touch()
    assert os.stat(tmp_path / "model.safetensors").st_mode == os.stat(tmp_path / "other").st_mode


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ModelFileError("model.safetensors", "the file is empty")))
    assert (error.path, error.reason) == ("model.safetensors", "the file is empty")
    assert isinstance(error, ValueError)


def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_model(tmp_path / "model.safetensors", model(threshold=float("nan")))
    assert os.listdir(tmp_path) == []
