"""Parity with patchcore-inspection itself, out of the checkout that PATCHCORE_INSPECTION names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

CHECKOUT = os.environ.get("PATCHCORE_INSPECTION")
if not CHECKOUT:
    pytest.skip(
        "needs a checkout of patchcore-inspection: PATCHCORE_INSPECTION=CHECKOUT make test-peers",
        allow_module_level=True,
    )
pytest.importorskip("faiss", reason="patchcore-inspection needs faiss-cpu")
pytestmark = pytest.mark.filterwarnings("ignore")

sys.path.insert(0, str(Path(CHECKOUT, "src")))
import patchcore.backbones
import patchcore.common
import patchcore.patchcore
import patchcore.sampler
from imagenet import GOOD, LAYERS, SIDE, TESTS, network, prepared

from patchcore_rs import PatchCore
from patchcore_rs.compat import patchcore_inspection as face

CPU = torch.device("cpu")
WIDTH = 256


def named_network(name):
    """A network as patchcore-inspection wants it: with a name."""
    module = network(name)
    module.name, module.seed = "wideresnet50", 0
    return module


@pytest.fixture(scope="module", params=LAYERS)
def name(request):
    """The network that both programs have."""
    network(request.param)  # or the test is skipped
    return request.param


def theirs(name, nn_method=None, sampler=None):
    """Their PatchCore, not fitted."""
    model = patchcore.patchcore.PatchCore(CPU)
    model.load(
        backbone=named_network(name),
        layers_to_extract_from=LAYERS[name],
        device=CPU,
        input_shape=(3, SIDE, SIDE),
        pretrain_embed_dimension=WIDTH,
        target_embed_dimension=WIDTH,
        featuresampler=sampler or patchcore.sampler.IdentitySampler(),
        nn_method=nn_method or patchcore.common.FaissNN(False, 2),
    )
    return model


def loader(images):
    return torch.utils.data.DataLoader(prepared(images), batch_size=4)


def seed_all(seed=0):
    torch.manual_seed(seed)
    np.random.seed(seed)


def predict(model):
    scores, masks = model.predict(prepared(TESTS))
    return np.array(scores), np.stack(masks)


@pytest.fixture(scope="module")
def pair(name):
    """Their PatchCore with their classes and with ours, fitted to the same images from the same seeds."""
    models = []
    for search, samplers in ((patchcore.common, patchcore.sampler), (face, face)):
        model = theirs(name, search.FaissNN(False, 2), samplers.ApproximateGreedyCoresetSampler(0.1, CPU, 10, 128))
        seed_all()
        model.fit(loader(GOOD))
        models.append(model)
    return models


def rows_of(model):
    index = model.anomaly_scorer.nn_method.search_index
    return index.reconstruct_n(0, index.ntotal)


def bound(queries, rows):
    """How far ‖x‖² + ‖y‖² - 2 x·y in float32 can be from the squared distance: d + 4 roundings of each term."""
    norms = np.square(queries, dtype=np.float64).sum(axis=1) + np.square(rows, dtype=np.float64).sum(axis=1).max()
    return (queries.shape[1] + 4) * 2.0**-23 * norms


def by_definition(model):
    """Scores and maps of the tests by its formulas, in float64 from its own features and bank."""
    queries, rows = embedded(model).astype(np.float64), rows_of(model).astype(np.float64)
    nearest = np.array([np.square(rows - query).sum(axis=1).min() for query in queries])
    patches = nearest.reshape(len(TESTS), -1)
    side = int(np.sqrt(patches.shape[1]))
    maps = model.anomaly_segmentor.convert_to_segmentation(patches.reshape(-1, side, side))
    return patches.max(axis=1), np.stack(maps)


def embedded(model):
    return np.asarray(model.embed(prepared(TESTS)))


def check(found, model):
    """Scores and maps are those of the definition to 1e-5, and those of `model` within its rounding."""
    (scores, maps), (exact_scores, exact_maps) = found, by_definition(model)
    np.testing.assert_allclose(scores, exact_scores, rtol=1e-5)
    np.testing.assert_allclose(maps, exact_maps, rtol=1e-5)
    own_scores, own_maps = predict(model)
    print(
        f"scores differ by {np.abs(own_scores / scores - 1).max():.2g}, maps by {np.abs(own_maps / maps - 1).max():.2g}"
    )
    limit = bound(embedded(model), rows_of(model)).max()
    turned = (scores[:, None] < scores) & (own_scores[:, None] > own_scores)  # so AUROCs differ by such pairs at most
    assert (np.abs(scores[:, None] - scores)[turned] <= 2 * limit).all()
    assert np.abs(own_scores - scores).max() <= limit + 1e-5 * scores.max()
    assert np.abs(own_maps - maps).max() <= limit + 1e-5 * maps.max()


# --- the classes --------------------------------------------------------------------------------------------


def test_the_banks_have_the_same_rows(pair):
    """Until two candidates are nearly as far: the share of rows that both chose is given where they part."""
    plain, ours = map(rows_of, pair)
    assert plain.shape == ours.shape
    same = (plain == ours).all(axis=1)
    first = len(same) if same.all() else int(np.argmin(same))
    print(f"the first {first} of {len(same)} picks are equal")
    assert first > 20


def test_the_generators_are_left_as_theirs_leave_them():
    features = torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    after = []
    for module in (patchcore.sampler, face):
        seed_all(5)
        module.ApproximateGreedyCoresetSampler(0.2, CPU, 10, 8).run(features)
        after.append((torch.rand(3).tolist(), np.random.rand(3).tolist()))
    assert after[0] == after[1]


@pytest.mark.parametrize("as_array", [False, True], ids=["tensor", "array"])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("RandomSampler", ()),
        ("GreedyCoresetSampler", (CPU, 8)),
        ("GreedyCoresetSampler", (CPU, 40)),
        ("ApproximateGreedyCoresetSampler", (CPU, 10, 8)),
        ("ApproximateGreedyCoresetSampler", (CPU, 10, 40)),
    ],
)
def test_samplers_pick_the_same_rows(name, arguments, as_array):
    features = torch.randn(400, 40, generator=torch.Generator().manual_seed(1))
    found = []
    for module in (patchcore.sampler, face):
        seed_all(3)
        found.append(getattr(module, name)(0.1, *arguments).run(features.numpy() if as_array else features))
    assert type(found[0]) is type(found[1])
    np.testing.assert_array_equal(found[0], found[1])


def test_distances_are_theirs_within_their_rounding(pair):
    rows = rows_of(pair[0])
    queries = embedded(pair[0])
    search = {}
    for name, common in (("theirs", patchcore.common), ("ours", face)):
        search[name] = common.FaissNN(False, 2)
        search[name].fit(rows)
    found, expected = search["ours"].run(3, queries), search["theirs"].run(3, queries)
    assert [array.dtype for array in found] == [array.dtype for array in expected]
    difference = np.abs(found[0].astype(np.float64) - expected[0]).max(axis=1)
    print(f"largest relative difference {(difference / expected[0][:, 0]).max():.2g}")
    assert (difference <= bound(queries, rows)).all()
    exact = np.square(queries.astype(np.float64) - rows[found[1][:, 0]]).sum(axis=1)
    np.testing.assert_allclose(found[0][:, 0], exact, rtol=1e-6)


def test_scores_and_maps_of_their_patchcore_are_the_same_with_our_search(pair, name):
    model = theirs(name, face.FaissNN(False, 2))
    model.anomaly_scorer.fit([rows_of(pair[0])])
    check(predict(model), pair[0])


def test_their_own_suite_passes_with_our_classes():
    here = Path(__file__).resolve().parent
    search = [str(here), str(Path(CHECKOUT, "src")), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "substituted_inspection", "-p", "no:cacheprovider", "test"]
    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", "."],
        cwd=CHECKOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"18 passed", done.stdout)


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_of_theirs_scores_the_same_here(pair, name, tmp_path):
    model = pair[0]
    model.save_to_path(str(tmp_path))
    loaded = face.load_folder(tmp_path, backbone=named_network(name), resize=None)
    result = loaded.predict(list(TESTS))
    check((result.scores, result.maps), model)


def test_a_folder_of_ours_scores_the_same_there(name, tmp_path, monkeypatch):
    model = PatchCore(
        profile="amazon",
        backbone=named_network(name),
        layers=tuple(LAYERS[name]),
        resize=None,
        crop=None,
        embedding=WIDTH,
        coreset=0.05,
    ).fit(list(GOOD))
    face.save_folder(model, tmp_path, backbone="wideresnet50")
    monkeypatch.setattr(patchcore.backbones, "load", lambda _: named_network(name))
    other = patchcore.patchcore.PatchCore(CPU)
    other.load_from_path(str(tmp_path), device=CPU, nn_method=patchcore.common.FaissNN(False, 2))
    result = model.predict(list(TESTS))
    check((result.scores, result.maps), other)
