"""Images read and prepared in a few threads, ahead of whoever works on them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from patchcore_rs._checks import thread_count
from patchcore_rs._limits import usable_threads, workers
from patchcore_rs.images.files import ImageError
from patchcore_rs.images.pixels import to_pixels
from patchcore_rs.images.sources import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from concurrent.futures import Future
    from pathlib import Path

    from patchcore_rs.images.sources import Item

T = TypeVar("T")

_READERS = 8  # threads beyond these wait for the disk


def iterate_images(
    source: Any, prepare: Callable[[Any], T] | None = None, *, threads: int | None = None
) -> Iterator[tuple[Path | None, T]]:
    """Pairs of the path (None where it is no file) and the image, in order, for every image in `source`.

    Args:
        source: what `open_source` takes.
        prepare: called with each image (a path for files) in a few threads that read ahead of the caller; by default
            `to_pixels`. A Dataset or DataLoader is read in the caller's thread.
        threads: None for as many as this process may use.

    Raises:
        ValueError: the source has no images, or one cannot be read, which is named by its path or index.
        OSError: a file cannot be opened.
        TypeError: the source is of another kind.
    """
    read: Callable[[Any], Any] = to_pixels if prepare is None else prepare
    results = read_ahead(open_source(source).items, read, thread_count(threads), ahead=0)
    return ((path, image) for _, path, image in results)


def read_ahead(
    items: Iterator[Item],
    read: Callable[[Any], T],
    threads: int | None,
    *,
    ahead: int,
    on_failure: Callable[[str, Exception], object] | None = None,
) -> Iterator[tuple[str, Path | None, T]]:
    """Name, path and `read` of every item, in order.

    Args:
        items: what to read; taken in the caller's thread.
        read: called with an item's image, in a few threads; in the caller's once the interpreter is ending.
        threads: None for as many as this process may use.
        ahead: how many images may wait besides those being read.
        on_failure: called with the name of an item that cannot be read and the error; the item is then left out. None
            raises the error.

    Raises:
        ValueError: there is no item at all, or one cannot be read.
        OSError: a file cannot be opened.
        TypeError: an item is no image.
    """
    count = min(usable_threads(threads), _READERS)
    waiting: deque[tuple[Item, Future[T]]] = deque()
    empty = True

    def finished(item: Item, result: Future[T]) -> Iterator[tuple[str, Path | None, T]]:
        try:
            image = result.result()
        except (ValueError, OSError) as error:
            if on_failure is None:
                raise
            on_failure(item.name, error)
        else:
            yield item.name, item.path, image

    with workers(count) as readers:
        for item in items:
            empty = False
            waiting.append((item, readers.submit(_read_item, read, item)))
            if len(waiting) > count + ahead:
                yield from finished(*waiting.popleft())
        while waiting:
            yield from finished(*waiting.popleft())
    if empty:
        raise ValueError("there are no images in this source; give at least one")


def _read_item(read: Callable[[Any], T], item: Item) -> T:
    try:
        return read(item.image)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        if item.name in str(error):
            raise
        kind = next((kind for kind in (TypeError, ImageError) if isinstance(error, kind)), ValueError)
        raise kind(f"{item.name}: {error}") from error
