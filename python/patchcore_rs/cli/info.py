"""`patchcore-rs info`: what this build is made of, or what a model file says of itself."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import TYPE_CHECKING, Any

from patchcore_rs._text import Table
from patchcore_rs._version import __version__, build_info
from patchcore_rs.cli.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray


def info(model: Path | None, *, as_json: bool, quiet: bool) -> None:
    """Show the build, or what a model file says of itself."""
    terminal = Terminal(quiet=quiet)
    facts = build_facts() if model is None else model_facts(model)
    if as_json:
        terminal.json(facts)
        return
    rows = [(name.replace("_", " "), _plain(value)) for name, value in _flat(facts)]
    terminal.table(Table("", ("", ""), tuple(rows), words=("",)))


def build_facts() -> dict[str, Any]:
    """What this installation is made of; packages are looked up, not imported."""
    build = build_info()
    packages: dict[str, str | None] = {}
    for package in ("torch", "torchvision", "numpy", "pillow", "timm", "faiss-cpu"):
        try:
            packages[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            packages[package] = None
    return {**build, "version": __version__, "python": sys.version.split()[0], "packages": packages}


def model_facts(path: Path) -> dict[str, Any]:
    """What a model file says of itself, checked as loading checks it; neither torch nor the backbone is loaded."""
    from patchcore_rs.model.description import read_description

    stored, description = read_description(path)
    facts = description.to_json()
    del facts["requires"]  # for readers of other versions
    return {
        "model": str(path),
        "bytes": path.stat().st_size,
        "written_by": str(stored.metadata.get("writer")),
        "format_version": ".".join(map(str, stored.version)),
        "method": stored.method,
        **_bank(stored.arrays),
        **facts,
    }


def _bank(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The size of the memory bank, of a method that has one."""
    return {"bank": dict(zip(("rows", "channels"), arrays["bank"].shape, strict=True))} if "bank" in arrays else {}


def _flat(facts: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested objects as dotted names."""
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
