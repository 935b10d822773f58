"""The grid of a sweep: its jobs, checked, their names, and the directory that each one has."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from mtl_cli import launch, resume
from mtl_cli.compose import Composer
from mtl_cli.config import raise_all, read_yaml
from mtl_cli.errors import OK, ConfigError
from mtl_cli.overrides import Command, expand, swept_keys


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


def plan(composer: Composer, command: Command) -> list[Job]:
    """Compose and check every job of the grid; where each runs is settled afterwards.

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
    return jobs


def settle(jobs: Sequence[Job], root: Path, swept: Sequence[str]) -> None:
    """Give every job its directory: the one that already holds its setting, else a new one.

    A larger grid names its jobs by more keys, so the name alone would do again what is done.
    """
    saved: dict[str, dict[str, Any]] = {}
    for path in sorted(root.glob(f"*/{resume.CONFIG}")):
        with contextlib.suppress(ConfigError):  # the job of that name says that it is damaged
            saved[path.parent.name] = read_yaml(path)
    homes: dict[str, str] = {}  # key of a job -> name of its directory
    for free in (("resume",), tuple(key for key in resume.FREE if key not in swept)):
        names: dict[str, list[str]] = {}
        for name, config in saved.items():
            if name not in homes.values():
                names.setdefault(resume.setting(config, free), []).append(name)
        for job in jobs if names else ():
            same = names.get(resume.setting(resume.plain(job.cfg), free), [])
            if job.key not in homes and (len(same) == 1 or (same and free == ("resume",))):
                homes[job.key] = same.pop(0)
    for job in jobs:
        if job.key not in homes and job.key in homes.values():  # the name is another job's
            job.key = f"{job.key}-{resume.digest(job.overrides)}"
        job.key = homes.get(job.key, job.key)
        job.run_dir = root / job.key


def shell_lines(command: Command, jobs: Sequence[Job]) -> list[str]:
    """One complete shell line per job: same line, same run, so a scheduler may repeat it."""
    lines = []
    for job in jobs:
        name = f"run_name={job.key}-{resume.digest(job.overrides, 4)}"
        words = ["mtl", "train", *flags(command), *job.overrides, name, "resume=auto"]
        lines.append(shlex.join(words))
    return lines


def flags(command: Command) -> list[str]:
    """Flags that each job of the sweep needs as well."""
    flags = [
        part for d in command.config_dirs for part in ("--config-dir", str(Path(d).absolute()))
    ]
    return flags + [part for package in command.allow_code for part in ("--allow-code", package)]


def newest(place: Path, command: Command) -> Path | None:
    """The newest sweep that the same overrides started."""
    found = [
        path
        for path in place.glob(f"*/{resume.SPEC}")
        if read_yaml(path).get("overrides") == command.overrides
    ]
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return newest.parent if newest else None


def place(cfgs: Sequence[DictConfig]) -> Path:
    """Where the sweeps of these jobs lie: multirun/TASK, or below their ``output_dir``."""
    tasks = {str(cfg.task.name) for cfg in cfgs}
    outputs = {str(cfg.output_dir) for cfg in cfgs}
    if len(outputs) > 1:
        raise ConfigError("output_dir: cannot be swept over; a sweep has one directory")
    root = outputs.pop()
    place = Path("multirun" if root == "outputs" else root).expanduser()
    return (place / (tasks.pop() if len(tasks) == 1 else "several")).resolve()


def new_directory(place: Path) -> Path:
    """Of a new sweep: time and three random characters, since two may start in one second."""
    letters = "".join(random.SystemRandom().choices("abcdefghijkmnpqrstuvwxyz23456789", k=3))
    return place / (time.strftime("%Y%m%d-%H%M%S") + f"-{letters}")


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
