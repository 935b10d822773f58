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
        total = rows.sum(0)
        positive = rows.clamp_min(0).sum(0)
        negative = total - positive
        share = positive / (positive - negative)  # 0/0 = nan keeps the negative part, which is 0
        draw = hashed_uniform(mix64(self.seed, 0x6D, step), column, rows.shape[1], rows.device)
        chosen = (share > draw).to(rows.dtype)
        kept = torch.lerp(negative, positive, chosen)  # torch.where takes 30 times as long on a CPU
        if self.leak:
            kept = torch.lerp(kept, total, self.leak)
        return kept / len(rows) if self.reduction == "mean" else kept


def hashed_uniform(seed: int, start: int, count: int, device: torch.device) -> Tensor:
    """Uniform draws in [0, 1) of 24 bits, element i a function of (seed, start + i) alone.

    Two rounds of a 32-bit multiply-xorshift hash (constants of Wellons' ``lowbias32``), keyed
    before each round; int32 arithmetic wraps.
    """
    keys = [(part & 0xFFFFFFFF) - (1 << 31) for part in (seed, seed >> 31)]
    draws = torch.empty(count, device=device)
    piece = 1 << 15 if device.type == "cpu" else max(count, 1)  # stays in the cache
    for first in range(0, count, piece):
        last = min(first + piece, count)
        x = torch.arange(start + first, start + last, dtype=torch.int32, device=device)
        for key in keys:
            x ^= key
            x ^= (x >> 16).bitwise_and_(0xFFFF)
            x *= 0x21F0AAAD
            x ^= (x >> 15).bitwise_and_(0x1FFFF)
            x *= 0xD35A2D97 - (1 << 32)
            x ^= (x >> 15).bitwise_and_(0x1FFFF)
        torch.mul((x >> 8).bitwise_and_(0xFFFFFF), 2.0**-24, out=draws[first:last])
    return draws
