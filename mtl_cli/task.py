"""What is learned: tasks, objectives, labels and the batch that carries them.

A *task* is one declared output (age, gender, race) with its kind, classes and unit. An *objective*
is one entry of the loss vector: a task has one, or several when its loss has named terms.
"""

# T objectives, B batch, C classes, H W pixels

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

KINDS = ("regression", "binary", "multiclass", "multilabel")


@dataclass(frozen=True)
class Task:
    """One output of the network.

    Args:
        name: key of the head, the loss, the metrics and the label.
        kind: regression, binary, multiclass or multilabel.
        classes: class names; two for binary (negative first), C otherwise; empty for regression.
        unit: unit of a regression target, for display.
        center: subtracted from a regression target before it is learned, in ``unit``.
        scale: a regression target is divided by it after centring, in ``unit``.
        metrics: metric names; the first one decides about the best checkpoint.
    """

    name: str
    kind: str
    classes: tuple[str, ...] = ()
    unit: str = ""
    center: float = 0.0
    scale: float = 1.0
    metrics: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Number of raw outputs of the head: 1 for regression and binary, else C."""
        return 1 if self.kind in ("regression", "binary") else len(self.classes)

    def state(self) -> dict[str, Any]:
        """Plain values, as stored in checkpoints."""
        return {
            "name": self.name,
            "kind": self.kind,
            "classes": list(self.classes),
            "unit": self.unit,
            "center": self.center,
            "scale": self.scale,
            "metrics": list(self.metrics),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Task:
        """Inverse of :meth:`state`."""
        return cls(
            **{**state, "classes": tuple(state["classes"]), "metrics": tuple(state["metrics"])}
        )


@dataclass(frozen=True)
class Objective:
    """One entry of the loss vector.

    Args:
        name: ``task``, or ``task/term`` where the loss has several terms.
        task: the task that it belongs to.
        likelihood: gaussian, laplace, categorical or None; decides the form of uncertainty weights.
        prior: fixed factor on the loss before any weighting.
    """

    name: str
    task: str
    likelihood: str | None = None
    prior: float = 1.0


@dataclass
class Batch:
    """One micro-batch.

    Shape:
        images [B,3,H,W] uint8 from the loader, float after ``prepare``;
        targets[name] [B] (float for regression and binary, int64 for multiclass) or [B,C] float
        (multilabel), invalid entries hold 0; valid[name] bool, same shape as the targets;
        index [B] int64, row of each sample in the source's table.
    """

    images: Tensor
    targets: dict[str, Tensor]
    valid: dict[str, Tensor]
    index: Tensor
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.images.shape[0])

    def pin_memory(self) -> Batch:
        """Called by the DataLoader when it pins memory."""
        return self._map(lambda t: t.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """Copy to ``device`` (without blocking where memory is pinned)."""
        return self._map(lambda t: t.to(device, non_blocking=True))

    def _map(self, f: Any) -> Batch:
        return Batch(
            images=f(self.images),
            targets={k: f(v) for k, v in self.targets.items()},
            valid={k: f(v) for k, v in self.valid.items()},
            index=self.index,
            source=self.source,
            extra=self.extra,
        )


def mix64(*parts: int) -> int:
    """Mix integers into one 63-bit seed (splitmix64), so that streams never overlap by design."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
        state = state * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1
