"""A plugin for pytest: anomalib's own suite meets the accelerated classes, and networks without weights to fetch.

`python -m pytest -p substituted tests/unit/models/components/sampling` in a checkout of anomalib, with this folder on
`PYTHONPATH`. The names are replaced in the modules of the tests: in anomalib's own they would no longer pickle. A run
in which none of our kernels was asked fails: it would have tested anomalib alone.
"""

from collections import Counter
from functools import wraps

import timm

from patchcore_rs.compat import anomalib as face
from patchcore_rs.compat import anomalib_models
from patchcore_rs.compat.torch_banks import CosineBank

NAMES = ("KCenterGreedy", "PatchcoreModel", "Patchcore", "AnomalyDINOModel", "AnomalyDINO")
MODELS = ("Patchcore", "AnomalyDINO")
KERNELS = (
    *((anomalib_models, name) for name in ("aggregate", "nearest", "image_scores", "anomaly_maps", "greedy_coreset")),
    (CosineBank, "smallest"),
)

asked = Counter()


def pytest_configure(config):
    create = timm.create_model
    timm.create_model = lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False})
    for owner, name in KERNELS:
        setattr(owner, name, _counted(getattr(owner, name)))


def pytest_collection_modifyitems(items):
    replaced = set()
    for module in {item.module for item in items if hasattr(item, "module")}:
        for name in NAMES:
            if hasattr(module, name):
                setattr(module, name, getattr(face, name))
                replaced.add(name)
        if hasattr(module, "get_model"):
            module.get_model = _accelerating(module.get_model)
            replaced.add("get_model")
    print(f"substituted: {', '.join(sorted(replaced)) or 'nothing'}")


def pytest_sessionfinish(session, exitstatus):
    if not asked and exitstatus == 0:
        session.exitstatus = 1


def pytest_terminal_summary(terminalreporter):
    counts = ", ".join(f"{name} {count}" for name, count in sorted(asked.items()))
    terminalreporter.write_line(f"asked of our kernels: {counts or 'nothing'}")


def _counted(kernel):
    @wraps(kernel)
    def count(*args, **kwargs):
        asked[kernel.__name__] += 1
        return kernel(*args, **kwargs)

    return count


def _accelerating(get_model):
    def get(*args, **kwargs):
        model = get_model(*args, **kwargs)
        return face.accelerate(model) if type(model).__name__ in MODELS else model

    return get
