"""The same answers in every process: what it has set for torch, numpy and its threads changes none, and stays set."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from detectors import detector, flawed, network, normal, same
from torch import nn

from patchcore_rs import MahalanobisAD, PaDiM, PatchCore
from patchcore_rs.backbones.host import float32_precision
from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.weights import hash_weights
from patchcore_rs.model.file import ModelFile, ModelFileError, read_model, write_model

NAME = "efficientnet_lite0"
ONEDNN = "ONEDNN_DEFAULT_FPMATH_MODE"
CPU = torch.device("cpu")
HALVES = [torch.bfloat16, torch.float16]


def convolutional(**options):
    return detector(backbone=network(), layers=("1", "3"), **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with a named backbone, and what it predicts."""
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    model = PatchCore(backbone=NAME, resize=(32, 32), coreset=20).fit(normal(3))
    model.save(path)
    return path, model.predict(flawed(2))


@pytest.fixture(autouse=True)
def defaults():
    """Every test leaves torch's defaults as they were."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


# --- Autocast ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES)
def test_the_autocast_of_the_process_ends_at_the_backbone(dtype):
    model = convolutional().fit(normal(8)).calibrate(normal(6, 4), false_alarm_rate=0.5)
    expected, threshold, bank = model.predict(flawed(3)), model.threshold_, model.memory_bank_.features
    with torch.autocast("cpu", dtype=dtype):
        same(model.predict(flawed(3)), expected)
        again = convolutional().fit(normal(8)).calibrate(normal(6, 4), false_alarm_rate=0.5)
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert again.threshold_ == threshold
    np.testing.assert_array_equal(again.memory_bank_.features, bank)
    assert product.dtype == dtype, "the process has what it asked for"


# --- Precision ---------------------------------------------------------------------------------------------


def test_nothing_is_recorded_of_full_precision(monkeypatch):
    for value in ("", "STRICT", "strict"):
        monkeypatch.setenv(ONEDNN, value)
        assert float32_precision(network(), CPU) == {"device": "cpu"}
    monkeypatch.setenv(ONEDNN, "BF16")
    assert float32_precision(network(), CPU) == {"device": "cpu", ONEDNN: "BF16"}
    monkeypatch.delenv(ONEDNN)
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")  # its older name, which oneDNN takes too
    assert float32_precision(network(), CPU) == {"device": "cpu", ONEDNN: "BF16"}


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "conv"), reason="this torch has no fp32_precision of its backends"
)
def test_what_torch_is_allowed_is_recorded_where_the_network_does_it():
    linear = nn.Sequential(network(), nn.Linear(3, 3))
    assert float32_precision(linear, CPU) == {"device": "cpu"}
    try:
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert float32_precision(network(), CPU) == {"device": "cpu", "mkldnn.conv": "bf16"}
        both = {"device": "cpu", "mkldnn.conv": "bf16", "mkldnn.matmul": "bf16"}
        assert float32_precision(linear, CPU) == float32_precision(lambda images: [images], CPU) == both
    finally:
        torch.backends.mkldnn.conv.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"
    assert float32_precision(linear, CPU) == {"device": "cpu"}


@pytest.mark.parametrize("method", [PatchCore, PaDiM, MahalanobisAD])
def test_a_model_says_where_it_is_used_in_another_precision_than_it_was_fitted_in(method, tmp_path, monkeypatch):
    path, options = tmp_path / "m.safetensors", {"backbone": network(), "layers": ("1", "3")}
    monkeypatch.setenv(ONEDNN, "BF16")
    model = method(resize=None, crop=None, **options).fit(normal(8))
    model.predict(flawed(1))
    model.save(path)
    assert read_model(path).metadata["backbone"]["precision"] == {"device": "cpu", ONEDNN: "BF16"}
    loaded = method.load(path, backbone=network())
    loaded.predict(flawed(1))
    monkeypatch.delenv(ONEDNN)
    words = f"lets torch compute in float32, and the model was fitted in {ONEDNN}=BF16: scores can differ"
    for call in (model.predict, loaded.predict, lambda images: loaded.calibrate(images, false_alarm_rate=0.5)):
        with pytest.warns(UserWarning, match=words):
            call(normal(3, 7))


def test_what_is_not_known_is_not_warned_of(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    convolutional().fit(normal(8)).save(path)
    stored = read_model(path)
    assert stored.metadata["backbone"]["precision"] == {"device": "cpu"}
    for precision in (None, {"device": "cuda", "cudnn.conv": "tf32"}):
        backbone = {**stored.metadata["backbone"], "precision": precision}
        write_model(path, _with(stored, backbone))
        PatchCore.load(path, backbone=network()).predict(flawed(1))
    for wrong in ([], "bf16", {"device": 1}):
        write_model(path, _with(stored, {**stored.metadata["backbone"], "precision": wrong}))
        with pytest.raises(ModelFileError, match="backbone precision must be an object of texts; got"):
            PatchCore.load(path, backbone=network())


def _with(stored, backbone):
    metadata = {**stored.metadata, "backbone": backbone}
    return ModelFile(stored.method, stored.arrays, metadata, stored.optional)


# --- torch's random stream ---------------------------------------------------------------------------------


def drawn_after(call):
    torch.manual_seed(5)
    call()
    return torch.rand(3).tolist()


def test_networks_with_weights_draw_nothing_from_the_stream(saved, tmp_path):
    undisturbed = drawn_after(lambda: None)
    weights = tmp_path / "weights.pt"
    torch.save(torchvision.models.squeezenet1_1().state_dict(), weights)
    for call in (
        lambda: load_backbone(NAME),
        lambda: load_backbone("squeezenet1_1", weights=weights),
        lambda: PatchCore.load(saved[0]),
        lambda: PatchCore(backbone=NAME, resize=(32, 32), coreset=20).fit(normal(3)),
    ):
        assert drawn_after(call) == undisturbed


def test_networks_without_weights_are_what_the_stream_says(saved):
    torch.manual_seed(5)
    expected = hash_weights(torchvision.models.squeezenet1_1())
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        torch.manual_seed(5)
        assert load_backbone("squeezenet1_1", weights=None).weights_hash == expected
    assert drawn_after(lambda: load_backbone(NAME, weights=None)) != drawn_after(lambda: None)


def test_a_stream_that_another_thread_draws_from_goes_on_as_it_was():
    torch.manual_seed(5)
    expected = [torch.rand(1).item() for _ in range(3000)]
    torch.manual_seed(5)
    loading = threading.Thread(target=lambda: [load_backbone(NAME) for _ in range(3)])
    loading.start()
    drawn = [torch.rand(1).item() for _ in range(3000)]
    loading.join()
    assert drawn == expected


# --- Defaults of dtype and device --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, *HALVES])
def test_the_default_dtype_changes_no_network(dtype, saved):
    path, expected = saved
    torch.set_default_dtype(dtype)
    same(PatchCore.load(path).predict(flawed(2)), expected)
    same(PatchCore(backbone=NAME, resize=(32, 32), coreset=20).fit(normal(3)).predict(flawed(2)), expected)
    assert torch.get_default_dtype() == dtype


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_changes_no_network(device, saved):
    path, expected = saved
    torch.set_default_device(device)
    same(PatchCore.load(path).predict(flawed(2)), expected)
    again = PatchCore(backbone=NAME, resize=(32, 32), coreset=20).fit(normal(3))
    assert torch.empty(1).device.type == device
    torch.set_default_device(None)
    with torch.device(device):
        same(again.predict(flawed(2)), expected)


def test_the_default_device_changes_no_copy():
    model = convolutional().fit(normal(4))
    expected, pickled = model.predict(flawed(2)), pickle.dumps(model)
    with torch.device("meta"):
        for found in (pickle.loads(pickled), copy.deepcopy(model)):
            same(found.predict(flawed(2)), expected)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_network_of_ones_own_in_half_precision_is_widened(dtype):
    half = network().to(dtype)
    expected = load_backbone(network().to(dtype).float(), layers=("1", "3"))
    found = load_backbone(half, layers=("1", "3"))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert found.weights_hash == expected.weights_hash
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found(images), expected(images), strict=True))
    assert half[0].weight.dtype == dtype, "the caller's own is left as it was"


def test_a_network_of_ones_own_in_float64_is_refused_by_name():
    words = (
        r"backbone 'Sequential' must have weights of float32 or less; got torch\.float64 in '0\.weight'\. Pass module"
    )
    for layers in (("1", "3"), None):
        with pytest.raises(ValueError, match=words):
            load_backbone(network().double(), layers=layers)
    torch.set_default_dtype(torch.float64)
    with pytest.raises(ValueError, match=words):
        convolutional().fit(normal(3))


# --- numpy -------------------------------------------------------------------------------------------------


def test_what_numpy_is_told_to_raise_changes_nothing():
    images = normal(6) / 255
    images[:, 0, 0] = 1e-300
    test = flawed(2) / 255
    with np.errstate(all="ignore"):
        expected = convolutional().fit(images).calibrate(normal(6, 4), false_alarm_rate=0.5).predict(test)
    with np.errstate(all="raise"):
        found = convolutional().fit(images).calibrate(normal(6, 4), false_alarm_rate=0.5).predict(test)
    same(found, expected)


# --- The end of the process --------------------------------------------------------------------------------

LATE = """
    import atexit, threading, time
    from detectors import detector, flawed, normal

    model = detector().fit(normal(4))
    expected = model.predict(flawed(3)).scores.tolist()

    def work(where):
        print(where, model.predict(flawed(3)).scores.tolist() == expected, flush=True)

    def later():
        threading.main_thread().join()
        time.sleep(0.3)
        work("thread")

    class Late:
        def __del__(self):
            work("del")

    late = [Late()]
    atexit.register(late.clear)
    atexit.register(work, "atexit")
    threading.Thread(target=later).start()
"""


def ended(code):
    """What a process says that runs this code, and ends by itself."""
    tests = str(Path(__file__).parent)
    path = os.pathsep.join(filter(None, (tests, os.environ.get("PYTHONPATH"))))
    command, env = [sys.executable, "-c", textwrap.dedent(code)], os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_images_are_read_after_the_end_of_the_main_thread():
    assert ended(LATE) == (["thread True", "atexit True", "del True"], "")


# A call in a daemon thread as the interpreter ends: one that works, and one that waits for an image.
DAEMONS = """
    import threading, time
    from detectors import detector, flawed, normal

    model, images = detector().fit(normal(4)), flawed(30)

    def work():
        while True:
            model.predict(images)

    def wait():
        yield from images[:2]
        threading.Event().wait()

    for _ in range(3):
        threading.Thread(target=work, daemon=True).start()
    threading.Thread(target=model.predict, args=[wait()], daemon=True).start()
    time.sleep(0.5)
    print("end", flush=True)
"""


def test_daemon_threads_end_with_the_process():
    assert ended(DAEMONS) == (["end"], "")


# Objects that live until the interpreter has ended, when little can be imported and torch cannot be used.
LAST = """
    import sys
    from detectors import detector, flawed, normal
    from patchcore_rs import MemoryBank, StreamingCoreset, greedy_coreset
    from patchcore_rs.images.read_ahead import iterate_images

    class Last:
        def __init__(self):
            self.model, self.images = detector().fit(normal(4)), flawed(3)
            self.features = self.model.extract(self.images)
            self.rows = self.features.features
            self.bank = MemoryBank(self.rows)
            self.expected, self.reading = self.numbers(), iterate_images(list(self.images))
            next(self.reading)
            self.circle = self

        def numbers(self):
            streamed = StreamingCoreset(5).add(self.rows).finish().indices
            distances, scores = self.bank.kneighbors(self.rows, 2)[0], self.model.predict_features(self.features).scores
            return [part.tolist() for part in (streamed, greedy_coreset(self.rows, 5), distances, scores)]

        def __del__(self):
            print(sys.is_finalizing(), self.numbers() == self.expected, flush=True)
            try:
                self.model.predict(self.images)
            except RuntimeError as error:
                print(error, flush=True)

    last = Last()
    del last
"""


def test_what_needs_no_torch_works_after_the_end_of_the_interpreter_and_the_rest_says_so():
    (done, refused), errors = ended(LAST)
    assert (done, errors) == ("True True", "")
    assert refused.startswith("what uses torch must be called before the interpreter ends; got a call after its end")
