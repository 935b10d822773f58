"""Parameter rules: what is frozen, how fast each tensor learns, what decays.

The same four rules hold on every schedule and stage. A name in a rule is a prefix at a dot
(``backbone``, ``backbone.layer4``, ``heads.age``) or a glob (``*.bn?.weight``) of parameter names.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mtl_cli.errors import ConfigError, nearest

Layers = Sequence[tuple[str, tuple[str, ...]]]  # backbone layers from the input up: name, prefixes


@dataclass(frozen=True)
class ParamRules:
    """The rules of one stage.

    Args:
        freeze: names that never move; BatchNorm statistics and dropout below them rest as well.
        lr_mult: name -> factor on the learning rate; the longest matching name wins.
        layer_decay: factor per layer from the heads (1) down to the input.
        unfreeze_at: name -> first epoch (of the stage, from 0) in which it moves.
    """

    freeze: tuple[str, ...] = ()
    lr_mult: Mapping[str, float] = field(default_factory=dict)
    layer_decay: float | None = None
    unfreeze_at: Mapping[str, float] = field(default_factory=dict)

    def over(self, base: ParamRules) -> ParamRules:
        """These rules on top of ``base``: names are added, the same name is replaced."""
        return ParamRules(
            freeze=tuple(dict.fromkeys((*base.freeze, *self.freeze))),
            lr_mult={**base.lr_mult, **self.lr_mult},
            layer_decay=base.layer_decay if self.layer_decay is None else self.layer_decay,
            unfreeze_at={**base.unfreeze_at, **self.unfreeze_at},
        )


@dataclass(frozen=True)
class ParamRow:
    """One line of the table that ``--dry-run`` prints and ``params.txt`` keeps."""

    name: str
    parameter: nn.Parameter
    lr_mult: float
    decay: bool
    frozen: bool
    unfreeze_at: float = 0.0


def matches(rule: str, name: str) -> bool:
    """True if ``rule`` is a prefix of ``name`` at a dot, or a glob that fits it."""
    if name == rule or name.startswith(f"{rule}."):
        return True
    return fnmatch.fnmatchcase(name, rule) or fnmatch.fnmatchcase(name, f"{rule}.*")


def flatten_rule(rule: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """``{heads: {age: 2}}`` (what the shell makes of ``lr_mult.heads.age=2``) -> dotted names."""
    flat: dict[str, float] = {}
    for key, value in rule.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten_rule(value, f"{name}."))
        else:
            flat[name] = float(value)
    return flat


def param_table(model: nn.Module, rules: ParamRules, layers: Layers) -> list[ParamRow]:
    """Apply the rules to the model's parameters.

    Args:
        model: its parameter names are what the rules are matched against.
        rules: the rules of the stage.
        layers: the backbone's layers, for ``layer_decay``; prefixes relative to ``backbone.``.

    Raises:
        ConfigError: a rule matches no parameter.
    """
    named = list(model.named_parameters())
    _refuse_idle_rules(rules, [name for name, _ in named])
    negative = [
        f"lr_mult.{n}: found {v}, expected 0 or more" for n, v in rules.lr_mult.items() if v < 0
    ]
    if negative:
        raise ConfigError(negative)
    rows = []
    for name, parameter in named:
        lr_mult = _longest(rules.lr_mult, name, 1.0) * _layer_factor(name, rules, layers)
        frozen = any(matches(rule, name) for rule in rules.freeze) or lr_mult == 0
        unfreeze_at = _longest(rules.unfreeze_at, name, 0.0)
        # biases, norms, tokens, position embeddings and layer scales are not decayed
        decay = parameter.ndim > 1 and name.endswith("weight")
        rows.append(ParamRow(name, parameter, lr_mult, decay, frozen, unfreeze_at))
    return rows


def set_trainable(rows: Iterable[ParamRow], epoch: int) -> None:
    """Set ``requires_grad`` as the rules want it in this epoch."""
    for row in rows:
        row.parameter.requires_grad_(not row.frozen and epoch >= row.unfreeze_at)


def set_train_mode(model: nn.Module, rows: Iterable[ParamRow]) -> None:
    """``model.train()``, except below modules all of whose parameters rest.

    A frozen BatchNorm in train mode would still move its running statistics.
    """
    model.train()
    resting = {row.name for row in rows if not row.parameter.requires_grad}
    if not resting:
        return
    for module_name, module in model.named_modules():
        own = [f"{module_name}.{n}" if module_name else n for n, _ in module.named_parameters()]
        if own and all(name in resting for name in own):
            module.eval()


def param_groups(
    rows: Iterable[ParamRow], names: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups over the parameters in ``names``, one per (lr_mult, decay).

    Parameters that are unfrozen later are in their group from the start, so that a resumed run
    sees the same groups; frozen ones are left out.
    """
    groups: dict[tuple[float, bool], list[ParamRow]] = {}
    for row in rows:
        if row.name in names and not row.frozen:
            groups.setdefault((row.lr_mult, row.decay), []).append(row)
    return [
        {
            "params": [row.parameter for row in members],
            "names": [row.name for row in members],  # a resumed run must find the same
            "lr_mult": lr_mult,
            "weight_decay": weight_decay if decay else 0.0,
        }
        for (lr_mult, decay), members in groups.items()
    ]


def format_table(rows: Iterable[ParamRow]) -> list[str]:
    """The table as lines: name, shape, lr multiplier, decay, state."""
    lines = []
    for row in rows:
        state = "frozen" if row.frozen else "trained"
        if row.unfreeze_at and not row.frozen:
            state = f"from epoch {row.unfreeze_at:g}"
        shape = "x".join(map(str, row.parameter.shape)) or "scalar"
        decay = "decay" if row.decay else "-"
        lines.append(f"{row.name:<48} {shape:>16}  lr x{row.lr_mult:<8.4g} {decay:<5} {state}")
    return lines


def rename_rules(rules: ParamRules, only: set[str]) -> ParamRules:
    """Drop rules about heads of tasks that a stage does not have."""

    def kept(name: str) -> bool:
        return not name.startswith("heads.") or name.split(".")[1] in only

    return replace(
        rules,
        freeze=tuple(n for n in rules.freeze if kept(n)),
        lr_mult={n: v for n, v in rules.lr_mult.items() if kept(n)},
        unfreeze_at={n: v for n, v in rules.unfreeze_at.items() if kept(n)},
    )


def _longest(rule: Mapping[str, float], name: str, default: float) -> float:
    """Value of the longest (most specific) rule that matches."""
    found = [key for key in rule if matches(key, name)]
    return float(rule[max(found, key=len)]) if found else default


def _layer_factor(name: str, rules: ParamRules, layers: Layers) -> float:
    if rules.layer_decay is None or not name.startswith("backbone."):
        return 1.0
    inner = name.removeprefix("backbone.")
    for depth, (_, prefixes) in enumerate(layers):
        if any(matches(prefix, inner) for prefix in prefixes):
            return float(rules.layer_decay ** (len(layers) - depth))
    return 1.0


def _refuse_idle_rules(rules: ParamRules, names: Sequence[str]) -> None:
    known = {".".join(name.split(".")[:n]) for name in names for n in range(1, 4)}
    problems = []
    for key, rule_names in (
        ("freeze", rules.freeze),
        ("lr_mult", rules.lr_mult),
        ("unfreeze_at", rules.unfreeze_at),
    ):
        problems += [
            f"{key}: '{rule}' matches no parameter{nearest(rule, known)}"
            for rule in rule_names
            if not any(matches(rule, name) for name in names)
        ]
    if problems:
        raise ConfigError(problems)
