"""Decoded images as uint8: on disk shared by all runs, in memory, or decoded each time.

A cache entry is a sparse file [N,S,S,3] over the full list of images and one byte per image that
says whether it is there. It is keyed by everything that determines the pixels. Any number of
processes may fill it: they write the same bytes to the same places, and an image is marked only
after its bytes are on the disk, so a kill at any moment leaves nothing wrong.
"""

# N images of the source, B rows asked for, S decoded side in pixels

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_cli.errors import DataError, ResourceError

try:
    import fcntl
except ImportError:  # Windows: fillers then do the same work twice, with the same result
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from mtl_cli.data.base import Source

log = logging.getLogger(__name__)
VERSION = 1  # raise when the decoder gives other pixels for the same file
MODES = ("auto", "disk", "ram", "off")
RAM_SHARE = 0.25  # of the available memory, at most, when ``auto`` falls back to memory


def default_dir() -> Path:
    """``$MTL_CACHE``, else ``mtl`` in the user's cache directory."""
    own = os.environ.get("MTL_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(own).expanduser() if own else Path(base).expanduser() / "mtl"


class Store:
    """Decodes each time it is asked; the base of the stores that remember.

    Args:
        source: the data set.
        size: decoded side S in pixels.
        resize: ``crop`` or ``pad``, how the aspect ratio is kept.
    """

    kind = "off"

    def __init__(self, source: Source, size: int, resize: str) -> None:
        self.source, self.size, self.resize = source, size, resize

    def read(self, row: int) -> np.ndarray:
        """uint8 [S,S,3] of one image.

        Raises:
            DataError: it cannot be decoded.
        """
        return np.array(self.source.image(row, self.size, self.resize))

    def take(self, rows: Sequence[int]) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """uint8 [B,S,S,3], and (position, message) of those that could not be decoded (zeros)."""
        out = np.zeros((len(rows), self.size, self.size, 3), np.uint8)
        failed = []
        for k, row in enumerate(rows):
            try:
                out[k] = self.read(row)
            except DataError as error:
                failed.append((k, str(error)))
        return out, failed

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Rows that still have to be decoded before training."""
        del rows
        return []

    def put(self, row: int, pixels: np.ndarray) -> None:
        """Remember an image; called in worker processes."""
        raise NotImplementedError

    def mark(self, rows: Sequence[int]) -> None:
        """Declare rows present; called in the main process after their :meth:`put`."""
        raise NotImplementedError

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Held while rows are decoded into the store."""
        yield


class Memory(Store):
    """Decoded images of the rows that are used, in anonymous memory that workers share."""

    kind = "ram"

    def __init__(self, source: Source, size: int, resize: str) -> None:
        super().__init__(source, size, resize)
        self._blocks: dict[int, np.ndarray] = {}
        self._present: set[int] = set()

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Rows not decoded yet; room for them is made before the workers fork."""
        new = [row for row in rows if row not in self._blocks]
        if new:
            shape = (len(new), self.size, self.size, 3)
            room = mmap.mmap(-1, int(np.prod(shape)))
            block = np.frombuffer(room, np.uint8).reshape(shape)
            self._blocks.update(zip(new, block, strict=True))
        return [row for row in rows if row not in self._present]

    def put(self, row: int, pixels: np.ndarray) -> None:
        """Copy into the shared block."""
        self._blocks[row][:] = pixels

    def mark(self, rows: Sequence[int]) -> None:
        """Declare rows present."""
        self._present.update(rows)

    def read(self, row: int) -> np.ndarray:
        """uint8 [S,S,3] of one image; zeros where it could not be decoded."""
        return self._blocks[row]


class Disk(Store):
    """Memory-mapped cache entry in a directory that all runs share.

    Args:
        source, size, resize: see :class:`Store`.
        count: images N of the source's full list.
        home: cache directory.
        name: shown by ``mtl data cache ls``.
    """

    kind = "disk"

    def __init__(
        self, source: Source, size: int, resize: str, *, count: int, home: Path, name: str
    ) -> None:
        super().__init__(source, size, resize)
        self.count, self.home = count, home
        self.facts = {"name": name, "images": count, "size": size, "resize": resize}
        self.path = home / f"{name}-{size}px-{_key(source, size, resize, count)}"
        self._bytes = size * size * 3
        self._pixels: np.memmap[Any, np.dtype[np.uint8]] | None = None
        self._file: int | None = None
        self._sizes = {"pixels.u8": count * self._bytes, "present.u8": count}
        if not self._sound():
            with self.filling():
                if not self._sound():
                    self._create()
        with suppress(OSError):  # another user's cache may be read only
            os.utime(self.path / "entry.json")

    def _sound(self) -> bool:
        files = ((self.path / name, size) for name, size in self._sizes.items())
        return (self.path / "entry.json").is_file() and all(
            file.is_file() and file.stat().st_size == size for file, size in files
        )

    def _create(self) -> None:
        entry = self.path / "entry.json"
        entry.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        for name, size in self._sizes.items():
            with (self.path / name).open("wb") as file:
                file.truncate(size)  # sparse: room is taken as images arrive
        temporary = self.path / f"entry.json.tmp.{os.getpid()}"
        temporary.write_text(json.dumps(self.facts))
        temporary.replace(entry)

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Rows that no run has decoded yet."""
        present = np.fromfile(self.path / "present.u8", np.uint8)
        return [row for row in rows if not present[row]]

    def put(self, row: int, pixels: np.ndarray) -> None:
        """Write one image in place; a full disk is an OSError here, never a bus error."""
        if self._file is None:
            self._file = os.open(self.path / "pixels.u8", os.O_WRONLY)
        data, at = memoryview(pixels.tobytes()), row * self._bytes
        while data:
            done = os.pwrite(self._file, data, at)
            data, at = data[done:], at + done

    def mark(self, rows: Sequence[int]) -> None:
        """Sync the pixels, then set the rows' bytes."""
        with (self.path / "pixels.u8").open("r+b") as file:
            os.fsync(file.fileno())
        with (self.path / "present.u8").open("r+b", buffering=0) as file:
            for row in rows:
                os.pwrite(file.fileno(), b"\1", row)

    def read(self, row: int) -> np.ndarray:
        """uint8 [S,S,3] of one image; zeros where it could not be decoded."""
        return np.array(self._map()[row])

    def take(self, rows: Sequence[int]) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """uint8 [B,S,S,3]; ``np.take`` gathers 7 to 14 times faster than indexing does."""
        out = np.empty((len(rows), self.size, self.size, 3), np.uint8)
        np.take(self._map(), np.asarray(rows), axis=0, out=out, mode="clip")
        return out, []

    def _map(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        if self._pixels is None:
            shape = (self.count, self.size, self.size, 3)
            self._pixels = np.memmap(self.path / "pixels.u8", np.uint8, "r", shape=shape)
        return self._pixels

    def __getstate__(self) -> dict[str, Any]:
        """Maps and descriptors are opened again in another process."""
        return {**self.__dict__, "_pixels": None, "_file": None}

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Hold the entry's lock; a killed holder releases it at once."""
        with locked(self.path.with_name(self.path.name + ".lock")):
            yield


def open_store(source: Source, *, mode: str, size: int, resize: str, rows: int, count: int,
               home: Path | None, name: str) -> Store:  # fmt: skip
    """Choose where decoded images are kept.

    ``auto`` takes the disk if the images fit into its free space, else memory if they take less
    than a quarter of it, else decodes each time.

    Args:
        source: the data set.
        mode: auto, disk, ram or off.
        size: decoded side in pixels.
        resize: crop or pad.
        rows: images the run will use.
        count: images of the full list.
        home: cache directory, None for the user's own.
        name: shown by ``mtl data cache ls``.

    Raises:
        ResourceError: ``disk`` was asked for and cannot be written.
    """
    need = rows * size * size * 3
    if mode in ("auto", "disk"):
        try:
            store = Disk(source, size, resize, count=count, home=home or default_dir(), name=name)
            free = shutil.disk_usage(store.path).free
            if mode == "disk" or need < 0.9 * free:
                return store
            reason = f"needs {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB free in {store.home}"
        except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
            reason = str(error)
            if mode == "disk":
                raise ResourceError(
                    f"data.cache_dir: cannot be written ({reason}); give another one, or "
                    "data.cache=ram or off"
                ) from error
        log.warning("data.cache: no disk cache (%s)", reason)
    if mode == "ram" or (mode == "auto" and need < RAM_SHARE * _available_memory()):
        return Memory(source, size, resize)
    return Store(source, size, resize)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; says so once if it has to wait.

    ``lockf``, because forked data workers would inherit an ``flock`` and keep it after a kill.
    File systems without locks are used without: all writers write the same bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        waited = False
        while fcntl is not None:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if not waited:
                    log.info("%s: waiting for another run that is filling it", path.stem)
                waited = True
                time.sleep(0.1)
            except OSError:
                break
        yield  # closing the file releases the lock


@dataclass(frozen=True)
class Entry:
    """One cache entry as ``mtl data cache ls`` shows it."""

    path: Path
    name: str
    images: int
    size: int
    present: int
    bytes_on_disk: int
    used: float


def entries(home: Path | None = None) -> list[Entry]:
    """Cache entries, the longest unused first."""
    found = []
    home = home or default_dir()
    for file in sorted(home.glob("*/entry.json")):
        try:
            facts = json.loads(file.read_text())
            present = int(np.fromfile(file.parent / "present.u8", np.uint8).sum())
            used = file.stat().st_mtime
            blocks = sum(f.stat().st_blocks * 512 for f in file.parent.iterdir())
            found.append(Entry(file.parent, str(facts["name"]), int(facts["images"]),
                               int(facts["size"]), present, blocks, used))  # fmt: skip
        except (OSError, ValueError, KeyError):
            log.warning("%s: damaged cache entry; mtl data cache clear removes it", file.parent)
    return sorted(found, key=lambda e: e.used)


def clear(home: Path | None = None, name: str | None = None) -> list[Path]:
    """Remove cache entries (all, or those of one data set); running jobs keep what they opened."""
    home = home or default_dir()
    removed = []
    for folder in sorted(p.parent for p in home.glob("*/present.u8")):
        if name is None or folder.name.startswith(f"{name}-"):
            with locked(folder.with_name(folder.name + ".lock")):
                shutil.rmtree(folder)
            removed.append(folder)
    return removed


Progress = Callable[[str, int, int], None]


def _key(source: Source, size: int, resize: str, count: int) -> str:
    from PIL import __version__ as pillow

    text = json.dumps([VERSION, pillow, source.identity(), size, resize, count])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _available_memory() -> int:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0
