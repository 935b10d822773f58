"""Strategies that see the losses alone: fixed, random, learned or closed-form weights."""

# T objectives, K present objectives, L [K] losses, w [K] = dF/dL

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl_cli.errors import ConfigError, nearest
from mtl_cli.task import Objective
from mtl_cli.weighting.base import LossWeighting, choose
from mtl_cli.weighting.transform import SMALLEST


class Equal(LossWeighting):
    """The plain sum of the losses: weight 1 for every objective.

    The baseline that Kurin et al. (NeurIPS 2022, arXiv 2201.04122) and Xin et al. (NeurIPS 2022,
    arXiv 2209.11379) find hard to beat once tuned.
    """

    couples = False

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Sum L."""
        return losses.sum()


class Fixed(LossWeighting):
    """The sum of the losses with weights from the configuration.

    Args:
        objectives: injected.
        weights: weight per objective or task name; 1 for those not named.
        common: see :class:`LossWeighting`.

    Raises:
        ConfigError: a name is no objective and no task, or a weight is negative.
    """

    couples = False

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        weights: Mapping[str, float] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        values = dict(weights or {})
        names = [o.name for o in self.objectives] + [o.task for o in self.objectives]
        problems = [
            f"weighting.weights.{name}: no such objective (expected one of "
            f"{', '.join(dict.fromkeys(names))})" + nearest(name, names)
            for name in values
            if name not in names
        ]
        problems += [
            f"weighting.weights.{name}: negative weight (found {value}, expected >= 0)"
            for name, value in values.items()
            if value < 0
        ]
        if problems:
            raise ConfigError(problems)
        found = [values.get(o.name, values.get(o.task, 1.0)) for o in self.objectives]
        self.values: Tensor
        values_tensor = torch.tensor(found, dtype=torch.float64)
        self.register_buffer("values", values_tensor, persistent=False)

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Sum w L."""
        return (self.values[present] * losses).sum()


class RLW(LossWeighting):
    """Random loss weights, drawn anew every step.

    Lin et al., TMLR 2022 (arXiv 2111.10603), eq. 3. Drawn over all objectives, so that an absent
    one does not change the others' weights.

    Args:
        objectives: injected.
        distribution: normal and uniform (softmax of the draws), dirichlet (flat), bernoulli (a
            random subset, equal shares), constrained_bernoulli (exactly one objective).
        common: see :class:`LossWeighting`.

    Shape:
        weights [K], >= 0; they sum to 1 over all T objectives.
    """

    couples = False

    def __init__(
        self, objectives: Sequence[Objective], *, distribution: str = "normal", **common: Any
    ) -> None:
        super().__init__(objectives, **common)
        choices = ("normal", "uniform", "dirichlet", "bernoulli", "constrained_bernoulli")
        self.distribution = choose("distribution", distribution, choices)

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """One draw per objective, by name."""
        generator = self.generator(step)
        count = len(self.objectives)
        uniform = torch.rand(count, dtype=torch.float64, generator=generator)
        normal = torch.randn(count, dtype=torch.float64, generator=generator)
        one = torch.nn.functional.one_hot(uniform.argmax(), count).double()
        coins = (normal > 0).double() if bool((normal > 0).any()) else one
        drawn = {
            "normal": normal.softmax(0),
            "uniform": uniform.softmax(0),
            "dirichlet": -(1 - uniform).log() / -(1 - uniform).log().sum(),
            "bernoulli": coins / coins.sum(),
            "constrained_bernoulli": one,
        }
        return drawn[self.distribution][self.rank[present]]


class Uncertainty(LossWeighting):
    """Learned homoscedastic uncertainty: F = sum a e^-s L + b s, s = log variance.

    Kendall, Gal & Cipolla, CVPR 2018 (arXiv 1705.07115), eq. 7 and 10. ``form=auto`` takes (a, b)
    from each loss's likelihood: gaussian (1/2, 1/2), categorical (1, 1/2) where e^-s is the
    squared inverse temperature, laplace (1, 1) where s = log b. ``form=half`` is (1/2, 1/2) for
    all, as in MTAN and LibMTL. s is learned instead of sigma, which would cross 0, and kept
    within [-10, 10]: a loss that reaches 0 would otherwise get an infinite weight.

    Args:
        objectives: injected; their ``likelihood`` decides the form.
        form: auto or half.
        init: initial s (LibMTL: -0.5).
        lr_mult: s steps with the model's learning rate times this.
        common: see :class:`LossWeighting`.

    State:
        log_variance: [T] learned, s.
    """

    positive_losses = True
    couples = False

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        form: str = "auto",
        init: float = 0.0,
        lr_mult: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.lr_mult = lr_mult
        forms = {"categorical": (1.0, 0.5), "laplace": (1.0, 1.0)}
        automatic = choose("form", form, ("auto", "half")) == "auto"
        chosen = [
            forms.get(o.likelihood or "", (0.5, 0.5)) if automatic else (0.5, 0.5)
            for o in self.objectives
        ]
        self.form: Tensor
        form_tensor = torch.tensor(chosen, dtype=torch.float64).view(-1, 2)
        self.register_buffer("form", form_tensor, persistent=False)
        self.log_variance = nn.Parameter(self.per_objective(init))

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Sum a e^-s L + b s."""
        s = self.log_variance[present]
        a, b = self.form[present].unbind(1)
        return (a * torch.exp(-s) * losses + b * s).sum()

    def update(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """Keep s within [-10, 10]."""
        with torch.no_grad():
            self.log_variance.clamp_(-10, 10)


class AutoWeighted(LossWeighting):
    """Learned uncertainty with a positive regulariser: F = sum L / (2 p^2) + log(1 + p^2).

    Liebel & Koerner, 2018 (arXiv 1805.06334), eq. 3. The total is never negative. |p| is kept
    at 1e-3 or more, where the weight would be infinite.

    Args:
        objectives: injected.
        init: initial p.
        lr_mult: p steps with the model's learning rate times this.
        common: see :class:`LossWeighting`.

    State:
        scale: [T] learned, p.
    """

    positive_losses = True
    couples = False

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        init: float = 1.0,
        lr_mult: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.lr_mult = lr_mult
        self.scale = nn.Parameter(self.per_objective(init))

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Sum L / (2 p^2) + log(1 + p^2)."""
        squared = self.scale[present] ** 2
        return (0.5 * losses / squared + torch.log1p(squared)).sum()

    def update(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """Keep abs(p) at 1e-3 or more."""
        with torch.no_grad():
            sign = torch.where(self.scale < 0, -1.0, 1.0)
            self.scale.copy_(sign * self.scale.abs().clamp_min(1e-3))


class IMTLL(LossWeighting):
    """Learned loss scales that bring every scaled loss to 1: F = sum e^s L - s.

    Liu et al., ICLR 2021 (OpenReview IMPnRXEWpvr), eq. 3, with a = e. s stays within [-20, 20].

    Args:
        objectives: injected.
        init: initial s.
        lr_mult: s steps with the model's learning rate times this.
        common: see :class:`LossWeighting`.

    State:
        log_scale: [T] learned, s.
    """

    positive_losses = True
    couples = False

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        init: float = 0.0,
        lr_mult: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.lr_mult = lr_mult
        self.log_scale = nn.Parameter(self.per_objective(init))

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Sum e^s L - s."""
        s = self.log_scale[present]
        return (s.exp() * losses - s).sum()

    def update(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """Keep s within [-20, 20]."""
        with torch.no_grad():
            self.log_scale.clamp_(-20, 20)


class ScaleInvariant(LossWeighting):
    """The sum of the logarithms of the losses: w = 1 / L.

    Baseline of Navon et al., ICML 2022 (arXiv 2202.01017); the analytic optimum of uncertainty
    weighting for L1 losses (UW-O, Kirchdorfer et al., GCPR 2024, arXiv 2408.07985). Losses are
    clamped at 1e-8. A factor on a loss changes nothing.
    """

    positive_losses = True
    affine = False
    couples = False

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Sum log L."""
        return positive(losses).log().sum()


class GLS(LossWeighting):
    """The geometric mean of the losses: w = F / (K L).

    Chennupati et al., CVPR workshops 2019 (arXiv 1904.08492), eq. 4, as exp(mean log L): a
    product over- and underflows. A loss below 1e-8 counts as 1e-8 and gets no gradient.
    """

    positive_losses = True
    affine = False

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Exp(mean log L)."""
        return positive(losses).log().mean().exp()


class UWSO(LossWeighting):
    """Softmax of the inverse losses: w = softmax(1 / (L T)), not differentiated.

    Kirchdorfer et al., GCPR 2024 (arXiv 2408.07985), eq. 9.

    Args:
        objectives: injected.
        temperature: T; depends on the scale of the losses and has to be tuned.
        common: see :class:`LossWeighting`.

    Shape:
        weights [K], >= 0, sum 1.
    """

    positive_losses = True
    affine = False

    def __init__(
        self, objectives: Sequence[Objective], *, temperature: float = 1.0, **common: Any
    ) -> None:
        super().__init__(objectives, **common)
        self.temperature = temperature

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Sum w L with w held constant."""
        weights = (1 / (positive(losses.detach()) * self.temperature)).softmax(0)
        return (weights * losses).sum()


class STCH(LossWeighting):
    """Smooth Tchebycheff scalarisation: mu logsumexp(f / mu), close to the largest f.

    Lin et al., ICML 2024 (arXiv 2402.19078), eq. 8. ``form=log_nadir`` is the authors' multi-task
    recipe: warm-up epochs minimise sum log L, the mean losses of the last one are the nadir n,
    then f = log(L / n), times K. ``form=paper`` is the equation on the losses as they are,
    f = L / K, ideal point 0.

    Args:
        objectives: injected.
        mu: smoothing; 0 tends to the worst objective alone, infinity to the mean.
        form: log_nadir or paper.
        warmup_epochs: epochs before the nadir is fixed (log_nadir).
        common: see :class:`LossWeighting`.

    State:
        nadir: [T], NaN until fixed; loss_sum, loss_count: [T], this epoch's; epoch.
    """

    positive_losses = True
    affine = False

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        mu: float = 1.0,
        form: str = "log_nadir",
        warmup_epochs: int = 4,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.mu = mu
        self.form = choose("form", form, ("log_nadir", "paper"))
        self.warmup_epochs = warmup_epochs
        self.nadir: Tensor
        self.loss_sum: Tensor
        self.loss_count: Tensor
        self.epoch: Tensor
        self.register_buffer("nadir", self.per_objective(float("nan")))
        self.register_buffer("loss_sum", self.per_objective())
        self.register_buffer("loss_count", self.per_objective())
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """Mu logsumexp(f / mu)."""
        count = len(losses)
        if self.form == "paper":
            return self.mu * (losses / (count * self.mu)).logsumexp(0)
        logs = positive(losses).log()
        if int(self.epoch) < self.warmup_epochs:
            return logs.sum()
        nadir = self.nadir[present]
        nadir = torch.where(torch.isnan(nadir), positive(losses.detach()), nadir)
        return self.mu * count * ((logs - nadir.log()) / self.mu).logsumexp(0)

    def update(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """Add to this epoch's means."""
        self.loss_sum[present] += positive(losses.double())
        self.loss_count[present] += 1

    def end_epoch(self) -> None:
        """Fix the nadir of objectives that have none yet, once the warm-up is over."""
        self.epoch += 1
        if int(self.epoch) >= self.warmup_epochs:
            missing = torch.isnan(self.nadir) & (self.loss_count > 0)
            self.nadir[missing] = (self.loss_sum / self.loss_count)[missing]
        self.loss_sum.zero_()
        self.loss_count.zero_()


def positive(losses: Tensor) -> Tensor:
    """The losses, at least 1e-8, for a logarithm or a division."""
    return losses.clamp_min(SMALLEST)
