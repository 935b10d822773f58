"""Strategies that remove the bias of a noisy Gramian with independent batches of data."""

# K present objectives (rows)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl_cli.task import Objective
from mtl_cli.weighting import solvers
from mtl_cli.weighting.base import GramianWeighting
from mtl_cli.weighting.row_state import move_on_simplex


class _ThreeBatches(GramianWeighting):
    """The Gramian is J1 J2' of two independent batches; the weights apply to a third, J3.

    It is neither symmetric nor positive: rows are not dropped by its diagonal.

    State:
        simplex: [T].
    """

    needs = ("batches",)

    def __init__(self, objectives: Sequence[Objective], **common: Any) -> None:
        super().__init__(objectives, **common)
        self.simplex: Tensor
        self.register_buffer("simplex", self.per_objective(1 / len(self.objectives)))

    def row_weights(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """As in the base, without dropping rows."""
        weights = self.solve(gramian, losses, present, step)
        self.last_weights[present] = weights
        return weights


class MoDo(_ThreeBatches):
    """One projected step per iteration towards the min-norm weights, with double sampling.

    Chen, Fernando et al., NeurIPS 2023 (arXiv 2305.20057), algorithm 1: lambda <- projection of
    lambda - gamma (J1 J2' lambda + rho lambda), direction J3' lambda.

    Args:
        objectives: injected.
        gamma: rate of lambda, in 1 / squared gradients.
        rho: pull towards the uniform vector, in squared gradients.
        common: see :class:`GramianWeighting`.

    Shape:
        gramian [K, K], J1 J2' -> weights [K], >= 0, sum 1.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        gamma: float = 1e-3,
        rho: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.gamma = gamma
        self.rho = rho

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """One projected step of lambda on J1 J2'."""
        return move_on_simplex(
            self.simplex, present, lambda w: self.gamma * (gramian @ w + self.rho * w)
        )


class SDMGrad(_ThreeBatches):
    """Min-norm weights regularised towards the mean direction, with double sampling.

    Xiao, Ban & Ji, NeurIPS 2023 (arXiv 2305.18409), algorithm 1: w from a few projected momentum
    steps on 1/2 w'J1 J2'w + lambda w'J1 J2'p, p = 1/K, on the Gramian divided by the squared mean
    row length, warm-started; direction J3'(w + lambda p) / (1 + lambda). The authors' code lets
    its three gradient buffers alias one another and multiplies the result by K.

    Args:
        objectives: injected.
        mean_pull: lambda; 0 is the min-norm direction, infinity the mean.
        lr: step of the inner problem.
        momentum: of the inner problem.
        iterations: of the inner problem.
        eps: added to the squared mean row length, in squared gradients, as the authors do; it
            makes gradients shorter than 1e-4 count as small. 0 scales with the gradients.
        common: see :class:`GramianWeighting`.

    Shape:
        gramian [K, K], J1 J2' -> weights [K], >= 0, sum 1.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        mean_pull: float = 0.3,
        lr: float = 5.0,
        momentum: float = 0.5,
        iterations: int = 20,
        eps: float = 1e-8,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.mean_pull = mean_pull
        self.lr = lr
        self.momentum = momentum
        self.iterations = iterations
        self.eps = eps

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """(w + lambda p) / (1 + lambda) after the inner steps."""
        count = len(present)
        preference = np.full(count, 1 / count)
        g = gramian.numpy()
        length = float(np.sqrt(np.maximum(g.diagonal(), 0)).mean())
        mass = float(self.simplex[present].sum())
        w = self.simplex[present].numpy() / mass if mass > 0 else preference
        scale = length**2 + self.eps
        if scale > 0:
            g = g / scale
            velocity = np.zeros(count)
            for _ in range(self.iterations):
                velocity = self.momentum * velocity + g @ (w + self.mean_pull * preference)
                w = solvers.project_simplex(w - self.lr * velocity)
            self.simplex[present] = torch.from_numpy(w) * mass
        else:
            self.fallbacks += 1
        return torch.from_numpy((w + self.mean_pull * preference) / (1 + self.mean_pull))
