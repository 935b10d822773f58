"""Passes of a step's micro-batches through the model: into the engine, or for the losses alone."""

# T objectives, B batch

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mtl_cli import dist
from mtl_cli.backward import BackwardEngine
from mtl_cli.precision import as_input, autocast
from mtl_cli.routes import StepReport
from mtl_cli.task import Batch, mix64
from mtl_cli.work import Work


def forward(work: Work, engine: BackwardEngine, batch: Batch, part: int = 0) -> None:
    """One micro-batch: backbone once, heads, loss sums, into the engine."""
    images = as_input(batch.images, work.dtype)
    with autocast(work.dtype, work.device):
        features = work.model.features(images)
    leaves = engine.cut(features)
    with autocast(work.dtype, work.device):
        raw = work.model.outputs(leaves, engine.tasks)
    engine.accumulate(features, leaves, loss_sums(work, raw, batch), part)


def loss_sums(work: Work, raw: Mapping[str, Tensor], batch: Batch) -> dict[int, Tensor]:
    """Objective index -> sum of the loss over the micro-batch's valid labels."""
    sums: dict[int, Tensor] = {}
    for task, out in raw.items():
        terms = work.losses[task](out, batch.targets[task], batch.valid[task])
        sums.update(zip(work.engine.objectives_of(task), terms, strict=True))
    return sums


def summed_losses(work: Work, batches: Sequence[Batch | None], tasks: Iterable[str]) -> Tensor:
    """Global loss sums [T] float64 (CPU) of this rank's batches, without gradients."""
    sums = torch.zeros(len(work.objectives), dtype=torch.float64)
    with torch.no_grad():
        for batch in batches:
            if batch is None:
                continue
            with autocast(work.dtype, work.device):
                raw = work.model(as_input(batch.images, work.dtype), tasks)
            for index, value in loss_sums(work, raw, batch).items():
                sums[index] += value.double().cpu()
    return dist.sum_on_host(sums, work.device)


def look_ahead(work: Work, resident: Sequence[Batch | None], step: int, report: StepReport) -> None:
    """Tell the strategy the losses of the same batch after the step (FAMO).

    The second pass sees the same dropout masks and leaves BatchNorm statistics as they were.
    """
    buffers = [b.clone() for b in work.model.buffers()]
    seed_step(work, step)
    sums = summed_losses(work, resident, work.engine.tasks)
    torch._foreach_copy_(list(work.model.buffers()), buffers)
    losses = sums[report.present] * work.engine.factors[0]
    if bool(torch.isfinite(losses).all()):
        values, _ = work.weighting.transformed(losses, report.present)
        work.weighting.look_ahead(step, report.present, values)


def label_counts(work: Work, micro: Sequence[Batch | None]) -> Tensor:
    """[T, 2] float64: denominators and labels of every objective, from the targets alone."""
    counts = torch.zeros(len(work.objectives), 2, dtype=torch.float64)
    for batch in micro:
        if batch is None:
            continue
        for task in work.tasks:
            counts[work.engine.objectives_of(task.name)] += work.losses[task.name].count(
                batch.targets[task.name], batch.valid[task.name]
            )
    return counts


def seed_step(work: Work, step: int) -> None:
    """Dropout and other draws of a step depend on (seed, stage, step, rank) alone."""
    seed = mix64(work.seed, 0xD0, work.stage.index, step, dist.rank())
    torch.default_generator.manual_seed(seed)
    if work.device.type == "cuda":
        torch.cuda.manual_seed(seed)
