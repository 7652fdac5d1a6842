"""The house rules that a machine can hold: layers, sizes, and what may import torch."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "finetune"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 400
LONGEST_FUNCTION = 60

LAYERS = (
    {
        "",
        "arguments",
        "errors",
        "console",
        "distributed",
        "files",
        "findings",
        "hub_client",
        "machine",
        "privacy",
        "stop_signals",
    },  # "" is finetune/__init__.py
    {"recipe", "kernels", "run_dir"},
    {"data", "models"},
    {"training", "inference", "evaluation", "export", "report"},
    {"commands"},
    {"cli", "__main__"},
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}

# Packages of one layer ignore each other, but both of these write samples.
ALLOWED = {("training", "inference"), ("evaluation", "inference")}
# Modules of the lowest layer, and the command's two, know each other.
OPEN_LAYERS = (0, len(LAYERS) - 1)

# "module.function" that is longer than the rule and why; an entry that is no longer needed fails a test.
EXCUSED: dict[str, str] = {}


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__" or len(parts) == 1) or ""


def house(path: Path) -> str:
    """The package or module of the house that a file belongs to: `recipe`, `cli`, or nothing for the root."""
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "" if name == "__init__" else name


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module with its line, within functions too; `from finetune import x` is finetune.x."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports out"
            if node.module == "finetune":
                yield from ((f"finetune.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield str(node.module), node.lineno


def functions(path: Path) -> Iterator[tuple[str, int, int]]:
    """Every function with its line and length."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{dotted(path)}.{node.name}", node.lineno, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_modules_import_from_below_only(path: Path) -> None:
    own = house(path)
    assert own in LAYER, f"{own} has no layer: add it to LAYERS here and to docs/architecture.md"
    wrong = []
    for name, line in imports(path):
        root, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if root != "finetune" or other == own:
            continue
        other = other if other in LAYER else ""  # a name of finetune/__init__.py
        beside = LAYER[other] == LAYER[own]
        if beside and (LAYER[own] in OPEN_LAYERS or (own, other) in ALLOWED):
            continue
        if LAYER[other] >= LAYER[own]:
            wrong.append(f"{path}:{line}: {own} (layer {LAYER[own]}) imports {name} (layer {LAYER[other]})")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_FILE, f"{path} has {lines} lines; split it"


def test_functions_are_short() -> None:
    long = [
        f"{name} (line {line}) has {length} lines"
        for path in MODULES
        for name, line, length in functions(path)
        if length > LONGEST_FUNCTION and name not in EXCUSED
    ]
    assert not long, "\n".join(long)


def test_no_excuse_is_left_over() -> None:
    lengths = {name: length for path in MODULES for name, _, length in functions(path)}
    assert all(lengths.get(name, 0) > LONGEST_FUNCTION for name in EXCUSED)


@pytest.mark.parametrize("path", [path for path in MODULES if house(path) == "recipe"], ids=dotted)
def test_the_recipe_never_imports_torch(path: Path) -> None:
    assert not {name.split(".")[0] for name, _ in imports(path)} & {
        "torch",
        "transformers",
        "lightning",
        "peft",
    }


@pytest.mark.parametrize("path", [path for path in MODULES if house(path) in ("commands", "cli")], ids=dotted)
def test_commands_import_heavy_modules_only_when_run(path: Path) -> None:
    """At the top of a command's file stand the standard library and what starts at once."""
    light = LAYERS[0] | ({"recipe", "run_dir"} if house(path) == "commands" else set())
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in top:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
        for name in names:
            below = name.split(".")[1] if name.startswith("finetune.") else ""
            below = below if below in LAYER else ""
            allowed = name.split(".")[0] == "finetune" and below in light
            assert allowed or name.split(".")[0] in sys.stdlib_module_names, (
                f"{path}:{node.lineno}: import {name} inside run()"
            )


def test_no_module_is_a_drawer() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "util", "helpers", "common", "misc"}
