"""Which sample is white, where there are more than 8 bits: by the depth, by what a caller says, or by the images."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL import Image

FULL = 65535
_WHITES = (1023, 4095, 16383, FULL)  # of cameras with 10, 12, 14 and 16 bits
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_WHITE_IS_ZERO = 0


class Peak:
    """The largest 16-bit sample of the images that were read, for several threads at once.

    Attributes:
        value: that sample, None where no image had 16 bits.
        share: the largest share of white that one reached.
        white: the white of that one.
    """

    def __init__(self) -> None:
        """Nothing was read."""
        self.value: int | None = None
        self.share, self.white = 0.0, FULL
        self._lock = Lock()

    def note(self, value: int, white: int) -> None:
        """An image had this largest sample."""
        with self._lock:
            self.value = max(value, self.value or 0)
            if value / white >= self.share:
                self.share, self.white = value / white, white

    @property
    def white_level(self) -> int:
        """The white of the camera that the samples are likely from; that of 16 bits where there were none."""
        return FULL if self.value is None else next(white for white in _WHITES if white >= self.value)


@dataclass(frozen=True)
class Levels:
    """How samples of more than 8 bits become brightness.

    Attributes:
        white_level: the 16-bit sample that is white; larger ones count as white. A file that states fewer bits has
            its own white where that is less.
        value_range: the 32-bit or floating-point samples that are black and white; None where they are not known,
            and floating-point ones in memory lie in [0, 1].
        peak: told of every 16-bit image.
        raw: is given the samples that are scaled, as they were before.
    """

    white_level: int = FULL
    value_range: tuple[float, float] | None = None
    peak: Peak | None = None
    raw: list[NDArray[Any]] | None = None

    @classmethod
    def of(cls, settings: Any) -> Levels:
        """Those of a detector's settings."""
        return cls(settings.white_level, settings.value_range)

    def white(self, samples: NDArray[Any], depth: int = FULL) -> int:
        """The white of 16-bit samples whose file holds values up to `depth`."""
        white = min(self.white_level, depth)
        if self.peak is not None and samples.size:
            self.peak.note(int(samples.max()), white)
        if self.raw is not None:
            self.raw.append(samples.astype(np.uint16) if samples.itemsize > 2 else samples)
        return white

    def to_floats(self, samples: NDArray[Any]) -> NDArray[np.float32]:
        """32-bit or floating-point samples in [0, 1], as `value_range` says; it must be there.

        Raises:
            ValueError: a sample is NaN.
        """
        assert self.value_range is not None, "the caller asks first"
        if self.raw is not None:
            self.raw.append(samples)
        low, high = self.value_range
        with np.errstate(all="ignore"):  # infinite ones are clipped, NaN is refused
            scaled = (samples.astype(np.float64) - low) / (high - low)
        if np.isnan(scaled).any():
            raise ValueError("samples must not be NaN; replace them, by the lowest of the range for instance")
        with np.errstate(under="ignore"):
            floats: NDArray[np.float32] = scaled.clip(0, 1).astype(np.float32)
        return floats


def to_8_bits(samples: NDArray[Any], white: int) -> NDArray[np.uint8]:
    """16-bit samples on the scale to 255, rounded; larger ones than `white` are white."""
    samples = np.minimum(samples, white).astype(np.uint32)
    grey: NDArray[np.uint8] = ((samples * 255 + white // 2) // white).astype(np.uint8)
    return grey


def is_deep_grey(image: Image.Image) -> bool:
    """Whether a Pillow image is grey of 9 to 16 bits."""
    # Older releases of Pillow open a 16-bit PNG as mode I, the mode of 32-bit TIFF; a PNG never holds more than 16.
    # It scales a deeper PGM to 16 bits, and opens it as mode I too.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def white_is_zero(image: Image.Image) -> bool:
    """Whether the TIFF file that a Pillow image comes from says so."""
    return bool(getattr(image, "tag_v2", {}).get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO)


def deep_grey(image: Image.Image, levels: Levels) -> tuple[NDArray[np.uint32], int] | None:
    """Samples of a grey image deeper than 8 bits, up to that of white, and white; None for other images."""
    if not is_deep_grey(image):
        return None
    values = np.asarray(image).astype(np.uint32)
    tags: Any = getattr(image, "tag_v2", {})
    white = levels.white(values, (1 << tags.get(_TIFF_BITS_PER_SAMPLE, (16,))[0]) - 1)
    values = np.minimum(values, white)
    return white - values if white_is_zero(image) else values, white
