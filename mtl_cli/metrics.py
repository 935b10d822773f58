"""Metrics in the tasks' own units, the constant predictor they are compared with, and predictions.

torchmetrics does the counting; it is imported on first use, for it takes seconds. A metric that the
labels at hand do not define is None with a reason, never 0 or NaN.
"""

# N samples, B batch, W raw outputs (1 or C), C classes or labels

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mtl_cli.errors import ConfigError, nearest
from mtl_cli.metric_names import METRICS
from mtl_cli.task import Task

_MISSING = -1  # stands for a missing label of a multilabel target


class _UndefinedError(Exception):
    """The labels at hand do not define the metric; the text says why."""


class TaskMetrics:
    """Metrics of one task over any number of batches; the ranks are joined by the caller.

    Args:
        task: the task; its ``metrics`` are computed, all of its kind where it names none.
        device: where the outputs are kept.

    Attributes:
        reasons: metric name -> why the last :meth:`compute` found it undefined.

    Raises:
        ConfigError: a metric does not exist for this kind of task.
    """

    def __init__(self, task: Task, device: torch.device | str = "cpu") -> None:
        known = METRICS[task.kind]
        problems = [
            f"metrics.{task.name}: no such metric for {task.kind} (found {name}, expected "
            f"{', '.join(known)}){nearest(name, known)}"
            for name in task.metrics
            if name not in known
        ]
        if problems:
            raise ConfigError(problems)
        self.task = task
        self.names = task.metrics or tuple(known)
        self.device = torch.device(device)
        self.reasons: dict[str, str] = {}
        self._batches: list[tuple[Tensor, Tensor, Tensor]] = []

    def update(self, raw: Tensor, target: Tensor, valid: Tensor) -> None:
        """Add a batch.

        Args:
            raw: raw outputs [B,W].
            target: encoded targets [B] or [B,C].
            valid: bool, shaped as target.
        """
        # MPS has no float64; elsewhere it keeps large logits apart for the ranking metrics
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        raw = raw.detach().to(self.device, dtype).view(len(raw), self.task.width)
        self._batches.append((raw, target.to(self.device), valid.to(self.device)))

    def compute(self) -> dict[str, float | None]:
        """Metric name -> value in the task's units, None where undefined (see ``reasons``)."""
        self.reasons = {}
        try:
            raw, target = self._labelled()
        except _UndefinedError as why:
            self.reasons = dict.fromkeys(self.names, str(why))
            return dict.fromkeys(self.names)
        values: dict[str, float | None] = {}
        for name in self.names:
            try:
                values[name] = _FORMULAS[self.task.kind](name, raw, target, self.task)
            except _UndefinedError as why:
                values[name] = None
                self.reasons[name] = str(why)
        return values

    def per_class(self) -> list[dict[str, Any]]:
        """One row per class or label: class, labels, precision, recall, f1; [] for regression."""
        if self.task.kind == "regression":
            return []
        try:
            raw, target = self._labelled()
        except _UndefinedError:
            return []
        counts = _class_counts(raw, target, self.task).tolist()
        return [
            {
                "class": name,
                "labels": tp + fn,
                "precision": tp / (tp + fp) if tp + fp else None,
                "recall": tp / (tp + fn) if tp + fn else None,
                "f1": 2 * tp / (2 * tp + fp + fn) if tp + fn else None,
            }
            for name, (tp, fp, fn) in zip(class_names(self.task), counts, strict=True)
        ]

    def _labelled(self) -> tuple[Tensor, Tensor]:
        """Raw outputs and targets of the labelled samples; missing cells of a multilabel are -1."""
        if not self._batches or not any(bool(valid.any()) for _, _, valid in self._batches):
            raise _UndefinedError("no labels")
        raw, target, valid = (torch.cat(parts) for parts in zip(*self._batches, strict=True))
        if self.task.kind == "multilabel":
            rows = valid.any(dim=-1)
            target = torch.where(valid, target.long(), _MISSING)
        else:
            rows = valid
        raw, target = raw[rows], target[rows]
        if not bool(torch.isfinite(raw).all()):
            raise _UndefinedError("outputs are not finite")
        return raw, target


def class_names(task: Task) -> tuple[str, ...]:
    """Names of the classes; a binary task that names none has ``0`` and ``1``."""
    return task.classes or ("0", "1")


def direction(name: str) -> str:
    """``min`` if less of this metric is better, else ``max``."""
    for directions in METRICS.values():
        if name in directions:
            return directions[name]
    raise KeyError(name)


def gain(value: float, reference: float, direction: str) -> float:
    """Relative gain of a metric over a reference, positive when better.

    Where the reference is 0 or less (f1 of a majority class, r2 of a constant) a ratio says
    nothing, and the plain difference is taken.

    Args:
        value: what is judged.
        reference: the constant predictor's, or a single-task run's.
        direction: ``min`` or ``max``.
    """
    difference = value - reference if direction == "max" else reference - value
    return difference / reference if reference > 0 else difference


def constant_raw(task: Task, baseline: float | Sequence[float]) -> Tensor:
    """Raw output [W] of the predictor that says the same for every image.

    It goes through the same metrics as a network's.

    Args:
        task: the task.
        baseline: the encoded constant: scaled value, class index, or 0 / 1 per label.
    """
    if isinstance(baseline, Sequence):
        return torch.tensor([1.0 if label > 0.5 else -1.0 for label in baseline])
    if task.kind == "regression":
        return torch.tensor([float(baseline)])
    if task.kind == "binary":
        return torch.tensor([1.0 if baseline > 0.5 else -1.0])
    raw = torch.zeros(task.width)
    raw[int(baseline)] = 1.0
    return raw


def predict(task: Task, raw: Tensor) -> dict[str, Any]:
    """Decode the raw output of one image.

    Args:
        task: the task.
        raw: [W].

    Returns:
        regression: value and unit; binary and multiclass: class and probabilities by class;
        multilabel: labels (probability above one half) and probabilities by label.
    """
    raw = raw.detach().cpu().double().flatten()
    if task.kind == "regression":
        return {"value": raw.item() * task.scale + task.center, "unit": task.unit}
    names = class_names(task)
    if task.kind == "multilabel":
        by_label = dict(zip(names, raw.sigmoid().tolist(), strict=True))
        labels = [name for name, p in by_label.items() if p > 0.5]
        return {"labels": labels, "probabilities": by_label}
    if task.kind == "binary":
        raw = torch.cat([torch.zeros_like(raw), raw])  # softmax of (0, x) is sigmoid(x)
    probabilities = raw.softmax(0)
    chosen = names[int(probabilities.argmax())]
    return {
        "class": chosen,
        "probabilities": dict(zip(names, probabilities.tolist(), strict=True)),
    }


def _functional() -> ModuleType:
    import torchmetrics.functional  # pulls torchvision in: seconds, so not at the top

    return torchmetrics.functional


def _regression(name: str, raw: Tensor, target: Tensor, task: Task) -> float:
    """Computed on the learned scale, where sums of squares do not cancel, then given its unit."""
    tm = _functional()
    raw, target = raw[:, 0], target.to(raw.dtype)
    if name == "mae":
        return float(tm.mean_absolute_error(raw, target)) * abs(task.scale)
    if name == "r2":
        if bool((target == target[0]).all()):
            raise _UndefinedError("all labels are equal")
        return float(tm.r2_score(raw, target))
    mse = float(tm.mean_squared_error(raw, target)) * task.scale**2
    return math.sqrt(mse) if name == "rmse" else mse


def _binary(name: str, raw: Tensor, target: Tensor, _: Task) -> float:
    classification = _functional().classification
    # torchmetrics would guess from each batch whether it sees logits: give it probabilities
    probability, target = raw[:, 0].sigmoid(), target.long()
    positive = int(target.sum())
    if name in ("f1", "recall") and positive == 0:
        raise _UndefinedError("no positive labels")
    if name == "auroc" and positive in (0, len(target)):
        raise _UndefinedError("labels of one class only")
    metric = getattr(classification, f"binary_{_TORCHMETRICS.get(name, name)}")
    return float(metric(probability, target))


def _multiclass(name: str, raw: Tensor, target: Tensor, task: Task) -> float:
    classification = _functional().classification
    if name == "accuracy":
        return float(classification.multiclass_accuracy(raw, target, task.width, average="micro"))
    if name == "f1":
        return float(classification.multiclass_f1_score(raw, target, task.width, average="macro"))
    recall = classification.multiclass_recall(raw, target, task.width, average="none")
    present = target.bincount(minlength=task.width) > 0
    return float(recall[present].mean())


def _multilabel(name: str, raw: Tensor, target: Tensor, _: Task) -> float:
    """The mean over the labels that define the metric; accuracy over all cells."""
    classification = _functional().classification
    probability = raw.sigmoid()
    if name == "accuracy":
        known = target != _MISSING
        return float(classification.binary_accuracy(probability[known], target[known]))
    defined = (target == 1).any(0)
    if name == "auroc":
        defined &= (target == 0).any(0)
    if not bool(defined.any()):
        lacks = "labels of both classes" if name == "auroc" else "a positive label"
        raise _UndefinedError(f"no column has {lacks}")
    metric = getattr(classification, f"binary_{_TORCHMETRICS[name]}")
    values = [
        metric(probability[known, c], target[known, c])
        for c in defined.nonzero().flatten().tolist()
        for known in [target[:, c] != _MISSING]
    ]
    return float(torch.stack(values).mean())


def _class_counts(raw: Tensor, target: Tensor, task: Task) -> Tensor:
    """True positives, false positives and false negatives of every class: int64 [C,3]."""
    classification = _functional().classification
    if task.kind == "multilabel":
        predicted = (raw > 0).long()
        columns = [
            classification.binary_stat_scores(predicted[known, c], target[known, c])
            for c in range(task.width)
            for known in [target[:, c] != _MISSING]
        ]
        scores = torch.stack(columns)
    else:
        predicted = (raw[:, 0] > 0).long() if task.kind == "binary" else raw.argmax(dim=1)
        scores = classification.multiclass_stat_scores(
            predicted, target.long(), len(class_names(task)), average="none"
        )
    tp, fp, _, fn, _ = scores.T
    return torch.stack([tp, fp, fn], dim=1)


_TORCHMETRICS = {"f1": "f1_score", "map": "average_precision", "auroc": "auroc"}
_FORMULAS: dict[str, Callable[[str, Tensor, Tensor, Task], float]] = {
    "regression": _regression,
    "binary": _binary,
    "multiclass": _multiclass,
    "multilabel": _multilabel,
}
