"""The three routes of the backward engine, from losses to the gradients of one turn."""

# T objectives, K present objectives, P shared parameters

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtl_cli import dist
from mtl_cli.rows import Grads, add_, combine, gramian_of, zeros_for
from mtl_cli.weighting.base import GradientWeighting, GramianWeighting

if TYPE_CHECKING:
    from mtl_cli.backward import BackwardEngine


@dataclass
class Update:
    """Gradients for one optimizer; parameters that are not listed keep ``grad=None``."""

    optimizer: str
    parameters: list[nn.Parameter]
    grads: Grads


@dataclass
class StepReport:
    """What one turn measured; all over the present objectives.

    Shape:
        present [K] int64; losses [K] float64; weights [K] float64; gramian [K,K] float64 or None;
        grad_norm: norm of the combined gradient before clipping.
    """

    present: Tensor
    losses: Tensor
    weights: Tensor
    finite: bool
    gramian: Tensor | None = None
    grad_norm: float = 0.0
    updates: list[Update] = field(default_factory=list)


class SumRoute:
    """One backward pass; the gradients gather in ``.grad`` over the micro-batches."""

    def __init__(self, engine: BackwardEngine) -> None:
        self.engine = engine
        self.weights = engine.known

    def add(
        self, features: dict[str, Tensor], leaves: dict[str, Tensor], losses: list[Tensor]
    ) -> None:
        if self.weights is None:
            self._solve()
        assert self.weights is not None
        total = sum(w * loss for w, loss in zip(self.weights.tolist(), losses, strict=True))
        assert isinstance(total, Tensor)
        (total * self.engine.scale.scale).backward()  # type: ignore[no-untyped-call]

    def close(self) -> StepReport:
        engine = self.engine
        if self.weights is None:
            self._solve()
        assert self.weights is not None
        parameters = list(engine.shared)
        for task in engine.tasks:
            parameters += engine.model.task_parameters(task)
        if dist.world() > 1:
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        parameters = [p for p in parameters if p.grad is not None]
        grads = [p.grad for p in parameters if p.grad is not None]
        for p in engine.model.parameters():
            p.grad = None
        dist.sum_lists_(grads)
        engine.scale.unscale_(grads)
        update = Update(engine.turn.optimizers[0], parameters, grads)
        return StepReport(
            engine.present, engine.losses, self.weights, finite=True, updates=[update]
        )

    def _solve(self) -> None:
        """Weights that follow from the losses of the whole step (one micro-batch per rank)."""
        local = self.engine.loss_sums.clone()
        self.weights = self.engine.loss_weights(dist.sum_(local).cpu())


class _Heads:
    """Gradients of the heads, per objective, added over micro-batches."""

    def __init__(self, engine: BackwardEngine) -> None:
        self.engine = engine
        self.parameters = [engine.head_parameters(i) for i in engine.present.tolist()]
        self.grads: list[Grads] = [[] for _ in self.parameters]
        tasks = [engine.objectives[i].task for i in engine.present.tolist()]
        self.last_of_task = [task not in tasks[k + 1 :] for k, task in enumerate(tasks)]

    def split(self, leaves: list[Tensor], losses: list[Tensor]) -> list[list[Tensor | None]]:
        """Differentiate every loss down to the leaves; keep the heads' part.

        Returns:
            per objective, the gradient of each leaf (None where the head does not read it).
        """
        feature_grads = []
        for k, loss in enumerate(losses):
            grads = torch.autograd.grad(
                loss * self.engine.scale.scale,
                [*leaves, *self.parameters[k]],
                retain_graph=not self.last_of_task[k],
                allow_unused=True,
            )
            feature_grads.append(list(grads[: len(leaves)]))
            own = zeros_for(self.parameters[k], grads[len(leaves) :])
            add_(self.grads[k], own)
        return feature_grads

    def close(self) -> None:
        """Reduce over ranks and unscale."""
        for k, parameters in enumerate(self.parameters):
            if not self.grads[k]:
                self.grads[k] = [torch.zeros_like(p) for p in parameters]
            dist.sum_lists_(self.grads[k])
            self.engine.scale.unscale_(self.grads[k])

    def combined(
        self, weights: Tensor, only: str | None = None
    ) -> tuple[list[nn.Parameter], Grads]:
        """Weighted (or own) gradients of the heads, objectives of one head added up."""
        total: dict[nn.Parameter, Tensor] = {}
        for k, w in enumerate(self.engine.head_weights(weights).tolist()):
            task = self.engine.objectives[int(self.engine.present[k])].task
            if only is not None and task != only:
                continue
            for p, g in zip(self.parameters[k], self.grads[k], strict=True):
                scaled = g if w == 1 else g * w
                total[p] = total[p] + scaled if p in total else scaled
        return list(total), list(total.values())


class CutRoute:
    """K cheap passes through the heads, one weighted pass through the backbone."""

    def __init__(self, engine: BackwardEngine) -> None:
        self.engine = engine
        self.heads = _Heads(engine)
        self.measured = engine.model.last_shared() if self._wrt() == "last_shared" else []
        self.rows: list[Grads] = [[] for _ in engine.present]
        self.feature_gramian = engine.loss_sums.new_zeros(len(engine.present), len(engine.present))
        self.pending: tuple[list[Tensor], list[Grads]] | None = None
        self.backbone: Grads = []

    def add(
        self, features: dict[str, Tensor], leaves: dict[str, Tensor], losses: list[Tensor]
    ) -> None:
        outputs = list(features.values())
        raw = self.heads.split(list(leaves.values()), losses)
        rows = [
            [torch.zeros_like(z) if c is None else c for z, c in zip(outputs, row, strict=True)]
            for row in raw
        ]
        if self._needs_gramian():
            self._measure(outputs, rows)
        if self.engine.known is None:
            self.pending = (outputs, rows)
        else:
            self._backward(outputs, rows, self.engine.known)

    def close(self) -> StepReport:
        engine = self.engine
        self.heads.close()
        gramian = self._gramian() if self._needs_gramian() else None
        weights = engine.known
        if weights is None:
            assert gramian is not None
            if not bool(torch.isfinite(gramian).all()):
                return _overflow(engine)
            weights = engine.solve(gramian)
            if self.pending is not None:
                self._backward(*self.pending, weights)
        shared = self.backbone or [torch.zeros_like(p) for p in engine.shared]
        dist.sum_lists_(shared)
        engine.scale.unscale_(shared)
        parameters, grads = self.heads.combined(weights)
        update = Update(engine.turn.optimizers[0], [*engine.shared, *parameters], [*shared, *grads])
        return StepReport(
            engine.present, engine.losses, weights, True, gramian=gramian, updates=[update]
        )

    def _wrt(self) -> str:
        strategy = self.engine.weighting
        return strategy.wrt if isinstance(strategy, GramianWeighting) else "features"

    def _needs_gramian(self) -> bool:
        strategy = self.engine.weighting
        observe = isinstance(strategy, GramianWeighting) and strategy.observe
        return observe or self.engine.known is None

    def _measure(self, outputs: list[Tensor], rows: list[Grads]) -> None:
        """Add this micro-batch to the Gramian's material.

        Samples of different micro-batches are different columns of a feature matrix, so feature
        Gramians add up; gradient rows of the last shared layer must be added before the product.
        """
        if not self.measured:
            self.feature_gramian += gramian_of(rows).to(self.feature_gramian.device)
            return
        for k, row in enumerate(rows):
            grads = torch.autograd.grad(
                outputs, self.measured, grad_outputs=row, retain_graph=True, allow_unused=True
            )
            filled = zeros_for(self.measured, grads)
            add_(self.rows[k], filled)

    def _gramian(self) -> Tensor:
        if not self.measured:
            gramian = dist.sum_(self.feature_gramian).cpu()
        else:
            for k, row in enumerate(self.rows):
                self.rows[k] = row or [torch.zeros_like(p) for p in self.measured]
                dist.sum_lists_(self.rows[k])
            gramian = gramian_of(self.rows)
        return gramian / self.engine.scale.scale**2

    def _backward(self, outputs: list[Tensor], rows: list[Grads], weights: Tensor) -> None:
        combined = combine(rows, weights, in_place=False)
        grads = torch.autograd.grad(
            outputs, self.engine.shared, grad_outputs=combined, allow_unused=True
        )
        filled = zeros_for(self.engine.shared, grads)
        add_(self.backbone, filled)


class RowsRoute:
    """The exact rows: K passes through the backbone, as lists of tensors (no flat copy)."""

    def __init__(self, engine: BackwardEngine) -> None:
        self.engine = engine
        self.heads = _Heads(engine)
        self.rows: list[Grads] = [[] for _ in engine.present]

    def add(
        self, features: dict[str, Tensor], leaves: dict[str, Tensor], losses: list[Tensor]
    ) -> None:
        engine = self.engine
        outputs = list(features.values())
        feature_rows = self.heads.split(list(leaves.values()), losses)
        for k, row in enumerate(feature_rows):
            used = [(z, c) for z, c in zip(outputs, row, strict=True) if c is not None]
            grads = torch.autograd.grad(
                [z for z, _ in used],
                engine.shared,
                grad_outputs=[c for _, c in used],
                retain_graph=k + 1 < len(feature_rows),
                allow_unused=True,
            )
            filled = zeros_for(engine.shared, grads)
            add_(self.rows[k], filled)

    def close(self) -> StepReport:
        engine = self.engine
        self.heads.close()
        for k, row in enumerate(self.rows):
            self.rows[k] = row or [torch.zeros_like(p) for p in engine.shared]
            engine.scale.unscale_(self.rows[k])
        if engine.turn.split:
            return self._split()
        if isinstance(engine.weighting, GradientWeighting):
            return self._columnwise()
        rows, columns = self._scattered()
        gramian = None
        if isinstance(engine.weighting, GramianWeighting):
            gramian = self._gramian(rows)
            if not bool(torch.isfinite(gramian).all()):
                return _overflow(engine)
            weights = engine.solve(gramian)
        else:
            weights = engine.loss_weights(engine.losses)
        shared = combine(rows, weights)
        if columns:
            flat = dist.gather_columns(shared[0], columns)
            pieces = flat.split([p.numel() for p in engine.shared])
            shared = [g.view_as(p) for g, p in zip(pieces, engine.shared, strict=True)]
        return self._report(weights, shared, gramian)

    def _scattered(self) -> tuple[list[Grads], int]:
        """Every rank's slice of the summed rows: (rows, P), or all of them and 0 on one rank."""
        if dist.world() == 1:
            return self.rows, 0
        flat = [torch.cat([g.flatten() for g in row]) for row in self.rows]
        piece = dist.scatter_rows(flat)
        return [[row] for row in piece], flat[0].numel()

    def _gramian(self, rows: list[Grads]) -> Tensor:
        local = gramian_of(rows)
        device = self.engine.loss_sums.device
        return dist.sum_(local.to(device)).cpu() if dist.world() > 1 else local

    def _columnwise(self) -> StepReport:
        engine = self.engine
        assert isinstance(engine.weighting, GradientWeighting)
        for row in self.rows:
            dist.sum_lists_(row)
        shared, column = [], 0
        for i, p in enumerate(engine.shared):
            stacked = torch.stack([row[i].flatten() for row in self.rows])
            mixed = engine.weighting.combine(
                stacked, engine.present, engine.step, column, engine.losses
            )
            shared.append(mixed.view_as(p))
            column += p.numel()
        return self._report(torch.ones_like(engine.losses), shared, None)

    def _split(self) -> StepReport:
        """One update per task's optimizer, each with the gradient of its own task."""
        engine = self.engine
        weights = engine.known if engine.known is not None else engine.loss_weights(engine.losses)
        updates = []
        for row in self.rows:
            dist.sum_lists_(row)
        for task in engine.tasks:
            mine = [
                k
                for k, i in enumerate(engine.present.tolist())
                if engine.objectives[i].task == task
            ]
            shared = combine([self.rows[k] for k in mine], weights[mine])
            parameters, grads = self.heads.combined(weights, only=task)
            updates.append(Update(task, [*engine.shared, *parameters], [*shared, *grads]))
        return StepReport(engine.present, engine.losses, weights, True, updates=updates)

    def _report(self, weights: Tensor, shared: Grads, gramian: Tensor | None) -> StepReport:
        engine = self.engine
        parameters, grads = self.heads.combined(weights)
        update = Update(engine.turn.optimizers[0], [*engine.shared, *parameters], [*shared, *grads])
        return StepReport(
            engine.present, engine.losses, weights, True, gramian=gramian, updates=[update]
        )


def _overflow(engine: BackwardEngine) -> StepReport:
    return StepReport(engine.present, engine.losses, torch.ones_like(engine.losses), finite=False)
