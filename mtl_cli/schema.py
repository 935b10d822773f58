"""Types and ranges of the keys that every run has; components have theirs in their own YAML."""

from __future__ import annotations

import re
from typing import Any

TYPES: dict[str, str] = {
    "epochs": "int",
    "seed": "int",
    "run_name": "str | None",
    "output_dir": "str",
    "resume": "str | None",
    "init_from": "str | None",
    "only": "str | Sequence[str] | None",
    "device": "str",
    "accumulate": "int",
    "clip_norm": "float | None",
    "deterministic": "bool | None",
    "save_every_steps": "int | None",
    "log_every_steps": "int",
    "best_by": "str | None",
    "patience": "int | None",
    "on_nonfinite": "str",
    "display": "str",
    "ema.decay": "float | None",
    "freeze": "Sequence[str]",
    "lr_mult": "Mapping[str, float]",
    "layer_decay": "float | None",
    "unfreeze_at": "Mapping[str, float]",
    "data.root": "str | None",
    "data.table": "str | None",
    "data.image_size": "int",
    "data.batch_size": "int",
    "data.workers": "int | str | None",
    "data.limit": "int | None",
    "data.fraction": "float | None",
    "data.split_seed": "int",
    "data.cache_dir": "str | None",
    "data.cache": "str",
    "data.bad_label": "str",
    "data.bad_image": "str",
    "data.resize": "str",
    "data.margin": "float",
    "data.drop_last": "bool",
    "data.separator": "str",
    "task.name": "str",
    "precision.init_scale": "float",
    "precision.growth_interval": "int",
    "optimizer.lr": "float",
    "optimizer.weight_decay": "float",
    "optimizer.betas": "tuple[float, float]",
    "optimizer.eps": "float",
    "optimizer.momentum": "float",
    "optimizer.nesterov": "bool",
}
# Of a stage of a schedule; null takes the run's.
STAGE: dict[str, str] = {
    "epochs": "int | None",
    "lr": "float | None",
    "freeze": "Sequence[str] | None",
    "lr_mult": "Mapping[str, float] | None",
    "layer_decay": "float | None",
    "unfreeze_at": "Mapping[str, float] | None",
    "start_from": "str | None",
    "only": "str | Sequence[str] | None",
    "task": "str | None",
}
RANGES: dict[str, str] = {
    "epochs": ">= 1",
    "seed": ">= 0",
    "accumulate": ">= 1",
    "clip_norm": "> 0",
    "save_every_steps": ">= 1",
    "log_every_steps": ">= 1",
    "patience": ">= 1",
    "ema.decay": "> 0 and < 1",
    "layer_decay": "> 0 and <= 1",
    "schedule.layer_decay": "> 0 and <= 1",
    "backbone.width": ">= 1",
    "data.image_size": ">= 8",
    "data.batch_size": ">= 1",
    "data.workers": ">= 0",
    "data.limit": ">= 1",
    "data.fraction": "> 0 and <= 1",
    "data.split_seed": ">= 0",
    "data.margin": ">= 0 and <= 1",
    "precision.init_scale": "> 0",
    "precision.growth_interval": ">= 1",
    "optimizer.lr": "> 0",
    "optimizer.weight_decay": ">= 0",
    "optimizer.betas": ">= 0 and < 1",
    "optimizer.eps": "> 0",
    "optimizer.momentum": ">= 0 and < 1",
    "lr.warmup": ">= 0 and < 1",
    "weighting.update_every": ">= 1",
}
# Range -> CLASS.PARAMETER of the shipped classes. The comments in conf/ say the same, as a test says.
ARGUMENTS: dict[str, str] = {
    "> 0": "AutoLambda.lr AutoWeighted.init DWA.temperature ExcessMTL.eta FairGrad.alpha FAMO.lr "
    "GradNorm.eps GradNorm.lr SDMGrad.lr STCH.mu UWSO.temperature",
    ">= 0": "AlignedMTL.tolerance AutoWeighted.lr_mult DBMTL.beta_sigma DBMTL.eps DTP.gamma "
    "DualProj.norm_eps DualProj.reg_eps ExcessMTL.eps FairGrad.max_norm FAMO.gamma GradNorm.alpha "
    "GradVac.eps IMTL.lr_mult IMTLL.lr_mult MoCo.beta_sigma MoCo.gamma MoCo.gamma_sigma MoCo.rho "
    "MoDo.gamma MoDo.rho NashMTL.max_norm OneCycle.final OneCycle.start SDMGrad.eps "
    "SDMGrad.mean_pull STCH.warmup_epochs Step.gamma Strong.ops Uncertainty.lr_mult "
    "UPGrad.norm_eps UPGrad.reg_eps",
    ">= 1": "SDMGrad.iterations",
    ">= 0 and < 1": "CAGrad.c CoVWeighting.decay DBMTL.beta SDMGrad.momentum",
    "> 0 and <= 1": "DTP.alpha GradVac.beta MoCo.beta",
    ">= 0 and <= 1": "Cosine.final GradDrop.leak Light.flip Strong.erase Strong.flip",
    ">= 0 and <= 30": "Strong.magnitude",
}
RANGES |= {place: limits for limits, places in ARGUMENTS.items() for place in places.split()}
CHOICES: dict[str, tuple[str, ...]] = {
    "on_nonfinite": ("skip", "stop"),
    "display": ("auto", "rich", "plain"),
    "precision.dtype": ("auto", "fp32", "bf16", "fp16", "fp64"),
    "data.cache": ("auto", "disk", "ram", "off"),
    "data.bad_label": ("error", "mask"),
    "data.bad_image": ("error", "mask"),
    "data.resize": ("crop", "pad"),
}
# Key -> pattern of its text, and how people say it.
PATTERNS: dict[str, tuple[str, str]] = {
    "device": (r"auto|cpu|cuda(:\d+)?|mps", "auto | cpu | cuda | cuda:N | mps"),
    "data.separator": (r"auto|.", "auto or one character"),
}
# Nodes that groups of options fill.
GROUPS = (
    "backbone", "task", "data", "heads", "losses", "weighting", "schedule", "optimizer", "lr",
    "precision", "augment", "logger", "experiment", "debug",
)  # fmt: skip
OPTIONAL = frozenset({"logger", "experiment", "debug"})  # groups of which none may be chosen
# Nodes and keys without which nothing runs.
NODES = (*(group for group in GROUPS if group not in OPTIONAL), "ema")
REQUIRED = (
    *(key for key in TYPES if "." not in key), "ema.decay", "task.name", "data.image_size",
    "data.batch_size", "optimizer.lr", "optimizer.weight_decay", "precision.dtype",
    "precision.init_scale", "precision.growth_interval",
)  # fmt: skip
ROOT = frozenset(key.split(".")[0] for key in TYPES) | frozenset(GROUPS)
OUTPUT: dict[str, str] = {
    "kind": "str",
    "unit": "str | None",
    "classes": "Sequence[str | int] | None",
    "center": "float | None",
    "scale": "float | None",
    "column": "str | None",
}
# Constructor parameters that build fills in; never written in YAML.
INJECTED: dict[str, frozenset[str]] = {
    "weighting": frozenset({"objectives", "seed"}),
    "heads": frozenset({"channels", "task"}),
    "losses": frozenset({"task"}),
    "optimizer": frozenset({"params"}),
}
# Keys whose values are text even where they look like numbers: run_name=007.
TEXT = frozenset(
    {"run_name", "output_dir", "resume", "init_from", "best_by", "data.root", "data.table", "data.cache_dir"}
)  # fmt: skip


def outside(key: str, value: Any) -> str | None:
    """What the documentation expects of ``key`` if ``value`` breaks it, else None."""
    if key in CHOICES and value not in CHOICES[key]:
        return " | ".join(CHOICES[key])
    if key in PATTERNS and isinstance(value, str):
        pattern, expected = PATTERNS[key]
        return None if re.fullmatch(pattern, value, re.DOTALL) else expected
    if key not in RANGES or value is None or isinstance(value, (str, bool)):
        return None
    values = value if isinstance(value, (list, tuple)) else [value]
    return None if all(_within(RANGES[key], v) for v in values) else RANGES[key]


def _within(condition: str, value: Any) -> bool:
    compare = {
        ">=": lambda a, b: a >= b,
        ">": lambda a, b: a > b,
        "<=": lambda a, b: a <= b,
        "<": lambda a, b: a < b,
    }
    parts = (part.split() for part in condition.split(" and "))
    return all(compare[sign](value, float(bound)) for sign, bound in parts)


def words(annotation: str) -> str:
    """An annotation as people say it."""
    text = re.sub(r"tuple\[float, float\]", "list of 2 numbers", annotation)
    text = re.sub(r"Sequence\[(.+?)\]", r"list of \1", text)
    text = re.sub(r"Mapping\[\w+, (.+?)\]|dict\[\w+, (.+?)\]", r"mapping to \1", text)
    for name, word in {
        "int": "whole number",
        "float": "number",
        "bool": "true or false",
        "str": "text",
    }.items():
        text = re.sub(rf"\b{name}\b", word, text)
    return text.replace("None", "null").replace(" | ", " or ")
