"""The face of patchcore-inspection keeps the contracts of its classes, and its folders become models and back."""

from __future__ import annotations

import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from detectors import detector, flawed, network, normal

from patchcore_rs import ModelFileError, NotFittedError, PatchCore
from patchcore_rs.compat import patchcore_inspection as face
from patchcore_rs.compat.patchcore_inspection import (
    ApproximateFaissNN,
    ApproximateGreedyCoresetSampler,
    FaissNN,
    GreedyCoresetSampler,
    IdentitySampler,
    NearestNeighbourScorer,
    RandomSampler,
    load_folder,
    save_folder,
)

LAYERS = ("1", "3")


def ramp(queries=3, channels=6):
    return np.arange(queries * channels, dtype=np.float32).reshape(queries, channels)


def gaussian(rows, channels, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, channels), dtype=np.float32)


# --- searching ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FaissNN, ApproximateFaissNN])
def test_a_search_of_its_own_rows_equals_a_search_of_the_stored(kind):
    for queries, rows in ((ramp(), 2 * ramp()), (np.ones((768, 128), np.float32), np.full((768, 128), 2, np.float32))):
        search = kind()
        alone = search.run(2, queries, rows)
        assert search.search_index is None
        search.fit(rows)
        stored = search.run(2, queries)
        search.run(1, queries, queries)
        for one, other, again in zip(alone, stored, search.run(2, queries), strict=True):
            np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(one, again)


def test_a_search_gives_squared_distances():
    search = FaissNN(False, 4)
    search.fit(gaussian(50, 8))
    distances, indices = search.run(3, gaussian(9, 8, 1))
    exact = np.square(gaussian(9, 8, 1)[:, None].astype(np.float64) - gaussian(50, 8)).sum(axis=2)
    assert (distances.dtype, indices.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(distances, np.sort(exact, axis=1)[:, :3].astype(np.float32))
    np.testing.assert_array_equal(indices, np.argsort(exact, axis=1)[:, :3])


def test_a_search_without_rows_is_an_attribute_error():
    search = FaissNN(on_gpu=False, num_workers=4)
    with pytest.raises(AttributeError, match="Call fit or load first"):
        search.run(2, ramp())
    assert search.run(2, ramp(), ramp())[1].shape == (3, 2)
    with pytest.raises(TypeError, match="Call fit or load first"):
        search.save("nowhere")


def test_fit_takes_the_place_of_what_was_there():
    search = FaissNN()
    search.fit(ramp(5))
    search.fit(ramp(3, 4))
    assert (search.search_index.ntotal, search.search_index.d) == (3, 4)
    search.reset_index()
    assert search.search_index is None


def test_a_saved_index_answers_exactly_the_same(tmp_path):
    search, loaded = FaissNN(), FaissNN()
    search.fit(ramp())
    search.save(os.fspath(tmp_path / "index"))
    loaded.load(os.fspath(tmp_path / "index"))
    for one, other in zip(search.run(2, ramp(10)), loaded.run(2, ramp(10)), strict=True):
        np.testing.assert_array_equal(one, other)


# --- scoring ------------------------------------------------------------------------------------------------


def test_scores_are_means_of_squared_distances():
    scorer = NearestNeighbourScorer(3, FaissNN())
    scorer.fit([gaussian(50, 4), gaussian(50, 2, 1)])
    np.testing.assert_array_equal(scorer.detection_features, np.hstack([gaussian(50, 4), gaussian(50, 2, 1)]))
    queries = [gaussian(5, 4, 2), gaussian(5, 2, 3)]
    scores, distances, indices = scorer.predict(queries)
    expected = FaissNN().run(3, np.hstack(queries), scorer.detection_features)
    np.testing.assert_array_equal(distances, expected[0])
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_array_equal(scores, expected[0].mean(axis=-1))
    np.testing.assert_array_equal(scorer.pixelwise_nn(gaussian(2, 3), gaussian(4, 3))[0].shape, (2, 1))


def test_what_was_learnt_from_scores_nothing():
    scorer = NearestNeighbourScorer(1)
    scorer.fit([np.ones((40, 16), np.float32)])
    assert (scorer.predict([np.ones((9, 16), np.float32)])[0] == 0).all()


def test_scorers_share_no_index():
    first, second = NearestNeighbourScorer(1), NearestNeighbourScorer(1)
    first.fit([ramp()])
    assert second.nn_method.search_index is None


@pytest.mark.parametrize("separately", [False, True])
def test_a_saved_scorer_scores_the_same(separately, tmp_path):
    scorer, loaded = NearestNeighbourScorer(2), NearestNeighbourScorer(2)
    scorer.fit([gaussian(20, 4)])
    scorer.save(tmp_path, save_features_separately=separately, prepend="one_")
    names = {"one_nnscorer_search_index.faiss"} | ({"one_nnscorer_features.pkl"} if separately else set())
    assert {file.name for file in tmp_path.iterdir()} == names
    loaded.load(tmp_path, "one_")
    np.testing.assert_array_equal(loaded.predict([gaussian(5, 4, 1)])[0], scorer.predict([gaussian(5, 4, 1)])[0])
    assert hasattr(loaded, "detection_features") == separately
    if separately:
        np.testing.assert_array_equal(loaded.detection_features, gaussian(20, 4))
    scorer.save_and_reset(tmp_path)
    assert scorer.nn_method.search_index is None


def test_features_from_a_stranger_are_read_as_data(tmp_path):
    scorer = NearestNeighbourScorer(1)
    scorer.fit([ramp()])
    scorer.save(tmp_path)
    mark = tmp_path / "mark"
    (tmp_path / "nnscorer_features.pkl").write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(mark))
    with pytest.raises(ModelFileError, match="it must hold one array; got a Record"):
        NearestNeighbourScorer(1).load(tmp_path)
    assert not mark.exists()


# --- selecting ----------------------------------------------------------------------------------------------


def greedy(reduced, nearest, count):
    """The greedy sequence from given distances on, in float64."""
    rows = []
    for _ in range(count):
        rows.append(int(np.argmax(nearest)))
        nearest = np.minimum(nearest, np.linalg.norm(reduced - reduced[rows[-1]], axis=1))
    return rows


def projected(features, width):
    """As patchcore-inspection projects, by torch's global generator."""
    with torch.no_grad():
        mapper = torch.nn.Linear(features.shape[1], width, bias=False)
        return mapper(torch.from_numpy(features)).numpy().astype(np.float64)


def seed_all(seed):
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that patchcore-inspection draws from


@pytest.mark.parametrize("width", [8, 12], ids=["projected", "plain"])
@pytest.mark.parametrize("points", [1, 10, 1000])
def test_the_approximate_sampler_picks_what_its_definition_says(points, width):
    features = gaussian(200, 12)
    seed_all(3)
    reduced = projected(features, width) if width != 12 else features.astype(np.float64)
    start = np.random.choice(200, min(points, 200), replace=False)  # noqa: NPY002
    mean = np.linalg.norm(reduced[:, None] - reduced[start], axis=2).mean(axis=1)
    seed_all(3)
    sampler = ApproximateGreedyCoresetSampler(0.25, torch.device("cpu"), points, width)
    np.testing.assert_array_equal(sampler.run(features), features[greedy(reduced, mean, 50)])


@pytest.mark.parametrize("width", [8, 12], ids=["projected", "plain"])
def test_the_exact_sampler_picks_what_its_definition_says(width):
    features = gaussian(200, 12)
    seed_all(4)
    reduced = projected(features, width) if width != 12 else features.astype(np.float64)
    norms = np.sqrt(np.square(reduced[:, None] - reduced).sum(axis=(1, 2)))
    seed_all(4)
    sampler = GreedyCoresetSampler(0.25, torch.device("cpu"), width)
    np.testing.assert_array_equal(sampler.run(features), features[greedy(reduced, norms, 50)])


def test_the_random_sampler_draws_what_patchcore_inspection_draws():
    features = gaussian(200, 12)
    np.random.seed(5)  # noqa: NPY002
    rows = np.random.choice(200, 20, replace=False)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    np.testing.assert_array_equal(RandomSampler(0.1).run(features), features[rows])


SAMPLERS = [
    RandomSampler(0.1),
    GreedyCoresetSampler(0.1, torch.device("cpu"), 2),
    ApproximateGreedyCoresetSampler(0.1, torch.device("cpu"), 10, 2),
    ApproximateGreedyCoresetSampler(0.1, "cpu", 10, 64),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_samplers_take_distinct_rows_of_what_came_in(sampler):
    ramp_2d = torch.arange(5000).unsqueeze(1) / 5000.0 * torch.ones((5000, 2))
    found = sampler.run(ramp_2d)
    assert isinstance(found, torch.Tensor)
    assert (found.device, found.dtype, found.shape) == (ramp_2d.device, ramp_2d.dtype, (500, 2))
    assert len(torch.unique(found, dim=0)) == 500
    as_array = sampler.run(ramp_2d.numpy())
    assert isinstance(as_array, np.ndarray)
    assert as_array.shape == (500, 2)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
def test_equal_rows_give_as_many_as_were_asked_for(sampler):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sampler.run(torch.ones((500, 2)))
    assert found.shape == (50, 2)


def test_the_identity_takes_all():
    features = gaussian(5, 3)
    assert IdentitySampler().run(features) is features


@pytest.mark.parametrize("percentage", [0, 1, -0.1, 1.5, 1.0, 0.0, float("nan")])
def test_a_percentage_out_of_range_is_a_value_error(percentage):
    for make in (RandomSampler, lambda p: GreedyCoresetSampler(p, "cpu")):
        with pytest.raises(ValueError, match="percentage must be a fraction > 0 and < 1"):
            make(percentage)


# --- folders ------------------------------------------------------------------------------------------------


def fitted(**options):
    chosen = {"profile": "amazon", "backbone": network(), "layers": LAYERS, "embedding": 16, "projection": None}
    return detector(**chosen | options).fit(normal(6))


@pytest.fixture(scope="module")
def model():
    return fitted(patch_size=5)


def stored_parameters(folder, prepend=""):
    return pickle.loads((folder / f"{prepend}patchcore_params.pkl").read_bytes())


def change_parameters(folder, **changes):
    parameters = stored_parameters(folder) | {name.replace("__", "."): value for name, value in changes.items()}
    (folder / "patchcore_params.pkl").write_bytes(pickle.dumps(parameters, pickle.HIGHEST_PROTOCOL))


def test_a_folder_holds_what_patchcore_inspection_reads(model, tmp_path):
    save_folder(model, tmp_path, prepend="one_", backbone="wideresnet50")
    assert {file.name for file in tmp_path.iterdir()} == {
        "one_patchcore_params.pkl",
        "one_nnscorer_search_index.faiss",
    }
    assert stored_parameters(tmp_path, "one_") == {
        "backbone.name": "wideresnet50",
        "layers_to_extract_from": ["1", "3"],
        "input_shape": [3, 32, 32],
        "pretrain_embed_dimension": 16,
        "target_embed_dimension": 16,
        "patchsize": 5,
        "patchstride": 1,
        "anomaly_scorer_num_nn": 1,
    }


def test_a_model_comes_back_from_a_folder_with_equal_scores(model, tmp_path):
    save_folder(model, tmp_path, backbone="wideresnet50")
    loaded = load_folder(tmp_path, backbone=network(), resize=None)
    images = np.concatenate([normal(3, seed=7), flawed(3)])
    expected, found = model.predict(images), loaded.predict(images)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-12)
    np.testing.assert_array_equal(found.maps, expected.maps)
    assert loaded.settings_.profile == "amazon"
    assert loaded.training_.images is None
    again = tmp_path / "again"
    again.mkdir()
    save_folder(loaded, again, backbone="wideresnet50")
    for file in again.iterdir():
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()
    loaded.save(tmp_path / "model.safetensors")
    reloaded = PatchCore.load(tmp_path / "model.safetensors", backbone=network())
    np.testing.assert_array_equal(reloaded.predict(images).scores, found.scores)


def test_scores_are_those_of_the_classes(model, tmp_path):
    """A patch scores its squared distance, an image its largest: what the scorer says of the same features."""
    save_folder(model, tmp_path, backbone="wideresnet50")
    scorer = NearestNeighbourScorer(1)
    scorer.load(tmp_path)
    images = np.concatenate([normal(2, seed=7), flawed(2)])
    features = model.extract(images)
    scores = scorer.predict([features.features])[0].reshape(4, -1)
    np.testing.assert_allclose(model.predict(images).scores, scores.max(axis=1), rtol=1e-6)


def test_images_are_resized_as_the_crop_suggests_unless_told(model, tmp_path):
    save_folder(model, tmp_path, backbone="wideresnet50")
    assert load_folder(tmp_path, backbone=network()).settings_.resize == 37
    change_parameters(tmp_path, input_shape=(3, 320, 320))
    assert load_folder(tmp_path, backbone=network()).settings_.resize == 366
    change_parameters(tmp_path, input_shape=[3, 224, 224])
    loaded = load_folder(tmp_path, backbone=network(), resize=240)
    assert (loaded.settings_.resize, loaded.settings_.crop, loaded.image_size_) == (240, (224, 224), (224, 224))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"patchstride": 2}, "patchstride must be 1; got 2"),
        ({"anomaly_scorer_num_nn": 3}, "anomaly_scorer_num_nn must be 1; got 3"),
        ({"pretrain_embed_dimension": 32}, "pretrain_embed_dimension must be 16; got 32"),
        ({"input_shape": [1, 32, 32]}, "input_shape must be 3, a height and a width"),
        ({"input_shape": [3, 32]}, "input_shape must be 3, a height and a width"),
        ({"patchsize": "3"}, "patchsize is missing or of another kind: '3'"),
        ({"patchsize": True}, "patchsize is missing or of another kind: True"),
        ({"target_embed_dimension": 8, "pretrain_embed_dimension": 8}, "it must have rows of 8 channels"),
    ],
)
def test_what_cannot_be_carried_over_is_named(model, tmp_path, changes, reason):
    save_folder(model, tmp_path, backbone="wideresnet50")
    change_parameters(tmp_path, **changes)
    with pytest.raises(ModelFileError, match=reason):
        load_folder(tmp_path, backbone=network())


def test_a_backbone_that_is_not_known_is_named(model, tmp_path):
    save_folder(model, tmp_path, backbone="bninception")
    with pytest.raises(ModelFileError, match=r"the backbone 'bninception' is not known here; pass backbone="):
        load_folder(tmp_path)
    assert load_folder(tmp_path, backbone=network()).memory_bank_.shape == model.memory_bank_.shape


def test_parameters_from_a_stranger_never_run(model, tmp_path):
    save_folder(model, tmp_path, backbone="wideresnet50")
    mark = tmp_path / "mark"
    file = tmp_path / "patchcore_params.pkl"
    for contents, reason in (
        (b"cos\nsystem\n(S'touch %s'\ntR." % os.fsencode(mark), "it must hold a dict of parameters; got a Record"),
        (b"not a pickle", "no pickle that can be read"),
        (b"]" + b"N" * (1 << 20), "parameters have at most 1048576"),
        (pickle.dumps([1]), "it must hold a dict of parameters; got a list"),
    ):
        file.write_bytes(contents)
        with pytest.raises(ModelFileError, match=reason):
            load_folder(tmp_path)
    assert not mark.exists()


def test_a_missing_file_is_named_with_the_prefixes_that_are_there(model, tmp_path):
    save_folder(model, tmp_path, prepend="Ensemble-1-3_", backbone="wideresnet50")
    with pytest.raises(FileNotFoundError, match="pass prepend= as one of 'Ensemble-1-3_'"):
        load_folder(tmp_path)
    (tmp_path / "Ensemble-1-3_nnscorer_search_index.faiss").unlink()
    with pytest.raises(FileNotFoundError):
        load_folder(tmp_path, prepend="Ensemble-1-3_")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"profile": "paper"}, "distance must be 'squared'"),
        ({"reweight": 3}, "reweight must be None"),
        ({"white_level": 4095}, "white_level and value_range must be 65535 and None; got others. Fit on images of 8"),
        ({"embedding": "concat"}, 'embedding must be a width in a model for patchcore-inspection; got "concat"'),
        ({"standardize": True}, "standardize must be False"),
        ({"sigma": 2.0}, "sigma must be 4.0"),
        ({"border": "reflect"}, "border must be 'symmetric'"),
        ({"upsampling": "nearest"}, "upsampling must be 'bilinear'"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean must be"),
    ],
)
def test_what_patchcore_inspection_has_not_is_named(options, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        save_folder(fitted(**options), tmp_path, backbone="wideresnet50")
    assert not any(tmp_path.iterdir())


def test_a_network_that_patchcore_inspection_does_not_know_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="backbone must be one that patchcore-inspection knows"):
        save_folder(model, tmp_path)
    with pytest.raises(NotFittedError):
        save_folder(PatchCore(), tmp_path)


def test_a_threshold_is_left_out_with_a_warning(tmp_path):
    calibrated = fitted().calibrate(normal(4, seed=5), false_alarm_rate=0.5)
    with pytest.warns(UserWarning, match="the threshold is left out"):
        save_folder(calibrated, tmp_path, backbone="wideresnet50")
    assert load_folder(tmp_path, backbone=network(), resize=None).threshold_ is None


def test_the_names_of_networks_are_those_that_can_be_loaded():
    from torchvision import models

    known = set(models.list_models())
    assert face._BACKBONES["wideresnet50"] == "wide_resnet50_2"
    for name in face._BACKBONES.values():
        assert name in known or name.startswith("timm:")
