"""Transfer: named stages, each starting from an earlier one, a run or a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtl_cli.errors import ConfigError, nearest
from mtl_cli.schedule.base import AllTogether, Stage, rules_from

RULE_KEYS = ("freeze", "lr_mult", "layer_decay", "unfreeze_at")
STAGE_KEYS = (*RULE_KEYS, "epochs", "lr", "start_from", "only", "task", "resolved")


class Transfer:
    """Stages in the order they are written.

    ``probe`` then ``finetune`` is LP-FT (Kumar et al., ICLR 2022, arXiv 2202.10054); a stage with
    a ``task`` of its own is pre-training on another task.

    Args:
        stages: name -> {epochs, lr, freeze, lr_mult, layer_decay, unfreeze_at, start_from
            (previous | previous_best | RUN | CHECKPOINT), only, task}; None removes a stage.

    Raises:
        ConfigError: no stage is left, or a stage has an unknown key.
    """

    per_step = False
    split = False

    def __init__(self, stages: Mapping[str, Mapping[str, Any] | None]) -> None:
        self.specs = {name: dict(spec) for name, spec in stages.items() if spec is not None}
        problems = [
            f"schedule.stages.{name}: unknown key '{key}'{nearest(key, STAGE_KEYS)}"
            for name, spec in self.specs.items()
            for key in spec
            if key not in STAGE_KEYS
        ]
        if not self.specs:
            problems = ["schedule.stages: empty (expected at least one stage)"]
        if problems:
            raise ConfigError(problems)

    def stages(self, tasks: Sequence[str]) -> Sequence[Stage]:
        """The stages in order."""
        return tuple(
            self._stage(index, name, tuple(tasks)) for index, name in enumerate(self.specs)
        )

    def _stage(self, index: int, name: str, tasks: tuple[str, ...]) -> Stage:
        spec = self.specs[name]
        resolved = spec.get("resolved")
        names = tuple(resolved["task"]["outputs"]) if resolved else tasks
        if only := spec.get("only"):
            names = (only,) if isinstance(only, str) else tuple(only)
        return Stage(
            name,
            index,
            AllTogether(names),
            epochs=spec.get("epochs"),
            rules=rules_from(**{key: spec[key] for key in RULE_KEYS if spec.get(key)}),
            lr=spec.get("lr"),
            start_from=spec.get("start_from", "previous_best" if index else None),
            only=names,
            resolved=resolved,
        )
