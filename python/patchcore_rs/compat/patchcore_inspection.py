"""The classes of patchcore-inspection that search, select and score, and the folders it saves its models in.

Two of them go where its own go: `PatchCore.load(..., nn_method=FaissNN(), featuresampler=...)`.
"""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from patchcore_rs._checks import fractions, integer
from patchcore_rs._limits import torch_call
from patchcore_rs.compat.faiss import IndexFlatL2, read_index, write_index
from patchcore_rs.compat.pickles import read_pickle
from patchcore_rs.coreset import greedy_coreset
from patchcore_rs.detector.patchcore import assemble
from patchcore_rs.images.levels import FULL, Levels
from patchcore_rs.memory_bank import MemoryBank
from patchcore_rs.model.file import ModelFileError, replace_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from patchcore_rs.backbones.backbone import Backbone
    from patchcore_rs.detector.patchcore import PatchCore

    Features = TypeVar("Features", NDArray[np.float32], torch.Tensor)

# --- searching ----------------------------------------------------------------------------------------------


class FaissNN:
    """Exact search by squared Euclidean distance, as patchcore-inspection's class of that name, without FAISS.

    Args:
        on_gpu: accepted and without effect: the search runs on the CPU.
        num_workers: threads for a search.

    Attributes:
        search_index: the `IndexFlatL2`, None before `fit` and `load`.
    """

    def __init__(self, on_gpu: bool = False, num_workers: int = 4) -> None:  # noqa: FBT001, FBT002 - their signature
        self.on_gpu = on_gpu
        self.num_workers = integer(num_workers, "num_workers", minimum=1)
        self.search_index: IndexFlatL2 | None = None

    def fit(self, features: NDArray[np.float32]) -> None:
        """Remember the rows `features`, (N, d), in place of those before."""
        self.search_index = self._index(features)

    def run(
        self,
        n_nearest_neighbours: int,
        query_features: NDArray[np.float32],
        index_features: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The nearest rows of each query, (Q, d), among those of `index_features` where they are given.

        Returns:
            Squared distances (Q, k) float32 and indices (Q, k) int64; see `IndexFlatL2.search`.

        Raises:
            AttributeError: there are neither stored rows nor `index_features`.
            ValueError: the widths differ, or a value is not finite.
        """
        index = self.search_index if index_features is None else self._index(index_features)
        if index is None:
            raise AttributeError("search_index must be filled before a search; got None. Call fit or load first")
        return index.search(query_features, n_nearest_neighbours)

    def save(self, filename: str | os.PathLike[str]) -> None:
        """Write the stored rows to a file that FAISS reads; TypeError where there are none."""
        if self.search_index is None:
            raise TypeError("search_index must be filled before it is saved; got None. Call fit or load first")
        write_index(self.search_index, filename)

    def load(self, filename: str | os.PathLike[str]) -> None:
        """Remember the rows of a flat index that FAISS wrote; raises what `read_index` does."""
        self.search_index = read_index(filename, threads=self.num_workers)

    def reset_index(self) -> None:
        """Forget the rows."""
        self.search_index = None

    def _index(self, features: NDArray[np.float32]) -> IndexFlatL2:
        index = IndexFlatL2(features.shape[-1], threads=self.num_workers)
        index.add(features)
        return index


class ApproximateFaissNN(FaissNN):
    """In place of patchcore-inspection's approximate search (IVFPQ): exact too, and any number and width of rows."""


class NearestNeighbourScorer:
    """Scores rows by the mean of their squared distances to the nearest remembered ones.

    Args:
        n_nearest_neighbours: how many are averaged.
        nn_method: what searches; None for a new `FaissNN`.

    Attributes:
        detection_features: the remembered rows, (N, d), after `fit`, or after `load` where they were saved separately.
    """

    detection_features: NDArray[np.float32]

    def __init__(self, n_nearest_neighbours: int, nn_method: Any = None) -> None:
        self.n_nearest_neighbours = n_nearest_neighbours
        self.nn_method = FaissNN() if nn_method is None else nn_method

    def imagelevel_nn(self, query: NDArray[np.float32]) -> Any:
        """The nearest remembered rows of each query, as many as are averaged."""
        return self.nn_method.run(self.n_nearest_neighbours, query)

    def pixelwise_nn(self, query: NDArray[np.float32], index: NDArray[np.float32]) -> Any:
        """The nearest of the rows `index` of each query."""
        return self.nn_method.run(1, query, index)

    def fit(self, detection_features: Sequence[NDArray[np.float32]]) -> None:
        """Remember features, an array (N, ...) for each source; those of a row are joined."""
        self.detection_features = _joined(detection_features)
        self.nn_method.fit(self.detection_features)

    def predict(
        self, query_features: Sequence[NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Scores (Q,), squared distances (Q, k) and indices (Q, k) of queries like what `fit` takes."""
        distances, indices = self.imagelevel_nn(_joined(query_features))
        return np.mean(distances, axis=-1), distances, indices

    def save(
        self,
        save_folder: str | os.PathLike[str],
        save_features_separately: bool = False,  # noqa: FBT001, FBT002 - their signature
        prepend: str = "",
    ) -> None:
        """Write the index into a folder, and the features as a pickle beside it where they are asked for."""
        self.nn_method.save(os.fspath(_index_file(save_folder, prepend)))
        if save_features_separately and hasattr(self, "detection_features"):
            replace_file(_features_file(save_folder, prepend), pickle.dumps(self.detection_features, 4))

    def save_and_reset(self, save_folder: str | os.PathLike[str]) -> None:
        """Write the index into a folder, and forget the rows."""
        self.save(save_folder)
        self.nn_method.reset_index()

    def load(self, load_folder: str | os.PathLike[str], prepend: str = "") -> None:
        """Read what `save` wrote; the pickle is read as data, and never runs code.

        Raises:
            ModelFileError: the path and the reason.
            OSError: a file cannot be opened.
        """
        self.nn_method.load(os.fspath(_index_file(load_folder, prepend)))
        features = _features_file(load_folder, prepend)
        if features.exists():
            array = _read(features)
            if not isinstance(array, np.ndarray):
                raise ModelFileError(features, f"it must hold one array; got a {type(array).__name__}. Save it again")
            self.detection_features = array


def _joined(features: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([array.reshape(len(array), -1) for array in features], axis=1)


# --- selecting ----------------------------------------------------------------------------------------------


class IdentitySampler:
    """Takes all rows."""

    def run(self, features: Features) -> Features:
        """The same features."""
        return features


class BaseSampler:
    """Takes a share of the rows: `percentage` of them, 0 < percentage < 1, rounded down.

    Raises:
        ValueError: the percentage is out of range.
    """

    def __init__(self, percentage: float) -> None:
        if isinstance(percentage, int) or not 0 < percentage < 1:
            raise ValueError(f"percentage must be a fraction > 0 and < 1; got {percentage!r}")
        self.percentage = fractions(percentage, "percentage")

    def run(self, features: Features) -> Features:
        """The chosen rows of (N, d) features: what came in, an array or a tensor on its device."""
        with torch_call():
            rows = self._select(features)
            return features[rows if isinstance(features, np.ndarray) else torch.from_numpy(rows).to(features.device)]

    def _select(self, features: Any) -> NDArray[np.int64]:
        raise NotImplementedError


class RandomSampler(BaseSampler):
    """Takes rows at random, drawn by numpy's global generator as patchcore-inspection does: the same rows."""

    def _select(self, features: Any) -> NDArray[np.int64]:
        count = int(len(features) * self.percentage)
        return np.asarray(np.random.choice(len(features), count, replace=False), np.int64)  # noqa: NPY002 - as they do


class GreedyCoresetSampler(BaseSampler):
    """Takes rows by greedy k-centre selection, from the row on that is farthest from all.

    The rows are those of patchcore-inspection until two candidates are nearly as far; its distances are rounded. The
    projection is drawn as it does, by a linear layer and torch's global generator. Where all distinct rows are taken,
    others follow.

    Args:
        percentage: the share of the rows.
        device: where the projection is calculated.
        dimension_to_project_features_to: width of that projection; features of this width are not projected.
    """

    def __init__(
        self, percentage: float, device: torch.device | str, dimension_to_project_features_to: int = 128
    ) -> None:
        super().__init__(percentage)
        self.device = device
        self.dimension_to_project_features_to = integer(
            dimension_to_project_features_to, "dimension_to_project_features_to", minimum=1
        )

    def _select(self, features: Any) -> NDArray[np.int64]:
        reduced = self._reduce_features(torch.as_tensor(features)).numpy()
        count = int(len(features) * self.percentage)
        return greedy_coreset(reduced, count, start=self._start(reduced), fill=True)

    def _reduce_features(self, features: torch.Tensor) -> torch.Tensor:
        width = self.dimension_to_project_features_to
        if features.shape[1] == width:
            return features.cpu()
        with torch.no_grad():
            mapper = torch.nn.Linear(features.shape[1], width, bias=False).to(self.device)
            reduced: torch.Tensor = mapper(features.to(self.device))
            return reduced.cpu()

    def _start(self, reduced: NDArray[np.float32]) -> Any:
        """The row whose distances to all have the largest sum of squares: the farthest from their mean."""
        mean = reduced.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32)
        return int(np.argmax(MemoryBank(mean).kneighbors(reduced, squared=True)[0]))


class ApproximateGreedyCoresetSampler(GreedyCoresetSampler):
    """Takes rows by greedy k-centre selection, from the mean distance to some rows on, none of which is chosen by that.

    Those rows are drawn by numpy's global generator after the projection, as patchcore-inspection does. See
    `GreedyCoresetSampler`.

    Args:
        percentage: the share of the rows.
        device: where the projection is calculated.
        number_of_starting_points: how many rows the mean is over; at most all.
        dimension_to_project_features_to: width of the projection.
    """

    def __init__(
        self,
        percentage: float,
        device: torch.device | str,
        number_of_starting_points: int = 10,
        dimension_to_project_features_to: int = 128,
    ) -> None:
        super().__init__(percentage, device, dimension_to_project_features_to)
        self.number_of_starting_points = integer(number_of_starting_points, "number_of_starting_points", minimum=1)

    def _start(self, reduced: NDArray[np.float32]) -> Any:
        count = min(self.number_of_starting_points, len(reduced))
        return np.random.choice(len(reduced), count, replace=False)  # noqa: NPY002 - as they do


# --- folders of models --------------------------------------------------------------------------------------

# Their names of networks, and ours. Others of theirs are of packages or models that are no more.
_BACKBONES = {
    "wideresnet50": "wide_resnet50_2",
    "wideresnet101": "wide_resnet101_2",
    "resnext101": "resnext101_32x8d",
    **{name: name for name in ("alexnet", "resnet50", "resnet101", "vgg11", "vgg19", "vgg19_bn")},
    **{name: f"timm:{name}" for name in ("resnet200", "resnetv2_101", "mnasnet_100", "densenet121", "densenet201")},
    **{name: f"timm:{name}" for name in ("mnasnet_a1", "mnasnet_b1", "inception_v4", "efficientnet_b3a")},
    **{name: f"timm:tf_{name}" for name in ("efficientnet_b7", "efficientnet_b5", "efficientnet_b3")},
    **{name: f"timm:tf_{name}" for name in ("efficientnet_b1", "efficientnetv2_m", "efficientnetv2_l")},
}
_PARAMS = "patchcore_params.pkl"
_PARAMETERS: Mapping[str, Any] = {
    "backbone.name": str,
    "layers_to_extract_from": (list, tuple),
    "input_shape": (list, tuple),
    "pretrain_embed_dimension": int,
    "target_embed_dimension": int,
    "patchsize": int,
    "patchstride": int,
    "anomaly_scorer_num_nn": int,
}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_LIMIT = 1 << 20  # bytes of the file of parameters, which has some hundred


def load_folder(
    folder: str | os.PathLike[str],
    *,
    prepend: str = "",
    resize: int | tuple[int, int] | str | None = "auto",
    backbone: str | torch.nn.Module | Callable[[torch.Tensor], Any] | Backbone | None = None,
    weights: str | os.PathLike[str] | None = "default",
    device: str | torch.device = "auto",
    threads: int | None = None,
) -> PatchCore:
    """The `PatchCore` that patchcore-inspection saved in a folder, with equal scores and maps.

    Files are read as data and never run code. They say nothing of how images were resized before the crop.

    Args:
        folder: what `PatchCore.save_to_path` wrote.
        prepend: what the names of the files begin with, as "Ensemble-1-3_".
        resize: as `PatchCore`'s; "auto" for 256 pixels the shorter side where the crop is 224, and in that proportion
            for others.
        backbone: the network, None for the one that the folder names.
        weights: as `PatchCore`'s.
        device: as `PatchCore`'s.
        threads: as `PatchCore`'s.

    Raises:
        ModelFileError: a file is damaged, or the model has what `PatchCore` has not, which is named.
        FileNotFoundError: a file is missing.
        ValueError, ImportError, RuntimeError: as `load_backbone`.
    """
    path = _parameters_file(folder, prepend)
    if not path.exists():
        others = sorted(file.name.removesuffix(path.name[len(prepend) :]) for file in path.parent.glob("*" + _PARAMS))
        hint = f"; pass prepend= as one of {', '.join(map(repr, others))}" if others else ""
        raise FileNotFoundError(f"{path} is missing{hint}")
    parameters = _check_parameters(path, _read(path, _LIMIT))
    index_file = _index_file(folder, prepend)
    bank = read_index(index_file).reconstruct_n()
    embedding = parameters["target_embed_dimension"]
    if not len(bank) or bank.shape[1] != embedding:
        raise ModelFileError(index_file, f"it must have rows of {embedding} channels; got shape {bank.shape}")
    name = parameters["backbone.name"]
    if backbone is None and name not in _BACKBONES:
        raise ModelFileError(path, f"the backbone {name!a:.80} is not known here; pass backbone= with the network")
    _, height, width = parameters["input_shape"]
    arguments = {
        "profile": "amazon",
        "backbone": _BACKBONES[name] if backbone is None else backbone,
        "layers": tuple(parameters["layers_to_extract_from"]),
        "weights": weights,
        "resize": round(min(height, width) * 256 / 224) if resize == "auto" else resize,
        "crop": (height, width),
        **_IMAGENET,
        "embedding": embedding,
        "patch_size": parameters["patchsize"],
        "coreset": len(bank),
        "device": device,
        "threads": threads,
    }
    return assemble(arguments, bank, image_size=(height, width))


def save_folder(
    model: PatchCore, folder: str | os.PathLike[str], *, prepend: str = "", backbone: str | None = None
) -> None:
    """Write a fitted `PatchCore` into a folder as patchcore-inspection saves it; `load_from_path` reads it there.

    A threshold is left out, with a UserWarning, and so is how images are resized before they are cropped.

    Args:
        model: fitted with `profile="amazon"`, or with what that stands for.
        folder: an existing one.
        prepend: what the names of the files begin with.
        backbone: the name by which patchcore-inspection finds the network; None where the model's has one there and
            has the usual weights.

    Raises:
        NotFittedError: the model is not fitted.
        ValueError: it has what patchcore-inspection has not, which is named.
        OSError: a file cannot be written.
    """
    bank, settings, size = model.memory_bank_, model.settings_, model.image_size_
    required = {
        "distance": "squared",
        "standardize": False,
        "normalize": False,
        "upsampling": "bilinear",
        "border": "symmetric",
        "sigma": 4.0,
        "resampling": "pil",
        "index": "exact",
        **_IMAGENET,
    }
    for name, value in required.items():
        if getattr(settings, name) != value:
            raise ValueError(
                f"{name} must be {value!r} in a model for patchcore-inspection; got {getattr(settings, name)!r:.80}. "
                'Fit with profile="amazon"'
            )
    if Levels.of(settings) != Levels():
        raise ValueError(f"white_level and value_range must be {FULL} and None; got others. Fit on images of 8 bits")
    if settings.reweight not in (None, 1):
        raise ValueError(
            f"reweight must be None in a model for patchcore-inspection; got {settings.reweight}. "
            'Fit with profile="amazon"'
        )
    if settings.embedding == "concat":
        raise ValueError(
            'embedding must be a width in a model for patchcore-inspection; got "concat". Fit with embedding=1024'
        )
    parameters = {
        "backbone.name": _their_name(model) if backbone is None else backbone,
        "layers_to_extract_from": list(settings.layers),
        "input_shape": [3, *size],
        "pretrain_embed_dimension": settings.embedding,
        "target_embed_dimension": settings.embedding,
        "patchsize": settings.patch_size,
        "patchstride": 1,
        "anomaly_scorer_num_nn": 1,
    }
    if model.threshold_ is not None:
        warnings.warn("the threshold is left out: patchcore-inspection has none", stacklevel=2)
    index = IndexFlatL2(bank.shape[1])
    index.add(bank.features)
    write_index(index, _index_file(folder, prepend))
    replace_file(_parameters_file(folder, prepend), pickle.dumps(parameters, 4))


def _their_name(model: PatchCore) -> str:
    """Their name of the model's network with its usual weights; ValueError where they have none."""
    names = {ours: name for name, ours in _BACKBONES.items()}
    ours = "wide_resnet50_2" if model.backbone == "auto" else model.backbone
    if not isinstance(ours, str) or ours not in names or model.weights != "default":
        raise ValueError(
            "backbone must be one that patchcore-inspection knows, with its usual weights; got "
            f"{model.backbone!r:.80} with weights={model.weights!r:.80}. Pass backbone= with the name that it has there"
        )
    return names[ours]


def _check_parameters(path: Path, stored: Any) -> dict[str, Any]:
    """The parameters of a model that can be carried over; ModelFileError names what is missing, odd or not known."""
    if not isinstance(stored, dict):
        raise ModelFileError(path, f"it must hold a dict of parameters; got a {type(stored).__name__}. Save it again")
    for name, kinds in _PARAMETERS.items():
        if not isinstance(stored.get(name), kinds) or isinstance(stored.get(name), bool):
            raise ModelFileError(path, f"{name} is missing or of another kind: {stored.get(name)!a:.80}. Save it again")
    shape = stored["input_shape"]
    if len(shape) != 3 or shape[0] != 3 or any(type(side) is not int or side < 1 for side in shape):
        raise ModelFileError(path, f"input_shape must be 3, a height and a width; got {shape!a:.80}")
    for name, value, reason in (
        ("patchstride", 1, "patches of every position"),
        ("anomaly_scorer_num_nn", 1, "distances to one neighbour (and so does its own load_from_path, which drops it)"),
        ("pretrain_embed_dimension", stored["target_embed_dimension"], "one width of features"),
    ):
        if stored[name] != value:
            raise ModelFileError(
                path, f"{name} must be {value}; got {stored[name]}. PatchCore takes {reason}; fit one on the images"
            )
    return stored


def _read(path: Path, limit: int | None = None) -> Any:
    """The value of a pickle, read as data; no more than `limit` bytes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise ModelFileError(path, f"it has {size} bytes, parameters have at most {limit}; copy it again")
        try:
            return read_pickle(file)
        except ValueError as error:
            raise ModelFileError(path, str(error)) from error


def _parameters_file(folder: str | os.PathLike[str], prepend: str) -> Path:
    return Path(folder, prepend + _PARAMS)


def _index_file(folder: str | os.PathLike[str], prepend: str) -> Path:
    return Path(folder, f"{prepend}nnscorer_search_index.faiss")


def _features_file(folder: str | os.PathLike[str], prepend: str) -> Path:
    return Path(folder, f"{prepend}nnscorer_features.pkl")
