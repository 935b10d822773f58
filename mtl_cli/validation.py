"""The virtual step of Auto-Lambda: how would each weight have changed the validation loss?

Liu et al., TMLR 2022 (arXiv 2202.03091), eq. 5, by finite differences. The step's batch is cut at
random in a training and a validation half; parameters and BatchNorm statistics come back exactly.
"""

# T objectives, K present objectives

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl_cli import dist
from mtl_cli.backward import BackwardEngine
from mtl_cli.parts import pick
from mtl_cli.passes import forward, label_counts, summed_losses
from mtl_cli.schedule.base import JOINT_OPTIMIZER, Turn
from mtl_cli.task import Batch
from mtl_cli.weighting.base import Weighting
from mtl_cli.weighting.loss_history import AutoLambda
from mtl_cli.weighting.loss_level import Equal
from mtl_cli.work import Work

PROBE = 0.01  # length of the finite difference, epsilon = PROBE / |d|


class Probe:
    """One probe of one step.

    Args:
        work: the stage's set; its strategy is AutoLambda.
        step: optimizer steps attempted so far.
    """

    def __init__(self, work: Work, step: int) -> None:
        self.work = work
        self.step = step
        self.turn = Turn(tuple(t.name for t in work.tasks), (JOINT_OPTIMIZER,))
        self.parameters: list[Tensor] = [p for p in work.model.parameters() if p.requires_grad]

    def engine(
        self, weighting: Weighting, batches: Sequence[Batch | None], counts: Tensor
    ) -> BackwardEngine:
        """An engine that has seen the batches."""
        work = self.work
        engine = BackwardEngine(
            work.model, work.objectives, weighting, micro_batches=work.accumulate
        )
        engine.begin(self.turn, self.step, counts.unsqueeze(0))
        for batch in batches:
            if batch is not None and engine.tasks:
                forward(work, engine, batch)
        return engine

    def gradient(
        self, weighting: Weighting, batches: Sequence[Batch | None], counts: Tensor
    ) -> list[Tensor]:
        """Global gradient of the weighted losses, one tensor per parameter."""
        report = self.engine(weighting, batches, counts).finalize()
        found: dict[Tensor, Tensor] = {}
        for update in report.updates:
            found.update(zip(update.parameters, update.grads, strict=True))
        return [found.get(p, torch.zeros_like(p)) for p in self.parameters]

    def losses(self, batches: Sequence[Batch | None], counts: Tensor) -> Tensor:
        """Global losses [T]; 0 where an objective has no label."""
        sums = summed_losses(self.work, batches, self.turn.tasks)
        return sums / counts[:, 0].clamp_min(1e-30)


def probe_validation(work: Work, micro: Sequence[Batch | None], step: int) -> None:
    """Hand the strategy the losses it learns its weights from; nothing else is changed.

    Args:
        work: the stage's set; its strategy is AutoLambda.
        micro: the step's micro-batches on this rank.
        step: optimizer steps attempted so far.
    """
    strategy = work.weighting
    assert isinstance(strategy, AutoLambda)
    halves = [pick(work, micro, step, 2, half) for half in (0, 1)]
    counts = [dist.sum_on_host(label_counts(work, half), work.device) for half in halves]
    present = torch.nonzero((counts[0][:, 1] > 0) & (counts[1][:, 1] > 0)).flatten()
    if not len(present):
        return
    training, validation = (
        [b if b is None else b.to(work.device) for b in half] for half in halves
    )
    probe = Probe(work, step)
    rate = work.peak_lr * work.lr((step + 0.5) / work.total_steps)
    start = [p.detach().clone() for p in probe.parameters]
    buffers = [b.clone() for b in work.model.buffers()]

    def move(gradient: list[Tensor], length: float) -> None:
        with torch.no_grad():
            torch._foreach_copy_(probe.parameters, start)
            torch._foreach_add_(probe.parameters, gradient, alpha=length)

    move(probe.gradient(strategy, training, counts[0]), -rate)
    direction = probe.gradient(Equal(work.objectives), validation, counts[1])
    norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(direction))))
    if 0 < norm < float("inf"):
        move(direction, PROBE / norm)
        ahead = probe.losses(training, counts[0])[present]
        move(direction, -PROBE / norm)
        behind = probe.losses(training, counts[0])[present]
        if bool(torch.isfinite(ahead + behind).all()):
            ahead, behind = (strategy.transformed(x, present)[0] for x in (ahead, behind))
            strategy.observe_validation(present, ahead, behind, PROBE / norm, rate)
    with torch.no_grad():
        torch._foreach_copy_(probe.parameters, start)
        torch._foreach_copy_(list(work.model.buffers()), buffers)
