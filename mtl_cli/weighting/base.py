"""What every weighting strategy is: mathematics on losses, a Gramian or gradient rows.

The engine (``backward.py``) owns autograd, devices, ranks, loss scales and micro-batches; a
strategy sees global numbers only, over the objectives that have a label in this step ("present"),
and keeps its state full-size, indexed by objective.
"""

# T objectives, K present objectives, P parameters (columns)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtl_cli.task import Objective, mix64


class Weighting(nn.Module):
    """Base of all strategies.

    Args:
        objectives: the T objectives, injected by build.
        seed: run seed, injected by build; all draws are functions of (seed, step, names).
        heads: ``own`` leaves each head its own loss gradient (weight 1, times d transform/dL);
            ``weighted`` multiplies it by the objective's weight. Per paper.

    Class attributes:
        couples: the weights of one objective depend on the losses or gradients of the others in
            the same step. Refused where a step sees one task only (schedule=alternate, per_step).
        recompute: wants the losses after the step, on the same batch (FAMO).
    """

    couples: bool = True
    recompute: bool = False

    def __init__(
        self, objectives: Sequence[Objective], *, seed: int = 0, heads: str = "weighted"
    ) -> None:
        super().__init__()
        self.objectives = tuple(objectives)
        self.seed = seed
        self.heads = heads

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """Weights known *before* this step's backward pass, or None.

        Args:
            step: optimizer steps attempted so far.
            present: int64 [K], indices of the objectives with a label in the whole global step.

        Returns:
            [K] float, detached; None if this step's losses or gradients are needed first.
        """
        return None

    def update(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """Advance the state; called once per step that was not skipped.

        Args:
            step: as in :meth:`weights`.
            present: int64 [K].
            losses: [K] global losses (prior x mean over valid labels), before the step.
            gramian: [K, K] float64 where the engine had to compute it, else None.
        """

    def end_epoch(self) -> None:
        """Called once after every completed epoch of a stage."""

    def generator(self, step: int, salt: int = 0) -> torch.Generator:
        """CPU generator that depends on (seed, step, salt) alone: equal on all ranks."""
        return torch.Generator().manual_seed(mix64(self.seed, 0x57, step, salt))


class LossWeighting(Weighting):
    """Scalarises the loss vector; costs one joint step.

    Class attributes:
        affine: the weights dF/dL do not depend on L, so :meth:`weights` knows them beforehand.
            Non-affine strategies leave :meth:`weights` at None; the engine first reduces the
            losses, then differentiates :meth:`objective`.

    Learned scalars are ``nn.Parameter``: they get dF/ds at the global losses once per step and
    are stepped by their own optimizer (no decay, no clipping, no EMA), lr = model's x ``lr_mult``.
    """

    affine: bool = True
    lr_mult: float = 1.0

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Scalar F(L) whose gradient in L gives the weights and in the parameters their update.

        Args:
            losses: [K] float, may require grad.
            present: int64 [K].

        Returns:
            scalar tensor.
        """
        raise NotImplementedError


class GramianWeighting(Weighting):
    """Weights from the Gramian of the objectives' gradients.

    Args:
        wrt: ``shared`` (all shared parameters, exact), ``last_shared`` or ``features`` (cheap).
        update_every: solve every n-th step and keep the weights in between.

    Class attributes:
        observe: :meth:`weights` is known beforehand, yet :meth:`update` wants the Gramian each
            step (GradNorm).
    """

    observe: bool = False

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        seed: int = 0,
        heads: str = "own",
        wrt: str = "shared",
        update_every: int = 1,
    ) -> None:
        super().__init__(objectives, seed=seed, heads=heads)
        self.wrt = wrt
        self.update_every = update_every
        self.last_weights: Tensor
        nan = torch.full((len(self.objectives),), float("nan"), dtype=torch.float64)
        self.register_buffer("last_weights", nan)

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """The weights of the last solve, while they are still to be kept."""
        if self.update_every <= 1 or step % self.update_every == 0:
            return None
        kept = self.last_weights[present.to(self.last_weights.device)]
        return None if bool(torch.isnan(kept).any()) else kept

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """Return the weights of the present rows.

        Args:
            gramian: [K, K] float64 on the CPU; zero rows and absent objectives are already dropped
                by the engine.
            losses: [K] float64 on the CPU, the losses of the same rows.
            present: int64 [K].
            step: optimizer steps attempted so far (for draws).

        Returns:
            [K] float64.
        """
        raise NotImplementedError


class GradientWeighting(Weighting):
    """A column-local map of the gradient rows (each column of the matrix is treated alone).

    Args:
        wrt: ``shared``.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        seed: int = 0,
        heads: str = "own",
        wrt: str = "shared",
    ) -> None:
        super().__init__(objectives, seed=seed, heads=heads)
        self.wrt = wrt

    def combine(
        self, rows: Tensor, present: Tensor, step: int, column: int, losses: Tensor
    ) -> Tensor:
        """Combine the rows of one parameter tensor.

        Args:
            rows: [K, P_tensor] float32, on the device.
            present: int64 [K].
            step: optimizer steps attempted so far.
            column: number of the first column of this tensor among all P; salts the draws and
                addresses per-column state.
            losses: [K] global losses.

        Returns:
            [P_tensor], the shared gradient.
        """
        raise NotImplementedError
