"""Stateful strategies over 20 golden steps."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_cli.weighting.base import LossWeighting
from mtl_cli.weighting.gramian import GradNorm
from mtl_cli.weighting.loss_history import DWA, FAMO
from mtl_cli.weighting.loss_level import GLS, IMTLL, RLW, STCH, AutoWeighted, Uncertainty
from mtl_cli.weighting.row_state import DBMTL, MoCo
from tests.golden.reference import golden, objectives, tensor

INPUTS = golden()["trajectory_inputs"]
LOSSES = tensor(INPUTS["losses_before"])  # [20, 3]
ALL = torch.arange(3)


def expected(name: str) -> dict[str, Any]:
    return golden()["trajectories"][name]["expected"]


def close(found: list[Tensor], wanted: Any, rtol: float = 1e-9, atol: float = 1e-12) -> None:
    torch.testing.assert_close(torch.stack(found), tensor(wanted), rtol=rtol, atol=atol)


def slopes(strategy: LossWeighting, losses: Tensor) -> Tensor:
    """dF/dL at the losses."""
    leaf = losses.clone().requires_grad_()
    return torch.autograd.grad(strategy.objective(leaf, ALL), leaf)[0]


def learn(strategy: LossWeighting) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and totals of a strategy with learned scalars under plain SGD."""
    optimizer = torch.optim.SGD(strategy.parameters(), lr=0.025)
    found, totals = [], []
    for step, losses in enumerate(LOSSES):
        known = strategy.weights(step, ALL)
        assert known is not None
        found.append(known)
        optimizer.zero_grad()
        total = strategy.objective(losses, ALL)
        total.backward()
        optimizer.step()
        strategy.advance(step, ALL, losses)
        totals.append(total.detach())
    return found, totals


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("uw", Uncertainty(objectives(3), form="half")),
        ("uw", Uncertainty(objectives(3, "gaussian"))),
        ("uw_classification_form", Uncertainty(objectives(3, "categorical"))),
        ("awl", AutoWeighted(objectives(3))),
        ("imtl_l", IMTLL(objectives(3))),
    ],
)
def test_learned_scalars(name, strategy):
    found, totals = learn(strategy)
    close(found, expected(name)["weights"], rtol=1e-10)
    close([next(iter(strategy.parameters())).detach()], [expected(name)["s_final"]], 1e-10, 1e-10)
    if "total_loss" in expected(name):
        close(totals, expected(name)["total_loss"], rtol=1e-10)


def test_dwa():
    strategy = DWA(objectives(3))
    found = []
    for epoch, losses in enumerate(LOSSES):
        for step, factor in enumerate((0.5, 1.0, 1.5)):  # the mean over the epoch counts
            known = strategy.weights(3 * epoch + step, ALL)
            strategy.advance(3 * epoch + step, ALL, losses * factor)
        found.append(known)
        strategy.end_epoch()
    close(found, expected("dwa")["weights"], rtol=1e-12)


def test_dwa_by_steps_equals_dwa_by_epochs():
    strategy = DWA(objectives(3), window=1)
    found = []
    for step, losses in enumerate(LOSSES):
        found.append(strategy.weights(step, ALL))
        strategy.advance(step, ALL, losses)
    close(found, expected("dwa")["weights"], rtol=1e-12)


def test_gls():
    strategy = GLS(objectives(3))
    close([slopes(strategy, x) for x in LOSSES], expected("gls")["effective_weights"], rtol=1e-10)
    close([strategy.objective(x, ALL) for x in LOSSES], expected("gls")["loss"], rtol=1e-10)


def test_stch_log_nadir():
    name = "stch_log_nadir"
    rows = golden()["trajectories"][name]["params"]["warmup_rows"]
    strategy = STCH(objectives(3), warmup_epochs=1)
    for step, losses in enumerate(LOSSES[:rows]):
        torch.testing.assert_close(slopes(strategy, losses), 1 / losses)
        strategy.advance(step, ALL, losses)
    strategy.end_epoch()
    close([strategy.nadir], [expected(name)["nadir"]])
    found = []
    for step, losses in enumerate(LOSSES[rows:]):
        found.append(slopes(strategy, losses))
        strategy.advance(rows + step, ALL, losses)
    close(found, expected(name)["effective_weights_from_row_5"])


def test_famo():
    name = "famo_gamma_0.001"
    strategy = FAMO(objectives(3), gamma=0.001)
    found, logits = [], []
    for step, (losses, after) in enumerate(
        zip(LOSSES, tensor(INPUTS["losses_after"]), strict=True)
    ):
        logits.append(strategy.logits.clone())
        found.append(slopes(strategy, losses))
        strategy.advance(step, ALL, losses)
        strategy.look_ahead(step, ALL, after)
    close(logits, expected(name)["logits_before_step"], atol=1e-9)
    close(found, expected(name)["effective_weights"], atol=1e-9)
    close([strategy.logits], [expected(name)["logits_final"]], atol=1e-9)


def test_amortised_famo_follows_the_next_losses():
    exact = FAMO(objectives(3))
    cheap = FAMO(objectives(3), lookahead="next_batch")
    assert exact.recompute
    assert not cheap.recompute
    for step, losses in enumerate(LOSSES):
        cheap.advance(step, ALL, losses)
    for step, (losses, after) in enumerate(itertools.pairwise(LOSSES)):
        exact.advance(step, ALL, losses)
        exact.look_ahead(step, ALL, after)
    torch.testing.assert_close(cheap.logits, exact.logits)


def rows_of(step: int) -> list[list[Tensor]]:
    """The gradient rows of a step, in two tensors as parameters would be."""
    return [[g[:10].clone().view(2, 5), g[10:].clone()] for g in tensor(INPUTS["gradients"][step])]


def flat(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def test_db_mtl():
    params = golden()["trajectories"]["db_mtl"]["params"]
    strategy = DBMTL(objectives(3), beta=params["beta"], eps=params["eps"])
    alphas, combined = [], []
    for step, losses in enumerate(LOSSES):
        values, slope = strategy.transformed(losses, ALL)
        rows = [[g * s for g in row] for row, s in zip(rows_of(step), slope, strict=True)]
        rows = strategy.observe_rows(rows, ALL, values, step)
        matrix = flat(rows)
        alphas.append(strategy.row_weights(matrix @ matrix.T, values, ALL, step))
        combined.append(alphas[-1] @ matrix)
        strategy.advance(step, ALL, losses)
    close(alphas, expected("db_mtl")["alpha"])
    close(combined, expected("db_mtl")["g"])


def test_moco():
    params = golden()["trajectories"]["moco"]["params"]
    strategy = MoCo(objectives(3), **params)
    simplex, combined = [], []
    for step, losses in enumerate(LOSSES):
        matrix = flat(strategy.observe_rows(rows_of(step), ALL, losses, step))
        simplex.append(strategy.row_weights(matrix @ matrix.T, losses, ALL, step))
        combined.append(simplex[-1] @ matrix)
        strategy.advance(step, ALL, losses)
    close(simplex, expected("moco")["lambda_paper_projection"])
    close(combined, expected("moco")["g_paper_projection"])


def test_gradnorm():
    record = golden()["trajectories"]["gradnorm"]
    problem, params, wanted = record["problem"], record["params"], record["expected"]
    x, w1 = tensor(problem["X"]), tensor(problem["W1"]).requires_grad_()
    heads = [tensor(h).requires_grad_() for h in problem["heads"]]
    targets = [tensor(t) for t in problem["targets"]]
    strategy = GradNorm(
        objectives(3), alpha=params["alpha"], lr=params["lr_weights"], optimizer="sgd"
    )
    before, seen = [], []
    for step in range(20):
        losses = torch.stack(
            [((x @ w1 @ h - t) ** 2).mean() for h, t in zip(heads, targets, strict=True)]
        )
        rows = torch.stack(
            [torch.autograd.grad(v, w1, retain_graph=True)[0].flatten() for v in losses]
        )
        weights = strategy.weights(step, ALL)
        assert weights is not None
        grads = torch.autograd.grad((weights * losses).sum(), [w1, *heads])
        before.append(weights)
        seen.append(losses.detach())
        strategy.advance(step, ALL, losses, rows @ rows.T)
        with torch.no_grad():
            for p, g in zip([w1, *heads], grads, strict=True):
                p -= params["lr_model"] * g
    close(before, wanted["w_before"], atol=1e-9)
    close(seen, wanted["losses"], atol=1e-9)
    close([strategy.loss_weights], wanted["w_after"][-1:], atol=1e-9)
    torch.testing.assert_close(w1.detach(), tensor(wanted["W1_final"]), rtol=1e-9, atol=1e-9)


def test_rlw_distribution():
    wanted = expected("rlw")
    strategy = RLW(objectives(3), seed=3)
    draws = torch.stack([strategy.weights(step, ALL) for step in range(4000)])  # type: ignore[misc]
    torch.testing.assert_close(draws.sum(1), torch.ones(4000).double())
    bound = 4 * (wanted["var_each_mc_2e6"] / 4000) ** 0.5
    assert ((draws.mean(0) - wanted["mean_each"]).abs() < bound).all()
    covariance = torch.cov(draws.T)
    assert abs(float(covariance[0, 0]) - wanted["var_each_mc_2e6"]) < 0.004
    assert abs(float(covariance[0, 1]) - wanted["cov_each_pair_mc"]) < 0.004
