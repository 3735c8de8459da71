"""PaDiM beside anomalib's, on the same features. Needs anomalib."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("anomalib", reason="needs anomalib: make test-peers")
pytestmark = pytest.mark.filterwarnings("ignore")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from anomalib.models.components import MultiVariateGaussian
    from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

from patchcore_rs import FeatureSet, PaDiM

GRID, WIDTH, SIZE = (7, 8), 60, (56, 64)


def features(images, seed):
    """Correlated features (images, WIDTH, *GRID), float32, as a backbone might give."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9))
    rows = torch.relu(torch.randn(images, *GRID, WIDTH, generator=generator) @ mix / 8 + 0.3)
    return rows.permute(0, 3, 1, 2).contiguous()


def own(maps):
    return FeatureSet(maps.permute(0, 2, 3, 1).reshape(-1, WIDTH).numpy(), GRID, SIZE)


@pytest.mark.parametrize("images", [20, 150])
def test_distances_are_those_of_anomalib_in_float64(images):
    training, test = features(images, 0), features(9, 1)
    model = PaDiM(channels="all", epsilon=0.01001, border="reflect").fit_features(own(training))
    ours = model.predict_features(own(test))
    gaussian = MultiVariateGaussian()
    # Its identity matrices and sums take the type of what it is given.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        stats = gaussian.fit(training.double())
        generator = AnomalyMapGenerator(sigma=4).double()
        distances = generator.compute_distance(test.double(), stats)
        maps = generator(embedding=test.double(), mean=stats[0], inv_covariance=stats[1], image_size=SIZE)
    finally:
        torch.set_default_dtype(before)
    np.testing.assert_allclose(ours.scores, distances.amax(dim=(1, 2, 3)).numpy(), rtol=1e-4)
    np.testing.assert_allclose(ours.maps, maps[:, 0].numpy(), rtol=1e-4)
