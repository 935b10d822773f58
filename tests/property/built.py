"""Every conf/weighting/*.yaml as a strategy; the matrices are those of the shipped laws."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from mtl_cli.weighting.base import GramianWeighting, Weighting
from mtl_cli.weighting.zoo import Build, objectives

FILES = sorted((Path(__file__).parents[2] / "conf" / "weighting").glob("*.yaml"))
NAMES = [path.stem for path in FILES]
OURS = [n for n in NAMES if n != "torchjd"]


@cache
def settings(name: str) -> dict[str, Any]:
    return yaml.safe_load(next(p for p in FILES if p.stem == name).read_text())


def target(name: str) -> Any:
    module, _, attribute = settings(name)["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def build(name: str, count: int = 3, order: Tensor | None = None, **options: Any) -> Weighting:
    """A strategy with the values of its YAML, over ``count`` objectives in the given order."""
    values = {k: v for k, v in settings(name).items() if k != "_target_"}
    return target(name)(objectives(count, order), seed=11, **{**values, **options})


def maker(name: str, **options: Any) -> Build:
    """The same as the laws want it."""
    values = {k: v for k, v in settings(name).items() if k != "_target_"}
    return lambda chosen: target(name)(chosen, seed=11, **{**values, **options})


def kind(name: str) -> type:
    return target(name) if isinstance(target(name), type) else GramianWeighting


def needs_torchjd(name: str) -> bool:
    return name == "torchjd" and importlib.util.find_spec("torchjd") is None
