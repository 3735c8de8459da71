"""Checks of arguments that come from callers: what is accepted, and what the refusal says. Needs no numpy.

One policy for every door of the package: a value of the wrong type is a TypeError, one of the right type that cannot be
used a ValueError. True and False are flags and no numbers, numpy's numbers are numbers, and text never is one. Of
alternatives ("an integer or None"), it is a TypeError where the type fits none of them. A message says what the
argument must be, then what came: "k must be at least 1; got 0".

What a file holds is its writer's fault and not the caller's: `as_stored` makes every refusal a ValueError.
"""

from __future__ import annotations

import math
import operator
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, SupportsIndex

# Called with a value and the name of its argument; returns the value in plain types, or raises TypeError or ValueError.
Check = Callable[[Any, str], Any]


def integer(value: SupportsIndex, name: str, *, minimum: int, below: int = 2**63, expected: str = "an integer") -> int:
    """Return `value` as an int with `minimum <= value < below`; bools and floats are refused.

    Raises:
        TypeError: it is no integer, where the message says that `expected` is.
        ValueError: it is out of range.
    """
    number = _index(value)
    if number is None:
        kind = "" if _is_bool(value) else f" ({type(value).__name__})"
        raise TypeError(f"{name} must be {expected}; got {value!r:.80}{kind}")
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}; got {number}")
    if number >= below:
        raise ValueError(f"{name} must be below {below}; got {number}")
    return number


def number(value: Any, name: str, *, expected: str = "a number") -> float:
    """Return `value` as a float, of any size and NaN too; bools and text are refused.

    Raises:
        TypeError: it is no number, where the message says that `expected` is.
    """
    converted = _float(value)
    if converted is None:
        raise TypeError(f"{name} must be {expected}; got {value!r:.80} ({type(value).__name__})")
    return converted


def non_negative(value: Any, name: str) -> float:
    """Return `value` as a float >= 0, which may be infinite.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or NaN.
    """
    converted = number(value, name, expected="a number >= 0")
    if not converted >= 0:
        raise ValueError(f"{name} must be a number >= 0; got {converted}")
    return converted


def thread_count(threads: SupportsIndex | None) -> int | None:
    """Return `threads` checked; None means as many as this process may use."""
    return None if threads is None else integer(threads, "threads", minimum=1)


def as_stored(value: Any, name: str, check: Check) -> Any:
    """Return `check(value, name)` of a value out of a file.

    Raises:
        ValueError: whatever the check refuses, a wrong type too.
    """
    try:
        return check(value, name)
    except TypeError as error:
        raise ValueError(str(error)) from error


# --- Checks as values, for tables of parameters ------------------------------------------------------------


def anything(value: Any, name: str) -> Any:  # noqa: ARG001 - a check's signature
    """Accept every value, which whoever uses it checks."""
    return value


def integers(low: int, high: int) -> Check:
    """A check for an integer, `low <= value <= high`."""
    expected = f"an integer from {low} to {high}"

    def check(value: Any, name: str) -> int:
        number = _index(value)
        if number is None or not low <= number <= high:
            raise _refusal(TypeError if number is None else ValueError, name, expected, value)
        return number

    return check


def numbers(low: float = -math.inf, high: float = math.inf, *, above: bool = False) -> Check:
    """A check for a finite number, `low <= value <= high`, or `low < value` where it must lie `above`."""
    expected = "a number and finite"
    if low > -math.inf:
        expected = f"a number {'>' if above else '>='} {low:g} and <= {high:g}"
    low, high = max(low, -sys.float_info.max), min(high, sys.float_info.max)

    def check(value: Any, name: str) -> float:
        number = _float(value)
        if number is None or not low <= number <= high or (above and number == low):
            raise _refusal(TypeError if number is None else ValueError, name, expected, value)
        return number

    return check


def fractions(value: Any, name: str) -> float:
    """A check for a share of rows in (0, 1]. An integer is a count and never a share."""
    if _index(value) is not None:
        raise _refusal(TypeError, name, "a fraction (0 < float <= 1)", value)
    return float(numbers(0, 1, above=True)(value, name))


def flags(value: Any, name: str) -> bool:
    """A check for True or False, numpy's too."""
    if not _is_bool(value):
        raise _refusal(TypeError, name, "True or False", value)
    return bool(value)


def one_of(*choices: str, expected: str = "") -> Check:
    """A check for one of the words, which the message lists unless it says what is `expected`."""
    expected = expected or f"one of {', '.join(map(repr, choices))}"

    def check(value: Any, name: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise _refusal(ValueError if isinstance(value, str) else TypeError, name, expected, value)
        return str(value)

    return check


def paths(value: Any, name: str) -> str | os.PathLike[str]:
    """A check for the path of a file, which need not exist."""
    if not isinstance(value, str | os.PathLike):
        raise _refusal(TypeError, name, "a path", value)
    return value


def names(value: Any, name: str) -> tuple[str, ...]:
    """A check for at least one name, all of them different."""
    items = _items(value)
    text = items is not None and all(isinstance(item, str) for item in items)
    if not items or not text or not all(items) or len(set(items)) != len(items):
        raise _refusal(
            ValueError if text else TypeError, name, "distinct module names such as ('layer2', 'layer3')", value
        )
    return tuple(items)


def sequences(check_item: Check, length: int, expected: str, *, one: bool = False) -> Check:
    """A check for so many values, each of which has its own check: a sequence, an array or anything to iterate.

    Where `one`, a number stands for as many of itself.
    """

    def check(value: Any, name: str) -> tuple[Any, ...]:
        items = _items(value)
        if one and items is None and _float(value) is not None:
            items = [value] * length
        if items is None or len(items) != length:
            raise _refusal(TypeError if items is None else ValueError, name, expected, value)
        return tuple(check_item(item, name) for item in items)

    return check


def ranges(value: Any, name: str) -> tuple[float, float]:
    """A check for a pair (low, high) of finite numbers, low < high."""
    expected = "a pair (low, high) of numbers, low < high"
    low, high = sequences(numbers(), 2, expected)(value, name)
    if not low < high:
        raise _refusal(ValueError, name, expected, value)
    return low, high


def either(*checks: Check, expected: str, none: bool = False) -> Check:
    """The first of the checks that accepts, and None where `none`; `expected` says what all of them expect."""

    def check(value: Any, name: str) -> Any:
        if value is None and none:
            return None
        kind: type[TypeError | ValueError] = TypeError
        for candidate in checks:
            try:
                return candidate(value, name)
            except TypeError:
                continue
            except ValueError:
                kind = ValueError
        raise _refusal(kind, name, expected, value)

    return check


def _refusal(kind: type[TypeError | ValueError], name: str, expected: str, value: object) -> TypeError | ValueError:
    return kind(f"{name} must be {expected}; got {value!r:.80}")


def _is_bool(value: object) -> bool:
    kind = type(value)
    return kind is bool or (kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"))


def _index(value: Any) -> int | None:
    """The integer that a value is; None where it is none."""
    try:
        return None if _is_bool(value) else operator.index(value)
    except TypeError:
        return None


def _float(value: Any) -> float | None:
    """The number that a value is, infinite where it is too large for a float; None where it is none."""
    if _is_bool(value) or isinstance(value, str | bytes | bytearray):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several values
        return None


def _items(value: Any) -> list[Any] | None:
    """The values that a sequence holds; None for what is none, text and mappings among it."""
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | bytearray | Mapping):
        return None
    try:
        return list(value)
    except TypeError:  # an array without dimensions only looks iterable
        return None
