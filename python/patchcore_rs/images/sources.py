"""What counts as images: folders, files, arrays, tensors, Datasets and DataLoaders, decided here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import Dataset as TorchDataset

from patchcore_rs.images.datasets import Dataset, find_images


class Item(NamedTuple):
    """One image, not read yet where it is a file: its name for messages, its path where it is a file."""

    name: str
    path: Path | None
    image: Any


@dataclass(frozen=True)
class Source:
    """The images of one call in their order, to be gone through once; `count` is None where it is not known before."""

    items: Iterator[Item]
    count: int | None


def open_source(images: Any, *, training: bool = True) -> Source:
    """The images that a caller means.

    Args:
        images: a folder (searched recursively), a file, a sequence of files, arrays or tensors; an array
            (n, H, W, 3), (n, H, W) or of one image; a tensor (n, 3, H, W) or (3, H, W); a data set of `load_dataset`;
            a torch Dataset or DataLoader of tensors, arrays, (image, label, ...) tuples or mappings with "image" and
            perhaps "image_path". A `Source` is returned as it is.
        training: whether a data set of `load_dataset` stands for its training images or its test images.

    Raises:
        TypeError: what came is none of these.
        ValueError: an array or tensor has another shape, or a folder holds no images.
        OSError: there is nothing at the path.
    """
    if isinstance(images, Source):
        return images
    if isinstance(images, Dataset):
        images = images.train if training else [sample.path for sample in images.test]
    elif isinstance(images, str | os.PathLike):
        images = find_images(images)
    if isinstance(images, np.ndarray):
        # (H, W, 3) is one image: a stack of grey images three pixels wide is not what anyone inspects.
        single = images.ndim == 2 or (images.ndim == 3 and images.shape[2] == 3)
        if not single and images.ndim not in (3, 4):
            raise ValueError(f"an array of images must have shape (n, H, W, 3) or (n, H, W); got {images.shape}")
        images = [images] if single else images
        return Source(_named(images), len(images))
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4):
            raise ValueError(f"a tensor of images must have shape (n, 3, H, W) or (3, H, W); got {tuple(images.shape)}")
        images = [images] if images.ndim == 3 else images
        return Source(_named(images), len(images))
    if isinstance(images, DataLoader):
        return Source(_named(_from_loader(images)), None)  # its length counts batches
    if isinstance(images, IterableDataset):
        return Source(_named(map(_describe, images)), len(images) if hasattr(images, "__len__") else None)
    if isinstance(images, TorchDataset):
        size: int = len(images)  # type: ignore[arg-type]
        return Source(_named(_describe(images[i]) for i in range(size)), size)
    if isinstance(images, Sequence):
        return Source(_named(images), len(images))
    raise TypeError(
        "images must be a folder, a file, a sequence of files, arrays or tensors, an array, a tensor, a torch Dataset "
        f"or a DataLoader; got {type(images).__name__}"
    )


def describe_source(images: Any, paths: Sequence[Path | None]) -> str:
    """Where images come from, in words for a record: the folder they share, else their number and type."""
    files = [path for path in paths if path is not None]
    if len(files) == len(paths):
        try:
            return os.path.commonpath([path.parent for path in files])
        except ValueError:  # on two drives, or relative beside absolute
            pass
    return f"{len(paths)} images ({type(images).__name__})"


class _Described(NamedTuple):
    """An image out of a Dataset, with the path it gave."""

    image: Any
    path: Path | None


def _named(images: Iterable[Any]) -> Iterator[Item]:
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
            yield Item(os.fspath(image), Path(image), image)
        elif isinstance(image, _Described) and image.path is not None:
            yield Item(str(image.path), image.path, image.image)
        else:
            yield Item(f"images[{i}]", None, image.image if isinstance(image, _Described) else image)


def _describe(item: Any) -> _Described:
    """The image of a Dataset's item: the item itself, the first of a tuple, or the "image" of a mapping."""
    if isinstance(item, Mapping):
        if "image" not in item:
            raise ValueError(f"a mapping out of a Dataset must hold 'image'; got {', '.join(map(str, item))}")
        path = item.get("image_path")
        return _Described(item["image"], Path(path) if isinstance(path, str | os.PathLike) else None)
    if isinstance(item, tuple | list):
        if not item:
            raise ValueError("a tuple out of a Dataset must begin with the image; got an empty one")
        return _Described(item[0], None)
    return _Described(item, None)


def _from_loader(loader: DataLoader[Any]) -> Iterator[_Described]:
    for batch in loader:
        paths = batch.get("image_path") if isinstance(batch, Mapping) else None
        images = batch if isinstance(batch, Tensor | np.ndarray) else _describe(batch).image
        if isinstance(images, Tensor | np.ndarray) and images.ndim != 4:
            raise ValueError(f"a batch of a DataLoader must have shape (n, 3, H, W); got {tuple(images.shape)}")
        for i, image in enumerate(images):
            yield _Described(image, Path(paths[i]) if paths is not None else None)
