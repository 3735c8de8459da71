"""The shell of every detector carries methods of every kind: three small ones that share nothing with PatchCore."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
from detectors import detector, flawed, network, normal, pyramid, same

from patchcore_rs import ModelFileError, NotFittedError, PatchCore
from patchcore_rs.detector.base import Detector
from patchcore_rs.detector.method import learn_in_parts
from patchcore_rs.model.arrays import METHOD_ARRAYS, ArraySpec
from patchcore_rs.model.description import Training
from patchcore_rs.model.parameters import METHODS
from patchcore_rs.model.settings import SETTINGS, PatchCoreSettings


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and deviation of each column, at each position of the grid where the view has positions."""

    name: ClassVar[str] = "gaussian"
    view: ClassVar[str] = "raw"
    stage: ClassVar[str] = "model"
    summary: ClassVar[str] = "Gaussians"
    settings: Any
    mean: Any
    deviation: Any
    training: Training

    @classmethod
    def learner(cls, settings, call, images):
        return Sums(cls, settings, call)

    @classmethod
    def fit(cls, features, settings, call):
        return learn_in_parts(cls.learner(settings, call, len(features)), features)

    @classmethod
    def load(cls, arrays, description, threads):
        return cls(description.settings, arrays["mean"], arrays["deviation"], description.training)

    @property
    def arrays(self):
        return {"mean": self.mean, "deviation": self.deviation}

    def score(self, features, grid, threads):
        rows = features.reshape(-1, grid[0] * grid[1], features.shape[1])
        distances = np.sqrt((((rows - self.mean) / self.deviation) ** 2).sum(axis=2)).astype(np.float32)
        return distances.max(axis=1).astype(np.float64), distances.reshape(-1, *grid)

    @property
    def normal_scores(self):
        return None


class Sums:
    """Takes in images part after part, and keeps three numbers of each position and column."""

    def __init__(self, method, settings, call):
        self.method, self.settings, self.call = method, settings, call
        self.images, self.first, self.second = 0, 0.0, 0.0

    def append(self, features, images, layer_widths):
        assert layer_widths is None if self.method.view == "aggregated" else sum(layer_widths) == features.shape[1]
        rows = features.reshape(images, -1, features.shape[1]).astype(np.float64)
        self.images += images
        for image in rows:
            self.first, self.second = self.first + image, self.second + image**2

    def finish(self, grid):
        if self.call.progress is not None:
            self.call.progress("model", self.images, self.images)
        mean = self.first / self.images
        deviation = np.sqrt(np.maximum(self.second / self.images - mean**2, 0)) + 0.01
        assert mean.shape[0] == grid[0] * grid[1]
        return self.method(self.settings, mean, deviation, Training(self.images, self.images * len(mean), None))


@dataclass(frozen=True)
class GaussianSettings(PatchCoreSettings):
    """PatchCore's, of another method."""

    method: ClassVar[str] = "gaussian"

    def check_arrays(self, arrays):
        return len(arrays["mean"])


class Pooled(Gaussian):
    view = "pooled"


class Aggregated(Gaussian):
    view = "aggregated"


@pytest.fixture(autouse=True)
def tables_of_the_method(monkeypatch):
    """What its model file holds: a line in each of three tables is all that a method adds there."""
    monkeypatch.setitem(METHODS, "gaussian", METHODS["patchcore"])
    monkeypatch.setitem(SETTINGS, "gaussian", GaussianSettings)
    spec = ArraySpec(("F64",), ("positions", "dimensions"))
    monkeypatch.setitem(METHOD_ARRAYS, "gaussian", {"mean": spec, "deviation": replace(spec, positive=True)})


def toy(method):
    """A detector with PatchCore's arguments and another method."""
    return type("Toy", (PatchCore,), {"method": method, "_unfitted": "has no Gaussian yet"})


@pytest.mark.parametrize(("method", "channels", "positions"), [(Gaussian, 9, 64), (Pooled, 9, 1), (Aggregated, 9, 64)])
def test_a_method_of_thirty_lines_gets_everything_else_from_the_shell(method, channels, positions, tmp_path):
    model = toy(method)(backbone=pyramid, resize=None, crop=None)
    with pytest.raises(NotFittedError, match=r"this Toy has no Gaussian yet; call fit\(images\) or Toy.load\(path\)"):
        model.predict(normal(1))
    stages = []
    assert model.fit(normal(12), progress=lambda *call: stages.append(call)) is model
    assert {stage for stage, _, _ in stages} == {"features", "model"}
    assert list(model.timings_) == ["backbone", "aggregation", "model", "scoring"]
    assert model.summary_ == "Gaussians"
    assert model._fitted.learned.mean.shape == (positions, channels)
    model.calibrate(normal(20, 3), false_alarm_rate=0.1)
    result = model.predict(np.concatenate([normal(4, 7), flawed(3)]))
    assert result.maps.shape == (7, 32, 32)
    assert result.labels.tolist()[4:] == [1, 1, 1]
    features = model.extract(normal(12))
    assert len(features.features) == 12 * positions
    same(model.predict_features(model.extract(flawed(2))), model.predict(flawed(2)))
    path = tmp_path / "toy.safetensors"
    model.save(path)
    loaded = toy(method).load(path, backbone=pyramid)
    same(loaded.predict(flawed(2)), model.predict(flawed(2)))
    assert (loaded.calibration_, loaded.training_) == (model.calibration_, model.training_)
    with pytest.raises(
        ModelFileError, match=r"by the method 'gaussian', PatchCore loads 'patchcore'; patchcore_rs\.load"
    ):
        PatchCore.load(path, backbone=pyramid)
    again = toy(method)(backbone=pyramid, resize=None, crop=None).fit_features(features)
    np.testing.assert_array_equal(again.predict(flawed(2)).scores, model.predict(flawed(2)).scores)


def test_pooled_features_are_the_means_of_the_maps():
    model = toy(Pooled)(backbone=network(), layers=("1", "3"), resize=None, crop=None)
    features = model.extract(normal(3))
    import torch

    images = torch.stack([model.fit(normal(3))._fitted.extractor.prepare(image) for image in normal(3)])
    maps = model._fitted.extractor.backbone(images)
    expected = torch.cat([layer.mean(dim=(2, 3)) for layer in maps], dim=1).numpy()
    np.testing.assert_allclose(features.features, expected, rtol=1e-4, atol=1e-7)  # each image passes alone
    assert (features.grid, features.patches) == ((1, 1), 1)


def test_raw_features_are_positions_by_themselves():
    raw = toy(Gaussian)(backbone=pyramid, resize=None, crop=None, patch_size=5, embedding=4).extract(normal(2))
    single = detector(patch_size=1).extract(normal(2))
    np.testing.assert_array_equal(raw.features, single.features)
    assert "patch_size" not in raw.extraction
    with pytest.raises(ValueError, match="extracted with view='aggregated'; got 'raw'"):
        detector().fit_features(raw)


# --- arguments ---------------------------------------------------------------------------------------------


def test_set_params_sets_what_get_params_gives():
    model = detector()
    assert model.set_params(coreset=10, sigma=0.0) is model
    assert (model.get_params()["coreset"], model.get_params()["sigma"]) == (10, 0.0)
    assert model.set_params() is model
    other = PatchCore().set_params(**model.get_params())
    assert other.get_params() == model.get_params()
    assert repr(other) == repr(model)


def test_set_params_refuses_unknown_names_and_sets_nothing():
    model = detector()
    before = model.get_params()
    with pytest.raises(ValueError, match=r"corset is no parameter of PatchCore; it has preset, profile, .*coreset"):
        model.set_params(sigma=0.0, corset=10)
    assert model.get_params() == before


def test_set_params_is_checked_by_the_next_fit_and_changes_no_fit_before():
    model = detector().fit(normal(6))
    expected = model.predict(flawed(2))
    model.set_params(coreset="all")
    same(model.predict(flawed(2)), expected)
    with pytest.raises((TypeError, ValueError), match="coreset must be"):
        model.fit(normal(6))
    same(model.predict(flawed(2)), expected)


# --- progress ------------------------------------------------------------------------------------------------


def test_progress_true_draws_bars_on_stderr(capsys):
    model = detector().fit(normal(4), progress=True)
    assert "looking at images" in capsys.readouterr().err
    model.calibrate(normal(10, 3), false_alarm_rate=0.2, progress=True)
    model.predict(flawed(2), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("inspecting") >= 2
    model.predict(flawed(2), progress=False)
    assert capsys.readouterr().err == ""


CALLS = {
    "fit": lambda model, progress: model.fit(normal(2), progress=progress),
    "partial_fit": lambda model, progress: model.partial_fit(normal(2), progress=progress),
    "merge": lambda model, progress: model.merge(model, progress=progress),
    "extract": lambda model, progress: model.extract(normal(2), progress=progress),
    "fit_features": lambda model, progress: model.fit_features(model.extract(normal(2)), progress=progress),
    "calibrate": lambda model, progress: model.calibrate(normal(2), progress=progress),
    "predict": lambda model, progress: model.predict(normal(2), progress=progress),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_no_progress_is_refused(call):
    model = detector().fit(normal(2))
    before = model._fitted
    with pytest.raises(
        TypeError, match=r"progress must be None, True or callable as progress\(stage, done, total\); got"
    ):
        CALLS[call](model, "yes")
    assert model._fitted is before


@pytest.mark.parametrize("call", ["fit", "partial_fit", "extract", "calibrate", "predict"])
@pytest.mark.parametrize(("on_error", "kind"), [("ignore", ValueError), (None, TypeError)])
def test_what_is_no_way_to_meet_errors_is_refused(call, on_error, kind):
    model = detector().fit(normal(2))
    with pytest.raises(kind, match='on_error must be "raise" or "skip"; got'):
        getattr(model, call)(normal(2), on_error=on_error)


# --- one state -----------------------------------------------------------------------------------------------


def test_a_prediction_never_pairs_one_bank_with_the_threshold_of_another():
    """Another thread fits and calibrates in the middle of a call, at the worst moment: when the bank has been taken."""

    class Hurried(PatchCore):
        refit = False

        def _require_fitted(self):
            fitted = super()._require_fitted()
            if self.refit:
                self.refit = False
                bright = np.clip(normal(8, 1).astype(int) + 90, 0, 255).astype(np.uint8)
                worker = threading.Thread(target=lambda: self.fit(bright).calibrate(normal(4, 5), false_alarm_rate=0.3))
                worker.start()
                worker.join()
            return fitted

    options = {"backbone": pyramid, "resize": None, "crop": None}
    quiet = PatchCore(**options).fit(normal(8)).calibrate(normal(10, 3), false_alarm_rate=0.2)
    hurried = Hurried(**options).fit(normal(8)).calibrate(normal(10, 3), false_alarm_rate=0.2)
    test = np.concatenate([normal(3, 5), flawed(3)])
    expected = quiet.predict(test)
    hurried.refit = True
    same(hurried.predict(test), expected)
    assert hurried.threshold_ != quiet.threshold_


def test_a_threshold_set_by_hand_does_not_bring_back_an_older_bank():
    """Another thread ends its fit just when the detector has been read to be written back with a threshold."""

    class Hurried(PatchCore):
        worker = None

        def _require_fitted(self):
            fitted = super()._require_fitted()
            if self.worker is not None:
                worker, self.worker = self.worker, None
                worker.start()
                worker.join(2)  # it waits for its turn, or is done
            return fitted

    model = Hurried(backbone=pyramid, resize=None, crop=None, coreset=10).fit(normal(6))
    other = PatchCore(backbone=pyramid, resize=None, crop=None, coreset=10).fit(flawed(4))
    model.worker = worker = threading.Thread(target=lambda: model.fit(flawed(4)))
    model.threshold_ = 3.0
    worker.join()
    np.testing.assert_array_equal(model.memory_bank_.features, other.memory_bank_.features)


def test_a_calibration_does_not_attach_to_a_fit_made_meanwhile():
    class Refitting:
        """Images whose reading lets another thread fit the detector."""

        def __init__(self, model):
            self.model = model

        def __len__(self):
            return 4

        def __getitem__(self, index):
            if index == 0:
                worker = threading.Thread(target=lambda: self.model.fit(flawed(4)))
                worker.start()
                worker.join()
            return normal(4, 2)[index]

    from torch.utils.data import Dataset

    model = detector().fit(normal(6))
    images = type("Images", (Refitting, Dataset), {})(model)
    with pytest.raises(RuntimeError, match="was fitted while it was calibrated; call calibrate again"):
        model.calibrate(images, false_alarm_rate=0.5)
    assert model.threshold_ is None
    assert model.calibration_ is None


def test_what_was_learnt_is_there_only_after_a_fit():
    model = detector()
    for name in ("settings_", "image_size_", "training_", "threshold_", "calibration_", "skipped_", "memory_bank_"):
        assert not hasattr(model, name)
        with pytest.raises(NotFittedError, match="this PatchCore has no memory bank yet"):
            getattr(model, name)
    model.fit(normal(3))
    assert model.threshold_ is None
    model.threshold_ = 3.0
    assert model.predict(flawed(1)).threshold == 3.0
    with pytest.raises(AttributeError):
        model.settings_ = None


def test_the_shell_is_no_detector_by_itself():
    assert not hasattr(Detector, "method")
