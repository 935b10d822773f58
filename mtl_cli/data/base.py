"""A data set as the trainer sees it: a table of labels, a split, and batches as pure functions.

Sample order is a permutation drawn from (seed, stage, epoch); the pixels of a sample are a function
of (seed, stage, epoch, row). Nothing else is state, so any step of any epoch can be entered at
once, with any number of workers, and gives the same batch.
"""

# N rows of the table, B samples, C classes, S decoded side, H W pixels the network sees

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl_cli.data import split
from mtl_cli.data.cache import MODES, Progress, Store, open_store
from mtl_cli.data.images import POLICIES
from mtl_cli.data.labels import (
    SHOWN,
    Problem,
    check,
    constant,
    declare,
    encode,
    resolve,
    summed,
)
from mtl_cli.data.loader import MAX_WORKERS, Images, Loader, Pixels, Request, available_cores
from mtl_cli.data.transforms import Augment
from mtl_cli.errors import ConfigError, DataError
from mtl_cli.task import Batch, mix64

log = logging.getLogger(__name__)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_ORDER = 0x0DE6  # the stream of sample orders; augmentation has its own


@dataclass
class Table:
    """A data set as one table of labels.

    Args:
        files: name of each sample, for messages and prediction files.
        rows: where each row came from: ``labels.csv:17``, or the path.
        labels: raw values by output, float64 [N] or [N,C]; NaN where missing; classes as index.
        split: ``train``, ``val`` or ``test`` per row, or None.
        group: rows of one group never straddle the split; an empty text is a group of its own.
        notes: facts to show once.
        problems: labels that could not be read (their value is NaN).
    """

    files: list[str]
    rows: list[str]
    labels: dict[str, Tensor]
    split: list[str] | None = None
    group: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def where(self, row: int) -> str:
        """Name a row for a message: its place in the table and its file."""
        place, name = self.rows[row], self.files[row]
        return place if place.endswith(name) else f"{place} ({name})"


class Source(ABC):
    """One data set: where labels and images come from. Built from its own arguments only."""

    name = "data"

    def prepare(self, cache_dir: Path | None, progress: Progress | None = None) -> None:  # noqa: B027
        """Find the files, unpack archives; called once before :meth:`table`.

        Args:
            cache_dir: where to unpack, None for the user's own cache directory.
            progress: called with (what, done, total).
        """

    @abstractmethod
    def table(self, outputs: Mapping[str, Mapping[str, Any]]) -> Table:
        """Read the labels of these outputs (``outputs`` of the task's YAML)."""

    @abstractmethod
    def image(self, row: int, size: int, resize: str = "crop") -> np.ndarray:
        """uint8 [size,size,3] of one row, its aspect ratio kept by cropping or padding.

        Raises:
            DataError: the image is missing or cannot be decoded.
        """

    @abstractmethod
    def identity(self) -> str:
        """Everything that determines all images of the full list, besides size and resizing."""


@dataclass(frozen=True)
class DataOptions:
    """The keys of the ``data`` node that every data set has; see ``conf/data/common.yaml``."""

    image_size: int = 64
    batch_size: int = 64
    workers: int | str = "auto"
    limit: int | None = None
    fraction: float = 1.0
    split_seed: int = 0
    cache: str = "auto"
    cache_dir: str | None = None
    bad_label: str = "error"
    bad_image: str = "error"
    resize: str = "crop"
    margin: float = 0.125
    drop_last: bool = True

    def __post_init__(self) -> None:
        problems = []
        for key, low in (("image_size", 8), ("batch_size", 1), ("limit", 1), ("workers", 0)):
            value = getattr(self, key)
            if isinstance(value, int) and value < low:
                problems.append(f"data.{key}: found {value}, expected {low} or more")
        if isinstance(self.workers, str) and self.workers != "auto":
            problems.append(f"data.workers: found {self.workers}, expected auto or a number")
        if not 0 < self.fraction <= 1:
            problems.append(f"data.fraction: found {self.fraction}, expected above 0, up to 1")
        if not 0 <= self.margin <= 1:
            problems.append(f"data.margin: found {self.margin}, expected 0..1")
        choices = {"cache": MODES, "resize": POLICIES}
        choices |= {"bad_label": ("error", "mask"), "bad_image": ("error", "mask")}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                problems.append(
                    f"data.{key}: found {getattr(self, key)}, expected {', '.join(allowed)}"
                )
        if problems:
            raise ConfigError(problems)

    @property
    def decoded_size(self) -> int:
        """Side S of decoded images: the network's size plus the margin for random crops."""
        return round(self.image_size * (1 + self.margin))


class DataSet:
    """Tasks, splits, encoded labels and batches of one data set.

    Args:
        source: where labels and images come from.
        outputs: ``outputs`` of the task's YAML.
        options: the common keys of the ``data`` node.
        augment: pipeline of training images.
        seed: run seed of sample order and augmentation; never moves the split.
        metrics: metric names per output.
        statistics: ``{output: {center, scale}}`` of a checkpoint, instead of the training labels'.
        device: where training runs; decides about workers and pinned memory.

    Attributes:
        tasks: one per output, centre and scale settled.
        splits: int64 row indices, ascending, by ``train``, ``val``, ``test``.
        targets, valid: encoded labels of all rows, see :func:`mtl_cli.data.labels.encode`.
        fingerprint: digest of files, labels and split.
        report: counts per split and task, and notes.

    Raises:
        ConfigError: outputs that make no sense.
        DataError: data missing or bad, or a task without any training label.
    """

    def __init__(
        self,
        source: Source,
        outputs: Mapping[str, Mapping[str, Any]],
        options: DataOptions,
        *,
        augment: Augment,
        seed: int,
        metrics: Mapping[str, Sequence[str]] | None = None,
        statistics: Mapping[str, Mapping[str, float]] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.source, self.options, self.augment, self.seed = source, options, augment, seed
        self.device = torch.device(device)
        self.progress: Progress | None = None
        declared = declare(outputs, metrics or {})
        self.cache_dir = Path(options.cache_dir).expanduser() if options.cache_dir else None
        source.prepare(self.cache_dir)
        self.table = source.table(outputs)
        if not self.table.files:
            raise DataError("data: the table has no row")
        self._bad = check(self.table, declared, options.bad_label)
        given, group = self.table.split, self.table.group
        drawn = split.assign(len(self.table.files), options.split_seed, given, group)
        self.splits = split.restrict(drawn, options.limit, options.fraction)
        self.tasks = resolve(declared, outputs, self.table, self.splits["train"], statistics)
        self.targets: dict[str, Tensor] = {}
        self.valid: dict[str, Tensor] = {}
        for task in self.tasks:
            raw = self.table.labels[task.name]
            self.targets[task.name], self.valid[task.name] = encode(task, raw)
        self._refuse_unlabelled()
        self.fingerprint = self._fingerprint()
        self._bad_images: dict[int, str] = {}
        self._ready: set[str] = set()
        self._store: Store | None = None
        self._train_loader: Loader | None = None
        self._eval_loader: Loader | None = None
        if given is not None and group is not None and (torn := split.straddling(given, group)):
            self.table.notes.append(f"{torn} groups are in more than one split, as the table says")

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; a last smaller batch counts unless ``drop_last``."""
        count, size = len(self.splits["train"]), self.options.batch_size
        return max(1, count // size if self.options.drop_last else -(-count // size))

    @property
    def workers(self) -> int:
        """Worker processes: none where decoded images are at hand and the CPU is the device."""
        if isinstance(self.options.workers, int):
            return self.options.workers
        if self.store.kind != "off" and self.device.type == "cpu":
            return 0
        return min(available_cores(), MAX_WORKERS)

    @property
    def store(self) -> Store:
        """Where decoded images are kept."""
        if self._store is None:
            used = sum(len(rows) for rows in self.splits.values())
            self._store = open_store(
                self.source, mode=self.options.cache, size=self.options.decoded_size,
                resize=self.options.resize, rows=used, count=len(self.table.files),
                home=self.cache_dir, name=self.source.name,
            )  # fmt: skip
        return self._store

    def prepare(
        self, names: Sequence[str] = ("train", "val"), progress: Progress | None = None
    ) -> None:
        """Decode the images of these splits into the cache; batches call it when needed.

        Args:
            names: splits.
            progress: called with (what, done, total).

        Raises:
            DataError: an image cannot be decoded and ``data.bad_image`` is ``error``.
            ResourceError: the disk is full or a worker died.
        """
        from mtl_cli.data.fill import fill

        new = [name for name in names if name not in self._ready]
        if not new:
            return
        rows = torch.cat([self.splits[name] for name in new]).tolist()
        strict = self.options.bad_image == "error"
        failed = fill(
            self.store,
            rows,
            stop_after=SHOWN if strict else None,
            progress=progress or self.progress,
        )
        self._exclude(failed)
        self._ready.update(new)

    def train_batches(
        self, *, stage: int, epoch: int, start: int = 0, accumulate: int = 1, rank: int = 0,
        world: int = 1,
    ) -> Iterator[list[Batch | None]]:  # fmt: skip
        """Micro-batches of each optimizer step of this rank, from step ``start`` of the epoch.

        The global batch of ``batch_size`` samples is cut into ``world * accumulate`` consecutive
        chunks whose sizes differ by at most 1; rank r takes chunks ``r * accumulate`` onwards. An
        empty chunk is None.
        """
        self.prepare()
        order = self.order(stage, epoch)
        size, parts = self.options.batch_size, world * accumulate
        mine = slice(rank * accumulate, (rank + 1) * accumulate)
        steps = [
            [c.tolist() for c in np.array_split(order[s * size : (s + 1) * size], parts)[mine]]
            for s in range(start, self.steps_per_epoch)
        ]
        if self._train_loader is None:
            self._train_loader = self._loader(self.workers)
        wanted = (Request(tuple(rows), (stage, epoch)) for step in steps for rows in step if rows)
        pixels = self._train_loader.stream(wanted)
        for step in steps:
            yield [self._batch(next(pixels)) if rows else None for rows in step]

    def eval_batches(self, name: str, *, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches of a split in fixed order without augmentation; ranks take turns."""
        self.prepare((name,))
        rows, size = self.splits[name].tolist(), self.options.batch_size
        chunks = [tuple(rows[i : i + size]) for i in range(0, len(rows), size)][rank::world]
        if self._eval_loader is None:
            self._eval_loader = self._loader(self.workers if self.store.kind == "off" else 0)
        for pixels in self._eval_loader.stream(Request(chunk) for chunk in chunks):
            yield self._batch(pixels)

    def order(self, stage: int, epoch: int) -> np.ndarray:
        """Training rows in the order of this epoch, int64."""
        generator = torch.Generator().manual_seed(mix64(self.seed, _ORDER, stage, epoch))
        rows = self.splits["train"]
        return rows[torch.randperm(len(rows), generator=generator)].numpy()

    def baseline(self) -> dict[str, float | list[float]]:
        """Best constant prediction per task from the training labels, in encoded terms."""
        rows = self.splits["train"]
        return {
            task.name: constant(task, self.targets[task.name][rows],
                                       self.valid[task.name][rows])
            for task in self.tasks
        }  # fmt: skip

    @property
    def report(self) -> dict[str, Any]:
        """Samples per split; labelled, missing and bad per task and split; notes.

        Entries of a multilabel task are counted one by one. Call :meth:`prepare` first to have
        images that cannot be decoded in the counts.
        """
        tasks: dict[str, dict[str, dict[str, int]]] = {}
        for task in self.tasks:
            valid, bad = self.valid[task.name], self._bad[task.name]
            tasks[task.name] = {
                name: {
                    "labelled": int(valid[rows].sum()),
                    "missing": int((~valid[rows] & ~bad[rows]).sum()),
                    "bad": int(bad[rows].sum()),
                }
                for name, rows in self.splits.items()
            }
        return {
            "samples": {name: len(rows) for name, rows in self.splits.items()},
            "tasks": tasks,
            "bad_images": dict(sorted(self._bad_images.items())),
            "cache": self._store.kind if self._store else None,
            "notes": list(self.table.notes),
        }

    @property
    def masked(self) -> dict[str, int]:
        """What the splits hold and nothing learns from: ``images``, and labels by output; no zeros."""
        report = self.report
        used = {row for rows in self.splits.values() for row in rows.tolist()}
        found = {"images": len(used & set(report["bad_images"]))}
        for name, counts in report["tasks"].items():
            found[f"labels of {name}"] = sum(count["bad"] for count in counts.values())
        return {what: count for what, count in found.items() if count}

    def close(self) -> None:
        """End the worker processes."""
        self._train_loader = self._eval_loader = None

    def _loader(self, workers: int) -> Loader:
        images = Images(self.store, self.augment, self.options.image_size, self.seed)
        return Loader(images, workers, pin=self.device.type == "cuda")

    def _batch(self, pixels: Pixels) -> Batch:
        index = torch.tensor(pixels.request.rows, dtype=torch.int64)
        if pixels.failed:
            self._exclude({pixels.request.rows[k]: text for k, text in pixels.failed})
        return Batch(
            images=pixels.images,
            targets={name: all_[index] for name, all_ in self.targets.items()},
            valid={name: all_[index] for name, all_ in self.valid.items()},
            index=index,
            source=self.source.name,
        )

    def _exclude(self, failed: Mapping[int, str]) -> None:
        """Take the labels of images that cannot be decoded out, or refuse them."""
        new = {row: text for row, text in failed.items() if row not in self._bad_images}
        if new and self.options.bad_image == "error":
            lines = [self._named(row, text) for row, text in sorted(new.items())[:SHOWN]]
            remedy = "mtl data check lists all, data.bad_image=mask trains without them"
            raise DataError(summed(lines, len(new), remedy))
        for row in new:
            for task in self.tasks:
                self.valid[task.name][row] = False
                self.targets[task.name][row] = 0
        for row, text in list(new.items())[:SHOWN]:
            log.warning("masked: %s", self._named(row, text))
        if len(new) > SHOWN:
            log.warning("masked: %d more images", len(new) - SHOWN)
        self._bad_images |= new

    def _named(self, row: int, text: str) -> str:
        place = self.table.rows[row]
        return text if place in text else f"{place}: {text}"

    def _refuse_unlabelled(self) -> None:
        rows = self.splits["train"]
        empty = [t.name for t in self.tasks if not self.valid[t.name][rows].any()]
        if empty:
            raise DataError(
                f"data: no training label for {', '.join(empty)} among {len(rows)} samples; "
                "leave it out with only=..., or give it labels"
            )

    def _fingerprint(self) -> str:
        digest = hashlib.sha256("\0".join(self.table.files).encode("utf-8", "surrogateescape"))
        for name in sorted(self.targets):
            raw = torch.nan_to_num(self.table.labels[name], nan=-1e300)
            digest.update(name.encode() + raw.numpy().tobytes())
        for name, rows in self.splits.items():
            digest.update(name.encode() + rows.numpy().tobytes())
        return digest.hexdigest()


def normalise(images: Tensor) -> Tensor:
    """Scale uint8 pixels to ImageNet statistics, on whatever device they are.

    Shape:
        images uint8 [B,3,H,W] -> float32 [B,3,H,W].
    """
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(1, 3, 1, 1) * 255.0
    std = torch.tensor(IMAGENET_STD, device=images.device).view(1, 3, 1, 1) * 255.0
    return images.to(torch.float32).sub_(mean).div_(std)
