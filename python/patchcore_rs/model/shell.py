"""What a parameter is, and how the shell writes it: an option with a text, a choice or a flag, and what is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchcore_rs._checks import flags, one_of
from patchcore_rs._text import listing

if TYPE_CHECKING:
    from collections.abc import Callable

    from patchcore_rs._checks import Check


@dataclass(frozen=True)
class Text:
    """An option with a value, which `parse` reads; its ValueError says what the text is not."""

    metavar: str
    parse: Callable[[str], Any] = str


@dataclass(frozen=True)
class Choices:
    """An option whose value is one of these words."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class Flag:
    """An option without a value, and one that says no where the parameter may be "auto"."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One parameter of a detector.

    Attributes:
        name: the constructor's argument; the option's name with dashes.
        default: the constructor's.
        check: refuses what it may not be. Needs no backbone, so that a slip is found before anything is loaded.
        help: a sentence without its full stop, which the docstring's entry and the option's help begin with.
        group: the heading that the help of the command line shows it under.
        shell: how the command line writes it.
        more: how the option's help goes on.
        default_text: there, what the default stands for, where that is not the value.
        auto: whether it may be "auto", for what the backbone recommends or the profile says.
        stored: whether it is one of the `Settings` of a model file. The others belong to the machine, but for the
            backbone, which a file names elsewhere.
        scores: whether a fitted model scores otherwise for another value, so that who reads it must know the setting.
            What only chose the rows of the bank does not: they are in the file.
        absent: the value of a model file that was written before there was this setting; it never changes.
    """

    name: str
    default: Any
    check: Check
    help: str
    group: str
    shell: Text | Choices | Flag
    more: str = ""
    default_text: str = ""
    auto: bool = False
    stored: bool = True
    scores: bool = True
    absent: Any = None


def choice(name: str, *words: str) -> dict[str, Any]:
    """The parts of a parameter that is one of these words."""
    return {"name": name, "check": one_of(*words), "shell": Choices(words)}


def flag(name: str) -> dict[str, Any]:
    """The parts of a parameter that is True or False, and False unless asked for."""
    return {"name": name, "check": flags, "shell": Flag(), "default": False, "absent": False}


def comma_separated(text: str) -> tuple[str, ...]:
    """Names."""
    return tuple(part.strip() for part in text.split(","))


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no number") from None


def three_numbers(text: str) -> tuple[float, float, float]:
    """One a colour channel: R,G,B; or one for all."""
    parts = text.split(",")
    try:
        red, green, blue = map(float, parts * 3 if len(parts) == 1 else parts)
    except ValueError:
        raise ValueError(f"{text!r} is not three numbers such as 0.5,0.5,0.5") from None
    return red, green, blue


def two_numbers(text: str) -> tuple[float, float]:
    """The ends of a range: LOW,HIGH."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is not two numbers such as 20,80") from None
    return low, high


def whole_number(*words: str) -> Callable[[str], Any]:
    """What reads a whole number, or one of the words; "none" is None."""
    others = f" and not {listing([repr(word) for word in words], 'or')}" if words else ""

    def parse(text: str) -> int | str | None:
        if text in words:
            return None if text == "none" else text
        try:
            return int(text)
        except ValueError:
            raise ValueError(f"{text!r} is no whole number{others}") from None

    return parse


def size(text: str) -> int | tuple[int, int] | None:
    """A side, a size HEIGHTxWIDTH, or "none"."""
    height, _, width = text.partition("x")
    try:
        return None if text == "none" else (int(height), int(width)) if width else int(height)
    except ValueError:
        raise ValueError(f"{text!r} is no side such as 256, no HEIGHTxWIDTH such as 240x320, and not 'none'") from None


def amount(text: str) -> float | None:
    """A fraction (with a point), a count (without), or "all"."""
    try:
        return None if text == "all" else int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise ValueError(f"{text!r} is no fraction such as 0.1, no count such as 5000, and not 'all'") from None
