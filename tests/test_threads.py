"""One number of threads for readers, torch, FAISS and kernels; the program's own stays, and bits are the same."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from patchcore_rs import PatchCore, _limits, _native, aggregate, build_info, load_backbone
from patchcore_rs.features.extractor import FeatureExtractor
from patchcore_rs.images.read_ahead import iterate_images

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
SEEN: list[tuple[int, int]] = []  # torch's threads, and images, of each pass


@pytest.fixture(autouse=True)
def _a_program_with_five_threads_of_torch():
    SEEN.clear()
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


class Network(torch.nn.Module):
    """Notes how it is called; a test may look in while it is."""

    meanwhile = staticmethod(lambda: None)

    def __init__(self):
        super().__init__()
        self.maps = torch.nn.AvgPool2d(4)

    def forward(self, images):
        SEEN.append((torch.get_num_threads(), len(images)))
        self.meanwhile()
        return self.maps(images)


def detector(network=None, **arguments):
    named = {} if network is not None else {"layers": ["maps"]}
    geometry = {"resize": None, "crop": None, "coreset": 10, "coreset_method": "random", "device": "cpu"}
    return PatchCore(backbone=network or Network(), **named, **geometry, **arguments)


def in_a_new_thread():
    """Torch's threads in a thread that has not asked before."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize("threads", [1, 2, None])
def test_the_backbone_runs_on_one_thread_of_torch_whatever_the_programs_number(threads):
    detector(threads=threads).fit(IMAGES).predict(IMAGES)
    assert SEEN == [(1, 1)] * 12


def test_as_many_images_pass_the_backbone_at_once_as_there_are_threads(monkeypatch):
    for threads, usable in ((1, 8), (3, 8), (None, 2)):
        monkeypatch.setattr(_limits, "available_threads", lambda usable=usable: usable)
        count = threads or usable
        together = threading.Barrier(count)
        inside, most = set(), []

        def meet(together=together, inside=inside, most=most):
            inside.add(threading.get_ident())
            most.append(len(inside))
            together.wait(30)
            inside.discard(threading.get_ident())

        monkeypatch.setattr(Network, "meanwhile", staticmethod(meet))
        detector(threads=threads).fit(IMAGES)
        assert max(most) == count


def test_without_a_number_readers_and_faiss_take_what_the_kernels_take(monkeypatch):
    assert _native.available_threads() == build_info()["threads"]
    monkeypatch.setattr(_limits, "available_threads", lambda: 3)
    together = threading.Barrier(3)
    list(iterate_images(list(IMAGES), lambda image: together.wait(30)))
    faiss = pytest.importorskip("faiss")
    from patchcore_rs.detector import ivfpq

    for threads, expected in ((None, 3), (2, 2)):
        with ivfpq._faiss_threads(threads):
            assert faiss.omp_get_max_threads() == expected


def test_images_are_read_on_one_thread_of_torch():
    seen = [number for _, number in iterate_images(list(IMAGES), lambda image: torch.get_num_threads(), threads=2)]
    assert seen == [1] * len(IMAGES)


def test_a_program_keeps_its_number_during_a_call(monkeypatch):
    numbers = []
    model = detector(threads=2).fit(IMAGES)  # by threads that are kept
    monkeypatch.setattr(Network, "meanwhile", staticmethod(lambda: numbers.append(in_a_new_thread())))
    caller = []
    model.predict(IMAGES, progress=lambda *_: caller.append(torch.get_num_threads()))
    assert set(numbers) == set(caller) == {5}


def test_a_program_keeps_its_number_after_calls_at_once():
    model = detector().fit(IMAGES)
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            calls = [pool.submit(model.predict, IMAGES) for _ in range(2)]
            model.predict(IMAGES[:2])
            assert all(len(call.result().scores) == len(IMAGES) for call in calls)
    assert {number for number, _ in SEEN} == {1}
    assert torch.get_num_threads() == in_a_new_thread() == 5


def test_a_number_that_the_program_sets_between_two_calls_holds():
    model = detector(threads=3).fit(IMAGES)
    torch.set_num_threads(4)
    model.predict(IMAGES)
    assert {number for number, _ in SEEN} == {1}
    assert torch.get_num_threads() == in_a_new_thread() == 4


def test_a_callable_of_ones_own_gets_whole_batches_in_the_callers_thread():
    threads = []

    def maps(images):
        threads.append(threading.get_ident())
        return [Network()(images)]

    detector(maps, threads=2, batch_size=4).fit(IMAGES)
    assert set(threads) == {threading.get_ident()}
    assert SEEN == [(5, 4), (5, 2)]


def test_what_fails_in_a_thread_is_raised_and_the_threads_go_on(monkeypatch):
    model = detector(threads=2).fit(IMAGES)

    def fail():
        raise KeyError("a layer")

    with monkeypatch.context() as patch:
        patch.setattr(Network, "meanwhile", staticmethod(fail))
        with pytest.raises(KeyError, match="a layer"):
            model.predict(IMAGES)
    SEEN.clear()
    assert len(model.predict(IMAGES).scores) == len(IMAGES)
    assert len(SEEN) == len(IMAGES)


def test_threads_are_kept_from_call_to_call():
    model = detector(threads=2).fit(IMAGES)
    before = threading.active_count()
    for _ in range(5):
        model.predict(IMAGES)
    assert threading.active_count() <= before


def features(backbone, view="aggregated", **arguments):
    way = FeatureExtractor(
        backbone, resize=(96, 96), crop=None, embedding="concat", device="cpu", view=view, **arguments
    )
    batch = torch.stack([way.prepare(image) for image in IMAGES])
    return lambda size: np.concatenate([way.extract(part)[0] for part in batch.split(size)])


@pytest.mark.parametrize("name", ["efficientnet_lite0", "squeezenet1_1", "resnet18"])
@pytest.mark.parametrize("view", ["aggregated", "pooled"])
def test_features_have_the_same_bits_for_any_threads_and_batches(name, view):
    torch.manual_seed(0)
    backbone = load_backbone(name, weights="default" if name == "efficientnet_lite0" else None, device="cpu")
    digests = set()
    for of_torch, threads, size in ((1, 1, 6), (2, 1, 1), (2, 2, 6), (3, 4, 2), (4, None, 6)):
        torch.set_num_threads(of_torch)
        rows = features(backbone, view, threads=threads)(size)
        digests.add(hashlib.sha256(rows.tobytes()).hexdigest())
    assert len(digests) == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_maps_with_their_channels_first_are_moved_in_as_many_threads_as_the_call_has(dtype):
    maps = np.random.default_rng(0).normal(size=(4, 40, 64, 64)).astype(dtype)
    expected = aggregate([np.ascontiguousarray(maps.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)])[0]
    for threads in (1, 3):
        assert aggregate([maps], threads=threads)[0].tobytes() == expected.tobytes()
        assert aggregate([torch.from_numpy(maps)], threads=threads)[0].numpy().tobytes() == expected.tobytes()


def test_what_a_thread_of_the_pool_ends_waits_for_nothing():
    def end_in_a_reader():
        with _limits.workers(1) as team:
            team.submit(lambda: team.finish()).result(timeout=20)
            return team.broken

    assert end_in_a_reader()


def test_where_no_thread_can_be_had_the_call_fails_and_nothing_of_it_is_left(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    done = []
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            _limits.in_parallel(done.append, range(3), 7)
    assert _limits.in_parallel(lambda part: part, range(3), 7) == [0, 1, 2]
    assert done == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system holds no process to some of its CPUs")
def test_a_process_held_to_one_cpu_takes_one_thread():
    code = """
        import os
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from patchcore_rs import build_info
        print(build_info()["threads"])
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "1"
