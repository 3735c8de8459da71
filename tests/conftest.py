"""Options of the suite, and what its files share."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes; run with --run-slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--run-slow"):
        skip = pytest.mark.skip(reason="slow: run with --run-slow (make test-slow)")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="module")
def one_load_per_backbone():
    """Backbones are immutable, and loading one takes longer than the rest of a small command."""
    from patchcore_rs.backbones.load import load_backbone
    from patchcore_rs.detector import extraction

    loaded = {}

    def load(backbone, **given):
        key = backbone, *sorted(given.items())
        if key not in loaded:
            loaded[key] = load_backbone(backbone, **given)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction, "load_backbone", load)
        yield


@pytest.fixture
def small(monkeypatch):
    """Every network of `reproduce` is a tiny one that sees images at a seventh of the paper's sizes."""
    import torch
    from small_networks import PASSED, tiny

    from patchcore_rs.reproduce import networks

    monkeypatch.setattr(networks, "load_backbone", tiny)
    monkeypatch.setattr(networks.Network, "at", lambda _, side: {"resize": (side // 7, side // 7), "crop": None})
    PASSED.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so small a network more of them are in each other's way
    yield
    torch.set_num_threads(threads)
