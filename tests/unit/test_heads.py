"""Heads: widths for every kind, what they read, what they refuse."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml

from mtl_cli import heads
from mtl_cli.errors import ConfigError
from mtl_cli.heads import MLP, Linear
from mtl_cli.task import Task

CONF = Path(__file__).parents[2] / "conf" / "head"
TASKS = [
    (Task("age", "regression"), 1),
    (Task("gender", "binary", ("male", "female")), 1),
    (Task("race", "multiclass", tuple("abcde")), 5),
    (Task("tags", "multilabel", tuple("abc")), 3),
]
AGE = TASKS[0][0]


@pytest.mark.parametrize(("task", "width"), TASKS, ids=lambda v: getattr(v, "kind", ""))
@pytest.mark.parametrize("head", [Linear, MLP])
def test_raw_output_has_the_width_of_the_task(head, task, width):
    raw = head({"pool": 8}, task)({"pool": torch.randn(4, 8)})
    assert raw.shape == (4, width)


def modules(head):
    return [type(m).__name__ for m in head.layers]


def test_mlp_is_as_wide_as_the_feature_by_default():
    head = MLP({"pool": 6}, AGE)
    assert modules(head) == ["Linear", "ReLU", "Linear"]
    assert [tuple(m.weight.shape) for m in head.layers if hasattr(m, "weight")] == [(6, 6), (1, 6)]


def test_mlp_with_several_widths_and_dropout():
    head = MLP({"pool": 6}, AGE, hidden=[5, 4], dropout=0.5)
    assert modules(head) == ["Dropout", "Linear", "ReLU"] * 2 + ["Dropout", "Linear"]
    assert head.layers[-1].weight.shape == (1, 4)


def test_linear_is_affine():
    head = Linear({"pool": 3}, AGE)
    x = torch.randn(2, 3)
    expected = x @ head.layers[0].weight.T + head.layers[0].bias
    torch.testing.assert_close(head({"pool": x}), expected)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 20, 3)])
def test_maps_and_tokens_are_averaged(shape):
    head = Linear({"f": 3}, AGE, feature="f")
    x = torch.randn(shape)
    mean = x.flatten(2).mean(2) if x.ndim == 4 else x.mean(1)
    torch.testing.assert_close(head({"f": x}), head({"f": mean}))


def test_unknown_feature_names_what_there_is():
    with pytest.raises(ConfigError, match=r"heads\.age\.feature.*found poll, expected one of pool"):
        Linear({"pool": 3}, AGE, feature="poll")


def test_bad_numbers_are_reported_together():
    with pytest.raises(ConfigError) as caught:
        MLP({"pool": 3}, AGE, hidden=0, dropout=1.0)
    assert len(caught.value.problems) == 2


def test_kind_that_a_head_does_not_serve_is_refused():
    class OnlyClasses(Linear):
        kinds = ("multiclass",)

    with pytest.raises(ConfigError, match=r"found regression, expected multiclass"):
        OnlyClasses({"pool": 3}, AGE)


@pytest.mark.parametrize("path", sorted(CONF.glob("*.yaml")), ids=lambda p: p.stem)
def test_yaml_is_the_signature(path):
    node = yaml.safe_load(path.read_text())
    cls = getattr(heads, node.pop("_target_").rsplit(".", 1)[1])
    parameters = dict(inspect.signature(cls).parameters)
    assert parameters.pop("channels")
    assert parameters.pop("task")
    assert node == {key: parameter.default for key, parameter in parameters.items()}
