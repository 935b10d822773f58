"""The routes of the engine against a naive reference: one autograd call per task, flat rows."""

from __future__ import annotations

import pytest
import torch

from mtl_cli import passes
from mtl_cli.data.base import normalise
from mtl_cli.errors import ConfigError
from mtl_cli.params import set_train_mode, set_trainable
from mtl_cli.passes import label_counts
from mtl_cli.rows import gramian_of
from mtl_cli.train import train_step
from mtl_cli.weighting.base import GramianWeighting
from tests import support


def naive_rows(work, batch):
    """Losses [T] and gradient rows [T,P] over the shared parameters, by the definition."""
    counts = label_counts(work, [batch])
    features = work.model.features(normalise(batch.images).double())
    losses, rows, heads = [], [], []
    for i, objective in enumerate(work.objectives):
        name = objective.task
        raw = work.model.outputs(features, [name])[name]
        total = work.losses[name](raw, batch.targets[name], batch.valid[name])[0] / counts[i, 0]
        shared, own = work.model.shared_parameters(), work.model.task_parameters(name)
        grads = torch.autograd.grad(total, [*shared, *own], retain_graph=True)
        losses.append(total.detach())
        rows.append(torch.cat([g.flatten() for g in grads[: len(shared)]]))
        heads.append(torch.cat([g.flatten() for g in grads[len(shared) :]]))
    return torch.stack(losses), torch.stack(rows), heads


def applied(work, before):
    """Gradients that plain SGD applied, from the change of the weights."""
    lr = work.optimizers["model"].param_groups[0]["lr"]
    after = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    return {name: (before[name] - after[name]) / lr for name in before}


def flat(grads, prefix):
    return torch.cat([g.flatten() for name, g in grads.items() if name.startswith(prefix)])


SGD = (
    "optimizer=sgd",
    "optimizer.momentum=0",
    "optimizer.nesterov=false",
    "optimizer.weight_decay=0",
)


@pytest.mark.parametrize("strategy", ["mgda", "pcgrad", "cagrad", "upgrad", "nash_mtl", "imtl_g"])
@pytest.mark.parametrize("heads", ["own", "weighted"])
def test_exact_rows(strategy, heads):
    work = support.make_work(
        f"weighting={strategy}", f"weighting.heads={heads}", "precision=fp64", *SGD
    )
    support.punch_holes(work.data)
    support.rest_batchnorm(work)
    (batch,) = support.first_step(work)
    losses, rows, head_rows = naive_rows(work, batch)
    assert isinstance(work.weighting, GramianWeighting)
    present = torch.arange(3)
    expected = work.weighting.row_weights(rows @ rows.T, losses, present, 0)
    before = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    (report,) = train_step(work, [batch], 0, 0)
    grads = applied(work, before)
    torch.testing.assert_close(report.weights, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(grads, "backbone."), expected @ rows, rtol=1e-8, atol=1e-10)
    factors = work.weighting.head_weights(expected, present)
    assert bool((factors == 1).all()) == (heads == "own")
    for k, task in enumerate(work.tasks):
        factor = factors[k]
        found = flat(grads, f"heads.{task.name}.")
        torch.testing.assert_close(found, head_rows[k] * factor, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("wrt", ["shared", "last_shared", "features"])
def test_gramian_of_each_scope(wrt):
    """The Gramian is that of the declared scope; the step applies its weights to exact rows."""
    work = support.make_work("weighting=mgda", f"weighting.wrt={wrt}", "precision=fp64", *SGD)
    support.rest_batchnorm(work)
    (batch,) = support.first_step(work)
    _, rows, _ = naive_rows(work, batch)
    features = work.model.features(normalise(batch.images).double())
    scope = {
        "shared": work.model.shared_parameters(),
        "last_shared": work.model.last_shared(),
        "features": [features["pool"]],
    }[wrt]
    counts = label_counts(work, [batch])
    wanted = []
    for i, task in enumerate(work.tasks):
        raw = work.model.outputs(features, [task.name])[task.name]
        loss = work.losses[task.name](raw, batch.targets[task.name], batch.valid[task.name])[0]
        grads = torch.autograd.grad(loss / counts[i, 0], scope, retain_graph=True)
        wanted.append(torch.cat([g.flatten() for g in grads]))
    gramian = torch.stack(wanted) @ torch.stack(wanted).T
    before = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    (report,) = train_step(work, [batch], 0, 0)
    torch.testing.assert_close(report.gramian, gramian, rtol=1e-9, atol=1e-14)
    found = flat(applied(work, before), "backbone.")
    torch.testing.assert_close(found, report.weights @ rows, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("transform", ["identity", "log"])
def test_kept_weights_reach_the_heads_as_solved_ones_do(transform):
    """Nash weighs the heads by its solution, the shared part by the shortened one: in each step."""
    options = ("weighting=nash_mtl", "weighting.update_every=2", f"weighting.transform={transform}")
    work = support.make_work(*options, "precision=fp64", *SGD)
    support.rest_batchnorm(work)
    train_step(work, support.first_step(work), 0, 0)
    assert float(work.weighting.shortening) < 1
    (batch,) = support.first_step(work)
    losses, rows, head_rows = naive_rows(work, batch)
    before = {name: p.detach().clone() for name, p in work.model.named_parameters()}
    (report,) = train_step(work, [batch], 1, 0)
    grads = applied(work, before)
    torch.testing.assert_close(
        flat(grads, "backbone."), report.weights @ rows, rtol=1e-8, atol=1e-10
    )
    heads = report.weights / work.weighting.shortening
    for k, task in enumerate(work.tasks):
        found = flat(grads, f"heads.{task.name}.")
        torch.testing.assert_close(found, head_rows[k] * heads[k], rtol=1e-8, atol=1e-10)


def test_imtl_scales_the_heads_while_the_backbone_rests():
    options = ("weighting=imtl", "weighting.init=1.0", "unfreeze_at.backbone=1")
    work = support.make_work(*options, "precision=fp64", *SGD)
    set_trainable(work.rows, 0)
    set_train_mode(work.model, work.rows)
    (batch,) = support.first_step(work)
    counts = label_counts(work, [batch])
    name, head = work.tasks[0].name, work.model.task_parameters(work.tasks[0].name)
    raw = work.model(normalise(batch.images).double())[name]
    loss = work.losses[name](raw, batch.targets[name], batch.valid[name])[0] / counts[0, 0]
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, head)])
    before = {n: p.detach().clone() for n, p in work.model.named_parameters()}
    train_step(work, [batch], 0, 0)
    found = flat(applied(work, before), f"heads.{name}.")
    torch.testing.assert_close(found, torch.e * wanted, rtol=1e-8, atol=1e-10)


def test_a_step_without_labels_leaves_no_hook():
    work = support.make_work("weighting=gradnorm")
    for name in work.data.valid:
        work.data.valid[name] = torch.zeros_like(work.data.valid[name])
    train_step(work, support.first_step(work), 0, 0)
    assert not work.model.last_layer()._forward_hooks


@pytest.mark.parametrize("strategy", ["db_mtl", "moco"])
@pytest.mark.parametrize("every", [1, 3])
def test_averaged_rows_move_and_are_used_in_every_step(strategy, every):
    """Also where the weights are kept: the first step applies a share of the gradient."""
    options = (f"weighting={strategy}", f"weighting.update_every={every}", "precision=fp64", *SGD)
    work = support.make_work(*options)
    for step, micro in enumerate(support.steps(work, 4)):
        train_step(work, micro, step, 0)
    assert work.weighting.steps.tolist() == [4, 4, 4]


@pytest.mark.parametrize("strategy", ["db_mtl", "moco", "excess_mtl", "modo", "sdmgrad"])
def test_strategies_that_keep_rows_have_one_scope(strategy):
    with pytest.raises(ConfigError, match=r"weighting\.wrt"):
        support.make_work(f"weighting={strategy}", "weighting.wrt=features")


def test_gramian_in_float32_is_accurate():
    """Per-tensor products added in float64; one flat float32 product is off by far more."""
    generator = torch.Generator().manual_seed(0)
    scales = [30.0, 1.0, 0.01]
    rows = [
        [torch.randn(400_000, generator=generator) * s + 0.01 * s for s in scales] for _ in range(3)
    ]
    exact = torch.stack([torch.cat(row).double() for row in rows])
    exact = exact @ exact.T
    norm = exact.diagonal().sqrt()
    error = ((gramian_of(rows) - exact) / torch.outer(norm, norm)).abs().max()
    assert error <= 2e-5


@pytest.mark.parametrize("strategy", ["equal", "uncertainty", "gradnorm", "pcgrad", "graddrop"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_backbone_runs_once_per_micro_batch(strategy, accumulate):
    work = support.make_work(f"weighting={strategy}", f"accumulate={accumulate}")
    calls = []
    work.model.backbone.register_forward_hook(lambda *_: calls.append(1))
    tracked = next(b for n, b in work.model.named_buffers() if n.endswith("num_batches_tracked"))
    start = int(tracked)
    train_step(work, support.first_step(work), 0, 0)
    assert len(calls) == accumulate
    assert int(tracked) == start + accumulate


def test_absent_task_rests():
    """A task without a label in the step keeps head, moments and strategy state as they were."""
    work = support.make_work("weighting=uncertainty", "optimizer.weight_decay=0.5")
    train_step(work, support.first_step(work), 0, 0)
    for split in work.data.valid:
        work.data.valid[split] = work.data.valid[split].clone()
    work.data.valid["size"][:] = False
    before = {n: p.detach().clone() for n, p in work.model.heads["size"].named_parameters()}
    log_variance = next(iter(work.weighting.parameters())).detach().clone()
    (report,) = train_step(work, support.first_step(work), 1, 0)
    assert report.present.tolist() == [0, 1]
    for name, parameter in work.model.heads["size"].named_parameters():
        assert torch.equal(parameter, before[name])
    assert next(iter(work.weighting.parameters())).detach()[2] == log_variance[2]


def test_nothing_labelled_changes_nothing():
    work = support.make_work()
    for name in work.data.valid:
        work.data.valid[name] = torch.zeros_like(work.data.valid[name])
    before = support.weights(work)
    (report,) = train_step(work, support.first_step(work), 0, 0)
    assert report.present.tolist() == []
    assert torch.equal(before, support.weights(work))


def test_skipped_step_leaves_no_trace(monkeypatch):
    """A non-finite loss touches neither weights, BatchNorm statistics, moments nor strategy."""
    work = support.make_work("weighting=gradnorm", "ema.decay=0.9")
    train_step(work, support.first_step(work), 0, 0)

    def state():
        parts = [work.model.state_dict(), work.ema.state_dict(), work.weighting.state_dict()]
        return support.digest([*parts, work.optimizers["model"].state_dict()["state"]])

    before = state()
    original = passes.loss_sums
    monkeypatch.setattr(
        passes, "loss_sums", lambda *a: {k: v * float("nan") for k, v in original(*a).items()}
    )
    (report,) = train_step(work, support.first_step(work), 1, 0)
    assert not report.finite
    assert state() == before
    monkeypatch.setattr(passes, "loss_sums", original)
    (report,) = train_step(work, support.first_step(work), 2, 0)
    assert report.finite
    assert state() != before
