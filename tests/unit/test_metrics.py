"""Metrics against values worked out by hand; the constant predictor; decoding."""

import math

import pytest
import torch

from mtl_cli.errors import ConfigError
from mtl_cli.metric_names import METRICS
from mtl_cli.metrics import TaskMetrics, constant_raw, direction, gain, predict
from mtl_cli.task import Task

AGE = Task("age", "regression", unit="years", center=30.0, scale=10.0)
GENDER = Task("gender", "binary", ("male", "female"))
RACE = Task("race", "multiclass", ("a", "b", "c"))
TAGS = Task("tags", "multilabel", ("x", "y", "z"))


def computed(task, raw, target, valid=None):
    metrics = TaskMetrics(task)
    target = torch.as_tensor(target)
    valid = torch.ones_like(target, dtype=torch.bool) if valid is None else torch.as_tensor(valid)
    metrics.update(torch.as_tensor(raw), target, valid)
    return metrics, metrics.compute()


def test_regression_is_in_the_tasks_unit():
    raw, target = [[0.0], [1.0], [2.0]], [0.5, 1.0, 1.0]  # errors 5, 0 and 10 years
    _, values = computed(AGE, raw, target)
    assert values["mae"] == pytest.approx(5.0)
    assert values["mse"] == pytest.approx(125 / 3)
    assert values["rmse"] == pytest.approx(math.sqrt(125 / 3))
    assert values["r2"] == pytest.approx(1 - 1.25 / (1 / 6))


def test_r2_does_not_cancel_far_from_zero():
    price = Task("price", "regression", center=1e9, scale=1.0)
    target = torch.randn(100)
    _, values = computed(price, 0.5 * target[:, None], target)
    residual = 0.25 * (target**2).sum() / ((target - target.mean()) ** 2).sum()
    assert values["r2"] == pytest.approx(1 - float(residual), rel=1e-6)


def test_binary_by_hand():
    # decisions 1 1 0 0 1, labels 1 0 0 1 1: tp 2, fp 1, fn 1, tn 1
    _, values = computed(GENDER, [[2.0], [0.1], [-1.0], [-0.2], [3.0]], [1.0, 0.0, 0.0, 1.0, 1.0])
    assert values["accuracy"] == pytest.approx(0.6)
    assert values["precision"] == values["recall"] == values["f1"] == pytest.approx(2 / 3)
    assert values["auroc"] == pytest.approx(5 / 6)


def test_small_logits_are_not_taken_for_probabilities():
    _, values = computed(GENDER, [[0.2], [0.4]], [1.0, 1.0])
    assert values["accuracy"] == 1.0  # 0.2 as a probability would be a no


def test_auroc_keeps_large_logits_apart():
    _, values = computed(GENDER, torch.tensor([[20.0], [21.0], [22.0]]), [0.0, 1.0, 1.0])
    assert values["auroc"] == 1.0


def test_multiclass_by_hand():
    raw = torch.eye(3)[[0, 0, 1, 1, 0]]
    _, values = computed(RACE, raw, [0, 0, 0, 1, 1])  # class c has neither label nor prediction
    assert values["accuracy"] == pytest.approx(0.6)
    assert values["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert values["f1"] == pytest.approx((4 / 6 + 1 / 2) / 2)


def test_balanced_accuracy_leaves_out_classes_without_labels():
    _, values = computed(RACE, torch.eye(3)[[0, 2]], [0, 0])
    assert values["balanced_accuracy"] == pytest.approx(0.5)


def test_multilabel_by_hand_with_missing_cells():
    raw = [[1.0, -1.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 2.0, 1.0]]
    target = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    valid = [[True, True, False], [True, True, False], [True, True, True]]
    metrics, values = computed(TAGS, raw, target, valid)
    # x: right wrong right; y: right right wrong; z: wrong, and without positives
    assert values["accuracy"] == pytest.approx(4 / 7)
    assert values["f1"] == pytest.approx(2 / 3)
    assert values["map"] == pytest.approx(0.5)
    assert values["auroc"] == pytest.approx((0.75 + 0.5) / 2)
    assert [row["labels"] for row in metrics.per_class()] == [1, 1, 0]
    assert metrics.per_class()[2] == {
        "class": "z",
        "labels": 0,
        "precision": 0.0,
        "recall": None,
        "f1": None,
    }


def test_multilabel_with_a_single_label():
    one = Task("tags", "multilabel", ("x",))
    metrics, values = computed(one, [[1.0], [-1.0]], [[1.0], [0.0]])
    assert set(values.values()) == {1.0}
    assert metrics.per_class()[0]["labels"] == 1


def test_masked_samples_do_not_count():
    valid = [True, False]
    _, values = computed(AGE, [[0.0], [9.0]], [0.0, float("nan")], valid)
    assert values["mae"] == 0.0
    _, values = computed(GENDER, [[1.0], [float("nan")]], [1.0, 0.0], valid)
    assert values["accuracy"] == 1.0


@pytest.mark.parametrize("task", [AGE, GENDER, RACE, TAGS], ids=lambda t: t.kind)
def test_batches_equal_the_whole(task):
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(40, task.width, generator=generator)
    shape = (40, 3) if task is TAGS else (40,)
    target = torch.randint(0, 3 if task is RACE else 2, shape, generator=generator)
    target = target if task is RACE else target.float()
    valid = torch.rand(shape, generator=generator) < 0.8
    _, whole = computed(task, raw, target, valid)
    metrics = TaskMetrics(task)
    for rows in (slice(0, 7), slice(7, 8), slice(8, 40)):
        metrics.update(raw[rows], target[rows], valid[rows])
    assert metrics.compute() == whole
    assert set(whole) == set(METRICS[task.kind])
    assert all(isinstance(value, float) for value in whole.values())


@pytest.mark.parametrize("task", [AGE, GENDER, RACE, TAGS], ids=lambda t: t.kind)
def test_no_labels_is_none_with_a_reason(task):
    metrics = TaskMetrics(task)
    assert set(metrics.compute().values()) == {None}
    target = torch.zeros((2, 3) if task is TAGS else 2, dtype=torch.int64)
    metrics.update(torch.zeros(2, task.width), target, torch.zeros_like(target, dtype=torch.bool))
    assert set(metrics.compute().values()) == {None}
    assert set(metrics.reasons.values()) == {"no labels"}
    assert metrics.per_class() == []


@pytest.mark.parametrize(
    ("task", "raw", "target", "undefined"),
    [
        (GENDER, [[1.0], [2.0]], [0.0, 0.0], {"auroc", "f1", "recall"}),
        (GENDER, [[1.0], [2.0]], [1.0, 1.0], {"auroc"}),
        (AGE, [[1.0]], [0.0], {"r2"}),
        (TAGS, [[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]], {"auroc", "f1", "map"}),
        (TAGS, [[1.0, 1.0, 1.0]], [[1.0, 0.0, 0.0]], {"auroc"}),
    ],
)
def test_undefined_metrics_are_none(task, raw, target, undefined):
    metrics, values = computed(task, raw, target)
    assert {name for name, value in values.items() if value is None} == undefined
    assert set(metrics.reasons) == undefined


def test_non_finite_outputs_are_none_not_a_number():
    metrics, values = computed(RACE, [[float("nan"), 0.0, 1.0]], [1])
    assert set(values.values()) == {None}
    assert set(metrics.reasons.values()) == {"outputs are not finite"}


def test_per_class_of_a_binary_task_names_both_classes():
    metrics, _ = computed(GENDER, [[2.0], [0.1], [-1.0]], [1.0, 0.0, 0.0])
    assert [(r["class"], r["labels"], r["recall"]) for r in metrics.per_class()] == [
        ("male", 2, 0.5),
        ("female", 1, 1.0),
    ]


def test_only_the_metrics_asked_for_and_no_others():
    asked = Task("race", "multiclass", ("a", "b"), metrics=("f1",))
    assert TaskMetrics(asked).names == ("f1",)
    with pytest.raises(ConfigError, match=r"metrics\.race.*found acuracy.*did you mean 'accuracy'"):
        TaskMetrics(Task("race", "multiclass", ("a", "b"), metrics=("acuracy",)))


@pytest.mark.parametrize(
    ("task", "baseline", "raw"),
    [
        (AGE, -0.3, [-0.3]),
        (GENDER, 0.0, [-1.0]),
        (GENDER, 1.0, [1.0]),
        (RACE, 2.0, [0.0, 0.0, 1.0]),
        (TAGS, [1.0, 0.0, 0.0], [1.0, -1.0, -1.0]),
    ],
)
def test_constant_predictor(task, baseline, raw):
    torch.testing.assert_close(constant_raw(task, baseline), torch.tensor(raw))


def test_constant_predictor_goes_through_the_same_metrics():
    constant = constant_raw(AGE, 0.0).expand(3, 1)
    _, values = computed(AGE, constant, [-1.0, 0.0, 2.0])
    assert values["mae"] == pytest.approx(10.0)
    _, values = computed(GENDER, constant_raw(GENDER, 1.0).expand(4, 1), [1.0, 1.0, 1.0, 0.0])
    assert values["accuracy"] == 0.75
    assert values["auroc"] == 0.5


def test_gain_is_positive_when_better():
    assert gain(6.0, 15.0, "min") == pytest.approx(0.6)
    assert gain(0.9, 0.6, "max") == pytest.approx(0.5)
    assert gain(18.0, 15.0, "min") == pytest.approx(-0.2)
    assert gain(0.8, 0.0, "max") == pytest.approx(0.8)
    assert gain(0.8, -0.1, "max") == pytest.approx(0.9)
    assert gain(0.5, 0.0, "min") == pytest.approx(-0.5)


def test_direction_is_the_same_in_every_kind():
    for directions in METRICS.values():
        assert all(direction(name) == found for name, found in directions.items())
    with pytest.raises(KeyError):
        direction("nonsense")


def test_predictions_are_in_units_and_class_names():
    assert predict(AGE, torch.tensor([0.5])) == {"value": 35.0, "unit": "years"}
    decoded = predict(GENDER, torch.tensor([math.log(3.0)]))
    assert decoded["class"] == "female"
    assert decoded["probabilities"] == pytest.approx({"male": 0.25, "female": 0.75})
    decoded = predict(RACE, torch.tensor([0.0, math.log(2.0), 0.0]))
    assert decoded["class"] == "b"
    assert decoded["probabilities"] == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25})
    decoded = predict(TAGS, torch.tensor([-1.0, 2.0, 0.5]))
    assert decoded["labels"] == ["y", "z"]
    assert predict(Task("b", "binary"), torch.tensor([-1.0]))["class"] == "0"
