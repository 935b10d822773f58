"""Micro-batches give what the whole batch gives, for every strategy, missing labels included."""

from __future__ import annotations

import pytest
import torch

from mtl_cli.train import train_step
from tests import support

EXTRAS = {"torchjd"}  # needs a package that is not among the requirements


def run(strategy: str, accumulate: int, *more: str, count: int = 3) -> torch.Tensor:
    work = support.make_work(
        f"weighting={strategy}",
        f"accumulate={accumulate}",
        "precision=fp64",
        "optimizer=sgd",
        "optimizer.lr=0.05",
        *more,
    )
    support.punch_holes(work.data)
    support.rest_batchnorm(work)
    for step, micro in enumerate(support.steps(work, count)):
        reports = train_step(work, micro, step, 0)
        assert all(report.finite for report in reports)
    return support.weights(work)


@pytest.mark.parametrize("strategy", sorted(set(support.strategies()) - EXTRAS))
def test_micro_batches_equal_the_batch(strategy):
    whole, cut = run(strategy, 1), run(strategy, 4)
    assert torch.isfinite(whole).all()
    assert (whole - cut).norm() <= 1e-6 * whole.norm()


@pytest.mark.parametrize("wrt", ["features", "last_shared"])
@pytest.mark.parametrize("strategy", ["mgda", "imtl", "nash_mtl", "gradnorm"])
def test_cheap_scopes_too(strategy, wrt):
    whole, cut = (run(strategy, n, f"weighting.wrt={wrt}") for n in (1, 4))
    assert (whole - cut).norm() <= 1e-9 * whole.norm()


def test_cut_differently_equal_too():
    whole = run("uncertainty", 1)
    for accumulate in (2, 3, 5):
        assert (whole - run("uncertainty", accumulate)).norm() <= 1e-9 * whole.norm()


def test_mean_of_means_would_not_pass():
    """The law can fail: cutting the batch into steps of their own gives another result."""
    whole = run("equal", 1, count=1)
    other = run("equal", 1, "data.batch_size=8", count=1)
    assert (whole - other).norm() > 1e-4 * whole.norm()
