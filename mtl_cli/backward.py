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
from mtl_cli.routes import CutRoute, PartsRoute, RowsRoute, StepReport, SumRoute, Update, overflow
from mtl_cli.schedule.base import Turn
from mtl_cli.task import Objective
from mtl_cli.weighting.base import (
    GradientWeighting,
    GramianWeighting,
    LossWeighting,
    Weighting,
)


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

    def begin(self, turn: Turn, step: int, counts: Tensor, observe: bool = False) -> None:
        """Open a turn.

        Args:
            turn: which tasks learn, for which optimizers.
            step: optimizer steps attempted so far.
            counts: [G, T, 2] float64, global denominators and labels of every objective in each of
                the G parts of the batch (three for strategies that need independent batches).
            observe: report a Gramian to log, that of the features where the strategy has none.
        """
        self.turn = turn
        self.step = step
        self.observe = observe
        self.present = torch.tensor(
            [
                i
                for i, o in enumerate(self.objectives)
                if o.task in turn.tasks and bool((counts[:, i, 1] > 0).all())
            ],
            dtype=torch.int64,
        )
        self.tasks = tuple(dict.fromkeys(self.objectives[i].task for i in self.present.tolist()))
        self.factors = self.priors[self.present] / counts[:, self.present, 0]  # [G, K]
        device = next(self.model.parameters()).device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.loss_sums = torch.zeros(len(self.present), dtype=dtype, device=device)
        self.losses = self.loss_sums
        self._reduced: Tensor | None = None
        self.shared = self.model.shared_parameters()
        self.weights: Tensor | None = None  # of the strategy, [K]; None until they can be known
        self.slopes = torch.ones(
            len(self.present), dtype=torch.float64
        )  # of the loss transform, [K]
        self.declared: Tensor | None = None
        if len(self.present):
            self._declare()
        self.wanted = self._wants_gramian()
        self.route = self._route()

    def cut(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return what the heads are to read: the features, or leaves that stop the graph there."""
        if isinstance(self.route, SumRoute):
            return features
        return {name: f.detach().requires_grad_() for name, f in features.items()}

    def accumulate(
        self,
        features: dict[str, Tensor],
        leaves: dict[str, Tensor],
        sums: dict[int, Tensor],
        part: int = 0,
    ) -> None:
        """Add one micro-batch.

        Args:
            features: the backbone's output.
            leaves: what :meth:`cut` returned for it.
            sums: objective index -> loss sum over this micro-batch's valid labels, fp32 scalar.
            part: which of the G parts of the batch it belongs to.
        """
        if not len(self.present):
            return
        losses = [
            sums[i] * float(factor)
            for i, factor in zip(self.present.tolist(), self.factors[part].tolist(), strict=True)
        ]
        values = torch.stack([loss.detach().to(self.loss_sums.dtype) for loss in losses])
        self.loss_sums += values / len(self.factors)
        if isinstance(self.route, PartsRoute):
            self.route.part = part
        self.route.add(features, leaves, losses)

    def finalize(self) -> StepReport:
        """Reduce over ranks, find the weights, combine, and test that all is finite."""
        if not len(self.present):
            empty = torch.zeros(0, dtype=torch.float64)
            return StepReport(self.present, empty, empty, finite=True)
        reduced = self.global_losses()
        if not isinstance(self.route, SumRoute):  # the others need the losses for the weights
            self.losses = reduced.double().cpu()
            if not bool(torch.isfinite(self.losses).all()):
                return overflow(self)
        report = self.route.close()
        self._test(report, reduced)
        if report.finite:
            report.weights = self.row_weights()
            report.updates += self._strategy_update()
        else:
            report.updates = []
        return report

    def _test(self, report: StepReport, losses: Tensor) -> None:
        """Fetch losses and gradient norm in one transfer; a step is finite as a whole."""
        grads = [g for update in report.updates for g in update.grads]
        norms = torch._foreach_norm(grads) if grads else [losses.new_zeros(())]
        norm = torch.linalg.vector_norm(torch.stack(list(norms)))
        fetched = torch.cat([losses, norm.to(losses.dtype).view(1)]).double().cpu()
        self.losses = report.losses = fetched[:-1]
        report.grad_norm = float(fetched[-1])
        report.finite = report.finite and bool(torch.isfinite(fetched).all())

    def global_losses(self) -> Tensor:
        """Losses [K] over all ranks, on the device; reduced once, when first asked for."""
        if self._reduced is None:
            self._reduced = dist.sum_(self.loss_sums.clone())
        return self._reduced

    def weigh(self, losses: Tensor, gramian: Tensor | None = None) -> None:
        """Settle the weights from the global losses [K] and, if needed, the Gramian [K,K]."""
        strategy = self.weighting
        values, self.slopes = strategy.transformed(losses.double(), self.present)
        if self.declared is not None:
            self.weights = self.declared
        elif isinstance(strategy, GramianWeighting):
            assert gramian is not None
            seen = gramian * torch.outer(self.slopes, self.slopes)
            self.weights = strategy.rescale(
                strategy.row_weights(seen, values, self.present, self.step)
            )
        elif isinstance(strategy, LossWeighting):
            self.weights = strategy.rescale(self._loss_weights(values))
        else:
            self.weights = torch.ones_like(self.slopes)

    def row_weights(self) -> Tensor:
        """Factors [K] on the gradients of the (untransformed) losses in the shared part."""
        assert self.weights is not None
        return self.weights * self.slopes

    def head_weights(self) -> Tensor:
        """Factors [K] on the gradients of the (untransformed) losses in the heads."""
        assert self.weights is not None
        return self.weighting.head_weights(self.weights, self.present) * self.slopes

    def _declare(self) -> None:
        """Ask for weights that are known beforehand; a transform's slopes may still be open."""
        declared = self.weighting.weights(self.step, self.present)
        if not self.shared and not isinstance(self.weighting, LossWeighting):
            declared = torch.ones(len(self.present), dtype=torch.float64)  # heads alone are trained
        if declared is not None:
            self.declared = self.weighting.rescale(declared.detach().double().cpu())
            if self.weighting.transform == "identity":
                self.weights = self.declared

    def _wants_gramian(self) -> bool:
        """Whether the strategy needs the Gramian of this step, for its weights or its state."""
        strategy = self.weighting
        material = self.shared and len(self.present)
        if not isinstance(strategy, GramianWeighting) or not material:
            return False
        return self.declared is None or (
            strategy.observe and self.step % strategy.update_every == 0
        )

    def _loss_weights(self, losses: Tensor) -> Tensor:
        """dF/dL of a loss-level strategy."""
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
        values, _ = self.weighting.transformed(self.losses, self.present)
        with torch.enable_grad():
            total = self.weighting.objective(values, self.present)  # type: ignore[operator]
            grads = torch.autograd.grad(total, parameters)
        return [Update("weighting", parameters, list(grads))]

    def _route(self) -> SumRoute | CutRoute | RowsRoute | PartsRoute:
        strategy = self.weighting
        if len(self.factors) > 1:
            return PartsRoute(self)
        several = self.micro_batches > 1
        keeps_rows = isinstance(strategy, GradientWeighting) or "rows" in strategy.needs
        if self.turn.split or (keeps_rows and self.shared):
            return RowsRoute(self)
        if self.weights is None and several:
            return RowsRoute(self)  # weights come after the last micro-batch
        if isinstance(strategy, GramianWeighting) and self.wanted:
            return RowsRoute(self) if strategy.wrt == "shared" else CutRoute(self)
        alike = strategy.heads == "weighted"  # heads and shared part: one sum then gives both
        if self.declared is not None:
            alike = torch.equal(strategy.head_weights(self.declared, self.present), self.declared)
        return SumRoute(self) if alike else CutRoute(self)

    def no_gramian(self) -> Tensor:
        """Zeros [K,K] on the device, to add products of scaled gradients to."""
        return self.loss_sums.new_zeros(len(self.present), len(self.present))

    def reduced(self, gramian: Tensor) -> Tensor:
        """A sum of products of scaled gradients [K,K] over all ranks, unscaled, on the CPU."""
        return dist.sum_(gramian).double().cpu() / self.scale.scale**2

    def report(
        self, updates: list[Update], gramian: Tensor | None = None, wrt: str = "shared"
    ) -> StepReport:
        """A route's result; the engine completes it after the finite test."""
        report = StepReport(self.present, self.losses, self.losses, True, gramian=gramian, wrt=wrt)
        report.updates = updates
        if self.observe:
            report.observed = gramian
        return report

    def objectives_of(self, task: str) -> list[int]:
        """Indices of a task's objectives, in the order of its loss's terms."""
        return [i for i, o in enumerate(self.objectives) if o.task == task]

    def head_parameters(self, objective: int) -> list[nn.Parameter]:
        """Trainable parameters of the head that an objective trains."""
        return self.model.task_parameters(self.objectives[objective].task)
