"""What the commands check of their arguments before any work."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


def require_folder(file: Path) -> None:
    """Raise FileNotFoundError where the folder to write `file` in is missing: better now than after the work."""
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder to write to does not exist", str(file))
