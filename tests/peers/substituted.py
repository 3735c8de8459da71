"""A plugin for pytest: anomalib's own suite meets the accelerated classes, and networks without weights to fetch.

`python -m pytest -p substituted tests/unit/models/components/sampling` in a checkout of anomalib, with this folder on
`PYTHONPATH`. The names are replaced in the modules of the tests: in anomalib's own they would no longer pickle.
"""

import timm

from patchcore_rs.compat import anomalib as face

NAMES = ("KCenterGreedy", "PatchcoreModel", "Patchcore", "AnomalyDINOModel", "AnomalyDINO")
MODELS = ("Patchcore", "AnomalyDINO")


def pytest_configure(config):
    create = timm.create_model
    timm.create_model = lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False})


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


def _accelerating(get_model):
    def get(*args, **kwargs):
        model = get_model(*args, **kwargs)
        return face.accelerate(model) if type(model).__name__ in MODELS else model

    return get
