"""Labels: from the raw values of a table to encoded targets and the mask of what is known.

Missing labels are NaN in the table and False in the mask; an encoded invalid entry is 0, so that a
loss can be computed first and masked afterwards without ever meeting a NaN.
"""

# N rows, C classes

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mtl_cli.data.csvfile import number
from mtl_cli.errors import ConfigError, DataError, nearest
from mtl_cli.task import KINDS, Task

if TYPE_CHECKING:
    from mtl_cli.data.base import Table

log = logging.getLogger(__name__)
SHOWN = 5  # problems listed in one message
NAN = float("nan")


@dataclass(frozen=True)
class Problem:
    """A label that cannot be used.

    Args:
        row: row of the table.
        output: the task.
        text: what was found and what was expected.
    """

    row: int
    output: str
    text: str


def declare(
    outputs: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, Sequence[str]]
) -> tuple[Task, ...]:
    """Turn ``outputs`` of a task's YAML into tasks; centre and scale may still be open.

    Raises:
        ConfigError: an unknown kind, or classes that do not fit the kind.
    """
    problems, tasks = [], []
    for name, spec in outputs.items():
        kind = str(spec.get("kind"))
        classes = tuple(str(c) for c in spec.get("classes") or ())
        if kind == "binary" and not classes:
            classes = ("no", "yes")
        expected = {"regression": "none", "binary": "2", "multiclass": "2 or more"}
        if kind not in KINDS:
            problems.append(f"outputs.{name}.kind: found {kind}, expected one of "
                            f"{', '.join(KINDS)}{nearest(kind, KINDS)}")  # fmt: skip
        elif not _fits(kind, len(classes)):
            problems.append(f"outputs.{name}.classes: found {len(classes)}, expected "
                            f"{expected.get(kind, '1 or more')} for kind {kind}")  # fmt: skip
        elif len(set(classes)) < len(classes):
            problems.append(f"outputs.{name}.classes: a name appears twice")
        elif spec.get("scale") is not None and not float(spec["scale"]) > 0:
            problems.append(f"outputs.{name}.scale: found {spec['scale']}, expected above 0")
        else:
            tasks.append(Task(name, kind, classes, str(spec.get("unit") or ""),
                              metrics=tuple(metrics.get(name) or ())))  # fmt: skip
    if problems:
        raise ConfigError(problems)
    return tuple(tasks)


def _fits(kind: str, count: int) -> bool:
    return {
        "regression": count == 0,
        "binary": count == 2,
        "multiclass": count >= 2,
        "multilabel": count >= 1,
    }[kind]


def class_values(
    names: Iterable[str | None], output: str, classes: Sequence[str], decimal_comma: bool = False
) -> tuple[Tensor, list[Problem]]:
    """Look class names up, ignoring case and surrounding space; None is a missing label.

    A whole number is an index, unless the classes themselves are called by numbers; ``3.0`` (with
    ``decimal_comma`` also ``3,0``), as spreadsheets write it beside empty cells, is 3.

    Returns:
        Class indices float64 [N] with NaN for missing and unknown names, and the unknown ones.
    """
    index = {name.strip().casefold(): float(i) for i, name in enumerate(classes)}
    numbered = any(number(name, decimal_comma) is not None for name in classes)
    values, problems = [], []
    for row, name in enumerate(names):
        value = NAN if name is None else index.get(name.strip().casefold())
        if value is None and name is not None and (code := number(name, decimal_comma)) is not None:
            whole = str(int(code)) if code.is_integer() else name
            value = index.get(whole) if numbered else (code if code.is_integer() else None)
        if value is None:
            text = f"found '{name}', expected one of {listed(classes)}"
            problems.append(Problem(row, output, text + nearest(str(name), classes)))
            value = NAN
        values.append(value)
    return torch.tensor(values, dtype=torch.float64), problems


def listed(names: Sequence[str], most: int = 12) -> str:
    """Join names for a message, shortened when there are many."""
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check(table: Table, tasks: Sequence[Task], policy: str) -> dict[str, Tensor]:
    """Find the labels that no loss could use, and blank them out (NaN) in the table.

    Args:
        table: its labels are changed in place.
        tasks: what is declared.
        policy: ``error`` raises on the first few, ``mask`` treats them as missing.

    Returns:
        Per task a bool mask of the bad entries, shaped as the labels.

    Raises:
        DataError: bad labels under ``error``: file, row, task, found and expected.
    """
    problems, bad = list(table.problems), {}
    for task in tasks:
        raw = table.labels[task.name]
        bad[task.name] = _unusable(task, raw)
        rows = bad[task.name].reshape(len(raw), -1).any(1).nonzero().flatten().tolist()
        for row in rows:
            wrong = raw[row][bad[task.name][row]].flatten()[0].item()
            problems.append(Problem(row, task.name, f"found {wrong:g}, expected {_range(task)}"))
        table.labels[task.name] = raw.masked_fill(bad[task.name], float("nan"))
    for problem in table.problems:
        bad[problem.output][problem.row] = True
    problems.sort(key=lambda p: p.row)
    lines = [f"{table.where(p.row)}: {p.output}: {p.text}" for p in problems[:SHOWN]]
    if problems and policy == "error":
        raise DataError(summed(lines, len(problems), "data.bad_label=mask masks and counts them"))
    for line in lines:
        log.warning("masked: %s", line)
    if len(problems) > SHOWN:
        log.warning("masked: %d more labels", len(problems) - SHOWN)
    return bad


def summed(lines: list[str], count: int, remedy: str) -> str:
    """The first few problems, how many more there are, and what to do."""
    more = f"... and {count - len(lines)} more" if count > len(lines) else ""
    return "\n".join([*lines, *([more] if more else [])]) + f"; {remedy}"


def _unusable(task: Task, raw: Tensor) -> Tensor:
    known = ~torch.isnan(raw)
    if task.kind == "regression":
        return known & torch.isinf(raw)
    if task.kind == "multiclass":
        return known & ((raw != raw.round()) | (raw < 0) | (raw >= task.width))
    return known & (raw != 0) & (raw != 1)


def _range(task: Task) -> str:
    if task.kind == "regression":
        return "a finite number"
    if task.kind == "multiclass":
        return f"a class index 0..{task.width - 1} ({listed(task.classes)})"
    return "0 or 1"


def resolve(
    tasks: Sequence[Task],
    outputs: Mapping[str, Mapping[str, Any]],
    table: Table,
    train: Tensor,
    statistics: Mapping[str, Mapping[str, float]] | None,
) -> tuple[Task, ...]:
    """Settle centre and scale of regression targets.

    The values in ``outputs`` win, then ``statistics`` (of a checkpoint), then mean and standard
    deviation of the known training labels.
    """
    done = []
    for task in tasks:
        if task.kind == "regression":
            known = table.labels[task.name][train]
            known = known[~torch.isnan(known)]
            spread = float(known.std(correction=0)) if len(known) else 1.0
            own = {"center": float(known.mean()) if len(known) else 0.0, "scale": spread or 1.0}
            own |= (statistics or {}).get(task.name, {})
            given = outputs[task.name]
            own |= {k: float(given[k]) for k in own if given.get(k) is not None}
            task = replace(task, center=own["center"], scale=own["scale"])
        done.append(task)
    return tuple(done)


def encode(task: Task, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Encode raw labels for the loss.

    Shape:
        raw float64 [N] or [N,C] -> targets (regression ``(y - center) / scale``, binary and
        multilabel 0/1: float32; multiclass: int64) and valid bool, both shaped as raw.
    """
    valid = ~torch.isnan(raw)
    known = raw.masked_fill(~valid, 0.0)
    if task.kind == "multiclass":
        return known.long(), valid
    if task.kind == "regression":
        known = ((known - task.center) / task.scale).masked_fill(~valid, 0.0)
    return known.float(), valid


def constant(task: Task, targets: Tensor, valid: Tensor) -> float | list[float]:
    """Best constant prediction from known training labels, in encoded terms.

    Median for regression (it minimises the absolute error), majority class or label otherwise.
    """
    if task.kind == "multilabel":
        return [float(t[v].mean() > 0.5) if v.any() else 0.0
                for t, v in zip(targets.T, valid.T, strict=True)]  # fmt: skip
    known = targets[valid]
    if task.kind == "regression":
        return float(known.quantile(0.5)) if len(known) < 2**24 else float(known.median())
    return float(known.long().bincount(minlength=2).argmax())
