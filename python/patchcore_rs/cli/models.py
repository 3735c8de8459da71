"""`patchcore-rs info` and `convert`: what a model file says of itself, and what becomes of other programs' models."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

from patchcore_rs._text import Table
from patchcore_rs._version import USED, __version__, build_info, installed
from patchcore_rs.cli.options import require_folder, require_other
from patchcore_rs.cli.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from patchcore_rs.detector.patchcore import PatchCore

_ANOMALIB = {".ckpt", ".pt", ".pth"}


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
    packages: dict[str, str | None] = {**dict.fromkeys(USED), **installed(*USED)}
    return {**build_info(), "version": __version__, "python": sys.version.split()[0], "packages": packages}


def model_facts(path: Path) -> dict[str, Any]:
    """What a model file says of itself, checked as loading checks it; neither torch nor the backbone is loaded."""
    from patchcore_rs.model.arrays import ENSEMBLE, member_arrays
    from patchcore_rs.model.calibration import threshold_origin
    from patchcore_rs.model.description import read_description

    stored, description = read_description(path)
    facts = description.to_json()
    if stored.method == ENSEMBLE:
        parts = member_arrays(stored.arrays)[1]
        facts["members"] = [member | _bank(arrays) for member, (_, arrays) in zip(facts["members"], parts, strict=True)]
    for part in (facts, *facts.get("members", ())):
        del part["requires"]  # for readers of other versions
    facts["threshold_origin"] = threshold_origin(description.threshold, description.calibration)
    return {
        "model": str(path),
        "bytes": path.stat().st_size,
        "written_by": str(stored.metadata.get("writer")),
        "format_version": ".".join(map(str, stored.version)),
        "method": stored.method,
        **_bank(stored.arrays),
        "image_hashes": len(stored.optional["image_hashes"]) if "image_hashes" in stored.optional else None,
        **facts,
    }


def _bank(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The size of the memory bank, of a method that has one."""
    return {"bank": dict(zip(("rows", "channels"), arrays["bank"].shape, strict=True))} if "bank" in arrays else {}


def _flat(facts: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested objects as dotted names, and members by their numbers."""
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        nested = dict(enumerate(value)) if name == "members" else value
        rows += _flat(nested, f"{prefix}{name}.") if isinstance(nested, dict) else [(f"{prefix}{name}", value)]
    return rows


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def convert(source: Path, target: Path, *, prepend: str, arguments: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """Convert `source` to `target`; what it is decides which way. `arguments` are those of loading it."""
    terminal = Terminal(quiet=quiet)
    files = {"source": str(source), "target": str(target)}
    if source.is_dir() or source.suffix.lower() in _ANOMALIB:
        require_folder(target)
        require_other("TARGET", target, [source])
        program, hint = "patchcore-inspection", ""
        if source.is_dir():
            model = _load_folder(source, prepend, arguments)
        else:
            program = "anomalib"
            weights = target.with_name(f"{target.stem}.weights.pth")
            require_other("TARGET, whose weights go beside it,", weights, [source])
            model = _load_anomalib(source, weights, arguments)
            files["weights"] = str(weights)
            hint = f" Give the weights of its network to whatever reads it: --weights {shlex.quote(str(weights))}"
        model.save(target)
        remark = f"{target} scores as {program} does; it has no threshold unless the source had one.{hint}"
    else:
        from patchcore_rs.compat.patchcore_inspection import save_folder

        if "resize" in arguments:
            raise ValueError(f"{source}: a model file says how images are resized; leave out --resize")
        must = "SOURCE must be a model of PatchCore, the one method that patchcore-inspection has"
        model = load_patchcore(source, must, "Give such a one", **arguments)
        target.mkdir(exist_ok=True)
        save_folder(model, target, prepend=prepend)
        program = "patchcore-inspection"
        remark = f"Read it with PatchCore.load_from_path, and resize images to {model.settings_.resize} there."
    rows, channels = model.memory_bank_.shape
    if as_json:
        terminal.json(
            {
                **files,
                "program": program,
                "bank": {"rows": rows, "channels": channels},
                "backbone": str(model.backbone),
                "threshold": model.threshold_,
                "settings": model.settings_.to_json(),
            }
        )
        return
    terminal.say(f"{target}: {rows:,} patches of {channels:,} channels from {source}")
    terminal.remark(remark)


def load_patchcore(path: Path, must: str, remedy: str, **loading: Any) -> PatchCore:
    """The PatchCore of a model file, as its `load` gives it.

    Raises:
        ValueError: the file is of another method: what it `must` be, and the remedy.
    """
    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.model.description import read_description

    stored, description = read_description(path)
    if stored.method != PatchCore.method.name:
        raise ValueError(f"{must}; got {path}, of the method {stored.method!r}. {remedy}")
    usual = {"device": "auto", "weights": "default", "backbone": None, "threads": None}
    return PatchCore.restore(path, stored, description, **usual | loading)


def _load_folder(source: Path, prepend: str, arguments: dict[str, Any]) -> PatchCore:
    from patchcore_rs.compat.patchcore_inspection import load_folder

    return load_folder(source, prepend=prepend, **arguments)


def _load_anomalib(source: Path, weights: Path, arguments: dict[str, Any]) -> PatchCore:
    if arguments:
        raise ValueError(f"{source}: a file of anomalib says this itself; leave out --{next(iter(arguments))}")
    from patchcore_rs.compat.anomalib_exchange import read_file

    return read_file(source, weights)
