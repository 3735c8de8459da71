"""A detector in other processes, as prefork servers and pools use it: fork, spawn, loky. Never a hang.

Each test runs in a fresh interpreter with a hard timeout; a forked child that hangs ends with status -14.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

fork = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")

# Images, and detectors whose networks are large enough for several threads of torch.
PRELUDE = '''
import os, signal, sys, threading, warnings
import numpy as np

warnings.simplefilter("ignore")  # of forking beside other threads
images = np.random.default_rng(0).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)

def network():
    import torch
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(16, 32, 3, padding=1))

def fitted(**settings):
    from patchcore_rs import PatchCore
    model = PatchCore(backbone=network(), layers=["2"], resize=None, crop=None, coreset=1000, device="cpu")
    return model.set_params(coreset_method="random", **settings).fit(images)

def answer(model):
    result = model.predict(images)
    return result.scores.tobytes() + result.maps.tobytes()

def in_children(count, work):
    """How forked children end that work at once: with 0 where `work` gives True."""
    children = []
    for _ in range(count):
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            os._exit(0 if work() is True else 1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
'''


def run(script, body):
    """What an interpreter prints that runs `body` after the prelude, as a `script` that processes can be started of."""
    script.write_text(PRELUDE + textwrap.dedent(body))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@fork
def test_four_forked_children_predict_at_once_what_their_parent_did(tmp_path):
    out = run(
        tmp_path / "server.py",
        """
        import importlib.util
        import torch
        torch.set_num_threads(4)
        models = [fitted(index=index) for index in ("exact", "ivfpq")[: 1 + bool(importlib.util.find_spec("faiss"))]]
        expected = [answer(model) for model in models]
        work = lambda: [answer(model) for model in models] == expected
        print(in_children(4, work), work())
        """,
    )
    assert out == "[0, 0, 0, 0] True"


@fork
def test_every_call_that_needs_torch_works_in_a_forked_child(tmp_path):
    out = run(
        tmp_path / "server.py",
        f"""
        import torch
        from patchcore_rs import PatchCore, aggregate, load_backbone
        from patchcore_rs.compat.patchcore_inspection import ApproximateGreedyCoresetSampler
        torch.set_num_threads(4)
        path, net, maps = {str(tmp_path / "model")!r}, network(), torch.ones(2, 32, 64, 64)
        wide, rows = torch.nn.Conv2d(3, 4000, 5), torch.rand(2000, 256)
        model = fitted()
        expected = answer(model)
        model.save(path)

        def work():
            features = model.extract(images)
            same = model.predict_features(features).scores.tobytes() == expected[:48]
            same &= answer(fitted().fit_features(features)) == expected
            same &= answer(PatchCore.load(path, backbone=load_backbone(net, layers=["2"]), device="cpu")) == expected
            load_backbone(wide, device="cpu")
            ApproximateGreedyCoresetSampler(0.01, "cpu").run(rows)
            model.calibrate(images, false_alarm_rate=0.5).partial_fit(images).merge(model)
            return same and len(aggregate([maps])[0]) == 2 * 64 * 64

        print(in_children(1, work))
        """,
    )
    assert out == "[0]"


@fork
def test_a_forked_child_may_import_the_package_after_torch_was_used(tmp_path):
    out = run(
        tmp_path / "server.py",
        """
        import torch
        torch.set_num_threads(4)
        torch.nn.Conv2d(3, 64, 3)(torch.ones(4, 3, 64, 64))
        net = network()
        network = lambda: net  # drawing weights is torch's, not a call of ours
        print("patchcore_rs" in sys.modules, in_children(1, lambda: len(answer(fitted())) > 0))
        """,
    )
    assert out == "False [0]"


@fork
def test_only_what_the_fork_broke_is_done_in_one_thread(tmp_path):
    """A thread begun in the child has all of torch's threads, as has the parent; numbers of threads stay."""
    out = run(
        tmp_path / "server.py",
        """
        import torch
        torch.set_num_threads(4)
        seen = []

        def network():
            return lambda images: seen.append(torch.get_num_threads()) or [images]

        model = fitted(layers="auto")

        def work():
            seen.clear()
            answer(model)
            other = threading.Thread(target=answer, args=[model])
            other.start()
            other.join()
            return seen == [1, 4] and torch.get_num_threads() == 4

        print(seen, in_children(1, work))
        """,
    )
    assert out == "[4] [0]"


def test_detectors_travel_to_worker_processes(tmp_path):
    out = run(
        tmp_path / "workers.py",
        """
        import importlib.util, multiprocessing

        if __name__ == "__main__":
            model = fitted()
            expected = answer(model)
            print(multiprocessing.get_context("spawn").Pool(1).apply(answer, [model]) == expected)
            if importlib.util.find_spec("joblib"):
                from joblib.externals.loky import get_reusable_executor
                print(get_reusable_executor(max_workers=1).submit(answer, model).result() == expected)
        """,
    )
    assert set(out.split()) == {"True"}
