"""`patchcore-rs convert`: folders of patchcore-inspection become model files and back, with equal scores."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from detectors import flawed, normal, same, write_folder

from patchcore_rs import PatchCore
from patchcore_rs.cli import main as cli
from patchcore_rs.compat import patchcore_inspection as face
from patchcore_rs.compat.anomalib import from_anomalib

SIZES = {"resize": 32, "crop": 32}


def run(*arguments):
    return CliRunner().invoke(cli.main, ["convert", *(str(argument) for argument in arguments)])


def succeed(*arguments):
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def fails(*arguments):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(scope="module", autouse=True)
def small_network():
    """Their name of EfficientNet-Lite0, which has its weights with it and which patchcore-inspection does not know."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(face._BACKBONES, "lite0", "efficientnet_lite0")
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model that patchcore-inspection could have, and its file."""
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    options = {"profile": "amazon", "backbone": "efficientnet_lite0", "embedding": 32, "projection": None}
    options |= {"mean": face._IMAGENET["mean"], "std": face._IMAGENET["std"]}
    fitted = PatchCore(**options, **SIZES).fit(normal(4))
    fitted.save(path)
    return fitted, path


def test_a_model_goes_to_a_folder_and_comes_back_with_equal_scores(model, tmp_path):
    fitted, path = model
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    result = succeed(path, folder)
    rows, channels = fitted.memory_bank_.shape
    assert result.stdout == f"{folder}: {rows:,} patches of {channels:,} channels from {path}\n"
    assert "resize images to 32 there" in result.stderr
    assert {file.name for file in folder.iterdir()} == {"patchcore_params.pkl", "nnscorer_search_index.faiss"}
    facts = json.loads(succeed(folder, back, "--resize", 32, "--json").stdout)
    assert (facts["program"], facts["threshold"]) == ("patchcore-inspection", None)
    assert facts["bank"] == {"rows": rows, "channels": channels}
    images = np.concatenate([normal(2, seed=7), flawed(2)])
    expected, found = fitted.predict(images), PatchCore.load(back).predict(images)
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-12)
    np.testing.assert_array_equal(found.maps, expected.maps)


def test_a_prefix_names_the_files(model, tmp_path):
    folder = tmp_path / "folder"
    assert succeed(model[1], folder, "--prepend", "one_", "-q").stderr == ""
    assert {file.name for file in folder.iterdir()} == {"one_patchcore_params.pkl", "one_nnscorer_search_index.faiss"}
    assert "pass --prepend as one of 'one_'" in fails(folder, tmp_path / "m.safetensors")
    succeed(folder, tmp_path / "m.safetensors", "--prepend", "one_")


def test_what_cannot_be_converted_is_one_line_that_names_it(model, tmp_path):
    other = tmp_path / "other.safetensors"
    PatchCore(backbone="efficientnet_lite0", reweight=3, **SIZES).fit(normal(4)).save(other)
    text = tmp_path / "text"
    text.write_text("no model")
    target = tmp_path / "target"
    cases = [
        ((other, target), "distance must be 'squared' in a model for patchcore-inspection"),
        ((text, target), f"{text}: not a safetensors file"),
        ((tmp_path, target), "patchcore_params.pkl is missing"),
        ((model[1], target, "--resize", 40), "leave out --resize"),
        ((tmp_path, tmp_path / "no" / "m.safetensors"), "the folder to write to does not exist"),
        ((tmp_path / "missing", target), "does not exist"),
    ]
    for arguments, message in cases:
        assert message in fails(*arguments), arguments
    assert not (tmp_path / "target" / "patchcore_params.pkl").exists()


def test_a_file_of_anomalib_is_converted_with_its_weights(tmp_path):
    """A checkpoint with what anomalib's have in it, by its own names."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    network = timm.create_model("resnet18", pretrained=False, features_only=True, out_indices=(1, 2))
    held = {f"model.feature_extractor.feature_extractor.{name}": value for name, value in network.state_dict().items()}
    held["model.memory_bank"] = torch.rand(20, 64 + 128)
    held["model.anomaly_map_generator.blur.kernel"] = torch.ones(1, 1, 33, 33) / 33**2
    given = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "num_neighbors": 3, "coreset_sampling_ratio": 0.1}
    source, target = tmp_path / "model.ckpt", tmp_path / "a model.safetensors"
    torch.save({"state_dict": held, "hyper_parameters": given | {"precision": "float32"}}, source)
    weights = tmp_path / "a model.weights.pth"
    assert f"--weights '{weights}'" in succeed(source, target).stderr
    write_folder(tmp_path / "images", normal(2))
    loaded = PatchCore.load(target, weights=weights)
    expected = from_anomalib(source).predict(tmp_path / "images")
    same(loaded.predict(tmp_path / "images"), expected)
    words = ["predict", target, tmp_path / "images", "--weights", weights, "--json"]
    result = CliRunner().invoke(cli.main, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert len(expected.scores) == 2
    stated = json.loads(succeed(source, target, "--json").stdout)
    assert (stated["program"], stated["weights"]) == ("anomalib", str(weights))
    source.rename(weights)
    assert "whose weights go beside it" in fails(weights, target)
    held["model.memory_bank"] = torch.empty(0, 64 + 128)
    torch.save({"state_dict": held, "hyper_parameters": given | {"precision": "float32"}}, source)
    assert "must be fitted" in fails(source, tmp_path / "empty.safetensors")
    assert not list(tmp_path.glob("empty*"))  # refused before anything is written


def test_a_file_of_torch_goes_to_the_face_of_anomalib(tmp_path):
    """Whatever it holds: without anomalib's model in it, it is refused by name, and nothing in it runs."""
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, path)
    assert str(path) in fails(path, tmp_path / "m.safetensors")
    assert "leave out --resize" in fails(path, tmp_path / "m.safetensors", "--resize", 40)
