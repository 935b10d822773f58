"""A user's own table: read as it comes, every problem by file and line, inferred into a task."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mtl_cli.commands import data as command
from mtl_cli.data import csvfile, inspect
from mtl_cli.data.base import DataOptions, DataSet
from mtl_cli.data.table import CsvTable
from mtl_cli.data.transforms import Light
from mtl_cli.errors import ConfigError, DataError

BRANDS = ("acme", "bolt", "core")


def _photos(folder, count, suffix=".jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        Image.fromarray(np.full((24, 32, 3), k * 5, np.uint8)).save(folder / f"p{k:02d}{suffix}")


def _products(tmp_path, count=48):
    """A semicolon table from a spreadsheet: byte order mark, CRLF, decimal commas, holes."""
    _photos(tmp_path / "photos", count)
    lines = ["file;price_eur;brand;Used?;tags;product_id;stars;split;note"]
    for k in range(count):
        price = "" if k % 6 == 0 else f"{10 + k},50"
        tags = "NA" if k % 8 == 0 else ("red|large" if k % 2 else "red")
        part = ("train", "train", "valid", "test")[k // 2 % 4]
        lines.append(
            f"p{k:02d}.jpg;{price};{BRANDS[k % 3]};{'yes' if k % 2 else 'no'};{tags};{k // 2};"
            f'{k % 5 + 1};{part};"text {k}; quoted"'
        )
    path = tmp_path / "labels.csv"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    return path


def _write(tmp_path, text, photos=3):
    _photos(tmp_path / "photos", photos)
    path = tmp_path / "labels.csv"
    path.write_text(text)
    return {"table": str(path), "root": str(tmp_path / "photos"), "image_column": "file"}


def test_reads_spreadsheets(tmp_path):
    text = csvfile.read(_products(tmp_path))
    assert text.columns[0] == "file"
    assert (len(text), text.separator, text.where(3)) == (48, ";", "labels.csv:5")
    assert text.records[1][-1] == "text 1; quoted"
    assert text.column("price_eur", "x")[0] is None


@pytest.mark.parametrize("separator", csvfile.SEPARATORS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_separators_and_encodings(tmp_path, separator, encoding):
    path = tmp_path / "t.csv"
    path.write_bytes(f"file{separator}größe\na.jpg{separator}é\n".encode(encoding))
    text = csvfile.read(path)
    assert text.columns == ["file", "größe"]
    assert text.records == [["a.jpg", "é"]]
    assert bool(text.notes) == (encoding == "cp1252")


def test_lines_are_counted_through_quoted_breaks(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,b\n1,"two\nlines"\n\n2,x\n')
    assert csvfile.read(path).lines == [2, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("a,b\n", "no row below the header"),
        (
            "a,b\n1\n1,2\n1,2,3\n",
            r"(?s)t\.csv:2: found 1 cells, expected 2.*t\.csv:4: found 3 cells",
        ),
        ("a,a\n1,2\n", "column a appears twice"),
    ],
)
def test_broken_tables_are_told_by_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        csvfile.read(tmp_path / "t.csv")


def test_numbers():
    cases = {"1": 1, "-2.5e3": -2500, "3,25": 3.25, ".5": 0.5, "inf": float("inf")}
    assert {text: csvfile.number(text, decimal_comma=True) for text in cases} == cases
    assert csvfile.number("1,751") is None, "thousands or decimals?"
    for text in ("", "1_000", "0x10", "twelve", "1,000.5", "12 cm", "nan"):
        assert csvfile.number(text) is None


def test_every_kind_of_column(tmp_path):
    given = _write(
        tmp_path,
        "file,y,k,b,tags,red,large\n"
        "p00.jpg,1.5,acme,yes,red|large,1,0\n"
        "p01.jpg,NA,Core,0,-,no,1\n"
        "p02.jpg,2,,True,,0,?\n",
    )
    outputs = {
        "price": {"kind": "regression", "column": "y"},
        "k": {"kind": "multiclass", "classes": list(BRANDS)},
        "b": {"kind": "binary"},
        "tags": {"kind": "multilabel", "classes": ["red", "large"]},
        "several": {"kind": "multilabel", "classes": ["red", "large"]},
    }
    table = CsvTable(**given).table(outputs)
    nan = float("nan")
    expected = {
        "price": [1.5, nan, 2],
        "k": [0, 2, nan],
        "b": [1, 0, 1],
        "tags": [[1, 1], [0, 0], [nan, nan]],
        "several": [[1, 0], [0, 1], [0, nan]],
    }
    assert table.problems == []
    for name, values in expected.items():
        torch.testing.assert_close(
            table.labels[name], torch.tensor(values).double(), equal_nan=True
        )


@pytest.mark.parametrize(
    ("rows", "spec", "message"),
    [
        (
            "p00.jpg,x",
            {"kind": "regression"},
            r"labels\.csv:2 \(p00\.jpg\): y: found 'x', expected a number",
        ),
        ("p00.jpg,inf", {"kind": "regression"}, "found inf, expected a finite number"),
        (
            "p00.jpg,7",
            {"kind": "multiclass", "classes": list(BRANDS)},
            r"found 7, expected a class index 0\.\.2",
        ),
        (
            "p00.jpg,1.5",
            {"kind": "multiclass", "classes": list(BRANDS)},
            "found '1.5', expected one of acme",
        ),
        ("p00.jpg,bold", {"kind": "multiclass", "classes": list(BRANDS)}, "did you mean 'bolt'"),
        ("p00.jpg,2", {"kind": "binary"}, "found 2, expected 0 or 1"),
        (
            "p00.jpg,red|blu",
            {"kind": "multilabel", "classes": ["red", "blue"]},
            "found 'blu', expected some of",
        ),
    ],
)
def test_bad_labels_are_named_or_masked(tmp_path, rows, spec, message):
    given = _write(
        tmp_path, f"file,y\n{rows}\n" + "".join(f"p{k:02d}.jpg,\n" for k in range(1, 6)), 6
    )
    good = {"z": {"kind": "regression", "column": "z"}}
    text = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join([f"{text[0]},z", *(f"{t},1" for t in text[1:])]))
    outputs = {"y": spec, **good}

    def build(policy):
        options = DataOptions(cache="off", bad_label=policy, image_size=8)
        return DataSet(CsvTable(**given), outputs, options, augment=Light(), seed=0)

    with pytest.raises(DataError, match=message):
        build("error")
    with pytest.raises(DataError, match="no training label for y"):  # it was the only one
        build("mask")


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (
            "file,y\np00.jpg,1\np00.jpg,2\n",
            {},
            r"labels\.csv:3: p00\.jpg has a row already in line 2",
        ),
        ("file,y\n,1\n", {}, r"labels\.csv:2: file: no image"),
        (
            "file,y\np00.jpg,1\n",
            {"image_column": "fil"},
            "no column 'fil' for data.image_column.*did you mean 'file'",
        ),
        ("file,y\np00.jpg,1\n", {"root": "/nowhere"}, "data.root: no folder /nowhere"),
        ("file,y\np00.jpg,1\n", {"table": "absent.csv"}, "absent.csv: no such file"),
        (
            "file,y,s\np00.jpg,1,trian\n",
            {"split": "s"},
            r"labels\.csv:2: s: found 'trian', expected train, val or test",
        ),
    ],
)
def test_wrong_tables_are_refused(tmp_path, text, changes, message):
    given = {**_write(tmp_path, text), **changes}
    with pytest.raises(DataError, match=message):
        CsvTable(**given).table({"y": {"kind": "regression"}})


def test_missing_image_names_the_row(tmp_path):
    given = _write(tmp_path, "file,y\n" + "".join(f"p{k:02d}.jpg,{k}\n" for k in range(12)), 11)
    options = DataOptions(cache_dir=str(tmp_path / "c"), image_size=8)
    data = DataSet(
        CsvTable(**given), {"y": {"kind": "regression"}}, options, augment=Light(), seed=0
    )
    with pytest.raises(DataError, match=r"labels\.csv:13: .*p11\.jpg: no such file"):
        data.prepare(("train", "val", "test"))


def _inspect(tmp_path, *words, write="products.yaml"):
    said = []
    args = ["inspect", "csv", f"data.table={tmp_path / 'labels.csv'}", *words]
    options = {"write": str(tmp_path / write)} if write else {}
    assert command.run(args, None, said.append, options) == 0
    return "\n".join(said)


def test_inspect_finds_kinds_units_groups_and_holes(tmp_path):
    _products(tmp_path)
    (tmp_path / "photos" / "p03.jpg").write_bytes(b"not a photo")
    (tmp_path / "photos" / "p04.jpg").unlink()
    said = _inspect(tmp_path)
    task = yaml.safe_load((tmp_path / "products.yaml").read_text())
    assert task["data"] == {
        "table": str(tmp_path / "labels.csv"),
        "root": str(tmp_path / "photos"),
        "image_column": "file",
        "split": "split",
        "group": "product_id",
        "image_size": 128,
        "bad_image": "mask",
        "bad_label": "error",
    }
    assert task["outputs"] == {
        "price_eur": {"kind": "regression", "unit": "EUR"},
        "brand": {"kind": "multiclass", "classes": list(BRANDS)},
        "used": {"kind": "binary", "column": "Used?", "classes": ["no", "yes"]},
        "tags": {"kind": "multilabel", "classes": ["large", "red"]},
        "stars": {"kind": "regression", "unit": None},
    }
    assert task["metrics"]["price_eur"] == ["mae"]
    assert (task["heads"], task["losses"], task["name"]) == ("auto", "auto", "products")
    for fact in (
        "p03.jpg",
        "labels.csv:6: ",
        "8 (17%)",
        "24 groups of up to 2 images",
        "mtl train task=",
    ):
        assert fact in said


def test_inspected_task_loads_and_respects_split_and_groups(tmp_path):
    _products(tmp_path)
    _inspect(tmp_path)
    task = yaml.safe_load((tmp_path / "products.yaml").read_text())
    names = ("table", "root", "image_column", "split", "group")
    source = CsvTable(**{k: task["data"][k] for k in names})
    options = DataOptions(image_size=16, batch_size=4, cache_dir=str(tmp_path / "c"))
    data = DataSet(source, task["outputs"], options, augment=Light(), seed=0)
    assert {n: len(r) for n, r in data.splits.items()} == {"train": 24, "val": 12, "test": 12}
    (batch,) = next(data.train_batches(stage=0, epoch=0))
    assert batch.targets["tags"].shape == (4, 2)
    price = data.report["tasks"]["price_eur"]
    assert sum(p["missing"] for p in price.values()) == 8


def test_inspect_guesses_suffix_and_codes(tmp_path):
    _photos(tmp_path / "img", 30, ".png")
    rows = "".join(f"p{k:02d},{k % 4},{k % 2},{k * 1.5},x\n" for k in range(30))
    (tmp_path / "labels.csv").write_text("id,race,flag,width_cm,same\n" + rows)
    said = _inspect(tmp_path)
    task = yaml.safe_load((tmp_path / "products.yaml").read_text())
    assert task["data"]["suffix"] == ".png"
    assert task["data"]["root"] == str(tmp_path / "img")
    assert task["outputs"]["race"] == {"kind": "multiclass", "classes": ["0", "1", "2", "3"]}
    assert task["outputs"]["flag"]["kind"] == "binary"
    assert task["outputs"]["width_cm"]["unit"] == "cm"
    assert "always x" in said
    table = CsvTable(
        str(tmp_path / "labels.csv"), str(tmp_path / "img"), image_column="id", suffix=".png"
    ).table(task["outputs"])
    assert table.labels["race"][:5].tolist() == [0, 1, 2, 3, 0]
    assert table.problems == []


def test_inspect_never_overwrites_and_explains_itself(tmp_path):
    _products(tmp_path)
    _inspect(tmp_path)
    with pytest.raises(ConfigError, match="exists already"):
        _inspect(tmp_path)
    assert "--write" in _inspect(tmp_path, write="")
    with pytest.raises(ConfigError, match=r"did you mean 'data\.root'"):
        _inspect(tmp_path, "data.rot=x")
    with pytest.raises(ConfigError, match=r"data\.table=FILE\.csv is missing"):
        command.run(["inspect", "csv"], None, print, {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no column names files in .*column 'file' says p00\.jpg"):
        _inspect(tmp_path, f"data.root={tmp_path / 'empty'}", write="")


def test_names_that_yaml_would_misread_are_quoted():
    for text in ("no", "1", "a b", "ü", "x: y", "#", "", "null", "plain-name"):
        assert yaml.safe_load(inspect._quoted(text)) == text
    assert json.loads(inspect._quoted("on")) == "on"


def test_a_comma_in_a_number_of_a_comma_separated_table(tmp_path):
    """1,751 may be a large number or a small one: nothing is guessed."""
    rows = "".join(f'p{k:02d}.jpg,"1,{700 + k}"\n' for k in range(12))
    where = _write(tmp_path, f"file,price\n{rows}", photos=12)
    with pytest.raises(DataError, match=r"labels.csv:2 .*found '1,700', expected a number without"):
        DataSet(
            CsvTable(**where),
            {"price": {"kind": "regression"}},
            DataOptions(),
            augment=Light(),
            seed=0,
        )
    found = inspect.inspect(where["table"], where["root"])
    (price,) = [column for column in found.columns if column.name == "price"]
    assert price.role == "ignored"
    assert "1,700, 1,701, 1,702 may be thousands or decimals" in price.detail


def test_a_class_that_is_called_none(tmp_path):
    """Listed classes win over the words for a missing label; inspect says how to list them."""
    rows = "".join(f"p{k:02d}.jpg,{('none', 'dent', 'scratch')[k % 3]}\n" for k in range(12))
    where = _write(tmp_path, f"file,flaw\n{rows}", photos=12)
    spec = {"flaw": {"kind": "multiclass", "classes": ["none", "dent", "scratch"]}}
    assert CsvTable(**where).table(spec).labels["flaw"].tolist() == [0.0, 1.0, 2.0] * 4
    binary = {"flaw": {"kind": "binary", "classes": ["None", "dent"]}}
    assert CsvTable(**where).table(binary).labels["flaw"][:2].tolist() == [0.0, 1.0]
    tags = {"flaw": {"kind": "multilabel", "classes": ["none", "dent", "scratch"]}}
    assert CsvTable(**where).table(tags).labels["flaw"][0].tolist() == [1.0, 0.0, 0.0]
    (note,) = [n for n in inspect.inspect(where["table"], where["root"]).notes if "none" in n]
    assert "flaw: 4 cells say 'none', read as missing" in note
    assert "kind: multiclass, classes: [dent, scratch, none]" in note


def test_two_rows_for_one_file(tmp_path):
    where = _write(tmp_path, "file,kind\np00.jpg,a\np01.jpg,b\n./p00.jpg,a\np01.jpg,b\n")
    with pytest.raises(DataError, match=r"labels.csv:4: ./p00.jpg has a row already in line 2"):
        CsvTable(**where).table({"kind": {"kind": "multiclass", "classes": ["a", "b"]}})
    text = inspect.lines(inspect.inspect(where["table"], where["root"]), lambda header, rows: [])
    assert "2 rows too many; training wants one per image:" in text
    assert "  labels.csv:5: p01.jpg has a row already in line 3" in text


def test_tables_without_content(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text(",,\n,,\n")
    with pytest.raises(DataError, match="found separators only"):
        csvfile.read(path)
    path.write_bytes("file,kind\na,b\n".encode("utf-16")[:-1])
    with pytest.raises(DataError, match="damaged UTF-16"):
        csvfile.read(path)
