"""The parameters of PatchCore: what each may be, what its default stands for, what it does to the bank."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from detectors import detector, flawed, normal

from patchcore_rs import PatchCore
from patchcore_rs.backbones.backbone import Backbone
from patchcore_rs.coreset import johnson_lindenstrauss_width
from patchcore_rs.features.standardization import channel_statistics
from patchcore_rs.model.profiles import PROFILES
from patchcore_rs.model.settings import check, resolve

PAPER = Backbone("paper-like", lambda images: [images], (), embedding=1024)
LITE = Backbone("lite-like", lambda images: [images], (), resize=(224, 224), crop=None)
LARGE = Backbone("inception-like", lambda images: [images], (), resize=342, crop=299)
SHORT = Backbone("resized only", lambda images: [images], (), resize=240, crop=None)
AS_IS = Backbone("never resized", lambda images: [images], (), resize=None, crop=None)


CHOICES = {
    # profile, backbone: resize, crop, resampling, embedding, projection, start, reweight, distance, upsampling, border
    ("paper", PAPER): (256, 224, "pil", 1024, None, None, 9, "euclidean", "bilinear", "symmetric"),
    ("amazon", PAPER): (256, 224, "pil", 1024, 128, "mean10", None, "squared", "bilinear", "symmetric"),
    ("anomalib", PAPER): (
        *((256, 256), None, "tensor", "concat", "johnson-lindenstrauss", None, 9, "euclidean", "nearest", "reflect"),
    ),
    ("paper", LITE): ((224, 224), None, "pil", "concat", None, None, 9, "euclidean", "bilinear", "symmetric"),
    ("amazon", LITE): ((224, 224), None, "pil", "concat", 128, "mean10", None, "squared", "bilinear", "symmetric"),
    ("anomalib", LITE): (
        *((224, 224), None, "tensor", "concat", "johnson-lindenstrauss", None, 9, "euclidean", "nearest", "reflect"),
    ),
}
NAMES = (
    "resize",
    "crop",
    "resampling",
    "embedding",
    "projection",
    "start",
    "reweight",
    "distance",
    "upsampling",
    "border",
)


def settled(model, backbone):
    """The settings of a detector with that backbone."""
    return resolve(check(model.get_params(), "patchcore"), backbone, "patchcore")


@pytest.mark.parametrize(("profile", "backbone"), CHOICES, ids=lambda value: getattr(value, "name", value))
def test_profiles_resolve_as_the_table_says(profile, backbone):
    model = PatchCore(profile=profile, backbone=backbone)
    settings = settled(model, backbone)
    assert tuple(getattr(settings, name) for name in NAMES) == CHOICES[profile, backbone]


@pytest.mark.parametrize(
    ("backbone", "size"),
    [(PAPER, (224, 224)), (LITE, (224, 224)), (LARGE, (299, 299)), (SHORT, (240, 240)), (AS_IS, None)],
)
def test_the_default_profile_is_the_papers_on_the_whole_image_for_every_backbone(backbone, size):
    settings = settled(PatchCore(backbone=backbone), backbone)
    paper = settled(PatchCore(profile="paper", backbone=backbone), backbone)
    assert settings == dataclasses.replace(paper, profile="inspect", resize=size, crop=None)


def test_the_profile_decides_for_the_backbone_it_names():
    other = Backbone("timm:wide_resnet50_2.racm_in1k", lambda images: [images], (), resize=235, embedding=1024)
    model = PatchCore(profile="anomalib")
    assert settled(model, other).resize == (256, 256)
    model = PatchCore(profile="anomalib", backbone="timm:another")
    assert settled(model, other).resize == 235
    assert settled(model, other).crop == 224


def test_an_explicit_argument_wins_over_backbone_and_profile():
    explicit = {
        "resize": None,
        "crop": (20, 24),
        "resampling": "tensor",
        "mean": (0.0, 0.1, 0.2),
        "std": (1.0, 2.0, 3.0),
        "embedding": 7,
        "projection": 5,
        "projection_kind": "gaussian",
        "start": 3,
        "reweight": None,
        "distance": "euclidean",
        "upsampling": "nearest",
        "border": "reflect",
        "clip": True,
    }
    for profile in PROFILES:
        settings = settled(PatchCore(profile=profile, backbone=LITE, **explicit), LITE)
        assert {name: getattr(settings, name) for name in explicit} == explicit


def test_a_fitted_amazon_profile_squares_and_does_not_reweight():
    squared = detector(profile="amazon", embedding="concat", projection=None, start=None).fit(normal(5))
    plain = detector(reweight=None).fit(normal(5))
    np.testing.assert_allclose(squared.predict(flawed(2)).scores, plain.predict(flawed(2)).scores ** 2)


def test_the_johnson_lindenstrauss_width_is_scikit_learns():
    random_projection = pytest.importorskip("sklearn.random_projection")
    for rows in (2, 784, 163_856):
        expected = random_projection.johnson_lindenstrauss_min_dim(rows, eps=0.9)
        assert johnson_lindenstrauss_width(rows, 1536) == expected
    assert johnson_lindenstrauss_width(163_856, 200) is None
    assert johnson_lindenstrauss_width(1, 200) is None
    assert detector(projection="johnson-lindenstrauss", embedding="concat").fit(normal(2)).memory_bank_.shape == (12, 9)


BAD = {
    "profile": ("best", "profile must be one of 'inspect', 'paper', 'amazon', 'anomalib'; got 'best'"),
    "layers": ("layer2", r"layers must be distinct module names such as \('layer2', 'layer3'\); got 'layer2'"),
    "resize": (0, r"resize must be an integer \(the shorter side\), a pair"),
    "crop": ((224, 224, 3), "crop must be an integer"),
    "resampling": ("cv2", "resampling must be one of 'pil', 'tensor'; got 'cv2'"),
    "mean": ((0.5, 0.5), "mean must be three numbers"),
    "std": ((0.0, 1.0, 1.0), "std must be a number > 0"),
    "embedding": (0, 'embedding must be an integer from 1 to 65536 or "concat"; got 0'),
    "patch_size": (2.0, "patch_size must be an integer from 1 to 255; got 2.0"),
    "standardize": (1, "standardize must be True or False; got 1"),
    "coreset": (0.0, r"coreset must be a count \(int >= 1\), a fraction \(0 < float <= 1\), or None for all; got 0.0"),
    "coreset_method": ("learned", "coreset_method must be one of 'greedy', 'random'"),
    "projection": (-1, "projection must be a width"),
    "projection_kind": ("dense", "projection_kind must be one of 'sparse', 'gaussian'"),
    "start": ("first", 'start must be a row .int >= 0., "mean", "mean10", or None'),
    "reweight": (0, "reweight must be an integer from 1 to 65536, the b of Eq. 7, or None; got 0"),
    "distance": ("cosine", "distance must be one of 'euclidean', 'squared'"),
    "upsampling": ("cubic", "upsampling must be one of 'bilinear', 'nearest'"),
    "border": ("wrap", "border must be one of 'symmetric', 'reflect'"),
    "sigma": (-1.0, "sigma must be a number >= 0 and <= 1000; got -1.0"),
    "normalize": ("yes", "normalize must be True or False"),
    "clip": (1, "clip must be True or False; got 1"),
    "index": ("hnsw", "index must be one of 'exact', 'ivfpq'"),
    "autocast": (None, "autocast must be True or False"),
    "batch_size": (True, "batch_size must be an integer from 1 to 65536; got True"),
    "threads": (65537, "threads must be an integer from 1 to 65536, or None for all; got 65537"),
    "seed": (-1, "seed must be an integer from 0 to"),
    "device": ("quantum", "device='quantum' cannot be used here"),
}


# Those of the wrong type; of the others the value cannot be used.
WRONG_TYPE = {"layers", "patch_size", "standardize", "normalize", "clip", "autocast", "batch_size"}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_stored_and_refused_by_fit(name):
    value, message = BAD[name]
    model = detector(**{name: value})
    assert getattr(model, name) is value
    with pytest.raises(TypeError if name in WRONG_TYPE else ValueError, match=message):
        model.fit(normal(2))
    assert "_fitted" not in vars(model)


@pytest.mark.parametrize("coreset", [1.5, -0.1, float("nan"), True, "10%", 0, np.float64(2)])
def test_bad_coresets_are_refused(coreset):
    wrong_type = isinstance(coreset, bool | str)
    with pytest.raises(TypeError if wrong_type else ValueError, match="coreset must be a count"):
        detector(coreset=coreset).fit(normal(2))


def test_a_fraction_of_no_row_and_a_count_of_too_many_are_refused():
    with pytest.raises(ValueError, match=r"amount 0\.001 of 128 rows is no row at all"):
        detector(coreset=0.001).fit(normal(2))
    with pytest.raises(ValueError, match="amount must be at most the 128 rows of features; got 129"):
        detector(coreset=129).fit(normal(2))


def test_arguments_are_keywords_and_repr_shows_what_is_not_the_default():
    with pytest.raises(TypeError):
        PatchCore("amazon")
    assert repr(PatchCore()) == "PatchCore()"
    assert repr(PatchCore(coreset=1, resize=None)) == "PatchCore(resize=None, coreset=1)"
    model = PatchCore(profile="amazon", mean=(0.5, 0.5, 0.5))
    assert PatchCore(**model.get_params()).get_params() == model.get_params()


@pytest.mark.parametrize(("coreset", "rows"), [(None, 320), (0.1, 32), (1.0, 320), (7, 7), (np.int64(7), 7)])
@pytest.mark.parametrize("method", ["greedy", "random"])
def test_coresets_have_the_size_asked_for(coreset, rows, method):
    model = detector(coreset=coreset, coreset_method=method, reweight=1).fit(normal(5))
    assert len(model.memory_bank_) == rows
    everything = {row.tobytes() for row in detector(coreset=None).fit(normal(5)).memory_bank_.features}
    chosen = [row.tobytes() for row in model.memory_bank_.features]
    assert len(set(chosen)) == rows
    assert set(chosen) <= everything


def test_a_seed_decides_the_coreset():
    for method in ("greedy", "random"):
        banks = [
            detector(coreset=0.05, coreset_method=method, seed=seed).fit(normal(5)).memory_bank_.features
            for seed in (0, 0, 1)
        ]
        np.testing.assert_array_equal(banks[0], banks[1])
        assert not np.array_equal(banks[0], banks[2])


def test_standardised_features_have_mean_0_and_deviation_1():
    bank = detector(standardize=True, coreset=None).fit(normal(8)).memory_bank_.features
    np.testing.assert_allclose(bank.mean(axis=0, dtype=np.float64), 0, atol=1e-5)
    np.testing.assert_allclose(bank.std(axis=0, dtype=np.float64), 1, rtol=1e-4)


def test_channel_statistics_sum_in_float64_and_spare_constant_channels():
    rng = np.random.default_rng(0)
    features = (rng.normal(size=(9000, 4)) * [1, 1e-3, 1e3, 0] + [1e4, 1, -5e5, 0.1]).astype(np.float32)
    mean, deviation = channel_statistics(features)
    np.testing.assert_allclose(mean, features.mean(axis=0, dtype=np.float64), rtol=1e-7)
    expected = features.std(axis=0, dtype=np.float64)
    np.testing.assert_allclose(deviation[:3], expected[:3], rtol=1e-6)
    assert deviation[3] == 1
    assert mean.dtype == deviation.dtype == np.float32
