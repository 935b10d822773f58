"""Strategies that need the Gramian of the objectives' gradients and nothing else of them."""

# T objectives, K present objectives (rows), G [K, K] Gramian, L [K] losses, w [K] row weights

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mtl_cli.task import Objective
from mtl_cli.weighting import solvers
from mtl_cli.weighting.adam import ObjectiveAdam
from mtl_cli.weighting.base import GramianWeighting, choose
from mtl_cli.weighting.solvers import Array
from mtl_cli.weighting.transform import SMALLEST


class MGDA(GramianWeighting):
    """Minimum-norm point of the convex hull of the objectives' gradients.

    Sener & Koltun, NeurIPS 2018 (arXiv 1810.04650), eq. 3; with ``wrt=features`` MGDA-UB, eq. 4.
    Differs from the authors' code: solved exactly by an active set on the normalised Gramian
    (Frank-Wolfe stops up to 38 % above the minimum at K = 10), no clipping of the line search.

    Args:
        objectives: injected.
        normalization: what divides a row inside the min-norm problem only: none, l2 (its length),
            loss, loss+ (both).
        common: see :class:`GramianWeighting`.

    Shape:
        gramian [K, K] -> weights [K], >= 0, sum 1.
    """

    def __init__(
        self, objectives: Sequence[Objective], *, normalization: str = "none", **common: Any
    ) -> None:
        super().__init__(objectives, **common)
        self.normalization = choose("normalization", normalization, ("none", "l2", "loss", "loss+"))

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """The w on the simplex with the least w.(G / d d')w, d the divisors of the rows."""
        divisor = torch.ones_like(losses)
        if self.normalization in ("l2", "loss+"):
            divisor = gramian.diagonal().sqrt()
        if self.normalization in ("loss", "loss+"):
            divisor = divisor * losses.abs().clamp_min(SMALLEST)
        divisor = torch.where(divisor > 0, divisor, 1.0)
        return self.checked(solvers.min_norm((gramian / torch.outer(divisor, divisor)).numpy()))


class PCGrad(GramianWeighting):
    """Projects each gradient onto the normal plane of every gradient that it conflicts with.

    Yu et al., NeurIPS 2020 (arXiv 2001.06782), algorithm 1: others in random order, the sum of
    the projected gradients. Every projected gradient stays a combination of the original ones, so
    only coefficients and inner products are needed: exact, K x K instead of K x P.
    The authors' TensorFlow code discards its shuffle; here the order is drawn anew every step.

    Shape:
        gramian [K, K] -> weights [K]; without any conflict all 1.
    """

    takes_zero_rows = True

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """Column sums of the coefficients of the projected gradients."""
        order = random_order(self, present, step)
        return torch.from_numpy(surgery(gramian.numpy(), order).sum(0))


class GradVac(GramianWeighting):
    """Rotates gradients towards a running target of their cosine, conflicting or not.

    Wang et al., ICLR 2021 (arXiv 2010.05874), eq. 4 and 5, for the whole model as one group
    (the paper's finest variant has a target per layer). Tasks are visited in random order.

    Args:
        objectives: injected.
        beta: rate of the running cosine, 1 / steps.
        eps: added to the denominators as in public code, in units of the gradients; 0 is the
            paper and scales with the gradients.
        common: see :class:`GramianWeighting`.

    State:
        target: [T, T] float64, running cosine of the row as it is, with each other row.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        beta: float = 0.01,
        eps: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.beta = beta
        self.eps = eps
        self.target: Tensor
        count = len(self.objectives)
        self.register_buffer("target", torch.zeros(count, count, dtype=torch.float64))

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """Column sums of the coefficients of the rotated gradients; moves the targets."""
        order = random_order(self, present, step)
        target = self.target[present][:, present].numpy()
        coefficients, target = vaccinate(gramian.numpy(), order, target, self.beta, self.eps)
        self.target[present[:, None], present] = torch.from_numpy(target)
        return torch.from_numpy(coefficients.sum(0))


class CAGrad(GramianWeighting):
    """The direction near the mean gradient whose worst objective improves most.

    Liu et al., NeurIPS 2021 (arXiv 2110.14048), eq. 3, dual problem of algorithm 1, solved as a
    cone problem on the normalised Gramian (SLSQP with absolute tolerances is off by 45-240 % on
    tiny or badly scaled rows). The authors' scripts multiply the result by K besides; that is
    ``reduction=sum`` up to a factor. Falls back to the mean (counted) where the dual is 0/0.

    Args:
        objectives: injected.
        c: radius of the ball around the mean gradient, in its lengths; [0, 1).
        rescale: 1 divides by 1 + c^2 (authors' default), 2 by 1 + c, 0 by nothing.
        common: see :class:`GramianWeighting`.

    Shape:
        gramian [K, K] -> weights [K] = 1/K + (c |g0| / |g_w|) w, > 0.
    """

    takes_zero_rows = True

    def __init__(
        self, objectives: Sequence[Objective], *, c: float = 0.5, rescale: int = 1, **common: Any
    ) -> None:
        super().__init__(objectives, **common)
        self.c = c
        self.rescaling = {0: 1.0, 1: 1 + c * c, 2: 1 + c}[rescale]

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """1 / K + (c |g0| / |g_w|) w, divided by the rescaling."""
        w, factor, certain = solvers.conflict_averse(gramian.numpy(), self.c)
        weights = self.checked((1 / len(w) + factor * w, certain))
        return weights / self.rescaling


class IMTLG(GramianWeighting):
    """The combination whose projections on all gradients are equal.

    Liu et al., ICLR 2021 (OpenReview IMPnRXEWpvr), eq. 6, by the pseudo-inverse of the Gramian of
    the unit rows, so that dependent rows do not explode. For K > 2 the common projection may be
    negative (the step then climbs on all objectives): the paper's form, unless ``descend``.
    Falls back to the mean (counted) where no direction has equal projections (opposed rows).

    Args:
        objectives: injected.
        descend: flip the sign where the common projection is negative (counted).
        heads: as in :class:`GramianWeighting`; the authors weight the heads, which a negative
            weight makes climb on their own loss.
        common: see :class:`GramianWeighting`.

    Shape:
        gramian [K, K] -> weights [K], sum 1 (-1 where flipped), of any sign.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        descend: bool = False,
        heads: str = "own",
        **common: Any,
    ) -> None:
        super().__init__(objectives, heads=heads, **common)
        self.descend = descend

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """V / sum v with v = U^+ 1 over the lengths of the rows."""
        c, _, inverse = solvers.unit_rows(gramian.numpy())
        x = solvers.pseudo_inverse_ones(c)
        v = inverse * x
        total = v.sum()
        if not solvers.has_common_projection(x) or abs(total) <= 1e-10 * np.abs(v).sum():
            return self.checked((np.full(len(v), 1 / len(v)), False))
        if total < 0 and self.descend:
            return self.checked((-v / total, False))
        weights: Array = v / total
        return torch.from_numpy(weights)


class IMTL(IMTLG):
    """Both halves of IMTL: learned loss scales e^s, then equal projections of the scaled rows.

    Liu et al., ICLR 2021, algorithm 1. s minimises e^s L - s, so that e^s L tends to 1; heads see
    the gradient of e^s L.

    Args:
        objectives: injected.
        init: initial s.
        lr_mult: s steps with the model's learning rate times this.
        heads: ``own``: e^s; ``weighted``: e^s times the row's weight.
        common: see :class:`IMTLG`.

    State:
        log_scale: [T] learned, s.
    """

    positive_losses = True

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        init: float = 0.0,
        lr_mult: float = 1.0,
        heads: str = "own",
        **common: Any,
    ) -> None:
        super().__init__(objectives, heads=heads, **common)
        self.lr_mult = lr_mult
        self.log_scale = nn.Parameter(self.per_objective(init))

    def row_weights(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """IMTL-G on the rows times e^s; a single row gets e^s."""
        scale = self.log_scale.detach()[present].exp()
        scaled = gramian * torch.outer(scale, scale)
        weights = scale * super().row_weights(scaled, losses, present, step)
        self.last_weights[present] = weights
        return weights

    def head_weights(self, weights: Tensor, present: Tensor) -> Tensor:
        """The scales e^s, or the weights, which contain them."""
        return weights if self.heads == "weighted" else self.log_scale.detach()[present].exp()

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        """F(s) = sum e^s L - s, for the gradient of s alone."""
        s = self.log_scale[present]
        return (s.exp() * losses - s).sum()

    def update(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """Keep s within [-20, 20]: a loss that reaches 0 would drive it to infinity."""
        with torch.no_grad():
            self.log_scale.clamp_(-20, 20)


class NashMTL(GramianWeighting):
    """Nash bargaining between the objectives: w > 0 with G w = 1 / w.

    Navon et al., ICML 2022 (arXiv 2202.01017), eq. 3: the minimum of 1/2 w.Gw - sum log w, by
    damped Newton on the Gramian of the unit rows (the authors' 20 linearised convex programs miss
    it by up to 26 times on nearly parallel rows). The shared gradient has length sqrt(K) whatever
    the losses; the authors clip it to ``max_norm``. Where the gradients are Pareto stationary no
    solution exists; a ridge of 1e-6 gives one (counted).

    Args:
        objectives: injected.
        max_norm: the shared gradient is shortened to this length; 0 leaves it.
        heads: as in :class:`GramianWeighting`; the authors weight the heads, by the solution
            before the shared gradient is shortened.
        common: see :class:`GramianWeighting`.

    Shape:
        gramian [K, K] -> weights [K], > 0.

    State:
        shortening: factor on the weights of the last solve, <= 1.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        max_norm: float = 1.0,
        heads: str = "weighted",
        **common: Any,
    ) -> None:
        super().__init__(objectives, heads=heads, **common)
        self.max_norm = max_norm
        self.shortening: Tensor
        self.register_buffer("shortening", torch.ones((), dtype=torch.float64))

    def row_weights(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """As in the base; where it needs no solve, nothing is shortened."""
        self.shortening.fill_(1.0)
        return super().row_weights(gramian, losses, present, step)

    def head_weights(self, weights: Tensor, present: Tensor) -> Tensor:
        """The solution itself, not shortened, or 1."""
        found = super().head_weights(weights, present)
        return found / self.shortening if self.heads == "weighted" else found

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """The w > 0 with G w = 1 / w."""
        return self.shortened(gramian, alpha=1.0)

    def shortened(self, gramian: Tensor, alpha: float) -> Tensor:
        """Solution of ``solvers.balance`` over the nonzero rows, the step shortened to ``max_norm``."""
        g = gramian.numpy()
        alive = g.diagonal() > 0
        w = np.ones(len(g))
        w[alive], certain = solvers.balance(g[np.ix_(alive, alive)], alpha)
        length = float(np.sqrt(max(w @ g @ w, 0.0)))
        factor = self.max_norm / length if length > self.max_norm > 0 else 1.0
        self.shortening.fill_(factor)
        return self.checked((w * factor, certain))


class FairGrad(NashMTL):
    """Alpha-fair gradients: w > 0 with G w = w^(-1/alpha).

    Ban & Ji, ICML 2024 (arXiv 2402.15638), eq. 7; alpha = 1 is Nash-MTL, large alpha tends to the
    max-min direction. Same Newton solver as Nash-MTL (scipy's least squares with absolute
    tolerances returns 60-160 times too little for tiny gradients). Heads keep weight 1.

    Args:
        objectives: injected.
        alpha: fairness, > 0; 2 in all of the authors' scripts.
        max_norm: as in :class:`NashMTL`.
        heads: as in :class:`GramianWeighting`.
        common: see :class:`GramianWeighting`.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        alpha: float = 2.0,
        max_norm: float = 1.0,
        heads: str = "own",
        **common: Any,
    ) -> None:
        super().__init__(objectives, max_norm=max_norm, heads=heads, **common)
        self.alpha = alpha

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """The w > 0 with G w = w^(-1/alpha)."""
        return self.shortened(gramian, self.alpha)


class AlignedMTL(GramianWeighting):
    """Replaces the gradient matrix by the nearest one with equal singular values, then averages.

    Senushkin et al., CVPR 2023 (arXiv 2305.19000), algorithm 1: B = sqrt(scale) V S^(-1/2) V' of
    the Gramian's eigenvectors V and eigenvalues S, weights B p with p = 1/K. Eigenvalues below
    ``tolerance`` of the largest are dropped: rounding rows to float32 gives dependent ones 1e-14,
    computing them in float32 up to 1e-10.

    Args:
        objectives: injected.
        scale_mode: the common squared singular value: min, median (lower), rmse (mean) of S.
        tolerance: share of the largest eigenvalue below which one counts as zero.
        common: see :class:`GramianWeighting`.

    Shape:
        gramian [K, K] -> weights [K].
    """

    takes_zero_rows = True

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        scale_mode: str = "min",
        tolerance: float = 1e-13,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.scale_mode = choose("scale_mode", scale_mode, ("min", "median", "rmse"))
        self.tolerance = tolerance

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """Sqrt(scale) V S^(-1/2) V' p over the eigenvalues that are kept."""
        top = gramian.diagonal().max()
        if not float(top) > 0:
            return torch.full_like(losses, 1 / len(losses))
        values, vectors = torch.linalg.eigh(gramian / top)  # ascending
        kept = values > self.tolerance * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        scale = {"min": values[0], "median": values.median(), "rmse": values.mean()}
        root = (scale[self.scale_mode] / values).sqrt()
        weights: Tensor = vectors @ (root * vectors.mean(0))
        return weights


class UPGrad(GramianWeighting):
    """The mean of the gradients, each first projected onto the cone that harms no objective.

    Quinton & Rey, 2024 (arXiv 2406.16232), definition 2. Exact: a projection is linear in its row,
    so all K problems share the Gramian of the unit rows. TorchJD's regularisation (``reg_eps`` and
    ``norm_eps`` 1e-4) changes the result by up to 13 % at a ratio of 1e3 between row lengths.

    Args:
        objectives: injected.
        reg_eps: added to the diagonal of G / trace G.
        norm_eps: below this trace G counts as 0 and the result is the mean, in squared gradients.
        common: see :class:`GramianWeighting`.

    Shape:
        gramian [K, K] -> weights [K], >= 1/K.
    """

    takes_zero_rows = True
    project = staticmethod(solvers.project_rows)

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        reg_eps: float = 0.0,
        norm_eps: float = 0.0,
        **common: Any,
    ) -> None:
        super().__init__(objectives, **common)
        self.reg_eps = reg_eps
        self.norm_eps = norm_eps

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """1 / K + what the projections add."""
        g = gramian.numpy()
        preference = np.full(len(g), 1 / len(g))
        trace = float(g.trace())
        if trace < self.norm_eps or trace == 0:
            return torch.from_numpy(preference)
        if self.reg_eps > 0:
            g = g / trace + self.reg_eps * np.eye(len(g))
        return self.checked(self.project(g, preference))


class DualProj(UPGrad):
    """The mean gradient, projected onto the cone of directions that harm no objective.

    Lopez-Paz & Ranzato, NeurIPS 2017 (GEM, arXiv 1706.08840), eq. 11, with all objectives as
    constraints. Arguments as in :class:`UPGrad`.

    Shape:
        gramian [K, K] -> weights [K], >= 1/K.
    """

    project = staticmethod(solvers.project_sum)


class ConFIG(GramianWeighting):
    """The direction of equal cosine with all gradients, as long as their projections on it.

    Liu, Chu & Thuerey, ICLR 2025 (arXiv 2408.11104), eq. 2 and 3, from the Gramian: the direction
    U^+ 1 is a combination of the unit rows U. Dependent rows have no such direction; the
    pseudo-inverse then gives the nearest.

    Shape:
        gramian [K, K] -> weights [K], of any sign.
    """

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """Coefficients x / length of the unit rows, times the sum of the projections."""
        c, length, inverse = solvers.unit_rows(gramian.numpy())
        x = solvers.pseudo_inverse_ones(c)
        projections = c @ x
        squared = float(x @ projections)
        if not solvers.has_common_projection(x):
            return self.checked((np.full(len(c), 1 / len(c)), False))
        return torch.from_numpy(inverse * x * float(length @ projections) / squared)


class GradNorm(GramianWeighting):
    """Loss weights that keep the gradient norms of all objectives at a common, rate-aware level.

    Chen et al., ICML 2018 (arXiv 1711.02257), eq. 1 and 2: w follows the gradient of
    sum |w_i n_i - mean(w n) r_i^alpha|, n_i the gradient norm at the last shared layer, r_i the
    relative inverse training rate; then w >= eps and sum w = T. The step uses w from before.
    An objective's L(0) is its first loss, whenever it first has a label.

    Args:
        objectives: injected.
        alpha: strength of the pull towards equal training rates (paper: 1.5 NYUv2, 0.12 toy).
        lr: learning rate of w (paper 0.025).
        optimizer: of w: sgd or adam.
        eps: smallest weight.
        heads: as in :class:`GramianWeighting`.
        wrt: as in :class:`GramianWeighting`; the paper takes the last shared layer.
        common: see :class:`GramianWeighting`.

    State:
        loss_weights: [T], sum T; first_losses: [T], NaN until seen; moments of Adam.
    """

    observe = True
    positive_losses = True

    def __init__(
        self,
        objectives: Sequence[Objective],
        *,
        alpha: float = 1.5,
        lr: float = 0.025,
        optimizer: str = "adam",
        eps: float = 1e-3,
        heads: str = "weighted",
        wrt: str = "last_shared",
        **common: Any,
    ) -> None:
        super().__init__(objectives, heads=heads, wrt=wrt, **common)
        self.alpha = alpha
        self.lr = lr
        self.eps = eps
        self.adam = choose("optimizer", optimizer, ("sgd", "adam")) == "adam"
        self.moments = ObjectiveAdam(len(self.objectives), lr)
        self.loss_weights: Tensor
        self.first_losses: Tensor
        self.register_buffer("loss_weights", self.per_objective(1.0))
        self.register_buffer("first_losses", self.per_objective(float("nan")))

    def weights(self, step: int, present: Tensor) -> Tensor | None:
        """The weights learned so far."""
        return self.loss_weights[present]

    def update(
        self, step: int, present: Tensor, losses: Tensor, gramian: Tensor | None = None
    ) -> None:
        """One step of w down its gradient, then the floor and the sum."""
        if gramian is None or step % max(self.update_every, 1):
            return
        first = self.first_losses[present]
        first = torch.where(torch.isnan(first), losses.double(), first)
        self.first_losses[present] = first
        w = self.loss_weights[present]
        norm = gramian.diagonal().clamp_min(0).sqrt()
        ratio = losses.double() / first.clamp_min(SMALLEST)
        rate = ratio / ratio.mean().clamp_min(SMALLEST)
        grad = torch.sign(w * norm - (w * norm).mean() * rate.pow(self.alpha)) * norm
        change = self.moments.step(present, grad) if self.adam else -self.lr * grad
        stepped = (w + change).clamp_min(self.eps)
        self.loss_weights[present] = stepped * (w.sum() / stepped.sum())


def random_order(strategy: GramianWeighting, present: Tensor, step: int) -> Array:
    """For each present row the others in random order, drawn by name: [K, K-1] int64."""
    count = len(strategy.objectives)
    draws = torch.rand(count, count, dtype=torch.float64, generator=strategy.generator(step))
    rank = strategy.rank[present]
    priority = draws[rank][:, rank].fill_diagonal_(2.0)
    order: Array = priority.argsort(1)[:, :-1].numpy()
    return order


def surgery(gramian: Array, order: Array) -> Array:
    """PCGrad's coefficients [K, K]: row i holds the projected gradient i in terms of all rows."""
    rows = np.arange(len(gramian))
    coefficients = np.eye(len(gramian))
    squared = gramian.diagonal()
    squared = np.where(squared > 0, squared, np.inf)
    for j in order.T:  # all i at once, each with its own j [K]
        inner = (coefficients * gramian[j]).sum(1)
        coefficients[rows, j] -= np.minimum(inner, 0) / squared[j]
    return coefficients


def vaccinate(
    gramian: Array, order: Array, target: Array, beta: float, eps: float
) -> tuple[Array, Array]:
    """GradVac's coefficients [K, K] and the next target cosines [K, K]."""
    rows = np.arange(len(gramian))
    coefficients = np.eye(len(gramian))
    target = target.copy()
    length = np.sqrt(np.maximum(gramian.diagonal(), 0))
    for j in order.T:
        products = coefficients @ gramian
        own = np.sqrt(np.maximum((products * coefficients).sum(1), 0))
        divisor = own * length[j] + eps
        cosine = products[rows, j] / np.where(divisor > 0, divisor, np.inf)
        cosine = np.minimum(np.maximum(cosine, -1), 1)  # what is left of opposed rows is rounding
        before = target[rows, j]
        wanted = np.minimum(before, 0.999)
        root = np.sqrt(1 - wanted**2)
        turn = own * (wanted * np.sqrt(np.maximum(1 - cosine**2, 0)) - cosine * root)
        divisor = length[j] * root + eps
        turn /= np.where(divisor > 0, divisor, np.inf)
        coefficients[rows, j] += np.where(cosine < wanted, turn, 0)
        target[rows, j] = (1 - beta) * before + beta * cosine
    return coefficients, target
