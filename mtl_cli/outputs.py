"""A task's outputs against its heads, losses and metrics; plain values, no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mtl_cli.allow import refuse
from mtl_cli.errors import nearest
from mtl_cli.metric_names import METRICS
from mtl_cli.schema import OUTPUT, words
from mtl_cli.signature import Signature, fits, signature

TASK_KEYS = ("name", "outputs", "metrics")
Found = Iterator[tuple[str, str]]  # dotted key, problem


def task_problems(tree: Mapping[str, Any]) -> Found:
    """Every problem of ``task`` and of what hangs on its outputs.

    Args:
        tree: a config, or the part that a stage brings along: task, heads, losses.
    """
    task = tree.get("task")
    if not isinstance(task, dict):
        yield "task", f"task: not a task (found {task!r})"
        return
    for key in task:
        if key not in TASK_KEYS:
            yield f"task.{key}", f"unknown key 'task.{key}'{nearest(key, TASK_KEYS)}"
    outputs = task.get("outputs")
    if not isinstance(outputs, dict) or not outputs:
        yield "task.outputs", "task.outputs: empty (expected at least one output)"
        return
    for name, output in outputs.items():
        yield from _output(f"task.outputs.{name}", output)
    for node in ("heads", "losses"):
        yield from _parts(node, tree.get(node) or {}, outputs)
    yield from _metrics(task.get("metrics") or {}, outputs)


def _output(where: str, output: Any) -> Found:
    if not isinstance(output, dict):
        yield where, f"{where}: not an output (found {output!r}, expected {{kind: ...}})"
        return
    for key, value in output.items():
        place = f"{where}.{key}"
        if key not in OUTPUT:
            yield place, f"unknown key '{place}'{nearest(key, OUTPUT)}"
        elif not fits(value, OUTPUT[key]):
            yield place, f"{place}: wrong type (found {value!r}, expected {words(OUTPUT[key])})"
    kind, classes, scale = (output.get(key) for key in ("kind", "classes", "scale"))
    if kind not in METRICS:
        hint = nearest(str(kind), METRICS)
        yield where, f"{where}.kind: not a kind (found {kind}, expected {', '.join(METRICS)}){hint}"
    elif kind in {"multiclass", "multilabel"} and not classes:
        yield where, f"{where}: {kind} needs its classes; add classes: [...]"
    elif kind == "binary" and classes and len(classes) != 2:
        yield where, f"{where}.classes: wrong number (found {len(classes)}, expected 2)"
    if isinstance(classes, list) and len({str(c) for c in classes}) < len(classes):
        yield where, f"{where}.classes: a name twice (found {classes})"
    if isinstance(scale, (int, float)) and scale <= 0:
        yield where, f"{where}.scale: out of range (found {scale}, expected > 0)"


def _parts(node: str, parts: Any, outputs: Mapping[str, Any]) -> Found:
    """One head and one loss per output, of a class that takes its kind."""
    if not isinstance(parts, dict):
        yield node, f"{node}: not a mapping from output to component (found {parts!r})"
        return
    for name in parts:
        if name not in outputs:
            has = ", ".join(outputs)
            yield f"{node}.{name}", f"{node}.{name}: task has no '{name}' (has {has})"
    for name, output in outputs.items():
        place = f"{node}.{name}"
        if name not in parts:
            one = {"heads": "head", "losses": "loss"}[node]
            yield place, f"{node}: output '{name}' has no {one}; add {place}=NAME"
            continue
        kind = output.get("kind") if isinstance(output, dict) else None
        shape = _shape(node, parts[name])
        kinds = shape.attributes.get("kinds") if shape else None
        if shape and kinds and kind in METRICS and kind not in kinds:
            yield (
                place,
                f"{place}: {shape.name} does not fit a {kind} output (expected an output that is "
                f"{' or '.join(kinds)}); choose another with {place}=NAME",
            )


def _shape(node: str, part: Any) -> Signature | None:
    target = part.get("_target_") if isinstance(part, dict) else None
    return None if target is None or refuse(node, target) else signature(str(target))


def _metrics(metrics: Any, outputs: Mapping[str, Any]) -> Found:
    if not isinstance(metrics, dict):
        yield "task.metrics", f"task.metrics: not a mapping (found {metrics!r})"
        return
    for name, chosen in metrics.items():
        place = f"task.metrics.{name}"
        if name not in outputs:
            yield place, f"{place}: task has no '{name}' (has {', '.join(outputs)})"
            continue
        kind = outputs[name].get("kind") if isinstance(outputs[name], dict) else None
        known = METRICS.get(str(kind), {})
        if not isinstance(chosen, list):
            yield place, f"{place}: not a list (found {chosen!r}, expected [{', '.join(known)}])"
            continue
        for metric in chosen:
            if known and metric not in known:
                hint = nearest(str(metric), known)
                yield (
                    place,
                    f"{place}: no metric '{metric}' for a {kind} output "
                    f"(expected {', '.join(known)}){hint}",
                )
