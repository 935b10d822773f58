"""Rows that vanish, oppose or depend on each other, also as a float32 run sees them."""

from __future__ import annotations

import pytest
import torch

from mtl_cli.rows import gramian_of
from tests.property.built import build

PAIR = torch.arange(2)


def dependent(count: int = 5, rank: int = 3, columns: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return left @ right


@pytest.mark.parametrize("scale_mode", ["min", "median", "rmse"])
@pytest.mark.parametrize("seed", range(5))
def test_dependent_rows_in_float32_are_found_dependent(scale_mode, seed):
    rows, present = dependent(seed=seed), torch.arange(5)
    ones = torch.ones(5, dtype=torch.float64)
    for name, options in (
        ("aligned_mtl", {"scale_mode": scale_mode}),
        ("imtl_g", {}),
        ("config", {}),
    ):
        exact = build(name, 5, **options).row_weights(rows @ rows.T, ones, present, 0) @ rows
        single = rows.float()
        gramian = gramian_of([[row] for row in single])
        found = build(name, 5, **options).row_weights(gramian, ones, present, 0) @ rows
        assert (found - exact).norm() <= 1e-5 * exact.norm(), name


@pytest.mark.parametrize("name", ["imtl_g", "config"])
@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_opposed_rows_fall_back_and_are_counted(name, precision):
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        row = torch.randn(16, generator=generator, dtype=torch.float64)
        factor = 0.5 + 1.5 * float(torch.rand((), generator=generator))
        rows = torch.stack([row, -factor * row]).to(precision)
        strategy = build(name, 2)
        gramian = gramian_of([[r] for r in rows])
        weights = strategy.row_weights(gramian, torch.ones(2).double(), PAIR, 0)
        assert weights.tolist() == [0.5, 0.5]
        assert int(strategy.fallbacks) == 1


def test_nash_weighs_the_heads_by_the_solution_itself():
    rows = torch.tensor([[3.0, 0.0], [1.0, 2.0]]).double()
    gramian = rows @ rows.T
    strategy = build("nash_mtl", 2)
    weights = strategy.row_weights(gramian, torch.ones(2).double(), PAIR, 0)
    assert float((weights @ rows).norm()) == pytest.approx(1.0)
    heads = strategy.head_weights(weights, PAIR)
    torch.testing.assert_close(heads * (gramian @ heads), torch.ones(2).double())
    assert build("nash_mtl", 2, heads="own").head_weights(weights, PAIR).tolist() == [1, 1]


def test_nash_forgets_the_shortening_where_nothing_is_solved():
    """An objective that is alone in a step has weight 1 for its head, whatever came before."""
    rows = torch.tensor([[30.0, 0.0], [10.0, 20.0]]).double()
    strategy, one = build("nash_mtl", 2), torch.tensor([1])
    strategy.row_weights(rows @ rows.T, torch.ones(2).double(), PAIR, 0)
    assert float(strategy.shortening) < 1
    alone = rows[one]
    weights = strategy.row_weights(alone @ alone.T, torch.ones(1).double(), one, 1)
    assert weights.tolist() == strategy.head_weights(weights, one).tolist() == [1.0]


def test_gradvac_targets_stay_cosines():
    rows = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1e4, 2e4], [-3.0, -6.0]])
    gramian = gramian_of([[row] for row in rows])
    strategy = build("gradvac", 4, beta=0.5)
    for step in range(50):
        weights = strategy.row_weights(gramian, torch.ones(4).double(), torch.arange(4), step)
        assert torch.isfinite(weights).all()
    assert strategy.target.abs().max() <= 1


def test_aligned_keeps_a_row_a_million_times_shorter():
    rows = torch.tensor([[1.0, 0.0], [1e-7, 5e-7]]).double()  # ratio 2e6
    weights = build("aligned_mtl", 2).row_weights(rows @ rows.T, torch.ones(2).double(), PAIR, 0)
    direction = weights @ rows
    assert float(direction.norm()) < 1e-6  # every singular value becomes the smallest


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "cagrad", "aligned_mtl", "pcgrad"])
def test_a_zero_row_counts_in_a_mean(name):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 16, generator=generator, dtype=torch.float64).abs()
    rows[1] = 0
    strategy, ones = build(name, 3), torch.ones(3).double()
    found = strategy.row_weights(rows @ rows.T, ones, torch.arange(3), 0) @ rows
    solved = build(name, 3).solve(rows @ rows.T, ones, torch.arange(3), 0) @ rows
    torch.testing.assert_close(found, solved)
    if name in ("upgrad", "dualproj"):  # nothing conflicts: the plain mean
        torch.testing.assert_close(found, rows.mean(0))


@pytest.mark.parametrize("name", ["mgda", "imtl_g", "config", "nash_mtl", "fairgrad", "gradvac"])
def test_a_zero_row_does_not_stop_the_others(name):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 16, generator=generator, dtype=torch.float64)
    rows[1] = 0
    ones, kept = torch.ones(3).double(), torch.tensor([0, 2])
    found = build(name, 3).row_weights(rows @ rows.T, ones, torch.arange(3), 0) @ rows
    without = rows[kept]
    expected = build(name, 3).row_weights(without @ without.T, ones[kept], kept, 0) @ without
    assert float(found.norm()) > 0
    torch.testing.assert_close(found, expected)


def test_imtl_scales_a_single_row_too():
    strategy, one = build("imtl", 3, init=2.0), torch.tensor([1])
    rows = torch.tensor([[3.0, 4.0]]).double()
    weights = strategy.row_weights(rows @ rows.T, torch.ones(1).double(), one, 0)
    scale = torch.tensor([2.0]).double().exp()
    torch.testing.assert_close(weights, scale)
    torch.testing.assert_close(strategy.head_weights(weights, one), scale)


def test_famo_at_its_lower_bound_keeps_its_step():
    strategy = build("famo", 2)
    losses = torch.tensor([0.0, 0.5]).double().requires_grad_()
    (weights,) = torch.autograd.grad(strategy.objective(losses, PAIR), losses)
    assert float(weights[0]) == pytest.approx(1.0)
