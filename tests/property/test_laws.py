"""Laws of the strategies, over the zoo and over every conf/weighting/*.yaml."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_cli.weighting import solvers
from mtl_cli.weighting.base import GradientWeighting, GramianWeighting
from mtl_cli.weighting.laws import close, judge
from mtl_cli.weighting.zoo import CASES, COUNTS, REGULAR, matrix, some_losses, take_step
from tests.property.built import NAMES, OURS, build, kind, maker, needs_torchjd

GRAMIAN = [n for n in OURS if issubclass(kind(n), GramianWeighting) and n != "gradnorm"]
PLAIN = [n for n in GRAMIAN if n != "excess_mtl"]  # rotate with the rows
SIMPLEX = ["mgda", "moco", "modo", "sdmgrad", "rlw", "uw_so", "cov_weighting", "famo"]
DEGREE_1 = [
    "mgda",
    "cagrad",
    "pcgrad",
    "gradvac",
    "imtl_g",
    "imtl",
    "aligned_mtl",
    "upgrad",
    "dualproj",
    "config",
]
HARMLESS = ["mgda", "nash_mtl", "fairgrad", "upgrad", "dualproj"]
EXACT = {"nash_mtl": {"max_norm": 0}, "fairgrad": {"max_norm": 0}, "cagrad": {"rescale": 0}}


def solved(name: str, rows: Tensor, **options: object) -> tuple[GramianWeighting, Tensor]:
    """A Gramian strategy and its row weights; losses of one."""
    strategy = build(name, len(rows), **{**EXACT.get(name, {}), **options})
    assert isinstance(strategy, GramianWeighting)
    ones = torch.ones(len(rows), dtype=torch.float64)
    return strategy, strategy.row_weights(rows @ rows.T, ones, torch.arange(len(rows)), 0)


def gradient_of(name: str, rows: Tensor, **options: object) -> Tensor:
    return solved(name, rows, **options)[1] @ rows


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_finite_on_anything(name, count):
    if needs_torchjd(name):
        pytest.skip("torchjd is an extra")
    for law in ("finite", "degenerate matrices", "shapes"):
        found = judge(law, maker(name), counts=(count,))
        assert found.ok, found


@pytest.mark.parametrize("name", OURS)
def test_one_objective_is_plain_training_up_to_scale(name):
    found = judge("single objective", maker(name))
    assert found.ok, found
    if issubclass(kind(name), GramianWeighting) and name not in ("db_mtl", "moco"):
        _, weights = take_step(build(name, 1), matrix("random", 1), some_losses(1))
        assert float(weights) == 1


@pytest.mark.parametrize("name", [n for n in OURS if not issubclass(kind(n), GradientWeighting)])
@pytest.mark.parametrize("case", [c for c in REGULAR if c != "parallel"])
def test_never_stands_still_while_descent_is_possible(name, case):
    rows = matrix(case, 3)
    rows = rows + 3 * rows.norm(dim=1, keepdim=True) * matrix("random", 8)[7] / 8
    gradient, _ = take_step(build(name, 3), rows, some_losses(3))
    assert float(gradient.norm()) > 1e-6 * min(float(rows.norm(dim=1).min()), 1.0)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("count", [3, 8])
def test_order_of_tasks_does_not_matter(name, count):
    steps = 1 if name == "sdmgrad" else 3  # its inner steps amplify rounding
    law = "order of objectives"
    found = judge(law, maker(name), counts=(count,), steps=steps, tolerance=1e-8)
    assert found.ok, found


@pytest.mark.parametrize("name", [n for n in OURS if issubclass(kind(n), GradientWeighting)])
def test_columns_may_be_split(name):
    found = judge("columns", maker(name))
    assert found.ok, found


@pytest.mark.parametrize("name", PLAIN)
def test_rotates_with_the_rows(name):
    found = judge("rotates", maker(name), steps=1)
    assert found.ok, found


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("name", [*DEGREE_1, "nash_mtl", "fairgrad"])
def test_homogeneous(name, factor):
    degree = {"nash_mtl": 0.0, "fairgrad": 1 - 2 / (1 + 1 / 2.0)}.get(name, 1.0)
    for case in ("random", "conflicting", "scaled"):
        rows = matrix(case, 4)
        expected = gradient_of(name, rows)
        assert close(gradient_of(name, rows * factor) / factor**degree, expected, 1e-7), case


@pytest.mark.parametrize("name", ["nash_mtl", "imtl_g", "config", "db_mtl"])
def test_factor_on_a_row(name):
    rows = matrix("random", 4)
    factors = torch.tensor([1e-3, 1.0, 7.0, 2e3]).double()
    one, other = gradient_of(name, rows), gradient_of(name, rows * factors[:, None])
    if name != "nash_mtl":  # only the direction
        one, other = one / one.norm(), other / other.norm()
    assert close(other, one, 1e-8)


@pytest.mark.parametrize("count", [2, 3, 8, 40])
@pytest.mark.parametrize("case", REGULAR)
@pytest.mark.parametrize("name", HARMLESS)
def test_harms_no_objective(name, case, count):
    rows = matrix(case, count)
    strategy, weights = solved(name, rows)
    cosines = rows @ (weights @ rows) / rows.norm(dim=1)
    assert float(cosines.min()) >= -1e-9 * float(cosines.abs().max())
    assert int(strategy.fallbacks) == 0


@pytest.mark.parametrize("name", SIMPLEX)
@pytest.mark.parametrize("case", [c for c in CASES if c != "zero row"])
def test_weights_stay_on_the_simplex(name, case):
    if case == "all zero" and issubclass(kind(name), GramianWeighting):
        pytest.skip("without any direction the weights are 1")
    strategy = build(name, 3)
    for step in range(4):
        _, weights = take_step(strategy, matrix(case, 3), some_losses(3, step), step)
        assert float(weights.min()) >= 0
        torch.testing.assert_close(weights.sum(), torch.ones(()).double())


@pytest.mark.parametrize("count", [2, 3, 8, 40])
@pytest.mark.parametrize("case", [c for c in CASES if "zero" not in c])
def test_mgda_optimality(case, count):
    rows = matrix(case, count)
    strategy, weights = solved("mgda", rows)
    point = weights @ rows
    gap = point @ point - rows @ point  # rounding grows with the length of the row
    size, lengths = float(point.norm()), rows.norm(dim=1)
    allowed = 1e-9 * size**2 + 1e-13 * size * lengths + 1e-14 * float(lengths.min() ** 2)
    assert (gap <= allowed).all()
    assert float(weights.min()) >= 0
    assert int(strategy.fallbacks) == 0


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 4.0])
@pytest.mark.parametrize("count", [2, 3, 8, 40])
@pytest.mark.parametrize("case", [*REGULAR, "dependent"])
def test_cagrad_optimality(case, count, c):
    rows = matrix(case, count)
    strategy, weights = solved("cagrad", rows, c=c)
    if int(strategy.fallbacks):  # the hull holds 0 and no direction gains on all
        assert case == "dependent"
        return
    mean, step = rows.mean(0), weights @ rows
    radius = c * float(mean.norm())
    assert abs(float((step - mean).norm()) - radius) <= 1e-8 * radius
    inner = weights - 1 / count
    point = inner / inner.sum() @ rows
    dual = float(point @ mean + radius * point.norm())  # = the worst gain, at the optimum
    assert (dual - rows @ step <= 1e-9 * rows.norm(dim=1) * step.norm()).all()


@pytest.mark.parametrize("count", [2, 3, 8, 40])
@pytest.mark.parametrize("case", REGULAR)
def test_nash_and_fairgrad_residuals(case, count):
    rows = matrix(case, count)
    alphas = (0.5, 2.0) if case == "scaled" else (0.5, 2.0, 10.0)
    for name, alpha in [("nash_mtl", 1.0), *(("fairgrad", a) for a in alphas)]:
        options = {"alpha": alpha} if name == "fairgrad" else {}
        strategy, weights = solved(name, rows, **options)
        residual = (rows @ (weights @ rows)) * weights ** (1 / alpha) - 1
        assert float(residual.abs().max()) < 1e-6, (name, alpha)
        assert int(strategy.fallbacks) == 0
    length = float((solved("nash_mtl", rows)[1] @ rows).norm())
    assert abs(length - count**0.5) < 1e-6 * count**0.5


@pytest.mark.parametrize("count", [2, 3, 8, 40])
@pytest.mark.parametrize("case", [c for c in CASES if c not in ("all zero", "short")])
def test_projections_are_optimal(case, count):
    gramian = (matrix(case, count) @ matrix(case, count).T).numpy()
    length = np.sqrt(gramian.diagonal())
    for i in range(0, count, 7):
        one = np.eye(count)[i]
        for solver in (solvers.project_rows, solvers.project_sum):
            weights, certain = solver(gramian, one)
            slack = np.divide(gramian @ weights, length, out=np.zeros(count), where=length > 0)
            added = weights - one
            assert certain
            assert added.min() >= 0
            assert slack.min() >= -1e-8 * length[i]
            assert abs(added * length * slack).max() <= 1e-8 * length[i] ** 2 + 1e-300


def test_projection_of_agreeing_gradients_is_the_mean():
    rows = matrix("agreeing", 5)
    for name in ("upgrad", "dualproj"):
        assert close(gradient_of(name, rows), rows.mean(0), 1e-12)
    assert close(gradient_of("pcgrad", rows), rows.sum(0), 1e-12)


def test_upgrad_is_linear_in_the_length_of_a_row():
    rows = matrix("conflicting", 4)
    factors = torch.tensor([1e-3, 1.0, 5.0, 1e3]).double()
    parts = [
        torch.from_numpy(solvers.project_rows((rows @ rows.T).numpy(), np.eye(4)[i])[0]) @ rows
        for i in range(4)
    ]
    expected = sum(f * part for f, part in zip(factors, parts, strict=True)) / 4
    assert close(gradient_of("upgrad", rows * factors[:, None]), expected, 1e-9)


def test_dualproj_is_idempotent():
    rows = matrix("conflicting", 4)
    projected = gradient_of("dualproj", rows)
    assert float((rows @ projected).min()) >= -1e-9
    again = torch.cat([projected[None], rows])
    weights, _ = solvers.project_sum((again @ again.T).numpy(), np.eye(5)[0])
    assert close(torch.from_numpy(weights) @ again, projected, 1e-9)


@pytest.mark.parametrize("name", ["imtl_g", "config"])
@pytest.mark.parametrize("case", ["random", "conflicting", "agreeing", "scaled"])
def test_equal_projections(name, case):
    rows = matrix(case, 4)
    gradient = gradient_of(name, rows)
    projections = rows @ gradient / rows.norm(dim=1)
    assert close(projections, projections.mean().expand(4), 1e-6)
    if name == "config":
        assert float(projections.min()) > 0
        assert abs(
            float(gradient.norm() - (rows @ gradient).sum() / gradient.norm())
        ) < 1e-6 * float(gradient.norm())


@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_aligned_rows_are_orthogonal_and_equal(mode):
    rows = matrix("random", 4)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    scale = {"min": values[0], "median": values.median(), "rmse": values.mean()}[mode]
    balance = vectors @ torch.diag((scale / values).sqrt()) @ vectors.T
    aligned = balance @ rows
    assert close(aligned @ aligned.T, scale * torch.eye(4).double(), 1e-9)
    assert close(gradient_of("aligned_mtl", rows, scale_mode=mode), aligned.mean(0), 1e-9)


def test_imtl_g_can_refuse_to_climb():
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        rows = torch.rand(4, 5, dtype=torch.float64, generator=generator) + 0.05
        paper = rows @ gradient_of("imtl_g", rows)
        if float(paper.max()) < 0:
            strategy, weights = solved("imtl_g", rows, descend=True)
            assert float((rows @ (weights @ rows)).min()) > 0
            assert int(strategy.fallbacks) == 1
            return
    pytest.fail("no matrix with a negative common projection was drawn")


@pytest.mark.parametrize("name", ["cagrad", "nash_mtl", "imtl_g"])
def test_a_degenerate_matrix_is_counted(name):
    row = matrix("random", 1)
    strategy, weights = solved(name, torch.cat([row, -row]))
    assert torch.isfinite(weights).all()
    assert int(strategy.fallbacks) == 1
