"""Losses: equal to torch on the valid labels, exactly absent on the others."""

import inspect
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from mtl_cli import losses
from mtl_cli.errors import ConfigError, DataError
from mtl_cli.losses import BCE, L1, MSE, CrossEntropy, MultilabelBCE, SmoothL1
from mtl_cli.task import Task

CONF = Path(__file__).parents[2] / "conf" / "loss"
AGE = Task("age", "regression", unit="years")
GENDER = Task("gender", "binary", ("male", "female"))
RACE = Task("race", "multiclass", tuple("abc"))
TAGS = Task("tags", "multilabel", ("x", "y"))
WEIGHTS = [0.5, 2.0, 3.0]

# name: loss, reference sum over the given rows, denominator over the given rows
CASES = {
    "l1": (L1(AGE), lambda r, t: F.l1_loss(r[:, 0], t, reduction="sum")),
    "mse": (MSE(AGE), lambda r, t: F.mse_loss(r[:, 0], t, reduction="sum")),
    "smooth_l1": (
        SmoothL1(AGE, beta=0.3),
        lambda r, t: F.smooth_l1_loss(r[:, 0], t, reduction="sum", beta=0.3),
    ),
    "bce": (
        BCE(GENDER),
        lambda r, t: F.binary_cross_entropy_with_logits(r[:, 0], t, reduction="sum"),
    ),
    "bce_weighted": (
        BCE(GENDER, pos_weight=3.0),
        lambda r, t: F.binary_cross_entropy_with_logits(
            r[:, 0], t, reduction="sum", pos_weight=torch.tensor(3.0)
        ),
    ),
    "cross_entropy": (CrossEntropy(RACE), lambda r, t: F.cross_entropy(r, t, reduction="sum")),
    "cross_entropy_weighted": (
        CrossEntropy(RACE, label_smoothing=0.1, class_weights=WEIGHTS),
        lambda r, t: F.cross_entropy(
            r, t, torch.tensor(WEIGHTS), reduction="sum", label_smoothing=0.1
        ),
    ),
    "multilabel": (
        MultilabelBCE(TAGS),
        lambda r, t: F.binary_cross_entropy_with_logits(r, t, reduction="sum"),
    ),
}
SAMPLES = 5


def batch(task, samples=SAMPLES):
    generator = torch.Generator().manual_seed(1)
    raw = 2 * torch.randn(samples, task.width, generator=generator)
    if task.kind == "multiclass":
        return raw, torch.randint(0, task.width, (samples,), generator=generator)
    if task.kind == "regression":
        return raw, torch.randn(samples, generator=generator)
    shape = (samples, task.width) if task.kind == "multilabel" else (samples,)
    return raw, torch.randint(0, 2, shape, generator=generator).float()


def poisoned(target, valid):
    """Targets whose invalid entries would spoil everything that touches them."""
    bad = -100 if target.dtype == torch.int64 else float("nan")
    return torch.where(valid, target, torch.full_like(target, bad))


@pytest.mark.parametrize("name", CASES)
def test_every_mask_equals_dropping(name):
    loss, reference = CASES[name]
    raw, target = batch(loss.task)
    for pattern in itertools.product([False, True], repeat=SAMPLES):
        rows = torch.tensor(pattern)
        valid = rows if target.ndim == 1 else rows[:, None].expand_as(target)
        leaf = raw.clone().requires_grad_()
        (total,) = loss(leaf, poisoned(target, valid), valid)
        (grad,) = torch.autograd.grad(total, leaf)
        kept = raw[rows].clone().requires_grad_()
        expected = reference(kept, target[rows])
        torch.testing.assert_close(total, expected)
        assert bool((grad[~rows] == 0).all())
        if rows.any():
            (expected_grad,) = torch.autograd.grad(expected, kept)
            torch.testing.assert_close(grad[rows], expected_grad)
        counts = loss.count(poisoned(target, valid), valid)
        assert counts.dtype == torch.float64
        assert counts[0, 1] == valid.sum()


@pytest.mark.parametrize("name", CASES)
def test_sum_over_denominator_is_torchs_mean(name):
    loss, _ = CASES[name]
    raw, target = batch(loss.task)
    valid = torch.ones_like(target, dtype=torch.bool)
    mean = loss(raw, target, valid)[0] / loss.count(target, valid)[0, 0]
    if name == "cross_entropy_weighted":
        expected = F.cross_entropy(raw, target, torch.tensor(WEIGHTS), label_smoothing=0.1)
    else:
        expected = CASES[name][1](raw, target) / target.numel()
    torch.testing.assert_close(mean.float(), expected)


@pytest.mark.parametrize("name", CASES)
def test_sums_and_counts_add_up_over_any_split(name):
    loss, _ = CASES[name]
    raw, target = batch(loss.task, samples=9)
    valid = torch.rand(target.shape, generator=torch.Generator().manual_seed(3)) < 0.6
    whole, parts = loss(raw, target, valid), torch.zeros(1)
    counts = torch.zeros(1, 2, dtype=torch.float64)
    for rows in ([0, 1], [2, 3, 4, 5], [6, 7, 8]):
        parts = parts + loss(raw[rows], target[rows], valid[rows])
        counts = counts + loss.count(target[rows], valid[rows])
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(counts, loss.count(target, valid))


def test_every_cell_mask_of_a_multilabel_target():
    loss = MultilabelBCE(TAGS)
    raw, target = batch(TAGS, samples=2)
    cells = F.binary_cross_entropy_with_logits(raw, target, reduction="none")
    for pattern in itertools.product([False, True], repeat=4):
        valid = torch.tensor(pattern).view(2, 2)
        leaf = raw.clone().requires_grad_()
        (total,) = loss(leaf, poisoned(target, valid), valid)
        (grad,) = torch.autograd.grad(total, leaf)
        torch.testing.assert_close(total, cells[valid].sum())
        assert torch.equal(grad != 0, valid)
        assert loss.count(target, valid).tolist() == [[sum(pattern), sum(pattern)]]


def test_multilabel_sum_counts_samples():
    loss = MultilabelBCE(TAGS, over_labels="sum")
    valid = torch.tensor([[True, True], [False, True], [False, False]])
    assert loss.count(torch.zeros(3, 2), valid).tolist() == [[2, 3]]


def test_class_weights_are_the_denominator_from_targets_only():
    loss = CrossEntropy(RACE, class_weights=WEIGHTS)
    counts = loss.count(torch.tensor([0, 1, 2, -5]), torch.tensor([True, False, True, False]))
    assert counts.tolist() == [[3.5, 2]]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_non_finite_output_of_an_unlabelled_sample_does_not_spread(name, poison):
    loss, _ = CASES[name]
    raw, target = batch(loss.task)
    raw[0] = poison
    raw.requires_grad_()
    valid = torch.ones_like(target, dtype=torch.bool)
    valid[0] = False
    (total,) = loss(raw, target, valid)
    (grad,) = torch.autograd.grad(total, raw)
    assert bool(torch.isfinite(total))
    assert bool((grad[0] == 0).all())
    assert bool(torch.isfinite(grad).all())


@pytest.mark.parametrize("name", CASES)
def test_non_finite_output_of_a_labelled_sample_is_not_hidden(name):
    loss, _ = CASES[name]
    raw, target = batch(loss.task)
    raw[0] = float("nan")
    assert bool(torch.isnan(loss(raw, target, torch.ones_like(target, dtype=torch.bool))))


@pytest.mark.parametrize("name", CASES)
def test_precision_is_at_least_float32(name):
    loss, _ = CASES[name]
    raw, target = batch(loss.task)
    valid = torch.ones_like(target, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(raw.bfloat16(), target, valid)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(raw.bfloat16().float(), target, valid))
    assert loss(raw.double(), target, valid).dtype == torch.float64


def test_logits_of_a_thousand_stay_finite():
    raw = torch.tensor([[1e3], [-1e3]], requires_grad=True)
    total = BCE(GENDER)(raw, torch.tensor([0.0, 1.0]), torch.tensor([True, True]))
    assert total.tolist() == [2000.0]


@pytest.mark.parametrize("bad", [-1, 3])
def test_class_out_of_range_is_a_data_error(bad):
    target, valid = torch.tensor([0, bad]), torch.tensor([True, True])
    with pytest.raises(DataError, match=f"task race.*found {bad}, expected 0 to 2"):
        CrossEntropy(RACE)(torch.zeros(2, 3), target, valid)
    with pytest.raises(DataError):
        CrossEntropy(RACE, class_weights=WEIGHTS).count(target, valid)


def test_binary_target_out_of_range_is_a_data_error():
    with pytest.raises(DataError, match=r"task gender.*found 3"):
        BCE(GENDER)(torch.zeros(1, 1), torch.tensor([3.0]), torch.tensor([True]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: L1(RACE), "found multiclass, expected regression"),
        (lambda: SmoothL1(AGE, beta=0.0), "beta"),
        (lambda: BCE(GENDER, pos_weight=-1.0), "pos_weight"),
        (lambda: CrossEntropy(RACE, label_smoothing=1.0), "label_smoothing"),
        (lambda: CrossEntropy(RACE, class_weights=[1.0, 2.0]), "needs 3 finite"),
        (lambda: CrossEntropy(RACE, class_weights=[1.0, 0.0, 1.0]), "> 0"),
        (lambda: MultilabelBCE(TAGS, pos_weight=[1.0]), "needs 2 finite"),
        (lambda: MultilabelBCE(TAGS, over_labels="max"), "over_labels"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_likelihoods_decide_the_form_of_uncertainty():
    found = {cls.__name__: cls.likelihoods for cls in (L1, SmoothL1, MSE, BCE, CrossEntropy)}
    assert found == {
        "L1": ("laplace",),
        "SmoothL1": ("laplace",),
        "MSE": ("gaussian",),
        "BCE": ("categorical",),
        "CrossEntropy": ("categorical",),
    }


def test_losses_put_nothing_into_checkpoints():
    assert not CrossEntropy(RACE, class_weights=WEIGHTS).state_dict()


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_yaml_is_the_signature(path):
    node = yaml.safe_load(path.read_text())
    cls = getattr(losses, node.pop("_target_").rsplit(".", 1)[1])
    parameters = dict(inspect.signature(cls).parameters)
    assert parameters.pop("task")
    assert node == {key: parameter.default for key, parameter in parameters.items()}
