"""A task of the user's own in one YAML file: expanded to what a task of the tree looks like.

For example:

    name: products
    outputs: {price: {kind: regression, unit: EUR}, brand: {kind: multiclass, classes: [a, b]}}
    data: {root: photos, table: labels.csv}    # keys of conf/data/csv.yaml; source: NAME for another
    metrics: {price: [mae]}                    # optional, by kind
    heads: auto                                # or {price: mlp}
    losses: auto                               # or {price: smooth_l1}

Paths are looked for beside the file first, then in the working directory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore

from mtl_cli.config import conf_dir, read_yaml
from mtl_cli.errors import ConfigError, nearest
from mtl_cli.metric_names import DEFAULT_HEAD, DEFAULT_LOSS, DEFAULT_METRICS
from mtl_cli.signature import fits

KEYS = ("name", "outputs", "metrics", "data", "heads", "losses", "backbone")
PATHS = ("root", "table", "file", "cache_dir")
SOURCE = "csv"
# Of the file's own keys; what lies below them is checked in the composed tree.
TYPES: dict[str, tuple[str, str]] = {
    "name": ("str | None", "text; put it in quotes"),
    "metrics": ("dict | None", "a mapping, e.g. {price: [mae]}"),
    "data": ("dict | str | None", "a mapping, e.g. {root: photos, table: labels.csv}"),
    "data.source": ("str | None", "the name of an option of data"),
    "backbone": ("str | None", "the name of an option of backbone"),
}
OUTPUT_NAME = re.compile(r"[\w -]+")  # a part of dotted keys and of file names

_registered: dict[Path, str] = {}


def is_task_file(value: str) -> bool:
    """Whether ``task=value`` names a file instead of an option."""
    return unquote(value).endswith((".yaml", ".yml"))


def unquote(value: str) -> str:
    """Drop the quotes of Hydra's grammar."""
    value = value.strip()
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def register(value: str) -> str:
    """Make a task file known to Hydra and return the name of its option.

    Raises:
        ConfigError: the file cannot be read or is not a task; carries every problem.
    """
    path = Path(unquote(value)).expanduser().resolve()
    if path not in _registered:
        name = path.stem
        if name in _registered.values() or _shipped(name):
            name += "_" + hashlib.sha256(str(path).encode()).hexdigest()[:4]
        _registered[path] = name
    ConfigStore.instance().store(
        group="task", name=_registered[path], node=expand(path), package="_global_", provider="file"
    )
    return _registered[path]


def file_of(option: str) -> Path | None:
    """The file behind an option that :func:`register` made."""
    return next((path for path, name in _registered.items() if name == option), None)


def expand(path: Path) -> dict[str, Any]:
    """Turn the file into a task node with a defaults list.

    Raises:
        ConfigError: every problem of the file at once.
    """
    if not path.is_file():
        raise ConfigError(
            f"task={path}: no such file; mtl data inspect csv ... --write {path.name}"
        )
    raw = read_yaml(path)
    problems = [
        f"{path.name}: unknown key '{key}'{nearest(key, KEYS)}" for key in raw if key not in KEYS
    ]
    outputs = raw.get("outputs")
    if not isinstance(outputs, Mapping) or not outputs:
        problems.append(
            f"{path.name}: no outputs (expected e.g. outputs: {{price: {{kind: regression}}}})"
        )
        raise ConfigError(problems)
    problems += _mistyped(path.name, raw)
    kinds = {}
    for name, output in outputs.items():
        if not isinstance(name, str) or not OUTPUT_NAME.fullmatch(name):
            problems.append(
                f"{path.name}: outputs: not a name (found {name!r}, expected text of letters, "
                "digits, - and _); choose another and say column: for the one in the table"
            )
            continue
        kind = output.get("kind") if isinstance(output, Mapping) else None
        if kind not in DEFAULT_METRICS:
            known = ", ".join(DEFAULT_METRICS)
            hint = nearest(str(kind), DEFAULT_METRICS)
            problems.append(
                f"{path.name}: outputs.{name}.kind: not a kind (found {kind}, expected {known}){hint}"
            )
        else:
            kinds[name] = str(kind)
    heads = _options(path, raw, "heads", kinds, DEFAULT_HEAD, problems)
    losses = _options(path, raw, "losses", kinds, DEFAULT_LOSS, problems)
    if problems:
        raise ConfigError(problems)
    data = raw.get("data") or {}
    if isinstance(data, str):
        data = {"source": data}
    return _node(path, raw, kinds, heads, losses, dict(data))


def _mistyped(file: str, raw: Mapping[str, Any]) -> list[str]:
    """Keys of the file whose values are of another kind."""
    data = raw.get("data")
    values = {**raw, "data.source": data.get("source") if isinstance(data, dict) else None}
    return [
        f"{file}: {key}: wrong type (found {values[key]!r}, expected {expected})"
        for key, (kind, expected) in TYPES.items()
        if not fits(values.get(key), kind)
    ]


def _options(
    path: Path,
    raw: Mapping[str, Any],
    node: str,
    kinds: Mapping[str, str],
    default: Mapping[str, str],
    problems: list[str],
) -> dict[str, str]:
    """Option of the head or loss group for every output."""
    chosen = raw.get(node, "auto")
    if chosen in ("auto", None):
        chosen = {}
    if not isinstance(chosen, Mapping):
        problems.append(
            f"{path.name}: {node}: not understood (found {chosen}, expected auto or {{output: NAME}})"
        )
        return {}
    problems += [
        f"{path.name}: {node}.{name}: there is no such output{nearest(str(name), kinds)}"
        for name in chosen
        if name not in kinds
    ]
    return {name: str(chosen.get(name, default[kind])) for name, kind in kinds.items()}


def _node(
    path: Path,
    raw: Mapping[str, Any],
    kinds: Mapping[str, str],
    heads: Mapping[str, str],
    losses: Mapping[str, str],
    data: dict[str, Any],
) -> dict[str, Any]:
    defaults: list[Any] = [{"/data@_global_.data": data.pop("source", None) or SOURCE}]
    defaults += [{f"/head@_global_.heads.{name}": option} for name, option in heads.items()]
    defaults += [{f"/loss@_global_.losses.{name}": option} for name, option in losses.items()]
    if raw.get("backbone"):
        defaults.append({"override /backbone@_global_.backbone": raw["backbone"]})
    metrics = {name: list(DEFAULT_METRICS[kind]) for name, kind in kinds.items()}
    for key in PATHS:
        if isinstance(data.get(key), str):
            data[key] = _locate(path.parent, data[key])
    return {
        "defaults": [*defaults, "_self_"],
        "task": {
            "name": raw.get("name") or path.stem,
            "outputs": raw["outputs"],
            "metrics": {**metrics, **(raw.get("metrics") or {})},
        },
        "data": data,
    }


def _locate(directory: Path, value: str) -> str:
    """A path that is written in the file: beside the file if it is there, else from the cwd."""
    given = Path(value).expanduser()
    beside = directory / given
    return str(beside.resolve()) if not given.is_absolute() and beside.exists() else str(given)


def _shipped(name: str) -> bool:
    return (conf_dir() / "task" / f"{name}.yaml").is_file()
