"""What every weighting strategy is: mathematics on losses, a Gramian or gradient rows.

The engine (``backward.py``) owns autograd, devices, ranks, loss scales and micro-batches; a
strategy sees global numbers only, over the objectives that have a label in this step ("present"),
and keeps its state full-size, indexed by objective. Strategies live on the CPU in float64 (the
state that is as large as gradient rows follows the rows); weights leave as float64.

A step, from the engine's side (the methods marked * are what a strategy overrides)::

    w = weights*(step, present)                        # known beforehand? else, at the losses L:
    values, slopes = transformed(L, present)           # transform=log and the like
    w = d objective*(values, present) / d values       # LossWeighting
    rows = observe_rows*(slopes x rows, ...)           # only if "rows" in needs
    w = row_weights(slopes x G x slopes, values, ...)  # GramianWeighting, calls solve*
    row k of the shared gradient  <-  rescale(w)[k] * slopes[k]
    head of objective k           <-  head_weights(rescale(w), present)[k] * slopes[k]
    advance(step, present, L, G)                       # calls update*; look_ahead* if recompute
"""

# T objectives, K present objectives, P parameters (columns)

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mtl_cli.errors import ConfigError, nearest
from mtl_cli.task import Objective, mix64
from mtl_cli.weighting.transform import TRANSFORMS, transform

DEAD_ROW = 1e-13  # a row shorter than this share of the longest one carries no direction


def choose(key: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of the choices.

    Raises:
        ConfigError: it is not; names the key, the choices and the nearest one.
    """
    if value not in choices:
        expected = ", ".join(choices)
        raise ConfigError(
            f"weighting.{key}: unknown value (found {value!r}, expected one of {expected})"
            + nearest(str(value), choices)
        )
    return value


class Weighting(nn.Module):
    """Base of all strategies.

    Args:
        objectives: the T objectives, injected by build.
        seed: run seed, injected by build; all draws are functions of (seed, step, names).
        heads: ``own`` leaves each head its own loss gradient (weight 1, times d transform/dL);
            ``weighted`` multiplies it by the objective's weight. Per paper.
        transform: of the losses, before the strategy sees them: identity, log, initial (L/L(0)).
        reduction: ``paper`` leaves the weights as the paper scales them; ``sum`` rescales them to
            sum to K, as the weights of a plain sum do; ``mean`` to sum to 1. Makes learning rates
            comparable between strategies.

    Class attributes:
        couples: the weights of one objective depend on the losses or gradients of the others in
            the same step. Refused where a step sees one task only (schedule=alternate, per_step).
        recompute: wants the losses after the step, on the same batch, through :meth:`look_ahead`.
        needs: what else the engine must supply, or refuse: ``rows`` (see :meth:`observe_rows`),
            ``batches`` (three independent batches per step), ``validation``, ``metrics``.
        positive_losses: means something for losses > 0 only, so ``transform=log`` is refused.

    State:
        fallbacks: int64 scalar, number of times a degenerate input met a documented fallback.
    """

    couples: bool = True
    recompute: bool = False
    needs: tuple[str, ...] = ()
    positive_losses: bool = False

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        seed: int = 0,
        heads: str = "weighted",
        transform: str = "identity",
        reduction: str = "paper",
    ) -> None:
        super().__init__()
        self.objectives = tuple(objectives)
        self.seed = seed
        self.heads = choose("heads", heads, ("own", "weighted"))
        self.transform = choose("transform", transform, TRANSFORMS)
        if transform == "log" and self.positive_losses:
            raise ConfigError(
                f"weighting.transform: {type(self).__name__} needs losses > 0, and log gives others "
                "(found log, expected identity or initial)"
            )
        self.reduction = choose("reduction", reduction, ("paper", "sum", "mean"))
        self.rank: Tensor
        self.fallbacks: Tensor
        self.initial_losses: Tensor
        names = sorted(o.name for o in self.objectives)
        rank = torch.tensor([names.index(o.name) for o in self.objectives], dtype=torch.int64)
        self.register_buffer("rank", rank, persistent=False)
        self.register_buffer("fallbacks", torch.zeros((), dtype=torch.int64))
        if transform == "initial":
            self.register_buffer("initial_losses", self.per_objective(float("nan")))

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """Weights known *before* this step's backward pass, or None.

        Args:
            step: optimizer steps attempted so far.
            present: int64 [K], indices of the objectives with a label in the whole global step.

        Returns:
            [K] float64, detached; None if this step's losses or gradients are needed first.
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

    def look_ahead(self, step: int, present: Tensor, losses: Tensor) -> None:
        """Advance the state with the losses of the same batch after the step (``recompute``).

        Args:
            step: the step that was just taken.
            present: int64 [K].
            losses: [K] global losses after the step.
        """

    def end_epoch(self) -> None:
        """Called once after every completed epoch of a stage."""

    def transformed(self, losses: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """What the strategy sees instead of the losses, and the slopes of the gradients.

        Args:
            losses: [K] global losses.
            present: int64 [K].

        Returns:
            values [K], d value / d loss [K].
        """
        initial = self.initial_losses[present] if self.transform == "initial" else losses
        return transform(losses, initial, self.transform)

    def advance(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """Call :meth:`update` with the transformed losses; the engine's way in.

        Args:
            step: as in :meth:`weights`.
            present: int64 [K].
            losses: [K] global losses, before the step, not transformed.
            gramian: [K, K] Gramian of the gradients of the losses, not transformed, or None.
        """
        losses = losses.detach()
        values, slopes = self.transformed(losses, present)
        if gramian is not None:
            gramian = gramian * torch.outer(slopes, slopes)
        if self.transform == "initial":
            first = self.initial_losses[present]
            self.initial_losses[present] = torch.where(torch.isnan(first), losses.double(), first)
        self.update(step, present, values, gramian)

    def rescale(self, weights: Tensor) -> Tensor:
        """Apply ``reduction`` to the weights [K] of the present objectives.

        ``sum`` divides by the mean of abs(w), ``mean`` by the sum of abs(w) (papers with negative
        weights exist); weights that are all zero stay so.
        """
        if self.reduction == "paper" or not len(weights):
            return weights
        total = weights.abs().sum()
        goal = len(weights) if self.reduction == "sum" else 1
        return weights * (goal / total) if float(total) > 0 else weights

    def head_weights(self, weights: Tensor, present: Tensor) -> Tensor:
        """Weights [K] of the heads' own gradients, given the row weights [K]; per ``heads``."""
        return weights if self.heads == "weighted" else torch.ones_like(weights)

    def generator(self, step: int, salt: int = 0) -> torch.Generator:
        """CPU generator that depends on (seed, step, salt) alone: equal on all ranks.

        Draw one number per objective and index the draws by ``rank`` (the position of each
        objective among the sorted names): a run then does not depend on the order of the tasks.
        """
        return torch.Generator().manual_seed(mix64(self.seed, 0x57, step, salt))

    def per_objective(self, value: float = 0.0) -> Tensor:
        """A [T] float64 tensor filled with ``value``: the shape of most state."""
        return torch.full((len(self.objectives),), value, dtype=torch.float64)


class LossWeighting(Weighting):
    """Scalarises the loss vector; costs one joint step; heads get the weights too.

    Class attributes:
        affine: the weights dF/dL do not depend on L, so :meth:`weights` knows them beforehand.
            Non-affine strategies leave :meth:`weights` at None; the engine first reduces the
            losses, then differentiates :meth:`objective`.

    Learned scalars are ``nn.Parameter``: they get dF/ds at the global losses once per step and
    are stepped by their own optimizer (no decay, no clipping, no EMA), lr = model's x ``lr_mult``.
    """

    affine: bool = True

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        seed: int = 0,
        transform: str = "identity",
        reduction: str = "paper",
    ) -> None:
        super().__init__(objectives, seed=seed, transform=transform, reduction=reduction)
        self.lr_mult = 1.0

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """dF/dL, where it does not depend on L."""
        if not self.affine:
            return None
        losses = torch.zeros(len(present), dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            total = self.objective(losses, present)
        return torch.autograd.grad(total, losses)[0]

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
        heads: as in :class:`Weighting`; ``own`` unless the paper weights the heads too.
        wrt: ``shared`` (all shared parameters, exact), ``last_shared`` or ``features`` (cheap).
        update_every: solve every n-th step and keep the weights in between.

    Class attributes:
        observe: :meth:`weights` is known beforehand, yet :meth:`update` wants the Gramian each
            step (GradNorm).
        takes_zero_rows: the method is defined where a gradient vanishes; the row stays in the
            problem and counts among the K of a mean.

    Raises:
        ConfigError: a strategy that keeps rows (``needs``) is given another scope than ``shared``.
    """

    observe: bool = False
    takes_zero_rows: bool = False

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        seed: int = 0,
        heads: str = "own",
        wrt: str = "shared",
        update_every: int = 1,
        transform: str = "identity",
        reduction: str = "paper",
    ) -> None:
        super().__init__(
            objectives, seed=seed, heads=heads, transform=transform, reduction=reduction
        )
        self.lr_mult = 1.0
        scopes = ("shared", "last_shared", "features")
        self.wrt = choose(
            "wrt", wrt, scopes[:1] if {"rows", "batches"} & set(self.needs) else scopes
        )
        self.update_every = update_every
        self.last_weights: Tensor
        self.register_buffer("last_weights", self.per_objective(float("nan")))

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """The weights of the last solve, while they are still to be kept."""
        if self.update_every <= 1 or step % self.update_every == 0:
            return None
        kept = self.last_weights[present]
        return None if bool(torch.isnan(kept).any()) else kept

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """Return the weights of the present rows; called only for steps that will be taken.

        Args:
            gramian: [K, K] float64 on the CPU; zero rows and absent objectives are already dropped
                by :meth:`row_weights`.
            losses: [K] float64 on the CPU, the losses of the same rows.
            present: int64 [K].
            step: optimizer steps attempted so far (for draws).

        Returns:
            [K] float64.
        """
        raise NotImplementedError

    def row_weights(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """Solve without rows that carry no direction, remember the weights; the engine's way in.

        A single row gets weight 1. Rows shorter than 1e-13 of the longest count as zero; they are
        dropped, unless the method takes them, and get the mean weight of the others, which only
        their heads can feel. A result that is not finite is replaced by the weights of the plain
        mean and counted.

        Args:
            gramian: [K, K] float64, finite.
            losses: [K] float64.
            present: int64 [K].
            step: optimizer steps attempted so far.

        Returns:
            [K] float64.
        """
        diagonal = gramian.numpy().diagonal()
        alive = diagonal > DEAD_ROW**2 * diagonal.max()
        if self.takes_zero_rows and alive.any() and not alive.all():
            gramian = gramian * torch.from_numpy(np.outer(alive, alive))
            alive[:] = True
        count = int(alive.sum())
        if count == len(alive) > 1:
            weights = self._found(gramian, losses, present, step)
        elif count > 1:
            rows = torch.from_numpy(alive)
            found = self._found(gramian[rows][:, rows], losses[rows], present[rows], step)
            weights = torch.full((len(alive),), float(found.mean()), dtype=torch.float64)
            weights[rows] = found
        else:
            weights = torch.ones(len(alive), dtype=torch.float64)
        self.last_weights[present] = weights
        return weights

    def _found(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        weights = self.solve(gramian, losses, present, step)
        if not np.isfinite(weights.numpy()).all():
            self.fallbacks += 1
            weights = torch.full_like(weights, 1 / len(weights))
        return weights

    def checked(self, found: tuple[npt.NDArray[np.float64], bool]) -> Tensor:
        """A solver's weights as a tensor; counts a fallback where the solver was not certain."""
        weights, certain = found
        if not certain:
            self.fallbacks += 1
        return torch.from_numpy(weights)

    def observe_rows(
        self, rows: list[list[Tensor]], present: Tensor, losses: Tensor, step: int
    ) -> list[list[Tensor]]:
        """Update state that is as large as the rows and return the rows to use instead of them.

        Called only if ``"rows" in needs``, once per step that will be taken (rows reduced over
        ranks and micro-batches, unscaled, found finite, multiplied by the slopes of the
        transform), before the Gramian. Gramian and combination then use the returned rows. Rows
        must be whole on every rank (no slices), so that the state is equal on all of them.

        Args:
            rows: K lists of tensors, one per shared parameter, in a fixed order.
            present: int64 [K].
            losses: [K] float64, transformed.
            step: optimizer steps attempted so far.

        Returns:
            K lists of tensors of the same shapes; may be the same objects, must not alias state
            (the engine may combine them in place).
        """
        return rows


class GradientWeighting(Weighting):
    """A column-local map of the gradient rows (each column of the matrix is treated alone).

    Args:
        heads: as in :class:`Weighting`.
    """

    wrt: str = "shared"

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        seed: int = 0,
        heads: str = "own",
        transform: str = "identity",
        reduction: str = "paper",
    ) -> None:
        super().__init__(
            objectives, seed=seed, heads=heads, transform=transform, reduction=reduction
        )

    def combine(
        self, rows: Tensor, present: Tensor, step: int, column: int, losses: Tensor
    ) -> Tensor:
        """Combine the rows of one parameter tensor.

        Args:
            rows: [K, P_tensor] float32, on the device, multiplied by the transform's slopes.
            present: int64 [K].
            step: optimizer steps attempted so far.
            column: number of the first column of this tensor among all P; salts the draws and
                addresses per-column state.
            losses: [K] global losses.

        Returns:
            [P_tensor], the shared gradient.
        """
        raise NotImplementedError
