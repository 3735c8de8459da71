"""The smallest classes that promise what anomalib's do, for tests where anomalib is not installed."""

import sys
from types import ModuleType

import torch
from torch import nn
from torch.nn import functional

SIGMA = 2.0


class KCenterGreedy:
    start_counts = True  # as from 2.4 on

    def __init__(self, embedding, sampling_ratio):
        self.embedding, self.coreset_size = embedding, int(len(embedding) * sampling_ratio)
        self.min_distances = None

    def update_distances(self, cluster_center):
        distances = torch.linalg.norm(self.features - self.features[cluster_center], dim=1)
        self.min_distances = distances if self.min_distances is None else torch.minimum(self.min_distances, distances)

    def select_coreset_idxs(self):
        self.features = self.embedding @ torch.randn(self.embedding.shape[1], 8)
        self.min_distances = None
        pick = int(torch.randint(len(self.features), (1,)))
        picks = [pick] if self.start_counts else []
        while len(picks) < self.coreset_size:
            self.update_distances(pick)
            pick = int(self.min_distances.argmax())
            self.min_distances[pick] = 0
            picks.append(pick)
        return picks

    def sample_coreset(self):
        return self.embedding[self.select_coreset_idxs()]


class Blur(nn.Module):
    def __init__(self, kernel_size, sigma, channels=1):
        super().__init__()
        positions = torch.arange(kernel_size[0]) - kernel_size[0] // 2
        weights = torch.exp(-(positions.double() ** 2) / (2 * sigma[0] ** 2))
        weights = (weights / weights.sum()).float()
        self.register_buffer("kernel", (weights[:, None] * weights)[None, None])
        self.border_type, self.padding, self.channels = "reflect", "same", channels

    def forward(self, maps):
        reach = self.kernel.shape[-1] // 2
        return functional.conv2d(functional.pad(maps, [reach] * 4, mode="reflect"), self.kernel)


class AnomalyMapGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        size = 2 * int(4 * SIGMA + 0.5) + 1
        self.blur = Blur((size, size), (SIGMA, SIGMA))

    def compute_anomaly_map(self, patch_scores, image_size=None):
        return self.blur(patch_scores if image_size is None else functional.interpolate(patch_scores, image_size))

    def forward(self, patch_scores, image_size=None):
        return self.compute_anomaly_map(patch_scores, image_size)


class PatchcoreModel(nn.Module):
    def __init__(self, layers=("fine", "coarse"), num_neighbors=9):
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.num_neighbors, self.embedding_store = layers, num_neighbors, []
        self.fine, self.coarse = nn.Conv2d(3, 5, 4, 4), nn.Conv2d(3, 7, 8, 8)
        self.feature_pooler = nn.AvgPool2d(3, 1, 1)
        self.anomaly_map_generator = AnomalyMapGenerator()
        self.register_buffer("memory_bank", torch.empty(0))

    def forward(self, input_tensor):
        with torch.no_grad():
            features = {"fine": self.fine(input_tensor), "coarse": self.coarse(input_tensor)}
        embedding = self.generate_embedding({name: self.feature_pooler(value) for name, value in features.items()})
        count, width, *grid = embedding.shape
        embedding = embedding.permute(0, 2, 3, 1).reshape(-1, width)
        if self.training:
            self.embedding_store.append(embedding)
            return embedding
        scores, places = (part.reshape(count, -1) for part in self.nearest_neighbors(embedding, 1))
        score = self.compute_anomaly_score(scores, places, embedding)
        return score, self.anomaly_map_generator(scores.reshape(count, 1, *grid), input_tensor.shape[-2:])

    def generate_embedding(self, features):
        first = features[self.layers[0]]
        rest = [functional.interpolate(features[layer], first.shape[-2:], mode="bilinear") for layer in self.layers[1:]]
        return torch.cat([first, *rest], 1)

    def nearest_neighbors(self, embedding, n_neighbors):
        differences = embedding[:, None] - self.memory_bank
        found = differences.square().sum(2).sqrt().topk(n_neighbors, largest=False)
        return tuple(part.squeeze(1) if n_neighbors == 1 else part for part in found)

    def compute_anomaly_score(self, patch_scores, locations, embedding):
        rows, most = torch.arange(len(patch_scores)), patch_scores.argmax(1)
        if self.num_neighbors == 1:
            return patch_scores[rows, most]
        query = embedding.reshape(*patch_scores.shape, -1)[rows, most]
        nearest = self.memory_bank[locations[rows, most]]
        support = self.nearest_neighbors(nearest, min(self.num_neighbors, len(self.memory_bank)))[1]
        distances = (query[:, None] - self.memory_bank[support]).square().sum(2).sqrt()
        return (1 - distances.softmax(1)[:, 0]) * patch_scores[rows, most]

    def subsample_embedding(self, sampling_ratio):
        rows = torch.vstack(self.embedding_store)
        self.embedding_store.clear()
        module = sys.modules["anomalib.models.image.patchcore.torch_model"]
        self.memory_bank = module.KCenterGreedy(rows, sampling_ratio).sample_coreset()


class Patchcore(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.model = PatchcoreModel(**arguments)

    def forward(self, batch):
        return self.model(batch)


PLACES = {
    "components.sampling.k_center_greedy": (KCenterGreedy,),
    "image.patchcore.anomaly_map": (AnomalyMapGenerator, Blur),
    "image.patchcore.torch_model": (PatchcoreModel,),
    "image.patchcore.lightning_model": (Patchcore,),
}


def install(monkeypatch):
    """Put the classes where anomalib has them, for one test."""
    for place, kinds in PLACES.items():
        parts = f"anomalib.models.{place}".split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if not (name in sys.modules and isinstance(sys.modules[name], _Module)):
                monkeypatch.setitem(sys.modules, name, _Module(name))
        for kind in kinds:
            monkeypatch.setattr(kind, "__module__", name)
            setattr(sys.modules[name], kind.__name__, kind)
    monkeypatch.setattr(
        sys.modules["anomalib.models.image.patchcore.torch_model"], "KCenterGreedy", KCenterGreedy, raising=False
    )


class _Module(ModuleType):
    __path__ = ()
