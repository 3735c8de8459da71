"""What the program around us has set for all of torch, and how a network is kept out of it.

A network is built, hashed and run alike in every process: from float32 tensors on the CPU, without a number from
torch's random stream, in the precision that the model says. Nothing here changes what the process has set: it holds for
other threads too.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from patchcore_rs._text import listing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_MAKING = {torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn, torch.linspace}
_DRAWING = {
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    torch.normal,
    torch.bernoulli,
    torch.Tensor.uniform_,
    torch.Tensor.normal_,
    torch.Tensor.random_,
    torch.Tensor.bernoulli_,
    torch.Tensor.exponential_,
}
# What torch lets a float32 operation be done in, by device: the name under torch.backends, and the older flag of tf32.
_PRECISIONS = {
    "cpu": {"mkldnn.conv": "", "mkldnn.matmul": ""},
    "cuda": {"cudnn.conv": "cudnn.allow_tf32", "cuda.matmul": "cuda.matmul.allow_tf32"},
}
_ONEDNN = "ONEDNN_DEFAULT_FPMATH_MODE"
_FULL = {"", "NONE", "IEEE", "STRICT"}


class _Plain(TorchFunctionMode):
    """New tensors are float32, and random numbers come from a `generator` where there is one. Of one thread."""

    def __init__(self, generator: torch.Generator | None) -> None:
        super().__init__()
        self._generator = generator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func in _MAKING and given.get("dtype") is None and "out" not in given:
            given["dtype"] = torch.float32
        draws = func in _DRAWING or "generator" in given  # as what torch.nn.init has does
        if self._generator is not None and draws and given.get("generator") is None:
            given["generator"] = self._generator
        return func(*args, **given)


@contextmanager
def plain_tensors(*, random: bool) -> Iterator[None]:
    """Build a network in here: of float32 on the CPU, whatever dtype and device the process takes by default.

    Only where the weights stay `random` are they drawn from torch's global generator; else the numbers, which are
    overwritten, are of a generator of their own, and whoever counts on the global one finds it as it was.
    """
    with torch.device("cpu"), _Plain(None if random else torch.Generator("cpu")):
        yield


def widen(module: nn.Module, name: str) -> None:
    """Bring the network called `name` from half precision to float32, in place.

    Raises:
        ValueError: it has weights of more than float32, which would be others then.
    """
    for parameter, weights in module.named_parameters():
        if weights.is_floating_point() and weights.dtype.itemsize > 4:
            raise ValueError(
                f"backbone {name!r} must have weights of float32 or less; got {weights.dtype} in {parameter!r}. Pass "
                "module.float(), or build it where torch's default dtype is float32"
            )
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
            tensor.data = tensor.data.float()


@contextmanager
def own_autocast(device: torch.device, *, half: bool) -> Iterator[None]:
    """Run a network in here: in half precision on CUDA where `half`, else in none, whatever autocast is around."""
    with ExitStack() as stack:
        for kind in dict.fromkeys(("cpu", device.type)):
            here = half and kind == "cuda"
            with suppress(RuntimeError):  # a device that has no autocast
                stack.enter_context(torch.autocast(kind, torch.float16 if here else None, enabled=here))
        yield


def float32_precision(module: object, device: torch.device) -> dict[str, str]:
    """What this process lets float32 operations of a network be done in, where that is less than float32.

    {"device": "cpu"}, and by torch's names what is less: {"mkldnn.conv": "bf16"}. What no part of the network does is
    left out.
    """
    found = {}
    for name, flag in _PRECISIONS.get(device.type, {}).items():
        if name.endswith("matmul") and isinstance(module, nn.Module) and not _multiplies(module):
            continue
        try:
            found[name] = str(attrgetter(f"{name}.fp32_precision")(torch.backends))
        except AttributeError:  # an older torch
            found[name] = "tf32" if flag and attrgetter(flag)(torch.backends) else ""
    if device.type == "cpu":
        found[_ONEDNN] = os.environ.get(_ONEDNN, os.environ.get(_ONEDNN.replace("ONEDNN", "DNNL"), ""))
    return {"device": device.type} | {name: value for name, value in found.items() if value.upper() not in _FULL}


def _multiplies(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear | nn.MultiheadAttention) for part in module.modules())


def difference(fitted: Mapping[str, str] | None, here: Mapping[str, str]) -> str:
    """What to say where a model was fitted in another precision than this process has; "" where not, or not known.

    Nothing is said of another device, whose arithmetic is another anyway.
    """
    if fitted is None or dict(fitted) == dict(here) or fitted.get("device") != here["device"]:
        return ""
    return (
        f"this process lets torch compute in {_words(here)}, and the model was fitted in {_words(fitted)}: scores can "
        "differ by a per cent, and the threshold may not hold; set both alike, or fit again"
    )


def _words(precision: Mapping[str, str]) -> str:
    return listing([f"{name}={value}" for name, value in precision.items() if name != "device"]) or "float32"
