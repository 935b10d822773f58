"""From row numbers to batches of pixels, with any number of worker processes.

A request names everything that determines its pixels (rows, stage, epoch), so a batch is the same
whichever process makes it, and an epoch can be entered at any step without replaying the earlier.
"""

# B samples of a request, S decoded side, H W pixels the network sees

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mtl_cli.data.cache import Store
from mtl_cli.data.transforms import Augment, Plain, seeded
from mtl_cli.errors import DataError, ResourceError
from mtl_cli.task import mix64

TIMEOUT_S = 300.0  # a worker that gives nothing for this long hangs (network file system)
LINGER_S = 60  # how long a worker outlives a SIGTERM, for the main process to finish its step
MAX_WORKERS = 8


@dataclass(frozen=True)
class Request:
    """Pixels to make: rows of the table, and (stage, epoch) if they are to be augmented."""

    rows: tuple[int, ...]
    when: tuple[int, int] | None = None


@dataclass
class Pixels:
    """Answer to a request.

    Shape:
        images uint8 [B,3,H,W]; ``failed`` lists (position, message) of images that could not be
        decoded, whose pixels are 0.
    """

    request: Request
    images: Tensor
    failed: list[tuple[int, str]]

    def pin_memory(self) -> Pixels:
        """Called by the DataLoader when it pins memory."""
        self.images = self.images.pin_memory()
        return self


class Images(Dataset[Pixels]):
    """Makes pixels from requests; runs inside the workers.

    Args:
        store: decoded images by row.
        augment: the training pipeline.
        size: side H = W of the result.
        seed: run seed of the augmentation stream.
    """

    def __init__(self, store: Store, augment: Augment, size: int, seed: int) -> None:
        self.store, self.augment, self.size, self.seed = store, augment, size, seed

    def __getitem__(self, request: Request) -> Pixels:
        """Decode, augment or centre-crop, and stack one request."""
        if request.when is None or isinstance(self.augment, Plain):
            return self._centred(request)
        return self._augmented(request, *request.when)

    def _centred(self, request: Request) -> Pixels:
        stack, failed = self.store.take(request.rows)
        first = (stack.shape[1] - self.size + 1) // 2  # as torchvision's centre crop rounds
        inner = stack[:, first : first + self.size, first : first + self.size]
        images = torch.from_numpy(np.ascontiguousarray(inner.transpose(0, 3, 1, 2)))
        return Pixels(request, images, failed)

    def _augmented(self, request: Request, stage: int, epoch: int) -> Pixels:
        count, failed = len(request.rows), []
        images = torch.zeros((count, 3, self.size, self.size), dtype=torch.uint8)
        for k, row in enumerate(request.rows):
            try:
                pixels = self.store.read(row)
            except DataError as error:
                failed.append((k, str(error)))
                continue
            image = torch.from_numpy(pixels).permute(2, 0, 1)
            with seeded(mix64(self.seed, stage, epoch, row)):
                images[k] = self.augment(image, self.size)
        return Pixels(request, images, failed)


class _Plan(Sampler[Request]):
    """Hands out the requests that were set last."""

    def __init__(self) -> None:
        self.requests: Iterable[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


class Loader:
    """A DataLoader over requests that never touches the global random streams.

    Args:
        images: what makes the pixels.
        workers: processes; 0 works in this one. They stay alive between calls of :meth:`stream`.
        pin: copy to page-locked memory, for a GPU.
    """

    def __init__(self, images: Dataset[Any], workers: int, *, pin: bool = False) -> None:
        self._plan = _Plan()
        options: dict[str, Any] = {}
        if workers:
            options = {
                "persistent_workers": True,
                "timeout": TIMEOUT_S,
                "worker_init_fn": _init_worker,
                "multiprocessing_context": "fork" if sys.platform == "linux" else None,
            }
        self._loader: DataLoader[Any] = DataLoader(
            images,
            batch_size=None,
            sampler=self._plan,
            num_workers=workers,
            collate_fn=_same,
            pin_memory=pin,
            generator=torch.Generator().manual_seed(0),
            **options,
        )

    def stream(self, requests: Iterable[Any]) -> Iterator[Any]:
        """Answers in the order of the requests.

        Raises:
            WorkerLost: a worker process died or hangs.
        """
        self._plan.requests = requests
        try:
            yield from self._loader
        except RuntimeError as error:
            raise worker_error(error) from error
        except (ConnectionError, EOFError) as error:  # it died between its answer and the tensor
            raise WorkerLost(
                f"data: a worker died ({error}); try a smaller data.workers"
            ) from error


class WorkerLost(ResourceError):
    """A data worker died or hangs."""


def worker_error(error: RuntimeError) -> Exception:
    """Translate the DataLoader's report of a dead worker; other errors come back unchanged."""
    text = str(error)
    if "DataLoader" not in text or not ("worker" in text or "timed out" in text):
        return error
    first = text.splitlines()[0].rstrip(".")
    hint = "out of memory? try a smaller data.workers"
    if "bus error" in text.lower() or "shared memory" in text:
        hint = "shared memory (/dev/shm) is full; try data.workers=0"
    return WorkerLost(f"data: {first}; {hint}")


def available_cores() -> int:
    """CPU cores that this process may use: affinity, container quota, shared by local ranks."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()[:2]
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _init_worker(_: int) -> None:
    """Outlive a signal to the whole group: the main process finishes its step and ends us."""
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _linger)


def _linger(number: int, _: object) -> None:
    """The first SIGTERM ends a worker after a while, the second at once."""
    signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LINGER_S)


def _same(item: Any) -> Any:
    return item
