"""Reading a user's table of labels as it comes: separators, encodings, holes; no torch."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mtl_cli.errors import DataError, nearest

SEPARATORS = (",", ";", "\t", "|")
MISSING = frozenset(("", "na", "n/a", "nan", "null", "none", "?", "#n/a"))
TAGS = re.compile(r"\s*[|;,]\s*")  # what separates several tags in one cell
NO_TAGS = frozenset(("-", "[]", "{}"))  # a cell that says "no tag", unlike an empty one
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "tr"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "holdout"), "test"),
}
_SHOWN = 5
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[-+]?(inf|infinity)", re.IGNORECASE)
_COMMA_NUMBER = re.compile(r"[-+]?\d+,\d+")


@dataclass
class Csv:
    """A table as text.

    Args:
        path: its file.
        columns: names in the header.
        records: cells by row, without surrounding space, as many as columns.
        lines: line of the file in which each row starts.
        separator: between the cells.
        notes: what was noticed while reading.
    """

    path: Path
    columns: list[str]
    records: list[list[str]]
    lines: list[int]
    separator: str
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def column(self, name: str, key: str, classes: Sequence[str] = ()) -> list[str | None]:
        """Cells of a column, None where missing.

        Args:
            name: the column.
            key: config key that asks for it, for the message.
            classes: names that are known, even where they mean "missing" elsewhere (none, NA).

        Raises:
            DataError: there is no such column.
        """
        if name not in self.columns:
            raise DataError(
                f"{self.path}: no column '{name}' for {key} (has {', '.join(self.columns)})"
                f"{nearest(name, self.columns)}"
            )
        at = self.columns.index(name)
        known = {text.strip().casefold() for text in classes}
        return [
            None if is_missing(cell) and cell.casefold() not in known else cell
            for cell in (record[at] for record in self.records)
        ]

    @property
    def decimal_comma(self) -> bool:
        """Whether 1,5 is a number: not where the comma separates cells, 1,751 may be thousands."""
        return self.separator != ","

    def where(self, row: int) -> str:
        """``labels.csv:17``."""
        return f"{self.path.name}:{self.lines[row]}"


def read(path: str | Path, separator: str = "auto") -> Csv:
    """Read a table with a header line.

    Args:
        path: comma, semicolon, tab or bar separated text; UTF-8 or UTF-16 with or without a byte
            order mark, else Windows-1252 with a note.
        separator: ``auto`` takes the one that gives most columns.

    Raises:
        DataError: missing, empty, not text, or rows that do not fit the header, by line.
    """
    path = Path(path).expanduser()
    text, notes = _decode(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    if not first:
        raise DataError(f"{path}: empty (expected a header line and rows)")
    if separator == "auto":
        separator = max(SEPARATORS, key=lambda s: len(next(csv.reader([first], delimiter=s))))
    rows = _rows(path, text, separator)
    header = [name.strip() for name in next(rows, (0, []))[1]]
    if not header:
        raise DataError(f"{path}: empty (found separators only, expected a header line and rows)")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {', '.join(twice)} appears twice in the header")
    table = Csv(path, header, [], [], separator, notes)
    wrong = []
    for line, cells in rows:
        if len(cells) != len(header):
            wrong.append(f"{path}:{line}: found {len(cells)} cells, expected {len(header)} "
                         f"({', '.join(header)})")  # fmt: skip
        table.records.append([cell.strip() for cell in cells])
        table.lines.append(line)
    if wrong:
        more = f"\n... and {len(wrong) - _SHOWN} more rows" if len(wrong) > _SHOWN else ""
        raise DataError("\n".join(wrong[:_SHOWN]) + more)
    if not table.records:
        raise DataError(f"{path}: no row below the header ({', '.join(header)})")
    return table


def is_missing(cell: str) -> bool:
    """Whether a cell says that nothing is known."""
    return cell.lower() in MISSING


def number(text: str, decimal_comma: bool = False) -> float | None:
    """Value of a cell, None if it is not a number; a decimal comma counts as a point if allowed."""
    text = text.strip()
    if decimal_comma and _COMMA_NUMBER.fullmatch(text):
        text = text.replace(",", ".")
    return float(text) if _NUMBER.fullmatch(text) else None


def ambiguous(text: str) -> bool:
    """Whether a cell is a number with one comma: a decimal one, or one of thousands."""
    return _COMMA_NUMBER.fullmatch(text.strip()) is not None


def doubles(table: Csv, cells: Sequence[str | None]) -> list[str]:
    """Rows whose image an earlier row has already: ``labels.csv:9: a.jpg has a row already ...``.

    Args:
        table: where the cells come from.
        cells: file name per row; ``a.jpg`` and ``./a.jpg`` are one file.
    """
    seen: dict[str, int] = {}
    found = []
    for row, cell in enumerate(cells):
        if cell is None:
            continue
        first = seen.setdefault(os.path.normpath(cell), row)
        if first != row:
            line = table.lines[first]
            found.append(f"{table.where(row)}: {cell} has a row already in line {line}")
    return found


def tags(cell: str) -> list[str]:
    """Tags of a multilabel cell: ``red|large`` -> ["red", "large"]."""
    inner = cell.strip().strip("[]{}")
    parts = (part.strip("'\" ") for part in TAGS.split(inner))
    return [] if cell.strip() in NO_TAGS else [part for part in parts if part]


def _rows(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Non-empty rows with the line they start in; a quoted cell may hold line breaks."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not a table ({error})") from error


def _decode(path: Path) -> tuple[str, list[str]]:
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file (expected the table of labels)") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        try:
            return raw.decode("utf-16"), []
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: damaged UTF-16 (byte {error.start}: {error.reason}); save it again"
            ) from error
    try:
        return raw.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        if b"\0" in raw:
            raise DataError(f"{path}: not a text file") from error
        line = raw.count(b"\n", 0, error.start) + 1
        note = f"{path.name}:{line}: not UTF-8; read as Windows-1252"
        return raw.decode("cp1252", errors="replace"), [note]
