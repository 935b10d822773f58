"""``mtl conf``: list, show, copy and check config files; no torch."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
       mtl conf check FILE|NAME --laws [--allow-code PKG]    does a weighting strategy keep the laws?
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
    laws = argv[0] == "check" and "--laws" in argv
    command = parse([a for a in argv[1:] if not (laws and a == "--laws")])
    for package in command.allow_code:
        allow.allow(package)
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script lacks the cwd, where a user's package may lie
    (_check_laws if laws else verbs[argv[0]])(Composer(command.config_dirs), command)
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


def _check_laws(composer: Composer, command: Command) -> None:
    """Check the config of one strategy, then the strategy itself.

    Raises:
        ConfigError: the config is wrong, or a required law is broken.
    """
    names = [text for text in command.overrides if "=" not in text]
    if len(names) != 1:
        raise ConfigError(
            f"mtl conf check --laws: found {len(names)} strategies, expected one; type "
            "mtl conf check FILE|NAME --laws"
        )
    node = _weighting(composer, command, names[0])
    from mtl_cli.build import make
    from mtl_cli.task import Objective
    from mtl_cli.weighting import base, laws, zoo

    def build(objectives: Sequence[Objective]) -> base.Weighting:
        strategy: base.Weighting = make(node, "weighting", objectives=objectives, seed=0)
        return strategy

    families = (base.LossWeighting, base.GramianWeighting, base.GradientWeighting)
    if not isinstance(build(zoo.objectives(3)), families):
        expected = " or ".join(family.__name__ for family in families)
        raise ConfigError(
            f"weighting._target_: not a weighting strategy (found {node['_target_']}, expected a "
            f"class based on {expected})"
        )
    broken = []
    width = max(map(len, (*laws.REQUIRED, *laws.FACTS)))
    for found in laws.examine(build):
        yes, no = ("keeps", "BREAKS") if found.required else ("holds", "does not hold")
        sys.stdout.write(f"{yes if found.ok else no:<13}  {found.law:<{width}}  {found.detail}\n")
        if found.required and not found.ok:
            broken.append(found.law)
    if broken:
        raise ConfigError(
            f"{names[0]}: breaks {len(broken)} of {len(laws.REQUIRED)} required laws "
            f"({', '.join(broken)})"
        )


def _weighting(composer: Composer, command: Command, name: str) -> dict[str, Any]:
    """The checked weighting node of a file or of an option with its overrides."""
    overrides = [text for text in command.overrides if text != name]
    if not name.endswith((".yaml", ".yml")):
        chosen = dataclasses.replace(command, overrides=[f"weighting={name}", *overrides])
        cfg, problems = prepare(composer, chosen)
    else:
        if overrides:
            raise ConfigError(f"{overrides[0]}: not together with a file; write it into {name}")
        own = read_yaml(Path(name))
        keys: dict[str, Any] = {}
        for option in own.pop("defaults", None) or []:
            keys.update(composer.schema("weighting", option) if option != "_self_" else {})
        if "_target_" not in {**keys, **own}:
            raise ConfigError(f"{name}: no _target_; expected the YAML of a weighting strategy")
        cfg = composer.compose([]).cfg
        cfg["weighting"] = {**keys, **own}
        problems = [type(problem)(f"{name}: {problem}") for problem in check(cfg)]
    raise_all(problems)
    assert cfg is not None
    node = OmegaConf.to_container(cfg["weighting"], resolve=True)
    assert isinstance(node, dict)
    return {str(key): value for key, value in node.items()}
