"""AUPIMO beside anomalib's, which takes as many thresholds as it is told. Needs anomalib."""

import numpy as np
import pytest
import torch

pimo = pytest.importorskip("anomalib.metrics.pimo.functional", reason="needs anomalib: make test-peers")

from patchcore_rs.metrics import aupimo

LIMITS = (2**-10, 2**-3)  # 16 and 2048 of the normal images' 16 384 pixels: anomalib takes the nearest rates there are


def maps_and_masks(seed):
    """Eight images, the first four normal; the flaws of the others are seen more or less well."""
    generator = np.random.default_rng(seed)
    masks = np.zeros((8, 64, 64), bool)
    for index, mask in enumerate(masks[4:]):
        mask[10 : 20 + 5 * index, 30 : 40 + index] = True
    maps = generator.normal(size=masks.shape) + masks * np.linspace(0, 4, 8)[:, None, None]
    return torch.from_numpy(maps.astype(np.float32)), torch.from_numpy(masks)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("thresholds", "close"), [(300_000, 1e-3), (1_000, 2e-2)])
def test_aupimo_is_anomalibs_but_for_what_lies_between_its_thresholds(thresholds, close, seed):
    maps, masks = maps_and_masks(seed)
    _, rates, found, classes, theirs, _ = pimo.aupimo_scores(maps, masks, thresholds, LIMITS)
    ours = aupimo(masks, maps, LIMITS)
    assert np.isnan(ours).tolist() == (classes == 0).tolist()

    # Both curves rise and meet at each threshold: between two of them they differ by less than the rectangle. Its
    # limits are the rates nearest to ours, and the curve beyond is at most 1.
    first, last = (int(torch.argmin((rates - limit).abs())) for limit in reversed(LIMITS))
    log = rates[first : last + 1].double().log()
    rectangles = (-found[4:, first : last + 1].double().diff() * -log.diff()).sum(dim=1)
    ends = abs(log[0] - np.log(LIMITS[1])) + abs(log[-1] - np.log(LIMITS[0]))
    bound = ((rectangles + ends) / np.log(LIMITS[1] / LIMITS[0])).numpy()
    assert bound.max() < close
    assert (np.abs(ours[4:] - theirs[4:].numpy()) <= bound + 1e-6).all()
    assert 0.1 < ours[4:].min() < 0.9
