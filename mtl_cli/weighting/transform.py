"""Loss transforms: what happens to the losses before a strategy sees them."""

# K present objectives

from __future__ import annotations

import torch
from torch import Tensor

TRANSFORMS = ("identity", "log", "initial")
SMALLEST = 1e-8  # guards a logarithm or a division by a loss


def transform(losses: Tensor, initial: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Transform losses and return the slope that multiplies their gradients.

    Args:
        losses: [K], global losses.
        initial: [K], each objective's first loss; NaN where it has not been seen yet.
        kind: ``identity``: L; ``log``: log(L + 1e-8), as in the authors' code of the methods that
            work on log losses; ``initial``: L / L(0).

    Returns:
        values [K] and derivatives d value / d L [K].
    """
    if kind == "log":
        positive = losses.clamp_min(0) + SMALLEST
        return positive.log(), 1 / positive
    if kind == "initial":
        first = torch.where(torch.isnan(initial), losses, initial).abs().clamp_min(SMALLEST)
        return losses / first, 1 / first
    return losses, torch.ones_like(losses)
