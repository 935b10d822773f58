"""Judging a model: metrics in the tasks' units, gain over the constant predictor, predictions."""

# N samples, B batch, C classes

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtl_cli import dist
from mtl_cli.errors import DataError
from mtl_cli.metrics import TaskMetrics, constant_raw, direction, gain
from mtl_cli.precision import as_input, autocast
from mtl_cli.task import Task

if TYPE_CHECKING:
    from mtl_cli.data.base import DataSet
    from mtl_cli.losses import Loss
    from mtl_cli.model import ByTask, MultiTaskModel
    from mtl_cli.run import StopFlag
    from mtl_cli.work import Work

Metrics = dict[str, dict[str, float | None]]


@dataclass
class Evaluation:
    """Result on one split.

    Args:
        losses: task -> mean loss over valid labels, None without labels.
        metrics: task -> metric name -> value in the task's units, None where undefined.
        gains: task -> relative gain of its first metric over the constant predictor.
        score: mean of the gains; None if a task that could be judged was not.
        raw: task -> [N,C] raw outputs, in the split's order.
        index: [N] rows of the samples in the table.
    """

    losses: dict[str, float | None]
    metrics: Metrics
    gains: dict[str, float]
    score: float | None
    raw: dict[str, Tensor]
    index: Tensor
    tasks: tuple[Task, ...] = ()

    def deciding(self, best_by: str | None) -> float | None:
        """What decides about best.pt, larger is better: the score, or the metric ``best_by``.

        ``best_by`` is TASK, TASK/METRIC or ``loss``.
        """
        if best_by is None:
            return self.score
        if best_by == "loss":
            known = [v for v in self.losses.values() if v is not None]
            return -sum(known) if known else None
        task, _, name = best_by.partition("/")
        name = name or next(t.metrics[0] for t in self.tasks if t.name == task)
        value = self.metrics[task][name]
        if value is None:
            return None
        return -value if direction(name) == "min" else value


def deciding_by(best_by: str | None, tasks: Sequence[Task]) -> str | None:
    """``best_by`` for a stage with these tasks; None (the mean gain) where they have no such metric.

    ``best_by`` is written for the run's task, and a stage may learn another one.
    """
    if best_by is None or best_by == "loss":
        return best_by
    name, _, metric = best_by.partition("/")
    known = any(t.name == name and (not metric or metric in t.metrics) for t in tasks)
    return best_by if known else None


def unjudged(tasks: Sequence[Task], data: DataSet, best_by: str | None) -> list[str]:
    """What to say about tasks without a label in the validation split, one line each.

    Raises:
        DataError: ``best_by`` names such a task.
    """
    rows = data.splits["val"]
    empty = [t.name for t in tasks if not bool(data.valid[t.name][rows].any())]
    if best_by is not None and best_by.partition("/")[0] in empty:
        raise DataError(
            f"best_by: {best_by} cannot be judged (found no label of it among the {len(rows)} "
            "validation samples); choose another best_by, or give that split such labels"
        )
    if len(empty) == len(tasks):
        return [
            f"validation: no label at all among {len(rows)} samples: nothing is judged, best.pt is "
            "the first epoch's; use last.pt"
        ]
    return [
        f"validation: no label of {name} among {len(rows)} samples: its metrics stay '-'"
        for name in empty
    ]


def evaluate(work: Work, split: str, stop: StopFlag | None = None) -> Evaluation | None:
    """Judge a stage's model (the averaged one where there is one) on a split; see below."""
    return evaluate_model(
        work.evaluated,
        work.tasks,
        work.losses,
        work.data,
        work.baseline,
        split,
        work.device,
        work.dtype,
        stop,
    )


def evaluate_model(  # noqa: PLR0913 - what a judgement depends on, spelt out
    model: MultiTaskModel,
    tasks: Sequence[Task],
    losses: ByTask[Loss],
    data: DataSet,
    baseline: Mapping[str, Mapping[str, float | None]],
    split: str,
    device: torch.device,
    dtype: str,
    stop: StopFlag | None = None,
) -> Evaluation | None:
    """Judge a model on a split.

    Args:
        model: in any mode; left in eval mode.
        tasks: the tasks.
        losses: task -> loss.
        data: gives the batches and the labels.
        baseline: task -> metric -> value of the constant predictor.
        split: train, val or test.
        device: of the model.
        dtype: a resolved precision.
        stop: a signal during the evaluation abandons it (on one rank).

    Returns:
        the evaluation, equal on all ranks; None if it was abandoned.
    """
    model.eval()
    raw: dict[str, list[Tensor]] = {task.name: [] for task in tasks}
    seen: list[Tensor] = []
    with torch.inference_mode():
        for batch in data.eval_batches(split, rank=dist.rank(), world=dist.world()):
            if dist.world() == 1 and stop:
                return None
            images = as_input(batch.images.to(device), dtype)
            with autocast(dtype, device):
                outputs = model(images)
            for name, out in outputs.items():
                raw[name].append(out.float().cpu())
            seen.append(batch.index)
    index, joined = _gather(tasks, raw, seen)
    return judge(tasks, losses, data, baseline, joined, index)


def judge(
    tasks: Sequence[Task],
    losses: ByTask[Loss],
    data: DataSet,
    baseline: Mapping[str, Mapping[str, float | None]],
    raw: Mapping[str, Tensor],
    index: Tensor,
) -> Evaluation:
    """Losses, metrics and gains of raw outputs [N,C] on the samples ``index`` [N]."""
    mean_losses: dict[str, float | None] = {}
    metrics: Metrics = {}
    gains: dict[str, float] = {}
    unjudged = False  # outputs that are not finite must not raise the mean of the others
    for task in tasks:
        target, valid = data.targets[task.name][index], data.valid[task.name][index]
        mean_losses[task.name] = _mean_loss(losses[task.name], raw[task.name], target, valid)
        metrics[task.name] = metrics_of(task, raw[task.name], target, valid)
        first = task.metrics[0]
        value = metrics[task.name][first]
        reference = baseline.get(task.name, {}).get(first)
        if value is not None and reference is not None:
            gains[task.name] = gain(value, reference, direction(first))
        unjudged = unjudged or (value is None and reference is not None)
    score = None if unjudged or not gains else sum(gains.values()) / len(gains)
    return Evaluation(mean_losses, metrics, gains, score, dict(raw), index, tuple(tasks))


def _mean_loss(loss: Loss, raw: Tensor, target: Tensor, valid: Tensor) -> float | None:
    """Prior x mean over the valid labels, terms added up; None without a label."""
    denominator = loss.count(target, valid)[:, 0]
    if not bool((denominator > 0).all()):
        return None
    device = next(loss.buffers(), raw).device  # class weights may live on the GPU
    sums = loss(raw.to(device), target.to(device), valid.to(device)).double().cpu()
    priors = torch.tensor(loss.priors, dtype=torch.float64)
    return float((priors * sums / denominator).sum())


def metrics_of(task: Task, raw: Tensor, target: Tensor, valid: Tensor) -> dict[str, float | None]:
    """Metrics of one task from raw outputs [N,C] and encoded labels."""
    metrics = TaskMetrics(task)
    metrics.update(raw, target, valid)
    return metrics.compute()


def constant_metrics(tasks: Sequence[Task], data: DataSet, split: str) -> Metrics:
    """Metrics of the constant predictor (median or majority of the training labels) on a split."""
    index = data.splits[split]
    constants = data.baseline()
    found: Metrics = {}
    for task in tasks:
        raw = constant_raw(task, constants[task.name]).view(1, -1).expand(len(index), -1)
        target, valid = data.targets[task.name][index], data.valid[task.name][index]
        found[task.name] = metrics_of(task, raw, target, valid)
    return found


def _gather(
    tasks: Sequence[Task], raw: Mapping[str, list[Tensor]], seen: list[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Join the batches, and the ranks, sorted by the samples' row in the table."""
    empty = torch.zeros(0, dtype=torch.int64)
    mine = (
        torch.cat(seen) if seen else empty,
        {
            task.name: torch.cat(raw[task.name]) if seen else torch.zeros(0, task.width)
            for task in tasks
        },
    )
    parts = dist.gather(mine)
    index = torch.cat([rows for rows, _ in parts])
    order = torch.argsort(index)
    joined = {task.name: torch.cat([part[task.name] for _, part in parts])[order] for task in tasks}
    return index[order], joined
