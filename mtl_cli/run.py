"""A run: its directory, its progress and the signals that stop it. Nothing here trains."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import random
import resource
import signal
import socket
import string
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from mtl_cli.checkpoint import Checkpoints, write_atomically
from mtl_cli.errors import RunDirError

log = logging.getLogger(__name__)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Progress:
    """Where a run is. With the config it determines data, learning rate and turns.

    Args:
        stage: index of the stage.
        epoch: epochs of the stage that are finished, evaluation included.
        step: optimizer steps attempted in the stage.
        step_in_epoch: steps of the current epoch that are done.
        total_steps: optimizer steps attempted in the run, over all stages.
        best_by: what decided about best.pt so far (TASK/METRIC, ``loss``, None for the mean gain).
        best_score: best value of it in this stage.
        best: step, epoch, stage, score and metrics of the best evaluation of this stage.
        final: the same of the last evaluation.
        best_task: task -> gain, value, step and epoch of its own best evaluation.
        waited: evaluations since the best one (for patience).
        skipped: total_steps of the last skipped steps, at most 1000 back.
        outcomes: name and best evaluation of the finished stages.
        finished: the last stage is done.
        log_bytes: length of metrics.jsonl; what is behind it is dropped on resume.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    total_steps: int = 0
    best_by: str | None = None
    best_score: float | None = None
    best: dict[str, Any] = field(default_factory=dict)
    final: dict[str, Any] = field(default_factory=dict)
    best_task: dict[str, dict[str, Any]] = field(default_factory=dict)
    waited: int = 0
    skipped: list[int] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    log_bytes: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)

    def next_stage(self) -> None:
        """Move to the beginning of the next stage."""
        self.stage += 1
        self.epoch = self.step = self.step_in_epoch = self.waited = 0
        self.best_score = None
        self.best, self.best_task = {}, {}


class StopFlag:
    """Set by the first INT, TERM, HUP, USR1 or USR2; the second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: str | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Handle the signals inside the context, restore the handlers after it.

        A HUP that is ignored stays so: that is what nohup asks for.
        """
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        previous = {
            number: signal.signal(number, self._set)
            for number in SIGNALS
            if not (ignored and number == signal.SIGHUP)
        }
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _set(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number in (signal.SIGINT, signal.SIGTERM):
            os._exit(128 + number)
        self.signal = signal.Signals(number).name


class Stopped(Exception):
    """A signal asked the run to stop; the checkpoint is written."""


class RunDir:
    """Directory of one run: lock, status, logs and checkpoints.

    Args:
        path: the directory; its parents are made.

    Raises:
        RunDirError: it cannot be written, or another process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._lock: TextIO | None = None
        self._metrics: TextIO | None = None
        self._timing: TextIO | None = None
        self.warn: Callable[[str], None] = log.warning
        self._warned = False
        self.begun = False  # until then a run that lies here stays as it is

    def open(self) -> None:
        """Make the directory, take its lock, remove leftovers of a killed process."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self.checkpoints.clean()
        except OSError as error:
            raise RunDirError(
                f"{self.path}: cannot write the run directory ({error.strerror}); choose another "
                "with output_dir=DIR"
            ) from error

    def _take_lock(self) -> None:
        # lockf, not flock: data workers inherit a flock and would hold it after their parent died
        lock = (self.path / ".lock").open("a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise RunDirError(f"{self.path}: in use by {holder}; wait for it or stop it") from error
        lock.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        lock.write(f"pid {os.getpid()} on {socket.gethostname()} since {since}")
        lock.flush()
        self._lock = lock

    def close(self) -> None:
        """Close the logs and release the lock."""
        for file in (self._metrics, self._timing, self._lock):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        self._metrics = self._timing = self._lock = None

    def status(self, state: str, **more: Any) -> None:
        """Write status.json: running, finished, interrupted or failed."""
        record = {
            "state": state,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            **more,
        }
        self.write_json("status.json", record)

    def write_json(self, name: str, record: Any) -> None:
        """Write a JSON file atomically."""
        self.write_text(name, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically."""
        write_atomically(self.path / name, lambda file: file.write(text.encode()))

    def start_logs(self, log_bytes: int) -> None:
        """Open metrics.jsonl at the length it had when the checkpoint was written."""
        path = self.path / "metrics.jsonl"
        self._metrics = path.open("a")
        if path.stat().st_size > log_bytes:
            self._metrics.truncate(log_bytes)
        self._timing = (self.path / "timing.jsonl").open("a")

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl: equal to the bit after a resume, so no times in it."""
        self._append(self._metrics, record)

    def log_timing(self, record: dict[str, Any]) -> None:
        """Append a line to timing.jsonl: what differs from machine to machine."""
        self._append(self._timing, record)

    def _append(self, file: TextIO | None, record: dict[str, Any]) -> None:
        """Append a line; a disk without room for logs is no reason to stop training."""
        assert file is not None
        try:
            file.write(json.dumps(record) + "\n")
            file.flush()
        except OSError as error:
            if not self._warned:
                self.warn(f"{file.name}: cannot write the log ({error.strerror}); training goes on")
            self._warned = True

    def finished_an_epoch(self) -> bool:
        """True if metrics.jsonl holds the evaluation of an epoch."""
        path = self.path / "metrics.jsonl"
        return path.is_file() and '"event": "eval"' in path.read_text(errors="replace")

    def log_bytes(self) -> int:
        """Length of metrics.jsonl."""
        assert self._metrics is not None
        return os.fstat(self._metrics.fileno()).st_size


def new_run_path(parent: Path) -> Path:
    """``parent/20261121-220911-k3f``: two starts in the same second differ."""
    alphabet = string.ascii_lowercase + string.digits
    while True:
        suffix = "".join(random.SystemRandom().choices(alphabet, k=3))
        path = parent / f"{time.strftime('%Y%m%d-%H%M%S')}-{suffix}"
        if not path.exists():
            return path


def point_latest(path: Path) -> None:
    """Make ``latest`` beside a run point to it (not where links fail)."""
    link = path.parent / "latest"
    temporary = path.parent / f".latest.{os.getpid()}"
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path.name)
        os.replace(temporary, link)


class Clock:
    """Throughput and waiting, for the screen and timing.jsonl; never for a decision."""

    def __init__(self) -> None:
        self.worked_s = 0.0
        self.waited_s = 0.0
        self.evaluated_s = 0.0
        self.images = 0.0
        self.saved_at: float | None = None
        self._taken = (0.0, 0.0, 0.0)

    def add(self, *, waited: float, worked: float, images: int) -> None:
        """Add one step."""
        self.waited_s += waited
        self.worked_s += worked
        self.images += images

    @property
    def seconds(self) -> float:
        """Training time so far, over all resumes, evaluation included."""
        return self.worked_s + self.waited_s + self.evaluated_s

    def state_dict(self) -> dict[str, float]:
        """Plain values, so that a resumed run reports its whole time."""
        names = ("worked_s", "waited_s", "evaluated_s", "images")
        return {name: float(getattr(self, name)) for name in names}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Inverse of :meth:`state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)
        self._taken = (self.worked_s, self.waited_s, self.images)

    def saved(self) -> None:
        """Note that a checkpoint was written now."""
        self.saved_at = time.monotonic()

    @property
    def images_per_second(self) -> float:
        """Training throughput of this process so far, waiting included."""
        return self.images / max(1e-9, self.worked_s + self.waited_s)

    @property
    def wait_share(self) -> float:
        """Share of the training time spent waiting for data."""
        return self.waited_s / max(1e-9, self.worked_s + self.waited_s)

    def take(self) -> dict[str, float]:
        """Figures since the last call."""
        worked, waited = self.worked_s - self._taken[0], self.waited_s - self._taken[1]
        images = self.images - self._taken[2]
        self._taken = (self.worked_s, self.waited_s, self.images)
        return {
            "images_per_second": round(images / max(1e-9, worked + waited), 1),
            "data_wait": round(waited / max(1e-9, worked + waited), 4),
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        }


@dataclass
class Run:
    """Everything one run needs; thin on purpose: ``train(run)`` does the work.

    Args:
        dir: the run directory.
        config_text: the resolved config as YAML, stored in every checkpoint.
        stages: the schedule's stages.
        stage: builds a stage's own set (data, model, engine, optimizers); injected by build.
        progress: where the run is.
        stop: set by a signal.
        display: the screen.
        clock: throughput.
    """

    dir: RunDir
    config_text: str
    stages: Sequence[Any]
    stage: Callable[[Any], Any]
    progress: Progress
    stop: StopFlag
    display: Any
    clock: Clock = field(default_factory=Clock)
