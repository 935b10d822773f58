"""Splits and labels: exact values by hand."""

import math

import pytest
import torch

from mtl_cli.data import labels, split
from mtl_cli.data.base import Table
from mtl_cli.data.labels import Problem
from mtl_cli.errors import ConfigError, DataError
from mtl_cli.task import Task

NAN = math.nan


def _table(values, **more):
    count = len(next(iter(values.values())))
    raw = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    names = [f"{i}.jpg" for i in range(count)]
    return Table(names, [f"t.csv:{i + 2}" for i in range(count)], raw, **more)


def test_split_is_80_10_10_and_only_its_seed_moves_it():
    first = split.assign(100, 0, None, None)
    assert [len(first[n]) for n in split.SPLITS] == [80, 10, 10]
    assert sorted(row for rows in first.values() for row in rows) == list(range(100))
    assert split.assign(100, 0, None, None) == first
    assert split.assign(100, 1, None, None) != first


def test_groups_stay_together():
    group = [f"g{i // 7}" for i in range(210)]
    parts = split.assign(210, 3, None, group)
    owners = [{group[row] for row in rows} for rows in parts.values()]
    assert sum(map(len, owners)) == len(set().union(*owners))
    assert 21 <= len(parts["val"]) <= 27
    assert sum(map(len, parts.values())) == 210


def test_rows_without_a_group_are_on_their_own():
    parts = split.assign(100, 0, None, [""] * 100)
    assert [len(parts[n]) for n in split.SPLITS] == [80, 10, 10]


def test_one_group_cannot_be_split():
    with pytest.raises(DataError, match="expected at least 3"):
        split.assign(50, 0, None, ["same"] * 50)


def test_given_split_wins_and_a_missing_validation_is_drawn_from_train():
    given = ["train"] * 6 + ["val"] * 2 + ["test"] * 2
    parts = split.assign(10, 0, given, None)
    assert sorted(parts["val"]) == [6, 7]
    parts = split.assign(40, 0, ["train"] * 30 + ["test"] * 10, None)
    assert len(parts["val"]) == 3
    assert set(parts["val"]) < set(range(30))
    assert sorted(parts["test"]) == list(range(30, 40))
    with pytest.raises(DataError, match="no row 'train'"):
        split.assign(3, 0, ["val", "val", "test"], None)


def test_limits_are_nested_and_cap_every_split():
    parts = split.assign(1000, 0, None, None)
    small, large = (split.restrict(parts, n, 1.0) for n in (80, 160))
    assert [len(small[n]) for n in split.SPLITS] == [80, 10, 10]
    assert set(small["train"].tolist()) < set(large["train"].tolist())
    half = split.restrict(parts, None, 0.5)
    assert [len(half[n]) for n in split.SPLITS] == [400, 100, 100]
    assert half["train"].tolist() == sorted(half["train"].tolist())


def test_declare_reports_every_problem_at_once():
    outputs = {
        "a": {"kind": "regresion"},
        "b": {"kind": "multiclass"},
        "c": {"kind": "binary", "classes": ["x", "y", "z"]},
        "d": {"kind": "regression", "scale": 0},
    }
    with pytest.raises(ConfigError) as caught:
        labels.declare(outputs, {})
    assert len(caught.value.problems) == 4
    assert "did you mean 'regression'" in caught.value.problems[0]


def test_statistics_come_from_known_training_labels_unless_given():
    outputs = {"y": {"kind": "regression"}}
    table = _table({"y": [1.0, 3.0, NAN, 100.0]})
    (task,) = labels.resolve(
        labels.declare(outputs, {}), outputs, table, torch.tensor([0, 1, 2]), None
    )
    assert (task.center, task.scale) == (2.0, 1.0)
    outputs = {"y": {"kind": "regression", "center": 10.0}}
    stored = {"y": {"center": 7.0, "scale": 4.0}}
    (task,) = labels.resolve(
        labels.declare(outputs, {}), outputs, table, torch.tensor([0, 1]), stored
    )
    assert (task.center, task.scale) == (10.0, 4.0)


def test_constant_labels_do_not_divide_by_zero():
    outputs = {"y": {"kind": "regression"}}
    table = _table({"y": [5.0, 5.0, 5.0]})
    (task,) = labels.resolve(
        labels.declare(outputs, {}), outputs, table, torch.tensor([0, 1]), None
    )
    assert (task.center, task.scale) == (5.0, 1.0)


def test_encoded_invalid_entries_are_zero():
    target, valid = labels.encode(
        Task("y", "regression", center=2, scale=4), torch.tensor([6.0, NAN]).double()
    )
    assert target.tolist() == [1.0, 0.0]
    assert target.dtype == torch.float32
    assert valid.tolist() == [True, False]
    target, _ = labels.encode(
        Task("k", "multiclass", ("a", "b", "c")), torch.tensor([2.0, NAN]).double()
    )
    assert target.tolist() == [2, 0]
    assert target.dtype == torch.int64
    raw = torch.tensor([[1.0, NAN], [0.0, 1.0]]).double()
    target, valid = labels.encode(Task("m", "multilabel", ("a", "b")), raw)
    assert target.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert valid.tolist() == [[True, False], [True, True]]


BAD = {
    "regression": (math.inf, "found inf, expected a finite number"),
    "multiclass": (3.0, "found 3, expected a class index 0..2"),
    "binary": (2.0, "found 2, expected 0 or 1"),
    "multilabel": (0.5, "found 0.5, expected 0 or 1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_labels_stop_with_row_task_and_range_or_are_masked(kind):
    wrong, message = BAD[kind]
    classes = {"multiclass": ("a", "b", "c"), "binary": ("n", "y"), "multilabel": ("a", "b")}
    task = Task("t", kind, classes.get(kind, ()))
    rows = [0.0, wrong, NAN, 1.0]
    if kind == "multilabel":
        rows = [[v, 1.0] for v in rows]
    with pytest.raises(DataError) as caught:
        labels.check(_table({"t": rows}), [task], "error")
    assert f"t.csv:3 (1.jpg): t: {message}" in str(caught.value)
    table = _table({"t": rows})
    bad = labels.check(table, [task], "mask")["t"]
    assert bad.reshape(4, -1).any(1).tolist() == [False, True, False, False]
    assert torch.isnan(table.labels["t"][1]).any()


def test_class_in_between_and_unread_cells_are_bad():
    task = Task("k", "multiclass", ("a", "b", "c"))
    table = _table({"k": [1.5, 0.0, NAN]}, problems=[Problem(2, "k", "found 'zebra'")])
    with pytest.raises(DataError, match=r"(?s)t\.csv:2 .*1\.5.*t\.csv:4 .*zebra"):
        labels.check(table, [task], "error")


def test_many_problems_are_counted_not_listed():
    table = _table({"b": [7.0] * 20})
    with pytest.raises(DataError, match=r"\.\.\. and 15 more; data\.bad_label=mask"):
        labels.check(table, [Task("b", "binary", ("n", "y"))], "error")


def test_class_values_read_names_codes_and_spreadsheet_numbers():
    values, unknown = labels.class_values(
        ["Red", " green ", None, "1", "2.0", "blau"], "c", ["red", "green", "blue"]
    )
    assert values[:2].tolist() == [0.0, 1.0]
    assert torch.isnan(values[2])
    assert values[3:5].tolist() == [1.0, 2.0]
    assert [p.row for p in unknown] == [5]
    assert "did you mean 'blue'" in unknown[0].text
    values, unknown = labels.class_values(["3", "5.0", "9"], "stars", ["1", "3", "5"])
    assert values[:2].tolist() == [1.0, 2.0]
    assert len(unknown) == 1


def test_constant_predictions():
    def constant(task, values):
        return labels.constant(task, *labels.encode(task, torch.tensor(values).double()))

    assert constant(Task("y", "regression"), [1.0, 2.0, 10.0, NAN]) == 2.0
    assert constant(Task("b", "binary", ("n", "y")), [1.0, 1.0, 0.0, NAN]) == 1.0
    assert constant(Task("k", "multiclass", ("a", "b", "c")), [2.0, 2.0, 1.0]) == 2.0
    assert constant(Task("m", "multilabel", ("a", "b")), [[1.0, 0.0], [1.0, NAN], [0.0, 0.0]]) == [
        1.0,
        0.0,
    ]
