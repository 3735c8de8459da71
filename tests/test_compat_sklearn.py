"""The face of scikit-learn: its own checks pass, and neighbours are those of its own class."""

from __future__ import annotations

import sys

import numpy as np
import pytest

pytest.importorskip("sklearn", "1.6", reason="scikit-learn >= 1.6 is not installed")

from sklearn import neighbors
from sklearn.base import clone
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from patchcore_rs.compat.sklearn import NearestNeighbors, PatchCoreOutlier


def gaussian(rows, channels=6, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, channels), dtype=np.float32)


def both(rows, **options):
    return NearestNeighbors(**options).fit(rows), neighbors.NearestNeighbors(algorithm="brute", **options).fit(rows)


@pytest.mark.parametrize("estimator", [NearestNeighbors(), PatchCoreOutlier(), PatchCoreOutlier(coreset=5)])
@pytest.mark.filterwarnings("default")
def test_the_checks_of_scikit_learn_pass(estimator):
    results = check_estimator(estimator, on_skip=None)
    assert len(results) > 30
    assert [result["check_name"] for result in results if result["status"] == "failed"] == []


@pytest.mark.parametrize("metric", ["minkowski", "euclidean", "sqeuclidean"])
@pytest.mark.parametrize("queries", [None, gaussian(7, seed=1)], ids=["itself", "others"])
def test_neighbours_are_those_of_scikit_learn(metric, queries):
    ours, theirs = both(gaussian(80), n_neighbors=4, metric=metric)
    found, expected = ours.kneighbors(queries), theirs.kneighbors(queries)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(ours.kneighbors(queries, 2, return_distance=False), expected[1][:, :2])
    assert ours.effective_metric_ == ("sqeuclidean" if metric == "sqeuclidean" else "euclidean")
    assert (ours.n_samples_fit_, ours.n_features_in_) == (80, 6)


def test_a_row_is_not_its_own_neighbour_but_its_equals_are():
    ours, _ = both(np.repeat(gaussian(3), 2, axis=0), n_neighbors=1)
    distances, indices = ours.kneighbors()
    assert indices.ravel().tolist() == [1, 0, 3, 2, 5, 4]
    assert not distances.any()


@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean"])
@pytest.mark.parametrize("queries", [None, gaussian(7, seed=1)], ids=["itself", "others"])
def test_neighbours_within_a_radius_are_those_of_scikit_learn(metric, queries):
    ours, theirs = both(gaussian(80), radius=2.4, metric=metric)
    found, expected = ours.radius_neighbors(queries), theirs.radius_neighbors(queries, sort_results=True)
    assert found[0].shape == expected[0].shape
    for own, their in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(own, their)
    for own, their in zip(found[0], expected[0], strict=True):
        np.testing.assert_allclose(own, their, rtol=1e-5)
    alone = ours.radius_neighbors(queries, 0.0, return_distance=False)
    assert [len(rows) for rows in alone] == [0] * len(alone)
    ours.radius_neighbors(gaussian(3), 100.0)  # all of one length: an array of arrays nevertheless
    assert ours.radius_neighbors(gaussian(3), 100.0)[1].shape == (3,)


@pytest.mark.parametrize("mode", ["connectivity", "distance"])
def test_graphs_are_those_of_scikit_learn(mode):
    ours, theirs = both(gaussian(40), n_neighbors=3, radius=2.0)
    for queries in (None, gaussian(5, seed=1)):
        np.testing.assert_allclose(
            ours.kneighbors_graph(queries, mode=mode).toarray(),
            theirs.kneighbors_graph(queries, mode=mode).toarray(),
            rtol=1e-5,
        )
        np.testing.assert_allclose(
            ours.radius_neighbors_graph(queries, mode=mode).toarray(),
            theirs.radius_neighbors_graph(queries, mode=mode).toarray(),
            rtol=1e-5,
        )


def test_near_neighbours_keep_their_distance():
    """The usual formula cancels where two rows are near each other and far from the origin."""
    rows = gaussian(20) + np.float32(1000)
    ours, theirs = both(rows, n_neighbors=1)
    queries = rows + np.float32(0.001)
    expected = np.linalg.norm(queries.astype(np.float64) - rows, axis=1)
    np.testing.assert_allclose(ours.kneighbors(queries)[0][:, 0], expected, rtol=1e-6)
    assert theirs.kneighbors(queries)[0].shape == (20, 1)


def test_doubles_are_rounded_to_float32():
    rows = np.array([[1.0], [1.0 + 2.0**-30]])
    distances, indices = NearestNeighbors(n_neighbors=2).fit(rows).kneighbors(rows[1:])
    assert (distances.dtype, distances.tolist(), indices.tolist()) == (np.float32, [[0.0, 0.0]], [[0, 1]])


def test_tiny_values_are_rounded_whatever_numpy_is_told_to_raise():
    tiny = np.array([[1e-300, 1.0], [0.0, 2.0]])
    with np.errstate(all="raise"):
        distances, _ = NearestNeighbors(n_neighbors=1).fit(tiny).kneighbors(tiny)
        assert distances.tolist() == [[0.0], [0.0]]
        assert np.isfinite(PatchCoreOutlier().fit(tiny).score_samples(tiny)).all()


def test_values_that_overflow_are_refused():
    with pytest.raises(ValueError, match="magnitudes above 1e"):
        NearestNeighbors().fit(np.full((5, 2), 1e17))


@pytest.mark.parametrize(
    ("options", "call", "message"),
    [
        ({"metric": "cosine"}, lambda model: model, "metric must be Euclidean"),
        ({"p": 1}, lambda model: model, "metric must be Euclidean"),
        ({"n_jobs": 0}, lambda model: model, "n_jobs must be a number of threads"),
        ({}, lambda model: model.kneighbors(n_neighbors=10), "n_neighbors must be at most n_samples_fit, 9 besides"),
        ({}, lambda model: model.kneighbors(gaussian(1), 11), "n_neighbors must be at most n_samples_fit, 10;"),
        ({}, lambda model: model.kneighbors(gaussian(1), 0), "n_neighbors must be at least 1; got 0"),
        ({}, lambda model: model.kneighbors_graph(mode="both"), 'mode must be "connectivity" or "distance"'),
    ],
)
def test_what_does_not_fit_is_named(options, call, message):
    with pytest.raises(ValueError, match=message):
        call(NearestNeighbors(**options).fit(gaussian(10)))


@pytest.mark.parametrize("jobs", [None, -1, 1, 2])
def test_the_number_of_jobs_changes_no_answer(jobs):
    model = NearestNeighbors(n_jobs=jobs).fit(gaussian(50))
    np.testing.assert_array_equal(model.kneighbors()[0], NearestNeighbors(n_jobs=1).fit(gaussian(50)).kneighbors()[0])


# --- the outlier detector -----------------------------------------------------------------------------------


def test_outliers_are_found():
    normal, odd = gaussian(400), gaussian(40, seed=1) * 4
    model = PatchCoreOutlier(coreset=0.2, contamination=0.05).fit(normal)
    tests = np.concatenate([gaussian(100, seed=2), odd])
    labels = np.repeat([0, 1], [100, 40])
    assert roc_auc_score(labels, -model.score_samples(tests)) > 0.95
    assert (model.predict(odd) == -1).mean() > 0.9
    assert (model.predict(normal) == -1).mean() == pytest.approx(0.05, abs=0.01)
    np.testing.assert_array_equal(model.predict(tests), np.where(model.decision_function(tests) < 0, -1, 1))
    np.testing.assert_array_equal(model.decision_function(tests), model.score_samples(tests) - model.offset_)


def test_scores_are_distances_to_the_coreset():
    rows, tests = gaussian(60), gaussian(9, seed=1)
    model = PatchCoreOutlier(coreset=0.25).fit(rows)
    assert len(model.coreset_indices_) == len(set(model.coreset_indices_)) == 15
    distances = np.linalg.norm(tests[:, None].astype(np.float64) - rows[model.coreset_indices_], axis=2)
    np.testing.assert_allclose(model.score_samples(tests), -distances.min(axis=1), rtol=1e-6)


@pytest.mark.parametrize(("coreset", "count"), [(0.5, 5), (0.01, 1), (3, 3), (50, 10), (1.0, 10), (np.float32(0.5), 5)])
def test_a_coreset_is_a_share_or_a_count(coreset, count):
    model = PatchCoreOutlier(coreset=coreset).fit(gaussian(10))
    assert model.memory_bank_.shape == (count, 6)


def test_the_seed_decides_the_coreset():
    picks = [PatchCoreOutlier(random_state=seed).fit(gaussian(300)).coreset_indices_.tolist() for seed in (0, 0, 1)]
    assert picks[0] == picks[1] != picks[2]


def test_equal_rows_still_give_the_count_that_was_asked_for():
    assert PatchCoreOutlier(coreset=4).fit(np.ones((9, 2))).memory_bank_.shape == (4, 2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"contamination": 0.6}, ValueError, "contamination must be a fraction > 0 and <= 0.5; got 0.6"),
        ({"contamination": 0.0}, ValueError, "contamination must be"),
        ({"contamination": "auto"}, TypeError, "contamination must be"),
        ({"coreset": 0}, ValueError, "coreset must be at least 1; got 0"),
        ({"coreset": 1.5}, ValueError, "coreset must be"),
        ({"coreset": None}, TypeError, "coreset must be an integer"),
        ({"coreset": "all"}, TypeError, "coreset must be an integer"),
    ],
)
def test_an_argument_out_of_range_is_named_by_fit(options, error, message):
    with pytest.raises(error, match=message):
        PatchCoreOutlier(**options).fit(gaussian(10))


def test_the_detector_stands_in_pipelines_and_searches():
    model = make_pipeline(StandardScaler(), PatchCoreOutlier())
    assert clone(model).fit(gaussian(50)).predict(gaussian(5)).shape == (5,)
    labels = np.where(np.linalg.norm(gaussian(60), axis=1) > 3, -1, 1)
    search = GridSearchCV(PatchCoreOutlier(), {"coreset": [0.1, 0.5]}, scoring="accuracy", cv=2)
    assert search.fit(gaussian(60), labels).best_params_["coreset"] in {0.1, 0.5}


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    monkeypatch.delitem(sys.modules, "patchcore_rs.compat.sklearn")
    with pytest.raises(ImportError, match=r"needs scikit-learn >= 1\.6: pip install -U scikit-learn"):
        import patchcore_rs.compat.sklearn  # noqa: F401
