"""What a table of labels holds: kinds, classes, units, holes, groups; written as a task to edit."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import starmap
from pathlib import Path

from mtl_cli.data import csvfile
from mtl_cli.data.csvfile import SPLIT_NAMES, Csv, number, tags
from mtl_cli.data.images import SUFFIXES, load
from mtl_cli.errors import DataError
from mtl_cli.metric_names import DEFAULT_METRICS

SAMPLE = 200  # cells looked at to find the column of images
DECODED = 2000  # images decoded to find unreadable ones
MOST_CLASSES = 200
FEW = 10  # different cells of a column that is left out and may yet hold classes
MEMBERS = 3  # a class has this many rows on average, else the column is free text
_UNITS = {
    "eur": "EUR", "usd": "USD", "gbp": "GBP", "chf": "CHF", "krw": "KRW", "jpy": "JPY",
    "mm": "mm", "cm": "cm", "m": "m", "km": "km", "inch": "in", "px": "px", "mg": "mg", "g": "g",
    "kg": "kg", "ml": "ml", "l": "l", "ms": "ms", "s": "s", "sec": "s", "min": "min", "h": "h",
    "days": "days", "years": "years", "yrs": "years", "age": "years", "pct": "%", "percent": "%",
    "deg": "deg", "celsius": "°C", "kcal": "kcal", "db": "dB", "hz": "Hz",
}  # fmt: skip
_MEASURED = re.compile(
    r"age|rating|score|stars?|count|number|num|amount|price|size|weight|height|width|year|quantity"
)
_GROUP = re.compile(
    r"(^|_)(group|product|patient|subject|person|session|item|sku|object|owner|house|property|"
    r"listing|scene|case|study|video|animal|plant|user|customer|identity|id)(_?(id|no|nr|key))?$"
)
_YES = ("yes", "true", "y", "t", "1")


@dataclass
class Column:
    """What one column is taken for.

    Args:
        name: as in the header.
        role: image, split, group, output or ignored.
        kind: of an output.
        classes: of a binary, multiclass or multilabel output.
        unit: guessed from the name.
        missing: empty cells.
        detail: what is in it, in words.
    """

    name: str
    role: str = "ignored"
    kind: str = ""
    classes: list[str] = field(default_factory=list)
    unit: str = ""
    missing: int = 0
    detail: str = ""

    @property
    def output(self) -> str:
        """Name usable as a config key."""
        key = re.sub(r"\W+", "_", self.name.strip().lower()).strip("_")
        return key if key and not key[0].isdigit() else f"label_{key}"


@dataclass
class Inspection:
    """What ``mtl data inspect csv`` found.

    Args:
        text: the table.
        root: folder of the images.
        suffix: appended to the file names.
        columns: one per column.
        absent: rows whose file is not there, ``labels.csv:17: photos/a.jpg``.
        doubles: rows for an image that has one already.
        unreadable: messages of images that cannot be decoded.
        decoded: how many images were tried.
        notes: warnings.
    """

    text: Csv
    root: Path
    suffix: str
    columns: list[Column]
    absent: list[str]
    doubles: list[str]
    unreadable: list[str]
    decoded: int
    notes: list[str]

    def of(self, role: str) -> list[Column]:
        """Columns of a role."""
        return [column for column in self.columns if column.role == role]


def inspect(
    table: str, root: str | None = None, *, separator: str = "auto", image_column: str | None = None
) -> Inspection:
    """Look at a table and the images beside it.

    Args:
        table: the csv file.
        root: folder of the images; None looks beside the table.
        separator: between cells.
        image_column: column of file names; None finds it.

    Raises:
        DataError: the table cannot be read, or no column names files.
    """
    text = csvfile.read(table, separator)
    folder, images, suffix = _images(text, root, image_column)
    columns = []
    for name in text.columns:
        cells = text.column(name, name)
        column = Column(name, missing=sum(cell is None for cell in cells))
        if name == images:
            column.role = "image"
        else:
            _classify(column, [cell for cell in cells if cell is not None], text)
        columns.append(column)
    _keep_one_group(columns)
    names = [f"{cell}{suffix}" if cell else "" for cell in text.column(images, "image")]
    absent, present = [], []
    for row, name in enumerate(names):
        if name and (folder / name).is_file():
            present.append(folder / name)
        else:
            absent.append(f"{text.where(row)}: {folder / name if name else 'no file name'}")
    next(
        c for c in columns if c.role == "image"
    ).detail = f"{len(present)} of {len(text)} files found in {folder}"
    step = max(1, math.ceil(len(present) / DECODED))
    unreadable = _unreadable(present[::step])
    notes = [*text.notes, *_warnings(columns, text)]
    return Inspection(
        text, folder, suffix, columns, absent, csvfile.doubles(text, text.column(images, "image")),
        unreadable, len(present[::step]), notes,
    )  # fmt: skip


def lines(found: Inspection, table: Callable[[Sequence[str], Sequence[Sequence[str]]], list[str]]) -> list[str]:  # fmt: skip
    """The inspection as plain lines.

    Args:
        found: what was found.
        table: aligns a header and rows.
    """
    text = found.text
    shown = {"\t": "tab"}.get(text.separator, text.separator)
    out = [f"{text.path}: {len(text)} rows, {len(text.columns)} columns, separated by {shown}", ""]
    rows = []
    for column in found.columns:
        share = f"{column.missing} ({column.missing / len(text):.0%})" if column.missing else "0"
        what = {"output": column.kind, "ignored": "left out"}.get(column.role, column.role)
        rows.append([column.name, what, column.unit, share, column.detail])
    out += [*table(["column", "taken as", "unit", "missing", "values"], rows), ""]
    for title, problems in (
        ("images not found", found.absent),
        ("rows too many; training wants one per image", found.doubles),
        ("images unreadable", found.unreadable),
    ):
        if problems:
            out.append(f"{len(problems)} {title}:")
            out += [f"  {line}" for line in problems[:5]]
            out += [f"  ... and {len(problems) - 5} more"] if len(problems) > 5 else []
    if found.decoded and not found.unreadable:
        out.append(f"{found.decoded} images decoded, all readable")
    return [*out, *found.notes]


def to_yaml(found: Inspection, name: str) -> str:
    """A task file with comments, for ``mtl train task=./NAME.yaml``.

    Args:
        found: what was found.
        name: of the task.

    Raises:
        DataError: no column can be learned.
    """
    outputs = found.of("output")
    if not outputs:
        raise DataError(f"{found.text.path}: no column to learn (expected numbers or classes)")
    bad = "mask" if found.absent or found.unreadable else "error"
    command = shlex.join(["mtl", "train", f"task=./{name}.yaml"])
    head = [
        f"# {len(found.text)} images with labels: {command}",
        "# Written by mtl data inspect; edit freely, take out what should not be learned.",
        f"name: {_quoted(name)}",
        _noted("data:", "any key of mtl conf show data/csv may be set here"),
        f"  table: {_quoted(str(found.text.path))}",
        f"  root: {_quoted(str(found.root))}",
        f"  image_column: {_quoted(found.of('image')[0].name)}",
    ]
    if found.suffix:
        head.append(f"  suffix: {_quoted(found.suffix)}")
    for role in ("split", "group"):
        head += [_noted(f"  {role}: {_quoted(c.name)}", c.detail) for c in found.of(role)]
    head += [
        _noted("  image_size: 128", "pixels; larger sees more and trains slower"),
        _noted(
            f"  bad_image: {bad}", "error stops at a missing or damaged file | mask leaves it out"
        ),
        _noted("  bad_label: error", "error stops at a label out of range | mask leaves it out"),
        "outputs:",
    ]
    body = [line for column in outputs for line in _output(column)]
    tail = [
        "metrics:",
        *(f"  {c.output}: [{', '.join(DEFAULT_METRICS[c.kind])}]" for c in outputs),
        _noted("heads: auto", f"linear, or by output: {{{outputs[0].output}: mlp}}"),
        _noted("losses: auto", "l1, bce, cross_entropy, multilabel_bce by kind, or by output"),
    ]
    return "\n".join([*head, *body, *tail]) + "\n"


def _output(column: Column) -> list[str]:
    holes = f"; {column.missing} missing" if column.missing else ""
    out = [f"  {column.output}:", _noted(f"    kind: {column.kind}", column.detail + holes)]
    if column.output != column.name:
        out.append(f"    column: {_quoted(column.name)}")
    if column.kind == "regression":
        unit = _quoted(column.unit) if column.unit else "null"
        return [*out, _noted(f"    unit: {unit}", "shown with errors and predictions")]
    return [*out, f"    classes: [{', '.join(_quoted(c) for c in column.classes)}]"]


def _noted(line: str, comment: str) -> str:
    return f"{line:<27} # {comment}"


def _images(text: Csv, root: str | None, column: str | None) -> tuple[Path, str, str]:
    """Folder, column and suffix under which most cells are files."""
    beside = text.path.parent
    folders = [Path(root).expanduser()] if root else [
        beside, *sorted(p for p in beside.iterdir() if p.is_dir() and p.name[0] != ".")[:20]]  # fmt: skip
    if root and not folders[0].is_dir():
        raise DataError(f"data.root: no folder {root} (expected the images of {text.path})")
    best: tuple[float, Path, str, str] = (0.0, folders[0], "", "")
    example = ""
    for name in [column] if column else text.columns:
        known = [cell for cell in text.column(name, "data.image_column") if cell]
        sample = known[:: max(1, len(known) // SAMPLE)]
        if any(cell.lower().endswith(SUFFIXES) for cell in sample):
            example = example or f"; column '{name}' says {sample[0]}"
        for folder in folders:
            for suffix in ("", *SUFFIXES):
                hits = sum((folder / f"{cell}{suffix}").is_file() for cell in sample)
                share = hits / len(sample) if sample else 0.0
                if share > best[0]:
                    best = (share, folder, name, suffix)
    if best[0] == 0.0:
        raise DataError(
            f"{text.path}: no column names files in {', '.join(map(str, folders[:3]))}{example}; "
            "give data.root=FOLDER, and data.image_column=NAME if it has another name"
        )
    return best[1:]


def _classify(column: Column, cells: list[str], text: Csv) -> None:
    """Decide what a column is from its known cells; fills ``column``."""
    if not cells:
        column.detail = "empty"
        return
    counts = Counter(cells)
    key = column.output
    if len(counts) == 1:
        column.detail = f"always {cells[0]}"
    elif {cell.lower() for cell in counts} <= SPLIT_NAMES.keys() and not column.missing:
        named = Counter(SPLIT_NAMES[cell.lower()] for cell in cells)
        column.role = "split"
        column.detail = ", ".join(f"{n} {named[n]}" for n in ("train", "val", "test"))
    elif _is_group(key, counts, len(text)):
        column.role = "group"
        column.detail = f"{len(counts)} groups of up to {max(counts.values())} images"
    elif None not in (values := [number(cell, text.decimal_comma) for cell in cells]):
        _numeric(column, [n for n in values if n is not None], key, len(text))
    elif unclear := _unclear(counts, text.decimal_comma):
        column.detail = (
            f"text: {', '.join(unclear[:3])} may be thousands or decimals; write these cells without "
            "a comma, or separate the columns by ;"
        )
    else:
        _textual(column, counts, len(cells), text.decimal_comma)


def _numeric(column: Column, values: list[float], key: str, rows: int) -> None:
    distinct = sorted(set(values))
    low, high = distinct[0], distinct[-1]
    if distinct == [0.0, 1.0]:
        column.role, column.kind, column.classes = "output", "binary", ["no", "yes"]
        column.detail = f"0: {values.count(0.0)}, 1: {values.count(1.0)}"
        return
    whole = low in (0, 1) and len(distinct) <= 10 and len(values) >= MEMBERS * len(distinct)
    if whole and distinct == [low + k for k in range(len(distinct))] and not _MEASURED.search(key):
        column.role, column.kind = "output", "multiclass"
        column.classes = [f"{v:g}" for v in distinct]
        column.detail = f"classes {low:g}..{high:g}; kind regression if they are amounts"
        return
    if (
        len(distinct) == rows
        and all(map(float.is_integer, values))
        and re.search(r"(^|_)id$|^$|index", key)
    ):
        column.detail = f"numbers the rows, {low:g}..{high:g}"
        return
    column.role, column.kind = "output", "regression"
    column.unit = _UNITS.get(key.rsplit("_", 1)[-1], "")
    middle = sorted(values)[len(values) // 2]
    column.detail = f"{low:g}..{high:g}, median {middle:g}"


def _textual(column: Column, counts: Counter[str], known: int, decimal_comma: bool) -> None:
    words = Counter(tag for cell, count in counts.items() for tag in tags(cell) * count)
    several = sum(count for cell, count in counts.items() if len(tags(cell)) > 1)
    if several >= 0.1 * known and len(words) <= MOST_CLASSES and known >= MEMBERS * len(words):
        column.role, column.kind, column.classes = "output", "multilabel", sorted(words)
        column.detail = f"{len(words)} tags: {_common(words)}"
    elif len(counts) == 2 and known >= 2 * MEMBERS:
        column.role, column.kind = "output", "binary"
        column.classes = sorted(counts, key=lambda c: (c.lower() in _YES, c))
        column.detail = _common(counts)
    elif len(counts) <= MOST_CLASSES and known >= MEMBERS * len(counts):
        column.role, column.kind, column.classes = "output", "multiclass", sorted(counts)
        column.detail = f"{len(counts)} classes: {_common(counts)}"
    else:
        odd = [cell for cell in counts if number(cell, decimal_comma) is None]
        column.detail = f"{len(counts)} different texts"
        if len(odd) <= 0.05 * len(counts):
            column.detail = f"numbers, but also {', '.join(odd[:3])}; correct or empty these cells"


def _unclear(counts: Counter[str], decimal_comma: bool) -> list[str]:
    """Numbers with a comma in a column that has nothing but numbers and such."""
    if decimal_comma:
        return []
    odd = [cell for cell in counts if number(cell) is None]
    return odd if all(map(csvfile.ambiguous, odd)) else []


def _is_group(key: str, counts: Counter[str], rows: int) -> bool:
    """Named like an identity, with several rows each but many of them."""
    repeated = len(counts) < 0.95 * rows
    return bool(_GROUP.search(key)) and repeated and len(counts) >= max(5, rows / 50)


def _keep_one_group(columns: list[Column]) -> None:
    for column in [c for c in columns if c.role == "group"][1:]:
        column.role, column.detail = "ignored", f"{column.detail}; another column groups already"


def _warnings(columns: Sequence[Column], text: Csv) -> list[str]:
    notes = []
    for column in columns:
        notes += _read_as_missing(column, text)
        if column.role == "output" and column.kind in ("binary", "multiclass"):
            counts = Counter(cell for cell in text.column(column.name, "") if cell)
            rare = [cell for cell, count in counts.items() if count < 10]
            if rare:
                notes.append(f"{column.name}: fewer than 10 images of {', '.join(rare[:5])}"
                             f"{', ...' if len(rare) > 5 else ''}")  # fmt: skip
        elif column.role == "output" and column.missing > 0.5 * len(text):
            notes.append(
                f"{column.name}: more than half is missing; those rows teach the others only"
            )
    return notes


def _read_as_missing(column: Column, text: Csv) -> list[str]:
    """A column of names may mean a class by a word that usually says "missing"."""
    if column.role not in ("output", "ignored") or column.kind == "regression":
        return []
    at = text.columns.index(column.name)
    cells = Counter(record[at] for record in text.records if record[at])
    words = {cell: count for cell, count in cells.items() if csvfile.is_missing(cell)}
    classes = column.classes or sorted(set(cells) - set(words))
    if len(classes) > MOST_CLASSES or (column.role == "ignored" and len(classes) > FEW):
        return []
    return [
        f"{column.name}: {count} cells say '{word}', read as missing; if it is a class, list it: "
        f"kind: multiclass, classes: [{', '.join(_quoted(c) for c in [*classes, word])}]"
        for word, count in words.items()
    ]


def _unreadable(paths: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without holding the lock
        return [text for text in pool.map(_failure, paths) if text]


def _failure(path: Path) -> str:
    try:
        load(path, 32)
    except DataError as error:
        return str(error)
    return ""


def _common(counts: Counter[str], most: int = 5) -> str:
    shown = ", ".join(starmap("{} {}".format, counts.most_common(most)))
    return shown + (", ..." if len(counts) > most else "")


def _quoted(text: str) -> str:
    """A YAML string: bare where that is safe, else with JSON's double quotes."""
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text)
    reserved = text.lower() in ("yes", "no", "on", "off", "true", "false", "null", "y", "n", "nan")
    return text if plain and not reserved else json.dumps(text, ensure_ascii=False)
