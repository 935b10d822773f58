"""Checks a composed config as a whole, before torch is imported, and writes it as text."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import mtl_cli
from mtl_cli.allow import NODES, refuse
from mtl_cli.contract import contract_problems
from mtl_cli.errors import ConfigError, SafetyError, nearest
from mtl_cli.outputs import task_problems
from mtl_cli.schema import GROUPS, INJECTED, ROOT, TYPES, outside, words
from mtl_cli.signature import Signature, fits, signature

if TYPE_CHECKING:
    from mtl_cli.compose import Composed

ROOT_CONFIG = "train"
SECRET = re.compile(r"token|secret|password|passwd|api_?key", re.IGNORECASE)
REDACTED = "REDACTED"
HYDRA_NODES = ("callbacks", "job_logging", "hydra_logging", "launcher", "sweeper", "searchpath")


class Unsafe(str):
    """A problem that is refused for safety: exit 9 instead of 2."""

    __slots__ = ()


def conf_dir() -> Path:
    """Directory of the shipped config: inside a wheel, or beside the package in a checkout."""
    package = Path(mtl_cli.__file__).resolve().parent
    for place in (package / "conf", package.parent / "conf"):
        if (place / f"{ROOT_CONFIG}.yaml").is_file():
            return place
    raise ConfigError(f"{package}/conf: no {ROOT_CONFIG}.yaml; install mtl-cli again")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read one YAML file as plain values.

    Raises:
        ConfigError: it cannot be read or is not a mapping; names line and column.
    """
    try:
        state = path.stat()
        raw = copy.deepcopy(_parse(path, state.st_mtime_ns, state.st_size))
    except yaml.YAMLError as error:
        raise ConfigError(yaml_problem(error, str(path))) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ConfigError(f"{path}: cannot be read ({reason})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: not a mapping of keys (found {type(raw).__name__})")
    return {str(key): value for key, value in raw.items()}


@functools.lru_cache(maxsize=256)
def _parse(path: Path, changed_ns: int, size: int) -> Any:
    """Plain content of a YAML file, read again when it changes; every sweep job asks for it."""
    del changed_ns, size
    return OmegaConf.to_container(OmegaConf.load(path))


def yaml_problem(error: yaml.YAMLError, path: str = "") -> str:
    """Where a YAML file is wrong, in one line: file:line:column."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path}: {str(error).splitlines()[0]}; correct the YAML"
    name = path or mark.name
    problem = getattr(error, "problem", None) or "not YAML"
    return f"{name}:{mark.line + 1}:{mark.column + 1}: {problem}; correct the YAML"


def option_file(places: Sequence[Path], group: str, option: str) -> Path | None:
    """YAML file of an option, the first in ``places``."""
    files = (place / group / f"{option}.yaml" for place in places)
    return next((path for path in files if path.is_file()), None)


def option_schema(places: Sequence[Path], group: str, option: str) -> dict[str, Any]:
    """Keys of an option with their defaults, those of the options it is based on included."""
    path = option_file(places, group, option)
    raw = read_yaml(path) if path else {}
    keys: dict[str, Any] = {}
    for base in raw.pop("defaults", None) or []:
        if isinstance(base, str) and base not in {"_self_", option}:
            keys.update(option_schema(places, group, base))
    return {**keys, **raw}


@functools.cache
def shipped_schemas(group: str) -> dict[str, dict[str, Any]]:
    """Class -> keys of the shipped options that build it, for configs without an origin."""
    home = conf_dir()
    found: dict[str, dict[str, Any]] = {}
    for path in sorted((home / group).glob("*.yaml")):
        schema = option_schema((home,), group, path.stem)
        found.setdefault(str(schema.get("_target_", "")), {}).update(schema)
    return found


def raise_all(problems: list[str]) -> None:
    """Raise every problem at once, if there are any.

    Raises:
        SafetyError: one of them is refused for safety (exit 9).
        ConfigError: there are only others (exit 2).
    """
    unique = list(dict.fromkeys(problems))
    if any(isinstance(problem, Unsafe) for problem in problems):
        raise SafetyError("\n".join(unique))
    if unique:
        raise ConfigError(unique)


def check(cfg: DictConfig, composed: Composed | None = None) -> list[str]:
    """Find every problem of a composed config: keys, types, ranges, components, tasks, safety.

    Args:
        cfg: the tree, normalised or not.
        composed: where it came from, for the names of files; None for a saved config.

    Returns:
        one line per problem; those that are :class:`Unsafe` end in exit 9.
    """
    return _Check(cfg, composed).problems()


class _Check:
    """One pass over one tree."""

    def __init__(self, cfg: DictConfig, composed: Composed | None) -> None:
        self.composed = composed
        self.found: list[str] = []
        self.tree: dict[str, Any] = self._resolve(cfg)

    def problems(self) -> list[str]:
        """All problems, in the order of the tree."""
        for key in self.tree:
            if key not in ROOT:
                self._say(key, f"unknown key '{key}'{nearest(key, ROOT)}")
        for key in TYPES:
            self._typed(key)
        for node in GROUPS:
            if node in NODES and isinstance(self.tree.get(node), dict):
                self._node(node, self.tree[node])
        self._node_keys("precision", self.tree.get("precision"))
        self._stray_targets("", self.tree)
        self._misplaced()
        for key, text in contract_problems(self.tree):
            self._say(key, text)
        self._tasks("", self.tree)
        self._stages()
        self._ranged()
        self._hydra()
        return self.found

    def _say(self, key: str, text: str, *, unsafe: bool = False) -> None:
        source = self.composed.origin(key) if self.composed else ""
        text = f"{source}: {text}" if source else text
        if text not in self.found:
            self.found.append(Unsafe(text) if unsafe else text)

    def _resolve(self, cfg: DictConfig) -> dict[str, Any]:
        """Plain values with interpolations resolved; what cannot be resolved is a problem."""
        raw = OmegaConf.to_container(cfg, resolve=False)
        assert isinstance(raw, dict)
        tree: dict[str, Any] = {str(k): v for k, v in raw.items()}
        for path, value in list(_leaves(tree)):
            if value == "???":
                self._say(path, f"{path}: needs a value; add {path}=...")
            elif isinstance(value, str) and "${" in value:
                try:
                    _put(tree, path, OmegaConf.select(cfg, path))
                except (OmegaConfBaseException, RecursionError) as error:
                    reason = str(error).strip().splitlines()[:1] or ["it refers to itself"]
                    self._say(path, f"{path}: cannot be resolved (found {value}: {reason[0]})")
        return tree

    def _typed(self, key: str) -> None:
        """Type, range and choice of a key that every run has."""
        value = _get(self.tree, key)
        if value is _ABSENT or value == "???":
            return
        if not fits(value, TYPES[key]):
            self._say(key, f"{key}: wrong type (found {value!r}, expected {words(TYPES[key])})")

    def _ranged(self) -> None:
        for path, value in _leaves(self.tree, lists=True):
            if expected := outside(path, value):
                self._say(path, f"{path}: out of range (found {value}, expected {expected})")
        name = self.tree.get("run_name")
        if isinstance(name, str) and (not re.fullmatch(r"[\w.+-]+", name) or not name.strip(".")):
            self._say("run_name", f"run_name: not the name of a directory (found '{name}')")
        self._best_by()

    def _best_by(self) -> None:
        """TASK or TASK/METRIC of the last stage's task, or loss."""
        value = self.tree.get("best_by")
        task = self.tree.get("task")
        if not isinstance(value, str) or value == "loss" or not isinstance(task, dict):
            return
        metrics = task.get("metrics")
        known = metrics if isinstance(metrics, dict) else {}
        choices = [f"{t}/{m}" for t, names in known.items() for m in names]
        if value not in choices and value not in known:
            expected = ", ".join(["loss", *known, *choices])
            self._say(
                "best_by",
                f"best_by: no such metric (found '{value}', expected one of {expected})"
                f"{nearest(value, [*known, *choices])}",
            )

    def _node(self, node: str, value: Mapping[str, Any]) -> None:
        """A declared node: one component, or one per output under heads and losses."""
        if node not in {"heads", "losses"}:
            self._component(node, value)
            return
        for name, part in value.items():
            if isinstance(part, dict):
                self._component(f"{node}.{name}", part)
            else:
                self._say(f"{node}.{name}", f"{node}.{name}: not a component (found {part!r})")

    def _component(self, node: str, value: Mapping[str, Any]) -> None:
        """Target, unknown, missing and mistyped arguments of one component."""
        target = value.get("_target_")
        if target is None:
            self._node_keys(node, value)
            return
        if refusal := refuse(node, target):
            self._say(f"{node}._target_", refusal, unsafe=not _is_typo(node, target))
            return
        for name, part in value.items():
            if isinstance(part, dict) and "_target_" in part:
                self._component(f"{node}.{name}", part)
        shape = signature(str(target))
        if shape is None:
            self._node_keys(node, value)
            return
        self._arguments(node, value, shape)

    def _arguments(self, node: str, value: Mapping[str, Any], shape: Signature) -> None:
        injected = INJECTED.get(node.split(".")[0], frozenset())
        schema = self._schema(node)
        names = {name for name in shape.parameters if name not in injected} | set(schema)
        for name, given in value.items():
            path = f"{node}.{name}"
            if name == "_target_" or path in TYPES:
                continue
            if name not in names and not shape.open:
                self._unknown(node, name, names)
            elif name in shape.parameters and not _open(given):
                annotation = shape.parameters[name].annotation
                expected = outside(f"{shape.name}.{name}", given) if shape.ours else None
                if not fits(given, annotation):
                    self._say(
                        path, f"{path}: wrong type (found {given!r}, expected {words(annotation)})"
                    )
                elif expected:
                    self._say(path, f"{path}: out of range (found {given}, expected {expected})")
        for name, parameter in shape.parameters.items():
            if parameter.required and name not in injected and name not in value:
                self._say(node, f"{node}: {shape.name} needs '{name}'; add {node}.{name}=...")

    def _node_keys(self, node: str, value: Any) -> None:
        """Keys of a node without a class: its option's YAML is the schema."""
        schema = self._schema(node)
        if not isinstance(value, dict) or not schema:
            return
        for name, given in value.items():
            path, default = f"{node}.{name}", schema.get(name)
            if name not in schema:
                self._unknown(node, name, schema)
            elif (
                default is not None
                and path not in TYPES
                and not fits(given, type(default).__name__)
            ):
                kind = type(default).__name__
                self._say(path, f"{path}: wrong type (found {given!r}, expected {words(kind)})")

    def _unknown(self, node: str, name: str, names: Mapping[str, Any] | set[str]) -> None:
        known = sorted(n for n in names if not n.startswith("_"))
        hint = nearest(name, known) or f" ({node} has {', '.join(known) or 'no arguments'})"
        self._say(f"{node}.{name}", f"unknown key '{node}.{name}'{hint}")

    def _schema(self, node: str) -> dict[str, Any]:
        if self.composed and node in self.composed.schemas:
            return self.composed.schemas[node]
        top, _, name = node.partition(".")
        group = {"heads": "head", "losses": "loss"}.get(top, top)
        value = _get(self.tree, node)
        if (name and group == top) or not isinstance(value, dict):
            return {}
        return shipped_schemas(group).get(str(value.get("_target_", "")), {})

    def _stray_targets(self, path: str, value: Any) -> None:
        """Refuse a ``_target_`` outside the declared nodes, at any depth."""
        if isinstance(value, list):
            for index, part in enumerate(value):
                self._stray_targets(f"{path}.{index}", part)
        if not isinstance(value, dict):
            return
        node = re.sub(r"^schedule\.stages\.[^.]+\.(resolved\.)?(?=.)", "", path)
        if "_target_" in value and (refusal := refuse(node, value["_target_"])):
            self._say(f"{path}._target_", refusal, unsafe=not _is_typo(node, value["_target_"]))
        for name, part in value.items():
            inner = f"{path}.{name}" if path else str(name)
            self._stray_targets(inner, part)

    def _misplaced(self) -> None:
        """Files that should write anywhere in the tree but land in a node of their own."""
        for group in ("experiment", "debug"):
            if isinstance(self.tree.get(group), dict):
                option = self.composed.choices.get(group, "") if self.composed else ""
                self._say(
                    group,
                    f"{group}={option}: its keys have no effect (they land under '{group}'); "
                    "make '# @package _global_' the first line of its file",
                )

    def _tasks(self, where: str, tree: Mapping[str, Any]) -> None:
        for key, text in task_problems(tree):
            self._say(key, f"{where}{text}")

    def _stages(self) -> None:
        """Keys of the stages, and the tasks that they bring along."""
        schedule = self.tree.get("schedule")
        stages = schedule.get("stages") if isinstance(schedule, dict) else None
        if not isinstance(stages, dict):
            return
        known = {"resolved"}
        for stage in (self._schema("schedule").get("stages") or {}).values():
            known |= set(stage or ())
        for name, stage in stages.items():
            where = f"schedule.stages.{name}"
            if not isinstance(stage, dict):
                continue
            for key in stage:
                if len(known) > 1 and key not in known:
                    self._unknown(where, key, known - {"resolved"})
            resolved = stage.get("resolved")
            if isinstance(resolved, dict):
                for node in ("data", "heads", "losses"):
                    self._node(node, resolved.get(node) or {})
                self._tasks(f"{where}: ", resolved)

    def _hydra(self) -> None:
        """Hydra's own nodes run code before the program starts: only the shell may set them."""
        if self.composed is None:
            return
        typed = [text.lstrip("+~").replace("/", ".") for text in self.composed.overrides]
        for node in HYDRA_NODES:
            if any(text.startswith(f"hydra.{node}") for text in typed):
                continue
            if self.composed.hydra_changed(node):
                self._say(
                    f"hydra.{node}",
                    f"hydra.{node}: set by a file; type it on the command line if you mean it",
                    unsafe=True,
                )


_ABSENT: Any = object()


def _get(tree: Mapping[str, Any], path: str) -> Any:
    value: Any = tree
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    node: Any = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    plain = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    node[int(last) if isinstance(node, list) else last] = plain


def _leaves(tree: Any, path: str = "", *, lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf; lists are leaves if asked, else entered."""
    if isinstance(tree, dict) and (tree or not path):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key), lists=lists)
    elif isinstance(tree, list) and not lists:
        for index, value in enumerate(tree):
            yield from _leaves(value, f"{path}.{index}", lists=lists)
    else:
        yield path, tree


def leaves(cfg: DictConfig) -> dict[str, Any]:
    """Dotted path -> plain value of every leaf, lists whole, interpolations as written."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    return dict(_leaves(raw, lists=True))


def _open(value: Any) -> bool:
    return value == "???" or (isinstance(value, dict) and "_target_" in value)


def _is_typo(node: str, target: object) -> bool:
    """A name of our own package that does not exist: a mistake, not an attack."""
    prefixes = [p for p in NODES.get(node.split(".")[0], ()) if p.startswith("mtl_cli.")]
    return isinstance(target, str) and any(target.startswith(prefix) for prefix in prefixes)


def to_text(cfg: DictConfig) -> str:
    """The config as YAML: interpolations resolved except the environment's, secrets redacted."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(raw, dict)
    tree: dict[str, Any] = {str(k): v for k, v in raw.items()}
    for path, value in list(_leaves(tree)):
        if SECRET.search(path.rpartition(".")[2]) and value is not None:
            _put(tree, path, REDACTED)
        elif isinstance(value, str) and "${" in value and "oc.env" not in value:
            _put(tree, path, OmegaConf.select(cfg, path))
    return OmegaConf.to_yaml(OmegaConf.create(tree))
