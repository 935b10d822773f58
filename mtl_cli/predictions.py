"""Predictions as rows of plain values, one per image and task."""

# N images, C classes

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from torch import Tensor

from mtl_cli.metrics import class_names
from mtl_cli.task import Task

COLUMNS = ("image", "task", "value", "unit", "class", "probability")
Row = dict[str, str]


def rows(
    files: Sequence[str],
    tasks: Sequence[Task],
    raw: Mapping[str, Tensor],
    labels: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> list[Row]:
    """One row per image and task.

    Args:
        files: N image names.
        tasks: the tasks.
        raw: task -> raw outputs [N,C].
        labels: task -> (encoded targets, valid), for a column ``label``; empty where missing.

    Returns:
        dicts with the keys of ``COLUMNS``; the probability is that of the class (for multilabel of
        every label, ``red=0.9912|large=0.0200``).
    """
    by_task = []
    for task in tasks:
        decoded = _decode(task, raw[task.name])
        if labels is not None:
            target, valid = labels[task.name]
            for row, label in zip(decoded, _labels(task, target, valid), strict=True):
                row["label"] = label
        by_task.append((task.name, decoded))
    return [
        {"image": file, "task": name, **decoded[number]}
        for number, file in enumerate(files)
        for name, decoded in by_task
    ]


def to_csv(table: Sequence[Row]) -> str:
    """The rows as csv text."""
    columns = [*COLUMNS, *(["label"] if table and "label" in table[0] else [])]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _decode(task: Task, raw: Tensor) -> list[Row]:
    """Value or class of every image."""
    raw = raw.detach().double().cpu().view(len(raw), task.width)
    if task.kind == "regression":
        values = (raw[:, 0] * task.scale + task.center).tolist()
        return [{"value": f"{value:.6g}", "unit": task.unit} for value in values]
    names = class_names(task)
    if task.kind == "multilabel":
        return [
            {
                "class": "|".join(n for n, p in zip(names, ps, strict=True) if p > 0.5),
                "probability": "|".join(f"{n}={p:.4f}" for n, p in zip(names, ps, strict=True)),
            }
            for ps in raw.sigmoid().tolist()
        ]
    if task.kind == "binary":
        positive = raw[:, 0].sigmoid()
        chosen = (positive > 0.5).long()
        best = positive.where(chosen == 1, 1 - positive)
    else:
        best, chosen = raw.softmax(1).max(1)
    pairs = zip(chosen.tolist(), best.tolist(), strict=True)
    return [{"class": names[c], "probability": f"{p:.4f}"} for c, p in pairs]


def _labels(task: Task, target: Tensor, valid: Tensor) -> list[str]:
    """The labels as text, empty where there is none."""
    if task.kind == "multilabel":
        names = class_names(task)
        return [
            "|".join(n for n, on, known in zip(names, t, v, strict=True) if on and known)
            for t, v in zip(target.tolist(), valid.tolist(), strict=True)
        ]
    if task.kind == "regression":
        shown = [f"{v:.6g}" for v in (target.double() * task.scale + task.center).tolist()]
    else:
        shown = [class_names(task)[int(c)] for c in target.tolist()]
    return [text if known else "" for text, known in zip(shown, valid.tolist(), strict=True)]
