"""A plugin for pytest: patchcore-inspection's own suite meets the classes of `patchcore_rs.compat`.

`python -m pytest -p substituted_inspection test` in a checkout of it, with this folder and the checkout's `src` on
`PYTHONPATH`. The names are replaced before its `PatchCore` is imported, whose defaults are made of them. Its tests of
samplers ask for a GPU that they do not use: they run here.
"""

import patchcore.common
import patchcore.sampler
import torch

from patchcore_rs.compat import patchcore_inspection as face

SEARCH = ("FaissNN", "ApproximateFaissNN", "NearestNeighbourScorer")
SAMPLERS = ("IdentitySampler", "RandomSampler", "GreedyCoresetSampler", "ApproximateGreedyCoresetSampler")

for module, names in ((patchcore.common, SEARCH), (patchcore.sampler, SAMPLERS)):
    for name in names:
        setattr(module, name, getattr(face, name))


def pytest_collectstart(collector):
    """While test modules are imported, claim the GPU that their marks ask for."""
    torch.cuda.is_available = lambda: True


def pytest_collection_finish(session):
    torch.cuda.is_available = lambda: False
