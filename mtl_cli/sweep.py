"""``mtl train -m``: every job checked before the first starts, none stopped by another's failure.

Writes:
    multirun/TASK/STAMP/multirun.yaml    argv, overrides, swept keys, jobs
    multirun/TASK/STAMP/JOB/             one run directory per job, named by what varies

A job that failed is done again when the sweep is continued, a finished one is skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl_cli import grid, launch, resume
from mtl_cli.compose import Composer
from mtl_cli.config import read_yaml
from mtl_cli.errors import (
    OK,
    STOPPED,
    UNEXPECTED,
    CheckpointError,
    MtlError,
    SweepError,
)
from mtl_cli.grid import Job
from mtl_cli.overrides import Command, swept_keys

INTERRUPTED = {STOPPED, 130, 143}


def is_sweep(value: str | None) -> bool:
    """Whether ``resume=value`` names a sweep's directory."""
    return value is not None and (Path(value).expanduser() / resume.SPEC).is_file()


def run(composer: Composer, command: Command, value: str | None) -> int:
    """Run, continue or list a sweep and return its exit code.

    Args:
        composer: composes each job.
        command: the command line without ``resume=``.
        value: of ``resume=``: a sweep's directory, auto, or None.

    Raises:
        ConfigError: problems of any job, before the first starts.
        SafetyError: as above.
    """
    directory, typed = _directory(value), command.overrides
    if directory is not None:
        spec = read_yaml(directory / resume.SPEC)
        saved = [str(text) for text in spec.get("overrides") or []]
        command = dataclasses.replace(command, overrides=resume.merge(saved, typed))
    if any(text.startswith(("hydra/launcher=", "hydra/sweeper=")) for text in command.overrides):
        from mtl_cli.plugins import through_hydra

        return through_hydra(command)
    jobs = grid.plan(composer, command)
    place = grid.place([job.cfg for job in jobs])
    if value == "auto" and not command.list_jobs:
        directory = grid.newest(place, command)
    swept = swept_keys(composer, command.overrides)
    root = directory or grid.new_directory(place)
    grid.settle(jobs, root, swept)
    if command.list_jobs:
        lines = grid.shell_lines(command, jobs)
        if directory is not None:
            added = [text for text in typed if text.partition("=")[0] not in swept]
            lines = _continuing_lines(command, jobs, added)
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        return OK
    if command.dry_run:
        sys.stderr.write(f"mtl: {len(jobs)} jobs are in order; the first one:\n")
        return launch.run_one(command, jobs[0].cfg, None, jobs[0].overrides)
    _write_spec(root, command, jobs)
    return _run_all(command, jobs, root)


def _continuing_lines(command: Command, jobs: Sequence[Job], added: Sequence[str]) -> list[str]:
    """One shell line per job of an existing sweep that is not finished; starts or continues it.

    ``added`` was typed now: the saved runs do not have it yet. A line only names its job, so the
    sweep's file must know it.
    """
    _write_spec(jobs[0].run_dir.parent, command, jobs)
    left = [job for job in jobs if not _finished(job)]
    if len(left) < len(jobs):
        sys.stderr.write(f"mtl: {len(jobs) - len(left)} of {len(jobs)} jobs finished earlier\n")
    words = ["mtl", "train", *grid.flags(command)]
    return [shlex.join([*words, f"resume={job.run_dir}", *added]) for job in left]


def _run_all(command: Command, jobs: list[Job], root: Path) -> int:
    """Run the jobs in order; the table is printed whatever happens."""
    stopped = False
    try:
        with _stoppable():
            for number, job in enumerate(jobs, 1):
                with _isolated():
                    _run_job(command, job, f"job {number}/{len(jobs)} {job.key}")
                if job.exit_code in INTERRUPTED:
                    stopped = True
                    break
    except KeyboardInterrupt:
        stopped = True
    finally:
        _print_table(jobs, root)
    if stopped:
        sys.stderr.write(
            f"mtl: stopped; continue with: mtl train resume={shlex.quote(str(root))}\n"
        )
        return STOPPED
    return SweepError.exit_code if any(job.state == "failed" for job in jobs) else OK


def _run_job(command: Command, job: Job, title: str) -> None:
    """Run one job and record how it ended; nothing but a signal escapes."""
    started = time.monotonic()
    try:
        cfg = _continued(job)
        if cfg is None:
            job.state = "skipped"
            sys.stderr.write(f"mtl: {title}: finished earlier\n")
            return
        sys.stderr.write(f"mtl: {title}{': continues' if cfg.resume else ''}\n")
        job.exit_code = launch.run_one(command, cfg, job.run_dir, job.overrides)
    except MtlError as error:
        job.exit_code, job.reason = error.exit_code, str(error).splitlines()[-1]
        sys.stderr.write(f"mtl: error: {job.key}: {job.reason}\n")
    except SystemExit as error:
        job.exit_code = error.code if isinstance(error.code, int) else UNEXPECTED
    except Exception as error:  # one job's bug must not cost the others
        job.exit_code = UNEXPECTED
        job.reason = f"{type(error).__name__}: {error}".splitlines()[0]
        sys.stderr.write(f"mtl: error: {job.key}: {job.reason}\n")
        job.run_dir.mkdir(parents=True, exist_ok=True)
        (job.run_dir / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        job.seconds = time.monotonic() - started
    _judge(job)


def _judge(job: Job) -> None:
    if job.exit_code == OK:
        job.state = "finished"
        return
    job.state = "interrupted" if job.exit_code in INTERRUPTED else "failed"
    status = _json(job.run_dir / resume.STATUS)
    said = status.get("reason") if status.get("exit_code") == job.exit_code else None
    job.reason = job.reason or str(
        said or f"exit {job.exit_code}"
    )  # a refused resume writes nothing


def _continued(job: Job) -> DictConfig | None:
    """The config to run with: None if done, with ``resume`` set if there is a state to continue.

    Raises:
        CheckpointError: the saved state does not fit what is asked now.
    """
    status = _json(job.run_dir / resume.STATUS)
    config = job.run_dir / resume.CONFIG
    if not config.is_file():
        return job.cfg
    if status.get("state") == "failed":
        _clear(job.run_dir)
        return job.cfg
    changes = _changes(job)
    if status.get("state") == "finished" and not changes:
        return None
    for note in resume.judge(changes, job.run_dir):
        sys.stderr.write(f"mtl: {note}\n")
    if any(job.run_dir.glob("checkpoints/*.pt")):
        cfg = job.cfg.copy()
        cfg.resume = str(job.run_dir)
        return cfg
    return job.cfg


def _changes(job: Job) -> list[tuple[str, Any, Any]]:
    """(key, saved, asked now) of everything that differs from the run in the job's directory."""
    saved = read_yaml(job.run_dir / resume.CONFIG)
    return [c for c in resume.difference(saved, resume.plain(job.cfg)) if c[0] != "resume"]


def _finished(job: Job) -> bool:
    """Whether there is nothing left to do."""
    status = _json(job.run_dir / resume.STATUS)
    known = (job.run_dir / resume.CONFIG).is_file()
    return known and status.get("state") == "finished" and not _changes(job)


def _clear(directory: Path) -> None:
    """Make room for a failed job to be done again; what it said stays as error.N.txt."""
    number = 1 + len(list(directory.glob("error.*.txt")))
    for path in directory.iterdir():
        if path.name == "error.txt":
            path.rename(directory / f"error.{number}.txt")
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif not re.fullmatch(r"error\.\d+\.txt", path.name):
            path.unlink()


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Between two jobs a signal ends the sweep in order; during one the job has its own handlers."""

    def stop(number: int, frame: object) -> None:
        del number, frame
        raise KeyboardInterrupt

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Give the next job the process as the first one found it."""
    import logging

    import torch

    flags = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    strict = torch.are_deterministic_algorithms_enabled()
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    states = torch.get_rng_state(), random.getstate()
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags
        torch.use_deterministic_algorithms(strict)
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        root = logging.getLogger()
        for handler in [h for h in root.handlers if h not in handlers]:
            root.removeHandler(handler)
            handler.close()
        root.setLevel(level)
        gc.collect()
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()


def _directory(value: str | None) -> Path | None:
    """Directory of the sweep that ``resume=value`` names, None if it names none."""
    if value is None or value == "auto":
        return None
    if not is_sweep(value):
        raise CheckpointError(
            f"resume={value}: not a sweep (no {resume.SPEC} in it); ls multirun/*/"
        )
    return Path(value).expanduser().resolve()


def _write_spec(root: Path, command: Command, jobs: Sequence[Job]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    swept: dict[str, list[str]] = {}
    for job in jobs:
        for text in job.overrides:
            key, _, value = text.partition("=")
            swept.setdefault(key, [])
            if value not in swept[key]:
                swept[key].append(value)
    spec = {
        "argv": ["mtl", "train", *command.argv],
        "overrides": command.overrides,
        "grid": {key: values for key, values in swept.items() if len(values) > 1},
        "jobs": {job.key: job.overrides for job in jobs},
    }
    temporary = root / f"{resume.SPEC}.tmp.{os.getpid()}"
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(spec)), encoding="utf-8")
    temporary.replace(root / resume.SPEC)


def _row(job: Job) -> dict[str, Any]:
    """What the closing table shows."""
    summary = _json(job.run_dir / "summary.json")
    best = summary.get("best") or {}
    return {
        "job": job.key,
        "state": job.state,
        "exit_code": job.exit_code,
        "reason": job.reason,
        "run": str(job.run_dir),
        "seconds": job.seconds,
        "score": best.get("score"),
        "metrics": best.get("metrics") or {},
        "directions": summary.get("directions") or {},
        "units": summary.get("units") or {},
    }


def _print_table(jobs: Sequence[Job], root: Path) -> None:
    rows = [_row(job) for job in jobs]
    try:
        from mtl_cli.console import sweep_table
    except ImportError:
        for row in rows:
            sys.stdout.write(f"{row['job']}  {row['state']}  {row['reason']}\n")
    else:
        sweep_table(rows)
    sys.stdout.write(f"{root}\n")
    sys.stdout.flush()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
