"""A detector of images in scikit-learn's tools: pipelines, searches, clones, and joblib's cache."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from detectors import detector, flawed, network, normal, same, unlike

pytest.importorskip("sklearn", "1.6", reason="scikit-learn >= 1.6 is not installed")

import joblib
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted

from patchcore_rs import Ensemble, PatchCore
from patchcore_rs.compat.sklearn import image_auroc_scorer

IMAGES = [*normal(8), *flawed(4)]
LABELS = [0] * 8 + [1] * 4
SPLIT = (np.arange(4), np.arange(4, 12))


@pytest.mark.parametrize("make", [detector, lambda: Ensemble(unlike())])
def test_labels_are_taken_and_ignored(make):
    same(make().fit(normal(6), [0] * 6).predict(flawed(2)), make().fit(normal(6)).predict(flawed(2)))
    assert make().fit(images=normal(6), y=None).training_.images == 6


def test_a_pipeline_ends_in_a_detector():
    pipeline = make_pipeline(FunctionTransformer(lambda images: 255 - images, check_inverse=False), detector())
    with pytest.raises(NotFittedError):
        check_is_fitted(pipeline)
    with pytest.raises(NotFittedError):
        check_is_fitted(pipeline[-1])
    pipeline.fit(normal(6), LABELS[:6])
    check_is_fitted(pipeline)
    same(pipeline.predict(flawed(2)), detector().fit(255 - normal(6)).predict(255 - flawed(2)))


def test_a_search_goes_through_coresets_and_reweightings():
    grid = {"coreset": [5, 0.5], "reweight": [1, 3]}
    search = GridSearchCV(detector(), grid, scoring=image_auroc_scorer, cv=[SPLIT], refit=False, error_score="raise")
    search.fit(IMAGES, LABELS)
    assert len(search.cv_results_["params"]) == 4
    for parameters, score in zip(search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True):
        fitted = detector(**parameters).fit(IMAGES[:4])
        assert score == image_auroc_scorer(fitted, IMAGES[4:], LABELS[4:])
    assert search.best_score_ > 0.9


def test_a_pipeline_is_cross_validated():
    pipeline = make_pipeline(FunctionTransformer(check_inverse=False), detector())
    scores = cross_val_score(pipeline, IMAGES, LABELS, scoring=image_auroc_scorer, cv=[SPLIT], error_score="raise")
    assert scores == [image_auroc_scorer(detector().fit(IMAGES[:4]), IMAGES[4:], LABELS[4:])]


def test_the_scorer_wants_labels_of_both_kinds():
    model = detector().fit(IMAGES[:4])
    with pytest.raises(TypeError, match=r"y must be the labels of the images, .*; got None\. Pass them to fit too"):
        image_auroc_scorer(model, IMAGES)
    with pytest.raises(ValueError, match="labels"):
        image_auroc_scorer(model, IMAGES[:4], LABELS[:4])


def test_tags_say_that_no_labels_are_needed():
    tags = get_tags(detector())
    assert (tags.estimator_type, tags.target_tags.required, tags.input_tags.two_d_array) == (None, False, False)
    assert get_tags(Ensemble(unlike())).requires_fit


def test_a_clone_has_the_parameters_and_learns_anew():
    for model in (PatchCore(backbone=network(), layers=("1", "3"), coreset=20), detector(sigma=0.0)):
        again = clone(model.fit(normal(4, size=64)))
        assert again.get_params().keys() == model.get_params().keys()
        assert (again.coreset, again.sigma) == (model.coreset, model.sigma)
        with pytest.raises(ValueError, match="has no memory bank yet"):
            again.predict(flawed(1))


HASHES = """
    import sys
    import joblib
    from patchcore_rs import PatchCore

    print(*(joblib.hash(PatchCore.load(sys.argv[1], device="cpu")) for _ in range(2)))
"""


def test_joblib_knows_a_model_file_again_in_any_process(tmp_path):
    path = tmp_path / "model.safetensors"
    PatchCore(backbone="efficientnet_lite0", coreset=20, device="cpu").fit(normal(2, size=64)).save(path)
    models = [PatchCore.load(path, device="cpu") for _ in range(2)]
    hashes = {joblib.hash(model) for model in models}
    for seed in ("1", "2"):
        command = [sys.executable, "-c", textwrap.dedent(HASHES), str(path)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        hashes |= {*subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()}
    models[0].predict(normal(1, size=64))
    assert {joblib.hash(models[0])} == hashes
    again = pickle.loads(pickle.dumps(models[0]))
    same(again.predict(flawed(2, size=64)), models[1].predict(flawed(2, size=64)))
    other = PatchCore.load(path, device="cpu")
    other.threshold_ = 1.0
    assert joblib.hash(other) not in hashes
