"""The backward engine: from per-objective loss sums to the gradients each optimizer applies.

It alone calls autograd, scales losses and runs the collectives of a step. Three routes, from cheap
to dear; forward : input gradient : weight gradient cost 1 : 1 : 1 of a joint step's 3:

* ``sum``   one backward pass of the weighted sum, cost 1: the weights are known beforehand or
  follow from the losses alone;
* ``cut``   the graph is cut at the features: K passes through the heads, then one weighted pass
  through the backbone, cost about 1: the Gramian of the features or of the last shared layer;
* ``rows``  K passes through the backbone, cost (1+2K)/3: the exact gradient rows.
"""

# T objectives, K present objectives, P shared parameters

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtl_cli import dist
from mtl_cli.model import MultiTaskModel
from mtl_cli.precision import LossScale
from mtl_cli.routes import CutRoute, RowsRoute, StepReport, SumRoute, Update
from mtl_cli.schedule.base import Turn
from mtl_cli.task import Objective
from mtl_cli.weighting.base import (
    GradientWeighting,
    GramianWeighting,
    LossWeighting,
    Weighting,
)

DEAD_ROW = 1e-12  # a row shorter than this share of the longest one carries no direction


class BackwardEngine:
    """Turns loss sums of micro-batches into the updates of one turn.

    Usage, in this order: ``begin``; per micro-batch ``cut`` and ``accumulate``; ``finalize``.

    Args:
        model: the bare model (no DDP wrapper: its hooks would give local gradients).
        objectives: the T objectives.
        weighting: the strategy.
        micro_batches: forward passes per step on this rank.
        scale: loss scale.
    """

    def __init__(
        self,
        model: MultiTaskModel,
        objectives: Sequence[Objective],
        weighting: Weighting,
        *,
        micro_batches: int = 1,
        scale: LossScale | None = None,
    ) -> None:
        self.model = model
        self.objectives = tuple(objectives)
        self.weighting = weighting
        self.micro_batches = micro_batches
        self.scale = scale or LossScale()
        self.priors = torch.tensor([o.prior for o in objectives], dtype=torch.float64)

    def begin(self, turn: Turn, step: int, counts: Tensor) -> None:
        """Open a turn.

        Args:
            turn: which tasks learn, for which optimizers.
            step: optimizer steps attempted so far.
            counts: [T, 2] float64, global denominators and labels of every objective.
        """
        self.turn = turn
        self.step = step
        self.present = torch.tensor(
            [i for i, o in enumerate(self.objectives) if o.task in turn.tasks and counts[i, 1] > 0],
            dtype=torch.int64,
        )
        self.tasks = tuple(dict.fromkeys(self.objectives[i].task for i in self.present.tolist()))
        self.factors = self.priors[self.present] / counts[self.present, 0]
        device = next(self.model.parameters()).device
        self.loss_sums = torch.zeros(len(self.present), dtype=torch.float64, device=device)
        self.shared = self.model.shared_parameters()
        known = self.weighting.weights(step, self.present) if len(self.present) else None
        self.known = None if known is None else known.detach().double().cpu()
        self.route = self._route()

    def cut(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the heads are to read: the features, or leaves that stop the graph there."""
        if isinstance(self.route, SumRoute):
            return features
        return {name: f.detach().requires_grad_() for name, f in features.items()}

    def accumulate(
        self, features: dict[str, Tensor], leaves: dict[str, Tensor], sums: dict[int, Tensor]
    ) -> None:
        """Add one micro-batch.

        Args:
            features: the backbone's output.
            leaves: what :meth:`cut` returned for it.
            sums: objective index -> loss sum over this micro-batch's valid labels, fp32 scalar.
        """
        if not len(self.present):
            return
        losses = [
            sums[i] * float(factor)
            for i, factor in zip(self.present.tolist(), self.factors.tolist(), strict=True)
        ]
        self.loss_sums += torch.stack([loss.detach().double() for loss in losses])
        self.route.add(features, leaves, losses)

    def finalize(self) -> StepReport:
        """Reduce over ranks, find the weights, combine, and test that all is finite."""
        if not len(self.present):
            empty = torch.zeros(0, dtype=torch.float64)
            return StepReport(self.present, empty, empty, finite=True)
        self.losses = dist.sum_(self.loss_sums).cpu()
        if not bool(torch.isfinite(self.losses).all()) and not isinstance(self.route, SumRoute):
            return StepReport(self.present, self.losses, torch.ones_like(self.losses), finite=False)
        report = self.route.close()
        grads = [g for update in report.updates for g in update.grads]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) if grads else 0.0
        report.grad_norm = float(norm)
        healthy = torch.isfinite(torch.tensor(report.grad_norm)) & torch.isfinite(self.losses).all()
        report.finite = report.finite and bool(healthy)
        if report.finite:
            report.updates += self._strategy_update()
        else:
            report.updates = []
        return report

    def loss_weights(self, losses: Tensor) -> Tensor:
        """dF/dL of a loss-level strategy at the global losses [K]."""
        assert isinstance(self.weighting, LossWeighting)
        leaf = losses.detach().clone().requires_grad_()
        with torch.enable_grad():
            total = self.weighting.objective(leaf, self.present)
        return torch.autograd.grad(total, leaf)[0].detach()

    def _strategy_update(self) -> list[Update]:
        """Gradient of F in the strategy's own learned scalars, at the global losses."""
        parameters = [p for p in self.weighting.parameters() if p.requires_grad]
        if not parameters:
            return []
        assert isinstance(self.weighting, LossWeighting)
        with torch.enable_grad():
            total = self.weighting.objective(self.losses.float(), self.present)
            grads = torch.autograd.grad(total, parameters)
        return [Update("weighting", parameters, list(grads))]

    def _route(self) -> SumRoute | CutRoute | RowsRoute:
        strategy = self.weighting
        several = self.micro_batches > 1
        if self.turn.split or isinstance(strategy, GradientWeighting):
            return RowsRoute(self)
        if isinstance(strategy, GramianWeighting):
            if self.known is None and (strategy.wrt == "shared" or several):
                return RowsRoute(self)
            uniform = self.known is not None and bool((self.known == 1).all())
            if (
                strategy.observe
                or self.known is None
                or not (strategy.heads == "weighted" or uniform)
            ):
                return CutRoute(self)
            return SumRoute(self)
        if self.known is None and several:
            return RowsRoute(self)
        return SumRoute(self)

    def solve(self, gramian: Tensor) -> Tensor:
        """Weights [K] from the Gramian [K,K]; rows without a direction are left out of it."""
        assert isinstance(self.weighting, GramianWeighting)
        length = gramian.diagonal().clamp(min=0).sqrt()
        alive = length > DEAD_ROW * length.max()
        if not bool(alive.any()):
            return torch.ones_like(self.losses)
        found = self.weighting.solve(
            gramian[alive][:, alive], self.losses[alive], self.present[alive], self.step
        ).double()
        weights = torch.full_like(self.losses, float(found.mean()))
        weights[alive] = found
        return weights

    def head_weights(self, weights: Tensor) -> Tensor:
        """Weights of the head gradients [K]: the objectives' own or 1, per paper."""
        return weights if self.weighting.heads == "weighted" else torch.ones_like(weights)

    def head_parameters(self, objective: int) -> list[nn.Parameter]:
        """Trainable parameters of the head that an objective trains."""
        return self.model.task_parameters(self.objectives[objective].task)
