"""Gradient matrices that break solvers, and the engine's use of a strategy in a few lines."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mtl_cli.task import Objective
from mtl_cli.weighting.base import GradientWeighting, GramianWeighting, LossWeighting, Weighting

FILES = sorted((Path(__file__).parents[2] / "conf" / "weighting").glob("*.yaml"))
NAMES = [path.stem for path in FILES]
OURS = [n for n in NAMES if n != "torchjd"]
LIKELIHOODS = ("gaussian", "categorical", "laplace")


@cache
def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load(next(p for p in FILES if p.stem == name).read_text())


def target(name: str) -> Any:
    module, _, attribute = settings(name)["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def names(count: int) -> list[str]:
    return [f"task{(7 * i) % 41:02}" for i in range(count)]  # not in alphabetical order


def build(name: str, count: int = 3, order: Tensor | None = None, **options: Any) -> Weighting:
    """A strategy with the values of its YAML, over ``count`` objectives in the given order."""
    all_objectives = [Objective(n, n, LIKELIHOODS[i % 3]) for i, n in enumerate(names(count))]
    chosen = all_objectives if order is None else [all_objectives[i] for i in order.tolist()]
    values = {k: v for k, v in settings(name).items() if k != "_target_"}
    return target(name)(chosen, seed=11, **{**values, **options})


def kind(name: str) -> type:
    return target(name) if isinstance(target(name), type) else GramianWeighting


def take_step(
    strategy: Weighting,
    rows: Tensor,
    losses: Tensor,
    step: int = 0,
    present: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step as the engine takes it: the shared gradient [P] and the row weights [K].

    Args:
        rows: [K, P] gradients of the losses.
        losses: [K].
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
    learn(strategy, values, present)
    strategy.advance(step, present, losses, rows @ rows.T)
    if strategy.recompute:
        strategy.look_ahead(step, present, losses * (0.8 + 0.1 * losses.sin()))
    return gradient, weights


def learn(strategy: Weighting, values: Tensor, present: Tensor) -> None:
    """Plain gradient descent on the strategy's learned scalars."""
    parameters = list(strategy.parameters())
    if parameters:
        grads = torch.autograd.grad(strategy.objective(values, present), parameters)  # type: ignore[attr-defined]
        with torch.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p -= 0.05 * g


@cache
def matrix(case: str, count: int) -> Tensor:
    """The zoo: [K, P] rows of one kind."""
    generator = torch.Generator().manual_seed(100 + count)
    rows = torch.randn(count, 64, dtype=torch.float64, generator=generator)
    common = torch.randn(64, dtype=torch.float64, generator=generator)
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
        rows = rows.clone()
        rows[:, max(count // 2, 1) :] = 0
    elif case == "zero row":
        rows[count // 2] = 0
    elif case == "all zero":
        rows = torch.zeros_like(rows)
    elif case == "tiny":
        rows = rows * 1e-10
    elif case == "huge":
        rows = rows * 1e10
    return rows


CASES = [
    "random",
    "conflicting",
    "agreeing",
    "scaled",
    "parallel",
    "opposed",
    "dependent",
    "short",
    "tiny",
    "huge",
    "zero row",
    "all zero",
]
REGULAR = ("random", "conflicting", "agreeing", "scaled", "parallel", "tiny", "huge")
COUNTS = (1, 2, 3, 8, 40)


def some_losses(count: int, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    base = torch.linspace(0.3, 4, count, dtype=torch.float64)
    return base * (0.8 + 0.4 * torch.rand(count, dtype=torch.float64, generator=generator))


def needs_torchjd(name: str) -> bool:
    return name == "torchjd" and importlib.util.find_spec("torchjd") is None
