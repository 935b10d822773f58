"""Strategies whose weights follow from the course of losses or metrics over the steps."""

# T objectives, K present objectives, L [K] losses, w [K] = dF/dL

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_cli.errors import ConfigError
from mtl_cli.task import Objective
from mtl_cli.weighting.adam import ObjectiveAdam
from mtl_cli.weighting.base import LossWeighting, choose
from mtl_cli.weighting.loss_level import positive
from mtl_cli.weighting.transform import SMALLEST


class DWA(LossWeighting):
    """Dynamic weight average: more weight where the mean loss falls more slowly.

    Liu, Johns & Davison, CVPR 2019 (arXiv 1803.10704), eq. 7: r = mean loss of the last window /
    of the one before, w = T softmax(r / temperature). Objectives without two windows yet count
    with r = 1. Normalised over all objectives, so that an absent one does not move the others.

    Args:
        objectives: injected.
        temperature: softness of the weights (paper 2).
        window: ``epoch`` (paper) or a number of steps with a label.
        common: see :class:`LossWeighting`.

    Raises:
        ConfigError: ``window`` is neither epoch nor a positive number.

    State:
        loss_sum, loss_count: [T] of the open window; last, previous: [T] means, NaN until known.
    """

    positive_losses = True
    couples = False

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        temperature: float = 2.0,
        window: str | int = "epoch",
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        if window != "epoch" and not (str(window).isdigit() and int(window) > 0):
            raise ConfigError(
                f"weighting.window: unknown window (found {window!r}, expected 'epoch' or a "
                "number of steps)"
            )
        self.temperature = temperature
        self.window = 0 if window == "epoch" else int(window)
        self.loss_sum: Tensor
        self.loss_count: Tensor
        self.last: Tensor
        self.previous: Tensor
        self.register_buffer("loss_sum", self.per_objective())
        self.register_buffer("loss_count", self.per_objective())
        self.register_buffer("last", self.per_objective(float("nan")))
        self.register_buffer("previous", self.per_objective(float("nan")))

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """T softmax(r / temperature)."""
        ratio = torch.nan_to_num(self.last / self.previous, nan=1.0, posinf=1.0, neginf=1.0)
        weights = len(self.objectives) * (ratio / self.temperature).softmax(0)
        return weights[present]

    def update(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """Add to the open window."""
        self.loss_sum[present] += losses.double()
        self.loss_count[present] += 1
        if self.window:
            self._close(self.loss_count >= self.window)

    def end_epoch(self) -> None:
        """Close the window of every objective that had a label in this epoch."""
        if not self.window:
            self._close(self.loss_count > 0)

    def _close(self, full: Tensor) -> None:
        self.previous[full] = self.last[full]
        self.last[full] = self.loss_sum[full] / self.loss_count[full]
        self.loss_sum[full] = 0
        self.loss_count[full] = 0


class FAMO(LossWeighting):
    """Keeps the rates of decrease of all log losses equal, from losses before and after a step.

    Liu, Feng, Stone & Liu, NeurIPS 2023 (arXiv 2306.03792), algorithm 1: z = softmax(xi),
    D = L - min_loss, F = sum z log D / c with c = sum z / D held constant, so that the weights
    z / (c D) sum to 1. After the step, xi follows z (delta - z.delta), delta = the fall of log D
    on the same batch, by Adam with L2 decay. The authors also clip the shared gradient to 1
    (``clip_norm=1``) and run the second forward pass in training mode, which moves BatchNorm
    statistics twice; the engine does not.

    Args:
        objectives: injected.
        lr: learning rate of xi (paper 0.025).
        gamma: L2 decay of xi (paper 1e-3; 1e-2 Cityscapes).
        min_loss: lower bound b of every loss.
        lookahead: ``same_batch`` (paper: one more forward pass), or ``next_batch``: the next
            step's losses stand in for the losses after the step, at no cost; a noisier estimate,
            one step late.
        common: see :class:`LossWeighting`.

    State:
        logits: [T], xi; moments of Adam; before: [T] losses of the last step, NaN until seen.
    """

    positive_losses = True
    affine = False

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        lr: float = 0.025,
        gamma: float = 1e-3,
        min_loss: float = 0.0,
        lookahead: str = "same_batch",
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        same_batch = choose("lookahead", lookahead, ("same_batch", "next_batch")) == "same_batch"
        self.recompute = same_batch
        self.gamma = gamma
        self.min_loss = min_loss
        self.moments = ObjectiveAdam(len(self.objectives), lr)
        self.logits: Tensor
        self.before: Tensor
        self.register_buffer("logits", self.per_objective())
        self.register_buffer("before", self.per_objective(float("nan")))

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Sum z log D / c, c = sum z / D held constant."""
        z = self.logits[present].softmax(0)
        distance = self._distance(losses)
        c = (z / distance.detach()).sum()
        return (z * distance.log() / c).sum()

    def update(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """Remember the losses; with ``next_batch`` learn from the step before."""
        if not self.recompute:
            self._learn(present, losses)
        self.before[present] = losses.double()

    def look_ahead(self, step: int, present: Tensor, losses: Tensor) -> None:
        """Learn from the losses of the same batch after the step."""
        self._learn(present, losses)

    def _learn(self, present: Tensor, after: Tensor) -> None:
        seen = ~torch.isnan(self.before[present])
        present, after = present[seen], after.double()[seen]
        if len(present) < 2:
            return
        z = self.logits[present].softmax(0)
        fall = self._distance(self.before[present]).log() - self._distance(after).log()
        grad = z * (fall - (z * fall).sum()) + self.gamma * self.logits[present]
        self.logits[present] += self.moments.step(present, grad)

    def _distance(self, losses: Tensor) -> Tensor:
        distance = losses - self.min_loss + SMALLEST
        return torch.where(distance > 0, distance, SMALLEST)


class CoVWeighting(LossWeighting):
    """Weights in proportion to the coefficient of variation of the loss ratios.

    Groenendijk et al., WACV 2021 (arXiv 2009.01717), eq. 4: l = L / (running mean of L), w =
    std(l) / mean(l), normalised; equal weights for the first two steps of an objective. Welford's
    running moments over the whole history, or with a decay. Normalised over all objectives.

    Args:
        objectives: injected.
        decay: share of the past kept per step; 0 keeps the whole history alike (paper).
        common: see :class:`LossWeighting`.

    Shape:
        weights [K], >= 0; they sum to 1 over all T objectives.

    State:
        steps, loss_mean, ratio_mean, ratio_variance: [T].
    """

    positive_losses = True
    couples = False

    def __init__(
        self, objectives: Sequence[Objective], *, decay: float = 0.0, **common: Any
    ) -> None:
        super().__init__(objectives, **common)
        self.decay = decay
        self.steps: Tensor
        self.loss_mean: Tensor
        self.ratio_mean: Tensor
        self.ratio_variance: Tensor
        for name in ("steps", "loss_mean", "ratio_mean", "ratio_variance"):
            self.register_buffer(name, self.per_objective())

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """Shares of std / mean of the loss ratios."""
        count = len(self.objectives)
        variation = self.ratio_variance.clamp_min(0).sqrt() / positive(self.ratio_mean)
        ready = self.steps > 1
        share = torch.full_like(variation, 1 / count)
        total = variation[ready].sum()
        if float(total) > 0:
            share[ready] = variation[ready] / total * (int(ready.sum()) / count)
        return share[present]

    def update(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """Running mean of L, then mean and variance of L / (mean before)."""
        losses = losses.double()
        steps = self.steps[present] + 1
        new = 1 / steps if self.decay == 0 else torch.where(steps == 1, 1.0, 1 - self.decay)
        mean = self.loss_mean[present]
        ratio = losses / positive(torch.where(steps == 1, losses, mean))
        old_ratio = self.ratio_mean[present]
        ratio_mean = old_ratio + new * (ratio - old_ratio)
        deviation = torch.where(steps == 1, 0.0, (ratio - old_ratio) * (ratio - ratio_mean))
        variance = self.ratio_variance[present]
        self.ratio_variance[present] = (1 - new) * variance + new * deviation
        if self.decay:
            self.ratio_variance[present] = (1 - new) * (variance + new * (ratio - old_ratio) ** 2)
        self.ratio_mean[present] = ratio_mean
        self.loss_mean[present] = mean + new * (losses - mean)
        self.steps[present] = steps


class DTP(LossWeighting):
    """Dynamic task prioritisation: focal weights from each task's metric, hard tasks first.

    Guo et al., ECCV 2018, eq. 3 and 4: k = running mean of a metric in (0, 1), w = -(1 - k)^gamma
    log k. The engine hands in the metrics; a regression needs one in [0, 1], such as
    exp(-error / scale). k is kept within [0.01, 0.99]; until the first metric, w = 1.

    Args:
        objectives: injected.
        gamma: focusing; larger leaves easy tasks with less.
        alpha: share of the newest metric in the running mean.
        common: see :class:`LossWeighting`.

    State:
        metric: [T], k, NaN until known.
    """

    couples = False
    needs = ("metrics",)

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        gamma: float = 1.0,
        alpha: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.gamma = gamma
        self.alpha = alpha
        self.metric: Tensor
        self.register_buffer("metric", self.per_objective(float("nan")))

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """-(1 - k)^gamma log k."""
        k = self.metric[present].clamp(0.01, 0.99)
        return torch.nan_to_num(-((1 - k) ** self.gamma) * k.log(), nan=1.0)

    def observe_metrics(self, present: Tensor, metrics: Tensor) -> None:
        """Take in the metrics [K] in [0, 1], higher is better, of the given objectives."""
        old = self.metric[present]
        new = metrics.double()
        mixed = self.alpha * new + (1 - self.alpha) * old
        self.metric[present] = torch.where(torch.isnan(old), new, mixed)


class AutoLambda(LossWeighting):
    """Learned weights that lower the validation loss after a virtual step.

    Liu et al., TMLR 2022 (arXiv 2202.03091), eq. 5: with theta' the parameters after a virtual
    step under the present weights and d the gradient of the primary tasks' validation losses at
    theta', d val / d w_i = -lr (L_i(theta + e d) - L_i(theta - e d)) / 2e on the training batch,
    e = 0.01 / |d|. The engine does the passes and restores theta exactly; the weights then take an
    Adam step, are kept >= 0 (the authors' are not) and serve the ordinary step.

    Args:
        objectives: injected.
        init: initial weight.
        lr: learning rate of the weights (paper 1e-4 NYUv2, 3e-5 Cityscapes).
        common: see :class:`LossWeighting`.

    State:
        loss_weights: [T]; moments of Adam.
    """

    couples = False
    needs = ("validation",)

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        init: float = 0.1,
        lr: float = 1e-4,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.moments = ObjectiveAdam(len(self.objectives), lr)
        self.loss_weights: Tensor
        self.register_buffer("loss_weights", self.per_objective(init))

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """The weights learned so far."""
        return self.loss_weights[present]

    def observe_validation(
        self, present: Tensor, ahead: Tensor, behind: Tensor, epsilon: float, lr: float
    ) -> None:
        """Step the weights.

        Args:
            present: int64 [K].
            ahead: [K] training losses at theta + epsilon d, transformed.
            behind: [K] training losses at theta - epsilon d, transformed.
            epsilon: length of the probe in units of d.
            lr: the model's learning rate in the virtual step.
        """
        grad = -lr * (ahead - behind).double() / (2 * epsilon)
        change = self.moments.step(present, grad)
        self.loss_weights[present] = (self.loss_weights[present] + change).clamp_min(0)
