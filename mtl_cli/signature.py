"""What a class accepts, read from its source text: nothing is imported, so torch stays out."""

from __future__ import annotations

import ast
import functools
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MISSING: Any = object()


@dataclass(frozen=True)
class Parameter:
    """One constructor parameter.

    Args:
        name: its name.
        annotation: source text of the annotation, empty if there is none.
        default: the literal default; MISSING if there is none or it is not a literal.
        required: there is no default.
    """

    name: str
    annotation: str = ""
    default: Any = MISSING
    required: bool = True


@dataclass(frozen=True)
class Signature:
    """What a class or function accepts.

    Args:
        module: the module whose source defines it (imports are followed).
        name: its name there.
        parameters: by name, without ``self``.
        open: takes arbitrary keywords that no base class explains.
        attributes: class attributes with literal values, inherited ones included.
    """

    module: str
    name: str
    parameters: dict[str, Parameter] = field(default_factory=dict)
    open: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it is shipped with this package."""
        return self.module.startswith("mtl_cli.")


def signature(target: str) -> Signature | None:
    """Return the signature of ``package.module.Name``, None if its source cannot be found."""
    module, _, name = target.rpartition(".")
    return _lookup(module, name) if module else None


@functools.cache
def _lookup(module: str, name: str, depth: int = 0) -> Signature | None:
    tree = _tree(module)
    if tree is None or depth > 8:
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _of_class(module, node, depth)
        if isinstance(node, ast.FunctionDef) and node.name == name:
            parameters, is_open = _parameters(node)
            return Signature(module, name, parameters, is_open)
    origin = _imported(module, tree).get(name)
    return _lookup(*origin, depth + 1) if origin else None


def _of_class(module: str, node: ast.ClassDef, depth: int) -> Signature:
    bases = [found for base in node.bases if (found := _base(module, base, depth))]
    attributes: dict[str, Any] = {}
    for base in reversed(bases):
        attributes.update(base.attributes)
    attributes.update(_attributes(module, node))
    init = next(
        (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
    )
    inherited: dict[str, Parameter] = {}
    for base in reversed(bases):
        inherited.update(base.parameters)
    inherited_open = any(base.open for base in bases)
    if init is not None:
        parameters, is_open = _parameters(init, drop_first=True)
        if is_open and bases:
            parameters, is_open = {**inherited, **parameters}, inherited_open
    elif _is_dataclass(node):
        parameters, is_open = {**inherited, **_fields(node)}, inherited_open
    else:
        parameters, is_open = inherited, inherited_open
    return Signature(module, node.name, parameters, is_open, attributes)


def _base(module: str, node: ast.expr, depth: int) -> Signature | None:
    """Signature of a base class; bases outside mtl's and the user's reach count as empty."""
    tree = _tree(module)
    if isinstance(node, ast.Subscript):  # Generic[T]
        node = node.value
    if tree is None or not isinstance(node, ast.Name):
        return None
    return _lookup(module, node.id, depth + 1)


def _parameters(
    node: ast.FunctionDef, *, drop_first: bool = False
) -> tuple[dict[str, Parameter], bool]:
    args = node.args
    positional = [*args.posonlyargs, *args.args]
    padding: list[ast.expr | None] = [None] * (len(positional) - len(args.defaults))
    pairs = list(zip(positional, [*padding, *args.defaults], strict=True))[int(drop_first) :]
    pairs += list(zip(args.kwonlyargs, args.kw_defaults, strict=True))
    found = {
        arg.arg: Parameter(
            arg.arg,
            ast.unparse(arg.annotation) if arg.annotation else "",
            _literal(default),
            required=default is None,
        )
        for arg, default in pairs
    }
    return found, args.kwarg is not None


def _fields(node: ast.ClassDef) -> dict[str, Parameter]:
    return {
        item.target.id: Parameter(
            item.target.id,
            ast.unparse(item.annotation),
            _literal(item.value),
            required=item.value is None,
        )
        for item in node.body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not ast.unparse(item.annotation).startswith("ClassVar")
    }


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(d) for d in node.decorator_list)


def _attributes(module: str, node: ast.ClassDef) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in node.body:
        if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
            name, value = item.targets[0].id, item.value
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.value:
            name, value = item.target.id, item.value
        else:
            continue
        plain = _constant(module, value.id) if isinstance(value, ast.Name) else _literal(value)
        if plain is not MISSING:
            found[name] = plain
    return found


def _constant(module: str, name: str, depth: int = 0) -> Any:
    """Literal value of a module's constant, followed through imports."""
    tree = _tree(module)
    if tree is None or depth > 8:
        return MISSING
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return _literal(node.value)
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name:
            return _literal(node.value)
    origin = _imported(module, tree).get(name)
    return _constant(*origin, depth + 1) if origin else MISSING


def _literal(node: ast.expr | None) -> Any:
    if node is None:
        return MISSING
    try:
        return ast.literal_eval(node)
    except ValueError:
        return MISSING


def _imported(module: str, tree: ast.Module) -> dict[str, tuple[str, str]]:
    """Name -> (module, name) of the ``from x import y`` lines at the top level."""
    found: dict[str, tuple[str, str]] = {}
    package = module if _is_package(module) else module.rpartition(".")[0]
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        base = package
        for _ in range(node.level - 1):
            base = base.rpartition(".")[0]
        source = ".".join(filter(None, (base if node.level else "", node.module)))
        for alias in node.names:
            found[alias.asname or alias.name] = (source, alias.name)
    return found


@functools.cache
def _tree(module: str) -> ast.Module | None:
    path = source_file(module)
    if path is None:
        return None
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


@functools.cache
def source_file(module: str) -> Path | None:
    """File of a module, found without importing any of its parent packages."""
    top, *rest = module.split(".")
    try:
        spec = (
            importlib.util.find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
        )
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    for place in spec.submodule_search_locations or ():
        path = Path(place).joinpath(*rest)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _is_package(module: str) -> bool:
    path = source_file(module)
    return path is not None and path.name == "__init__.py"


PLAIN = {"int": int, "float": (int, float), "bool": bool, "str": str}
SEQUENCES = {"Sequence", "list", "tuple", "List", "Tuple", "Iterable", "Collection"}
MAPPINGS = {"Mapping", "dict", "Dict", "MutableMapping"}


def fits(value: Any, annotation: str) -> bool:
    """Whether a plain YAML value may be passed where ``annotation`` is written.

    Names that no YAML value can have (Tensor, Callable) never fit beside plain ones; an annotation
    of such names alone, or none, takes anything.
    """
    if not annotation:
        return True
    try:
        answers = _options(ast.parse(annotation, mode="eval").body, value)
    except SyntaxError:
        return True
    known = [answer for answer in answers if answer is not None]
    return any(known) or not known


def is_mapping(annotation: str) -> bool:
    """Whether the annotation is a mapping, whose keys are then free."""
    return annotation.split("[")[0].rpartition(".")[2].strip() in MAPPINGS


def _options(node: ast.expr, value: Any) -> list[bool | None]:
    """One answer per member of a union; None where the member says nothing about YAML values."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _options(node.left, value) + _options(node.right, value)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):  # a quoted annotation
            return _options(ast.parse(node.value, mode="eval").body, value)
        return [value is node.value]
    if isinstance(node, ast.Subscript):
        return _subscript(node, value)
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    if name in PLAIN:
        plain = PLAIN[name]
        return [isinstance(value, plain) and (name == "bool" or not isinstance(value, bool))]  # type: ignore[arg-type]
    if name in SEQUENCES:
        return [isinstance(value, (list, tuple))]
    if name in MAPPINGS:
        return [isinstance(value, dict)]
    return [True] if name in {"Any", "object"} else [None]


def _subscript(node: ast.Subscript, value: Any) -> list[bool | None]:
    head = (
        node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    )
    members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if head == "Optional":
        return [value is None, *_options(node.slice, value)]
    if head == "Union":
        return [answer for member in members for answer in _options(member, value)]
    if head == "Literal":
        return [any(value == getattr(member, "value", MISSING) for member in members)]
    if head in SEQUENCES:
        if not isinstance(value, (list, tuple)):
            return [False]
        fixed = head in {"tuple", "Tuple"} and ast.unparse(members[-1]) != "..."
        if fixed and len(value) != len(members):
            return [False]
        first = ast.unparse(members[0])
        return [all(fits(item, first) for item in value)]
    if head in MAPPINGS:
        if not isinstance(value, dict):
            return [False]
        last = ast.unparse(members[-1])
        return [all(fits(item, last) for item in value.values())]
    return [None]
