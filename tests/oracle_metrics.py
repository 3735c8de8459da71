"""What the metrics must answer, from their definitions, in plain float64 loops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def roc_auc(labels, scores):
    """Of all (anomalous, normal) pairs, the share that is ordered right; ties half."""
    labels, scores = np.asarray(labels, bool), np.asarray(scores, np.float64)
    difference = scores[labels][:, None] - scores[~labels][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def operating_points(labels, scores):
    """(threshold, found, false alarms) at every distinct score, from the highest."""
    labels, scores = np.asarray(labels, bool), np.asarray(scores, np.float64)
    return [
        (float(threshold), int((labels & (scores >= threshold)).sum()), int((~labels & (scores >= threshold)).sum()))
        for threshold in np.unique(scores)[::-1]
    ]


def regions(mask):
    """The 8-connected regions of a (H, W) mask, each a list of (row, column)."""
    left = {(int(row), int(column)) for row, column in np.argwhere(mask)}
    found = []
    while left:
        stack, region = [left.pop()], []
        while stack:
            row, column = stack.pop()
            region.append((row, column))
            near = {(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)} & left
            left -= near
            stack.extend(near)
        found.append(region)
    return found


def pro(masks, maps, fpr_limit, ignored=None):
    """Area under mean overlap over false positive rate up to the limit, divided by it; ignored pixels left out."""
    ignored = [np.zeros(np.shape(mask), bool) for mask in masks] if ignored is None else ignored
    images = [
        (np.asarray(mask, bool) & ~out, np.asarray(scores, np.float64), ~np.asarray(mask, bool) & ~out)
        for mask, scores, out in zip(masks, maps, ignored, strict=True)
    ]
    normal = np.concatenate([scores[of_none] for _, scores, of_none in images])
    of_regions = [
        np.array([scores[pixel] for pixel in region]) for mask, scores, _ in images for region in regions(mask)
    ]
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(np.concatenate([normal, *of_regions]))[::-1]:
        rates.append(float((normal >= threshold).mean()))
        overlaps.append(float(np.mean([(region >= threshold).mean() for region in of_regions])))
    area = 0.0
    for (start, end), (low, high) in zip(pairwise(rates), pairwise(overlaps), strict=True):
        if start >= fpr_limit:
            break
        stop = min(end, fpr_limit)
        at_stop = high if stop == end else low + (high - low) * (stop - start) / (end - start)
        area += (stop - start) * (low + at_stop) / 2
    return area / fpr_limit
