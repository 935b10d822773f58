"""Heads: from features to the raw outputs of one task (logits, or a scaled regression value)."""

# B batch, F features, N tokens, H W pixels, C outputs

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor, nn

from mtl_cli.errors import ConfigError, nearest
from mtl_cli.task import Task


class Head(nn.Module):
    """Base of all heads.

    Args:
        channels: feature name -> number of channels, injected by build.
        task: the task that the head serves, injected by build.

    Class attributes:
        kinds: kinds of tasks that the head can serve.

    Shape:
        features {name: tensor} -> raw [B, task.width].
    """

    kinds: tuple[str, ...] = ()

    def __init__(self, channels: Mapping[str, int], task: Task) -> None:
        super().__init__()
        if task.kind not in self.kinds:
            raise ConfigError(
                f"heads.{task.name}: {type(self).__name__} does not serve this kind of task "
                f"(found {task.kind}, expected {', '.join(self.kinds)})"
            )
        self.channels = dict(channels)
        self.task = task

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features -> raw outputs [B, task.width]."""
        raise NotImplementedError


class MLP(Head):
    """Fully connected layers with ReLU between them, on one pooled feature.

    With one hidden layer as wide as the feature it is Linear(F,F)-ReLU-Linear(F,C).

    Args:
        channels: feature name -> number of channels, injected by build.
        task: the task that the head serves, injected by build.
        hidden: width of the hidden layer, a list of widths, or None for one as wide as the feature.
        dropout: probability of dropping an input of each linear layer, 0 to 1.
        feature: name of the feature to read; maps and tokens are averaged over their positions.
    """

    kinds = ("regression", "binary", "multiclass", "multilabel")

    def __init__(
        self,
        channels: Mapping[str, int],
        task: Task,
        hidden: int | Sequence[int] | None = None,
        dropout: float = 0.0,
        feature: str = "pool",
    ) -> None:
        super().__init__(channels, task)
        width = self._width(feature)
        if hidden is None:
            hidden = (width,)
        widths = [width, *([hidden] if isinstance(hidden, int) else hidden), task.width]
        self._check(widths, dropout)
        self.feature = feature
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Dropout(dropout)] if dropout else []
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, features: Mapping[str, Tensor]) -> Tensor:
        """Features -> raw outputs [B, task.width]."""
        raw: Tensor = self.layers(pooled(features[self.feature]))
        return raw

    def _width(self, feature: str) -> int:
        if feature not in self.channels:
            raise ConfigError(
                f"heads.{self.task.name}.feature: the backbone does not give it (found {feature}, "
                f"expected one of {', '.join(self.channels)}){nearest(feature, self.channels)}; "
                f"add it to backbone.features"
            )
        return self.channels[feature]

    def _check(self, widths: Sequence[int], dropout: float) -> None:
        problems = []
        if any(width < 1 for width in widths):
            found = list(widths[1:-1])
            problems.append(f"heads.{self.task.name}.hidden: widths must be >= 1 (found {found})")
        if not 0 <= dropout < 1:
            problems.append(
                f"heads.{self.task.name}.dropout: must be at least 0 and below 1 (found {dropout})"
            )
        if problems:
            raise ConfigError(problems)


class Linear(MLP):
    """One linear layer on one pooled feature: the probe of transfer learning.

    Args:
        channels: feature name -> number of channels, injected by build.
        task: the task that the head serves, injected by build.
        dropout: probability of dropping an input, 0 to 1.
        feature: name of the feature to read; maps and tokens are averaged over their positions.
    """

    def __init__(
        self,
        channels: Mapping[str, int],
        task: Task,
        dropout: float = 0.0,
        feature: str = "pool",
    ) -> None:
        super().__init__(channels, task, hidden=(), dropout=dropout, feature=feature)


def pooled(feature: Tensor) -> Tensor:
    """Mean over positions: [B,F] as it is, tokens [B,N,F] and maps [B,F,H,W] -> [B,F]."""
    if feature.ndim == 4:
        return feature.mean((2, 3))
    return feature.mean(1) if feature.ndim == 3 else feature
