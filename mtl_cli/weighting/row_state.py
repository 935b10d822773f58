"""Strategies that remember something as large as the gradient rows: averages, squared sums."""

# T objectives, K present objectives (rows), P columns

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl_cli.task import Objective
from mtl_cli.weighting import solvers
from mtl_cli.weighting.base import GramianWeighting


class RowState(nn.Module):
    """One tensor of state per objective and shared parameter, made when rows are first seen.

    Kept as one buffer [T, *shape] per shared parameter, on the device and in the precision of the
    rows; loading a state_dict makes the buffers that it holds.

    Args:
        count: T.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def of(self, objective: int, row: list[Tensor]) -> list[Tensor]:
        """Views of the state of one objective, shaped like its row; zeros at first."""
        for i, tensor in enumerate(row):
            held = self._buffers.get(f"row_{i}")
            if held is None:
                held = tensor.new_zeros(self.count, *tensor.shape)
            self.register_buffer(f"row_{i}", held.to(tensor))
        return [self.get_buffer(f"row_{i}")[objective] for i in range(len(row))]

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        for name, value in state_dict.items():
            if name.startswith(f"{prefix}row_"):
                self.register_buffer(name[len(prefix) :], torch.empty_like(value))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def average_(row: list[Tensor], held: list[Tensor], new: float) -> None:
    """In place: held <- (1 - new) held + new row, then row <- held."""
    torch._foreach_mul_(row, new)
    torch._foreach_add_(row, held, alpha=1 - new)
    torch._foreach_copy_(held, row)


class DBMTL(GramianWeighting):
    """Averaged gradients of the log losses, all stretched to the length of the longest.

    Lin et al., 2023 (arXiv 2308.12029), algorithm 1, with ``transform=log``. The running average
    starts at zero without bias correction; its rate is 1 - beta / t^beta_sigma.

    Args:
        objectives: injected.
        beta: share of the past in the running average of the gradients.
        beta_sigma: exponent of its decay over the steps (0: constant).
        eps: added to a length before the division, as in public code; 0 is exact.
        common: see :class:`GramianWeighting`.

    State:
        average: [T, P]; steps: [T].
    """

    needs = ("rows",)

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        beta: float = 0.9,
        beta_sigma: float = 0.0,
        eps: float = 0.0,
        transform: str = "log",
        **common: Any,
    ) -> None:
        super().__init__(objectives, transform=transform, **common)
        self.beta = beta
        self.beta_sigma = beta_sigma
        self.eps = eps
        self.average = RowState(len(self.objectives))
        self.steps: Tensor
        self.register_buffer("steps", self.per_objective())

    def observe_rows(
        self, rows: list[list[Tensor]], present: Tensor, losses: Tensor, step: int
    ) -> list[list[Tensor]]:
        """Move the running averages and return them."""
        self.steps[present] += 1
        for i, row in zip(present.tolist(), rows, strict=True):
            kept = self.beta / float(self.steps[i]) ** self.beta_sigma
            average_(row, self.average.of(i, row), 1 - kept)
        return rows

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """Longest length / own length."""
        length = gramian.diagonal().clamp_min(0).sqrt()
        return torch.where(length > 0, length.max() / (length + self.eps), 1.0)


class MoCo(GramianWeighting):
    """Minimum-norm weights followed by small steps, on running averages of the gradients.

    Fernando et al., ICLR 2023 (arXiv 2210.12624), algorithm 1: Y <- Y - beta_t (Y - gradients),
    lambda <- projection onto the simplex of lambda - gamma_t (Y Y' + rho) lambda, direction
    Y' lambda. Public code divides each gradient by its length and uses a softmax, which keeps
    lambda near uniform; this is the paper.

    Args:
        objectives: injected.
        beta: rate of the running averages; beta_t = beta / t^beta_sigma.
        beta_sigma: its decay.
        gamma: rate of lambda, in 1 / squared gradients; gamma_t = gamma / t^gamma_sigma.
        gamma_sigma: its decay.
        rho: pull of lambda towards the uniform vector, in squared gradients.
        common: see :class:`GramianWeighting`.

    Shape:
        weights [K], >= 0, sum 1.

    State:
        average: [T, P], Y; simplex: [T], lambda; steps: [T].
    """

    needs = ("rows",)

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.beta, self.beta_sigma = beta, beta_sigma
        self.gamma, self.gamma_sigma = gamma, gamma_sigma
        self.rho = rho
        self.average = RowState(len(self.objectives))
        self.simplex: Tensor
        self.steps: Tensor
        self.register_buffer("simplex", self.per_objective(1 / len(self.objectives)))
        self.register_buffer("steps", self.per_objective())

    def observe_rows(
        self, rows: list[list[Tensor]], present: Tensor, losses: Tensor, step: int
    ) -> list[list[Tensor]]:
        """Move the running averages Y and return them."""
        self.steps[present] += 1
        for i, row in zip(present.tolist(), rows, strict=True):
            average_(
                row, self.average.of(i, row), self.beta / float(self.steps[i]) ** self.beta_sigma
            )
        return rows

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """One projected step of lambda on Y Y'."""
        rate = self.gamma / float(self.steps[present].max().clamp_min(1)) ** self.gamma_sigma
        return move_on_simplex(self.simplex, present, lambda w: rate * (gramian @ w + self.rho * w))


class ExcessMTL(GramianWeighting):
    """Weights that grow with the distance of each objective from its own optimum.

    He et al., ICML 2024 (arXiv 2402.02009), algorithm 1: excess risk E = g' H^-1 g with H =
    diag sqrt(sum of g^2 over the steps); w <- w exp(eta E / E(0)), sum w = T. E(0) is the first
    excess of an objective (the paper averages a warm-up).

    Args:
        objectives: injected.
        eta: rate of the weights.
        eps: added under the square root, in squared gradients.
        heads: as in :class:`GramianWeighting`.
        common: see :class:`GramianWeighting`.

    State:
        squares: [T, P]; loss_weights: [T], sum T; first_excess: [T], NaN until seen.
    """

    needs = ("rows",)

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        eta: float = 0.01,
        eps: float = 1e-7,
        heads: str = "weighted",
        **common: Any,
    ) -> None:
        super().__init__(objectives, heads=heads, **common)
        self.eta = eta
        self.eps = eps
        self.squares = RowState(len(self.objectives))
        self.loss_weights: Tensor
        self.first_excess: Tensor
        self.register_buffer("loss_weights", self.per_objective(1.0))
        self.register_buffer("first_excess", self.per_objective(float("nan")))

    def observe_rows(
        self, rows: list[list[Tensor]], present: Tensor, losses: Tensor, step: int
    ) -> list[list[Tensor]]:
        """Measure the excess risks and move the weights."""
        excess = torch.zeros(len(rows), dtype=torch.float64)
        for k, (i, row) in enumerate(zip(present.tolist(), rows, strict=True)):
            squares = self.squares.of(i, row)
            torch._foreach_addcmul_(squares, row, row)
            terms = [
                (g * g / (s + self.eps).sqrt()).sum() for g, s in zip(row, squares, strict=True)
            ]
            excess[k] = torch.stack(terms).double().sum().cpu()
        first = self.first_excess[present]
        seen = ~torch.isnan(first) & (first > 0)
        growth = torch.where(seen, self.eta * excess / torch.where(seen, first, 1.0), 0.0)
        weights = self.loss_weights[present]
        grown = weights * (growth - growth.max()).exp()
        self.loss_weights[present] = grown * (weights.sum() / grown.sum())
        self.first_excess[present] = torch.where(seen, first, excess)
        return rows

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """The weights as they are after this step's excess."""
        return self.loss_weights[present]


def move_on_simplex(simplex: Tensor, present: Tensor, slope: Any) -> Tensor:
    """Descend from the present part of a point of the simplex, project back; returns weights.

    The present objectives share the mass that they had, so that absent ones stay frozen; the
    weights returned sum to 1.

    Args:
        simplex: [T] state, changed in place.
        present: int64 [K].
        slope: maps weights [K] of sum 1 to the change to subtract.
    """
    mass = float(simplex[present].sum())
    count = len(present)
    w = (
        simplex[present] / mass
        if mass > 0
        else torch.full((count,), 1 / count, dtype=torch.float64)
    )
    moved = torch.from_numpy(solvers.project_simplex((w - slope(w)).numpy()))
    simplex[present] = moved * mass
    return moved
