"""``mtl conf``: list, show, copy and check config files; no torch."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from mtl_cli import allow
from mtl_cli.compose import Composer
from mtl_cli.config import check, raise_all, read_yaml
from mtl_cli.errors import OK, ConfigError, nearest
from mtl_cli.launch import prepare, show
from mtl_cli.overrides import Command, expand, parse

USAGE = """\
usage: mtl conf ls [GROUP] [--config-dir DIR]
       mtl conf show [key=value ...] [-p NODE] [--resolve]   the composed config of a run
       mtl conf show GROUP/NAME                              one file
       mtl conf copy GROUP/NAME NEW.yaml                     a file of your own to edit
       mtl conf check [FILE | key=value ...]                 every problem at once
"""


def main(argv: Sequence[str]) -> int:
    """Run ``mtl conf``.

    Raises:
        ConfigError: an unknown verb, group or option, or problems that check found.
    """
    if not argv or argv[0] in {"-h", "--help"}:
        sys.stdout.write(USAGE)
        return OK
    verbs = {"ls": _ls, "show": _show, "copy": _copy, "check": _check}
    if argv[0] not in verbs:
        raise ConfigError(
            f"mtl conf: no '{argv[0]}'{nearest(argv[0], verbs)} (has {', '.join(verbs)})"
        )
    if any(flag in argv for flag in ("-h", "--help")):
        sys.stdout.write(USAGE)
        return OK
    command = parse(argv[1:])
    for package in command.allow_code:
        allow.allow(package)
    verbs[argv[0]](Composer(command.config_dirs), command)
    return OK


def _ls(composer: Composer, command: Command) -> None:
    if not command.overrides:
        for group in composer.groups():
            sys.stdout.write(f"{group:<11} {', '.join(composer.options(group))}\n")
        return
    for group in command.overrides:
        if group not in composer.groups():
            groups = composer.groups()
            raise ConfigError(
                f"no group '{group}'{nearest(group, groups)} (has {', '.join(groups)})"
            )
        width = max(map(len, composer.options(group)), default=0)
        for option in composer.options(group):
            sys.stdout.write(f"{option:<{width}}  {_headline(composer.file(group, option))}\n")


def _headline(path: Path | None) -> str:
    """The comment that says what a file is."""
    lines = path.read_text(encoding="utf-8").splitlines() if path else []
    comments = [line for line in lines if line.startswith("# ") and "@package" not in line]
    return comments[0][2:] if comments else ""


def _show(composer: Composer, command: Command) -> None:
    if len(command.overrides) == 1 and "=" not in command.overrides[0]:
        sys.stdout.write(_file(composer, command.overrides[0]).read_text(encoding="utf-8"))
        return
    show(command)


def _copy(composer: Composer, command: Command) -> None:
    if len(command.overrides) != 2:
        raise ConfigError("mtl conf copy: needs two words; type mtl conf copy GROUP/NAME NEW.yaml")
    source, name = _file(composer, command.overrides[0]), command.overrides[1]
    target = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    if target.exists():
        raise ConfigError(f"{target}: exists already; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    sys.stdout.write(f"{target}\n")


def _file(composer: Composer, place: str) -> Path:
    group, _, option = place.removesuffix(".yaml").rpartition("/")
    if group not in composer.groups():
        groups = composer.groups()
        raise ConfigError(
            f"{place}: no group '{group}'{nearest(group, groups)} (expected GROUP/NAME)"
        )
    path = composer.file(group, option)
    if path is None:
        options = composer.options(group)
        close = nearest(option, options)
        raise ConfigError(
            f"no '{option}' in group '{group}'{close or ';'} choices: {', '.join(options)}"
        )
    return path


def _check(composer: Composer, command: Command) -> None:
    """Check a saved config, a task of one file, or what the overrides compose to."""
    files = [text for text in command.overrides if "=" not in text]
    overrides = [text for text in command.overrides if "=" in text]
    for file in files:
        raw = read_yaml(Path(file))
        if {"task", "optimizer", "weighting"} <= set(raw):  # a run's config.yaml
            raise_all(check(OmegaConf.create(raw)))
        else:
            overrides.append(f"task={Path(file).absolute()}")
    problems: list[str] = []
    if overrides or not files:
        for job in expand(composer, overrides):
            single = dataclasses.replace(command, overrides=job)
            problems += prepare(composer, single)[1]
    raise_all(problems)
    sys.stdout.write("in order\n")
