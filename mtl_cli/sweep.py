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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl_cli import launch, resume
from mtl_cli.compose import Composer
from mtl_cli.config import raise_all, read_yaml
from mtl_cli.errors import (
    OK,
    STOPPED,
    UNEXPECTED,
    CheckpointError,
    ConfigError,
    MtlError,
    SweepError,
)
from mtl_cli.overrides import Command, expand, swept_keys

SPEC = "multirun.yaml"
INTERRUPTED = {STOPPED, 130, 143}


@dataclass
class Job:
    """One point of the grid.

    Args:
        key: short name of what varies, also its directory.
        overrides: of this job alone.
        cfg: its checked config.
        run_dir: where it runs.
        state: waiting | skipped | finished | failed | interrupted.
        exit_code: what the job returned.
        reason: last line of its failure.
        seconds: wall time in this process.
    """

    key: str
    overrides: list[str]
    cfg: DictConfig
    run_dir: Path
    state: str = "waiting"
    exit_code: int = OK
    reason: str = ""
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """What the closing table shows."""
        summary = _json(self.run_dir / "summary.json")
        best = summary.get("best") or {}
        return {
            "job": self.key,
            "state": self.state,
            "exit_code": self.exit_code,
            "reason": self.reason,
            "run": str(self.run_dir),
            "seconds": self.seconds,
            "score": best.get("score"),
            "metrics": best.get("metrics") or {},
            "directions": summary.get("directions") or {},
            "units": summary.get("units") or {},
        }


def is_sweep(value: str | None) -> bool:
    """Whether ``resume=value`` names a sweep's directory."""
    return value is not None and (Path(value).expanduser() / SPEC).is_file()


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
    directory = _directory(command, value)
    if directory is not None:
        spec = read_yaml(directory / SPEC)
        saved = [str(text) for text in spec.get("overrides") or []]
        command = dataclasses.replace(command, overrides=resume.merge(saved, command.overrides))
    if any(text.startswith(("hydra/launcher=", "hydra/sweeper=")) for text in command.overrides):
        from mtl_cli.plugins import through_hydra

        return through_hydra(command)
    jobs = plan(composer, command, directory)
    if command.list_jobs:
        sys.stdout.write("".join(f"{line}\n" for line in shell_lines(command, jobs)))
        return OK
    if command.dry_run:
        sys.stderr.write(f"mtl: {len(jobs)} jobs are in order; the first one:\n")
        return launch.run_one(command, jobs[0].cfg, None, jobs[0].overrides)
    root = jobs[0].run_dir.parent
    _write_spec(root, command, jobs)
    return _run_all(command, jobs, root)


def plan(composer: Composer, command: Command, directory: Path | None) -> list[Job]:
    """Compose and check every job of the grid.

    Raises:
        ConfigError: every problem of every job, each once.
    """
    grid = expand(composer, command.overrides)
    keys = _keys(grid, swept_keys(composer, command.overrides))
    jobs: list[Job] = []
    problems: list[str] = []
    for key, overrides in zip(keys, grid, strict=True):
        single = dataclasses.replace(command, overrides=overrides, multirun=False)
        cfg, found = launch.prepare(composer, single)
        problems += [text for text in found if text not in problems]
        if cfg is not None:
            jobs.append(Job(key, overrides, cfg, Path()))
    raise_all(problems)
    root = directory or _new_directory([job.cfg for job in jobs])
    for job in jobs:
        job.run_dir = root / job.key
    return jobs


def shell_lines(command: Command, jobs: Sequence[Job]) -> list[str]:
    """One complete shell line per job: same line, same run, so a scheduler may repeat it."""
    flags = [
        part for d in command.config_dirs for part in ("--config-dir", str(Path(d).absolute()))
    ]
    flags += [part for package in command.allow_code for part in ("--allow-code", package)]
    lines = []
    for job in jobs:
        name = f"run_name={job.key}-{resume.digest(job.overrides, 4)}"
        lines.append(shlex.join(["mtl", "train", *flags, *job.overrides, name, "resume=auto"]))
    return lines


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
    job.reason = job.reason or str(status.get("reason") or f"exit {job.exit_code}")


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
    changes = [
        c for c in resume.difference(read_yaml(config), resume.plain(job.cfg)) if c[0] != "resume"
    ]
    if status.get("state") == "finished" and not changes:
        return None
    for note in resume.judge(changes, job.run_dir):
        sys.stderr.write(f"mtl: {note}\n")
    if any(job.run_dir.glob("checkpoints/*.pt")):
        cfg = job.cfg.copy()
        cfg.resume = str(job.run_dir)
        return cfg
    return job.cfg


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


def _directory(command: Command, value: str | None) -> Path | None:
    """Directory of the sweep to continue."""
    if value is None:
        return None
    if is_sweep(value):
        return Path(value).expanduser().resolve()
    if value != "auto":
        raise CheckpointError(f"resume={value}: not a sweep (no {SPEC} in it); ls multirun/*/")
    found = [
        path
        for path in Path("multirun").glob(f"*/*/{SPEC}")
        if read_yaml(path).get("overrides") == command.overrides
    ]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent.resolve() if newest and not command.list_jobs else None


def _new_directory(cfgs: Sequence[DictConfig]) -> Path:
    tasks = {str(cfg.task.name) for cfg in cfgs}
    outputs = {str(cfg.output_dir) for cfg in cfgs}
    if len(outputs) > 1:
        raise ConfigError("output_dir: cannot be swept over; a sweep has one directory")
    root = outputs.pop()
    place = Path("multirun" if root == "outputs" else root).expanduser()
    letters = "".join(random.SystemRandom().choices("abcdefghijkmnpqrstuvwxyz23456789", k=3))
    stamp = time.strftime("%Y%m%d-%H%M%S") + f"-{letters}"
    return (place / (tasks.pop() if len(tasks) == 1 else "several") / stamp).resolve()


def _keys(grid: Sequence[Sequence[str]], swept: Sequence[str]) -> list[str]:
    """Short names of what varies, safe in paths and in Hydra's grammar: weighting-equal_seed-1."""
    short = [_last(key) for key in swept]
    names = {k: _last(k) if short.count(_last(k)) == 1 else k.split("@")[-1] for k in swept}
    keys = []
    for overrides in grid:
        values = dict(text.partition("=")[::2] for text in overrides)
        parts = [f"{names[key]}-{_safe(values[key])}" for key in names]
        key = _safe("_".join(parts)) or "job"
        if len(key) > 100:
            key = f"{key[:90]}-{resume.digest(overrides)}"
        keys.append(key)
    twice = {key for key in keys if keys.count(key) > 1}
    return [
        f"{key}-{resume.digest(overrides)}" if key in twice else key
        for key, overrides in zip(keys, grid, strict=True)
    ]


def _last(key: str) -> str:
    return key.lstrip("+~").rpartition("@")[2].rpartition(".")[2]


def _safe(value: str) -> str:
    text = Path(value).stem if value.endswith((".yaml", ".yml")) else value
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


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
    temporary = root / f"{SPEC}.tmp.{os.getpid()}"
    temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(spec)), encoding="utf-8")
    temporary.replace(root / SPEC)


def _print_table(jobs: Sequence[Job], root: Path) -> None:
    rows = [job.row() for job in jobs]
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
