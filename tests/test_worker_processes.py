"""A detector in other processes, as prefork servers and pools use it: fork, spawn, loky. Never a hang.

A forked child that hangs ends with status -14.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
import warnings
from functools import partial

import numpy as np
import pytest
import torch

from patchcore_rs import _limits, aggregate, load_backbone
from patchcore_rs.backbones import layers
from patchcore_rs.compat.patchcore_inspection import ApproximateGreedyCoresetSampler
from patchcore_rs.detector import estimator
from patchcore_rs.detector.patchcore import PatchCore

fork = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def four_threads(monkeypatch):
    monkeypatch.setattr(_limits, "_OPENMP_CAME_FIRST", False)  # as where the package is imported before a fork
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def network():
    """A network that is large enough for several threads of torch."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, padding=1))


def fitted(backbone=None, **settings):
    named = {"layers": ["2"]} if backbone is None else {}
    geometry = {"resize": None, "crop": None, "coreset": 1000, "coreset_method": "random", "device": "cpu"}
    return PatchCore(backbone=backbone or network(), **geometry, **named).set_params(**settings).fit(IMAGES)


def answer(model):
    result = model.predict(IMAGES)
    return result.scores.tobytes() + result.maps.tobytes()


def in_children(count, work):
    """How forked children end that work at once: with 0 where `work` gives True."""
    children = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking beside other threads, and whatever the work warns of
        for _ in range(count):
            child = os.fork()
            if child == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)
                code = 1
                try:
                    code = 0 if work() is True else 1
                except BaseException:  # noqa: BLE001 - os._exit would say nothing of it
                    traceback.print_exc()
                finally:
                    os._exit(code)
            children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


@fork
@pytest.mark.parametrize("index", ["exact", "ivfpq"])
def test_four_forked_children_predict_at_once_what_their_parent_did(index):
    if index == "ivfpq":
        pytest.importorskip("faiss")
    model = fitted(index=index)
    expected = answer(model)
    assert in_children(4, lambda: answer(model) == expected) == [0] * 4
    assert answer(model) == expected


@fork
def test_every_call_that_needs_torch_works_in_a_forked_child(tmp_path):
    path, net, maps = tmp_path / "model", network(), torch.ones(2, 32, 64, 64)
    wide, rows = torch.nn.Conv2d(3, 4000, 5), torch.rand(2000, 256)
    model = fitted()
    expected = answer(model)
    model.save(path)

    def work():
        features = model.extract(IMAGES)
        same = model.predict_features(features).scores.tobytes() == expected[:48]
        same &= answer(fitted().fit_features(features)) == expected
        same &= answer(PatchCore.load(path, backbone=load_backbone(net, layers=["2"]), device="cpu")) == expected
        load_backbone(wide, device="cpu")
        ApproximateGreedyCoresetSampler(0.01, "cpu").run(rows)
        model.calibrate(255 - IMAGES, false_alarm_rate=0.5).partial_fit(IMAGES).merge(model)
        return same and len(aggregate([maps])[0]) == 2 * 64 * 64

    assert in_children(1, work) == [0]


@fork
def test_a_forked_child_may_import_the_package_after_torch_was_used():
    net = network()
    load_backbone(torch.nn.Conv2d(3, 4000, 5), device="cpu")

    def work():
        importlib.reload(_limits)  # which keeps where it was imported
        return len(answer(fitted(lambda images: [net(images)]))) > 0

    assert in_children(1, work) == [0]


@fork
def test_a_forked_child_may_import_the_package_after_faiss_was_used():
    pytest.importorskip("faiss")
    script = """
        import os, signal, sys
        import faiss, numpy as np

        rows = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
        faiss.omp_set_num_threads(4)
        faiss.index_factory(16, "IVF16,PQ8x4").train(rows)
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            from patchcore_rs import MemoryBank
            from patchcore_rs.detector.ivfpq import IVFPQ
            IVFPQ(MemoryBank(rows), rows).kneighbors(rows)
            os._exit(0)
        print("torch" in sys.modules, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("False 0\n", "")


@fork
def test_only_what_the_fork_broke_is_done_in_one_thread():
    """A thread begun in the child has all of torch's threads, as has the parent; numbers of threads stay."""
    seen = []
    model = fitted(lambda images: seen.append(torch.get_num_threads()) or [images])
    assert seen == [4]

    def work():
        seen.clear()
        answer(model)
        other = threading.Thread(target=answer, args=[model])
        other.start()
        other.join()
        return seen == [1, 4] and torch.get_num_threads() == 4

    assert in_children(1, work) == [0]


@fork
def test_a_fork_while_other_threads_are_in_a_call_leaves_children_that_work():
    """One thread is in the backbone, and one holds the locks that calls take."""
    inside, go_on = threading.Barrier(3), threading.Event()
    parent, net = os.getpid(), network()

    def wait(images):
        if threading.current_thread().name == "busy" and os.getpid() == parent:
            inside.wait(30)
            go_on.wait(60)
        return [net(images)]

    def hold():
        with layers._tracing.held(), estimator._lock.held():
            inside.wait(30)
            go_on.wait(60)

    model = fitted(wait)
    expected = answer(model)
    others = [threading.Thread(target=answer, args=[model], name="busy"), threading.Thread(target=hold)]
    for other in others:
        other.start()
    try:
        inside.wait(30)

        def work():
            layers.trace_layers(network().eval(), ("2",))
            model.calibrate(255 - IMAGES, false_alarm_rate=0.5)
            return answer(model) == expected and answer(fitted(wait)) == expected

        assert in_children(2, work) == [0, 0]
    finally:
        go_on.set()
        for other in others:
            other.join()


def test_a_lock_is_one_for_all_threads_of_a_process():
    lock = _limits.ProcessLock()
    with lock.held():
        assert not lock.held().acquire(blocking=False)
    assert lock.held().acquire(blocking=False)


def test_cuda_that_a_fork_broke_is_refused_before_work(monkeypatch):
    model = fitted()
    model._fitted.extractor.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    # The parent only asked whether there is CUDA: there may be none.
    monkeypatch.setattr(torch.cuda, "_initialized", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_backbone(network(), layers=["2"], device="auto")

    def image():
        raise AssertionError("an image was read")
        yield

    monkeypatch.setattr(torch.cuda, "_initialized", True)
    refused = partial(pytest.raises, ValueError, match=r'forked after CUDA was used; start it by .*"spawn".*"cpu"')
    for device in ("auto", "cuda", torch.device("cuda", 0)):
        with refused():
            load_backbone(network(), layers=["2"], device=device)
    for call in (model.predict, model.calibrate, model.partial_fit):
        with refused():
            call(image())
    assert load_backbone(network(), layers=["2"], device="cpu")


def test_detectors_travel_to_worker_processes():
    model = fitted()
    expected = answer(model)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        spawned = pool.apply_async(answer, [model])
        try:
            from joblib.externals.loky import ProcessPoolExecutor
        except ImportError:
            pass
        else:
            with ProcessPoolExecutor(1) as executor:
                assert executor.submit(answer, model).result(timeout=120) == expected
        assert spawned.get(timeout=120) == expected
