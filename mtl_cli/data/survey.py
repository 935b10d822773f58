"""Looking at a data set: counts and histograms, a check of every file, a sheet of samples."""

# N rows, S side of a decoded image

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from mtl_cli.data.base import DataSet, Source
from mtl_cli.data.cache import Progress
from mtl_cli.data.loader import Images, Loader, Request, available_cores
from mtl_cli.errors import DataError
from mtl_cli.task import Task

BAR = 30  # characters
_BINS = 10
_CHUNK = 32
_CELL, _TEXT = 128, 11  # pixels of a sample on the sheet, and of a line of its caption
Aligner = Callable[[Sequence[str], Sequence[Sequence[str]]], list[str]]


def summary(data: DataSet, table: Aligner) -> list[str]:
    """Splits, counts and a histogram of the training labels per task, as plain lines."""
    report = data.report
    sizes = report["samples"]
    out = [", ".join(f"{name} {count}" for name, count in sizes.items()), ""]
    rows = []
    for task in data.tasks:
        counts = report["tasks"][task.name]
        for name in sizes:
            c = counts[name]
            rows.append([task.name, task.kind, name, *(str(c[k]) for k in ("labelled", "missing", "bad"))])  # fmt: skip
    out += table(["output", "kind", "split", "labelled", "missing", "bad"], rows)
    for task in data.tasks:
        out += ["", *_histogram(data, task)]
    return [*out, *([""] if report["notes"] else []), *report["notes"]]


def _histogram(data: DataSet, task: Task) -> list[str]:
    rows = data.splits["train"]
    raw = data.table.labels[task.name][rows]
    if task.kind == "regression":
        known = raw[~torch.isnan(raw)].numpy()
        counts, edges = np.histogram(known, bins=_BINS)
        names = [f"{low:.4g}..{high:.4g}" for low, high in pairwise(edges)]
        title = (f"{task.name}: learned as (value - {task.center:.4g}) / {task.scale:.4g}"
                 f"{', ' + task.unit if task.unit else ''}; median {np.median(known):.4g}")  # fmt: skip
    else:
        flat = raw.nan_to_num(-1)
        if task.kind == "multilabel":
            counts = (flat == 1).sum(0).numpy()
        else:
            counts = np.array([int((flat == k).sum()) for k in range(len(task.classes))])
        names, title = list(task.classes), f"{task.name}: training labels"
    width, most = max(map(len, names)), max(1, int(counts.max()))
    bars = (f"  {name:>{width}}  {'#' * round(BAR * int(count) / most):<{BAR}}  {count}"
            for name, count in zip(names, counts, strict=True))  # fmt: skip
    return [title, *bars]


@dataclass
class Findings:
    """What :func:`check` found.

    Args:
        checked: number of images.
        failed: message by row.
        twins: rows whose pixels are equal.
        leaks: twins in training and in validation or test.
    """

    checked: int
    failed: dict[int, str]
    twins: list[list[int]]
    leaks: list[list[int]]


class _Digests(Dataset[list[tuple[int, str, str]]]):
    """Decodes rows from their files and digests the pixels; runs inside the workers."""

    def __init__(self, source: Source, size: int, resize: str) -> None:
        self.source, self.size, self.resize = source, size, resize

    def __getitem__(self, rows: Sequence[int]) -> list[tuple[int, str, str]]:
        """(row, digest, message) of a chunk."""
        out = []
        for row in rows:
            try:
                pixels = self.source.image(row, self.size, self.resize)
                out.append((row, hashlib.sha256(pixels.tobytes()).hexdigest(), ""))
            except DataError as error:
                out.append((row, "", str(error)))
        return out


def check(data: DataSet, progress: Progress | None = None) -> Findings:
    """Decode every file of the table, whatever the cache has, and look for equal images.

    Args:
        data: the data set.
        progress: called with (what, done, total).
    """
    count = len(data.table.files)
    chunks = [range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)]
    digests = _Digests(data.source, data.options.decoded_size, data.options.resize)
    failed: dict[int, str] = {}
    rows_of: dict[str, list[int]] = {}
    workers = available_cores() if count > _CHUNK * 8 else 0
    done = 0
    for answers in Loader(digests, workers).stream(chunks):
        for row, digest, message in answers:
            if message:
                failed[row] = message
            else:
                rows_of.setdefault(digest, []).append(row)
        done += len(answers)
        if progress is not None:
            progress("checking", done, count)
    twins = [rows for rows in rows_of.values() if len(rows) > 1]
    train = set(data.splits["train"].tolist())
    held = {row for name in ("val", "test") for row in data.splits[name].tolist()}
    leaks = [rows for rows in twins if not train.isdisjoint(rows) and not held.isdisjoint(rows)]
    return Findings(count, failed, twins, leaks)


def sheet(data: DataSet, path: Path, columns: int = 6, rows: int = 4) -> int:
    """Write a PNG of training samples as the network sees them, with their labels.

    Returns:
        How many samples are on it.
    """
    chosen = data.order(0, 0)[: columns * rows].tolist()
    images = Images(data.store, data.augment, data.options.image_size, data.seed)
    data.prepare(("train",))
    pixels = images[Request(tuple(chosen), (0, 0))].images
    caption = _TEXT * len(data.tasks) + 4
    high = -(-len(chosen) // columns)
    canvas = Image.new("RGB", (columns * _CELL, high * (_CELL + caption)), "white")
    pen = ImageDraw.Draw(canvas)
    for k, row in enumerate(chosen):
        left, top = k % columns * _CELL, k // columns * (_CELL + caption)
        tile = Image.fromarray(pixels[k].permute(1, 2, 0).numpy())
        canvas.paste(
            tile.resize((_CELL - 4, _CELL - 4), Image.Resampling.BICUBIC), (left + 2, top + 2)
        )
        for line, task in enumerate(data.tasks):
            text = f"{task.name} {_value(data, task, row)}"
            pen.text((left + 3, top + _CELL + _TEXT * line), text[:24], fill="black")
    canvas.save(path)
    return len(chosen)


def _value(data: DataSet, task: Task, row: int) -> str:
    raw = data.table.labels[task.name][row]
    if torch.isnan(raw).any():
        return "?"
    if task.kind == "regression":
        return f"{raw.item():.4g} {task.unit}".rstrip()
    if task.kind == "multilabel":
        names = [name for name, on in zip(task.classes, raw.tolist(), strict=True) if on]
        return ", ".join(names) or "-"
    return task.classes[int(raw.item())]
