"""Alternate training: one optimizer per task over the shared part and the task's own head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl_cli.errors import ConfigError, nearest
from mtl_cli.schedule.base import Stage, Turn, rules_from

MODES = ("per_step", "simultaneous", "same_batch", "epochs")


@dataclass(frozen=True)
class Alternation:
    """Whose turn it is under one of the four modes; see :class:`Alternate`."""

    tasks: tuple[str, ...]
    mode: str

    def at(self, step: int, epoch: int) -> Sequence[Turn]:
        """Turns of one step."""
        if self.mode == "simultaneous":
            return (Turn(self.tasks, self.tasks, split=True),)
        if self.mode == "same_batch":
            return tuple(Turn((task,), (task,)) for task in self.tasks)
        count = step if self.mode == "per_step" else epoch
        task = self.tasks[count % len(self.tasks)]
        return (Turn((task,), (task,)),)

    def optimizers(self) -> Mapping[str, tuple[str, ...]]:
        """One optimizer per task."""
        return {task: (task,) for task in self.tasks}


class Alternate:
    """Tasks take turns, each with an optimizer (and moments) of its own.

    Args:
        mode: ``per_step`` A, B, A, B, one batch each; ``simultaneous`` all losses from one
            forward pass, then every task's optimizer applies its own gradient in turn (two ops in
            one ``sess.run``); ``same_batch`` each task in turn on the same batch, forward again;
            ``epochs`` whole epochs in turn.
        task_lr: task -> factor on the learning rate of its optimizer.
        freeze: see ``Joint``.
        lr_mult: see ``Joint``.
        layer_decay: see ``Joint``.
        unfreeze_at: see ``Joint``.

    Raises:
        ConfigError: unknown mode, or ``task_lr`` names a task that is not there.
    """

    def __init__(
        self,
        mode: str = "per_step",
        task_lr: Mapping[str, float] | None = None,
        freeze: Sequence[str] = (),
        lr_mult: Mapping[str, Any] | None = None,
        layer_decay: float | None = None,
        unfreeze_at: Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in MODES:
            expected = ", ".join(MODES)
            raise ConfigError(
                f"schedule.mode: unknown (found '{mode}', expected one of {expected})"
                f"{nearest(mode, MODES)}"
            )
        self.mode = mode
        self.per_step = mode != "simultaneous"
        self.split = mode == "simultaneous"
        self.task_lr = dict(task_lr or {})
        self.rules = rules_from(freeze, lr_mult, layer_decay, unfreeze_at)

    def stages(self, tasks: Sequence[str]) -> Sequence[Stage]:
        """The single stage."""
        strange = [t for t in self.task_lr if t not in tasks]
        if strange:
            raise ConfigError(
                f"schedule.task_lr: no task '{strange[0]}' (has {', '.join(tasks)})"
                f"{nearest(strange[0], tasks)}"
            )
        turns = Alternation(tuple(tasks), self.mode)
        return (Stage("train", 0, turns, rules=self.rules, task_lr=self.task_lr),)
