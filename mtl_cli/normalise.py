"""Brings a composed config into the one form that build reads: pruned, flat rules, stages' tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl_cli.errors import nearest
from mtl_cli.metric_names import DEFAULT_METRICS

RULES = ("lr_mult", "unfreeze_at", "task_lr")
# Data keys that a stage's own task takes over from the command line.
COMMON_DATA = (
    "image_size", "batch_size", "workers", "limit", "fraction", "split_seed", "cache", "cache_dir",
)  # fmt: skip


def normalise(
    cfg: DictConfig,
    task_config: Callable[[str], DictConfig],
    overrides: Sequence[str] = (),
) -> list[str]:
    """Normalise ``cfg`` in place.

    Args:
        cfg: a composed tree.
        task_config: composes the tree of another task, by option name or file.
        overrides: as typed; data keys among them hold for the stages' tasks too.

    Returns:
        one line per problem.
    """
    OmegaConf.set_struct(cfg, False)
    problems: list[str] = []
    for node in (cfg, *_stages(cfg).values(), cfg.get("schedule")):
        _flatten_rules(node)
    _metrics(cfg)
    for name, stage in _stages(cfg).items():
        if OmegaConf.is_dict(stage) and stage.get("task"):
            problems += _stage_task(f"schedule.stages.{name}", stage, task_config, overrides)
    problems += _only(cfg)
    return problems


def _stages(cfg: DictConfig) -> Mapping[Any, Any]:
    stages = OmegaConf.select(cfg, "schedule.stages", default=None, throw_on_missing=False)
    return stages if isinstance(stages, DictConfig) else {}


def _flatten_rules(node: Any) -> None:
    """``lr_mult: {heads: {age: 2}}`` -> ``lr_mult: {heads.age: 2}``; keys are names of parts."""
    if not isinstance(node, DictConfig):
        return
    for rule in RULES:
        value = node.get(rule) if rule in node else None
        if isinstance(value, DictConfig):
            node[rule] = dict(_flat(OmegaConf.to_container(value)))


def _flat(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        found += _flat(value, name) if isinstance(value, dict) else [(name, value)]
    return found


def _metrics(cfg: DictConfig) -> None:
    """Metrics by kind where the task names none."""
    outputs = OmegaConf.select(cfg, "task.outputs", default=None)
    if not isinstance(outputs, DictConfig) or not isinstance(cfg.task, DictConfig):
        return
    if cfg.task.get("metrics") is None:
        cfg.task.metrics = {}
    if not isinstance(cfg.task.metrics, DictConfig):
        return
    for name, output in outputs.items():
        kind = output.get("kind") if isinstance(output, DictConfig) else None
        if name not in cfg.task.metrics and kind in DEFAULT_METRICS:
            cfg.task.metrics[name] = list(DEFAULT_METRICS[kind])


def _only(cfg: DictConfig) -> list[str]:
    """Keep the outputs that ``only`` names, with their heads, losses and metrics."""
    only = cfg.get("only")
    if only is None:
        return []
    names = [only] if isinstance(only, str) else list(only)
    outputs = OmegaConf.select(cfg, "task.outputs", default=None)
    if not isinstance(outputs, DictConfig):
        return []
    unknown = [str(name) for name in names if name not in outputs]
    if unknown or not names:
        task = OmegaConf.select(cfg, "task.name", default="")
        has = ", ".join(map(str, outputs))
        return [
            f"only: task '{task}' has no '{name}' (has {has}){nearest(name, map(str, outputs))}"
            for name in unknown
        ] or [f"only: empty (expected some of {has})"]
    for node in (outputs, cfg.task.get("metrics"), cfg.get("heads"), cfg.get("losses")):
        if isinstance(node, DictConfig):
            for name in [key for key in node if key not in names]:
                del node[name]
    return []


def _stage_task(
    where: str,
    stage: DictConfig,
    task_config: Callable[[str], DictConfig],
    overrides: Sequence[str],
) -> list[str]:
    """Compose the task of one stage and store it beside its name."""
    from mtl_cli.errors import ConfigError

    try:
        other = task_config(str(stage.task))
    except ConfigError as error:
        return [f"{where}.task: {problem}" for problem in error.problems]
    for text in overrides:
        key, _, value = text.lstrip("+~").partition("=")
        name = key.removeprefix("data.")
        if key.startswith("data.") and name in COMMON_DATA and name in other.data:
            other.data[name] = OmegaConf.select(OmegaConf.from_dotlist([f"v={value}"]), "v")
    _metrics(other)
    stage.resolved = {
        node: OmegaConf.to_container(other[node], resolve=True)
        for node in ("task", "data", "heads", "losses")
    }
    return []
