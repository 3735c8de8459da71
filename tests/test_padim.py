"""PaDiM against its definition, and what the shell does with it: streaming, files, calibration, refusals, memory."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import oracle
import pytest
from detectors import flawed, normal, pyramid, same

from patchcore_rs import FeatureSet, ModelFileError, NotFittedError, PaDiM, PatchCore, _native, load
from patchcore_rs.methods import padim
from patchcore_rs.model.arrays import check_arrays
from patchcore_rs.model.file import read_model


def detector(**options):
    return PaDiM(**{"backbone": pyramid, "resize": None, "crop": None} | options)


def drawn(images, positions, width, seed=0):
    """Correlated features (images, positions, width) far from 0, as every position has its own."""
    rng = np.random.default_rng(seed)
    latent = rng.normal(size=(images, positions, width))
    mixed = latent @ np.random.default_rng(5).normal(size=(width, width)) / width**0.5
    return (mixed + 20 * np.random.default_rng(6).normal(size=(positions, width))).astype(np.float32)


def own(features, grid):
    return FeatureSet(features.reshape(-1, features.shape[2]), grid, (grid[0] * 8, grid[1] * 8))


def learnt(model):
    return model._fitted.learned


# --- the arithmetic ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "positions", "width"), [(1, 2, 3), (2, 3, 1), (30, 5, 7), (20, 1, 33), (12, 4, 64), (150, 2, 90)]
)
def test_kernels_agree_with_numpy(images, positions, width):
    features = drawn(images, positions, width)
    rows = features.reshape(-1, width)
    sums = np.zeros((positions, width))
    packed = np.zeros((positions, width * (width + 1) // 2))
    _native.accumulate_gaussians(rows, rows[:positions], sums, packed, 2)
    scale = 1 / (images - 1) if images > 1 else 0.0
    _native.factorize_gaussians(rows[:positions], sums, packed, images, scale, 0.01, 2, None)
    if images == 1:
        means, covariances = features[0].astype(np.float64), np.tile(0.01 * np.eye(width), (positions, 1, 1))
    else:
        means, covariances = oracle.gaussians(features, 0.01)
    np.testing.assert_allclose(sums, means, rtol=1e-12)
    factors = np.zeros((positions, width, width))
    columns, lines = np.triu_indices(width)  # the columns of a lower triangle, one after the other
    factors[:, lines, columns] = packed
    size = np.abs(covariances).max()
    np.testing.assert_allclose(factors @ factors.transpose(0, 2, 1), covariances, rtol=1e-9, atol=1e-12 * size)
    np.testing.assert_allclose(np.linalg.cholesky(covariances), factors, rtol=1e-9, atol=1e-9 * size**0.5)
    unseen = drawn(4, positions, width, seed=1)
    distances = _native.mahalanobis(unseen.reshape(-1, width), sums, packed, 2)
    np.testing.assert_allclose(distances, oracle.mahalanobis(unseen, means, covariances), rtol=1e-9)


def test_arrays_that_cannot_be_written_are_refused():
    rows, sums, packed = np.ones((2, 2), np.float32), np.zeros((2, 2)), np.zeros((2, 3))
    with pytest.raises(ValueError, match="sums must be C-contiguous"):
        _native.accumulate_gaussians(rows, rows, np.zeros((2, 2), order="F"), packed, 1)
    with pytest.raises(ValueError, match="packed must be 2 x 3 values; got 4"):
        _native.accumulate_gaussians(rows, rows, sums, np.zeros((2, 2)), 1)
    packed.flags.writeable = False
    with pytest.raises(ValueError, match="packed must be writeable"):
        _native.accumulate_gaussians(rows, rows, sums, packed, 1)


def test_scores_are_those_of_the_definition():
    model = detector(channels="all", epsilon=0.02, sigma=2.0).fit(normal(20))
    shape = (-1, 64, 9)
    means, covariances = oracle.gaussians(model.extract(normal(20)).features.reshape(shape), 0.02)
    images = np.concatenate([normal(3, 4), flawed(2)])
    expected = oracle.mahalanobis(model.extract(images).features.reshape(shape), means, covariances)
    result = model.predict(images)
    np.testing.assert_allclose(result.scores, expected.max(axis=1), rtol=1e-9)
    maps = oracle.anomaly_maps(expected.astype(np.float32).reshape(-1, 8, 8), (32, 32), 2.0, "bilinear", "symmetric")
    np.testing.assert_allclose(result.maps, maps, rtol=1e-5)
    assert result.scores[3:].min() > 2 * result.scores[:3].max()


@pytest.mark.parametrize(
    ("channels", "columns", "used"),
    [("auto", 9, 9), ("auto", 448, 100), ("auto", 1000, 550), ("all", 7, 7), (4, 7, 4), (8, 7, 7)],
)
def test_channels_are_drawn_by_the_seed(channels, columns, used):
    rows = own(drawn(3, 1, columns), (1, 1))
    model = PaDiM(channels=channels, seed=3).fit_features(rows)
    expected = np.random.Generator(np.random.PCG64(3)).permutation(columns)[:used]
    np.testing.assert_array_equal(model.channels_, np.sort(expected))
    assert model.settings_.channels == used
    assert model.summary_ == f"1 Gaussian of {used} of {columns:,} channels"
    other = PaDiM(channels=channels, seed=4).fit_features(rows)
    assert np.array_equal(other.channels_, model.channels_) == (used == columns)


def test_a_training_image_is_scored_as_if_it_had_not_been_learnt_from():
    images, width = 50, 12
    features = drawn(images, 6, width)
    model = PaDiM(epsilon=0.1).fit_features(own(features, (2, 3)))
    scores = learnt(model).normal_scores
    assert scores.shape == (1, 2, 3)
    rest = np.delete(features, 25, axis=0)
    epsilon = 0.1 * (images - 1) / (images - 2)
    expected = oracle.mahalanobis(features[25:26], *oracle.gaussians(rest, epsilon))
    np.testing.assert_allclose(scores.reshape(1, 6), expected, rtol=1e-6)
    assert model._fitted.description.map_values is not None
    few = PaDiM().fit_features(own(features[:2], (2, 3)))
    assert learnt(few).normal_scores is None


def test_one_image_leaves_only_epsilon():
    features = drawn(1, 6, 4)
    model = PaDiM(epsilon=0.25).fit_features(own(features, (2, 3)))
    unseen = drawn(2, 6, 4, seed=1)
    expected = np.linalg.norm(unseen.astype(np.float64) - features, axis=2) / 0.5
    np.testing.assert_allclose(model.predict_features(own(unseen, (2, 3))).scores, expected.max(axis=1), rtol=1e-12)


# --- the shell -----------------------------------------------------------------------------------------------


def test_batches_and_threads_change_no_bit(monkeypatch):
    monkeypatch.setattr(padim, "_WAITING", 5)
    models = [
        detector(batch_size=1, threads=1).fit(normal(13)),
        detector(batch_size=6, threads=3).fit(normal(13)),
        detector().fit_features(detector().extract(normal(13))),
        detector().fit(iter(list(normal(13)))),
    ]
    for other in models[1:]:
        for name, array in learnt(models[0]).arrays.items():
            np.testing.assert_array_equal(array, learnt(other).arrays[name], err_msg=name)
    images = np.concatenate([normal(3, 4), flawed(4)])
    together = models[0].predict(images)
    alone = np.concatenate([models[1].predict(image[None]).scores for image in images])
    np.testing.assert_array_equal(alone, together.scores)
    same(models[2].predict_features(models[2].extract(images)), together)


def test_a_fit_tells_its_progress():
    stages = []
    model = detector().fit(normal(12), progress=lambda *call: stages.append(call))
    assert stages[-1] == ("model", 64, 64)
    assert {stage for stage, _, _ in stages} == {"features", "model"}
    assert list(model.timings_) == ["backbone", "aggregation", "model", "scoring"]
    assert model.training_.images == 12
    assert model.training_.patches == 12 * 64
    assert repr(detector(epsilon=0.5)).endswith("epsilon=0.5)")


def test_what_is_saved_is_what_is_loaded(tmp_path):
    model = detector(channels=5, normalize=True).fit(normal(12)).calibrate(normal(20, 3), false_alarm_rate=0.1)
    path, again = tmp_path / "model.safetensors", tmp_path / "again.safetensors"
    model.save(path)
    images = np.concatenate([normal(3, 4), flawed(3)])
    for loaded in (PaDiM.load(path, backbone=pyramid), load(path, backbone=pyramid, threads=1)):
        assert isinstance(loaded, PaDiM)
        same(loaded.predict(images), model.predict(images))
        assert (loaded.settings_, loaded.calibration_) == (model.settings_, model.calibration_)
        np.testing.assert_array_equal(loaded.channels_, model.channels_)
        loaded.save(again)
        assert again.read_bytes() == path.read_bytes()
    assert model.predict(images).labels.tolist()[3:] == [1, 1, 1]
    with pytest.raises(ModelFileError, match="by the method 'padim', PatchCore loads 'patchcore'"):
        PatchCore.load(path, backbone=pyramid)
    stored = read_model(path)
    assert {name: array.shape for name, array in stored.arrays.items()} == {
        "channels": (9,),
        "mean": (64, 5),
        "factors": (64, 15),
        "grid": (2,),
    }
    assert {"channels", "epsilon"} <= set(stored.metadata["requires"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"channels": np.ones(9, np.uint8)}, "channels must mark the 5 columns of mean"),
        ({"channels": np.array([2, 1, 1, 1, 0, 0, 0, 0, 0], np.uint8)}, "channels must mark the 5 columns of mean"),
        ({"mean": np.zeros((64, 4))}, "channels must mark the 4 columns of mean"),
        ({"factors": np.ones((64, 14))}, "factors must have 15 columns for 5 channels"),
        ({"factors": -np.ones((64, 15))}, "factors must be > 0 on the diagonal"),
        ({"factors": np.full((64, 15), np.nan)}, r"factors\[0, 0\] is nan"),
        ({"grid": np.array([8, 7])}, r"grid must be rows and columns of the 64 positions; got \[8, 7\]"),
        ({"grid": np.array([-8, -8])}, "grid must be rows and columns of the 64 positions"),
        ({"grid": np.array([64])}, r"grid must be .*; got \[64\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changed, message):
    model = detector(channels=5).fit(normal(3))
    arrays = learnt(model).arrays | changed
    with pytest.raises(ValueError, match=message):  # noqa: PT012 - the two checks of loading
        check_arrays("padim", arrays, {})
        model.settings_.check_arrays(arrays)


def test_refusals_name_what_is_wrong():
    with pytest.raises(NotFittedError, match=r"call fit\(images\) or PaDiM.load\(path\)"):
        detector().predict(normal(1))
    with pytest.raises(ValueError, match=r"^epsilon must be large enough .*got 0e0, .* position 0 .* channel "):
        detector(epsilon=0).fit(normal(3))
    for name, value, error in (
        ("channels", 0, ValueError),
        ("channels", "most", ValueError),
        ("channels", 1.5, TypeError),
        ("epsilon", -1, ValueError),
        ("epsilon", "a", TypeError),
    ):
        with pytest.raises(error, match=f"^{name} must be .*; got "):
            detector(**{name: value}).fit(normal(3))
    with pytest.raises(ValueError, match=r"^features must hold at least one image; got none"):
        PaDiM().fit_features(own(drawn(4, 6, 5)[:0], (2, 3)))
    model = PaDiM().fit_features(own(drawn(4, 6, 5), (2, 3)))
    wrong = r"^features must be of 5 channels on a grid of 2 x 3, as the detector was fitted on; got "
    with pytest.raises(ValueError, match=wrong + "4 on 2 x 3"):
        model.predict_features(own(drawn(1, 6, 4), (2, 3)))
    for grid in (1, 3), (3, 2), (1, 6):  # of as many positions, too
        rows = drawn(1, grid[0] * grid[1], 5)[0]
        with pytest.raises(ValueError, match=wrong + f"5 on {grid[0]} x {grid[1]}"):
            model.predict_features(FeatureSet(rows, grid, (16, 24)))


def test_a_loaded_model_knows_its_grid(tmp_path):
    model = PaDiM().fit_features(own(drawn(4, 6, 5), (2, 3)))
    model.save(tmp_path / "model.safetensors")
    turned = FeatureSet(drawn(1, 6, 5)[0], (3, 2), (16, 24))
    with pytest.raises(ValueError, match=r"^features must be of 5 channels on a grid of 2 x 3, .*; got 5 on 3 x 2"):
        load(tmp_path / "model.safetensors").predict_features(turned)


def test_a_fit_that_fails_leaves_the_detector_as_it_was():
    model = detector().fit(normal(5))
    before = model._fitted
    model.epsilon = 0.0
    with pytest.raises(ValueError, match=r"^epsilon must be"):
        model.fit(normal(3))
    assert model._fitted is before


def test_a_fit_that_does_not_fit_into_memory_is_refused_first(monkeypatch):
    monkeypatch.setattr("patchcore_rs._limits.available_memory", lambda: 1 << 20)
    rows = own(np.zeros((1, 400, 300), np.float32), (20, 20))
    with pytest.raises(MemoryError, match=r"400 Gaussians of 300 channels takes about .* use fewer channels="):
        PaDiM(channels="all").fit_features(rows)


MEMORY = """
import os, sys
import numpy as np
from patchcore_rs import FeatureSet, PaDiM
from patchcore_rs.methods import padim

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def fit(side, width):
    rows = np.random.default_rng(0).normal(size=(6 * side * side, width)).astype(np.float32)
    return PaDiM(channels="all", threads=2).fit_features(FeatureSet(rows, (side, side), (8, 8)))

small = fit(2, 200)
small.save(sys.argv[1])
PaDiM.load(sys.argv[1])
before = peak()
model = fit(20, 200)
fitted = peak()
model.save(sys.argv[1])
saved = peak()
del model, small
PaDiM.load(sys.argv[1])
size = os.path.getsize(sys.argv[1])
print(*((value - before) / size for value in (fitted, saved, peak())))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_fit_save_and_load_take_little_more_than_the_file(tmp_path):
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "model.safetensors")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert all(0.9 < share < 1.2 for share in map(float, out.split())), out
