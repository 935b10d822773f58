"""The three routes of the backward engine, from losses to the gradients of one turn."""

# T objectives, K present objectives, P shared parameters

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mtl_cli import dist
from mtl_cli.ghost import GhostLayer
from mtl_cli.rows import Grads, add_, combine, gramian_of, zeros_for
from mtl_cli.weighting.base import GradientWeighting, GramianWeighting

if TYPE_CHECKING:
    from mtl_cli.backward import BackwardEngine


CACHED_COLUMNS = 1 << 16  # so many columns of a few rows stay in a core's cache


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
        present [K] int64; losses [K] float64; weights [K] float64; gramian [K,K] float64, what
        the strategy saw, or None; observed [K,K] float64, what is to be logged (gradients with
        respect to ``wrt``), or None; grad_norm: norm of the combined gradient before clipping.
    """

    present: Tensor
    losses: Tensor
    weights: Tensor
    finite: bool
    gramian: Tensor | None = None
    observed: Tensor | None = None
    wrt: str = "shared"
    grad_norm: float = 0.0
    updates: list[Update] = field(default_factory=list)


class SumRoute:
    """One backward pass; the gradients gather in ``.grad`` over the micro-batches.

    An observed step measures the features' Gramian beside it, which leaves the step as it is.
    """

    def __init__(self, engine: BackwardEngine) -> None:
        self.engine = engine
        self.observe = engine.observe and bool(engine.shared)
        self.feature_gramian = engine.no_gramian()

    def add(
        self, features: dict[str, Tensor], leaves: dict[str, Tensor], losses: list[Tensor]
    ) -> None:
        """One backward pass per micro-batch."""
        self._settle()
        if self.observe:
            self._observe(list(features.values()), losses)
        weights = self.engine.row_weights().tolist()
        total = torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()
        (total * self.engine.scale.scale).backward()  # type: ignore[no-untyped-call]

    def close(self) -> StepReport:
        """Collect the gradients, reduce over ranks, unscale."""
        engine = self.engine
        self._settle()
        parameters = list(engine.shared)
        for task in engine.tasks:
            parameters += engine.model.task_parameters(task)
        if dist.world() > 1:  # a rank without a sample still takes part
            for p in parameters:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        parameters = [p for p in parameters if p.grad is not None]
        grads = [p.grad for p in parameters if p.grad is not None]
        for p in engine.model.parameters():
            p.grad = None
        dist.sum_lists_(grads)
        engine.scale.unscale_(grads)
        report = engine.report([Update(engine.turn.optimizers[0], parameters, grads)])
        if self.observe:
            report.observed, report.wrt = engine.reduced(self.feature_gramian), "features"
        return report

    def _observe(self, outputs: list[Tensor], losses: list[Tensor]) -> None:
        outputs = [z for z in outputs if z.requires_grad]  # some stages of it may be frozen
        rows = []
        for loss in losses:
            scaled = loss * self.engine.scale.scale
            grads = torch.autograd.grad(scaled, outputs, retain_graph=True, allow_unused=True)
            rows.append(zeros_for(outputs, grads))
        self.feature_gramian += gramian_of(rows).to(self.feature_gramian)

    def _settle(self) -> None:
        """Weights that follow from the losses of the whole step (one micro-batch per rank)."""
        engine = self.engine
        if engine.weights is None:
            engine.weigh(engine.global_losses().double().cpu())


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
        feature_grads: list[list[Tensor | None]] = []
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

    def combined(self, only: str | None = None) -> tuple[list[nn.Parameter], Grads]:
        """Weighted (or own) gradients of the heads, objectives of one head added up."""
        total: dict[nn.Parameter, Tensor] = {}
        for k, w in enumerate(self.engine.head_weights().tolist()):
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
        self.wrt = "features"
        if isinstance(engine.weighting, GramianWeighting):
            self.wrt = engine.weighting.wrt
        self.measured = engine.model.last_shared() if self.wrt == "last_shared" else []
        self.ghost: GhostLayer | None = None
        self.ghost_gramian: Tensor | None = None
        # rows of several ranks or micro-batches must be added before they are multiplied
        if engine.wanted and self.measured and engine.micro_batches == dist.world() == 1:
            self.ghost = GhostLayer(engine.model.last_layer())
        self.rows: list[Grads] = [[] for _ in engine.present]
        self.feature_gramian = engine.no_gramian()
        self.pending: tuple[list[Tensor], list[Grads]] | None = None
        self.backbone: Grads = []

    def add(
        self, features: dict[str, Tensor], leaves: dict[str, Tensor], losses: list[Tensor]
    ) -> None:
        """Through the heads per objective; through the backbone as soon as weights are known."""
        outputs = list(features.values())
        raw = self.heads.split(list(leaves.values()), losses)
        rows = [
            [torch.zeros_like(z) if c is None else c for z, c in zip(outputs, row, strict=True)]
            for row in raw
        ]
        if self.engine.wanted:
            self._measure(outputs, rows)
        elif self.engine.observe:
            self.feature_gramian += gramian_of(rows).to(self.feature_gramian)
        if self.engine.weights is None:
            self.pending = (outputs, rows)
        else:
            self._backward(outputs, rows)

    def close(self) -> StepReport:
        """Reduce over ranks, weigh and combine."""
        engine = self.engine
        self.heads.close()
        gramian = self._gramian() if engine.wanted else None
        if gramian is not None and not bool(torch.isfinite(gramian).all()):
            return overflow(engine)
        if engine.weights is None:
            engine.weigh(engine.losses, gramian)
        if self.pending is not None:
            self._backward(*self.pending)
        shared = self.backbone or [torch.zeros_like(p) for p in engine.shared]
        dist.sum_lists_(shared)
        engine.scale.unscale_(shared)
        parameters, grads = self.heads.combined()
        update = Update(engine.turn.optimizers[0], [*engine.shared, *parameters], [*shared, *grads])
        report = engine.report([update], gramian, self.wrt)
        if gramian is None and engine.observe:
            report.observed, report.wrt = engine.reduced(self.feature_gramian), "features"
        return report

    def _measure(self, outputs: list[Tensor], rows: list[Grads]) -> None:
        """Add this micro-batch to the Gramian's material.

        Samples of different micro-batches are different columns of a feature matrix, so feature
        Gramians add up; gradient rows of the last shared layer must be added before the product.
        """
        if not self.measured:
            self.feature_gramian += gramian_of(rows).to(self.feature_gramian)
            return
        if self.ghost is not None:
            self.ghost_gramian = self.ghost.gramian(outputs, rows)
            if self.ghost_gramian is not None:
                return
        for k, row in enumerate(rows):
            grads = torch.autograd.grad(
                outputs, self.measured, grad_outputs=row, retain_graph=True, allow_unused=True
            )
            filled = zeros_for(self.measured, grads)
            add_(self.rows[k], filled)

    def _gramian(self) -> Tensor:
        if not self.measured:
            return self.engine.reduced(self.feature_gramian)
        gramian = self.ghost_gramian
        if gramian is None:
            for k, row in enumerate(self.rows):
                self.rows[k] = row or [torch.zeros_like(p) for p in self.measured]
                dist.sum_lists_(self.rows[k])
            gramian = gramian_of(self.rows)
        return gramian / self.engine.scale.scale**2

    def _backward(self, outputs: list[Tensor], rows: list[Grads]) -> None:
        if not self.engine.shared:
            return
        combined = combine(rows, self.engine.row_weights(), in_place=False)
        grads = torch.autograd.grad(
            outputs, self.engine.shared, grad_outputs=combined, allow_unused=True
        )
        filled = zeros_for(self.engine.shared, grads)
        add_(self.backbone, filled)


class RowsRoute:
    """The exact rows: K passes through the backbone, as lists of tensors (no flat copy).

    Also taken where weights come only after the last micro-batch; the Gramian is then still that
    of the strategy's scope (``wrt``).
    """

    def __init__(self, engine: BackwardEngine) -> None:
        self.engine = engine
        self.heads = _Heads(engine)
        self.rows: list[Grads] = [[] for _ in engine.present]
        strategy = engine.weighting
        self.scope = strategy.wrt if isinstance(strategy, GramianWeighting) else "shared"
        self.feature_gramian = engine.no_gramian()

    def add(
        self, features: dict[str, Tensor], leaves: dict[str, Tensor], losses: list[Tensor]
    ) -> None:
        """Add this micro-batch's rows."""
        engine = self.engine
        outputs = list(features.values())
        feature_rows = self.heads.split(list(leaves.values()), losses)
        if not engine.shared:
            return
        if self.scope == "features":
            filled_rows = [zeros_for(outputs, row) for row in feature_rows]
            self.feature_gramian += gramian_of(filled_rows).to(self.feature_gramian)
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
        """Reduce over ranks, weigh and combine."""
        engine = self.engine
        self.heads.close()
        for k, row in enumerate(self.rows):
            self.rows[k] = row or [torch.zeros_like(p) for p in engine.shared]
            engine.scale.unscale_(self.rows[k])
        if engine.turn.split:
            return self._split()
        if isinstance(engine.weighting, GradientWeighting) and engine.shared:
            return self._columnwise()
        whole = "rows" in engine.weighting.needs and bool(engine.shared)
        narrow = self._narrow_gramian()
        rows, columns = self._reduced(whole)
        gramian = observed = None
        if isinstance(engine.weighting, GramianWeighting):
            gramian = self._gramian(rows, whole) if narrow is None else narrow
            if not bool(torch.isfinite(gramian).all()):
                return overflow(engine)
        elif engine.observe:
            observed = self._gramian(rows, whole)
        if whole:
            return self._observed(rows)
        engine.weigh(engine.losses, gramian)
        shared = combine(rows, engine.row_weights())
        if columns:
            flat = dist.gather_columns(shared[0], columns)
            pieces = torch.split(flat, [p.numel() for p in engine.shared])
            shared = [g.view_as(p) for g, p in zip(pieces, engine.shared, strict=True)]
        report = self._report(shared, gramian)
        if observed is not None:
            report.observed, report.wrt = observed, "shared"
        return report

    def _narrow_gramian(self) -> Tensor | None:
        """Gramian of the features or of the last shared layer; None for all shared parameters."""
        if self.scope == "features":
            return self.engine.reduced(self.feature_gramian)
        if self.scope == "last_shared":
            last = {id(p) for p in self.engine.model.last_shared()}
            mine = [i for i, p in enumerate(self.engine.shared) if id(p) in last]
            rows = [[row[i].clone() for i in mine] for row in self.rows]
            for row in rows:
                dist.sum_lists_(row)
            return gramian_of(rows)
        return None

    def _reduced(self, whole: bool) -> tuple[list[Grads], int]:
        """Rows summed over ranks: (this rank's slice of the columns, P), or (all, 0)."""
        if dist.world() == 1 or not self.engine.shared:
            return self.rows, 0
        if whole:
            for row in self.rows:
                dist.sum_lists_(row)
            return self.rows, 0
        flat = [torch.cat([g.flatten() for g in row]) for row in self.rows]
        piece = dist.scatter_rows(flat)
        return [[row] for row in piece], flat[0].numel()

    def _gramian(self, rows: list[Grads], whole: bool) -> Tensor:
        local = gramian_of(rows)
        if whole or dist.world() == 1:
            return local
        return dist.sum_(local.to(self.engine.loss_sums.device)).cpu()

    def _observed(self, rows: list[Grads]) -> StepReport:
        """For strategies whose state is as large as the rows: they give the rows to use."""
        engine = self.engine
        strategy = engine.weighting
        assert isinstance(strategy, GramianWeighting)
        values, engine.slopes = strategy.transformed(engine.losses, engine.present)
        for row, slope in zip(rows, engine.slopes.tolist(), strict=True):
            torch._foreach_mul_(row, slope)
        used = strategy.observe_rows(rows, engine.present, values, engine.step)
        gramian = gramian_of(used)
        engine.weights = engine.declared
        if engine.weights is None:
            found = strategy.row_weights(gramian, values, engine.present, engine.step)
            engine.weights = strategy.rescale(found)
        return self._report(combine(used, engine.weights), gramian)

    def _columnwise(self) -> StepReport:
        engine = self.engine
        assert isinstance(engine.weighting, GradientWeighting)
        engine.weigh(engine.losses)
        for row, slope in zip(self.rows, engine.slopes.tolist(), strict=True):
            dist.sum_lists_(row)
            if slope != 1:
                torch._foreach_mul_(row, slope)
        norms = torch.stack([norm for row in self.rows for norm in torch._foreach_norm(row)])
        if not bool(torch.isfinite(norms).all()):
            return overflow(engine)
        observed = gramian_of(self.rows) if engine.observe else None  # combined in place below
        shared, column = [], 0
        for i, p in enumerate(engine.shared):
            columns = [row[i].flatten() for row in self.rows]
            shared.append(self._combined(columns, column).view_as(p))
            column += p.numel()
        report = self._report(shared, None)
        report.observed = observed
        return report

    def _combined(self, rows: list[Tensor], column: int) -> Tensor:
        """The rows [P_tensor] of one parameter, combined into the first of them, piece by piece."""
        engine, width = self.engine, len(rows[0])
        assert isinstance(engine.weighting, GradientWeighting)
        size = CACHED_COLUMNS if rows[0].device.type == "cpu" else width
        for start in range(0, width, size):
            piece = torch.stack([row[start : start + size] for row in rows])
            rows[0][start : start + size] = engine.weighting.combine(
                piece, engine.present, engine.step, column + start, engine.losses
            )
        return rows[0]

    def _split(self) -> StepReport:
        """One update per task's optimizer, each with the gradient of its own task."""
        engine = self.engine
        if engine.weights is None:
            engine.weigh(engine.losses)
        weights = engine.row_weights()
        updates = []
        for row in self.rows:
            dist.sum_lists_(row)
        observed = gramian_of(self.rows) if engine.observe else None
        for task in engine.tasks:
            mine = [
                k
                for k, i in enumerate(engine.present.tolist())
                if engine.objectives[i].task == task
            ]
            shared = combine([self.rows[k] for k in mine], weights[mine])
            parameters, grads = self.heads.combined(only=task)
            updates.append(Update(task, [*engine.shared, *parameters], [*shared, *grads]))
        report = engine.report(updates)
        report.observed = observed
        return report

    def _report(self, shared: Grads, gramian: Tensor | None) -> StepReport:
        engine = self.engine
        parameters, grads = self.heads.combined()
        update = Update(engine.turn.optimizers[0], [*engine.shared, *parameters], [*shared, *grads])
        return engine.report([update], gramian, self.scope)


class PartsRoute:
    """Rows of three independent parts of the batch: J1 J2' gives the weights, J3 the direction.

    The heads take the mean over the parts.
    """

    def __init__(self, engine: BackwardEngine) -> None:
        self.engine = engine
        self.part = 0
        self.routes = [RowsRoute(engine) for _ in engine.factors]

    def add(
        self, features: dict[str, Tensor], leaves: dict[str, Tensor], losses: list[Tensor]
    ) -> None:
        """Add this micro-batch's rows to those of its part."""
        self.routes[self.part].add(features, leaves, losses)

    def close(self) -> StepReport:
        """Reduce over ranks, weigh by two parts, combine the third."""
        engine = self.engine
        for route in self.routes:
            route.heads.close()
            for k, row in enumerate(route.rows):
                route.rows[k] = row or [torch.zeros_like(p) for p in engine.shared]
                engine.scale.unscale_(route.rows[k])
                dist.sum_lists_(route.rows[k])
        first, second, third = (route.rows for route in self.routes)
        gramian = gramian_of(first, second)
        if not bool(torch.isfinite(gramian).all()):
            return overflow(engine)
        engine.weigh(engine.losses, gramian)
        observed = gramian_of(third) if engine.observe else None
        shared = combine(third, engine.row_weights())
        per_part = [route.heads.combined() for route in self.routes]
        parameters, grads = per_part[0]
        for _, more in per_part[1:]:
            torch._foreach_add_(grads, more)
        torch._foreach_div_(grads, len(per_part))
        update = Update(engine.turn.optimizers[0], [*engine.shared, *parameters], [*shared, *grads])
        report = engine.report([update])
        report.observed = observed
        return report


def overflow(engine: BackwardEngine) -> StepReport:
    """A step that is skipped: losses or rows are not finite."""
    return StepReport(engine.present, engine.losses, torch.ones_like(engine.losses), finite=False)
