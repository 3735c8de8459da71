"""Images in, patch features out: reading, preprocessing, the backbone, and local neighbourhood aggregation.

Arrays and tensors are images *before* normalisation. 8-bit images, whether files, arrays or tensors, are resized by
Pillow as the paper's implementation does; floating-point ones by torch's bilinear interpolation with antialiasing.
Nothing here holds more than the images of a batch and those read ahead for the next.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset

from patchcore_rs import _native
from patchcore_rs.arguments import integer, thread_count
from patchcore_rs.backbones import resolve_device
from patchcore_rs.datasets import find_images
from patchcore_rs.images import read_image, resize_crop, resize_crop_mask

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from patchcore_rs.backbones import Backbone, Triple

T = TypeVar("T")

# An image of any kind, and what it becomes first: (H, W, 3) uint8, or (3, H, W) float32.
Image = str | os.PathLike[str] | np.ndarray[Any, Any] | Tensor
Pixels = np.ndarray[Any, np.dtype[np.uint8]] | Tensor

_READERS = 8  # threads beyond these wait for the disk
_SMALL = 32  # sides below this leave nothing of some networks' deeper maps


class ImageBatch(NamedTuple):
    """Prepared images of one size: their names for messages, their paths where they are files, (n, 3, H, W)."""

    names: tuple[str, ...]
    paths: tuple[Path | None, ...]
    images: Tensor


class Stopwatch:
    """Wall-clock seconds spent in named stages, summed over the times each was entered."""

    def __init__(self) -> None:
        """Nothing has taken any time yet."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what happens inside as part of `stage`."""
        began = perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + perf_counter() - began


class FeatureExtractor:
    """The way from an image to the features of its patches; safe to use from several threads.

    Args:
        backbone: what :func:`patchcore_rs.backbones.load_backbone` returned; its weights go to ``device``.
        resize: shorter side, exact (height, width), or None, in pixels; before ``crop``.
        crop: side or (height, width) of the centre that is kept, or None.
        embedding: width of a feature, or ``"concat"`` for the plain concatenation of the layers.
        patch_size: side p of the neighbourhood that a feature takes in (section 3.1 of the paper).
        stride: distance of neighbouring patches on the first layer's map.
        device: where the backbone runs, ``"auto"`` for CUDA where there is one.
        autocast: half precision on CUDA; without effect on a CPU.
        antialias_tensor: resize 8-bit images as floating-point tensors too, as anomalib does.
        threads: threads that read images and aggregate; None for as many as this process may use.
        mean: per channel or for all, in place of the backbone's. ``mean=0, std=1`` takes images that are normalised
            already, with any finite values.
        std: as ``mean``.
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
        threads: int | None = None,
        mean: float | Triple | None = None,
        std: float | Triple | None = None,
    ) -> None:
        """Check the arguments; ValueError or TypeError names the one that does not fit."""
        self.resize, self.crop = resize, crop
        self.width = None if embedding == "concat" else integer(embedding, "embedding", minimum=1)
        self.patch_size = integer(patch_size, "patch_size", minimum=1)
        self.stride = integer(stride, "stride", minimum=1)
        self.threads = thread_count(threads)
        self.device = resolve_device(device)
        self.autocast = autocast
        self.antialias_tensor = antialias_tensor
        self.backbone = backbone.to(self.device)
        self._mean = _channels(backbone.mean if mean is None else mean, "mean")
        self._std = _channels(backbone.std if std is None else std, "std")
        if not bool((self._std > 0).all()):
            raise ValueError(f"std must be positive, got {std!r}")
        self._normalised = bool((self._mean == 0).all() and (self._std == 1).all())

    def prepare(self, image: Image) -> Tensor:
        """Read, resize, crop and normalise an image: (3, H, W) float32 on the CPU. ``image`` is never changed.

        A path; an array (H, W), (H, W, 1) or (H, W, 3); or a tensor (3, H, W) or (1, H, W). uint8; uint16, whose full
        scale is white; or floating point in [0, 1].

        Raises ValueError (ImageError for a file) or TypeError with what is wrong with it.
        """
        pixels = to_pixels(image, normalised=self._normalised)
        if isinstance(pixels, np.ndarray) and not self.antialias_tensor:
            scaled = _from_uint8(resize_crop(pixels, self.resize, self.crop))
        else:
            tensor = pixels if isinstance(pixels, Tensor) else _from_uint8(pixels)
            scaled = _resize_crop_tensor(tensor, self.resize, self.crop)
        return (scaled - self._mean) / self._std

    def batches(
        self, source: Any, batch_size: int, *, on_failure: Callable[[str, Exception], object] | None = None
    ) -> Iterator[ImageBatch]:
        """Batches of prepared images out of anything :func:`iterate_images` takes, in order.

        Images that follow each other share a batch up to ``batch_size`` while they are of one size. Reading and
        preparing go on in threads while the caller works on a batch. An image that cannot be read ends the batches
        with its error, or is left out after a call of ``on_failure`` with its name and the error.
        """
        integer(batch_size, "batch_size", minimum=1)
        waiting: list[tuple[str, Path | None, Tensor]] = []
        for item in _read_ahead(_items(source), self.prepare, self.threads, ahead=batch_size, on_failure=on_failure):
            if waiting and (len(waiting) == batch_size or waiting[0][2].shape != item[2].shape):
                yield _batch(waiting)
                waiting = []
            waiting.append(item)
        if waiting:
            yield _batch(waiting)

    def extract(
        self, batch: Tensor, names: Sequence[str] | None = None, *, stopwatch: Stopwatch | None = None
    ) -> tuple[NDArray[np.float32], tuple[int, int]]:
        """Patch features of prepared images (n, 3, H, W): ((n * gh * gw, d) float32, (gh, gw)).

        The rows follow the grid row by row, image by image. ``names`` are the images' in messages; the ``stopwatch``
        gets the stages "backbone" and "aggregation".

        Raises ValueError naming the image whose features are not finite, or where the images are too small.
        """
        if batch.ndim != 4 or batch.shape[1] != 3 or not batch.is_floating_point():
            raise ValueError(
                f"batch must be prepared images (n, 3, H, W) in floating point, got {tuple(batch.shape)} {batch.dtype}"
            )
        stopwatch = stopwatch or Stopwatch()
        with stopwatch("backbone"):
            maps = self._maps(batch)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # or the next stage would pay for this one
        try:
            with stopwatch("aggregation"):
                return self._aggregate(maps)
        except ValueError:
            self._check_finite(maps, names)
            raise

    def _aggregate(self, maps: Sequence[Tensor]) -> tuple[NDArray[np.float32], tuple[int, int]]:
        if all(layer_map.device.type == "cpu" for layer_map in maps):
            arrays = [layer_map.permute(0, 2, 3, 1).contiguous().numpy() for layer_map in maps]
            return _native.aggregate(arrays, self.patch_size, self.stride, self.width, self.threads)
        features, grid = aggregate_tensors(maps, self.patch_size, self.stride, self.width)
        array: NDArray[np.float32] = features.cpu().numpy()
        if not np.isfinite(array).all():
            raise ValueError("features must be finite")
        return array, grid

    def _maps(self, batch: Tensor) -> list[Tensor]:
        images = batch.to(self.device, torch.float32)
        half = self.autocast and self.device.type == "cuda"
        try:
            with torch.autocast("cuda", dtype=torch.float16) if half else nullcontext():
                return [layer_map.detach().float() for layer_map in self.backbone(images)]
        except RuntimeError as error:
            height, width = batch.shape[2:]
            if min(height, width) >= _SMALL:
                raise
            raise ValueError(
                f"backbone {self.backbone.name!r} fails on images of {height} x {width} (height x width): {error}. "
                f"Resize them to {_SMALL} or more a side"
            ) from error

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


def iterate_images(
    source: Any, prepare: Callable[[Any], T] | None = None, *, threads: int | None = None
) -> Iterator[tuple[Path | None, T]]:
    """Pairs of the path (None where it is no file) and the image, in order, for every image in ``source``.

    ``source`` is a folder (searched recursively), a file, a sequence of files, arrays or tensors; an array
    (n, H, W, 3), (n, H, W) or of one image; a tensor (n, 3, H, W) or (3, H, W); a torch Dataset or DataLoader of
    tensors, arrays, (image, label, ...) tuples or mappings with ``"image"`` and perhaps ``"image_path"``.

    ``prepare`` is called with each image (a path for files) in a few threads that read ahead of the caller; by default
    it is :func:`to_pixels`. A Dataset or DataLoader is read in the caller's thread.

    Raises ValueError for a source without images, and for an image that cannot be read, naming it by its path or
    index; OSError for a file that cannot be opened; TypeError for a source of another kind.
    """
    read: Callable[[Any], Any] = to_pixels if prepare is None else prepare
    results = _read_ahead(_items(source), read, thread_count(threads), ahead=0)
    return ((path, image) for _, path, image in results)


def to_pixels(image: Any, *, normalised: bool = False) -> Pixels:
    """The pixels of an image as :meth:`FeatureExtractor.prepare` takes it: (H, W, 3) uint8 or (3, H, W) float32.

    Floating-point values must lie in [0, 1], except that ``normalised`` ones need only be finite.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        if image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(
                f"a tensor image must have shape (3, H, W) or (1, H, W), got {tuple(image.shape)}; "
                "an array may have its channels last"
            )
        if image.is_floating_point():
            return _check_range(image.float().expand(3, -1, -1), normalised=normalised)
        image = image.permute(1, 2, 0).numpy()
    elif hasattr(image, "getbands") and image.mode in ("L", "RGB", "I;16"):
        image = np.asarray(image)  # a Pillow image, the item of many a torchvision Dataset
    if not isinstance(image, np.ndarray) or np.ma.isMaskedArray(image):
        raise TypeError(
            f"an image must be a path, a numpy array, a torch tensor, or a Pillow image of mode L, RGB or I;16, "
            f"got {type(image).__name__}"
        )
    if image.ndim == 2:
        image = image[:, :, None]
    if image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(f"an array image must have shape (H, W) or (H, W, 3), channels last, got {image.shape}")
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    if image.dtype == np.uint8:
        return np.ascontiguousarray(image)
    if image.dtype.kind == "u" and image.dtype.itemsize == 2:
        # 65535 is white, by the rounding that files get.
        eight_bit: NDArray[np.uint8] = ((image.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        return eight_bit
    if image.dtype.kind == "f":
        floats = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32).copy())
        return _check_range(floats, normalised=normalised)
    raise TypeError(f"an image must be uint8, uint16 or floating point in [0, 1], got {image.dtype}")


def aggregate_tensors(
    maps: Sequence[Tensor], patch_size: int, stride: int, width: int | None
) -> tuple[Tensor, tuple[int, int]]:
    """What the kernel ``aggregate`` computes, in torch on the maps' own device: ((n * gh * gw, d), (gh, gw)).

    ``maps`` (n, c, h, w), one per layer. Each position takes in its zero-padded p x p neighbourhood; deeper layers are
    interpolated bilinearly (``align_corners=False``) to the first one's grid. ``width`` None joins the means
    (padding counted); a width pools channels and taps of each layer adaptively to it, then the joined layers again.
    """
    padding = (patch_size - 1) // 2
    pooled: list[Tensor] = []
    for layer_map in maps:
        if width is None:
            layer = functional.avg_pool2d(layer_map, patch_size, stride, padding, count_include_pad=True)
        else:
            taps = functional.unfold(layer_map, patch_size, padding=padding, stride=stride)
            rows, columns = ((side + 2 * padding - patch_size) // stride + 1 for side in layer_map.shape[2:])
            # Pooling comes before the interpolation, which is linear too and then has less to do.
            reduced = functional.adaptive_avg_pool1d(taps.transpose(1, 2), width)
            layer = reduced.transpose(1, 2).reshape(len(layer_map), width, rows, columns)
        if pooled and layer.shape[2:] != pooled[0].shape[2:]:
            layer = functional.interpolate(layer, pooled[0].shape[2:], mode="bilinear", align_corners=False)
        pooled.append(layer)
    rows, columns = pooled[0].shape[2:]
    features = torch.cat(pooled, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    if width is not None:
        features = functional.adaptive_avg_pool1d(features[:, None], width)[:, 0]
    return features, (rows, columns)


def _channels(value: float | Triple, name: str) -> Tensor:
    """One number per colour channel, (3, 1, 1)."""
    numbers = torch.as_tensor(value, dtype=torch.float32)
    if numbers.shape not in ((), (3,)) or not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} must be a finite number, or three, one per colour channel, got {value!r}")
    return numbers.expand(3).reshape(3, 1, 1)


def _from_uint8(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1) / 255


def _check_range(image: Tensor, *, normalised: bool) -> Tensor:
    if image.numel() == 0:
        raise ValueError(f"an image must hold at least one pixel, got shape {tuple(image.shape)}")
    low, high = (float(value) for value in torch.aminmax(image))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError("a floating-point image must be finite, got NaN or infinity")
    if not normalised and (low < -1e-6 or high > 1 + 1e-6):
        raise ValueError(
            f"a floating-point image must lie in [0, 1], got [{low:g}, {high:g}]; scale it, or pass mean=0, std=1 "
            "where it is normalised already"
        )
    return image


def _resize_crop_tensor(
    image: Tensor, resize: int | tuple[int, int] | None, crop: int | tuple[int, int] | None
) -> Tensor:
    """``resize_crop`` of a (3, H, W) float32 tensor: its geometry and its checks, asked of a blank mask."""
    resized = resize_crop_mask(np.zeros(image.shape[1:], dtype=np.bool_), resize, None)
    height, width = resized.shape
    rows, columns = resize_crop_mask(resized, None, crop).shape
    if resized.shape != image.shape[1:]:
        image = functional.interpolate(
            image[None], (height, width), mode="bilinear", align_corners=False, antialias=True
        )[0]
    top, left = round((height - rows) / 2), round((width - columns) / 2)
    return image[:, top : top + rows, left : left + columns]


class _Item(NamedTuple):
    name: str
    path: Path | None
    image: Any


def _items(source: Any) -> Iterator[_Item]:
    """The images of a source, not read yet where they are files. TypeError or ValueError for what is no source."""
    if isinstance(source, str | os.PathLike):
        return _named(find_images(source))
    if isinstance(source, np.ndarray):
        # (H, W, 3) is one image: a stack of grey images three pixels wide is not what anyone inspects.
        single = source.ndim == 2 or (source.ndim == 3 and source.shape[2] == 3)
        if not single and source.ndim not in (3, 4):
            raise ValueError(f"an array of images must have shape (n, H, W, 3) or (n, H, W), got {source.shape}")
        return _named([source] if single else source)
    if isinstance(source, Tensor):
        if source.ndim not in (3, 4):
            raise ValueError(f"a tensor of images must have shape (n, 3, H, W) or (3, H, W), got {tuple(source.shape)}")
        return _named([source] if source.ndim == 3 else source)
    if isinstance(source, DataLoader):
        return _named(_from_loader(source))
    if isinstance(source, IterableDataset):
        return _named(map(_describe, source))
    if isinstance(source, Dataset):
        size: int = len(source)  # type: ignore[arg-type]
        return _named(_describe(source[i]) for i in range(size))
    if isinstance(source, Sequence):
        return _named(source)
    raise TypeError(
        "images must be a folder, a file, a sequence of files, arrays or tensors, an array, a tensor, a torch Dataset "
        f"or a DataLoader, got {type(source).__name__}"
    )


class _Described(NamedTuple):
    """An image out of a Dataset, with the path it gave."""

    image: Any
    path: Path | None


def _named(images: Iterable[Any]) -> Iterator[_Item]:
    iterator = iter(images)
    for i in count():
        try:
            image = next(iterator)
        except StopIteration:
            return
        except MemoryError:
            raise
        except Exception as error:
            raise ValueError(f"the source failed at images[{i}]: {type(error).__name__}: {error}") from error
        if isinstance(image, str | os.PathLike):
            yield _Item(os.fspath(image), Path(image), image)
        elif isinstance(image, _Described) and image.path is not None:
            yield _Item(str(image.path), image.path, image.image)
        else:
            yield _Item(f"images[{i}]", None, image.image if isinstance(image, _Described) else image)


def _describe(item: Any) -> _Described:
    """The image of a Dataset's item: the item itself, the first of a tuple, or the ``"image"`` of a mapping."""
    if isinstance(item, Mapping):
        if "image" not in item:
            raise ValueError(f"a mapping out of a Dataset must hold 'image', got {', '.join(map(str, item))}")
        path = item.get("image_path")
        return _Described(item["image"], Path(path) if isinstance(path, str | os.PathLike) else None)
    if isinstance(item, tuple | list):
        if not item:
            raise ValueError("a tuple out of a Dataset must begin with the image, got an empty one")
        return _Described(item[0], None)
    return _Described(item, None)


def _from_loader(loader: DataLoader[Any]) -> Iterator[_Described]:
    for batch in loader:
        paths = batch.get("image_path") if isinstance(batch, Mapping) else None
        images = batch if isinstance(batch, Tensor | np.ndarray) else _describe(batch).image
        if isinstance(images, Tensor | np.ndarray) and images.ndim != 4:
            raise ValueError(f"a batch of a DataLoader must have shape (n, 3, H, W), got {tuple(images.shape)}")
        for i, image in enumerate(images):
            yield _Described(image, Path(paths[i]) if paths is not None else None)


def _read_ahead(
    items: Iterator[_Item],
    read: Callable[[Any], T],
    threads: int | None,
    *,
    ahead: int,
    on_failure: Callable[[str, Exception], object] | None = None,
) -> Iterator[tuple[str, Path | None, T]]:
    """``read`` of every item, in order, by a few threads; ``ahead`` images may wait besides those being read."""
    workers = min(threads or _affinity(), _READERS)
    waiting: deque[tuple[_Item, Future[T]]] = deque()
    empty = True

    def finished(item: _Item, result: Future[T]) -> Iterator[tuple[str, Path | None, T]]:
        try:
            image = result.result()
        except (ValueError, OSError) as error:
            if on_failure is None:
                raise
            on_failure(item.name, error)
        else:
            yield item.name, item.path, image

    with ThreadPoolExecutor(workers, thread_name_prefix="patchcore-rs-read") as pool:
        try:
            for item in items:
                empty = False
                waiting.append((item, pool.submit(_read_item, read, item)))
                if len(waiting) > workers + ahead:
                    yield from finished(*waiting.popleft())
            while waiting:
                yield from finished(*waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if empty:
        raise ValueError("there are no images in this source; give at least one")


def _read_item(read: Callable[[Any], T], item: _Item) -> T:
    try:
        return read(item.image)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if item.name in str(error):
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{item.name}: {error}") from error


def _batch(items: Sequence[tuple[str, Path | None, Tensor]]) -> ImageBatch:
    names, paths, images = zip(*items, strict=True)
    return ImageBatch(names, paths, torch.stack(images))


def _affinity() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
