"""Where PyInstaller finds the hook; the wheel's entry point "pyinstaller40" names this function."""

from __future__ import annotations

from importlib import resources


def hook_folders() -> list[str]:
    """The folders that hold `hook-MODULE.py` files."""
    return [str(resources.files(__package__))]
