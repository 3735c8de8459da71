"""Which build this is; below everything, so that any module may say it."""

from __future__ import annotations

from pathlib import Path

try:
    from patchcore_rs._native import build_info
except ImportError as error:
    if not Path(__file__).is_file():  # a module of a zip
        raise ImportError(
            f"patchcore_rs must lie in a folder, since no machine code is loaded out of a zip; got {__file__}. Install "
            "the wheel by pip, or unpack the zip and put its folder on sys.path"
        ) from error
    raise

__all__ = ["__version__", "build_info"]

__version__: str = build_info()["version"]
