"""Images in, patch features out: reading, preprocessing, the backbone, and local neighbourhood aggregation.

Arrays and tensors are images *before* normalisation. 8-bit images, whether files, arrays or tensors, are resized as
by Pillow 13.0, in the manner of the paper's implementation; floating-point ones by torch's bilinear interpolation with
antialiasing, or rounded to 8 bits first, so that they score as their files do.
Nothing here holds more than the images of a batch and those read ahead for the next.

On a CPU each image of a batch passes a network with named layers by itself, on one thread of torch, and several images
pass it at once: so features have the same bits for any number of threads and any batches. A callable that returns maps
of its own may keep something between calls: it is given whole batches, in the caller's thread, one after the other.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from patchcore_rs._checks import integer, thread_count
from patchcore_rs._limits import in_parallel, usable_threads
from patchcore_rs._stopwatch import Stopwatch
from patchcore_rs.backbones.backbone import require_unforked, resolve_device
from patchcore_rs.backbones.host import float32_precision, own_autocast
from patchcore_rs.features.aggregation import aggregate_tensors
from patchcore_rs.functional import aggregate
from patchcore_rs.images.levels import Levels, Peak
from patchcore_rs.images.pixels import (
    Image,
    from_uint8,
    image_hash,
    resize_crop,
    resize_crop_tensor,
    to_pixels,
    to_uint8,
    unseen_share,
)
from patchcore_rs.images.read_ahead import read_ahead
from patchcore_rs.images.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_rs.backbones.backbone import Backbone, Triple


View = Literal["aggregated", "raw", "pooled"]
VIEWS: tuple[View, ...] = ("aggregated", "raw", "pooled")

_SMALL = 32  # smaller images vanish in the deeper layers of some networks


class ImageBatch(NamedTuple):
    """Prepared images of one size: their names for messages, their paths where they are files, (n, 3, H, W).

    `unseen` are the shares of the images that the crop cut off, 0 to below 1; `hashes` those of `image_hash`, None
    where they were not asked for.
    """

    names: tuple[str, ...]
    paths: tuple[Path | None, ...]
    images: Tensor
    unseen: tuple[float, ...]
    hashes: tuple[int, ...] | None


class _Prepared(NamedTuple):
    """An image (3, H, W), the share of it that the crop cut off, and the hash of its samples where it was asked for."""

    image: Tensor
    unseen: float
    hash: int | None


class FeatureExtractor:
    """The way from an image to the features of its patches; safe to use from several threads.

    Args:
        backbone: what `load_backbone` returned; its weights go to `device`.
        resize: shorter side, exact (height, width), or None, in pixels; before `crop`.
        crop: side or (height, width) of the centre that is kept, or None.
        embedding: width of a feature, or `"concat"` for the plain concatenation of the layers.
        patch_size: side p of the neighbourhood that a feature takes in (section 3.1 of the paper).
        stride: distance of neighbouring patches on the first layer's map.
        device: where the backbone runs, `"auto"` for CUDA where there is one.
        autocast: half precision on CUDA; without effect on a CPU. An autocast around a call has none at all.
        antialias_tensor: resize 8-bit images as floating-point tensors too, as anomalib does.
        round_floats: round floating-point images in [0, 1] to 8 bits first.
        threads: threads that read images, run the backbone and aggregate; None for as many as this process may use.
        mean: per channel or for all, in place of the backbone's. `mean=0, std=1` takes images that are normalised
            already, with any finite values.
        std: as `mean`.
        levels: what is white where samples have more than 8 bits.
        view: how maps become features: "aggregated" by neighbourhood (section 3.1 of the paper); "raw", every position
            by itself, layers joined; or "pooled", the mean of each layer's map, one row an image and a grid of (1, 1).

    Attributes:
        extraction: every choice that decides the features, by the names of `PatchCore`'s arguments, and `view`.
        layer_widths: how many columns of a feature each layer has, in order, once images have passed; None before, and
            where features are "aggregated", which mixes layers.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        resize: int | tuple[int, int] | None,
        crop: int | tuple[int, int] | None,
        embedding: int | Literal["concat"],
        patch_size: int = 3,
        stride: int = 1,
        device: str | torch.device = "auto",
        autocast: bool = False,
        antialias_tensor: bool = False,
        round_floats: bool = False,
        threads: int | None = None,
        mean: float | Triple | None = None,
        std: float | Triple | None = None,
        levels: Levels | None = None,
        view: View = "aggregated",
    ) -> None:
        """Check the arguments; ValueError or TypeError names the one that does not fit."""
        self.resize, self.crop = resize, crop
        self.width = None if embedding == "concat" else integer(embedding, "embedding", minimum=1)
        self.patch_size = integer(patch_size, "patch_size", minimum=1)
        self.stride = integer(stride, "stride", minimum=1)
        self.threads = thread_count(threads)
        self.device = resolve_device(device)
        self.autocast = autocast
        self.antialias_tensor, self.round_floats = antialias_tensor, round_floats
        self.backbone = backbone.to(self.device)
        self._mean = _channels(backbone.mean if mean is None else mean, "mean")
        self._std = _channels(backbone.std if std is None else std, "std")
        if not bool((self._std > 0).all()):
            raise ValueError(f"std must be positive; got {std!r}")
        self._normalised = bool((self._mean == 0).all() and (self._std == 1).all())
        if view not in VIEWS:
            raise ValueError(f"view must be one of {', '.join(map(repr, VIEWS))}; got {view!r}")
        self.view = view
        self.layer_widths: tuple[int, ...] | None = None
        self.levels = levels or Levels()

    def __getstate__(self) -> dict[str, Any]:
        """The state without tensors, whose pickles differ from one to the next."""
        return self.__dict__ | {"_mean": self._mean.tolist(), "_std": self._std.tolist()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tensors = {name: torch.tensor(state[name], dtype=torch.float32, device="cpu") for name in ("_mean", "_std")}
        self.__dict__.update(state | tensors)

    @property
    def extraction(self) -> dict[str, Any]:
        """Every choice that decides the features, as plain values."""
        own = {"embedding": self.width or "concat", "patch_size": self.patch_size, "stride": self.stride}
        return {
            "view": self.view,
            "layers": self.backbone.layers,
            "resize": self.resize,
            "crop": self.crop,
            "resampling": "tensor" if self.antialias_tensor else "pil",
            "mean": tuple(self._mean.flatten().tolist()),
            "std": tuple(self._std.flatten().tolist()),
            "white_level": self.levels.white_level,
            "value_range": self.levels.value_range,
            "round_floats": self.round_floats,
            **(own if self.view == "aggregated" else {}),
            "autocast": self.autocast and self.device.type == "cuda",
        }

    @property
    def precision(self) -> dict[str, str]:
        """What this process lets the backbone's float32 operations be done in, see `float32_precision`."""
        return float32_precision(self.backbone.module, self.device)

    @property
    def side_by_side(self) -> int:
        """How many images pass the backbone at once, each by itself; 1 where it is given whole batches."""
        return usable_threads(self.threads) if self.device.type == "cpu" and self.backbone.layers else 1

    def prepare(self, image: Image) -> Tensor:
        """Read, resize, crop and normalise an image: (3, H, W) float32 on the CPU. `image` is never changed.

        A path; an array (H, W), (H, W, 1) or (H, W, 3); or a tensor (3, H, W) or (1, H, W). uint8; uint16, whose full
        scale is white unless `levels` says otherwise; or floating point in [0, 1].

        Raises:
            TypeError, ValueError: what is wrong with it; for a file an `ImageError`.
        """
        return self._prepare(image, self.levels, hashed=False).image

    def _prepare(self, image: Image, levels: Levels, *, hashed: bool) -> _Prepared:
        raw: list[NDArray[Any]] = []
        pixels = to_pixels(image, normalised=self._normalised, levels=replace(levels, raw=raw) if hashed else levels)
        if self.round_floats and isinstance(pixels, Tensor):
            pixels = to_uint8(pixels)
        digest = image_hash(raw[0] if raw else np.asarray(pixels)) if hashed else None
        if isinstance(pixels, np.ndarray) and not self.antialias_tensor:
            size = pixels.shape[:2]
            scaled = from_uint8(resize_crop(pixels, self.resize, self.crop))
        else:
            tensor = pixels if isinstance(pixels, Tensor) else from_uint8(pixels)
            size = tensor.shape[1:]
            scaled = resize_crop_tensor(tensor, self.resize, self.crop)
        height, width = size
        unseen = unseen_share((height, width), self.resize, self.crop)
        return _Prepared((scaled - self._mean) / self._std, unseen, digest)

    def batches(
        self,
        source: Any,
        batch_size: int,
        *,
        on_failure: Callable[[str, Exception], object] | None = None,
        peak: Peak | None = None,
        hashes: bool = False,
    ) -> Iterator[ImageBatch]:
        """Batches of prepared images out of anything `open_source` takes, in order.

        Images that follow each other share a batch up to `batch_size` while they are of one size. Reading and
        preparing go on in threads while the caller works on a batch. An image that cannot be read ends the batches
        with its error, or is left out after a call of `on_failure` with its name and the error. Images are hashed only
        where `hashes` are asked for, which takes about as long as scaling them down.
        """
        integer(batch_size, "batch_size", minimum=1)
        require_unforked(self.device)
        waiting: list[tuple[str, Path | None, _Prepared]] = []
        for item in read_ahead(
            open_source(source).items,
            partial(self._prepare, levels=replace(self.levels, peak=peak), hashed=hashes),
            self.threads,
            ahead=batch_size,
            on_failure=on_failure,
        ):
            if waiting and (len(waiting) == batch_size or waiting[0][2].image.shape != item[2].image.shape):
                yield _batch(waiting)
                waiting = []
            waiting.append(item)
        if waiting:
            yield _batch(waiting)

    def extract(
        self, batch: Tensor, names: Sequence[str] | None = None, *, stopwatch: Stopwatch | None = None
    ) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """Patch features of prepared images (n, 3, H, W): ((n * gh * gw, d) float32, (gh, gw)).

        The rows follow the grid row by row, image by image. `names` are the images' in messages; the `stopwatch`
        gets the stages "backbone" and "aggregation".

        Raises:
            ValueError: the images are too small, or the features of one, which is named, are not finite.
        """
        if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
            raise ValueError(
                f"batch must be prepared images (n, 3, H, W) in floating point; got {tuple(batch.shape)} {batch.dtype}"
            )
        stopwatch = stopwatch or Stopwatch()
        with stopwatch("backbone"):
            maps = self._maps(batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # or the next stage would pay for this one
        if self.view != "aggregated":
            self.layer_widths = tuple(layer_map.shape[1] for layer_map in maps)
        try:
            with stopwatch("aggregation"):
                return self._aggregate(maps)
        except ValueError:
            self._check_finite(maps, names)
            raise

    def _aggregate(self, maps: Sequence[Tensor]) -> tuple[NDArray[np.float32], tuple[int, int]]:
        if self.view == "pooled":
            features, grid = torch.cat(list(maps), dim=1).flatten(1), (1, 1)
        else:
            raw = self.view == "raw"
            patch_size, stride, width = (1, 1, None) if raw else (self.patch_size, self.stride, self.width)
            if all(layer_map.device.type == "cpu" for layer_map in maps):
                features, grid = aggregate(
                    maps, patch_size=patch_size, stride=stride, width=width, threads=self.threads
                )
                return features.numpy(), grid
            features, grid = aggregate_tensors(maps, patch_size, stride, width)
        array: NDArray[np.float32] = features.cpu().numpy()
        if not np.isfinite(array).all():
            raise ValueError("features must be finite")
        return array, grid

    def _maps(self, batch: Tensor) -> list[Tensor]:
        """A map (n, c, h, w) of each layer for prepared images (n, 3, H, W), or (n, c, 1, 1) where it is pooled."""
        try:
            if self.device.type != "cpu" or not self.backbone.layers:
                return self._pass(batch)
            images = in_parallel(self._pass_alone, [image[None] for image in batch], self.threads)
        except RuntimeError as error:
            height, width = batch.shape[2:]
            if min(height, width) >= _SMALL:
                raise
            raise ValueError(
                f"backbone {self.backbone.name!r} fails on images of {height} x {width} (height x width): {error}. "
                f"Resize them to {_SMALL} or more a side"
            ) from error
        # Joined by numpy: torch would copy with as many threads as the program has.
        return [torch.from_numpy(np.concatenate(layer)).permute(0, 3, 1, 2) for layer in zip(*images, strict=True)]

    def _pass_alone(self, image: Tensor) -> list[NDArray[np.float32]]:
        """The maps (1, h, w, c) of one image."""
        return [layer_map.permute(0, 2, 3, 1).contiguous().numpy() for layer_map in self._pass(image)]

    def _pass(self, batch: Tensor) -> list[Tensor]:
        images = batch.to(self.device, torch.float32)
        with own_autocast(self.device, half=self.autocast):
            maps = [layer_map.detach().float() for layer_map in self.backbone(images)]
        return [layer_map.mean(dim=(2, 3), keepdim=True) for layer_map in maps] if self.view == "pooled" else maps

    def _check_finite(self, maps: Sequence[Tensor], names: Sequence[str] | None) -> None:
        for layer, layer_map in enumerate(maps):
            finite = torch.isfinite(layer_map).flatten(1).all(dim=1).tolist()
            if not all(finite):
                image = finite.index(False)
                name = names[image] if names is not None else f"image {image} of the batch"
                where = repr(self.backbone.layers[layer]) if self.backbone.layers else str(layer)
                raise ValueError(
                    f"{name}: layer {where} of backbone {self.backbone.name!r} gave NaN or infinite features; "
                    "check the weights" + (", or turn autocast off" if self.autocast else "")
                )


def _channels(value: float | Triple, name: str) -> Tensor:
    """One number per colour channel, (3, 1, 1)."""
    numbers = torch.as_tensor(value, dtype=torch.float32, device="cpu")
    if numbers.shape not in ((), (3,)) or not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be a finite number, or three, one per colour channel; got {value!r}")
    return numbers.expand(3).reshape(3, 1, 1)


def _batch(items: Sequence[tuple[str, Path | None, _Prepared]]) -> ImageBatch:
    names, paths, prepared = zip(*items, strict=True)
    images, unseen, hashes = zip(*prepared, strict=True)
    stacked = torch.from_numpy(np.stack([image.numpy() for image in images]))  # on one thread, where torch takes more
    return ImageBatch(names, paths, stacked, unseen, None if hashes[0] is None else hashes)
