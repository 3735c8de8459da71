"""The same answers on a GPU: there to the bit whatever the process has set for torch, and close to those of the CPU.

Bounds are shares of the largest score. Convolutions on a GPU take TF32 unless told otherwise, whose 10 bits of mantissa
are those of float16 too.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from detectors import Images, detector, flawed, network, normal, pyramid, same

from patchcore_rs import SPADE, Ensemble, MahalanobisAD, MemoryBank, PaDiM, PatchCore, load
from patchcore_rs.functional import aggregate
from patchcore_rs.model.file import read_model

CUDA = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")

FLOAT32, TF32, HALF = 1e-4, 0.01, 0.02
NAMED = {"backbone": "efficientnet_lite0", "resize": (64, 64)}
METHODS = [(PatchCore, {"coreset": None}), (PaDiM, {}), (MahalanobisAD, {}), (SPADE, {"neighbours": 5})]


def convolutional(**options):
    return detector(backbone=network(), layers=("1", "3"), **options)


def named(**options):
    return PatchCore(**NAMED | options)


def close(found, expected, bound):
    largest = bound * np.abs(expected.scores).max()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=largest)
    np.testing.assert_allclose(found.maps, expected.maps, rtol=0, atol=bound * np.abs(expected.maps).max())


def tf32(*, allowed):
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


@pytest.fixture(autouse=True)
def defaults():
    """Every test leaves torch's defaults as they were."""
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.set_default_device(None)
    torch.use_deterministic_algorithms(mode=False)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products


@pytest.fixture
def float32():
    tf32(allowed=False)


@pytest.fixture(scope="module")
def fitted():
    """A detector on the GPU with a threshold, and what it predicts."""
    model = convolutional(device=CUDA).fit(normal(8)).calibrate(normal(6, 4), false_alarm_rate=0.5)
    return model, model.predict(flawed(3))


# --- Devices -----------------------------------------------------------------------------------------------


def test_a_gpu_is_taken_where_there_is_one(fitted):
    for device in ("auto", CUDA, f"{CUDA}:0", torch.device(CUDA), torch.device(CUDA, 0)):
        model = convolutional(device=device).fit(normal(8)).calibrate(normal(6, 4), false_alarm_rate=0.5)
        extractor = model._fitted.extractor
        assert {weights.device.type for weights in extractor.backbone.module.parameters()} == {CUDA}
        same(model.predict(flawed(3)), fitted[1])


@pytest.mark.parametrize("build", [named, convolutional])
@pytest.mark.parametrize(("there", "here"), [(CUDA, "cpu"), ("cpu", CUDA)])
@pytest.mark.parametrize("bound", [FLOAT32, TF32])
def test_a_model_goes_from_one_device_to_another(build, there, here, bound, tmp_path):
    tf32(allowed=bound == TF32)
    model = build(device=there, coreset=0.5).fit(normal(6)).calibrate(normal(6, 4), false_alarm_rate=0.5)
    model.save(tmp_path / "m.safetensors")
    given = {} if build is named else {"backbone": network()}
    loaded = load(tmp_path / "m.safetensors", device=here, **given)
    assert loaded.threshold_ == model.threshold_
    close(loaded.predict(flawed(3)), model.predict(flawed(3)), bound)
    again = load(tmp_path / "m.safetensors", device=there, **given)
    same(again.predict(flawed(3)), model.predict(flawed(3)))


@pytest.mark.parametrize(("method", "options"), METHODS)
def test_every_method_answers_as_on_the_cpu(method, options, float32, tmp_path):
    def build(device):
        return method(backbone=network(), layers=("1", "3"), resize=None, crop=None, device=device, **options)

    there, here = build(CUDA).fit(normal(12)), build("cpu").fit(normal(12))
    close(there.predict(flawed(3)), here.predict(flawed(3)), 10 * FLOAT32)
    there.save(tmp_path / "m.safetensors")
    loaded = method.load(tmp_path / "m.safetensors", backbone=network(), device=CUDA)
    same(loaded.predict(flawed(3)), there.predict(flawed(3)))
    for model in (there, loaded):
        model.calibrate(normal(6, 4), false_alarm_rate=0.5)
    assert loaded.threshold_ == there.threshold_


def test_an_ensemble_may_have_its_members_on_several_devices(float32):
    on_both = Ensemble([detector(device="cpu"), convolutional(device=CUDA)]).fit(normal(8))
    on_one = Ensemble([detector(device="cpu"), convolutional(device="cpu")]).fit(normal(8))
    assert on_both.predict(flawed(3)).scores.min() > on_both.predict(normal(3, 5)).scores.max()
    assert on_one.predict(flawed(3)).scores.min() > on_one.predict(normal(3, 5)).scores.max()


def test_a_model_is_copied_and_pickled_on_its_device(fitted):
    model, expected = fitted
    for found in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        weights = found._fitted.extractor.backbone.module.parameters()
        assert {each.device.type for each in weights} == {CUDA}
        same(found.predict(flawed(3)), expected)


FORKED = """
    import os
    from detectors import detector, network, normal

    model = detector(backbone=network(), layers=("1", "3"), device="cuda").fit(normal(3))
    child = os.fork()
    if child == 0:
        try:
            model.predict(normal(1))
        except ValueError as error:
            print(error, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print(len(model.predict(normal(2))))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
def test_a_forked_process_is_told_to_start_otherwise():
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(FORKED)]
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr
    refusal, parent = done.stdout.splitlines()
    assert "cannot be used in a process that was forked after CUDA was used; start it by" in refusal
    assert parent == "2", "the parent goes on"


# --- What the process has set ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_autocast_of_the_process_ends_at_the_backbone(dtype, fitted):
    model, expected = fitted
    with torch.autocast(CUDA, dtype=dtype):
        same(model.predict(flawed(3)), expected)
        again = convolutional(device=CUDA).fit(normal(8)).calibrate(normal(6, 4), false_alarm_rate=0.5)
        product = torch.ones(2, 2, device=CUDA) @ torch.ones(2, 2, device=CUDA)
    assert again.threshold_ == model.threshold_
    np.testing.assert_array_equal(again.memory_bank_.features, model.memory_bank_.features)
    assert product.dtype == dtype, "the process has what it asked for"


@pytest.mark.parametrize("device", [CUDA, "cpu"])
def test_the_default_device_changes_nothing(device, tmp_path):
    expected = named(device=device).fit(normal(4)).predict(flawed(3))
    torch.set_default_device(CUDA)
    model = named(device=device, threads=1).fit(normal(4))
    same(model.predict(flawed(3)), expected)
    model.save(tmp_path / "m.safetensors")
    same(PatchCore.load(tmp_path / "m.safetensors", device=device).predict(flawed(3)), expected)
    for found in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(found.predict(flawed(3)), expected)
    assert torch.empty(1).device.type == CUDA


def test_deterministic_algorithms_and_a_search_for_fast_ones_are_taken(fitted, float32):
    model = convolutional(device=CUDA).fit(normal(8))
    expected = model.predict(flawed(3))
    torch.use_deterministic_algorithms(mode=True)
    close(model.predict(flawed(3)), expected, FLOAT32)
    for width in (None, 20):
        convolutional(device=CUDA, embedding=width or "concat").fit(normal(4)).predict(flawed(3))
    torch.use_deterministic_algorithms(mode=False)
    torch.backends.cudnn.benchmark = True
    close(model.predict(flawed(3)), expected, FLOAT32)


@pytest.mark.parametrize("fitted_in", [False, True])
def test_the_precision_of_the_fit_is_kept_and_another_is_warned_of(fitted_in, tmp_path):
    tf32(allowed=fitted_in)
    model = named(device=CUDA).fit(normal(6))
    expected = model.predict(flawed(3))
    model.save(tmp_path / "m.safetensors")
    kept = read_model(tmp_path / "m.safetensors").metadata["backbone"]["precision"]
    assert kept == {"device": CUDA} | ({"cudnn.conv": "tf32"} if fitted_in else {})
    loaded = PatchCore.load(tmp_path / "m.safetensors", device=CUDA)
    same(loaded.predict(flawed(3)), expected)
    tf32(allowed=not fitted_in)
    with pytest.warns(UserWarning, match="and the model was fitted in .*: scores can differ by a per cent"):
        found = loaded.predict(flawed(3))
    close(found, expected, TF32)
    assert not np.array_equal(found.scores, expected.scores), "what is recorded is what is calculated in"
    PatchCore.load(tmp_path / "m.safetensors", device="cpu").predict(flawed(3))  # whose arithmetic is another anyway


@pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="this torch has no fp32_precision of its backends"
)
def test_precision_by_its_newer_name_is_recorded_too():
    model = convolutional(device=CUDA).fit(normal(8))
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        for value, less in (("ieee", {}), ("tf32", {"cudnn.conv": "tf32"})):
            torch.backends.cudnn.conv.fp32_precision = value
            assert model._fitted.extractor.precision == {"device": CUDA} | less
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


# --- Half precision, batches, threads, images ---------------------------------------------------------------


def test_half_precision_is_close_and_an_autocast_around_changes_nothing(float32, tmp_path):
    model = named(device=CUDA, autocast=True, coreset=None).fit(normal(6))
    found, expected = (each.predict(flawed(3)) for each in (model, named(device=CUDA, coreset=None).fit(normal(6))))
    close(found, expected, HALF)
    assert not np.array_equal(found.scores, expected.scores), "it is another precision"
    for around in (torch.autocast(CUDA, dtype=torch.bfloat16), torch.autocast(CUDA, enabled=False)):
        with around:
            same(model.predict(flawed(3)), found)
    model.save(tmp_path / "m.safetensors")
    same(load(tmp_path / "m.safetensors", device=CUDA).predict(flawed(3)), found)
    close(load(tmp_path / "m.safetensors", device="cpu").predict(flawed(3)), found, HALF)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_batches_change_next_to_nothing(size, float32):
    one, several = named(device=CUDA, coreset=None, batch_size=size), named(device=CUDA, coreset=None)
    tests = np.concatenate([normal(4, 5), flawed(5)])
    close(one.fit(normal(6)).predict(tests), several.fit(normal(6)).predict(tests), FLOAT32)


def test_threads_share_a_detector(fitted):
    model, _ = fitted
    tests = [np.concatenate([normal(3, seed), flawed(2, seed)]) for seed in range(12)]
    expected = [model.predict(test) for test in tests]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(model.predict, tests), expected, strict=True):
            same(found, alone)


def test_images_may_lie_on_the_device(fitted):
    model, expected = fitted
    stacked = torch.from_numpy(flawed(3).transpose(0, 3, 1, 2).copy())
    for images in (stacked, stacked.to(CUDA), list(stacked.to(CUDA)), torch.utils.data.DataLoader(Images(flawed(3)))):
        same(model.predict(images), expected)
    floats = (stacked / 255).requires_grad_()
    same(model.predict(floats.to(CUDA)), model.predict(floats.detach()))
    same(model.predict(list(floats[:, :1].to(CUDA).half())), model.predict(list(floats[:, :1].detach().half())))


def test_features_on_the_device_are_refused_by_name():
    rows = torch.rand(30, 8, device=CUDA)
    with pytest.raises(TypeError, match=rf"features is a tensor on {CUDA}:0; pass features\.cpu\(\)"):
        MemoryBank(rows)
    with pytest.raises(TypeError, match=rf"is a tensor on {CUDA}:0; pass .*\.cpu\(\)"):
        aggregate([torch.rand(1, 3, 8, 8, device=CUDA)])


@pytest.mark.parametrize("options", [{}, {"embedding": 7}, {"patch_size": 5}])
def test_features_are_those_of_the_cpu(options, float32):
    found, expected = (detector(device=device, **options).extract(flawed(3)) for device in (CUDA, "cpu"))
    assert found.grid == expected.grid
    np.testing.assert_allclose(found.features, expected.features, rtol=FLOAT32, atol=FLOAT32)


def test_features_extracted_there_score_as_the_images_do(fitted):
    model, expected = fitted
    same(model.predict_features(model.extract(flawed(3))), expected)


# --- Times -------------------------------------------------------------------------------------------------


def test_a_stage_is_charged_what_it_keeps_the_device_busy_with():
    def slow(images):
        torch.cuda._sleep(600_000_000)  # cycles: keeps the device busy for 0.3 seconds, the caller not at all
        return pyramid(images)

    model = detector(backbone=slow, device=CUDA).fit(normal(4))
    before, began = dict(model.timings_), time.perf_counter()
    model.predict(normal(4, 5))
    total = time.perf_counter() - began
    spent = {stage: seconds - before[stage] for stage, seconds in model.timings_.items()}
    assert spent["backbone"] > 0.15
    assert spent["aggregation"] < 0.1
    assert spent["backbone"] + spent["aggregation"] + spent["scoring"] <= total
