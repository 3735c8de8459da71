"""The public names and their signatures are those that are meant; run as a program, this takes them as they are."""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
from pathlib import Path

import patchcore_rs

PUBLIC = Path(__file__).with_name("data") / "public_api.txt"
SPECIAL = {"__call__", "__contains__", "__enter__", "__exit__", "__getitem__", "__iter__", "__len__"}


class Written(str):
    """An annotation as the source has it, without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def written(annotation):
    if annotation is inspect.Signature.empty:
        return annotation
    return Written(getattr(annotation, "__forward_arg__", annotation))


def signature(function):
    found = inspect.signature(function)
    parameters = [p.replace(annotation=written(p.annotation)) for p in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=written(found.return_annotation)))


def class_lines(name, cls):
    """The bases, the constructor and the public members, those inherited from other classes of the package included."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("patchcore_rs.")]
    members = {}
    for base in reversed(own):
        members |= vars(base)
    fields = {}
    for base in reversed(own):
        fields |= inspect.get_annotations(base)
    yield f"{name}: class({', '.join(base.__name__ for base in cls.__bases__ if base is not object)})"
    if "__init__" in members or issubclass(cls, tuple):
        yield f"{name}{signature(cls)}"
    for member in members.keys() | fields.keys():
        if member.startswith("_") and member not in SPECIAL:
            continue
        value = getattr(cls, member, None)
        if member in fields:
            yield f"{name}.{member}: {written(fields[member])}"
        elif isinstance(value, property):
            yield f"{name}.{member}: property {written(inspect.signature(value.fget).return_annotation)}"
        elif callable(value):
            yield f"{name}.{member}{signature(value)}"
        else:
            yield f"{name}.{member}: {type(value).__name__}"


def public_lines(module, prefix=""):
    for name in module.__all__:
        value, full = getattr(module, name), prefix + name
        home = sys.modules[f"patchcore_rs.{patchcore_rs._HOMES.get(name) or '_version'}"]
        if prefix and getattr(patchcore_rs, name, None) is value:
            yield f"{full}: {name}"
        elif inspect.ismodule(value):
            yield f"{full}: module"
            yield from public_lines(value, f"{full}.")
        elif inspect.isclass(value):
            yield from class_lines(full, value)
        elif inspect.isroutine(value):
            yield f"{full}{signature(value)}"
        else:
            yield f"{full}: {written(inspect.get_annotations(home).get(name, value))}"


def public_api():
    return "".join(f"{line}\n" for line in sorted(public_lines(patchcore_rs)))


def test_the_public_names_and_signatures_are_the_ones_that_are_meant():
    meant, found = (text.splitlines(keepends=True) for text in (PUBLIC.read_text("utf-8"), public_api()))
    diff = "".join(difflib.unified_diff(meant, found, "meant", "found", n=0))
    assert not diff, f"the public names or signatures are others; if that is meant, accept it with `make api`\n{diff}"


def test_names_live_where_type_checkers_are_told():
    tree = ast.parse(Path(patchcore_rs.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {alias.name: statement.module for statement in block.body for alias in statement.names}
    prefix = "patchcore_rs."
    assert told == {name: prefix + home if home else "patchcore_rs" for name, home in patchcore_rs._HOMES.items()}


def test_dir_lists_the_public_names_and_no_other():
    assert dir(patchcore_rs) == sorted(patchcore_rs.__all__)
    assert set(patchcore_rs.__all__) == patchcore_rs._HOMES.keys() | {"__version__", "build_info"}
    assert len(patchcore_rs.__all__) == len(set(patchcore_rs.__all__))


def test_no_public_name_is_hidden_by_a_module():
    # Importing patchcore_rs.images sets the attribute images, whatever else went by that name.
    stems = {path.name.partition(".")[0] for path in Path(patchcore_rs.__file__).parent.iterdir()}
    modules = {name for name, home in patchcore_rs._HOMES.items() if home is None}
    assert stems & set(patchcore_rs.__all__) == modules


if __name__ == "__main__":
    PUBLIC.write_text(public_api(), "utf-8")
