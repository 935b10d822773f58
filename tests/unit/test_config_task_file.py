"""A task of the user's own in one file."""

from __future__ import annotations

import pytest

from mtl_cli.compose import Composer
from mtl_cli.launch import prepare
from mtl_cli.overrides import parse

PRODUCTS = """\
name: products
outputs:
  price: {kind: regression, unit: EUR, column: price}
  brand: {kind: multiclass, classes: [acme, zenith]}
  used: {kind: binary}
data: {root: photos, table: labels.csv}
"""


@pytest.fixture
def composer():
    found = Composer()
    if "csv" not in found.options("data"):
        pytest.skip("no data source csv")
    return found


@pytest.fixture
def file(tmp_path):
    def write(text: str = PRODUCTS, name: str = "products.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def run(composer, *argv):
    return prepare(composer, parse(argv))


def test_heads_losses_and_metrics_by_kind(composer, file, tmp_path):
    (tmp_path / "labels.csv").write_text("image,price\n")
    cfg, problems = run(composer, f"task={file()}")
    assert problems == []
    assert cfg.task.name == "products"
    assert {name: cfg.losses[name]._target_.rpartition(".")[2] for name in cfg.losses} == {
        "price": "L1",
        "brand": "CrossEntropy",
        "used": "BCE",
    }
    assert list(cfg.heads) == list(cfg.losses) == ["price", "brand", "used"]
    assert dict(cfg.task.metrics) == {
        "price": ["mae"],
        "brand": ["accuracy", "f1"],
        "used": ["accuracy"],
    }
    assert cfg.data.table == str(tmp_path / "labels.csv"), "beside the file, as it exists there"
    assert cfg.data.root == "photos", "not beside the file: from the working directory"


def test_choices_on_the_shell_and_in_the_file(composer, file):
    text = PRODUCTS + "losses: {price: mse}\nheads: {brand: mlp}\nmetrics: {price: [rmse, mae]}\n"
    cfg, problems = run(composer, f"task={file(text)}", "losses.price=smooth_l1", "heads.used=mlp")
    assert problems == []
    assert cfg.losses.price._target_.endswith("SmoothL1")
    assert cfg.heads.brand._target_ == cfg.heads.used._target_
    assert list(cfg.task.metrics.price) == ["rmse", "mae"]


def test_name_of_a_shipped_task_does_not_hide_it(composer, file):
    path = file(PRODUCTS, "synthetic.yaml")
    assert run(composer, f"task={path}")[0].task.name == "products"
    assert run(composer)[0].task.name == "synthetic"


def test_an_edit_is_seen_in_the_same_process(composer, file):
    path = file()
    run(composer, f"task={path}")
    file(PRODUCTS.replace("EUR", "USD"))
    assert run(composer, f"task={path}")[0].task.outputs.price.unit == "USD"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (PRODUCTS + "loses: auto\n", ["unknown key 'loses'; did you mean 'losses'?"]),
        (PRODUCTS.replace("regression", "number"), ["price.kind: not a kind (found number"]),
        ("name: x\n", ["no outputs"]),
        (PRODUCTS + "losses: {prise: mse}\n", ["no such output; did you mean 'price'?"]),
        (PRODUCTS.replace("table:", "tabel:"), ["unknown key 'data.tabel'; did you mean 'table'?"]),
        (PRODUCTS + "losses: {price: bce}\n", ["BCE does not fit a regression output"]),
        ("name: [1\n", ["products.yaml:2:1"]),
        (PRODUCTS.replace("[acme, zenith]", "[yes, no]"), ["classes"]),
        (PRODUCTS + "metrics: [mae]\n", ["products.yaml: metrics: wrong type (found ['mae']"]),
        (PRODUCTS + "backbone: 5\n", ["products.yaml: backbone: wrong type (found 5, expected"]),
        (PRODUCTS.replace("{root", "[x] #"), ["products.yaml: data: wrong type (found ['x']"]),
        (PRODUCTS.replace("{root", "{source: 5, root"), ["data.source: wrong type (found 5"]),
        (PRODUCTS.replace("name: products", "name: 123"), ["name: wrong type (found 123, expec"]),
        (
            PRODUCTS.replace("price: {", "price.eur: {").replace("used:", "yes:"),
            ["outputs: not a name (found 'price.eur'", "not a name (found True"],
        ),
    ],
)
def test_problems_name_the_file(composer, file, text, parts):
    found = "\n".join(run(composer, f"task={file(text)}")[1])
    for part in parts:
        assert part in found


def test_no_such_file(composer):
    assert "no such file" in run(composer, "task=./nowhere.yaml")[1][0]
