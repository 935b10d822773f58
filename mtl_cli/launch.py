"""``mtl train``: from the command line to one checked config, then to the job or the sweep."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mtl_cli import allow
from mtl_cli.compose import Composer
from mtl_cli.config import check, raise_all, to_text
from mtl_cli.errors import OK, ConfigError
from mtl_cli.normalise import normalise
from mtl_cli.overrides import Command, parse, resolve


def train(argv: Sequence[str]) -> int:
    """Run ``mtl train`` and return its exit code.

    Raises:
        MtlError: as errors.py says.
    """
    command = parse(argv)
    for package in command.allow_code:
        allow.allow(package)
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script lacks the cwd, where a user's package may lie
    if command.help:
        from mtl_cli.usage import train_help

        sys.stdout.write(train_help(Composer(command.config_dirs), command))
        return OK
    if command.info or command.cfg in {"hydra", "all"}:
        from mtl_cli.plugins import through_hydra

        return through_hydra(command)
    if command.cfg:
        return show(command)
    return _start(command)


def show(command: Command) -> int:
    """Print the composed, checked config and start nothing."""
    composer = Composer(command.config_dirs)
    cfg, problems = prepare(composer, command)
    if cfg is None or problems:
        raise_all(problems)
    assert cfg is not None
    if command.package and command.package != "_global_":
        part = OmegaConf.select(cfg, command.package, default=None)
        if not isinstance(part, DictConfig):
            raise ConfigError(f"--package: no node '{command.package}'")
        cfg = part
    if command.resolve:
        OmegaConf.resolve(cfg)
    sys.stdout.write(to_text(cfg))
    return OK


def prepare(composer: Composer, command: Command) -> tuple[DictConfig | None, list[str]]:
    """Compose, normalise and check one job.

    Returns:
        the config, None if nothing can be composed, and one line per problem.
    """
    composed, problems = resolve(composer, command)
    if composed is None:
        return None, problems
    found = normalise(composed.cfg, _task_config(composer), command.overrides)
    # Problems of the overrides come first; the tree is checked without them.
    return composed.cfg, [*problems, *found, *check(composed.cfg, composed)]


def _task_config(composer: Composer) -> Callable[[str], DictConfig]:
    def config(task: str) -> DictConfig:
        command = Command([f"task={task}"], [])
        composed, problems = resolve(composer, command)
        if problems or composed is None:
            raise ConfigError(problems)
        return composed.cfg

    return config


def _start(command: Command) -> int:
    from mtl_cli import resume, sweep

    composer = Composer(command.config_dirs)
    value, overrides = resume.split(command.overrides)
    command = dataclasses.replace(command, overrides=overrides)
    if command.multirun or command.list_jobs or sweep.is_sweep(value):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "several ranks run one job; start a sweep without torchrun, or --list"
            )
        return sweep.run(composer, command, value)
    if value is None:
        cfg, problems = prepare(composer, command)
        raise_all(problems)
        assert cfg is not None
        return run_one(command, cfg, None, command.overrides)
    job = resume.load(composer, command, value)
    for line in job.notes if os.environ.get("RANK", "0") == "0" else ():
        sys.stderr.write(f"mtl: {line}\n")
    return run_one(command, job.cfg, job.run_dir, job.overrides)


def run_one(command: Command, cfg: DictConfig, run_dir: Path | None, overrides: list[str]) -> int:
    """Hand one checked config to the job; torch is imported from here on."""
    from mtl_cli.job import run_job

    return run_job(cfg, run_dir, overrides, dry_run=command.dry_run, debug=command.debug)
