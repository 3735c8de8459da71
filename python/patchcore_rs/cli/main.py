"""The command `patchcore-rs`: its options, its help, its exit codes. What a command does is in the module of its name.

Importing this module imports click and nothing heavier: every command imports what it needs when it runs, so `--help`
answers at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from patchcore_rs._version import __version__
from patchcore_rs.cli.program import DEBUG, PROGRAM, ExitCode, Program

Command = TypeVar("Command", bound=Callable[..., Any])


def _amount(text: str) -> float | None:
    """A coreset: a fraction (with a point), a count (without), or "all"."""
    try:
        return None if text == "all" else int(text) if text.isdecimal() else float(text)
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is no fraction such as 0.1, no count such as 5000, and not 'all'"
        ) from error


def _size(text: str) -> int | tuple[int, int] | None:
    """A side, a size HEIGHTxWIDTH, or "none"."""
    try:
        height, _, width = text.partition("x")
        return None if text == "none" else (int(height), int(width)) if width else int(height)
    except ValueError as error:
        raise click.BadParameter(
            f"{text!r} is no side such as 256, no HEIGHTxWIDTH such as 240x320, and not 'none'"
        ) from error


def _count(text: str) -> int | None:
    """A whole number, or "none"."""
    try:
        return None if text == "none" else int(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no whole number and not 'none'") from error


def _width(text: str) -> int | str:
    """A whole number, or "concat"."""
    try:
        return text if text == "concat" else int(text)
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no whole number and not 'concat'") from error


def _comma_separated(_: click.Context, __: click.Parameter, value: str | None) -> tuple[str, ...] | None:
    return None if value is None else tuple(part.strip() for part in value.split(","))


def _given(options: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Take the options of these names out of `options`; return those that were given, as arguments of PatchCore."""
    values = {name: options.pop(name) for name in names if name in options}
    return {name: value for name, value in values.items() if _is_given(name)}


def _is_given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is not ParameterSource.DEFAULT


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:  # noqa: FBT001 - click's signature
    ctx.meta[DEBUG] = value


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Several options as one decorator, shown in the order given."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# The options that are arguments of PatchCore; one not given is left to PatchCore.
_MODEL = (
    *("backbone", "layers", "weights", "profile", "resize", "crop", "embedding", "patch_size", "coreset_method"),
    *("projection", "standardize", "reweight", "device", "threads", "batch_size"),
)
# Those among them that are no choice of the model's.
_RUNNING = {"weights", "device", "threads", "batch_size"}

_common = _options(
    click.option("-q", "--quiet", is_flag=True, help="No progress and no remarks on stderr; errors still show."),
    click.option(
        "--debug", is_flag=True, expose_value=False, callback=_set_debug, help="Show where an error came from."
    ),
)

_machine = _options(
    click.option(
        "--device", metavar="NAME", help="Where the backbone runs: auto, cpu, cuda, cuda:1, mps.  [default: auto]"
    ),
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        metavar="N",
        help="Threads to use.  [default: all this process may use]",
    ),
    click.option("--batch-size", type=click.IntRange(min=1), metavar="N", help="Images a batch."),
)

_model = _options(
    click.option(
        "--backbone",
        metavar="NAME",
        help="efficientnet_lite0 (small, its weights come with this package), any torchvision name, or timm:NAME.  "
        "[default: the profile's, wide_resnet50_2 for paper]",
    ),
    click.option(
        "--layers",
        metavar="A,B",
        callback=_comma_separated,
        help="Layers whose maps are used.  [default: the backbone's, layer2,layer3 for ResNets]",
    ),
    click.option(
        "--weights",
        metavar="FILE",
        help="A state dict (.safetensors, .pth) in place of the ImageNet weights, which torchvision fetches once.",
    ),
    click.option(
        "--profile",
        type=click.Choice(["paper", "amazon", "anomalib"]),
        help="Whose arithmetic to follow where implementations differ.  [default: paper]",
    ),
    click.option(
        "--resize", type=_size, metavar="SIZE", help="Shorter side, HEIGHTxWIDTH, or none.  [default: the backbone's]"
    ),
    click.option(
        "--crop", type=_size, metavar="SIZE", help="Centre crop after it, or none.  [default: the backbone's]"
    ),
    click.option(
        "--embedding",
        type=_width,
        metavar="WIDTH",
        help="Channels of a patch feature, or concat for all.  [default: the backbone's]",
    ),
    click.option(
        "--patch-size", type=click.IntRange(min=1), metavar="P", help="Side of a patch's neighbourhood.  [default: 3]"
    ),
    click.option(
        "--coreset-method", type=click.Choice(["greedy", "random"]), help="How patches are chosen.  [default: greedy]"
    ),
    click.option(
        "--projection",
        type=_count,
        metavar="WIDTH",
        help="Choose them in a random projection to WIDTH channels.  [default: none]",
    ),
    click.option(
        "--standardize", is_flag=True, default=None, help="Scale each channel by its spread over the training patches."
    ),
    click.option(
        "--reweight", type=_count, metavar="B", help="Neighbours b of Eq. 7, or none for Eq. 6.  [default: 9]"
    ),
)

_CORESET_HELP = "Patches to remember: a fraction (0.1), a count (5000), or all."
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
_EXISTING = click.Path(exists=True, path_type=Path)


@click.group(
    PROGRAM,
    cls=Program,
    context_settings={"show_default": True, "max_content_width": 100, "help_option_names": ["-h", "--help"]},
    epilog="""
    \b
    Start here:
      patchcore-rs demo                                    a guided tour on generated images, no download
      patchcore-rs fit bottle/train/good -o bottle.safetensors
      patchcore-rs predict bottle.safetensors new-images/ --report report.html
      patchcore-rs evaluate mvtec --category all           known flaws: how good is it?

    \b
    Exit codes:
      0    all went well
      1    predict --fail-on-anomaly found an anomalous image
      2    an argument, a file or an image is wrong
      3    something failed on the way (disk, memory, network, device)
      130  interrupted
    """,
)
@click.version_option(__version__)
def main() -> None:
    """Find what is unusual in images, having seen flawless ones only (PatchCore).

    Anomaly scores are distances: the higher, the more unusual.
    """


@main.command(
    epilog="""
    \b
    Examples:
      patchcore-rs fit bottle/train/good -o bottle.safetensors
      patchcore-rs fit good/ -o m.safetensors --backbone efficientnet_lite0 --coreset 0.01
      patchcore-rs fit good/ -o m.safetensors --calibrate more-good/ --false-alarm-rate 0.01
      patchcore-rs fit newer-good/ -o m2.safetensors --add-to m.safetensors --calibrate more-good/
    """
)
@click.argument("train_dir", type=_EXISTING)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Model file to write (.safetensors).",
)
@click.option(
    "--add-to",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="MODEL",
    help="Let this model learn more, with its own settings, instead of making a new one. MODEL itself is not changed.",
)
@click.option("--coreset", type=_amount, metavar="AMOUNT", help=f"{_CORESET_HELP}  [default: 0.1]")
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="The same seed gives the same model.")
@click.option(
    "--calibrate",
    type=_EXISTING,
    metavar="DIR",
    help="Flawless images that were not trained on; sets the threshold above which an image counts as anomalous.",
)
@click.option(
    "--false-alarm-rate",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="RATE",
    help="Share of good images that may raise a false alarm, with --calibrate.  [default: 0.01]",
)
@_model
@_machine
@_JSON
@_common
def fit(**options: Any) -> None:
    """Learn from flawless images, write a model file.

    TRAIN_DIR is searched with its subfolders (PNG, JPEG, BMP, TIFF, WebP).
    """
    from patchcore_rs.cli import fit as command

    rate = options["false_alarm_rate"]
    if rate is not None and options["calibrate"] is None:
        raise click.UsageError("--false-alarm-rate needs --calibrate, a folder of flawless images not trained on")
    options["false_alarm_rate"] = 0.01 if rate is None else rate
    arguments = _given(options, (*_MODEL, "coreset", "seed"))
    settled = [name for name in arguments if name not in _RUNNING]
    if options["add_to"] is not None and settled:
        raise click.UsageError(f"--add-to takes the model's settings: leave out --{settled[0].replace('_', '-')}")
    command.fit(arguments=arguments, **options)


@main.command(
    epilog="""
    \b
    Examples:
      patchcore-rs predict bottle.safetensors photo.png
      patchcore-rs predict bottle.safetensors belt/ --output out/ --save overlay --save npy
      patchcore-rs predict bottle.safetensors belt/ --report report.html
      patchcore-rs predict bottle.safetensors belt/ --json --fail-on-anomaly > result.json
    """
)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("paths", type=_EXISTING, nargs=-1, required=True)
@click.option(
    "--threshold",
    type=float,
    metavar="SCORE",
    help="Images at or above it are anomalous.  [default: the model's, if calibrated]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder for pictures and maps.",
)
@click.option(
    "--save",
    type=click.Choice(["overlay", "npy", "png16"]),
    multiple=True,
    default=("overlay",),
    help="What to write there (repeat for several): heat maps over the images, float32 maps, or 16-bit grey maps "
    "(0 and 65535 are the two ends of the scale).",
)
@click.option(
    "--scale",
    type=(float, float),
    metavar="LOW HIGH",
    help="Map values at the ends of the colours.  [default: from the images]",
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="HTML report to write.")
@click.option("--fail-on-anomaly", is_flag=True, help="Exit with 1 if any image is anomalous.")
@click.option("--weights", metavar="FILE", help="The state dict the model was fitted with, if it was given one.")
@click.option("--skip-unreadable", is_flag=True, help="Go on past images that cannot be read, and list them.")
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV instead of a table.")
@_JSON
@_machine
@_common
def predict(**options: Any) -> None:
    """Score images with a model, draw heat maps.

    PATHS are images and folders, searched with their subfolders. Scores are distances: the higher, the more unusual.
    """
    from patchcore_rs.cli import predict as command

    if options["as_csv"] and options["as_json"]:
        raise click.UsageError("--csv and --json exclude each other")
    if options["output"] is None and _is_given("save"):
        raise click.UsageError("--save needs --output, the folder to write to")
    anomalous = command.predict(**_given(options, ("device", "threads", "weights")), **options)
    if options["fail_on_anomaly"] and anomalous:
        raise click.exceptions.Exit(ExitCode.ANOMALY)


@main.command(
    epilog="""
    \b
    Examples:
      patchcore-rs evaluate mvtec/bottle
      patchcore-rs evaluate mvtec --category all --coreset 0.01 --coreset 0.1 --seed 0 --seed 1
      patchcore-rs evaluate mvtec --category bottle --backbone efficientnet_lite0 --report out.html
    """
)
@click.argument("dataset_root", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--category", "categories", multiple=True, metavar="NAME", help="A subfolder of DATASET_ROOT, or all.  (repeatable)"
)
@click.option(
    "--layout",
    type=click.Choice(["auto", "mvtec", "visa", "btad", "folder"]),
    default="auto",
    help="How the folders are arranged.",
)
@click.option(
    "--coreset",
    "coresets",
    type=_amount,
    multiple=True,
    metavar="AMOUNT",
    help=f"{_CORESET_HELP}  (repeatable)  [default: 0.1]",
)
@click.option(
    "--seed",
    "seeds",
    type=click.IntRange(min=0),
    multiple=True,
    default=(0,),
    metavar="N",
    help="Seed of a run.  (repeatable)",
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="HTML report to write.")
@_model
@_machine
@_JSON
@_common
def evaluate(**options: Any) -> None:
    """Measure quality and speed on known flaws.

    Fits, inspects and judges every category with every coreset and seed.

    DATASET_ROOT is laid out as MVTec AD, VisA or BTAD, or holds train and test folders; test images lie in good or
    in a folder named after the flaw. Prints the image AUROC, the pixel AUROC and PRO where there are masks, the images
    misclassified at the F1-optimal threshold, the false alarms at full recall, and the time an image takes.
    """
    from patchcore_rs.cli import evaluate as command

    options["coresets"] = options["coresets"] or (0.1,)
    command.evaluate(arguments=_given(options, _MODEL), **options)


@main.command(
    epilog="""
    \b
    Examples:
      patchcore-rs demo
      patchcore-rs demo --output tour --seed 1
    """
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("demo"),
    metavar="DIR",
    help="New folder for the images and the report.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, metavar="N", help="Another seed draws other images.")
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N", help="Threads to use.  [default: all this process may use]"
)
@_JSON
@_common
def demo(**options: Any) -> None:
    """Take the tour on generated images.

    Draws images of three surfaces, learns the flawless ones, finds the flaws. Needs no download and about two minutes
    on two cores. Prints how well each kind of flaw is found and how long each
    stage takes beside the same stage in plain torch, and writes a report with pictures.
    """
    from patchcore_rs.cli.demo import tour

    tour(**options)


@main.command(
    epilog="""
    \b
    Examples:
      patchcore-rs info
      patchcore-rs info bottle.safetensors --json
    """
)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@_JSON
@_common
def info(**options: Any) -> None:
    """Show this build, or what is in a model file.

    Looking into a model never runs anything from it and needs no torch.
    """
    from patchcore_rs.cli import info as command

    command.info(**options)
