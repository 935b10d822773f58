"""Schedules are data: a schedule yields stages, a stage says whose turn each step is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from mtl_cli.params import ParamRules, flatten_rule

JOINT_OPTIMIZER = "model"


@dataclass(frozen=True)
class Turn:
    """One forward and backward pass: which tasks are learned, by which optimizers.

    Args:
        tasks: tasks whose heads run.
        optimizers: one optimizer that takes the combined gradient, or with ``split`` one per
            task, each taking the gradient of its own task.
        split: every task's gradient goes to the optimizer of its name.
    """

    tasks: tuple[str, ...]
    optimizers: tuple[str, ...]
    split: bool = False


class Turns(Protocol):
    """Whose turn it is, a pure function of the step and the epoch."""

    def at(self, step: int, epoch: int) -> Sequence[Turn]:
        """Turns of one step, in the order they run."""
        ...

    def optimizers(self) -> Mapping[str, tuple[str, ...]]:
        """Optimizer name -> tasks whose heads it trains (the shared part belongs to all)."""
        ...


@dataclass(frozen=True)
class AllTogether:
    """All tasks in every step, one optimizer."""

    tasks: tuple[str, ...]

    def at(self, step: int, epoch: int) -> Sequence[Turn]:
        """One turn with every task."""
        return (Turn(self.tasks, (JOINT_OPTIMIZER,)),)

    def optimizers(self) -> Mapping[str, tuple[str, ...]]:
        """The single optimizer."""
        return {JOINT_OPTIMIZER: self.tasks}


@dataclass(frozen=True)
class Stage:
    """A part of a run with its own optimizers and learning-rate curve.

    Args:
        name: unique within the run.
        index: position, salts the sample order.
        epochs: passes over the training set; None takes the run's ``epochs``.
        turns: whose turn each step is.
        rules: parameter rules, on top of the run's own.
        lr: peak learning rate; None takes ``optimizer.lr``.
        task_lr: optimizer name -> factor on the learning rate (alternate).
        start_from: None, ``previous``, ``previous_best``, or a run or checkpoint.
        only: tasks of this stage; None takes all.
        resolved: {task, data, heads, losses} of another task, composed by the front end.
    """

    name: str
    index: int
    turns: Turns
    epochs: int | None = None
    rules: ParamRules = field(default_factory=ParamRules)
    lr: float | None = None
    task_lr: Mapping[str, float] = field(default_factory=dict)
    start_from: str | None = None
    only: tuple[str, ...] | None = None
    resolved: Mapping[str, Any] | None = None


class Schedule(Protocol):
    """What a class under conf/schedule must offer."""

    per_step: bool  # a step sees one task only, so strategies that couple tasks are refused
    split: bool  # every task has its own optimizer and its own gradient row

    def stages(self, tasks: Sequence[str]) -> Sequence[Stage]:
        """The stages of a run on these tasks, in order."""
        ...


def rules_from(
    freeze: Sequence[str] = (),
    lr_mult: Mapping[str, Any] | None = None,
    layer_decay: float | None = None,
    unfreeze_at: Mapping[str, Any] | None = None,
) -> ParamRules:
    """Parameter rules from the four config keys."""
    return ParamRules(
        freeze=tuple(freeze),
        lr_mult=flatten_rule(lr_mult or {}),
        layer_decay=layer_decay,
        unfreeze_at=flatten_rule(unfreeze_at or {}),
    )
