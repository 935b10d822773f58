"""Gradient matrices of many kinds, and steps that a strategy takes on them, for the laws."""

# T objectives, K present objectives, P columns

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from mtl_cli.task import Objective
from mtl_cli.weighting.base import GradientWeighting, GramianWeighting, LossWeighting, Weighting

Build = Callable[[Sequence[Objective]], Weighting]
COLUMNS = 64  # P
COUNTS = (1, 2, 3, 8, 40)
REGULAR = ("random", "conflicting", "agreeing", "scaled", "parallel", "tiny", "huge")
SINGULAR = ("opposed", "dependent", "short", "zero row", "all zero")
CASES = (*REGULAR, *SINGULAR)


def objectives(count: int, order: Tensor | None = None) -> list[Objective]:
    """``count`` objectives of all likelihoods, their names not sorted, in the given order."""
    kinds = ("gaussian", "categorical", "laplace")
    names = [f"task{(7 * i) % 41:02}" for i in range(count)]
    found = [Objective(name, name, kinds[i % 3]) for i, name in enumerate(names)]
    return found if order is None else [found[i] for i in order.tolist()]


@cache
def matrix(case: str, count: int) -> Tensor:
    """The zoo: rows [K, P] of one kind."""
    generator = torch.Generator().manual_seed(100 + count)
    rows = torch.randn(count, COLUMNS, dtype=torch.float64, generator=generator)
    common = torch.randn(COLUMNS, dtype=torch.float64, generator=generator)
    if case == "conflicting":  # pairwise cosines negative, yet independent
        rows = rows - 0.98 * rows.mean(0)
    elif case == "agreeing":
        rows = rows + 2 * common
    elif case == "scaled":
        rows = rows * torch.logspace(-6, 6, count, dtype=torch.float64)[:, None]
    elif case == "parallel":
        rows = common + 1e-4 * rows
    elif case == "opposed":
        rows = 1e-3 * rows + common * (torch.arange(count) % 2 * 2 - 1)[:, None]
    elif case == "dependent":
        rows[-1] = rows[:-1].sum(0) if count > 1 else rows[-1]
    elif case == "short":  # more rows than dimensions
        rows[:, max(count // 2, 1) :] = 0
    elif case == "zero row":
        rows[count // 2] = 0
    else:
        rows = rows * {"random": 1.0, "all zero": 0.0, "tiny": 1e-10, "huge": 1e10}[case]
    return rows


def some_losses(count: int, step: int = 0) -> Tensor:
    """Losses [K] between 0.2 and 5 that move a little with the step."""
    generator = torch.Generator().manual_seed(step)
    base = torch.linspace(0.3, 4, count, dtype=torch.float64)
    return base * (0.8 + 0.4 * torch.rand(count, dtype=torch.float64, generator=generator))


def take_step(
    strategy: Weighting,
    rows: Tensor,
    losses: Tensor,
    step: int = 0,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step as the engine takes it, from the gradients [K, P] of the losses [K].

    Returns:
        the shared gradient [P] and the row weights [K] (ones for a :class:`GradientWeighting`).
    """
    present = torch.arange(len(rows)) if present is None else present
    known = strategy.weights(step, present)
    values, slopes = strategy.transformed(losses, present)
    weights = torch.ones(len(rows), dtype=torch.float64)
    used = rows * slopes[:, None]
    gramian = used @ used.T
    if isinstance(strategy, GradientWeighting):
        gradient = strategy.combine(used, present, step, 0, losses)
    else:
        if known is not None:
            weights = known
        elif isinstance(strategy, LossWeighting):
            leaf = values.clone().requires_grad_()
            weights = torch.autograd.grad(strategy.objective(leaf, present), leaf)[0]
        else:
            assert isinstance(strategy, GramianWeighting)
            if "rows" in strategy.needs:
                half = used.shape[1] // 2
                parts = [[r[:half].clone(), r[half:].clone()] for r in used]
                parts = strategy.observe_rows(parts, present, values, step)
                used = torch.stack([torch.cat(part) for part in parts])
                gramian = used @ used.T
            weights = strategy.row_weights(gramian, values, present, step)
        weights = strategy.rescale(weights)
        gradient = weights @ used
    _learn(strategy, values, present)
    strategy.advance(step, present, losses, rows @ rows.T)
    if strategy.recompute:
        strategy.look_ahead(step, present, losses * (0.8 + 0.1 * losses.sin()))
    return gradient, weights


def _learn(strategy: Weighting, values: Tensor, present: Tensor) -> None:
    """Plain gradient descent on the strategy's learned scalars."""
    parameters = [p for p in strategy.parameters() if p.requires_grad]
    if parameters:
        total = strategy.objective(values, present)  # type: ignore[operator]
        with torch.no_grad():
            for p, g in zip(parameters, torch.autograd.grad(total, parameters), strict=True):
                p.sub_(0.05 * g)


def run(strategy: Weighting, first: int, last: int) -> list[Tensor]:
    """Steps of five objectives of which one or two are absent now and then.

    Returns:
        gradient and weights of every step, in turn.
    """
    seen: list[Tensor] = []
    for step in range(first, last):
        rows, losses = matrix("random", 5) * (1 + 0.3 * step), some_losses(5, step)
        present = torch.tensor([i for i in range(5) if (i + step) % 4 or step < 2])
        seen += take_step(strategy, rows[present], losses[present], step, present)
        losses = losses[present]
        if step % 3 == 2:
            strategy.end_epoch()
        if "metrics" in strategy.needs:
            strategy.observe_metrics(present, torch.sigmoid(losses - 2))  # type: ignore[operator]
        if "validation" in strategy.needs:
            strategy.observe_validation(present, losses, losses * 0.9, 0.01, 0.1)  # type: ignore[operator]
    return seen
