"""What the user typed: flags and overrides, their repair, and what is wrong with them.

An override is text in Hydra's grammar (``key=value``). Repair happens before Hydra reads it, so
that every way of starting (one run, a sweep, a resumed run) sees the same text.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl_cli.compose import Composed, Composer
from mtl_cli.config import yaml_problem
from mtl_cli.errors import ConfigError, nearest
from mtl_cli.schema import GROUPS, OPTIONAL, TEXT
from mtl_cli.signature import is_mapping, signature
from mtl_cli.taskfile import is_task_file, unquote

PLAIN_VALUE = re.compile(r"[\w/.@%+-]+")
FREE = {"lr_mult", "unfreeze_at"}  # root keys whose own keys are names of parts


@dataclass
class Command:
    """A parsed ``mtl train`` command line.

    Args:
        overrides: repaired overrides, in the order typed.
        argv: what was typed, for messages.
    """

    overrides: list[str]
    argv: list[str]
    multirun: bool = False
    list_jobs: bool = False
    dry_run: bool = False
    help: bool = False
    config_dirs: list[str] = field(default_factory=list)
    allow_code: list[str] = field(default_factory=list)
    cfg: str | None = None
    package: str | None = None
    resolve: bool = False
    info: str | None = None
    debug: bool = False


class Parser(argparse.ArgumentParser):
    """Reports problems as ConfigError and knows near misses."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            message = f"unknown option '{found[1]}'{nearest(found[1], flags)}"
        raise ConfigError(message)


def parse(argv: Sequence[str]) -> Command:
    """Split ``argv`` of ``mtl train`` into flags and repaired overrides, in any order.

    Raises:
        ConfigError: an unknown flag, or one without its value.
    """
    parser = Parser(prog="mtl train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--list", action="store_true", dest="list_jobs")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("-cd", "--config-dir", action="append", default=[], dest="config_dirs")
    parser.add_argument("--allow-code", action="append", default=[])
    parser.add_argument("-c", "--cfg", choices=("job", "hydra", "all"))
    parser.add_argument("-p", "--package")
    parser.add_argument("--resolve", action="store_true")
    parser.add_argument("-i", "--info", nargs="?", const="all")
    parser.add_argument("--debug", action="store_true")
    found = vars(parser.parse_intermixed_args(list(argv)))
    found["overrides"] = [repair(text) for text in found["overrides"]]
    return Command(argv=list(argv), **found)


def repair(text: str) -> str:
    """Rewrite one override into what Hydra understands.

    ``losses.age=l1`` chooses the option ``l1`` for that loss, ``task=./x.yaml`` becomes absolute,
    ``run_name=007`` stays text.
    """
    key, found, value = text.partition("=")
    if not found:
        return text
    if key.startswith("+") and key.lstrip("+") in GROUPS:
        return repair(text.lstrip("+"))  # the group is in the defaults list already
    if match := re.fullmatch(r"(head|loss)(?:s|es)\.([\w-]+)", key):
        option = value and value[0] not in "{[$" and value != "null"
        return f"{match[1]}@{key}={value}" if option else text
    if key == "task" or re.fullmatch(r"schedule\.stages\.[\w-]+\.task", key):
        return f"{key}={','.join(_absolute(part) for part in _split(value))}"
    if key in TEXT and re.fullmatch(
        r"[\d._+-][\w.+-]*|true|false|yes|no|on|off", value, re.IGNORECASE
    ):
        return f"{key}='{value}'"
    return text


def _absolute(value: str) -> str:
    if not is_task_file(value):
        return value
    path = str(Path(unquote(value)).expanduser().absolute())
    return path if PLAIN_VALUE.fullmatch(path) else quote(path)


def _split(value: str) -> list[str]:
    """Split a simple comma list; anything with brackets or quotes is left whole."""
    return [value] if re.search(r"[\[({'\"]", value) else value.split(",")


def quote(value: str) -> str:
    """A value in the quotes of Hydra's grammar."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def command_line(argv: Sequence[str], *flags: str) -> str:
    """A line that can be pasted into a shell."""
    return shlex.join(["mtl", "train", *flags, *argv])


def expand(composer: Composer, overrides: Sequence[str]) -> list[list[str]]:
    """All jobs of a sweep, the last key varying fastest, by Hydra's own grammar.

    Raises:
        ConfigError: an override cannot be read, or sweeps over an interval.
    """
    jobs: list[list[str]] = [[]]
    parser = OverridesParser.create(config_loader=composer.loader)
    last = {text.partition("=")[0]: index for index, text in enumerate(overrides)}
    for index, text in enumerate(overrides):
        if last[text.partition("=")[0]] != index:
            continue  # typed again later
        override = _parse(parser, text)
        if isinstance(override, str):
            raise ConfigError(override)
        if not override.is_sweep_override():
            jobs = [[*job, text] for job in jobs]
            continue
        if not override.is_discrete_sweep():
            raise ConfigError(f"{text}: cannot be enumerated (expected a list, range or glob)")
        key = override.get_key_element()
        values = list(override.sweep_string_iterator())
        if not values:
            raise ConfigError(f"{text}: matches nothing; look with mtl conf ls {key.split('@')[0]}")
        jobs = [[*job, f"{key}={value}"] for job in jobs for value in values]
    return jobs


def swept_keys(composer: Composer, overrides: Sequence[str]) -> list[str]:
    """Keys of the overrides that have several values."""
    parser = OverridesParser.create(config_loader=composer.loader)
    parsed = [_parse(parser, text) for text in overrides]
    return [o.get_key_element() for o in parsed if not isinstance(o, str) and o.is_sweep_override()]


def _parse(parser: Any, text: str) -> Override | str:
    """The parsed override, or what is wrong with it."""
    try:
        override = parser.parse_overrides([text])[0]
    except (OverrideParseException, HydraException):
        key, found, value = text.partition("=")
        if not found:
            return f"'{text}' is not understood (expected key=value)"
        fixed = shlex.quote(f"{key}={quote(value)}")
        return f"{text}: special characters need quotes; type {fixed}"
    assert isinstance(override, Override)
    return override


def resolve(composer: Composer, command: Command) -> tuple[Composed | None, list[str]]:
    """Compose one job and collect everything that is wrong with its overrides.

    Returns:
        the config composed from the overrides that make sense (None if none can be), and one line
        per problem.
    """
    return _Resolver(composer, command).run()


class _Resolver:
    """One composition, with an explanation if Hydra refuses."""

    def __init__(self, composer: Composer, command: Command) -> None:
        self.composer = composer
        self.command = command
        self.groups = set(composer.groups())
        self.problems: list[str] = []
        self.composed: dict[tuple[str, ...], Composed] = {}  # a tenth of a second each

    def run(self) -> tuple[Composed | None, list[str]]:
        choices, values = [], []
        for text, override in self._readable():
            if self._is_choice(override):
                choices.append((text, override))
            else:
                values.append((text, override))
        good = [text for text, override in choices if self._choice(text, override)]
        if not self.problems:
            composed = self._compose([*good, *(text for text, _ in values)], quiet=True)
            if composed is not None:
                return composed, []
        return self._explain(good, values), list(dict.fromkeys(self.problems))

    def _readable(self) -> Iterator[tuple[str, Override]]:
        """Overrides that parse and have one value."""
        parser = OverridesParser.create(config_loader=self.composer.loader)
        for text in self.command.overrides:
            override = _parse(parser, text)
            if isinstance(override, str):
                self.problems.append(override + self._meant(text))
            elif override.is_sweep_override():
                line = command_line(
                    [a for a in self.command.argv if a not in ("-m", "--multirun")], "-m"
                )
                self.problems.append(f"{text}: several values; did you mean: {line}")
            else:
                yield text, override

    def _meant(self, text: str) -> str:
        """Hint for a bare word that is the name of an option."""
        owners = [g for g in self.groups if text in self.composer.options(g)]
        return f"; did you mean {owners[0]}={text}?" if owners else ""

    def _is_choice(self, override: Override) -> bool:
        key = override.key_or_group
        return key in self.groups or override.package is not None or key.startswith("hydra/")

    def _choice(self, text: str, override: Override) -> bool:
        """Whether a choice names an option, which exists."""
        group, option = override.key_or_group, override.value()
        if group.startswith("hydra/") or override.is_delete():
            return True
        if option is None and group in OPTIONAL:
            return False  # what the tree says already, and Hydra takes no null
        if group not in self.groups:
            self.problems.append(f"no group '{group}'{nearest(group, self.groups)}")
            return False
        options = self.composer.options(group)
        if isinstance(option, str) and (is_task_file(option) or option in options):
            if group == "task" and is_task_file(option) and not Path(option).is_file():
                self.problems.append(f"task={option}: no such file; correct the path")
                return False
            return True
        listed = ", ".join(options)
        if isinstance(option, (int, float)) and not isinstance(option, bool):
            base = self._compose([], quiet=True)
            places = _leaf_places(base.cfg, group) if base else []
            hint = f"; did you mean {places[0]}={text.partition('=')[2]}?" if places else ""
            self.problems.append(f"{text}: '{group}' chooses an option ({listed}){hint}")
            return False
        shown = "null" if option is None else option
        close = nearest(str(shown), options).replace("'", "")
        self.problems.append(f"no '{shown}' in group '{group}'{close or ';'} choices: {listed}")
        return False

    def _explain(self, choices: list[str], values: list[tuple[str, Override]]) -> Composed | None:
        """Compose from the choices alone, then judge every value against that tree."""
        plain = [text for text in choices if "@" not in text.partition("=")[0]]
        base = self._compose(plain, quiet=bool(self.problems))
        if base is None:
            return None
        typed = [text for text in choices if text not in plain]
        usable = [text for text in typed if self._placed(base, text)]
        chosen = self._compose([*plain, *usable]) or base
        kept = [
            fixed for text, override in values if (fixed := self._value(chosen.cfg, text, override))
        ]
        return self._compose([*plain, *usable, *kept])

    def _placed(self, base: Composed, text: str) -> bool:
        """Whether a choice for one output has that output."""
        key = text.lstrip("+~").partition("=")[0]
        if key in base.choices or text.startswith("+"):
            return True
        package = key.partition("@")[2]
        node, _, name = package.partition(".")
        if node in {"heads", "losses"} and name:
            self.problems.append(_no_output(base.cfg, name))
        else:
            near = nearest(key, [c for c in base.choices if not c.startswith("hydra/")])
            self.problems.append(f"'{key}' is not chosen anywhere{near}")
        return False

    def _value(self, cfg: DictConfig, text: str, override: Override) -> str | None:
        """The override if its key exists (or may be added), else None and a problem."""
        key = override.key_or_group
        if key.startswith("hydra.") or override.is_add() or override.is_force_add():
            return text
        parent, _, last = key.rpartition(".")
        if _exists(cfg, key):
            return f"++{text}" if isinstance(override.value(), dict) else text
        if self._free(cfg, key):
            return f"++{text}"
        node, _, rest = key.partition(".")
        name = rest.partition(".")[0]
        if node in {"heads", "losses"} and name and not _exists(cfg, f"{node}.{name}"):
            self.problems.append(_no_output(cfg, name))
            return None
        self.problems.append(f"unknown key '{key}'{self._near(cfg, key, parent, last)}")
        return None

    def _near(self, cfg: DictConfig, key: str, parent: str, last: str) -> str:
        places = _leaf_places(cfg, last)
        if places:
            return f"; did you mean '{places[0]}'?"
        while parent and not OmegaConf.is_dict(OmegaConf.select(cfg, parent, default=None)):
            parent, _, last = parent.rpartition(".")
        siblings = _keys(OmegaConf.select(cfg, parent) if parent else cfg)
        prefix = f"{parent}." if parent else ""
        hint = nearest(last, siblings)
        if hint and prefix:
            return hint.replace("'", f"'{prefix}", 1)
        return hint or (f" ({parent} has {', '.join(siblings)})" if parent else "")

    def _free(self, cfg: DictConfig, key: str) -> bool:
        """Whether the key lies in a mapping with names of the user's own, e.g. ``lr_mult``."""
        parts = key.split(".")
        for index in range(1, len(parts)):
            parent, name = ".".join(parts[: index - 1]), parts[index - 1]
            if not _exists(cfg, ".".join(parts[:index])):
                return False
            if name in FREE:
                return True
            node = OmegaConf.select(cfg, parent) if parent else None
            target = node.get("_target_") if isinstance(node, DictConfig) else None
            shape = signature(target) if isinstance(target, str) else None
            kind = shape.parameters[name].annotation if shape and name in shape.parameters else ""
            if is_mapping(kind) and name != "stages":
                return True
        return False

    def _compose(self, overrides: list[str], *, quiet: bool = False) -> Composed | None:
        key = tuple(overrides)
        try:
            if key not in self.composed:
                self.composed[key] = self.composer.compose(overrides)
            return self.composed[key]
        except ConfigError as error:
            if not quiet:
                self.problems += error.problems
        except yaml.YAMLError as error:
            if not quiet:
                self.problems.append(yaml_problem(error))
        except (HydraException, OmegaConfBaseException) as error:
            if not quiet:
                self.problems.append(_first_lines(error))
        return None


def _no_output(cfg: DictConfig, name: str) -> str:
    outputs = _keys(OmegaConf.select(cfg, "task.outputs", default=None))
    task = OmegaConf.select(cfg, "task.name", default="")
    return f"task '{task}' has no '{name}' (has {', '.join(outputs)})"


def _leaf_places(cfg: DictConfig, name: str) -> list[str]:
    """Dotted places of leaves with this name under the components, shallow ones first."""
    found: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, Mapping):
            for key, value in node.items():
                place = f"{path}.{key}" if path else str(key)
                if key == name and path and not isinstance(value, Mapping):
                    found.append(place)
                walk(value, place)

    walk(OmegaConf.to_container(cfg, resolve=False), "")
    order = ("data.", "optimizer.", "backbone.")
    return sorted(found, key=lambda p: (p.count("."), not p.startswith(order), p))


def _exists(cfg: DictConfig, key: str) -> bool:
    parent, _, last = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, default=None) if parent else cfg
    if OmegaConf.is_list(node):
        return last.isdigit() and int(last) < len(node)
    return OmegaConf.is_dict(node) and last in node.keys()  # noqa: SIM118 (`in node` skips ???)


def _keys(node: Any) -> list[str]:
    return [str(key) for key in node if not str(key).startswith("_")] if node else []


def _first_lines(error: BaseException) -> str:
    """Hydra's message, and the cause below it, on one line."""
    cause = error.__cause__ or error.__context__
    texts = [str(error), str(cause) if cause and str(cause) not in str(error) else ""]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    wanted = []
    for line in lines[:5]:
        if line.startswith("Config search path"):
            break
        if not line.startswith("To append to your config"):
            wanted.append(line)
    return " ".join(wanted)
