"""Checkpoints: one file of plain types and tensors, written so that no kill can lose the last one.

A file is written beside its place, flushed to the disk, moved over, and the directory is flushed.
It is loaded with ``weights_only=True`` after every record's CRC has been tested: torch.load itself
accepts a flipped bit without notice.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mtl_cli.errors import CheckpointError, NonFiniteError, RunDirError, SafetyError

FORMAT = 1
PLAIN = (int, float, bool, str, bytes, type(None))
STEP_FILE = re.compile(r"step_(\d+)\.pt$")
KEEP = 2  # newest step files kept: the last one and the one before it as a fallback


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint.

    Args:
        path: its final place.
        state: plain types and tensors only.

    Raises:
        TypeError: a value that could not be loaded again safely; names its key.
        NonFiniteError: a tensor holds NaN or infinity; names its key.
        RunDirError: the disk is full or the directory cannot be written.
    """
    for key, value in _leaves(state):
        if isinstance(value, Tensor):
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                if key.startswith(("weighting", "meter")):
                    continue  # NaN marks "not yet known" in a strategy's state
                raise NonFiniteError(
                    f"checkpoint: '{key}' holds NaN or infinity; not saved, the previous "
                    "checkpoint is intact; lower optimizer.lr or set clip_norm"
                )
        elif type(value) not in PLAIN:
            raise TypeError(f"checkpoint: '{key}' is a {type(value).__name__}, not a plain type")
    size = sum(v.numel() * v.element_size() for _, v in _leaves(state) if isinstance(v, Tensor))
    write_atomically(path, lambda f: torch.save({"format": FORMAT, **state}, f), need=size)


def write_atomically(path: Path, write: Callable[[BinaryIO], object], need: int = 0) -> None:
    """Write a file so that a reader sees the old or the new content, never a part.

    Args:
        path: its final place.
        write: writes the content to an open binary file.
        need: expected size in bytes, for the message when the disk is full.

    Raises:
        RunDirError: it cannot be written; no temporary file is left.
    """
    temporary = path.with_name(f".{path.name}.tmp.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_directory(path.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if "DataLoader worker" in str(error):  # torch's SIGCHLD handler raises anywhere
            raise
        raise _cannot_write(path, error, need) from error


def flush_directory(directory: Path) -> None:
    """Make a rename in ``directory`` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint.

    Raises:
        CheckpointError: missing, damaged (names the record) or of a newer format.
        SafetyError: it holds something other than tensors and plain types.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged (record {damaged} fails its CRC)")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            what = found.group(1) if found else "an unknown object"
            raise SafetyError(
                f"{path}: refused, it would run code on loading (found {what}, expected tensors "
                "and plain types)"
            ) from error
        raise CheckpointError(f"{path}: damaged ({str(error).splitlines()[0]})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise CheckpointError(f"{path}: not a checkpoint of mtl (no 'format')")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: written by mtl {state.get('version')} (format {state['format']}, this is "
            f"format {FORMAT}); update mtl"
        )
    return state


class Checkpoints:
    """The ``checkpoints`` directory of a run.

    Args:
        directory: made if missing; temporary files of dead processes are removed.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def clean(self) -> None:
        """Make the directory; remove what a killed process left half written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for leftover in self.directory.glob(".*.tmp.*"):
            leftover.unlink(missing_ok=True)

    def save(self, step: int, state: dict[str, Any], names: tuple[str, ...] = ()) -> Path:
        """Save ``step_N.pt``, link it as ``last.pt`` and under ``names``, drop old step files."""
        path = self.directory / f"step_{step:08d}.pt"
        save(path, state)
        for name in ("last", *names):
            self.link(path, name)
        for old in self.steps()[KEEP:]:
            old.unlink(missing_ok=True)
        return path

    def link(self, path: Path, name: str) -> None:
        """Point ``NAME.pt`` at a checkpoint: a hard link, or a copy where links fail."""
        target = self.directory / f"{name}.pt"
        temporary = target.with_name(f".{target.name}.tmp.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
        os.replace(temporary, target)
        flush_directory(self.directory)

    def steps(self) -> list[Path]:
        """Step files, newest first."""
        found = [p for p in self.directory.glob("step_*.pt") if STEP_FILE.search(p.name)]
        return sorted(found, key=lambda p: p.name, reverse=True)

    def newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """Newest valid checkpoint; falls back to the previous one with a warning.

        Raises:
            CheckpointError: there are checkpoints and none is valid.
        """
        named = [self.directory / f"{name}.pt" for name in ("last", "best")]
        files = self.steps() + [path for path in named if path.is_file()]
        for path in files:
            try:
                return load(path)
            except CheckpointError as error:
                warn(f"{error}; trying the one before it")
        if files:
            raise CheckpointError(
                f"{self.directory}: no valid checkpoint ({len(files)} damaged); start a new run, "
                "or give one with init_from=CHECKPOINT"
            )
        return None

    def any(self) -> bool:
        """True if anything has been saved here."""
        return bool(self.steps()) or (self.directory / "last.pt").is_file()


def find(run: Path, name: str = "best") -> Path:
    """Checkpoint file of a run directory or of a file path.

    Args:
        run: a run directory, or a checkpoint file itself.
        name: ``best`` or ``last``; the other one where it is missing.

    Raises:
        CheckpointError: there is none.
    """
    if run.is_file():
        return run
    for candidate in (name, "best", "last"):
        path = run / "checkpoints" / f"{candidate}.pt"
        if path.is_file():
            return path
    raise CheckpointError(f"{run}: no checkpoint (expected {run / 'checkpoints' / 'best.pt'})")


def weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights to use from a checkpoint: the averaged ones where there are any."""
    if state["ema"] is None:
        return dict(state["model"])
    prefix = "module."
    return {k.removeprefix(prefix): v for k, v in state["ema"].items() if k.startswith(prefix)}


def describe(loaded: list[str], missing: list[str], mismatched: list[str]) -> str:
    """What :func:`load_weights` did, in one line."""
    parts = [f"loaded {len(loaded)} of {len(loaded) + len(missing) + len(mismatched)} tensors"]
    for word, names in (("missing", missing), ("of another shape", mismatched)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{len(names)} {word} ({', '.join(names[:3])}{more})")
    return ", ".join(parts) + ("; the rest is newly initialised" if len(parts) > 1 else "")


def load_weights(
    module: torch.nn.Module, found: Mapping[str, Tensor], source: str
) -> tuple[list[str], list[str], list[str]]:
    """Copy the tensors that fit by name and shape.

    Returns:
        names (loaded, missing, mismatched).

    Raises:
        CheckpointError: not one tensor fits.
    """
    own = module.state_dict()
    mismatched = [n for n, t in own.items() if n in found and found[n].shape != t.shape]
    loaded = [n for n in own if n in found and n not in mismatched]
    missing = [n for n in own if n not in found]
    if not loaded:
        raise CheckpointError(f"{source}: none of its tensors fits this model")
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(found[name])
    return loaded, missing, mismatched


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a nested structure with their dotted keys."""
    if type(value) is dict or type(value).__name__ == "OrderedDict":
        for name, item in value.items():
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{key}[{number}]")
    else:
        yield key, value


def _cannot_write(path: Path, error: Exception, need: int) -> RunDirError:
    """Word a failed write; torch hides ENOSPC behind a RuntimeError about positions."""
    code = getattr(error, "errno", None)
    try:
        free = shutil.disk_usage(path.parent).free
    except OSError:
        return RunDirError(f"{path.parent}: the run directory is gone ({error})")
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or free < need or code is None:
        return RunDirError(
            f"{path}: cannot write (free {free / 2**20:.0f} MiB, need {need / 2**20:.0f} MiB; "
            f"{error}); the previous checkpoint is intact; free space and resume"
        )
    return RunDirError(f"{path}: cannot write ({error}); the previous checkpoint is intact")
