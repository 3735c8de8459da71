"""`patchcore-rs fit`: learn from flawless images, write a model file."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from patchcore_rs._text import counted, figure
from patchcore_rs.cli.models import load_patchcore
from patchcore_rs.cli.options import require_folder, require_other
from patchcore_rs.cli.terminal import Terminal
from patchcore_rs.images.datasets import find_images, require_flawless
from patchcore_rs.images.files import all_pages, read_image, split_page

if TYPE_CHECKING:
    from collections.abc import Callable

    from patchcore_rs._types import OnError
    from patchcore_rs.detector.base import Detector
    from patchcore_rs.memory_bank import MemoryBank


def fit(
    train_dir: Path,
    output: Path,
    method: str,
    arguments: dict[str, Any],
    *,
    add_to: Path | None,
    calibrate: Path | None,
    false_alarm_rate: float,
    skip_unreadable: bool,
    pages: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Fit the detector of the method, of these arguments, to the images in `train_dir` and write it to `output`.

    Or let the model in the file `add_to` learn from them too, loaded with those arguments.
    """
    images = find_images(train_dir)
    require_flawless(images, train_dir)
    flawless = [] if calibrate is None else find_images(calibrate)
    if calibrate is not None:
        require_flawless(flawless, calibrate)
    if pages == "all":
        images, flawless = all_pages(images), all_pages(flawless)
    if arguments.get("normalize"):
        if calibrate is None:
            raise ValueError("--normalize needs the scores of flawless images: pass --calibrate DIR too")
        if len(flawless) < 2:
            raise ValueError(f"{calibrate}: --normalize needs at least two images to calibrate with; got one")
    if flawless and {path.resolve() for path in flawless} <= {path.resolve() for path in images}:
        raise ValueError(
            f"--calibrate must be a folder of images that are not trained on; got {calibrate}, all of whose images "
            f"{train_dir} holds too. Keep some flawless images apart"
        )
    require_folder(output)
    require_other("--output", output, [Path(split_page(str(path))[0]) for path in images + flawless])
    from patchcore_rs.detector.patchcore import PatchCore
    from patchcore_rs.images.read_ahead import iterate_images
    from patchcore_rs.methods.detectors import DETECTORS

    if not skip_unreadable:  # they are read again at the end, when a fit would be lost with one of them
        for _ in iterate_images(flawless, read_image) if flawless else ():
            pass

    terminal = Terminal(quiet=quiet)
    on_error: OnError = "skip" if skip_unreadable else "raise"
    began = perf_counter()
    constructor: Callable[..., Detector] = DETECTORS[method]
    if add_to is None:
        model = constructor(**arguments)
    else:
        batch_size = arguments.pop("batch_size", None)
        must = "--add-to must be a model of PatchCore, which alone learns more"
        model = load_patchcore(add_to, must, "Fit one anew to all images", **arguments)
        if batch_size is not None:
            model.batch_size = batch_size
    with terminal.progress() as advance, warnings.catch_warnings():
        if flawless:  # a new threshold follows
            warnings.filterwarnings("ignore", message="the threshold does not hold")
        if isinstance(model, PatchCore):
            model.partial_fit(images, progress=advance, on_error=on_error)
        else:
            model.fit(images, progress=advance, on_error=on_error)
        if flawless:
            model.calibrate(flawless, false_alarm_rate=false_alarm_rate, progress=advance, on_error=on_error)
    model.save(output)
    seconds = perf_counter() - began

    bank: MemoryBank | None = getattr(model, "memory_bank_", None)
    count = len(images) - len(model.skipped_)
    calibration, map_calibration = model.calibration_, model.map_calibration_
    if as_json:
        terminal.json(
            {
                "model": str(output),
                "images": count,
                "skipped": [{"path": name, "reason": reason} for name, reason in model.skipped_],
                "training": asdict(model.training_),
                "bank": None if bank is None else {"rows": len(bank), "channels": bank.shape[1], "bytes": bank.nbytes},
                "image_size": list(model.image_size_),
                "threshold": model.threshold_,
                "calibration": None if calibration is None else calibration.to_json(),
                "map_calibration": None if map_calibration is None else map_calibration.to_json(),
                "settings": model.settings_.to_json(),
                "seconds": seconds,
                "stages": model.timings_,
            }
        )
        return
    terminal.say(f"{output}: {model.summary_} from {counted(count, 'image')}, {figure(seconds)} s")
    if calibration is None:
        terminal.remark("No threshold yet: --calibrate with flawless images that were not trained on would set one.")
    else:
        terminal.say(
            f"threshold {figure(calibration.threshold, 6)} from {counted(calibration.images, 'flawless image')}: "
            f"{calibration.forecast}"
        )
