"""Composes the config tree with Hydra: search path, one-file tasks, choices and their origin."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from mtl_cli.config import ROOT_CONFIG, conf_dir, option_file, option_schema, read_yaml
from mtl_cli.errors import ConfigError
from mtl_cli.taskfile import file_of, is_task_file, register

BASE = "common"
BASELINE: dict[str, Any] = {
    "callbacks": {},
    "searchpath": [],
    "launcher": {"_target_": "hydra._internal.core_plugins.basic_launcher.BasicLauncher"},
    "sweeper": {
        "_target_": "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "max_batch_size": None,
        "params": None,
    },
    "job_logging": {"version": 1, "root": None, "disable_existing_loggers": False},
    "hydra_logging": {"version": 1, "root": None, "disable_existing_loggers": False},
}


class _UserDirectories(SearchPathPlugin):
    """Puts the directories of ``--config-dir`` in front of the shipped ones."""

    directories: tuple[str, ...] = ()

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for directory in reversed(self.directories):
            search_path.prepend("command-line", directory)


@dataclass(frozen=True)
class Composed:
    """A composed config with what Hydra knows about it.

    Args:
        cfg: the tree, without the ``hydra`` node.
        hydra: the ``hydra`` node.
        choices: ``group`` or ``group@package`` -> option.
        overrides: as typed, after repair.
        files: package -> YAML file of the option chosen there.
        schemas: package -> keys and defaults of the option chosen there.
        loose: files that write anywhere in the tree: experiments and tasks.
    """

    cfg: DictConfig
    hydra: DictConfig
    choices: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    schemas: dict[str, dict[str, Any]] = field(default_factory=dict)
    loose: list[Path] = field(default_factory=list)

    def origin(self, key: str) -> str:
        """File that sets ``key``, empty if the command line does or nothing is known."""
        for text in self.overrides:
            typed = text.lstrip("+~").partition("=")[0]
            if typed == key or key.startswith(f"{typed}.") or typed.startswith(f"{key}."):
                return ""
        for path in self.loose:
            raw = read_yaml(path)
            if _has(raw, key) or _has({"task": raw}, key):
                return _short(path)
        shipped = conf_dir()
        for package, path in self.files.items():
            if path.is_relative_to(shipped):
                continue
            if key.startswith(f"{package}.") and _has(read_yaml(path), key[len(package) + 1 :]):
                return _short(path)
        return ""

    def hydra_changed(self, node: str) -> bool:
        """Whether one of Hydra's own nodes differs from what the shipped tree says."""
        value = OmegaConf.to_container(self.hydra[node], resolve=False)
        return bool(value != BASELINE[node])


class Composer:
    """Composes configs from the shipped tree and the user's directories.

    Args:
        directories: ``--config-dir``; searched before the shipped ones.

    Raises:
        ConfigError: a directory does not exist.
    """

    def __init__(self, directories: Sequence[str | Path] = ()) -> None:
        self.directories = [Path(d).expanduser().resolve() for d in directories]
        missing = [str(d) for d in self.directories if not d.is_dir()]
        if missing:
            raise ConfigError([f"--config-dir: no such directory (found {d})" for d in missing])
        self.home = conf_dir()
        _UserDirectories.directories = tuple(f"file://{d}" for d in self.directories)
        if _UserDirectories not in Plugins.instance().discover(SearchPathPlugin):
            Plugins.instance().register(_UserDirectories)
        GlobalHydra.instance().clear()
        initialize_config_dir(str(self.home), job_name="mtl", **version_base())
        self.loader = GlobalHydra.instance().config_loader()

    def compose(self, overrides: Sequence[str]) -> Composed:
        """Compose the tree; Hydra's own exceptions escape, see ``overrides.explain``."""
        named = [self._task_name(text) for text in overrides]
        tree = compose(ROOT_CONFIG, overrides=named, return_hydra_config=True)
        hydra = tree.hydra
        choices = {str(k): v for k, v in hydra.runtime.choices.items()}
        cfg = OmegaConf.masked_copy(tree, [str(key) for key in tree if key != "hydra"])
        OmegaConf.set_struct(cfg, False)
        composed = Composed(cfg, hydra, choices, list(overrides))
        for key, option in choices.items():
            self._origin(composed, key, option)
        return composed

    def groups(self) -> list[str]:
        """Names of the config groups, without Hydra's own."""
        return sorted(g for g in self.loader.list_groups("") if g != "hydra")

    def options(self, group: str) -> list[str]:
        """Names of a group's options; files that others are based on are none."""
        found = self.loader.get_group_options(group, ObjectType.CONFIG)
        return [option for option in found if option != BASE]

    def file(self, group: str, option: str) -> Path | None:
        """YAML file of an option, the first on the search path."""
        return option_file((*self.directories, self.home), group, option)

    def schema(self, group: str, option: str) -> dict[str, Any]:
        """Keys of an option with their defaults, those of the options it is based on included."""
        return option_schema((*self.directories, self.home), group, option)

    def _origin(self, composed: Composed, key: str, option: Any) -> None:
        group, _, package = key.partition("@")
        if not isinstance(option, str) or group.startswith("hydra/"):
            return
        path = self.file(group, option) or (file_of(option) if group == "task" else None)
        if path is None:
            return
        if group in {"experiment", "task", "debug"}:
            composed.loose.append(path)
        if group not in {"experiment", "task", "debug"}:
            package = package.removeprefix("_global_").lstrip(".") or group
            composed.files[package] = path
            composed.schemas[package] = self.schema(group, option)

    @staticmethod
    def _task_name(text: str) -> str:
        """``task=/abs/x.yaml`` -> ``task=x``, the option that the file was registered as."""
        key, found, value = text.partition("=")
        if found and key == "task" and is_task_file(value):
            return f"task={register(value)}"
        return text


def _has(tree: Mapping[str, Any], key: str) -> bool:
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return False
        value = value[part]
    return True


def _short(path: Path) -> str:
    """A path as the user would type it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@functools.cache
def version_base() -> dict[str, Any]:
    """Hydra 1.3 wants ``version_base``; later ones may not have it."""
    wanted = "version_base" in inspect.signature(initialize_config_dir.__init__).parameters
    return {"version_base": "1.3"} if wanted else {}
