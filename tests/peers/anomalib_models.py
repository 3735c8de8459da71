"""Small models of anomalib with random weights, and what a call comes to, for comparisons."""

import copy
import inspect

import numpy as np
import torch
from torch import nn

BACKBONE, LAYERS = "resnet18", ("layer1", "layer2")


def patchcore(rows=300, **arguments):
    """anomalib's torch model with a bank of its own embeddings."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    torch.manual_seed(0)
    model = PatchcoreModel(layers=list(LAYERS), backbone=BACKBONE, pre_trained=False, **arguments)
    model.train()
    embedding = model(images(4, seed=1))
    getattr(model, "embedding_store", []).clear()
    model.memory_bank = embedding[torch.randperm(len(embedding))[:rows]].clone()
    return model.eval()


def images(count=2, side=64, seed=2):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


class Encoder(nn.Module):
    """Stands for a network whose weights would be fetched: tokens of 14 x 14 pixels, in both forms there are."""

    patch_size = 14

    def __init__(self, width=48):
        super().__init__()
        torch.manual_seed(5)
        self.project = nn.Conv2d(3, width, 14, 14)

    def forward(self, batch):
        return {f"blocks.{block}": self._tokens(batch) for block in (11, 23)}

    def get_intermediate_layers(self, batch, n):
        return [self._tokens(batch)]

    def _tokens(self, batch):
        with torch.no_grad():
            return self.project(batch).flatten(2).transpose(1, 2)

    @classmethod
    def from_name(cls, name):
        return cls()


def anomaly_dino(monkeypatch, *, rows=200, **arguments):
    from anomalib.models.image.anomaly_dino import torch_model

    for name in ("TimmFeatureExtractor", "DinoV2Loader"):
        if hasattr(torch_model, name):
            stand_in = Encoder if name == "DinoV2Loader" else lambda **_: Encoder()
            monkeypatch.setattr(torch_model, name, stand_in)
    model = torch_model.AnomalyDINOModel(**arguments).train()
    model(images(4, side=140, seed=1))
    model.fit()
    model.memory_bank = model.memory_bank[:rows].clone()
    return model.eval()


def plain(model):
    """anomalib's own model with the same values: what a copy of an accelerated one is."""
    return copy.deepcopy(model)


def in_float64(model):
    """anomalib's own formulae in float64."""
    return copy.deepcopy(model).double()


def outcome(call):
    """What a call returns, or the type and the text of its error."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def same(one, other):
    """Whether two outcomes are equal to the bit, NaN being equal to NaN."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(bits(one), bits(other))
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def bits(tensor):
    return torch.from_numpy(np.frombuffer(tensor.detach().contiguous().numpy().tobytes(), np.uint8).copy())


def traced(model, batch):
    """What a trace of a forward pass is: of those parts of its answer that are there."""

    class Present(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return present(self.model(batch))

    return torch.jit.trace(Present(), batch, check_trace=False)


def present(answer):
    """The parts of an answer that are there."""
    return tuple(value for value in answer if value is not None)


def subsample(model, embedding, ratio):
    """`subsample_embedding` in the form that the installed version has."""
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    parameters = list(inspect.signature(PatchcoreModel.subsample_embedding).parameters)
    if parameters[1] == "embedding":  # 2.0
        model.subsample_embedding(embedding, ratio)
        return
    if hasattr(model, "embedding_store"):
        model.embedding_store[:] = [embedding]
    else:  # 2.1
        model.memory_bank = embedding
    model.subsample_embedding(ratio)


def states():
    """The states of the generators that a selection draws from."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), np.random.get_state()[2]


def seed_all():
    torch.manual_seed(3)
    np.random.seed(3)
