"""Exact metrics of anomaly scores. Needs numpy only.

Everywhere a higher score is more anomalous, and a threshold calls anomalous what scores at least the
threshold. Equal scores are one threshold, so no result depends on the order of the samples; nor does any on
the number of threads.

The truth comes first, as in scikit-learn: (labels, scores) and (masks, maps). torchmetrics and anomalib take the scores
first, (preds, target); pass names where you come from there.

Images come as `labels` (n,) and `scores` (n,). Pixels come as `masks` and `maps`, each one array (n, H, W) or a list of
n arrays (H, W), whose sizes may differ from image to image: mask i has the size of map i. torch tensors on the CPU are
read where they lie.

- Labels are bool, or numbers that are 0 (normal) or 1 (anomalous).
- Masks are bool, or uint8 as mask images are: above 127 is anomalous. Pixel for pixel they are what the
  maps show: resized (nearest) and cropped as the images were, or the maps brought back to their size.
- Scores and maps are finite numbers: compared as float32 where their dtype fits it, else as float64.
- `ignored` is bool and of the sizes of the masks: where it is True a pixel counts in no metric, whatever its mask says.

Pixel metrics take memory for each pixel, beside what they are given: 9 bytes where masks are bool, maps float32, both
C-contiguous arrays (n, H, W), and 14 where they are lists; `pixel_memory` tells it. float64 maps take twice as much.

Every function raises ValueError when shapes or values are others, or a class is missing that the metric
needs, and TypeError when a dtype is none of these.
"""

from __future__ import annotations

from patchcore_rs.image_metrics import (
    F1Optimum,
    FullRecall,
    Interval,
    PrecisionRecallCurve,
    RocCurve,
    average_precision,
    f1_optimal,
    full_recall,
    image_auroc,
    image_auroc_interval,
    precision_recall_curve,
    roc_curve,
)
from patchcore_rs.pixel_metrics import (
    aupimo,
    count_regions,
    pixel_auroc,
    pixel_average_precision,
    pixel_f1_optimal,
    pixel_memory,
    pro,
)

__all__ = [
    "F1Optimum",
    "FullRecall",
    "Interval",
    "PrecisionRecallCurve",
    "RocCurve",
    "aupimo",
    "average_precision",
    "count_regions",
    "f1_optimal",
    "full_recall",
    "image_auroc",
    "image_auroc_interval",
    "pixel_auroc",
    "pixel_average_precision",
    "pixel_f1_optimal",
    "pixel_memory",
    "precision_recall_curve",
    "pro",
    "roc_curve",
]
