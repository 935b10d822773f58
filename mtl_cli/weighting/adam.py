"""Adam on one number per objective, for papers that step their weights themselves."""

# T objectives, K present objectives

from __future__ import annotations

import torch
from torch import Tensor, nn


class ObjectiveAdam(nn.Module):
    """Adam whose moments and step counts are per objective, so that absent ones stay frozen.

    Kingma & Ba, ICLR 2015 (arXiv 1412.6980), algorithm 1, as torch.optim.Adam rounds it.

    Args:
        count: T.
        lr: step size.
    """

    def __init__(self, count: int, lr: float) -> None:
        super().__init__()
        self.lr = lr
        self.mean: Tensor
        self.square: Tensor
        self.steps: Tensor
        self.register_buffer("mean", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("square", torch.zeros(count, dtype=torch.float64))
        self.register_buffer("steps", torch.zeros(count, dtype=torch.float64))

    def step(self, present: Tensor, grad: Tensor) -> Tensor:
        """Take in the gradient [K] of the present objectives; return the change [K] to apply."""
        self.steps[present] += 1
        self.mean[present] = 0.9 * self.mean[present] + 0.1 * grad
        self.square[present] = 0.999 * self.square[present] + 0.001 * grad**2
        steps = self.steps[present]
        mean = self.mean[present] / (1 - 0.9**steps)
        square = self.square[present] / (1 - 0.999**steps)
        return -self.lr * mean / (square.sqrt() + 1e-8)
