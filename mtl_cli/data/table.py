"""A user's own data: a table of labels beside a folder of images."""

# N rows, C labels of a multilabel output

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl_cli.data import csvfile
from mtl_cli.data.base import Source, Table
from mtl_cli.data.csvfile import Csv, ambiguous, number
from mtl_cli.data.files import identity
from mtl_cli.data.images import load
from mtl_cli.data.labels import NAN, SHOWN, Problem, class_values, listed, summed
from mtl_cli.errors import ConfigError, DataError, nearest

WORDS = {"no": 0, "false": 0, "n": 0, "f": 0, "yes": 1, "true": 1, "y": 1, "t": 1}


class CsvTable(Source):
    """One row per image; every output learns a column.

    A column is found by ``outputs.NAME.column``, else by the output's name. Empty cells and NA, NaN,
    null, none, ? are missing labels, unless a class is called so. Classes are written as names, or as numbers 0..C-1. A
    multilabel output reads one column of tags (``red|large``), or 0/1 columns named as its classes.

    Args:
        table: the table; its first line names the columns.
        root: folder of the images; None for the table's own.
        image_column: column of file names, relative to ``root``.
        suffix: appended to every file name, for tables that leave ``.jpg`` out.
        separator: between cells; ``auto`` finds out.
        split: column that says train, val or test; None to draw 80/10/10.
        group: column whose equal values stay in one split, such as the product photographed.
    """

    name = "csv"

    def __init__(
        self,
        table: str | None = None,
        root: str | None = None,
        image_column: str = "image",
        suffix: str = "",
        separator: str = "auto",
        split: str | None = None,
        group: str | None = None,
    ) -> None:
        if table is None:
            raise ConfigError("data.table: not given (expected the table of labels, a .csv)")
        self.path = Path(table).expanduser()
        self.root = Path(root).expanduser() if root is not None else self.path.parent
        self.image_column, self.suffix, self.separator = image_column, suffix, separator
        self.split, self.group = split, group
        self.files: list[str] = []
        self.name = "".join(c if c.isalnum() else "_" for c in self.path.stem) or "csv"

    def table(self, outputs: Mapping[str, Mapping[str, Any]]) -> Table:
        """Read the labels.

        Raises:
            DataError: the table, its folder or a column is missing, a row has no image, or an image
                has two rows.
        """
        text = csvfile.read(self.path, self.separator)
        if not self.root.is_dir():
            raise DataError(
                f"data.root: no folder {self.root} (expected the images of {self.path})"
            )
        self.files = self._images(text)
        rows = [text.where(row) for row in range(len(text))]
        table = Table(self.files, rows, {}, notes=list(text.notes))
        for output, spec in outputs.items():
            table.labels[output], problems = _labels(text, output, spec)
            table.problems += problems
        if self.split is not None:
            table.split = self._split(text, self.split)
        if self.group is not None:
            cells = text.column(self.group, "data.group")
            table.group = [cell or "" for cell in cells]
        return table

    def image(self, row: int, size: int, resize: str = "crop") -> np.ndarray:
        """Decode the image of one row."""
        return load(self.root / self.files[row], size, resize)

    def identity(self) -> str:
        """Names, sizes and times of all images."""
        return identity(self.root, self.files)

    def _images(self, text: Csv) -> list[str]:
        cells = text.column(self.image_column, "data.image_column")
        problems = [
            f"{text.where(row)}: {self.image_column}: no image"
            for row, cell in enumerate(cells)
            if cell is None
        ]
        problems += csvfile.doubles(text, cells)
        if problems:
            remedy = f"correct {self.path.name}, one row per image"
            raise DataError(summed(problems[:SHOWN], len(problems), remedy))
        return [f"{cell}{self.suffix}" for cell in cells]

    def _split(self, text: Csv, column: str) -> list[str]:
        names, problems = [], []
        for row, cell in enumerate(text.column(column, "data.split")):
            name = csvfile.SPLIT_NAMES.get((cell or "").lower())
            if name is None:
                problems.append(f"{text.where(row)}: {column}: found '{cell or ''}', expected "
                                "train, val or test")  # fmt: skip
            names.append(name or "train")
        if problems:
            raise DataError(summed(problems[:SHOWN], len(problems), "data.split=null draws one"))
        return names


def _labels(text: Csv, output: str, spec: Mapping[str, Any]) -> tuple[Tensor, list[Problem]]:
    """Raw labels of one output, [N] or [N,C], and the cells that cannot be read."""
    kind, column = str(spec["kind"]), str(spec.get("column") or output)
    classes = [str(c) for c in spec.get("classes") or ()]
    if kind == "multilabel":
        return _multilabel(text, output, column, classes)
    if kind == "regression":
        cells = text.column(column, f"outputs.{output}")
        return _numbers(cells, output, "a number", text.decimal_comma)
    cells = text.column(column, f"outputs.{output}", classes)
    if kind == "binary":
        classes = classes or ["no", "yes"]
        known = {name.casefold() for name in classes}
        cells = [cell if cell is None or cell.casefold() in known
                 else _as_class(cell, classes) for cell in cells]  # fmt: skip
    return class_values(cells, output, classes, text.decimal_comma)


def _as_class(cell: str, classes: Sequence[str]) -> str:
    """Read yes, true, t as the class that is called so in other words; else leave the cell."""
    meaning = WORDS.get(cell.casefold())
    same = (name for name in classes if WORDS.get(name.casefold()) == meaning)
    return cell if meaning is None else next(same, cell)


def _numbers(
    cells: Sequence[str | None], output: str, expected: str, decimal_comma: bool = False
) -> tuple[Tensor, list[Problem]]:
    values, problems = [], []
    for row, cell in enumerate(cells):
        value = NAN if cell is None else number(cell, decimal_comma)
        if cell is not None and value is None:
            why = " without a comma: thousands or decimals?" if ambiguous(cell) else ""
            problems.append(Problem(row, output, f"found '{cell}', expected {expected}{why}"))
            value = NAN
        values.append(value)
    return torch.tensor(values, dtype=torch.float64), problems


def _multilabel(
    text: Csv, output: str, column: str, classes: Sequence[str]
) -> tuple[Tensor, list[Problem]]:
    if column not in text.columns:
        absent = [name for name in classes if name not in text.columns]
        if absent:
            raise DataError(
                f"{text.path}: no column '{column}' for outputs.{output}, nor one per class "
                f"({listed(absent)} missing; has {', '.join(text.columns)})"
                f"{nearest(column, text.columns)}"
            )
        parts = [
            _numbers(
                [_truth(c) for c in text.column(name, output)], output, "0 or 1", text.decimal_comma
            )
            for name in classes
        ]
        return torch.stack([values for values, _ in parts], 1), [p for _, ps in parts for p in ps]
    index = {name.casefold(): i for i, name in enumerate(classes)}
    values, problems = torch.zeros(len(text), len(classes), dtype=torch.float64), []
    for row, cell in enumerate(text.column(column, f"outputs.{output}", classes)):
        names = [] if cell is None else csvfile.tags(cell)
        unknown = [name for name in names if name.casefold() not in index]
        if unknown:
            problems.append(Problem(row, output, f"found '{unknown[0]}', expected some of "
                                    f"{listed(classes)}{nearest(unknown[0], classes)}"))  # fmt: skip
        if cell is None or unknown:
            values[row] = NAN
        for name in names:
            if not unknown:
                values[row, index[name.casefold()]] = 1.0
    return values, problems


def _truth(cell: str | None) -> str | None:
    return None if cell is None else str(WORDS.get(cell.casefold(), cell))
