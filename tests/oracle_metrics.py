"""What the metrics must answer, from their definitions, in plain float64 loops."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def roc_auc(labels, scores):
    """Of all (anomalous, normal) pairs, the share that is ordered right; ties half."""
    labels, scores = np.asarray(labels, bool), np.asarray(scores, np.float64)
    difference = scores[labels][:, None] - scores[~labels][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def auroc_interval(labels, scores, quantile):
    """Logit of AUROC plus and minus so many standard errors, which each score's pairs tell (DeLong 1988)."""
    labels, scores = np.asarray(labels, bool), np.asarray(scores, np.float64)
    ordered = [[(a > n) + (a == n) / 2 for n in scores[~labels]] for a in scores[labels]]
    rows, columns = np.mean(ordered, axis=1), np.mean(ordered, axis=0)
    error = np.sqrt(
        sum(((means - means.mean()) ** 2).sum() / (len(means) - 1) / len(means) for means in (rows, columns))
    )
    odds = np.mean(ordered) / (1 - np.mean(ordered))
    factor = np.exp(quantile * error * (1 + odds) ** 2 / odds)
    return float(odds / factor / (1 + odds / factor)), float(odds * factor / (1 + odds * factor))


def average_precision(labels, scores):
    """Precision at every distinct score, times the recall that it adds."""
    anomalies, before, total = int(np.sum(labels)), 0, 0.0
    for _, found, alarms in operating_points(labels, scores):
        total += (found - before) / anomalies * found / (found + alarms)
        before = found
    return total


def f1_optimal(labels, scores):
    """(threshold, F1, false alarms, misses) at the highest threshold of the largest F1."""
    points, anomalies = operating_points(labels, scores), int(np.sum(labels))
    largest = max(2 * found / (found + alarms + anomalies) for _, found, alarms in points)
    threshold, found, alarms = next(p for p in points if 2 * p[1] / (p[1] + p[2] + anomalies) == largest)
    return threshold, largest, alarms, anomalies - found


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


def aupimo(masks, maps, limits, ignored=None):
    """For each image the mean, over the log of the normal images' mean false positive rate, of what is found of it."""
    ignored = [np.zeros(np.shape(mask), bool) for mask in masks] if ignored is None else ignored
    images = [
        (np.asarray(scores, np.float64)[~mask & ~out], np.asarray(scores, np.float64)[mask & ~out])
        for mask, scores, out in zip(masks, maps, ignored, strict=True)
    ]
    normals = [normal for normal, anomalous in images if not anomalous.size and normal.size]
    thresholds = np.unique(np.concatenate([scores for image in images for scores in image]))[::-1]
    rates = [0.0] + [float(np.mean([(normal >= t).mean() for normal in normals])) for t in thresholds]

    def value(anomalous):
        found = [0.0] + [float((anomalous >= t).mean()) for t in thresholds]
        area = 0.0
        for (start, end), (low, high) in zip(pairwise(rates), pairwise(found), strict=True):
            left, right = np.clip(start, *limits), np.clip(end, *limits)
            if left < right:  # the integral of found / rate along a straight line
                slope = (high - low) / (end - start)
                area += (low - slope * start) * np.log(right / left) + slope * (right - left)
        return area / np.log(limits[1] / limits[0])

    return [value(anomalous) if anomalous.size else np.nan for _, anomalous in images]
