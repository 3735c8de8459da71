"""What counts as images: folders, files, arrays, tensors, Datasets and DataLoaders, decided here and nowhere else.

One frame is one image, alone as in a list: an array of two axes, or of three with 1, 3 or 4 channels last, and a tensor
of three axes. Only a fourth axis, in front, makes them several. What could be read either way is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data import Dataset as TorchDataset

from patchcore_rs._checks import one_of
from patchcore_rs.images.datasets import Dataset, find_images, leave_out_masks, require_flawless
from patchcore_rs.images.files import ImageError, all_pages
from patchcore_rs.images.pixels import check_shape, is_pillow

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ACCEPTED = (
    "a folder, a file, an array, a tensor, a Pillow image, bytes, a file object, several of them (a list, a generator, "
    "a column of a table), a torch Dataset or a DataLoader"
)
_channel_order = one_of("rgb", "bgr")
_page_choice = one_of("first", "all")


class Item(NamedTuple):
    """One image, not read yet where it is a file: its name for messages, its path where it is a file."""

    name: str
    path: Path | None
    image: Any


@dataclass(frozen=True)
class Source:
    """The images of one call in their order, to be gone through once; `count` is None where it is not known before.

    `once` says that nothing gives them a second time. `files` are those images that are known to be files before.
    """

    items: Iterator[Item]
    count: int | None
    once: bool = False
    files: tuple[str, ...] = ()


def open_source(
    images: Any, *, training: bool = True, channels: str = "rgb", flawless: bool = False, pages: str = "first"
) -> Source:
    """The images that a caller means.

    Args:
        images: a folder (searched recursively, masks by the names in it left out) or a file; an array (H, W),
            (H, W, 1), (H, W, 3) or (H, W, 4), or n of them, with four axes; a tensor (1, H, W) or (3, H, W), or n of
            them; a Pillow image; an encoded file as bytes or a file object; any of these but folders one after the
            other, out of a sequence, a generator, an array or a column of paths; a data set of `load_dataset`; a torch
            Dataset or DataLoader of tensors, arrays, Pillow images, (image, label, ...) tuples or mappings with "image"
            and perhaps "image_path". A `Source` is returned as it is.
        training: whether a data set of `load_dataset` stands for its training images or its test images.
        channels: the order of colours in arrays and tensors, "rgb" or "bgr" as OpenCV has it. Files, bytes and Pillow
            images say theirs.
        flawless: refuse a folder that holds masks, flawed images or those of a test, by the names in it.
        pages: "all" takes each page of a file as an image, `file.tif#2`; "first" the first.

    Raises:
        TypeError: what came is none of these.
        ValueError: an array or tensor has another shape, or a folder holds no images, or none that may be learnt from.
        OSError: there is nothing at the path.
    """
    if isinstance(images, Source):
        return images
    if isinstance(images, str | os.PathLike):
        path = os.fsdecode(images)
        folder, images = Path(path), find_images(path) if flawless else leave_out_masks(path)
        if flawless:
            require_flawless(images, folder)
    source = _open(images, training=training)
    if _channel_order(channels, "channels") == "bgr":
        source = replace(source, items=(item._replace(image=_from_bgr(item.image)) for item in source.items))
    if _page_choice(pages, "pages") == "first":
        return source
    held = isinstance(images, list | tuple | np.ndarray | Tensor)  # what is no path among these holds no file
    return source if held and not source.files else _with_pages(source)


def _with_pages(source: Source) -> Source:
    """The source with an item for each page of a file."""
    if len(source.files) == source.count:  # nothing but files: how many there are is known before
        files = tuple(map(str, all_pages(source.files)))
        return Source(_named(files), len(files), source.once, files)
    return replace(source, items=(page for item in source.items for page in _pages_of(item)), count=None)


def _pages_of(item: Item) -> Iterator[Item]:
    if not isinstance(item.image, str):  # not a file, or read already
        yield item
        return
    for page in all_pages([item.image]):
        yield Item(str(page), page, str(page))


def _open(images: Any, *, training: bool) -> Source:
    if isinstance(images, Dataset):
        images = images.train if training else [sample.path for sample in images.test]
    elif isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind in "OTU":
        images = images.tolist()  # paths, or images of several sizes
    elif isinstance(images, np.ndarray) and images.ndim == 1 and images.dtype.kind == "S":
        images = [os.fsdecode(path) for path in images.tolist()]  # content of files would lose its zeros there
    elif isinstance(images, bytes | bytearray | memoryview) or is_pillow(images) or _is_file(images):
        images = [images]
    if isinstance(images, np.ndarray | Tensor):
        check_shape(images, batch=images.ndim == 4)
        images = images if images.ndim == 4 else [images]
        return Source(_named(images), len(images))
    if isinstance(images, DataLoader):
        # Its length counts batches.
        return Source(_named(_from_loader(images)), None, isinstance(images.dataset, IterableDataset))
    if isinstance(images, IterableDataset):
        return Source(_named(map(_describe, images)), len(images) if hasattr(images, "__len__") else None, once=True)
    if isinstance(images, TorchDataset):
        size: int = len(images)  # type: ignore[arg-type]
        return Source(_named(_describe(images[i]) for i in range(size)), size)
    remedy = ""
    if isinstance(images, set | frozenset):
        remedy = ". A set has no order, by which the answers would be told apart: pass sorted(images) or list(images)"
    elif isinstance(images, Mapping):
        remedy = ". Pass its values, list(images.values())"
    elif hasattr(images, "columns"):
        remedy = '. Pass the column of paths, such as table["path"]'
    elif isinstance(images, list | tuple):
        files = tuple(os.fsdecode(image) for image in images if isinstance(image, str | os.PathLike))
        once = any(_is_file(image) and not _can_seek(image) for image in images)
        return Source(_named(images), len(images), once, files)
    elif isinstance(images, Iterable):
        return Source(_named(images), len(images) if isinstance(images, Sized) else None, isinstance(images, Iterator))
    raise TypeError(f"images must be {_ACCEPTED}; got {type(images).__name__}{remedy}")


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
        if isinstance(image, bytearray | memoryview):
            image = bytes(image)
        elif _is_file(image):
            image = _content(image, f"images[{i}]")
        if isinstance(image, str | os.PathLike):
            path = os.fsdecode(image)
            yield Item(path, Path(path), path)
        elif isinstance(image, _Described) and image.path is not None:
            yield Item(str(image.path), image.path, image.image)
        else:
            yield Item(f"images[{i}]", None, image.image if isinstance(image, _Described) else image)


def _is_file(image: object) -> bool:
    """Whether it is an open file, or what reads like one."""
    return callable(getattr(image, "read", None)) and not isinstance(image, os.PathLike | Tensor)


def _can_seek(file: Any) -> bool:
    return not getattr(file, "closed", False) and hasattr(file, "seekable") and bool(file.seekable())


def _content(file: Any, name: str) -> bytes:
    """The rest of an open file, which stands afterwards where it stood where it can."""
    if getattr(file, "closed", False):
        raise ValueError(f"{name}: this file object is closed; pass an open one, or the path")
    begin = file.tell() if _can_seek(file) else None
    content = file.read()
    if begin is not None:
        file.seek(begin)
    if not isinstance(content, bytes):
        raise TypeError(f'{name}: a file object must be open in binary mode; got text. Open it with mode "rb"')
    if not content:
        raise ImageError(f"{name}: nothing is left to read in this file object; go back first, file.seek(0)")
    return content


def _from_bgr(image: Any) -> Any:
    """An array or tensor of colours with red first; whatever else as it is."""
    axis = -3 if isinstance(image, Tensor) else -1
    if not isinstance(image, np.ndarray | Tensor) or image.ndim != 3 or image.shape[axis] not in (3, 4):
        return image
    order = [2, 1, 0, 3][: image.shape[axis]]
    return image[order] if isinstance(image, Tensor) else image[..., order]


def _describe(item: Any) -> _Described:
    """The image of a Dataset's item: the item itself, the first of a tuple, or the "image" of a mapping."""
    if isinstance(item, Mapping):
        if "image" not in item:
            raise ValueError(f"a mapping out of a Dataset must hold 'image'; got {', '.join(map(str, item))}")
        return _at(item["image"], item.get("image_path"))
    if isinstance(item, tuple | list):
        if not item:
            raise ValueError("a tuple out of a Dataset must begin with the image; got an empty one")
        return _at(item[0])
    return _at(item)


def _at(image: Any, path: Any = None) -> _Described:
    """An image with the path that it is, or that is given beside it."""
    given = next((known for known in (path, image) if isinstance(known, str | os.PathLike)), None)
    return _Described(image, None if given is None else Path(os.fsdecode(given)))


def _from_loader(loader: DataLoader[Any]) -> Iterator[_Described]:
    for batch in loader:
        if _is_list(batch, loader):
            yield from map(_describe, batch)
            continue
        images = batch if isinstance(batch, Tensor | np.ndarray) else _describe(batch).image
        several = loader.batch_sampler is not None or _holds_several(images)  # batch_size=None gives single items too
        if isinstance(images, Tensor | np.ndarray):
            _check_loaded(images, batch=several)
        if not several:
            yield _describe(batch)
            continue
        paths = batch.get("image_path") if isinstance(batch, Mapping) else None
        for i, image in enumerate(images):
            yield _at(image, None if paths is None else paths[i])


def _is_list(batch: Any, loader: DataLoader[Any]) -> bool:
    """Whether a batch is a list of the Dataset's items, and not one of images, then one of labels, ...

    `collate_fn=list` gives such, and torch's own collation of text.

    Raises:
        ValueError: it may be both.
    """
    if not isinstance(batch, list | tuple) or not batch or loader.batch_sampler is None:
        return False
    first = batch[0]
    if isinstance(first, str | bytes):
        return True
    if loader.collate_fn is default_collate or not isinstance(first, list | tuple):
        return loader.collate_fn is not default_collate and not _holds_several(first)
    kinds = [set(map(_kind, field)) if isinstance(field, list | tuple) else set() for field in batch]
    if len(first) > 1 and len(kinds[0]) == 1 and kinds.count(kinds[0]) == len(kinds):
        raise ValueError(
            "a batch of a DataLoader must tell images from what belongs to them; got nothing but lists of "
            f"{kinds[0].pop()}. Let collate_fn give the images alone, or (images, labels)"
        )
    return len(kinds[0]) > 1


def _kind(value: object) -> str:
    return "Pillow images" if is_pillow(value) else type(value).__name__


def _holds_several(images: Any) -> bool:
    """Whether these are n images, and not one."""
    return images.ndim == 4 if isinstance(images, Tensor | np.ndarray) else isinstance(images, list | tuple)


def _check_loaded(images: Tensor | NDArray[Any], *, batch: bool) -> None:
    """ValueError, with what mends it, unless what a DataLoader gave has its channels where they belong."""
    try:
        check_shape(images, batch=batch)
    except ValueError as error:
        expected = "3, H, W" if isinstance(images, Tensor) else "H, W, 3"
        raise ValueError(
            f"{'a batch' if batch else 'an image'} of a DataLoader must have shape ({'n, ' * batch}{expected}); got "
            f"{tuple(images.shape)}. Let the Dataset give tensors with their channels first, tensor.permute(2, 0, 1), "
            "or keep its arrays and Pillow images as they are: DataLoader(..., collate_fn=list)"
        ) from error
