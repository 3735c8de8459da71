"""The command `patchcore-rs`: its options, its help, its exit codes. What a command does is in the module of its name.

Importing this module imports click and nothing heavier: every command imports what it needs when it runs, so `--help`
answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from patchcore_rs._version import __version__
from patchcore_rs.cli.options import (
    COMMON,
    EXISTING,
    IMAGES,
    JSON,
    METRICS,
    PAGES,
    PARAMETERS,
    PATHS,
    SKIP,
    GroupedCommand,
    is_given,
    method_option,
    model_option,
    model_options,
    take_arguments,
    take_given,
)
from patchcore_rs.cli.program import PROGRAM, ExitCode, Program

# The parameters that are no choice of the model's: a file keeps the backbone's name, and what a preset stands for.
_RUNNING = {name for name, parameter in PARAMETERS.items() if not parameter.stored} - {"backbone", "preset"}

_STUDIES = ("table1", "table2", "table3", "table4", "table5", "figure4", "backbones", "mtd")


@click.group(
    PROGRAM,
    cls=Program,
    context_settings={"show_default": True, "max_content_width": 100, "help_option_names": ["-h", "--help"]},
    help="""
    Find what is unusual in images, having seen flawless ones only (PatchCore).

    Anomaly scores are distances: the higher, the more unusual.
    """,
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
      2    an argument, a file or an image is wrong; what was finished is printed
      3    something failed on the way (disk, memory, network, device)
      130  interrupted
    """,
)
@click.version_option(__version__)
def main() -> None:
    """Run the command that is named."""


@main.command(
    cls=GroupedCommand,
    help="""
    Learn from flawless images, write a model file.

    TRAIN_DIR is searched with its subfolders (PNG, JPEG, BMP, TIFF, WebP, GIF, PGM and PPM). It is refused where names
    in it say that it holds masks, flawed images or those of a test, and so is the folder to calibrate with. An image
    that cannot be read ends the fit, unless --skip-unreadable is given, and nothing is written then.
    """,
    epilog="""
    \b
    Examples:
      patchcore-rs fit bottle/train/good -o bottle.safetensors
      patchcore-rs fit good/ -o m.safetensors --backbone efficientnet_lite0 --coreset 0.01
      patchcore-rs fit good/ -o m.safetensors --calibrate more-good/ --false-alarm-rate 0.01
      patchcore-rs fit newer-good/ -o m2.safetensors --add-to m.safetensors --calibrate more-good/
      patchcore-rs fit good/ -o padim.safetensors --method padim --backbone resnet18
    """,
)
@click.argument("train_dir", type=IMAGES)
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
    help="Let this model, one of PatchCore, learn more, with its own settings, instead of making a new one. MODEL "
    "itself is not changed.",
)
@click.option(
    "--calibrate",
    type=IMAGES,
    metavar="DIR",
    help="Flawless images that were not trained on, under any name; sets the threshold above which an image counts as "
    "anomalous.",
)
@click.option(
    "--false-alarm-rate",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="RATE",
    help="Share of further good images expected to raise a false alarm, with --calibrate; 0.01 needs 99 images there.  "
    "[default: 0.01]",
)
@SKIP
@PAGES
@JSON
@COMMON
@method_option()
@model_options()
def fit(**options: Any) -> None:
    """Run `fit`."""
    from patchcore_rs.cli import fit as command

    rate = options["false_alarm_rate"]
    if rate is not None and options["calibrate"] is None:
        raise click.UsageError("--false-alarm-rate needs --calibrate, a folder of flawless images not trained on")
    options["false_alarm_rate"] = 0.01 if rate is None else rate
    method, arguments = take_arguments(options)
    settled = [*(["method"] if is_given("method") else []), *(name for name in arguments if name not in _RUNNING)]
    if options["add_to"] is not None and settled:
        raise click.UsageError(f"--add-to takes the model's settings: leave out --{settled[0].replace('_', '-')}")
    command.fit(method=method, arguments=arguments, **options)


@main.command(
    help="""
    Score images with a model, draw heat maps.

    PATHS are images, pages of one (scan.tif#2) and folders, searched with their subfolders; what predict drew before is
    left out, and so are masks by their names in a folder (ground_truth, masks, gt, 0_mask.png beside 0.png), which is
    told. A PATH of - takes a list from standard input, one path a line, or as find -print0 writes them. Scores are
    distances: the higher, the more unusual. An image that cannot be read takes nothing from the others: they are scored
    and written, then the exit code is 2, or 0 with --skip-unreadable. CSV comes out as images are done, and JSON is one
    object even where something fails, with what failed as "error".

    Colours are the model's: an image looks the same alone and in any company, and memory does not grow with the number
    of images. A model that knows none takes them from the images, scoring all twice: an old one, or one of a method
    that cannot know them before it is calibrated, as Mahalanobis-AD.
    """,
    epilog="""
    \b
    Examples:
      patchcore-rs predict bottle.safetensors photo.png
      patchcore-rs predict bottle.safetensors belt/ --output out/ --save overlay --save npy
      patchcore-rs predict bottle.safetensors belt/ --report report.html
      find belt/ -newer yesterday -name "*.png" | patchcore-rs predict bottle.safetensors -
      patchcore-rs predict bottle.safetensors belt/ --json --fail-on-anomaly > result.json
    """,
)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("paths", type=PATHS, nargs=-1)
@click.option(
    "--from-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="LIST",
    help="File that lists further PATHS, one a line.",
)
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
    help="Map values at the ends of the colours.  [default: the model's: clear up to what flawless images show]",
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="HTML report to write.")
@click.option("--fail-on-anomaly", is_flag=True, help="Exit with 1 if any image is anomalous.")
@model_option("weights", help_text="The state dict the model was fitted with, if it was given one.")
@SKIP
@PAGES
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV instead of a table.")
@model_option("device")
@model_option("threads")
@model_option("batch_size")
@JSON
@COMMON
def predict(**options: Any) -> None:
    """Run `predict`."""
    from patchcore_rs.cli import predict as command

    if not options["paths"] and options["from_file"] is None:
        raise click.UsageError("Missing argument 'PATHS...', where - takes a list from standard input, or --from-file")
    if options["as_csv"] and options["as_json"]:
        raise click.UsageError("--csv and --json exclude each other")
    if options["output"] is None and is_given("save"):
        raise click.UsageError("--save needs --output, the folder to write to")
    anomalous = command.predict(**take_given(options, "device", "threads", "weights"), **options)
    if options["fail_on_anomaly"] and anomalous:
        raise click.exceptions.Exit(ExitCode.ANOMALY)


@main.command(
    cls=GroupedCommand,
    help="""
    Measure quality and speed on known flaws.

    Fits, inspects and judges every category with every coreset and seed.

    DATASET_ROOT is laid out as MVTec AD (also LOCO, AD 2, 3D), VisA, BTAD, DAGM, Kolektor SDD or SDD2, or Real-IAD, is
    a list of COCO, a CSV or JSON list with the columns path, label, split, mask and part, or holds train and test
    folders; test images lie in good (or ok, pass, normal, defect-free, ...) or in a folder named after the flaw, masks
    in ground_truth (or masks, gt, ...). How many of each were found is said first. Names that leave it open are
    refused; --good and --masks settle it.

    Prints the image AUROC with its 95 % interval, the pixel AUROC and PRO where there are masks, the images
    misclassified at the F1-optimal threshold, the false alarms at full recall, and the time an image takes; --metrics
    chooses others. Where a number is not defined stands why.

    Pixels are judged in the masks' own size: maps are brought back through crop and resize, and what the crop cut off
    has the smallest map value of all test images.

    All masks are read before the first fit. A flawed image whose mask is black counts as one, and its pixels in no
    metric; masks that seem inverted are refused. A category with an image that cannot be read is left out, the others
    are printed, and the exit code is 2; with --skip-unreadable only the image is left out.
    """,
    epilog="""
    \b
    Examples:
      patchcore-rs evaluate mvtec/bottle
      patchcore-rs evaluate mvtec --category all --coreset 0.01 --coreset 0.1 --seed 0 --seed 1
      patchcore-rs evaluate mvtec --category bottle --backbone efficientnet_lite0 --report out.html
      patchcore-rs evaluate mvtec --category all --method spade --backbone efficientnet_lite0
    """,
)
@click.argument("dataset_root", type=EXISTING)
@click.option(
    "--category", "categories", multiple=True, metavar="NAME", help="A subfolder of DATASET_ROOT, or all.  (repeatable)"
)
@click.option(
    "--layout",
    type=click.Choice(["auto", "mvtec", "visa", "btad", "dagm", "ksdd", "ksdd2", "coco", "realiad", "folder"]),
    default="auto",
    help="How the folders are arranged.",
)
@click.option(
    "--good",
    multiple=True,
    metavar="NAME",
    help="A folder that holds good images, where it is not called good, ok, pass, normal or the like.  (repeatable)",
)
@click.option(
    "--masks",
    metavar="DIR",
    help="The folder of masks, where it is not called ground_truth, masks, gt or the like.",
)
@click.option(
    "--ignore",
    type=click.IntRange(1, 65535),
    metavar="VALUE",
    help="Pixels of masks that have this value count in no metric; all others but 0 are anomalous then.",
)
@click.option(
    "--pixels",
    type=click.Choice(["mask", "model"]),
    default="mask",
    help="Judge pixels in the masks' own size, or in that at which the model sees the images, as published figures do.",
)
@click.option(
    "--fpr-limit",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.3,
    metavar="RATE",
    help="False positive rate of pixels up to which PRO is averaged.",
)
@click.option(
    "--metrics",
    type=click.Choice(["all", *METRICS]),
    multiple=True,
    metavar="NAME",
    help=f"A column of the table, or all: {', '.join(METRICS)}. JSON has all.  (repeatable)",
)
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="HTML report to write.")
@click.option("--strict", is_flag=True, help="Refuse test images that were trained on, where a warning would do.")
@SKIP
@JSON
@COMMON
@method_option()
@model_options(repeatable=("coreset", "seed"))
def evaluate(**options: Any) -> None:
    """Run `evaluate`."""
    from patchcore_rs.cli import evaluate as command

    method, arguments = take_arguments(options)
    for name in ("coreset", "seed"):
        options[f"{name}s"] = options[f"{name}s"] or (PARAMETERS[name].default,)
    command.evaluate(method=method, arguments=arguments, **options)


@main.command(
    help="""
    Run the paper's tables and figures, its numbers beside.

    TABLE is table1 (image AUROC), table2 (pixel AUROC), table3 (PRO), table4 (larger images, an ensemble), table5
    (time of an image), figure4 (neighbourhood, layers, coreset, size of images), backbones, mtd (magnetic tile
    defects), or all. DATA is a data set or a folder of several, as for evaluate.

    Images are resized and cropped as in the paper, and pixels judged at the size that the model sees. A category's
    images pass each backbone once; their feature maps lie in OUTPUT meanwhile, and how large they get is said first. A
    run that was interrupted goes on where it was.

    Prints the tables, and writes them to OUTPUT as CSV and JSON and as a page with charts. Rows whose weights or
    packages are missing are left out, with the reason; the exit code is 0 if any row ran.
    """,
    epilog="""
    \b
    Examples:
      patchcore-rs reproduce table1 mvtec --weights-dir weights/
      patchcore-rs reproduce all mvtec --weights-dir weights/ --output paper/
      patchcore-rs reproduce figure4 mvtec --category bottle --backbone efficientnet_lite0
      patchcore-rs reproduce mtd magnetic-tile --backbone efficientnet_lite0
      patchcore-rs reproduce mtd magnetic-tile --sweep
    """,
)
@click.argument("study", type=click.Choice([*_STUDIES, "all"]), metavar="TABLE")
@click.argument("data", type=EXISTING)
@click.option(
    "--category", "categories", multiple=True, metavar="NAME", help="A subfolder of DATA.  [default: all]  (repeatable)"
)
@click.option(
    "--backbone",
    "backbones",
    multiple=True,
    metavar="NAME",
    help="In place of wide_resnet50_2, as --backbone of fit; all that are given in table4, as its ensemble, and in "
    "backbones, which otherwise take the paper's.  (repeatable)",
)
@click.option(
    "--weights-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of ImageNet weights under torchvision's file names.  [default: torch's cache, filled by download]",
)
@click.option(
    "--seed",
    "seeds",
    type=click.IntRange(min=0),
    multiple=True,
    metavar="N",
    help="Seeds, of which each row is the mean.  [default: 0; mtd: 0, 1 and 2]  (repeatable)",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("reproduced"),
    metavar="DIR",
    help="Folder for tables, results and the cache. Results in it are not computed again.",
)
@click.option("--sweep", is_flag=True, help="mtd: choose settings, on held-out training images and synthetic flaws.")
@click.option("--keep-cache", is_flag=True, help="Keep the feature maps of every category, in later runs too.")
@SKIP
@model_option("device")
@model_option("threads")
@model_option("batch_size")
@JSON
@COMMON
def reproduce(**options: Any) -> None:
    """Run `reproduce`."""
    from patchcore_rs.cli import evaluate as command

    command.reproduce(running=take_given(options, "device", "threads", "batch_size"), **options)


@main.command(
    help="""
    Take the tour on generated images.

    Draws images of three surfaces, learns the flawless ones, finds the flaws. Needs no download and about two minutes
    on two cores. Prints how well each kind of flaw is found and how long each
    stage takes beside the same stage in plain torch, and writes a report with pictures.
    """,
    epilog="""
    \b
    Examples:
      patchcore-rs demo
      patchcore-rs demo --output tour --seed 1
    """,
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
@model_option("threads")
@JSON
@COMMON
def demo(**options: Any) -> None:
    """Run `demo`."""
    from patchcore_rs.cli.demo import tour

    tour(**options)


@main.command(
    help="""
    Make a model file out of another program's model, or the other way.

    SOURCE is a folder that patchcore-inspection saved, or a file that anomalib did (.ckpt, .pt), and TARGET the model
    file to write; or SOURCE is a model file of PatchCore, and TARGET the folder for patchcore-inspection. Reading one
    never runs anything from it. Scores stay what they were; what cannot be carried over is refused by name. The
    weights in anomalib's file are written beside TARGET, and its name with .weights.pth is what --weights takes then.
    """,
    epilog="""
    \b
    Examples:
      patchcore-rs convert models/mvtec_bottle bottle.safetensors
      patchcore-rs convert models/mvtec_bottle bottle.safetensors --prepend Ensemble-1-3_
      patchcore-rs convert bottle.ckpt bottle.safetensors
      patchcore-rs convert bottle.safetensors models/bottle
    """,
)
@click.argument("source", type=EXISTING)
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--prepend",
    default="",
    metavar="TEXT",
    help="What the names of the files in the folder begin with.  [default: nothing]",
)
@model_option("resize")
@model_option("weights", help_text="The state dict the model was fitted with, if it was given one.")
@JSON
@COMMON
def convert(**options: Any) -> None:
    """Run `convert`."""
    from patchcore_rs.cli import models as command

    command.convert(arguments=take_given(options, "resize", "weights"), **options)


@main.command(
    help="""
    Show this build, or what is in a model file.

    Looking into a model never runs anything from it and needs no torch.
    """,
    epilog="""
    \b
    Examples:
      patchcore-rs info
      patchcore-rs info bottle.safetensors --json
    """,
)
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@JSON
@COMMON
def info(**options: Any) -> None:
    """Run `info`."""
    from patchcore_rs.cli import models as command

    command.info(**options)
