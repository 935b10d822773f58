"""Hands a command line, repaired and checked, to Hydra's own front end.

Used where Hydra offers more than we do: ``--info``, ``--cfg hydra``, and launchers and sweepers of
other packages (``hydra/launcher=submitit_slurm``). The job is the same :func:`launch.run_one`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mtl_cli import launch
from mtl_cli.compose import Composer, version_base
from mtl_cli.config import ROOT_CONFIG, conf_dir, raise_all
from mtl_cli.errors import OK, ConfigError, SweepError
from mtl_cli.overrides import Command, expand
from mtl_cli.taskfile import is_task_file


def through_hydra(command: Command) -> int:
    """Run Hydra's ``main`` with the repaired command line.

    Raises:
        ConfigError: a job of the grid has problems, or a task file would not reach another machine.
    """
    arguments = [*_flags(command), *command.overrides]  # Hydra wants its flags first
    if command.multirun:
        _check_grid(command)
        arguments = ["--multirun", *arguments, *_sweep_directory(command)]
    failed = []

    def job(cfg: DictConfig) -> float | None:
        code, score = _job(cfg, command)
        if code != OK:
            failed.append(code)
        return score

    entry = hydra.main(config_path=str(conf_dir()), config_name=ROOT_CONFIG, **version_base())(job)
    GlobalHydra.instance().clear()
    log = logging.getLogger()
    handlers, level = list(log.handlers), log.level
    with mock.patch.object(sys, "argv", ["mtl", *arguments]):
        try:
            entry()
        except SystemExit as error:
            return error.code if isinstance(error.code, int) else OK
        finally:  # --info logs to the standard output
            log.handlers[:] = handlers
            log.setLevel(level)
    return SweepError.exit_code if failed else OK


def _flags(command: Command) -> list[str]:
    flags = []
    if command.config_dirs:
        flags += ["--config-dir", command.config_dirs[0]]
    if command.cfg:
        flags += ["--cfg", command.cfg]
    if command.package:
        flags += ["--package", command.package]
    if command.resolve:
        flags += ["--resolve"]
    if command.info:
        flags += ["--info", command.info]
    return flags


def _check_grid(command: Command) -> None:
    """Check what is written here before a launcher carries it elsewhere."""
    files = [t for t in command.overrides if t.startswith("task=") and is_task_file(t)]
    if files:
        raise ConfigError(
            f"{files[0]}: a launcher plugin reaches options only; put the file into a directory "
            "task/ and give --config-dir"
        )
    composer = Composer(command.config_dirs)
    problems: list[str] = []
    plain = [text for text in command.overrides if not text.startswith(("hydra.", "hydra/"))]
    for overrides in expand(composer, plain):
        _, found = launch.prepare(composer, dataclasses.replace(command, overrides=overrides))
        problems += found
    raise_all(problems)


def _sweep_directory(command: Command) -> list[str]:
    typed = {text.partition("=")[0] for text in command.overrides}
    wanted = {
        "hydra.sweep.dir": "multirun/plugin/${now:%Y%m%d-%H%M%S}",
        "hydra.sweep.subdir": "${hydra.job.num}",
    }
    return [f"{key}={value}" for key, value in wanted.items() if key not in typed]


def _job(cfg: DictConfig, command: Command) -> tuple[int, float | None]:
    """One job inside a launcher: its exit code and its score, for sweepers that optimise."""
    config = HydraConfig.get()
    overrides = [str(text) for text in config.overrides.task]
    command = dataclasses.replace(command, overrides=overrides, multirun=False)
    outer = GlobalHydra.instance().hydra  # composing takes Hydra's one seat; give it back after
    try:
        checked, problems = launch.prepare(Composer(command.config_dirs), command)
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = outer
    raise_all(problems)
    run_dir = Path(config.runtime.output_dir)
    code = launch.run_one(command, checked or cfg, run_dir, overrides)
    return code, _score(run_dir)


def _score(run_dir: Path) -> float | None:
    try:
        summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    score = (summary.get("best") or {}).get("score")
    return float(score) if score is not None else None
