"""Learning rate as a pure function of progress, so that a resumed run needs no scheduler state.

``t`` in (0, 1) is the share of the stage's steps that is done, taken at the middle of a step.
Every class returns the factor on ``optimizer.lr``; multipliers of parameter groups come on top.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol


class LearningRate(Protocol):
    """Factor on the peak learning rate."""

    def __call__(self, t: float) -> float:
        """Return the factor at progress ``t``."""
        ...


class Constant:
    """Linear warm-up, then constant.

    Args:
        warmup: share of the steps over which the factor rises from 0 to 1.
    """

    def __init__(self, warmup: float = 0.0) -> None:
        self.warmup = warmup

    def __call__(self, t: float) -> float:
        """Factor at progress ``t``."""
        return min(1.0, t / self.warmup) if self.warmup > 0 else 1.0


class Cosine:
    """Linear warm-up, then half a cosine (Loshchilov & Hutter, ICLR 2017, arXiv 1608.03983).

    Args:
        warmup: share of the steps over which the factor rises from 0 to 1.
        final: factor at the end.
    """

    def __init__(self, warmup: float = 0.05, final: float = 0.0) -> None:
        self.warmup = warmup
        self.final = final

    def __call__(self, t: float) -> float:
        """Factor at progress ``t``."""
        if t < self.warmup:
            return t / self.warmup
        return _cosine(1.0, self.final, (t - self.warmup) / (1 - self.warmup))


class Step:
    """Linear warm-up, then a factor ``gamma`` at each milestone.

    Args:
        milestones: shares of the steps.
        gamma: factor at each milestone.
        warmup: share of the steps over which the factor rises from 0 to 1.
    """

    def __init__(
        self, milestones: Sequence[float] = (0.6, 0.85), gamma: float = 0.1, warmup: float = 0.0
    ) -> None:
        self.milestones = tuple(milestones)
        self.gamma = gamma
        self.warmup = warmup

    def __call__(self, t: float) -> float:
        """Factor at progress ``t``."""
        if t < self.warmup:
            return t / self.warmup
        return float(self.gamma ** sum(t >= m for m in self.milestones))


class OneCycle:
    """Cosine up to the peak, then cosine down (Smith & Topin 2018, arXiv 1708.07120).

    Args:
        warmup: share of the steps on the way up.
        start: factor at the beginning.
        final: factor at the end.
    """

    def __init__(self, warmup: float = 0.3, start: float = 0.04, final: float = 1e-4) -> None:
        self.warmup = warmup
        self.start = start
        self.final = final

    def __call__(self, t: float) -> float:
        """Factor at progress ``t``."""
        if t < self.warmup:
            return _cosine(self.start, 1.0, t / self.warmup)
        return _cosine(1.0, self.final, (t - self.warmup) / (1 - self.warmup))


def _cosine(first: float, last: float, t: float) -> float:
    """Half a cosine from ``first`` at t = 0 to ``last`` at t = 1."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))
