"""What every run has, and what must hold between keys; plain values, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mtl_cli.errors import nearest
from mtl_cli.schema import NODES, REQUIRED, STAGE, TYPES, outside, words
from mtl_cli.signature import fits

Found = Iterator[tuple[str, str]]  # dotted key, problem


def contract_problems(tree: Mapping[str, Any]) -> Found:
    """Every problem that a key alone does not show.

    Args:
        tree: a config as plain values.
    """
    yield from _missing(tree)
    yield from _ema(tree.get("ema"))
    optimizer = _mapping(tree.get("optimizer"))
    if optimizer.get("nesterov") is True and optimizer.get("momentum") == 0:
        yield (
            "optimizer.nesterov",
            "optimizer.nesterov: needs momentum (found optimizer.momentum=0, expected > 0); "
            "set optimizer.nesterov=false or optimizer.momentum=0.9",
        )
    for where, stage in _stages(tree):
        if where != "schedule":
            yield from _stage(where, stage, tree)
    yield from _idle_rules(tree)


def _missing(tree: Mapping[str, Any]) -> Found:
    for node in NODES:
        if node not in tree:
            yield node, f"missing key '{node}' (every run has it); take out ~{node}"
        elif node not in {"task", "heads", "losses"} and not isinstance(tree[node], dict):
            found = "null" if tree[node] is None else repr(tree[node])
            yield node, f"{node}: wrong type (found {found}, expected a mapping of keys)"
    for key in REQUIRED:
        node, _, name = key.rpartition(".")
        inside = tree.get(node) if node else tree
        if isinstance(inside, dict) and name not in inside:
            yield key, f"missing key '{key}' (every run has it); take out ~{key}"


def _ema(node: Any) -> Found:
    known = [key.removeprefix("ema.") for key in TYPES if key.startswith("ema.")]
    for key in _mapping(node):
        if key not in known and key != "_target_":
            hint = nearest(key, known) or f" (ema has {', '.join(known)})"
            yield f"ema.{key}", f"unknown key 'ema.{key}'{hint}"


def _stages(tree: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Dotted place and keys of every stage; a schedule of one stage is that stage."""
    schedule = _mapping(tree.get("schedule"))
    stages = schedule.get("stages")
    if not isinstance(stages, dict):
        yield "schedule", schedule
        return
    for name, stage in stages.items():
        if isinstance(stage, dict):
            yield f"schedule.stages.{name}", stage


def _stage(where: str, stage: Mapping[str, Any], tree: Mapping[str, Any]) -> Found:
    """Types and ranges of a stage's keys, and the outputs that it names."""
    for key, kind in STAGE.items():
        value, place = stage.get(key), f"{where}.{key}"
        if value == "???":
            continue
        if not fits(value, kind):
            yield place, f"{place}: wrong type (found {value!r}, expected {words(kind)})"
        elif expected := outside({"lr": "optimizer.lr"}.get(key, key), value):
            yield place, f"{place}: out of range (found {value}, expected {expected})"
    only = stage.get("only")
    source = _mapping(stage.get("resolved")) if stage.get("task") else tree
    outputs = _mapping(_mapping(source.get("task")).get("outputs"))
    for name in [only] if isinstance(only, str) else only if isinstance(only, list) else ():
        if outputs and name not in outputs:
            has = ", ".join(outputs)
            hint = nearest(str(name), outputs)
            yield f"{where}.only", f"{where}.only: the task has no '{name}' (has {has}){hint}"


def _idle_rules(tree: Mapping[str, Any]) -> Found:
    """``unfreeze_at`` rules that act in no epoch."""
    stages = list(_stages(tree))
    places = [("unfreeze_at", tree, stages)]
    places += [(f"{where}.unfreeze_at", stage, [(where, stage)]) for where, stage in stages]
    for place, node, reached in places:
        rules = _mapping(node.get("unfreeze_at"))
        for name, epoch in rules.items():
            if any(other.startswith(f"{name}.") for other in rules):
                continue  # it rests all but the part that the longer rule names
            reasons = [_idle(name, epoch, stage, tree) for _, stage in reached]
            if reasons and all(reasons):
                yield place, f"{place}.{name}: never acts ({reasons[-1]})"


def _idle(name: str, epoch: Any, stage: Mapping[str, Any], tree: Mapping[str, Any]) -> str:
    """Why a rule does nothing in a stage, empty if it acts or cannot be judged."""
    epochs = stage.get("epochs") or tree.get("epochs")
    for frozen in [*(tree.get("freeze") or ()), *(stage.get("freeze") or ())]:
        if name == frozen or name.startswith(f"{frozen}."):
            return f"'{frozen}' is in freeze, so it rests in every epoch; take it out of freeze"
    if isinstance(epochs, int) and isinstance(epoch, (int, float)) and epoch >= epochs:
        return f"found epoch {epoch}, expected one from 0 to {epochs - 1}; use freeze to rest it"
    return ""


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
