"""Strategies that look at every column of the gradient matrix on its own."""

# K present objectives (rows), P columns

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_cli.task import Objective, mix64
from mtl_cli.weighting.base import GradientWeighting


class GradDrop(GradientWeighting):
    """Keeps, in every coordinate, the gradients of one sign, drawn by their share.

    Chen et al., NeurIPS 2020 (arXiv 2010.06808), algorithm 1, on the shared parameters (the paper
    masks one shared activation): with p = positive part / sum of |g|, one draw u per coordinate
    for all objectives keeps the positive entries if p > u, else the negative ones; the expectation
    is the sum. The draw is a hash of (seed, step, column), hence equal on every device and under
    any split of the columns over ranks. ``reduction=mean`` divides by K.

    Args:
        objectives: injected.
        leak: share of every gradient that passes unmasked, [0, 1].
        common: see :class:`GradientWeighting`.

    Shape:
        rows [K, P] -> [P].
    """

    def __init__(
        self, objectives: Sequence[Objective], *, leak: float = 0.0, **common: Any
    ) -> None:
        super().__init__(objectives, **common)
        self.leak = leak

    def combine(
        self, rows: Tensor, present: Tensor, step: int, column: int, losses: Tensor
    ) -> Tensor:
        """The positive or the negative part of every column."""
        total, magnitude = rows.sum(0), rows.abs().sum(0)
        seed = mix64(self.seed, 0x6D, step)
        draw = hashed_uniform(seed, column, rows.shape[1], rows.device).to(rows.dtype)
        # with v = 2u - 1: share > u where total > v magnitude; the parts are (total +- magnitude)/2
        sign = torch.addcmul(total, draw, magnitude, value=-1)
        kept = torch.copysign(magnitude, sign).add_(total).mul_(0.5)
        if self.leak:
            kept = torch.lerp(kept, total, self.leak)
        return kept / len(rows) if self.reduction == "mean" else kept


def hashed_uniform(seed: int, start: int, count: int, device: torch.device) -> Tensor:
    """Uniform draws in (-1, 1) of 23 bits, element i a function of (seed, start + i) alone.

    A 32-bit multiply-xorshift hash (constants of Wellons' ``lowbias32``), keyed before and within;
    int32 arithmetic wraps. Its high bits are taken, so the last xorshift is left out.
    """
    before, within = ((part & 0xFFFFFFFF) - (1 << 31) for part in (seed, seed >> 31))
    draws = torch.empty(count, device=device)
    piece = 1 << 15 if device.type == "cpu" else max(count, 1)  # stays in the cache
    for first in range(0, count, piece):
        last = min(first + piece, count)
        x = torch.arange(start + first, start + last, dtype=torch.int32, device=device)
        x ^= before
        x ^= (x >> 16).bitwise_and_(0xFFFF)
        x *= 0x21F0AAAD
        x += within
        x ^= (x >> 15).bitwise_and_(0x1FFFF)
        x *= 0xD35A2D97 - (1 << 32)
        x = (x >> 8).bitwise_or_(1)  # odd: never 0 or the ends of the interval
        torch.mul(x, 2.0**-23, out=draws[first:last])
    return draws
