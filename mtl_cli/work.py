"""A stage's own set: data, model, engine, optimizers and what is measured on the way."""

# T objectives

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from mtl_cli.backward import BackwardEngine
from mtl_cli.data.base import DataSet
from mtl_cli.losses import Loss
from mtl_cli.lr import LearningRate
from mtl_cli.model import ByTask, MultiTaskModel
from mtl_cli.params import ParamRow
from mtl_cli.precision import LossScale
from mtl_cli.routes import StepReport
from mtl_cli.schedule.base import Stage
from mtl_cli.task import Objective, Task
from mtl_cli.weighting.base import Weighting


@dataclass
class Work:
    """One stage's own set, built by ``build``: data, model, engine, optimizers."""

    stage: Stage
    seed: int
    data: DataSet
    tasks: tuple[Task, ...]
    model: MultiTaskModel
    losses: ByTask[Loss]
    objectives: tuple[Objective, ...]
    weighting: Weighting
    engine: BackwardEngine
    scale: LossScale
    optimizers: dict[str, torch.optim.Optimizer]
    rows: list[ParamRow]
    lr: LearningRate
    peak_lr: float
    epochs: int
    device: torch.device
    dtype: str
    accumulate: int
    clip_norm: float | None
    patience: int | None
    on_nonfinite: str
    best_by: str | None
    log_every_steps: int
    save_every_steps: int | None
    ema: AveragedModel | None = None
    baseline: dict[str, dict[str, float | None]] = field(default_factory=dict)
    meter: Meter = field(default_factory=lambda: Meter(0))

    @property
    def evaluated(self) -> MultiTaskModel:
        """The model that is judged and used: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema.module  # type: ignore[return-value]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the stage."""
        return self.epochs * self.data.steps_per_epoch


class Meter:
    """Mean losses and weights since the last log line and since the epoch began."""

    def __init__(self, objectives: int) -> None:
        self.line = torch.zeros(3, objectives, dtype=torch.float64)  # losses, weights, counts
        self.epoch = torch.zeros(3, objectives, dtype=torch.float64)

    def add(self, report: StepReport) -> None:
        """Add one turn."""
        ones = torch.ones_like(report.losses)
        values = torch.stack([report.losses, report.weights.double(), ones])
        self.line[:, report.present] += values
        self.epoch[:, report.present] += values

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors."""
        return {"line": self.line.clone(), "epoch": self.epoch.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.line, self.epoch = state["line"].clone(), state["epoch"].clone()
