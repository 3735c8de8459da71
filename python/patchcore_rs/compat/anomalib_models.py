"""Subclasses of anomalib's classes that compute by the kernels what they can, and leave the rest to anomalib.

Each method here answers as the one that it overrides, which runs wherever the kernels cannot: while torch traces,
compiles or exports, on devices, for other dtypes than float32, where gradients are wanted, for values that are not
finite, and for whatever anomalib refuses. A subclass pickles and copies as the class of anomalib's that it is made of:
who loads it need not have this package.
"""

from __future__ import annotations

import copyreg
import sys
import threading
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from patchcore_rs._limits import ProcessLock
from patchcore_rs.compat.torch_banks import BankCache, CosineBank, is_plain, is_traced, nearest
from patchcore_rs.coreset import greedy_coreset
from patchcore_rs.functional import aggregate, anomaly_maps, image_scores
from patchcore_rs.memory_bank import MemoryBank

if TYPE_CHECKING:
    from collections.abc import Iterator

_OWN = "_patchcore_rs_"  # begins the names of attributes that are dropped where an object is pickled or copied
_HELD = {"model", "feature_pooler", "anomaly_map_generator"}  # attributes that hold parts
_LARGEST = 1e12  # of values whose random projection is certain to be one that the kernels take

_lock = ProcessLock(threading.RLock)

# The maps that the pooler has passed on unpooled in the forward pass that runs; None outside of one.
_unpooled: ContextVar[list[Tensor] | None] = ContextVar("_unpooled", default=None)


@contextmanager
def unpooled_maps() -> Iterator[None]:
    """Within, poolers pass on maps as they are, and `generate_embedding` pools those that it gets from them."""
    token = _unpooled.set([])
    try:
        yield
    finally:
        _unpooled.reset(token)


class Accelerated:
    """What all subclasses share: an object is pickled and copied as one of anomalib's class."""

    _host: ClassVar[type[Any]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As any object, but of anomalib's class, and without what only this one needs."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, arguments, state, *rest = reduced
        own = type(self)
        if "_host" in vars(own):  # else it is a subclass of the user's own, which is found where it is
            # The usual function, `copyreg.__newobj__`, insists on the class that the object has.
            function, arguments = copyreg._reconstructor, (own._host, object, None)  # type: ignore[attr-defined]
        return function, arguments, {name: state[name] for name in state if not name.startswith(_OWN)}, *rest

    def _own(self, name: str, make: Any) -> Any:
        """An attribute that is dropped where the object is pickled or copied, made when it is first used."""
        attributes = vars(self)
        if _OWN + name not in attributes:
            attributes[_OWN + name] = make()
        return attributes[_OWN + name]


class Nest(Accelerated):
    """What holds parts: they are turned into their subclasses where they are set."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, swap(value) if name in _HELD else value)


class PatchcoreSearch(Nest):
    """`PatchcoreModel`: embedding, search, image score, and the selection of the bank."""

    memory_bank: Tensor
    num_neighbors: int
    layers: Any
    feature_pooler: Any

    def forward(self, input_tensor: Tensor) -> Any:
        """As anomalib's, with maps pooled where they are joined."""
        host = self._host
        if is_traced():
            return host.forward(self, input_tensor)
        with unpooled_maps():
            return host.forward(self, input_tensor)

    def generate_embedding(self, features: Any) -> Any:
        """As anomalib's: (n, d, h, w), here a view of rows (n * h * w, d), which are what is made of it next."""
        host = self._host
        raw = () if is_traced() else _unpooled.get() or ()
        if not raw:
            return host.generate_embedding(self, features)
        maps = [features[layer] for layer in self.layers]
        passed = [any(layer_map is other for other in raw) for layer_map in maps]
        if all(passed):
            try:
                rows, grid = aggregate([layer_map.detach() for layer_map in maps], patch_size=3)
            except ValueError:  # not finite
                pass
            else:
                return rows.view(len(maps[0]), *grid, -1).permute(0, 3, 1, 2)
        pool = self.feature_pooler._host.forward
        pooled = {
            layer: pool(self.feature_pooler, layer_map) if unpooled else layer_map
            for layer, layer_map, unpooled in zip(self.layers, maps, passed, strict=True)
        }
        return host.generate_embedding(self, pooled)

    def nearest_neighbors(self, embedding: Tensor, n_neighbors: int) -> Any:
        """As anomalib's, exact: distances and indices, (n, k), or (n,) for one neighbour."""
        host = self._host
        bank = self._bank()
        found = None if bank is None else nearest(bank, embedding, n_neighbors)
        if found is None:
            return host.nearest_neighbors(self, embedding, n_neighbors)
        return tuple(part.squeeze(1) for part in found) if n_neighbors == 1 else found

    def compute_anomaly_score(self, patch_scores: Tensor, locations: Tensor, embedding: Tensor) -> Any:
        """As anomalib's, Eq. 7 in float64: (n,) for (n, patches)."""
        host = self._host
        bank = None if self.num_neighbors == 1 else self._bank()
        if bank is None or not is_plain(patch_scores) or not is_plain(embedding) or locations.dtype != torch.int64:
            return host.compute_anomaly_score(self, patch_scores, locations, embedding)
        # The rows of the farthest patches are all that the score needs.
        rows = torch.arange(len(patch_scores))
        try:
            farthest = patch_scores.argmax(1)
            queries = embedding.detach().reshape(*patch_scores.shape, -1)[rows, farthest]
            scores = image_scores(
                bank,
                queries,
                patch_scores.detach()[rows, farthest],
                locations[rows, farthest],
                patches=1,
                reweight=self.num_neighbors,
            )
        except (ValueError, RuntimeError, IndexError):  # shapes that do not fit, values that are not finite
            return host.compute_anomaly_score(self, patch_scores, locations, embedding)
        return scores.float()

    def subsample_embedding(self, *args: Any, **kwargs: Any) -> Any:
        """As anomalib's, with the selection by the kernels."""
        host = self._host
        with _selecting(self):
            return host.subsample_embedding(self, *args, **kwargs)

    def _bank(self) -> MemoryBank | None:
        if is_traced():
            return None
        found: MemoryBank | None = self._own("bank", lambda: BankCache(MemoryBank)).find(self.memory_bank)
        return found


class MapPooling(Accelerated):
    """`AvgPool2d(3, 1, 1)`: in a forward pass of `PatchcoreSearch`, maps are pooled where they are joined."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002 - torch's name for it
        """As torch's, or the map as it is, noted."""
        host = self._host
        if is_traced():
            return host.forward(self, input)
        raw = _unpooled.get()
        if raw is None or not is_plain(input) or input.ndim != 4 or not input.numel():
            return host.forward(self, input)
        raw.append(input)
        return input


class MapGeneration(Accelerated):
    """`AnomalyMapGenerator`: nearest upsampling, then a Gaussian with a reflected border."""

    blur: Any

    def compute_anomaly_map(self, patch_scores: Tensor, image_size: Any = None) -> Any:
        """As anomalib's: (n, 1, h, w) patch scores to maps (n, 1, height, width)."""
        host = self._host
        if is_traced() or not is_plain(patch_scores) or patch_scores.ndim != 4 or patch_scores.shape[1] != 1:
            return host.compute_anomaly_map(self, patch_scores, image_size)
        height, width = patch_scores.shape[2:] if image_size is None else map(int, image_size[:2])
        sigma = self._sigma()
        # A reflected border is narrower than the map.
        if sigma is None or min(height, width) <= self.blur.kernel.shape[-1] // 2:
            return host.compute_anomaly_map(self, patch_scores, image_size)
        try:
            maps = anomaly_maps(
                patch_scores.detach()[:, 0], (height, width), sigma=sigma, upsampling="nearest", border="reflect"
            )
        except ValueError:  # not finite
            return host.compute_anomaly_map(self, patch_scores, image_size)
        return maps[:, None]

    def _sigma(self) -> float | None:
        """The deviation that the blur was made with; None where it is not as anomalib makes it."""
        kernel = self.blur.kernel
        known = self._own("kernel", lambda: [None, None])
        if known[0] is not kernel or _changed(kernel, known[1]):
            known[:] = kernel, None if kernel.is_inference() else kernel._version
            vars(self)[f"{_OWN}sigma"] = _blur_sigma(self.blur)
        sigma: float | None = vars(self)[f"{_OWN}sigma"]
        return sigma


def _changed(tensor: Tensor, version: int | None) -> bool:
    return version is not None and tensor._version != version


def _blur_sigma(blur: Any) -> float | None:
    """The one deviation for which anomalib makes a kernel of this size, if it makes this kernel."""
    size = blur.kernel.shape[-1]
    sigma = (size - 1) / 8
    kinds = blur.border_type, blur.padding, blur.channels
    if kinds != ("reflect", "same", 1) or not is_plain(blur.kernel) or sigma <= 0:
        return None
    fresh = type(blur)(kernel_size=(size, size), sigma=(sigma, sigma), channels=1).kernel
    return sigma if torch.equal(fresh, blur.kernel) else None


class CosineSearch(Nest):
    """`AnomalyDINOModel`: search by cosine distance, and the selection of the bank.

    Its forward pass multiplies all queries with the whole bank. That one product is answered with the products of the
    nearest rows alone, (n, k) in place of (n, N), and all that follows is anomalib's own.
    """

    memory_bank: Tensor
    num_neighbours: int
    training: bool

    def forward(self, input_tensor: Tensor) -> Any:
        """As anomalib's."""
        host = self._host
        if is_traced() or self.training:
            return host.forward(self, input_tensor)
        bank: CosineBank | None = self._own("bank", lambda: BankCache(CosineBank)).find(self.memory_bank)
        if bank is None:
            return host.forward(self, input_tensor)
        with _NearestProducts(bank, self.memory_bank, max(1, self.num_neighbours)):
            return host.forward(self, input_tensor)

    def fit(self, *args: Any, **kwargs: Any) -> Any:
        """As anomalib's, with the selection by the kernels."""
        host = self._host
        with _selecting(self):
            return host.fit(self, *args, **kwargs)


class _NearestProducts(TorchFunctionMode):
    """Answers a product of queries with the transposed bank by the `k` largest of each query, falling.

    What is then subtracted from 1 is replaced by the distance itself, which the subtraction would round.
    """

    def __init__(self, bank: CosineBank, rows: Tensor, k: int) -> None:
        super().__init__()
        self.bank, self.rows, self.k = bank, rows, k
        self.products: Tensor | None = None
        self.distances: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("matmul", "__matmul__") and len(args) == 2 and self._is_bank(args[1]):
            self.distances = self.bank.smallest(args[0], self.k)
            if self.distances is not None:
                self.products = 1 - self.distances
                return self.products
        elif name in ("sub", "__sub__") and self.products is not None and len(args) == 2 and args[1] is self.products:
            return self.distances
        return func(*args, **(kwargs or {}))

    def _is_bank(self, other: Any) -> bool:
        rows = self.rows
        return (
            isinstance(other, Tensor)
            and other.shape == rows.shape[::-1]
            and other.stride() == rows.stride()[::-1]
            and other.data_ptr() == rows.data_ptr()
        )


class Selection(Accelerated):
    """`KCenterGreedy`: the rows that anomalib picks, in its own projection and from its own random start."""

    embedding: Tensor
    coreset_size: int
    features: Tensor

    def select_coreset_idxs(self, *args: Any, **kwargs: Any) -> list[int]:
        """As anomalib's: distinct rows in the order of their picks.

        Each pick is the row farthest from those before it, in anomalib's random projection: the sequences are equal
        until two rows are equally far but for the rounding of anomalib's float32 distances.
        """
        host = self._host
        size, rows = self.coreset_size, self.embedding
        count = len(rows)
        given = [value for value in (*args, *kwargs.values()) if value]  # rows that are selected already, before 2.2
        if given or not 1 <= size <= count or not is_plain(rows) or not _bounded(rows):
            found: list[int] = host.select_coreset_idxs(self, *args, **kwargs)
            return found
        # One step of anomalib's own: it draws the projection and the start. Before 2.4 the start is measured from but
        # not selected; then the step has measured from it and picked another row.
        notes = vars(self)[f"{_OWN}centres"] = []
        self.coreset_size = 1
        try:
            picked = host.select_coreset_idxs(self, *args, **kwargs)
        finally:
            self.coreset_size = size
            del vars(self)[f"{_OWN}centres"]
        uncounted = bool(notes)
        start = notes[0] if uncounted else picked[0]
        picks = greedy_coreset(self.features, min(size + uncounted, count), start=start, fill=True).tolist()
        return picks[uncounted:] if size < count or not uncounted else [*picks[1:], start]

    def update_distances(self, *args: Any, **kwargs: Any) -> Any:
        """As anomalib's."""
        host = self._host
        notes: list[int] | None = vars(self).get(f"{_OWN}centres")
        if notes is not None:
            (centre,) = (*args, *kwargs.values())
            notes += torch.as_tensor(centre).flatten().tolist()
        return host.update_distances(self, *args, **kwargs)


def _bounded(rows: Tensor) -> bool:
    """Whether all values are finite and far from where their projection would overflow; False for none."""
    return rows.numel() > 0 and bool(max(-rows.min(), rows.max()) <= _LARGEST)  # false for NaN too


class Lightning(Nest):
    """`Patchcore` and `AnomalyDINO`: their model is accelerated when it is set."""


# --- which class becomes which ------------------------------------------------------------------------------


@cache
def _parts() -> dict[Any, type[Accelerated]]:
    """Anomalib's classes, and what is put before each; ImportError where anomalib is missing."""
    try:
        from anomalib.models.components.sampling.k_center_greedy import KCenterGreedy
        from anomalib.models.image.patchcore.anomaly_map import AnomalyMapGenerator
        from anomalib.models.image.patchcore.lightning_model import Patchcore
        from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    except ImportError as error:
        raise ImportError(
            f"patchcore_rs.compat.anomalib needs anomalib 2.0 or newer ({error}): pip install 'patchcore-rs[anomalib]'"
        ) from error
    parts: dict[Any, type[Accelerated]] = {
        KCenterGreedy: Selection,
        AnomalyMapGenerator: MapGeneration,
        PatchcoreModel: PatchcoreSearch,
        Patchcore: Lightning,
        nn.AvgPool2d: MapPooling,
    }
    try:
        from anomalib.models.image.anomaly_dino.lightning_model import AnomalyDINO
        from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
    except ImportError:  # before 2.3
        return parts
    return parts | {AnomalyDINO: Lightning, AnomalyDINOModel: CosineSearch}


def host_class(name: str) -> type[Any]:
    """The subclass of anomalib's class of that name; ImportError where this version of anomalib has none."""
    for host in _parts():
        if host.__name__ == name:
            return subclass(host)
    raise ImportError(f"the installed anomalib has no {name}; install a newer one")


@cache
def subclass(host: Any) -> type[Any]:
    """The subclass of `host`, one of anomalib's classes or a user's subclass of one, under the same name.

    Raises:
        TypeError: the user's subclass overrides what would be overridden here.
    """
    base = next(kind for kind in host.__mro__ if kind in _parts())
    part = _parts()[base]
    for name in vars(part):
        if not name.startswith("__") and getattr(host, name, None) is not getattr(base, name, None):
            raise TypeError(
                f"model must leave {name} as {base.__name__} of anomalib has it; got {host.__name__}, which overrides "
                "it. Accelerate the parts that it holds, or derive it from the class in patchcore_rs.compat.anomalib"
            )
    more = {"_host": host, "__module__": __name__, "__doc__": host.__doc__}
    metaclass: Any = type(host)
    made: type[Any] = metaclass(host.__name__, (part, host), more)
    return made


def swap(value: Any) -> Any:
    """`value` itself, and the parts that it holds, turned into the subclasses in place, where they are known."""
    kind: Any = type(value)
    if not isinstance(value, Accelerated) and _is_known(value):
        part = _parts()[next(base for base in kind.__mro__ if base in _parts())]
        if not issubclass(part, Lightning):  # which does nothing but hold a model
            value.__class__ = subclass(kind)
        for name in _HELD & vars(value).get("_modules", {}).keys():
            swap(getattr(value, name))
    return value


def is_model(value: Any) -> bool:
    """Whether `swap` knows it as a model: a torch module that holds others."""
    return isinstance(value, Nest) or any(issubclass(_parts().get(kind, object), Nest) for kind in type(value).__mro__)


def _is_known(value: Any) -> bool:
    if isinstance(value, nn.AvgPool2d):
        settings = value.kernel_size, value.stride, value.padding, value.ceil_mode
        more = value.count_include_pad, value.divisor_override
        return type(value) is nn.AvgPool2d and settings == (3, 1, 1, False) and more == (True, None)
    return any(kind in _parts() for kind in type(value).__mro__)


@contextmanager
def _selecting(model: Any) -> Iterator[None]:
    """Let the modules that define a model find the subclass where they name `KCenterGreedy`.

    Another thread that comes upon the name meanwhile selects by the kernels too, which is the same rows.
    """
    host = next(kind for kind in _parts() if kind.__name__ == "KCenterGreedy")
    with _lock.held():
        modules = [sys.modules[kind.__module__] for kind in type(model).__mro__ if kind.__module__ in sys.modules]
        changed = [module for module in dict.fromkeys(modules) if vars(module).get("KCenterGreedy") is host]
        try:
            for module in changed:
                vars(module)["KCenterGreedy"] = subclass(host)
            yield
        finally:
            for module in changed:
                vars(module)["KCenterGreedy"] = host
