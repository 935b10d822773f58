"""Loss scaling, bf16 and non-finite steps."""

from __future__ import annotations

import pytest
import torch

from mtl_cli.precision import LossScale
from mtl_cli.train import train_step
from tests import support
from tests.parity.test_accumulation import EXTRAS

SGD = ("optimizer=sgd", "optimizer.lr=0.05")
SCALE = 65536.0


def trained(strategy, *overrides, scale=None, count=3):
    work = support.make_work(f"weighting={strategy}", *SGD, *overrides)
    support.rest_batchnorm(work)
    if scale is not None:
        work.scale = work.engine.scale = scale
    for step, micro in enumerate(support.steps(work, count)):
        (report,) = train_step(work, micro, step, 0)
        assert report.finite
    return support.weights(work), work


STRATEGIES = sorted(set(support.strategies()) - EXTRAS)


@pytest.mark.parametrize("strategy", support.marked_slow(STRATEGIES, support.ONE_OF_EACH))
def test_the_loss_scale_changes_nothing(strategy):
    """Rows are unscaled before the solve: methods that are not scale-free would show it."""
    plain, _ = trained(strategy, "precision=fp64")
    scaled, _ = trained(strategy, "precision=fp64", scale=LossScale(SCALE, 2000))
    assert (plain - scaled).norm() <= 1e-12 * plain.norm()


def test_overflow_halves_the_scale_and_leaves_no_trace():
    _, work = trained("mgda", scale=LossScale(SCALE, 2000))
    work.scale.scale = 1e40
    before = support.digest([work.model.state_dict(), work.weighting.state_dict()])
    (report,) = train_step(work, support.first_step(work), 3, 0)
    assert not report.finite
    assert bool(torch.isfinite(report.losses).all())
    assert work.scale.scale == 5e39
    assert support.digest([work.model.state_dict(), work.weighting.state_dict()]) == before


def test_scale_grows_after_good_steps():
    scale = LossScale(8.0, 3)
    for _ in range(3):
        scale.update(True)
    assert scale.scale == 16.0
    scale.update(False)
    assert scale.scale == 8.0
    assert scale.good_steps == 0


@pytest.mark.parametrize("strategy", ["equal", "uncertainty", "gradnorm", "pcgrad", "mgda"])
def test_bf16_stays_near_fp32_over_50_steps(strategy):
    """The bound that is promised: 2 % of the weights' norm."""
    full, _ = trained(strategy, count=50)
    half, _ = trained(strategy, "precision=bf16", count=50)
    assert torch.isfinite(half).all()
    assert (full - half).norm() <= 0.02 * full.norm()


def test_gramian_is_float64_under_bf16():
    work = support.make_work("weighting=mgda", "precision=bf16")
    (report,) = train_step(work, support.first_step(work), 0, 0)
    assert report.gramian.dtype == torch.float64
    assert report.losses.dtype == torch.float64
