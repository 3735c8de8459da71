"""What `PatchCore.predict` returns, and how it is written for other programs."""

from __future__ import annotations

import base64
import csv
import errno
import html
import io
import json
import operator
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np

from patchcore_rs._text import NOTHING, figure, printable
from patchcore_rs.images.files import encode_webp
from patchcore_rs.model.file import replace_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from patchcore_rs.model.map_values import MapScale


_SHOWN = 10  # images in a notebook
_SIDE = 96  # of their maps there, in pixels


@dataclass(frozen=True, repr=False, eq=False)
class Prediction:
    """Scores of n images, in their order; higher is more anomalous everywhere.

    `len` is the number of images; an index or a loop gives predictions of some or of one of them.

    A map belongs to the image as the model saw it, resized to (h', w') by `resize` and cut to its centre (H, W) by
    `crop`: pixel (y, x) of the map is pixel (y, x) of `images.pixels.read_as_seen`. In an original image of (h, w)
    pixels, EXIF orientation applied, its centre lies at row (y + top + 0.5) · h / h' - 0.5 and column
    (x + left + 0.5) · w / w' - 0.5, where top = round((h' - H) / 2) and left = round((w' - W) / 2). What the crop
    cut off was not looked at, and `unseen` says how much that is.

    Attributes:
        scores: (n,) float64 image scores.
        maps: (n, H, W) float32 anomaly maps, at the size of the images after resizing and cropping; None of
            `predict(..., maps=False)`.
        labels: (n,) int8, 1 where score >= threshold, else 0; None for a detector without threshold.
        threshold: the threshold on the scale of `scores`, or None.
        paths: the images' files, None for one that is no file.
        skipped: (name, reason) of images left out by `on_error="skip"`; they have no place in the arrays, so a part
            of a prediction has none.
        unseen: (n,) float64, the share of each image's area that the crop cut off, 0 to below 1; None where it is not
            known, as for features of one's own.
        map_scale: the values of `maps` between which the same colours mean the same in every image: below `low` is what
            maps of normal images show. None where the model does not know: from an old file, or of a method that cannot
            know before `calibrate`, such as `MahalanobisAD`. See `MapScale`.
        in_training: (n,) bool, whether the detector was trained on the image, sample by sample the same before it is
            resized; None of `predict` without `in_training=True`, and where the detector or a `FeatureSet` holds no
            hashes of its images.
    """

    scores: NDArray[np.float64]
    maps: NDArray[np.float32] | None
    labels: NDArray[np.int8] | None
    threshold: float | None
    paths: tuple[Path | None, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    unseen: NDArray[np.float64] | None = None
    map_scale: MapScale | None = None
    in_training: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        """The number of images."""
        return len(self.scores)

    def __iter__(self) -> Iterator[Prediction]:
        """The prediction of each image, a `Prediction` of length 1."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: SupportsIndex | slice | Sequence[int] | NDArray[Any]) -> Prediction:
        """The prediction of some images, without `skipped`.

        Args:
            index: an integer (negative from the end), a slice, or a list or 1-D array of integers or of one bool for
                each image, as numpy has them: `prediction[prediction.labels == 1]`.

        Returns:
            A `Prediction`, of length 1 for an integer. For an integer or a slice its arrays are views of this one's.

        Raises:
            TypeError: `index` is nothing of these.
            IndexError: it is out of range, or an array of another shape.
        """
        key = _key(index, len(self))
        return replace(
            self,
            scores=self.scores[key],
            maps=None if self.maps is None else self.maps[key],
            labels=None if self.labels is None else self.labels[key],
            paths=tuple(self.paths[i] for i in np.arange(len(self))[key]),
            skipped=(),
            unseen=None if self.unseen is None else self.unseen[key],
            in_training=None if self.in_training is None else self.in_training[key],
        )

    def __repr__(self) -> str:
        """One line: how many images, the range of their scores, how many are anomalous."""
        parts = [f"{len(self)} images"]
        if len(self):
            parts.append(f"scores {self.scores.min():.4g} to {self.scores.max():.4g}")
            parts.append("no maps" if self.maps is None else f"maps {self.maps.shape[1]} x {self.maps.shape[2]}")
        if self.labels is not None:
            parts.append(f"{int(self.labels.sum())} anomalous at threshold {self.threshold:.4g}")
        if self.unseen is not None and self.unseen.any():
            parts.append(f"up to {self.unseen.max():.0%} of an image not seen")
        if self.skipped:
            parts.append(f"{len(self.skipped)} skipped")
        return f"Prediction({', '.join(parts)})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the images of the highest scores, with small maps that are white where unusual."""
        order = np.argsort(-self.scores, kind="stable")[:_SHOWN]
        words = {None: NOTHING, True: "anomalous", False: "normal"}
        described, lines = list(self._rows()), []
        for i in order.tolist():
            path, score, anomalous = described[i]
            name = html.escape(printable(str(path or f"[{i}]")))
            lines.append(f"<tr><td>{figure(score, 4)}<td>{words[anomalous]}<td>{self._picture(i)}<td>{name}</tr>")
        head = "<tr><th>score<th>verdict<th>map<th>image</tr>"
        return f"<p>{html.escape(repr(self))}</p><table>{head}{''.join(lines)}</table>"

    def _picture(self, i: int) -> str:
        """The map of an image as HTML, from `map_scale` or else from the lowest to the highest of all map values."""
        if self.maps is None:
            return NOTHING
        scale = self.map_scale
        low, high = (self.maps.min(), self.maps.max()) if scale is None else (scale.low, scale.high)
        share = (self.maps[i] - low) / (high - low if high > low else 1.0)
        grey = (share.clip(0, 1) * 255).astype(np.uint8)
        picture = encode_webp(np.repeat(grey[:, :, None], 3, axis=2), side=_SIDE, quality=80)
        return f'<img src="data:image/webp;base64,{base64.b64encode(picture).decode("ascii")}">'

    @overload
    def to_json(self, path: None = None) -> str: ...

    @overload
    def to_json(self, path: str | os.PathLike[str]) -> None: ...

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str | None:
        """Scores and labels as one JSON object, without the maps.

        Its keys are those of `patchcore-rs predict --json`: "threshold" (a number or null), "scale", {"low", "high",
        "origin"} of `map_scale` or null, "images", a list of {"path": a string or null, "score": a number, "anomalous":
        true, false or null, "unseen": a share or null}, and "skipped", a list of {"path", "reason"}. Numbers read back
        to the same bits.

        Args:
            path: a file to write, in UTF-8; it appears whole or not at all, in place of one of this name.

        Returns:
            The text where `path` is None, else None.

        Raises:
            ValueError: a score or the threshold is not finite, which JSON has no word for.
            OSError: the file cannot be written.
        """
        numbers = self.scores if self.threshold is None else np.append(self.scores, self.threshold)
        if not np.isfinite(numbers).all():
            where = int(np.flatnonzero(~np.isfinite(numbers))[0])
            name = f"scores[{where}]" if where < len(self) else "threshold"
            raise ValueError(f"{name} must be finite to be written as JSON; got {numbers[where]}")
        unseen = [None] * len(self) if self.unseen is None else self.unseen.tolist()
        answer = {
            "threshold": None if self.threshold is None else float(self.threshold),
            "scale": None if self.map_scale is None else self.map_scale.to_json(),
            "images": [
                {"path": None if path is None else str(path), "score": score, "anomalous": anomalous, "unseen": share}
                for (path, score, anomalous), share in zip(self._rows(), unseen, strict=True)
            ],
            "skipped": [{"path": name, "reason": reason} for name, reason in self.skipped],
        }
        return _written(json.dumps(answer, indent=2, allow_nan=False) + "\n", path)

    @overload
    def to_csv(self, path: None = None) -> str: ...

    @overload
    def to_csv(self, path: str | os.PathLike[str]) -> None: ...

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str | None:
        r"""Scores and labels as comma-separated values, without maps and skipped images.

        A line of names, `path,score,anomalous`, then a line an image, as of `patchcore-rs predict --csv`: the path is
        empty for an image that is no file, the score reads back to the same bits, `anomalous` is 0, 1, or empty
        without a threshold. Lines end in "\n".

        Args:
            path: a file to write, in UTF-8; it appears whole or not at all, in place of one of this name.

        Returns:
            The text where `path` is None, else None.

        Raises:
            OSError: the file cannot be written.
        """
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "score", "anomalous"])
        for image, score, anomalous in self._rows():
            writer.writerow([image, repr(score), None if anomalous is None else int(anomalous)])
        return _written(text.getvalue(), path)

    def _rows(self) -> Iterator[tuple[Path | None, float, bool | None]]:
        """Path, score and verdict of each image."""
        labels = [None] * len(self) if self.labels is None else [label == 1 for label in self.labels.tolist()]
        return zip(self.paths, self.scores.tolist(), labels, strict=True)


def _key(index: Any, count: int) -> slice | NDArray[np.intp]:
    """What picks the images of `index` out of arrays of `count`, with their axis kept."""
    if isinstance(index, slice):
        return index
    allowed = f"index must be from {-count} to {count - 1}" if count else "index must be a slice of no images"
    if not isinstance(index, (list, np.ndarray)) or np.ndim(index) == 0:
        try:
            if isinstance(index, bool | np.bool_):  # an integer to Python, and to numpy before 2
                raise TypeError
            number = operator.index(index)
        except TypeError:
            raise TypeError(
                "index must be an integer, a slice, or a list or 1-D array of integers or bools; "
                f"got {index!r:.80} ({type(index).__name__})"
            ) from None
        if not -count <= number < count:
            raise IndexError(f"{allowed}; got {number}")
        number %= count
        return slice(number, number + 1)
    array = np.asarray(index)
    if array.size == 0 and isinstance(index, list):
        array = array.astype(np.intp)
    if array.dtype.kind not in "biu":
        raise TypeError(f"index must be an array of integers or bools; got dtype {array.dtype}")
    if array.ndim != 1 or (array.dtype == np.bool_ and len(array) != count):
        raise IndexError(f"index must be a 1-D array, of {count} where it holds bools; got shape {array.shape}")
    if array.dtype == np.bool_:
        return np.flatnonzero(array)
    outside = array[(array < -count) | (array >= count)]
    if outside.size:
        raise IndexError(f"{allowed}; got {outside[0]}")
    return array.astype(np.intp)


def _written(text: str, path: str | os.PathLike[str] | None) -> str | None:
    """Return `text` where `path` is None, else write it there, whole or not at all."""
    if path is None:
        return text
    contents = text.encode("utf-8", "surrogateescape")  # a file name that is no UTF-8 keeps its bytes
    target = Path(os.path.realpath(path))  # through a link the file it names is replaced, not the link
    if target.exists() and not target.is_file():
        target.write_bytes(contents)  # a pipe or device takes it, a folder refuses
        return None
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write in does not exist", os.fspath(path))
    replace_file(target, contents)
    return None
