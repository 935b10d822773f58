"""Joint training: every step sees all tasks, one optimizer takes the combined gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtl_cli.schedule.base import AllTogether, Stage, rules_from


class Joint:
    """One stage, all tasks together. With rules it is also ``freeze`` and ``finetune``.

    Args:
        freeze: names of parts that rest, BatchNorm statistics too.
        lr_mult: name -> factor on the learning rate.
        layer_decay: factor per backbone layer from the heads down.
        unfreeze_at: name -> epoch in which it starts to move.
    """

    per_step = False
    split = False

    def __init__(
        self,
        freeze: Sequence[str] = (),
        lr_mult: Mapping[str, Any] | None = None,
        layer_decay: float | None = None,
        unfreeze_at: Mapping[str, Any] | None = None,
    ) -> None:
        self.rules = rules_from(freeze, lr_mult, layer_decay, unfreeze_at)

    def stages(self, tasks: Sequence[str]) -> Sequence[Stage]:
        """The single stage."""
        return (Stage("train", 0, AllTogether(tuple(tasks)), rules=self.rules),)
