"""Losses: sums over the valid labels, and the counts to divide them by.

A loss never returns a mean. Counts come from the targets alone and are added over micro-batches and
ranks before the first backward pass, so that missing labels are exact under any split of the batch.
Invalid entries of the raw output and of the target are replaced *before* the loss is computed:
multiplying by 0 afterwards would keep a NaN, in the loss or in its gradient.
"""

# B batch, C classes or labels, W raw outputs (1 or C)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_cli.errors import ConfigError, DataError
from mtl_cli.task import Task


class Loss(nn.Module):
    """Base of all losses; one with a single term defines :meth:`values` alone.

    Args:
        task: the task that is learned, injected by build.

    Class attributes:
        kinds: kinds of tasks that the loss can serve.
        terms: names of the terms, one objective each; an empty name stands for the task itself.
        likelihoods: per term gaussian, laplace, categorical or None.
        priors: per term a fixed factor before any weighting.

    Shape:
        raw [B,W], target and valid [B] or [B,C] -> sums [terms].
    """

    kinds: tuple[str, ...] = ()
    terms: tuple[str, ...] = ("",)
    likelihoods: tuple[str | None, ...] = (None,)
    priors: tuple[float, ...] = (1.0,)

    def __init__(self, task: Task) -> None:
        super().__init__()
        if task.kind not in self.kinds:
            raise ConfigError(
                f"losses.{task.name}: {type(self).__name__} does not serve this kind of task "
                f"(found {task.kind}, expected {', '.join(self.kinds)})"
            )
        self.task = task

    def count(self, target: Tensor, valid: Tensor) -> Tensor:
        """What the sums are divided by, from the targets alone.

        Args:
            target: encoded targets [B] or [B,C]; invalid entries may hold anything.
            valid: bool, same shape.

        Returns:
            [terms, 2] float64 on the targets' device: denominator and number of labels.
        """
        labels = _float64(valid.sum())
        return torch.stack([labels, labels]).expand(len(self.terms), 2).clone()

    def forward(self, raw: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        """Sum of the loss over the valid labels, at least float32, with gradient 0 on the rest.

        Args:
            raw: the head's output [B,W], of any floating type.
            target: as in :meth:`count`.
            valid: as in :meth:`count`.

        Returns:
            [terms], float32 (float64 for a float64 raw output).

        Raises:
            DataError: a valid target is out of range. Looked for on the CPU only: elsewhere it
                would wait for the device, and all labels were validated when they were read.
        """
        raw, target = self._only_valid(raw, target, valid)
        if target.device.type == "cpu":
            self._check(target)
        values = self.values(raw, target)
        return torch.where(valid, values, 0.0).sum().view(1)

    def values(self, raw: Tensor, target: Tensor) -> Tensor:
        """Loss of every label; all entries are valid numbers here.

        Args:
            raw: [B] for one output, else [B,C].
            target: [B] or [B,C].

        Returns:
            shaped as target.
        """
        raise NotImplementedError

    def _only_valid(self, raw: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Raw output and target as at least float32, 0 where there is no label."""
        raw = raw if raw.dtype == torch.float64 else raw.float()
        if self.task.width == 1 and raw.ndim == target.ndim + 1:
            raw = raw.squeeze(-1)
        mask = valid.unsqueeze(-1) if raw.ndim > target.ndim else valid
        target = torch.where(valid, target, torch.zeros_like(target))
        if target.is_floating_point():
            target = target.to(raw.dtype)
        return torch.where(mask, raw, 0.0), target

    def _check(self, target: Tensor) -> None:
        """Refuse targets that the loss would accept without a word, or that kill the kernel."""

    def _refuse_outside(self, target: Tensor, low: float, high: float) -> None:
        bad = (target < low) | (target > high)
        if bool(bad.any()):
            raise DataError(
                f"task {self.task.name}: target out of range (found {target[bad][0].item():g}, "
                f"expected {low:g} to {high:g}); correct the labels or set data.bad_label=mask"
            )


class L1(Loss):
    """Absolute error, in units of the task's scale. Negative log-likelihood of a Laplacian."""

    kinds = ("regression",)
    likelihoods = ("laplace",)

    def values(self, raw: Tensor, target: Tensor) -> Tensor:
        """|raw - target|."""
        return (raw - target).abs()


class SmoothL1(Loss):
    """Quadratic below ``beta``, linear above (Girshick, ICCV 2015, arXiv 1504.08083, eq. 3).

    Its tails are a Laplacian's, hence the likelihood.

    Args:
        task: the task that is learned, injected by build.
        beta: error where the two pieces meet, in units of the task's scale, > 0.
    """

    kinds = ("regression",)
    likelihoods = ("laplace",)

    def __init__(self, task: Task, beta: float = 1.0) -> None:
        super().__init__(task)
        if beta <= 0:
            raise ConfigError(f"losses.{task.name}.beta: must be > 0 (found {beta}); l1 has none")
        self.beta = beta

    def values(self, raw: Tensor, target: Tensor) -> Tensor:
        """e^2 / (2 beta) where |e| < beta, else |e| - beta / 2."""
        return F.smooth_l1_loss(raw, target, reduction="none", beta=self.beta)


class MSE(Loss):
    """Squared error, in units of the task's scale squared."""

    kinds = ("regression",)
    likelihoods = ("gaussian",)

    def values(self, raw: Tensor, target: Tensor) -> Tensor:
        """(raw - target)^2."""
        return (raw - target).square()


class BCE(Loss):
    """Sigmoid cross-entropy of one logit.

    Args:
        task: the task that is learned, injected by build.
        pos_weight: factor on the loss of positive samples, > 0; None is 1.
    """

    kinds = ("binary",)
    likelihoods = ("categorical",)

    def __init__(self, task: Task, pos_weight: float | None = None) -> None:
        super().__init__(task)
        self.pos_weight = _weights(
            task, "pos_weight", None if pos_weight is None else [pos_weight], 1
        )

    def values(self, raw: Tensor, target: Tensor) -> Tensor:
        """-(w y log p + (1 - y) log(1 - p)) with p = sigmoid(raw)."""
        return _sigmoid_cross_entropy(raw, target, self.pos_weight)

    def _check(self, target: Tensor) -> None:
        self._refuse_outside(target, 0, 1)


class CrossEntropy(Loss):
    """Softmax cross-entropy.

    With class weights the denominator is the sum of the weights of the valid labels, as in torch.

    Args:
        task: the task that is learned, injected by build.
        label_smoothing: share of the target spread evenly over all classes, 0 to 1 (Szegedy et
            al., CVPR 2016, arXiv 1512.00567).
        class_weights: one factor per class, in the order of ``classes``, all > 0; None is 1.
    """

    kinds = ("multiclass",)
    likelihoods = ("categorical",)

    def __init__(
        self,
        task: Task,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__(task)
        if not 0 <= label_smoothing < 1:
            raise ConfigError(
                f"losses.{task.name}.label_smoothing: must be at least 0 and below 1 "
                f"(found {label_smoothing})"
            )
        self.label_smoothing = label_smoothing
        self.class_weights = _weights(task, "class_weights", class_weights, task.width)

    def count(self, target: Tensor, valid: Tensor) -> Tensor:
        """Denominator: the weights of the valid labels added up; labels: their number."""
        counts = super().count(target, valid)
        if self.class_weights is not None:
            index = torch.where(valid, target, 0)
            if index.device.type == "cpu":
                self._check(index)
            weights = self.class_weights.to(counts.device)[index.to(counts.device)]
            counts[0, 0] = torch.where(valid.to(counts.device), weights, 0.0).sum()
        return counts

    def values(self, raw: Tensor, target: Tensor) -> Tensor:
        """-sum_c w_c q_c log softmax(raw)_c, q the smoothed target."""
        weight = None if self.class_weights is None else self.class_weights.to(raw)
        return F.cross_entropy(
            raw, target, weight, reduction="none", label_smoothing=self.label_smoothing
        )

    def _check(self, target: Tensor) -> None:
        self._refuse_outside(target, 0, self.task.width - 1)


class MultilabelBCE(Loss):
    """Sigmoid cross-entropy of C independent labels, each of which may be missing alone.

    Args:
        task: the task that is learned, injected by build.
        pos_weight: factor on the loss of present labels, one for all or one per label, > 0.
        over_labels: ``mean`` divides by the number of valid labels; ``sum`` by the number of
            samples that have one, so that the losses of a sample's labels are added.
    """

    kinds = ("multilabel",)
    likelihoods = ("categorical",)

    def __init__(
        self,
        task: Task,
        pos_weight: float | Sequence[float] | None = None,
        over_labels: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__(task)
        if over_labels not in ("mean", "sum"):
            raise ConfigError(
                f"losses.{task.name}.over_labels: no such rule (found {over_labels}, "
                "expected mean, sum)"
            )
        if isinstance(pos_weight, (int, float)):
            pos_weight = [pos_weight] * task.width
        self.pos_weight = _weights(task, "pos_weight", pos_weight, task.width)
        self.over_labels = over_labels

    def count(self, target: Tensor, valid: Tensor) -> Tensor:
        """Denominator: valid labels, or samples with at least one; labels: valid labels."""
        counts = super().count(target, valid)
        if self.over_labels == "sum":
            counts[0, 0] = _float64(valid.any(-1).sum())
        return counts

    def values(self, raw: Tensor, target: Tensor) -> Tensor:
        """Per label -(w y log p + (1 - y) log(1 - p)) with p = sigmoid(raw)."""
        return _sigmoid_cross_entropy(raw, target, self.pos_weight)

    def _check(self, target: Tensor) -> None:
        self._refuse_outside(target, 0, 1)


def _float64(number: Tensor) -> Tensor:
    """As float64, where it is unless that device has no such numbers."""
    return number.to("cpu" if number.device.type == "mps" else number.device, torch.float64)


def _sigmoid_cross_entropy(raw: Tensor, target: Tensor, pos_weight: Tensor | None) -> Tensor:
    weight = None if pos_weight is None else pos_weight.to(raw)
    return F.binary_cross_entropy_with_logits(raw, target, pos_weight=weight, reduction="none")


def _weights(task: Task, key: str, weights: Sequence[float] | None, length: int) -> Tensor | None:
    """Weights as a float64 tensor [length]; a plain attribute, so that no checkpoint holds them."""
    if weights is None:
        return None
    if len(weights) != length or not all(w > 0 and math.isfinite(w) for w in weights):
        raise ConfigError(
            f"losses.{task.name}.{key}: needs {length} finite numbers > 0 (found {list(weights)})"
        )
    return torch.tensor(list(weights), dtype=torch.float64)
