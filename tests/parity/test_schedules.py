"""The laws of alternate training, and what rests under each schedule."""

from __future__ import annotations

import pytest
import torch

from mtl_cli.cli import main
from mtl_cli.errors import ConfigError
from mtl_cli.params import set_train_mode, set_trainable
from mtl_cli.train import train_step
from tests import support

PLAIN = ("optimizer.weight_decay=0", "lr=constant", "lr.warmup=0", "optimizer.lr=0.01")
SGD = ("optimizer=sgd", *PLAIN)


def trained(*overrides, count=20, factor=1.0):
    """Weights after ``count`` steps; the loss of shape is multiplied by ``factor``."""
    work = support.make_work(*overrides)
    support.rest_batchnorm(work)
    if factor != 1.0:
        work.engine.priors[0] *= factor
    for step, micro in enumerate(support.steps(work, count)):
        train_step(work, micro, step, 0)
    return support.weights(work)


@pytest.mark.parametrize("momentum", [0, 0.9])
def test_simultaneous_sgd_equals_joint(momentum):
    options = (*SGD, f"optimizer.momentum={momentum}", "optimizer.nesterov=false", "precision=fp64")
    joint = trained(*options)
    alternate = trained("schedule=alternate", "schedule.mode=simultaneous", *options)
    assert (joint - alternate).abs().max() <= 1e-6


def test_same_batch_differs_from_joint():
    joint = trained(*SGD)
    other = trained("schedule=alternate", "schedule.mode=same_batch", *SGD)
    assert (joint - other).abs().max() > 1e-5


@pytest.mark.parametrize("mode", ["simultaneous", "same_batch", "per_step"])
def test_adam_per_task_does_not_see_the_scale(mode):
    options = ("schedule=alternate", f"schedule.mode={mode}", *PLAIN, "precision=fp64")
    options = (*options, "optimizer.eps=1e-30")  # tiny gradients would feel Adam's 1e-8
    once, thousand = trained(*options), trained(*options, factor=1000.0)
    assert (once - thousand).abs().max() <= 1e-4


def test_joint_adam_sees_the_scale():
    once, thousand = trained(*PLAIN), trained(*PLAIN, factor=1000.0)
    assert (once - thousand).abs().max() > 1e-3


def test_per_step_takes_turns():
    """Step of task A leaves the heads of the others bit-identical; the order is A, B, C, A."""
    work = support.make_work("schedule=alternate")
    seen = []
    for step, micro in enumerate(support.steps(work, 4)):
        before = {
            t.name: [p.clone() for p in work.model.task_parameters(t.name)] for t in work.tasks
        }
        train_step(work, micro, step, 0)
        for task in work.tasks:
            moved = any(
                not torch.equal(a, b)
                for a, b in zip(
                    before[task.name], work.model.task_parameters(task.name), strict=True
                )
            )
            if moved:
                seen.append(task.name)
    assert seen == ["shape", "colour", "size", "shape"]


@pytest.mark.parametrize("strategy", ["gradnorm", "pcgrad", "mgda", "graddrop", "cagrad", "famo"])
def test_per_step_refuses_what_needs_all_tasks(strategy):
    with pytest.raises(ConfigError, match="needs all of them in one step"):
        support.make_work("schedule=alternate", f"weighting={strategy}")


def test_what_is_refused_makes_no_run(tmp_path, capsys):
    words = ["schedule=alternate", "weighting=pcgrad", *support.SMALL, f"output_dir={tmp_path}"]
    assert main(["train", *words]) == ConfigError.exit_code
    assert "needs all of them in one step" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strategy", ["gradnorm", "pcgrad", "graddrop"])
def test_simultaneous_refuses_combined_gradients(strategy):
    with pytest.raises(ConfigError, match="every task has its own optimizer"):
        support.make_work(
            "schedule=alternate", "schedule.mode=simultaneous", f"weighting={strategy}"
        )


@pytest.mark.parametrize("strategy", ["equal", "fixed", "uncertainty", "auto_weighted"])
def test_per_step_takes_what_treats_tasks_alone(strategy):
    weights = trained("schedule=alternate", f"weighting={strategy}", count=4)
    assert torch.isfinite(weights).all()


def test_freeze_leaves_the_backbone_bit_identical():
    work = support.make_work("schedule=freeze", "optimizer.weight_decay=0.5")
    set_trainable(work.rows, 0)
    set_train_mode(work.model, work.rows)
    before = support.digest(work.model.backbone.state_dict())
    heads = support.digest(work.model.heads.state_dict())
    for step, micro in enumerate(support.steps(work, 4)):
        train_step(work, micro, step, 0)
    assert support.digest(work.model.backbone.state_dict()) == before
    assert support.digest(work.model.heads.state_dict()) != heads


def test_freeze_refuses_gradient_strategies():
    with pytest.raises(ConfigError, match="none is trained"):
        support.make_work("schedule=freeze", "weighting=pcgrad")


def test_a_probe_stage_takes_gradient_strategies():
    """The backbone rests in one stage of two: see test_observe for what the heads then do."""
    work = support.make_work("schedule=transfer", "weighting=pcgrad")
    assert all(row.frozen for row in work.rows if row.name.startswith("backbone."))


def test_finetune_sets_the_ratio():
    work = support.make_work("schedule=finetune", "lr_mult.heads.size=2")
    factors = {row.name: row.lr_mult for row in work.rows}
    assert all(v == 0.1 for n, v in factors.items() if n.startswith("backbone."))
    assert all(v == 2 for n, v in factors.items() if n.startswith("heads.size."))
    train_step(work, support.first_step(work), 0, 0)
    rates = {g["lr_mult"]: g["lr"] for g in work.optimizers["model"].param_groups}
    assert rates[0.1] == pytest.approx(0.1 * rates[1.0])
    assert rates[2] == pytest.approx(2 * rates[1.0])


def test_layer_decay_grows_towards_the_heads():
    work = support.make_work("layer_decay=0.5")
    layers = work.model.layers()
    first = [r.lr_mult for r in work.rows if r.name.startswith(f"backbone.{layers[0][1][0]}")]
    last = [r.lr_mult for r in work.rows if r.name.startswith(f"backbone.{layers[-1][1][0]}")]
    assert set(first) == {0.5 ** len(layers)}
    assert set(last) == {0.5}


def test_unfreeze_at():
    work = support.make_work("unfreeze_at.backbone=1")
    before = support.digest(work.model.backbone.state_dict())
    for epoch in (0, 1):
        set_trainable(work.rows, epoch)
        set_train_mode(work.model, work.rows)
        train_step(work, support.first_step(work), epoch, epoch)
        moved = support.digest(work.model.backbone.state_dict()) != before
        assert moved == (epoch == 1)


def test_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ConfigError, match="freeze: 'backbon' matches no parameter; did you mean"):
        support.make_work("freeze=[backbon]")


def test_task_lr():
    work = support.make_work("schedule=alternate", "+schedule.task_lr.size=0.5", *PLAIN)
    for step, micro in enumerate(support.steps(work, 3)):
        train_step(work, micro, step, 0)
    rates = {name: o.param_groups[0]["lr"] for name, o in work.optimizers.items()}
    assert rates["size"] == pytest.approx(0.5 * rates["shape"])
