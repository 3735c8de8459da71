"""What the paper states, as data: Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022.

AUROC and PRO are percent, seconds are of the authors' GPU. Nothing here is measured by this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    Figures = Mapping[str, float]

SOURCE = "Roth et al., Towards Total Recall in Industrial Anomaly Detection, CVPR 2022"

# Tables 1 to 3 by category, WideResNet50 at 224 pixels: image AUROC / pixel AUROC / PRO of coresets of 25, 10 and 1 %.
_CORESETS = (0.25, 0.1, 0.01)
_BY_CATEGORY = """
bottle      100.0 98.6 96.2  100.0 98.6 96.1  100.0 98.5 95.9
cable        99.5 98.4 92.5   99.4 98.5 92.6   99.3 98.2 91.6
capsule      98.1 98.8 95.5   97.8 98.9 95.5   98.0 98.8 95.5
carpet       98.7 99.0 96.6   98.7 99.1 96.6   98.0 98.9 96.5
grid         98.2 98.7 96.0   97.9 98.7 95.9   98.6 98.6 96.1
hazelnut    100.0 98.7 93.8  100.0 98.7 93.9  100.0 98.6 93.8
leather     100.0 99.3 98.9  100.0 99.3 98.9  100.0 99.3 98.9
metal_nut   100.0 98.4 91.4  100.0 98.4 91.3   99.7 98.4 91.2
pill         96.6 97.4 93.2   96.0 97.6 94.1   97.0 97.1 92.9
screw        98.1 99.4 97.9   97.0 99.4 97.9   96.4 99.2 97.1
tile         98.7 95.6 87.3   98.9 95.9 87.4   99.4 96.1 88.3
toothbrush  100.0 98.7 91.5   99.7 98.7 91.4  100.0 98.5 90.2
transistor  100.0 96.3 83.7  100.0 96.4 83.5   99.9 94.9 81.2
wood         99.2 95.0 89.4   99.0 95.1 89.6   99.2 95.1 89.5
zipper       99.4 98.8 97.1   99.5 98.9 97.1   99.2 98.8 97.0
"""
_METRICS = ("image_auroc", "pixel_auroc", "pro")


def _by_category() -> dict[float, dict[str, Figures]]:
    found: dict[float, dict[str, Figures]] = {coreset: {} for coreset in _CORESETS}
    for line in _BY_CATEGORY.split("\n")[1:-1]:
        category, *numbers = line.split()
        for i, coreset in enumerate(_CORESETS):
            found[coreset][category] = dict(zip(_METRICS, map(float, numbers[3 * i : 3 * i + 3]), strict=True))
    return found


# PatchCore by coreset and category.
PATCHCORE: Mapping[float, Mapping[str, Figures]] = _by_category()
CATEGORIES: tuple[str, ...] = tuple(PATCHCORE[0.1])

# The means over the 15 categories, and the images of 1,725 that are misclassified at the F1-optimal threshold.
PATCHCORE_MEANS: Mapping[float, Figures] = {
    0.25: {"image_auroc": 99.1, "pixel_auroc": 98.1, "pro": 93.4, "misclassified": 42},
    0.1: {"image_auroc": 99.0, "pixel_auroc": 98.1, "pro": 93.5, "misclassified": 47},
    0.01: {"image_auroc": 99.0, "pixel_auroc": 98.0, "pro": 93.1, "misclassified": 49},
}

# The others in tables 1 to 3, as cited there; the paper did not run them for these.
CITED: Mapping[str, Mapping[str, float]] = {
    "image_auroc": {
        "SPADE": 85.5,
        "PatchSVDD": 92.1,
        "DifferNet": 94.9,
        "PaDiM": 95.3,
        "Mahalanobis-AD": 95.8,
        "PaDiM*": 97.9,
    },
    "pixel_auroc": {
        "AE-SSIM": 87.0,
        "gamma-VAE + grad": 88.8,
        "CAVGA-Rw": 89.0,
        "PatchSVDD": 95.7,
        "SPADE": 96.0,
        "PaDiM": 97.5,
    },
    "pro": {"PaDiM": 92.1},
}

# Table 4: DenseNet201, ResNeXt101 and WideResNet101 together, 384 channels each, 1 %, 320 pixels.
ENSEMBLE_320: Figures = {"image_auroc": 99.6, "pixel_auroc": 98.2, "pro": 94.9}

# Table 5: mean seconds of an image; SPADE and PaDiM as the authors wrote them anew on the same backbone.
TIMES: Mapping[str, Figures] = {
    "PatchCore 100 %": {"seconds": 0.60},
    "PatchCore 10 %": {"seconds": 0.22, **{name: PATCHCORE_MEANS[0.1][name] for name in _METRICS}},
    "PatchCore 1 %": {"seconds": 0.17, **{name: PATCHCORE_MEANS[0.01][name] for name in _METRICS}},
    "PatchCore 100 % + IVFPQ": {"seconds": 0.20, "image_auroc": 98.0, "pixel_auroc": 97.9, "pro": 93.0},
    "SPADE": {"seconds": 0.66, "image_auroc": 85.3, "pixel_auroc": 96.6, "pro": 91.5},
    "PaDiM": {"seconds": 0.19, "image_auroc": 95.4, "pixel_auroc": 97.3, "pro": 91.8},
}

# Magnetic tile defects, a fifth of the flawless images held out: image AUROC.
MAGNETIC_TILES: Mapping[str, float] = {"PatchCore": 97.9, "DifferNet": 97.7}
