"""Worked numbers: small cases that can be checked by hand, one line per claim."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_cli.weighting.base import GramianWeighting, LossWeighting
from mtl_cli.weighting.gramian import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradNorm,
    GradVac,
    NashMTL,
    PCGrad,
    UPGrad,
    surgery,
    vaccinate,
)
from mtl_cli.weighting.loss_history import DTP, DWA, FAMO
from mtl_cli.weighting.loss_level import (
    GLS,
    IMTLL,
    STCH,
    UWSO,
    AutoWeighted,
    ScaleInvariant,
    Uncertainty,
)
from mtl_cli.weighting.row_state import DBMTL
from mtl_cli.weighting.solvers import project_simplex
from tests.golden.reference import objectives, tensor

MATRICES = {
    "A": tensor([[4, 0], [-2, 2]]),
    "B": tensor([[2, 0], [1, 1]]),
    "C": tensor([[2, 0, 0], [-1, 2, 0], [0, -1, 1]]),
    "D": tensor([[4, 0], [-1, 0.5]]),
}
GRADIENTS: list[tuple[type[GramianWeighting], dict[str, Any], str, list[float]]] = [
    (MGDA, {}, "A", [0.4, 1.2]),
    (MGDA, {}, "B", [1, 1]),
    (MGDA, {}, "D", [0.039604, 0.39604]),
    (CAGrad, {"c": 0.5, "rescale": 0}, "A", [0.5, 1.5]),
    (CAGrad, {"c": 0.5, "rescale": 0}, "B", [2.059017, 1.059017]),
    (CAGrad, {"c": 0.5, "rescale": 0}, "C", [0.230395, 0.275735, 0.596809]),
    (CAGrad, {"c": 0.5, "rescale": 1}, "A", [0.4, 1.2]),
    (CAGrad, {"c": 0.0, "rescale": 0}, "A", [1, 1]),
    (IMTLG, {}, "A", [0.485281, 1.171573]),
    (NashMTL, {"max_norm": 0}, "A", [0.541196, 1.306563]),
    (UPGrad, {}, "A", [1, 2]),
    (UPGrad, {}, "D", [0.4, 1.05]),
    (DualProj, {}, "A", [1, 1]),
    (DualProj, {}, "D", [0.4, 0.8]),
    (PCGrad, {}, "A", [2, 4]),
    (PCGrad, {}, "B", [3, 1]),
    (PCGrad, {}, "D", [0.8, 2.1]),
    (ConFIG, {}, "A", [1, 2.414214]),
    (ConFIG, {}, "B", [2.914214, 1.207107]),
    (ConFIG, {}, "C", [0.440996, 0.713546, 1.337208]),
    (DBMTL, {"beta": 0.0}, "A", [1.171573, 2.828427]),
    (DBMTL, {"beta": 0.0}, "C", [1.236068, 0.418861, 1.581139]),
    (GradVac, {}, "B", [3, 1]),
]
WEIGHTS: list[tuple[type[GramianWeighting], dict[str, Any], str, list[float]]] = [
    (MGDA, {}, "A", [0.4, 0.6]),
    (MGDA, {}, "B", [0, 1]),
    (MGDA, {}, "C", [0.225806, 0.322581, 0.451613]),
    (MGDA, {}, "D", [0.207921, 0.792079]),
    (IMTLG, {}, "A", [0.414214, 0.585786]),
    (IMTLG, {}, "B", [0.414214, 0.585786]),
    (IMTLG, {}, "C", [0.236835, 0.331219, 0.431947]),
    (NashMTL, {"max_norm": 0}, "A", [0.46194, 0.653281]),
    (NashMTL, {"max_norm": 0}, "B", [0.382683, 0.541196]),
    (NashMTL, {"max_norm": 0}, "C", [0.844784, 1.0977, 1.443968]),
    (FairGrad, {"alpha": 2.0, "max_norm": 0}, "A", [0.37396, 0.543513]),
    (FairGrad, {"alpha": 2.0, "max_norm": 0}, "B", [0.257291, 0.471146]),
    (FairGrad, {"alpha": 2.0, "max_norm": 0}, "C", [0.843394, 1.142341, 1.544646]),
    (AlignedMTL, {}, "A", [0.41459, 0.552786]),
    (AlignedMTL, {}, "B", [0.138197, 0.276393]),
    (AlignedMTL, {}, "C", [0.2455, 0.306409, 0.385348]),
    (AlignedMTL, {"scale_mode": "rmse"}, "A", [0.821584, 1.095445]),
    (UPGrad, {}, "A", [0.75, 1]),
    (UPGrad, {}, "B", [0.5, 0.5]),
    (UPGrad, {}, "C", [0.583333, 0.722222, 0.888889]),
    (UPGrad, {"reg_eps": 1e-4}, "A", [0.749963, 0.99985]),
    (UPGrad, {}, "D", [0.625, 2.1]),
    (DualProj, {}, "B", [0.5, 0.5]),
    (DualProj, {}, "C", [1 / 3, 1 / 3, 1 / 3]),
    (DualProj, {}, "D", [0.5, 1.6]),
    (PCGrad, {}, "A", [1.5, 2]),
    (PCGrad, {}, "D", [1.25, 4.2]),
]
L14 = tensor([1.0, 4.0])
PAIR = torch.arange(2)


def solve(kind: type[GramianWeighting], options: dict[str, Any], rows: Tensor) -> Tensor:
    count = len(rows)
    strategy = kind(objectives(count), **options)
    return strategy.solve(rows @ rows.T, torch.ones(count).double(), torch.arange(count), 0)


def slopes(strategy: LossWeighting, losses: Tensor) -> Tensor:
    leaf = losses.clone().requires_grad_()
    return torch.autograd.grad(strategy.objective(leaf, torch.arange(len(losses))), leaf)[0]


def near(found: Any, wanted: Any, atol: float = 6e-7) -> None:
    torch.testing.assert_close(torch.as_tensor(found), tensor(wanted), rtol=0, atol=atol)


@pytest.mark.parametrize(("kind", "options", "letter", "wanted"), GRADIENTS)
def test_combined_gradient(kind, options, letter, wanted):
    near(solve(kind, options, MATRICES[letter]) @ MATRICES[letter], wanted)


@pytest.mark.parametrize(("kind", "options", "letter", "wanted"), WEIGHTS)
def test_weights(kind, options, letter, wanted):
    near(solve(kind, options, MATRICES[letter]), wanted)


def test_mgda_point_has_equal_projections():
    rows = MATRICES["C"]
    near(rows @ (solve(MGDA, {}, rows) @ rows), [0.258065] * 3)


@pytest.mark.parametrize(
    ("normalization", "divisors"),
    [("none", [1, 1]), ("l2", [4, 8**0.5]), ("loss", [1, 4]), ("loss+", [4, 4 * 8**0.5])],
)
def test_mgda_normalization_divides_rows_inside_the_problem_only(normalization, divisors):
    rows = MATRICES["A"]
    scaled = rows / tensor(divisors)[:, None]
    strategy = MGDA(objectives(2), normalization=normalization)
    found = strategy.solve(rows @ rows.T, L14, PAIR, 0)
    near(found, solve(MGDA, {}, scaled).tolist())


@pytest.mark.parametrize(
    ("order", "gradient", "weights"),
    [
        ([[1, 2], [0, 2], [0, 1]], [1.2, 1.2, 2.4], [1.5, 1.8, 2.4]),
        ([[2, 1], [2, 0], [1, 0]], [1.6, 1.6, 2.0], None),
    ],
)
def test_pcgrad_in_a_given_order(order, gradient, weights):
    rows = MATRICES["C"].numpy()
    found = surgery(rows @ rows.T, np.array(order)).sum(0)
    near(found @ rows, gradient)
    if weights:
        near(found, weights)


@pytest.mark.parametrize(("target", "wanted"), [(0.0, [2, 2]), (0.5, [0.845299, 3.154701])])
def test_gradvac_rotates_to_the_target(target, wanted):
    rows = MATRICES["A"].numpy()
    full = np.full((2, 2), target)
    found, _ = vaccinate(rows @ rows.T, np.array([[1], [0]]), full, 0.5, 0.0)
    rotated = found[0] @ rows
    near(rotated, wanted)
    cosine = rotated @ rows[1] / np.linalg.norm(rotated) / np.linalg.norm(rows[1])
    near(cosine, target)


def test_uncertainty_optimum():
    strategy = Uncertainty(objectives(2), form="half")
    assert float(strategy.objective(L14, PAIR).detach()) == 2.5
    strategy.log_variance.data = L14.log()
    near(strategy.weights(0, PAIR), [0.5, 0.125])
    near(strategy.objective(L14, PAIR).detach(), 1.693147)
    near(torch.autograd.grad(strategy.objective(L14, PAIR), strategy.log_variance)[0], [0, 0])


def test_uncertainty_form_follows_the_likelihood():
    several = [
        *objectives(1, "gaussian"),
        *objectives(2, "categorical")[1:],
        *objectives(3, "laplace")[2:],
    ]
    strategy = Uncertainty(several)
    near(strategy.weights(0, torch.arange(3)), [0.5, 1, 1])
    strategy.log_variance.data.fill_(1.0)
    near(strategy.objective(tensor([0.0, 0, 0]), torch.arange(3)).detach(), 0.5 + 0.5 + 1)


@pytest.mark.parametrize(
    ("loss", "squared", "weight"),
    [(1, 1, 0.5), (2, 1.618034, 0.309017), (4, 2.732051, 0.183013), (10, 5.854102, 0.085410)],
)
def test_auto_weighted_fixed_point(loss, squared, weight):
    strategy = AutoWeighted(objectives(1))
    one = torch.arange(1)
    near(
        torch.autograd.grad(strategy.objective(tensor([loss]), one), strategy.scale)[0], [1 - loss]
    )
    strategy.scale.data.fill_(squared**0.5)
    total = strategy.objective(tensor([loss]), one)
    near(torch.autograd.grad(total, strategy.scale)[0], [0], atol=1e-5)
    near(strategy.weights(0, one), [weight])


def test_auto_weighted_value():
    near(AutoWeighted(objectives(2)).objective(L14, PAIR).detach(), 3.886294)


def test_imtl_l_stationary_point():
    strategy = IMTLL(objectives(2))
    strategy.log_scale.data = -L14.log()
    near(strategy.weights(0, PAIR), [1, 0.25])
    near(strategy.objective(L14, PAIR).detach(), 2 + np.log(4))


@pytest.mark.parametrize(
    ("strategy", "wanted"),
    [
        (ScaleInvariant(objectives(2)), [1, 0.25]),
        (GLS(objectives(2)), [1, 0.25]),
        (UWSO(objectives(2)), [0.679179, 0.320821]),
        (FAMO(objectives(2)), [0.8, 0.2]),
        (STCH(objectives(2), form="paper", mu=0.1), [1.5e-7, 0.5]),
        (STCH(objectives(2), form="paper", mu=1e9), [0.25, 0.25]),
    ],
)
def test_effective_weights(strategy, wanted):
    near(slopes(strategy, L14), wanted)


def test_values():
    near(GLS(objectives(2)).objective(L14, PAIR), 2.0)
    near(STCH(objectives(2), form="paper", mu=0.1).objective(L14, PAIR), 2.0000000306, 1e-10)


def test_dwa_weights():
    strategy = DWA(objectives(2))
    strategy.previous.fill_(1.0)
    strategy.last.copy_(tensor([0.9, 0.5]))
    near(strategy.weights(0, PAIR), [1.099668, 0.900332])
    strategy.last.fill_(0.7)
    near(strategy.weights(0, PAIR), [1, 1])


def test_famo_logits_gradient():
    strategy = FAMO(objectives(2), gamma=0.0)
    seen = []
    strategy.moments.step = lambda present, grad: seen.append(grad) or torch.zeros(2)  # type: ignore[method-assign]
    strategy.advance(0, PAIR, L14)
    strategy.look_ahead(0, PAIR, tensor([0.9, 3.9]))
    near(seen[0], [0.020011, -0.020011])


def test_gradnorm_step():
    strategy = GradNorm(objectives(2), optimizer="sgd", eps=1e-6)
    strategy.first_losses.copy_(tensor([2, 4]))
    gramian = torch.diag(tensor([1.0, 9.0]))
    strategy.advance(0, PAIR, tensor([1, 3]), gramian)
    near(strategy.loss_weights, [1.051282, 0.948718])
    balanced = GradNorm(objectives(2), optimizer="sgd")
    balanced.advance(0, PAIR, tensor([5, 5]), torch.eye(2).double())
    near(balanced.loss_weights, [1, 1])


def test_dtp():
    strategy = DTP(objectives(2))
    near(strategy.weights(0, PAIR), [1, 1])
    strategy.observe_metrics(PAIR, tensor([0.5, 0.99]))
    near(strategy.weights(0, PAIR), [0.346574, 0.01 * -np.log(0.99)])


@pytest.mark.parametrize(("point", "wanted"), [([0.6, 0.6], [0.5, 0.5]), ([2, 0], [1, 0])])
def test_simplex_projection(point, wanted):
    near(project_simplex(np.array(point, dtype=float)), wanted)
