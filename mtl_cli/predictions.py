"""Predictions as rows of plain values, one per image and task."""

# N images, C classes

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mtl_cli.metrics import predict
from mtl_cli.task import Task

COLUMNS = ("image", "task", "value", "unit", "class", "probability")


def rows(
    files: Sequence[str], tasks: Sequence[Task], raw: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """One row per image and task.

    Args:
        files: N image names.
        tasks: the tasks.
        raw: task -> raw outputs [N,C].

    Returns:
        dicts with the keys of ``COLUMNS``; the probability is that of the class (of every label,
        joined by ``|``, for multilabel).
    """
    found = []
    for number, file in enumerate(files):
        for task in tasks:
            decoded = predict(task, raw[task.name][number])
            found.append({"image": file, "task": task.name, **_flat(decoded)})
    return found


def to_csv(table: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """The rows as csv text."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()


def _flat(decoded: Mapping[str, Any]) -> dict[str, Any]:
    if "value" in decoded:
        return {"value": f"{decoded['value']:.6g}", "unit": decoded["unit"]}
    probabilities = decoded["probabilities"]
    if "labels" in decoded:
        shown = "|".join(f"{p:.4f}" for p in probabilities.values())
        return {"class": "|".join(decoded["labels"]), "probability": shown}
    chosen = decoded["class"]
    return {"class": chosen, "probability": f"{probabilities[chosen]:.4f}"}
