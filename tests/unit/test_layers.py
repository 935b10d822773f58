"""Imports go only downward; what reaches outside the package does so in one named place each."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "mtl_cli"
LAYERS = {
    0: "dist console errors",
    1: "device task params lr metric_names rows",
    2: "backbones heads losses metrics precision weighting.* data.*",
    3: "model backward ghost routes schedule.*",
    4: "checkpoint evaluate parts passes predictions record run validation work",
    5: "train",
    6: "allow build comparison compose config contract grid job launch normalise outputs overrides "
    "plugins predict resume schema signature sweep taskfile usage",
    7: "cli commands.* __main__",
}
LAYER = {name: number for number, names in LAYERS.items() for name in names.split()}
# What reads the command line or the config tree.
FRONT = {"config", "compose", "build", "job"} | {
    *("launch", "grid", "normalise", "overrides", "plugins", "resume", "sweep", "taskfile"),
    *("commands.completion", "commands.conf"),
}
SIBLINGS = ["precision imports data.base"]  # normalises the images before it casts them


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py") if name_of(path) != "__init__"}
MODULES = {name: path for name, path in MODULES.items() if path.stat().st_size}


def family(name: str) -> str:
    """``weighting.gramian`` -> ``weighting.*``; other names stay."""
    return f"{name.partition('.')[0]}.*" if "." in name else name


def nodes(tree: ast.AST, functions: bool = True) -> Iterator[ast.AST]:
    """All nodes that run; what is behind TYPE_CHECKING (or, on request, in functions) is left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if not functions and isinstance(node, ast.FunctionDef):
            continue
        yield node
        yield from nodes(node, functions)


@functools.cache
def imports(name: str, functions: bool = True) -> set[str]:
    """Dotted names that a module imports, our own ones relative to the package."""
    found = set()
    for node in nodes(ast.parse(MODULES[name].read_text()), functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                known = full.removeprefix("mtl_cli.") in MODULES
                found.add(full if known else str(node.module))
    return {text.removeprefix("mtl_cli.") for text in found if text != "mtl_cli"}


def own(name: str, functions: bool = True) -> set[str]:
    return imports(name, functions) & set(MODULES)


def test_every_module_has_a_layer():
    assert {family(name) for name in MODULES} == set(LAYER)


def test_imports_go_down():
    upward = [
        f"{name} ({LAYER[family(name)]}) imports {other} ({LAYER[family(other)]})"
        for name in MODULES
        for other in own(name)
        if LAYER[family(other)] > LAYER[family(name)]
    ]
    assert upward == []


def test_parts_do_not_know_each_other():
    strangers = [
        f"{name} imports {other}"
        for name in MODULES
        if LAYER[family(name)] == 2
        for other in own(name)
        if LAYER[family(other)] == 2 and family(other) != family(name)
    ]
    assert strangers == SIBLINGS


def test_no_circle_when_modules_are_loaded():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in own(name, functions=False):
                visit(other, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("hydra", FRONT),
        ("omegaconf", FRONT),
        ("rich", {"console"}),
        ("torch.distributed", {"dist", "backward"}),
        ("fcntl", {"run", "data.cache"}),
    ],
)
def test_one_place_for_what_is_outside(package, allowed):
    found = {
        name
        for name in MODULES
        if any(text == package or text.startswith(f"{package}.") for text in imports(name))
    }
    assert found, "the test looks for nothing"
    assert found <= allowed


def test_what_is_called_in_one_place_only():
    """``print``, and ``torch.distributed`` reached as an attribute of torch."""
    elsewhere = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Name) and node.id == "print" and name != "console":
                elsewhere.append(f"{name}:{node.lineno} print")
            if isinstance(node, ast.Attribute) and name not in {"dist", "backward"}:
                text = ast.unparse(node)
                if text.startswith("torch.distributed"):
                    elsewhere.append(f"{name}:{node.lineno} {text}")
    assert elsewhere == []
