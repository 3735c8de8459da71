"""Memory banks that live in torch tensors: the search structure beside a tensor, kept for as long as it holds.

A tensor can change in place. Torch counts the changes that it sees; those it does not see, `tensor.data.mul_()` or a
write through numpy's view, are looked for in a sample of the values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from patchcore_rs.memory_bank import MemoryBank

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Search = TypeVar("Search")

_SAMPLE = 1024  # values that are compared: 10 to 20 microseconds for a bank of any size
# Before torch 2.3 it stood elsewhere.
_is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling


def is_traced() -> bool:
    """Whether torch records what runs, to compile or to export it."""
    return _is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def is_plain(tensor: Tensor) -> bool:
    """Whether the kernels can read a tensor in place of torch: values on the CPU, float32, no gradient wanted."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and not (tensor.requires_grad and torch.is_grad_enabled())
    )


class _Held(NamedTuple, Generic[Search]):
    """A search structure, and what the tensor was when it was built."""

    alias: Tensor  # shares the values, so that their address is not used again
    version: int | None
    sample: NDArray[np.int32]
    search: Search | None


class BankCache(Generic[Search]):
    """The search structure of one tensor at a time, built anew when the tensor is another or has changed.

    It is known by its address, shape, strides, dtype, torch's count of changes in place, and 1024 values evenly spread
    over it. Not noticed is a change that torch does not count and that none of these values takes part in: a few rows
    written through `tensor.data` or numpy.

    Args:
        build: makes the structure; a ValueError of it means that there is none.
    """

    def __init__(self, build: Callable[[Tensor], Search]) -> None:
        self._build = build
        self._held: _Held[Search] | None = None

    def find(self, bank: Tensor) -> Search | None:
        """The structure for `bank` as it is now; None where the kernels cannot search it."""
        if not is_plain(bank) or bank.ndim != 2 or not bank.numel() or not bank.is_contiguous():
            return None
        bank = bank.detach()
        held, version, sample = self._held, _version(bank), _sample(bank)
        if (
            held is None
            or held.version != version
            or held.alias.data_ptr() != bank.data_ptr()
            or held.alias.shape != bank.shape
            or not np.array_equal(held.sample, sample)
        ):
            self._held = None  # its memory is free before the next one is built
            try:
                search = self._build(bank)
            except ValueError:  # not finite, or too large
                search = None
            held = self._held = _Held(bank, version, sample, search)
        return held.search


def _version(tensor: Tensor) -> int | None:
    """How often torch saw the values change; None for a tensor of `torch.inference_mode`, which has no count."""
    return None if tensor.is_inference() else tensor._version


def _sample(tensor: Tensor) -> NDArray[np.int32]:
    """Bits of evenly spread values; the odd step goes through all columns."""
    values = tensor.numpy().reshape(-1)
    sample: NDArray[np.int32] = values[:: values.size // _SAMPLE | 1].view(np.int32).copy()
    return sample


# --- searches -----------------------------------------------------------------------------------------------


def nearest(bank: MemoryBank, queries: Tensor, k: int) -> tuple[Tensor, Tensor] | None:
    """Distances and indices (n, k) of the nearest rows, as tensors; None for what the kernels refuse.

    Refused are no queries, more neighbours than rows, another width, and values that are not finite or too large.
    """
    if not is_plain(queries) or queries.ndim != 2 or not len(queries) or not 1 <= k <= len(bank):
        return None
    try:
        distances, indices = bank.kneighbors(queries.detach(), k)
    except ValueError:
        return None
    return torch.from_numpy(distances), torch.from_numpy(indices)


class CosineBank:
    """Exact search by cosine distance, 1 - a·b as it stands for rows of any length, through Euclidean search.

    Let M be the largest |b|² of the bank. Each row b gets one more channel, c = sqrt(M - |b|²), each query a gets 0
    there. Then ‖(a, 0) - (b, c)‖² = |a|² - 2 a·b + |b|² + c² = |a|² + M - 2 a·b: for one query it falls as a·b rises.
    So the nearest rows are those of the smallest cosine distance, which is 1 - (|a|² + M - ‖·‖²) / 2.

    Rounding: c is rounded to float32, which moves c² by at most 2⁻²³ (M - |b|²). Rows normalised in float32 have
    |b|² = 1 ± d 2⁻²⁴, so that this is below d 2⁻⁴⁶, 4e-12 for 384 channels, where the product in float32 that it
    replaces is rounded by 2⁻²⁴ alone. The squared distance is summed in float64 and rounded once to float32: the cosine
    distance is right to 2⁻²⁴ of itself, and those 4e-12.

    Args:
        rows: (N, d) float32, on the CPU.

    Raises:
        ValueError: a value is not finite or too large.
    """

    def __init__(self, rows: Tensor) -> None:
        squares = rows.double().square().sum(1)
        self._largest = float(squares.max())
        more = (self._largest - squares).sqrt().float()
        self._bank = MemoryBank(torch.cat([rows, more[:, None]], 1))

    def smallest(self, queries: Tensor, k: int) -> Tensor | None:
        """The `k` smallest cosine distances of each query, (n, k) float32 ascending; None as for `nearest`."""
        if not is_plain(queries) or queries.ndim != 2 or not len(queries) or not 1 <= k <= len(self._bank):
            return None
        queries = queries.detach()
        try:
            squared, _ = self._bank.kneighbors(torch.nn.functional.pad(queries, (0, 1)), k, squared=True)
        except ValueError:
            return None
        lengths = queries.double().square().sum(1, keepdim=True)
        return (1 - (lengths + self._largest - torch.from_numpy(squared).double()) / 2).float()
