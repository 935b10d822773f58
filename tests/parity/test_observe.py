"""What a logged step measures of the tasks' gradients, and that measuring changes nothing."""

from __future__ import annotations

import math

import pytest
import torch

from mtl_cli.ghost import GhostLayer
from mtl_cli.params import set_train_mode, set_trainable
from mtl_cli.train import train_step
from tests import support
from tests.parity.test_accumulation import EXTRAS
from tests.parity.test_engine import naive_rows

STRATEGIES = sorted(set(support.strategies()) - EXTRAS)


def stepped(observe: bool, *overrides: str, steps: int = 2):
    work = support.make_work(*overrides)
    support.punch_holes(work.data)
    reports = []
    for step, micro in enumerate(support.steps(work, steps)):
        reports += train_step(work, micro, step, 0, observe=observe)
    return work, reports


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_measured_step_is_the_same_step(strategy):
    plain, silent = stepped(False, f"weighting={strategy}")
    seen, reports = stepped(True, f"weighting={strategy}")
    assert torch.equal(support.weights(plain), support.weights(seen))
    assert support.digest(plain.weighting.state_dict()) == support.digest(
        seen.weighting.state_dict()
    )
    assert all(r.observed is None for r in silent)
    for report in reports:
        norms = report.observed.diagonal().sqrt()
        assert norms.shape == report.present.shape
        assert bool((norms > 0).all())


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("overrides", "wrt"),
    [
        (["weighting=equal"], "features"),
        (["weighting=uncertainty", "weighting.transform=initial"], "features"),
        (["weighting=dwa"], "features"),
        (["weighting=graddrop"], "shared"),
        (["weighting=pcgrad"], "shared"),
        (["weighting=gradnorm", "weighting.wrt=shared"], "shared"),
        (["schedule=alternate", "schedule.mode=simultaneous"], "shared"),
    ],
)
def test_the_gramian_is_that_of_its_scope(overrides, wrt, accumulate):
    work = support.make_work(*overrides, "precision=fp64", f"accumulate={accumulate}")
    support.rest_batchnorm(work)
    micro = support.first_step(work)
    whole = support.make_work(*overrides, "precision=fp64")
    support.rest_batchnorm(whole)
    (batch,) = support.first_step(whole)
    _, rows, _ = naive_rows(whole, batch)
    (report,) = train_step(work, micro, 0, 0, observe=True)
    if report.wrt != wrt:  # accumulated losses that a strategy needs first: exact rows are at hand
        assert accumulate == 2
        assert report.wrt == "shared"
    if report.wrt == "shared":
        torch.testing.assert_close(report.observed, rows @ rows.T, rtol=1e-8, atol=1e-14)
    else:
        assert not torch.allclose(report.observed, rows @ rows.T)
        assert bool((torch.linalg.eigvalsh(report.observed) > -1e-12).all())


@pytest.mark.parametrize(
    ("strategy", "accumulate"),
    [
        *(
            ("uncertainty", 1),
            ("gls", 2),
            ("pcgrad", 1),
            ("db_mtl", 2),
            ("modo", 1),
            ("graddrop", 2),
        ),
        *(pytest.param(s, a, marks=pytest.mark.slow) for s in STRATEGIES for a in (1, 2)),
    ],
)
def test_heads_learn_while_the_backbone_rests(strategy, accumulate):
    """Every strategy serves a stage whose backbone is frozen (linear probe, later unfreezing)."""
    work = support.make_work(
        f"weighting={strategy}",
        "unfreeze_at.backbone=1",
        f"accumulate={accumulate}",
    )
    set_trainable(work.rows, 0)
    set_train_mode(work.model, work.rows)
    before = support.digest(work.model.backbone.state_dict())
    heads = support.digest(work.model.heads.state_dict())
    for step, micro in enumerate(support.steps(work, 2)):
        (report,) = train_step(work, micro, step, 0, observe=True)
        assert report.finite
    assert support.digest(work.model.backbone.state_dict()) == before
    assert support.digest(work.model.heads.state_dict()) != heads
    set_trainable(work.rows, 1)
    set_train_mode(work.model, work.rows)
    train_step(work, micro, 2, 1)
    assert support.digest(work.model.backbone.state_dict()) != before


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (torch.nn.Conv2d(32, 48, 3), (2, 32, 6, 6)),
        (torch.nn.Conv2d(32, 48, 3, padding=1, bias=False), (2, 32, 5, 6)),
        (torch.nn.Conv2d(32, 48, (3, 2), stride=2, padding=2, dilation=2), (2, 32, 6, 6)),
        (torch.nn.Linear(40, 30), (3, 5, 40)),
        (torch.nn.Linear(40, 30, bias=False), (9, 40)),
    ],
    ids=["conv", "no bias", "dilated", "linear on tokens", "linear"],
)
def test_ghost_gramian_is_exact(layer, shape):
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64)
    ghost = GhostLayer(layer)
    features = layer(x).relu()
    rows = [[torch.randn_like(features)] for _ in range(4)]
    found = ghost.gramian([features], rows)
    explicit = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        [features], list(layer.parameters()), row, retain_graph=True
                    )
                ]
            )
            for row in rows
        ]
    )
    torch.testing.assert_close(found, explicit @ explicit.T, rtol=1e-12, atol=1e-12)
    assert not layer._forward_hooks


def test_ghost_declines_what_it_cannot_or_should_not_do():
    x = torch.randn(4, 8, 6, 6)
    for layer in (
        torch.nn.Conv2d(8, 16, 3, groups=2),
        torch.nn.Conv2d(8, 16, 3, padding="same"),
        torch.nn.Conv2d(8, 16, 3, padding=1, padding_mode="circular"),
        torch.nn.Conv2d(8, 2, 1),  # explicit gradients are cheaper
    ):
        ghost = GhostLayer(layer)
        features = layer(x)
        assert ghost.gramian([features], [[torch.ones_like(features)]]) is None
    layer = torch.nn.Conv2d(8, 16, 3)
    ghost = GhostLayer(layer)
    features = layer(x).relu_()  # overwrites the output
    assert ghost.gramian([features], [[torch.ones_like(features)]] * 4) is None


def test_gradnorm_takes_the_ghost_where_it_pays(monkeypatch):
    taken = []
    original = GhostLayer.gramian

    def counted(self, *args):
        taken.append(original(self, *args))
        return taken[-1]

    monkeypatch.setattr(GhostLayer, "gramian", counted)
    options = ["weighting=gradnorm", "backbone.width=16", "data.batch_size=8"]
    _, reports = stepped(True, *options, steps=1)
    assert taken[0] is not None
    monkeypatch.setattr(GhostLayer, "gramian", lambda *_: None)
    _, explicit = stepped(True, *options, steps=1)
    torch.testing.assert_close(reports[0].gramian, explicit[0].gramian, rtol=1e-5, atol=1e-12)
    assert math.isfinite(reports[0].grad_norm)
