"""PatchCore from images to predictions: what it computes, and what it promises under bad input."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from detectors import Images, detector, flawed, normal, pyramid, same, write_folder

from patchcore_rs import PatchCore, Prediction, greedy_coreset
from patchcore_rs._limits import available_memory, estimate_memory
from patchcore_rs.detector.estimator import NotFittedError
from patchcore_rs.features.store import FeatureStore
from patchcore_rs.images.datasets import Dataset, Sample
from patchcore_rs.images.files import ImageError
from patchcore_rs.model.profiles import PROFILES


def features_of(images):
    """Patch features by the definitions: 3 x 3 means, joined, of the normalised pyramid; (n, 64, 9) float64."""
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)) / 255
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    maps = [layer.permute(0, 2, 3, 1).contiguous().numpy() for layer in pyramid((pixels - mean) / std)]
    return oracle.concatenated(maps, 3, 1).reshape(len(images), 64, 9)


@pytest.fixture(scope="module")
def fitted():
    return detector().fit(normal(12))


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", normal(6))


@pytest.mark.parametrize("profile", PROFILES)
def test_a_prediction_is_the_definition(profile):
    model = detector(profile=profile, embedding="concat", projection=None, start=None, seed=5, sigma=2.0)
    train, test = normal(10), np.concatenate([normal(2, 7), flawed(2)])
    result = model.fit(train).predict(test)
    patches = features_of(train).reshape(-1, 9)
    rows = greedy_coreset(patches.astype(np.float32), 0.1, seed=5)
    bank = model.memory_bank_.features
    np.testing.assert_allclose(bank, patches[rows], rtol=1e-5, atol=1e-6)
    queries = features_of(test).astype(np.float32)
    settings = PROFILES[profile]
    power = 2 if settings.distance == "squared" else 1
    scores = [oracle.image_score(image, bank, settings.reweight or 1) ** power for image in queries]
    np.testing.assert_allclose(result.scores, scores, rtol=1e-4)
    grid = np.stack([oracle.nearest(image, bank, 1)[0].reshape(8, 8) ** power for image in queries])
    maps = oracle.anomaly_maps(grid, (32, 32), 2.0, settings.upsampling, settings.border)
    np.testing.assert_allclose(result.maps, maps, rtol=1e-3, atol=1e-5)
    assert (result.scores.dtype, result.maps.dtype) == (np.float64, np.float32)


def test_flaws_score_higher_and_the_map_shows_where(fitted):
    result = fitted.predict(np.concatenate([normal(4, 3), flawed(4)]))
    assert result.scores[4:].min() > 2 * result.scores[:4].max()
    for anomaly_map in result.maps[4:]:
        row, column = np.unravel_index(anomaly_map.argmax(), anomaly_map.shape)
        assert 8 <= row < 20
        assert 4 <= column < 16


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("threads", [1, 2])
def test_the_batch_and_the_threads_do_not_matter(batch_size, threads, fitted):
    model = detector(batch_size=batch_size, threads=threads).fit(normal(12))
    np.testing.assert_array_equal(model.memory_bank_.features, fitted.memory_bank_.features)
    test = np.concatenate([normal(3, 3), flawed(4)])
    same(model.predict(test), fitted.predict(test))
    for i, image in enumerate(test):
        assert model.predict([image]).scores[0] == fitted.predict(test).scores[i]


def test_an_image_of_the_training_set_scores_0_with_the_whole_bank():
    train = normal(4)
    result = detector(coreset=None).fit(train).predict(train)
    assert (result.scores == 0).all()
    assert (result.maps == 0).all()


def test_images_are_not_changed_and_may_be_read_only():
    train = normal(4)
    before = train.copy()
    train.flags.writeable = False
    detector().fit(train).predict(train)
    np.testing.assert_array_equal(train, before)


def sources(folder):
    images = normal(6)
    tensor = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    files = sorted(folder.iterdir())
    samples = tuple(Sample(path, 0, "good") for path in files)
    return {
        "folder": folder,
        "folder as str": str(folder),
        "files": files,
        "files as str": [str(path) for path in files],
        "array": images,
        "arrays": list(images),
        "tensor": tensor,
        "tensors": list(tensor),
        "floats": list(tensor.double() / 255),
        "torch Dataset": Images(images),
        "DataLoader": torch.utils.data.DataLoader(Images(images), batch_size=4),
        "Dataset": Dataset("made", tuple(files), samples),
    }


@pytest.mark.parametrize("kind", sources(Path(__file__).parent))
def test_every_kind_of_input_gives_the_same(kind, folder):
    source = sources(folder)[kind]
    model = detector(coreset=50).fit(source)
    expected = detector(coreset=50).fit(normal(6))
    np.testing.assert_array_equal(model.memory_bank_.features, expected.memory_bank_.features)
    result = model.predict(source)
    same(result, expected.predict(normal(6)))
    named = [path.name for path in result.paths if path is not None]
    assert named == (
        [f"{i}.png" for i in range(6)] if "older" in kind or kind in ("files", "files as str", "Dataset") else []
    )
    assert len(result.paths) == len(result) == 6


def test_a_named_backbone_brings_its_recommendations():
    model = PatchCore(backbone="efficientnet_lite0", resize=(64, 64)).fit(normal(3, size=80))
    assert model.settings_.layers == ("blocks.4", "blocks.10", "blocks.14")
    assert (model.settings_.crop, model.settings_.embedding) == (None, "concat")
    assert model.settings_.mean == (0.5, 0.5, 0.5)
    assert model.memory_bank_.shape == (19, 40 + 112 + 192)
    result = model.predict(np.concatenate([normal(2, 5, size=80), flawed(2, size=80)]))
    assert result.maps.shape == (4, 64, 64)
    assert result.scores[2:].min() > result.scores[:2].max()


def test_a_prediction_tells_what_it_holds(fitted, folder):
    result = fitted.predict(folder)
    assert isinstance(result, Prediction)
    assert len(result) == 6
    assert result.labels is None
    assert result.threshold is None
    assert result.paths == tuple(sorted(folder.iterdir()))
    assert repr(result).startswith("Prediction(6 images, scores ")
    assert "maps 32 x 32" in repr(result)


def test_no_images_give_an_empty_prediction(fitted):
    for empty in ([], np.empty((0, 32, 32, 3), np.uint8), Dataset("made", (), ())):
        result = fitted.predict(empty)
        assert (result.scores.shape, result.maps.shape, result.paths) == ((0,), (0, 32, 32), ())
        assert repr(result) == "Prediction(0 images)"


@pytest.mark.parametrize(
    "use", [lambda m: m.predict(normal(1)), lambda m: m.calibrate(normal(1)), lambda m: m.save("x.safetensors")]
)
def test_an_unfitted_detector_says_so(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFittedError, match=r"call fit\(images\) or PatchCore.load\(path\) first"):
        use(detector())
    assert issubclass(NotFittedError, ValueError)
    assert not list(tmp_path.iterdir())


def test_fitting_on_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no images"):
        detector().fit([])
    with pytest.raises(ValueError, match="no image"):
        detector().fit(tmp_path)
    with pytest.raises(TypeError, match="images must be a folder"):
        detector().fit(42)
    with pytest.raises(FileNotFoundError):
        detector().fit(tmp_path / "missing")


def snapshot(model):
    return {name: value for name, value in vars(model).items() if name.endswith("_") or name == "_fitted"}


def test_a_corrupt_image_is_named_and_the_detector_stays_as_it_was(folder):
    (folder / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    model = detector().fit(normal(4))
    before = snapshot(model)
    with pytest.raises(ImageError, match=r"3\.png"):
        model.fit(folder)
    assert snapshot(model) == before
    with pytest.raises(ImageError, match=r"3\.png"):
        model.predict(folder)
    with pytest.raises(ImageError, match=r"3\.png"):
        model.calibrate(folder)
    assert snapshot(model) == before


@pytest.mark.parametrize("stage", ["features", "coreset"])
def test_an_interrupted_fit_leaves_the_detector_as_it_was(stage):
    def interrupt(current, done, total):
        if current == stage:
            raise KeyboardInterrupt

    model = detector().fit(normal(4))
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        model.fit(normal(9, 2), progress=interrupt)
    assert snapshot(model) == before
    with pytest.raises(KeyboardInterrupt):
        detector().fit(normal(9, 2), progress=interrupt)


def test_images_that_cannot_be_read_are_skipped_with_a_report(folder):
    expected = detector(coreset=40).fit([image for i, image in enumerate(normal(6)) if i not in (1, 3)])
    (folder / "1.png").write_bytes(b"")
    (folder / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.warns(UserWarning, match=r"2 of 6 images were left out; the first: .*1\.png") as caught:
        model = detector(coreset=40, batch_size=2).fit(folder, on_error="skip")
    assert len(caught) == 1
    np.testing.assert_array_equal(model.memory_bank_.features, expected.memory_bank_.features)
    assert [Path(name).name for name, _ in model.skipped_] == ["1.png", "3.png"]
    assert all(reason for _, reason in model.skipped_)
    with pytest.warns(UserWarning, match="2 of 6 images were left out"):
        result = model.predict(folder, on_error="skip")
    assert [path.name for path in result.paths] == ["0.png", "2.png", "4.png", "5.png"]
    assert len(result.skipped) == 2
    assert "2 skipped" in repr(result)
    with pytest.warns(UserWarning, match="2 of 6 images were left out"):
        model.calibrate([*sorted(folder.iterdir())[1:4:2], *normal(4, 5)], false_alarm_rate=0.5, on_error="skip")
    assert model.calibration_.images == 4


@pytest.mark.parametrize(
    ("content", "error"), [(b"", ImageError), (b"GIF89a", ImageError), (b"text", ImageError), (None, FileNotFoundError)]
)
def test_a_header_that_is_no_images_is_met_before_any_work(folder, content, error):
    def fail(*_):
        pytest.fail("images were read before")

    if content is None:
        (folder / "5.png").unlink()
    else:
        (folder / "5.png").write_bytes(content)
    images = [folder / f"{i}.png" for i in range(6)]
    model = detector(batch_size=1).fit(normal(6))
    before = model.predict(normal(2)).scores
    for call in (model.fit, model.partial_fit, model.calibrate, model.predict, model.extract):
        with pytest.raises(error, match=r"5\.png"):
            call(images, progress=fail)
    assert model.predict(normal(2)).scores.tolist() == before.tolist()


def test_if_every_image_is_skipped_there_is_nothing_to_learn(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(b"no image")
    with (
        pytest.warns(UserWarning, match="2 of 2 images"),
        pytest.raises(ValueError, match=r"none of the 2 images can be read; the first: .*a\.png"),
    ):
        detector().fit(tmp_path, on_error="skip")


def test_on_error_is_checked():
    with pytest.raises(ValueError, match='on_error must be "raise" or "skip"; got \'ignore\''):
        detector().fit(normal(2), on_error="ignore")


def test_images_of_another_size_are_named(fitted):
    with pytest.raises(ValueError, match=r"images\[1\]: 40 x 32 pixels .* where 32 x 32 is expected .* set resize="):
        detector().fit([normal(1)[0], np.zeros((40, 32, 3), np.uint8)])
    with pytest.raises(ValueError, match=r"images\[0\]: 32 x 64 pixels"):
        fitted.predict([np.zeros((32, 64, 3), np.uint8)])


def test_an_image_of_another_size_takes_nothing_from_the_others(fitted):
    images = [*normal(2), np.zeros((40, 32, 3), np.uint8), *normal(2)]
    with pytest.warns(UserWarning, match=r"1 of 5 images were left out; the first: images\[2\]"):
        result = fitted.predict(images, on_error="skip")
    np.testing.assert_array_equal(result.scores, fitted.predict([*normal(2), *normal(2)]).scores)
    assert [(name, "40 x 32 pixels" in reason) for name, reason in result.skipped] == [("images[2]", True)]
    with pytest.warns(UserWarning, match="1 of 5 images were left out"):
        model = detector(coreset=9).fit(images, on_error="skip")
    assert [name for name, _ in model.skipped_] == ["images[2]"]


def test_b_is_lowered_to_a_small_bank_with_one_warning():
    with pytest.warns(UserWarning, match="reweight=9 exceeds the 4 rows of the memory bank") as caught:
        model = detector(coreset=4).fit(normal(3))
    assert len(caught) == 1
    expected = detector(coreset=4, reweight=4).fit(normal(3))
    same(model.predict(flawed(3)), expected.predict(flawed(3)))
    one_row = detector(coreset=1, reweight=1).fit(normal(3))
    plain = detector(coreset=1, reweight=None).fit(normal(3))
    same(one_row.predict(flawed(3)), plain.predict(flawed(3)))


def test_progress_tells_stage_done_and_total(fitted):
    calls = []
    detector(batch_size=5).fit(normal(12), progress=lambda *call: calls.append(call))
    assert [call for call in calls if call[0] == "features"] == [("features", n, 12) for n in (5, 10, 12)]
    assert calls[-1] == ("coreset", 76, 76)
    loader = torch.utils.data.DataLoader(Images(normal(4)), batch_size=3)
    calls.clear()
    fitted.predict(loader, progress=lambda *call: calls.append(call))
    assert calls == [("scores", 4, None)]


def test_the_stages_are_timed(fitted):
    model = detector().fit(normal(3))
    after_fit = dict(model.timings_)
    assert set(after_fit) == {"backbone", "aggregation", "coreset", "scoring"}
    assert all(after_fit[stage] > 0 for stage in ("backbone", "aggregation", "coreset"))
    model.predict(normal(3))
    assert model.timings_["scoring"] > after_fit["scoring"] == 0
    assert model.timings_["coreset"] == after_fit["coreset"]


def test_threads_share_one_detector():
    model = detector(threads=1).fit(normal(6))
    tests = [np.concatenate([normal(3, seed), flawed(2, seed)]) for seed in range(12)]
    expected = [model.predict(test) for test in tests]
    with ThreadPoolExecutor(4) as pool:
        for result, alone in zip(pool.map(model.predict, tests), expected, strict=True):
            same(result, alone)


def test_memory_is_estimated_before_it_is_taken(monkeypatch):
    assert estimate_memory(1000, 64, 100) >= 4 * 64 * 1100
    assert available_memory() is None or available_memory() > 0
    monkeypatch.setattr("patchcore_rs._limits.available_memory", lambda: 10_000)
    with pytest.raises(MemoryError, match=r"for 768 patches of 9 float32 channels .* 0\.00 GB are available"):
        detector().fit(normal(12))
    monkeypatch.setattr("patchcore_rs._limits.available_memory", lambda: None)
    assert len(detector(coreset=None).fit(normal(2)).memory_bank_) == 128


@pytest.mark.parametrize("images", [None, 10, 2, 40])
def test_features_gather_in_one_array_whatever_was_expected(images):
    rng = np.random.default_rng(0)
    chunks = [rng.normal(size=(4 * n, 5)).astype(np.float32) for n in (3, 3, 3, 1)]
    store = FeatureStore(images, None)
    for chunk in chunks:
        store.append(chunk, len(chunk) // 4)
    np.testing.assert_array_equal(store.finish(), np.concatenate(chunks))
