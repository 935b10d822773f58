"""Decoding what a run will need, once, by all cores, before training starts."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Dataset

from mtl_cli.data.cache import Progress, Store
from mtl_cli.data.loader import Loader, available_cores
from mtl_cli.errors import DataError, ResourceError

CHUNK = 32  # images per request to a worker
ALONE = 256  # up to this many images one process is quicker than starting several
MARK_S = 2.0  # seconds between two syncs: what a kill can cost
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Outcome = tuple[list[int], list[tuple[int, str]], str]


class _Decoding(Dataset[Outcome]):
    """Decodes a chunk of rows into the store; runs inside the workers."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __getitem__(self, rows: Sequence[int]) -> Outcome:
        """Rows written, rows that cannot be decoded with the reason, and a full disk's message."""
        done: list[int] = []
        failed: list[tuple[int, str]] = []
        for row in rows:
            try:
                pixels = self.store.source.image(row, self.store.size, self.store.resize)
            except DataError as error:
                failed.append((row, str(error)))
                continue
            try:
                self.store.put(row, pixels)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                return done, failed, str(error.strerror)
            done.append(row)
        return done, failed, ""


def fill(
    store: Store,
    rows: Sequence[int],
    *,
    stop_after: int | None = None,
    progress: Progress | None = None,
    workers: int | None = None,
) -> dict[int, str]:
    """Decode the rows that the store does not have yet.

    Args:
        store: where they are kept.
        rows: rows that will be used.
        stop_after: give up after this many images that cannot be decoded; None goes on.
        progress: called with (what, done, total).
        workers: processes; None for all cores.

    Returns:
        Message by row of the images that cannot be decoded. They are not marked, so the next run
        tries them again.

    Raises:
        ResourceError: the disk is full, or a worker died.
    """
    if not store.missing(rows):
        return {}
    with store.filling():
        todo = store.missing(rows)  # another run may have done the work while this one waited
        if workers is None:
            workers = 0 if len(todo) <= ALONE or available_cores() == 1 else available_cores()
        return _decode(store, todo, workers, stop_after, progress)


def _decode(store: Store, todo: Sequence[int], workers: int, stop_after: int | None,
            progress: Progress | None) -> dict[int, str]:  # fmt: skip
    failed: dict[int, str] = {}
    ready: list[int] = []
    finished, marked = 0, time.monotonic()
    chunks: Iterator[Any] = (todo[i : i + CHUNK] for i in range(0, len(todo), CHUNK))
    for done, bad, full in Loader(_Decoding(store), workers).stream(chunks):
        ready += done
        failed.update(bad)
        finished += len(done) + len(bad)
        if progress is not None:
            progress("decoding", finished, len(todo))
        if full:
            raise ResourceError(
                f"data.cache_dir: {full.lower()} after {finished} of {len(todo)} images; free "
                "some, give another data.cache_dir, or data.cache=off"
            )
        if time.monotonic() - marked > MARK_S:
            store.mark(ready)
            ready, marked = [], time.monotonic()
        if stop_after is not None and len(failed) >= stop_after:
            break
    store.mark(ready)
    return failed
