"""Models go from anomalib to `PatchCore` and back with equal scores. Needs anomalib, with all it depends on."""

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

pytest.importorskip("anomalib", reason="needs anomalib: make test-peers")
pytestmark = pytest.mark.filterwarnings("ignore")

from anomalib.models.image.patchcore.lightning_model import Patchcore
from anomalib.pre_processing import PreProcessor
from anomalib_models import BACKBONE, LAYERS, images, patchcore
from torchvision.transforms import v2

from patchcore_rs import PatchCore
from patchcore_rs.compat import anomalib as face
from patchcore_rs.compat.anomalib import accelerate, from_anomalib, to_anomalib

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
VERSION = tuple(map(int, metadata.version("anomalib").split(".")[:2]))


@pytest.mark.skipif(VERSION < (2, 1), reason="anomalib 2.0 collects embeddings in its engine alone")
def test_the_example_of_the_docs_runs(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: create(*args, **kwargs | {"pretrained": False}))
    text = (Path(__file__).parents[2] / "DIFFERENCES.md").read_text("utf-8").partition("\n## anomalib\n")[2]
    example = text.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(compile(example, "DIFFERENCES.md", "exec"), names)
    assert len(example.splitlines()) <= 10
    assert len(names["ours"].memory_bank_) == len(names["theirs"].model.memory_bank) == 2 * 32 * 32 // 10


def preparation(*, crop=None):
    crops = [v2.CenterCrop(crop)] if crop else []
    return PreProcessor(transform=v2.Compose([v2.Resize((72, 80), antialias=True), *crops, v2.Normalize(MEAN, STD)]))


def lightning(kind=Patchcore, **arguments):
    torch.manual_seed(0)
    given = {"pre_processor": preparation(), "num_neighbors": 3, "coreset_sampling_ratio": 0.25} | arguments
    model = kind(backbone=BACKBONE, layers=list(LAYERS), pre_trained=False, visualizer=False, evaluator=False, **given)
    inner = patchcore()
    model.model.load_state_dict(inner.state_dict())
    model._is_fitted = torch.tensor([True])
    if model.post_processor is not None and hasattr(model.post_processor, "_image_threshold"):
        model.post_processor._image_threshold = torch.tensor(2.5)
    return model.eval()


def pictures(count=3):
    return [image.numpy() for image in images(count, side=90, seed=4)]


def prediction_of(theirs, pictures):
    """anomalib's scores and maps as its `Engine` makes them, before it normalises them.

    Its `forward`, which it exports, resizes without antialiasing.
    """
    with torch.inference_mode():
        found = theirs.model(theirs.pre_processor.transform(torch.from_numpy(np.stack(pictures))))
    return found.pred_score.numpy(), found.anomaly_map[:, 0].numpy()


def agree(ours, theirs):
    shots = pictures()
    found = ours.predict([torch.from_numpy(shot) for shot in shots])
    scores, maps = prediction_of(theirs, shots)
    np.testing.assert_allclose(found.scores, scores, rtol=1e-5)
    np.testing.assert_allclose(found.maps, maps, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_neighbors": 1}, {"pre_processor": preparation(crop=(64, 70))}],
    ids=["plain", "Eq. 6", "crop"],
)
def test_a_live_model_scores_the_same(arguments):
    theirs = lightning(**arguments)
    ours = from_anomalib(theirs)
    agree(ours, theirs)
    assert ours.threshold_ == np.nextafter(2.5, np.inf)
    assert ours.settings_.coreset == 0.25
    assert len(ours.memory_bank_) == len(theirs.model.memory_bank)


def test_an_accelerated_model_scores_the_same():
    theirs = lightning(face.Patchcore)
    agree(from_anomalib(theirs), theirs)


def test_what_to_torch_writes_scores_the_same(tmp_path):
    theirs = accelerate(lightning())
    path = theirs.to_torch(tmp_path)
    agree(from_anomalib(path), theirs)


def test_a_checkpoint_scores_the_same(tmp_path):
    from lightning.pytorch import Trainer

    theirs = lightning()
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(theirs)
    trainer.save_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    agree(from_anomalib(tmp_path / "model.ckpt"), theirs)


def test_a_model_saved_afterwards_scores_the_same(tmp_path):
    theirs = lightning()
    ours = from_anomalib(theirs)
    ours.save(tmp_path / "model.safetensors")
    network = theirs.model.feature_extractor.feature_extractor
    again = PatchCore.load(tmp_path / "model.safetensors", backbone=network)
    agree(again, theirs)


def test_there_and_back_scores_the_same():
    theirs = lightning()
    back = to_anomalib(from_anomalib(theirs))
    assert type(back) is Patchcore
    for one, other in zip(prediction_of(back, pictures()), prediction_of(theirs, pictures()), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    assert float(back.post_processor._image_threshold) == 2.5


def test_a_model_of_this_package_goes_over():
    shots = list(images(6, side=90, seed=9))
    arguments = {"resize": (72, 80), "crop": None, "weights": None, "coreset": 0.3}
    torch.manual_seed(1)
    ours = PatchCore(profile="anomalib", backbone="timm:resnet18", layers=LAYERS, **arguments).fit(shots)
    agree(ours, to_anomalib(ours))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre_processor": False}, "preparation of its images"),
        ({"pre_processor": PreProcessor(transform=v2.Resize(64))}, "to a height and a width"),
        (
            {"pre_processor": PreProcessor(transform=v2.Compose([v2.Grayscale(), v2.Resize((64, 64))]))},
            "in this order; got Grayscale",
        ),
    ],
)
def test_a_preparation_that_cannot_be_carried_over_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        from_anomalib(lightning(**changes))


def test_an_empty_bank_is_refused():
    theirs = lightning()
    theirs.model.memory_bank = torch.empty(0)
    with pytest.raises(ValueError, match="its memory bank is empty"):
        from_anomalib(theirs)


def test_another_object_is_refused():
    with pytest.raises(TypeError, match=r"must be a Patchcore or PatchcoreModel of anomalib, .*; got Linear"):
        from_anomalib(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(("setting", "value"), [("upsampling", "bilinear"), ("sigma", 2.0), ("distance", "squared")])
def test_a_setting_that_anomalib_has_not_is_named(setting, value):
    shots = [torch.from_numpy(shot) for shot in pictures()]
    arguments = {"resize": (64, 64), "crop": None, "weights": None, "coreset": 50, setting: value}
    ours = PatchCore(profile="anomalib", backbone="timm:resnet18", layers=LAYERS, **arguments).fit(shots)
    with pytest.raises(ValueError, match=f"{setting} must be .* as anomalib has it; got"):
        to_anomalib(ours)


@pytest.mark.parametrize(("setting", "value"), [("white_level", 4095), ("value_range", (0.0, 2.0))])
def test_levels_that_anomalib_has_not_are_named(setting, value):
    shots = [torch.from_numpy(shot) for shot in pictures()]
    arguments = {"resize": (64, 64), "crop": None, "weights": None, "coreset": 50, setting: value}
    ours = PatchCore(profile="anomalib", backbone="timm:resnet18", layers=LAYERS, **arguments).fit(shots)
    with pytest.raises(ValueError, match="white_level and value_range must be 65535 and None, as anomalib has no such"):
        to_anomalib(ours)
