"""The answers are the same bits whatever the CPU's instructions, the C library, and the mode of its floating point."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import textwrap

import pytest

# Every answer that exp, ln or cos takes part in. Digests, so that two processes can be compared.
FUNCTIONS = """
    import hashlib, json, math
    import numpy as np
    from patchcore_rs import _native

    def digest(*arrays):
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()

    random = np.random.default_rng(0)
    numbers = random.uniform(-20, 0, size=100_000)
    features = random.normal(size=(400_000, 3)).astype(np.float32)
    bank = _native.MemoryBank(features[:64], 2)
    distances, indices = bank.kneighbors(features, 1, 2)
    maps = [
        _native.anomaly_maps(distances[:1568].reshape(2, 28, 28), 224, 224, sigma, "bilinear", "symmetric", 2)
        for sigma in (0.7, 4.0, 13.3)
    ]
    wide = random.normal(size=(1500, 200)).astype(np.float32)
    projected = _native.project(wide, 128, "gaussian", 7, 2)
    picks, radii, _ = _native.greedy_coreset(projected, 150, None, 0, 2, None)
    print(json.dumps({
        "libm": digest(np.array([math.exp(x) for x in numbers]), np.array([math.cos(x) for x in numbers])),
        "image scores": digest(bank.image_scores(features, distances.ravel(), indices.ravel(), 1, 9)),
        "maps": digest(*maps),
        "projection": digest(projected),
        "coreset of the projection": digest(picks, radii),
    }))
"""


def python(body, **environment):
    """The JSON that a fresh interpreter prints while it runs `body`."""
    command, env = [sys.executable, "-c", textwrap.dedent(body)], os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env=env)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to do without instructions")
def test_answers_do_not_depend_on_the_c_librarys_mathematics():
    here = python(FUNCTIONS)
    # An older CPU, as far as glibc is concerned; numpy and the kernels do not ask glibc.
    there = python(FUNCTIONS, GLIBC_TUNABLES="glibc.cpu.hwcaps=-FMA,-AVX2,-FMA4")
    if here.pop("libm") == there.pop("libm"):
        pytest.skip("on this CPU glibc computes exp and cos in one way only")
    assert here == there


# Prints a JSON object of answers on denormal features; formatted with what is done before.
DENORMALS = """
    import hashlib, json
    import numpy as np
    import torch
    from patchcore_rs import MemoryBank, greedy_coreset

    def flushes():
        return bool((torch.tensor([1e-38]) * 0.1 == 0).item())

    def digest(*arrays):
        return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()

    {before}
    # Made of bits: arithmetic would flush them.
    bits = np.random.default_rng(0).integers(1, 1 << 23, size=(30_000, 16)).astype(np.uint32)
    features = bits.view(np.float32)
    modes = [flushes()]
    bank = MemoryBank(features[:2000], threads=3)
    distances, indices = bank.kneighbors(features[:3000], 1, threads=3)
    scores = bank.image_scores(features[:3000], distances.ravel(), indices.ravel(), patches=10, reweight=3)
    picks = greedy_coreset(features, 3000, threads=3, progress=lambda done, total: modes.append(flushes()))
    modes.append(flushes())
    print(json.dumps({{
        "modes": modes,
        "largest": float(scores.max()),
        "digests": {{
            "distances": digest(distances, indices),
            "image scores": digest(scores),
            "coreset": digest(picks),
        }},
    }}))
"""


def test_denormals_count_where_the_host_flushes_them_and_its_mode_stays():
    torch = pytest.importorskip("torch")
    supported = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    if not supported:
        pytest.skip("torch cannot flush denormals on this CPU")
    plain = python(DENORMALS.format(before=""))
    flushing = python(DENORMALS.format(before="torch.set_flush_denormal(True)"))
    assert plain["largest"] > 0
    assert flushing["digests"] == plain["digests"]
    # Before the calls, in the callbacks between, and afterwards.
    assert len(plain["modes"]) > 2
    assert not any(plain["modes"])
    assert len(flushing["modes"]) > 2
    assert all(flushing["modes"])
