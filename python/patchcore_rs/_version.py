"""Which build this is; below everything, so that any module may say it."""

from __future__ import annotations

from patchcore_rs._native import VERSION, build_info

__all__ = ["__version__", "build_info"]

__version__: str = VERSION
