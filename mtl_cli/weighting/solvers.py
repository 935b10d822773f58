"""Exact K x K problems in float64: the algebra behind the Gramian strategies.

Every solver first divides the rows by their lengths (C = D G D has a unit diagonal) and undoes it
analytically, so that tolerances are relative and a factor 1e6 between rows costs no digits. None
raises on degenerate input; where the answer is not certain, the second result is False.
"""

# K rows, M right-hand sides; G [K, K] Gramian, C [K, K] Gramian of unit rows, w [K] row weights

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)
RANK_TOLERANCE = 1e-10  # eigenvalues of C below this share of the largest count as zero


def unit_rows(gramian: Array) -> tuple[Array, Array, Array]:
    """Gramian of the unit rows, lengths and inverse lengths (0 for a zero row)."""
    length = np.sqrt(np.maximum(gramian.diagonal(), 0))
    inverse = 1 / np.where(length > 0, length, np.inf)
    c: Array = gramian * inverse[:, None] * inverse
    return c, length, inverse


def project_simplex(point: Array) -> Array:
    """Euclidean projection onto the probability simplex (sort and threshold)."""
    point = point - point.max()  # the projection is the same; a large common part would round
    total = excess = 0.0
    for count, value in enumerate(sorted(point.tolist(), reverse=True), start=1):
        total += value
        if value <= (total - 1) / count:
            break
        excess = (total - 1) / count
    projected: Array = np.maximum(point - excess, 0)
    return projected


def pseudo_inverse_ones(c: Array) -> Array:
    """C^+ 1, with eigenvalues below the rank tolerance taken as zero."""
    values, vectors = np.linalg.eigh(c)
    kept = values > RANK_TOLERANCE * values[-1]
    basis = vectors[:, kept]
    result: Array = basis @ (basis.sum(0) / values[kept])
    return result


def has_common_projection(x: Array) -> bool:
    """Whether a direction projects equally on all unit rows, given x = C^+ 1.

    1'C^+1 is at least 1 where the ones are in the range of C, and rounding where they are not.
    """
    return float(x.sum()) > 1e-6


def complementarity(h: Array, q: Array) -> tuple[Array, bool]:
    """Solve x >= 0, Hx + q >= 0, x.(Hx + q) = 0, the optimum of 1/2 x.Hx + q.x over x >= 0.

    Block principal pivoting on all right-hand sides at once (Judice & Pires 1994, the rule that
    falls back to single pivots); an active set (Lawson & Hanson 1974, ch. 23) where H is singular
    on the way.

    Args:
        h: [K, K] symmetric positive semidefinite, diagonal near 1.
        q: [K, M].

    Returns:
        x [K, M], and whether the conditions hold to rounding.
    """
    scale = np.abs(q).max(0)
    scale[scale == 0] = 1
    q = q / scale
    x = _block_pivot(h, q)
    if x is not None:
        return x * scale, True
    columns = [_active_set(h, -q[:, m]) for m in range(q.shape[1])]
    x = np.stack(columns, 1)
    slack = h @ x + q
    tolerance = 1e-8 * (1 + np.abs(x).max(0))
    certain = bool((slack > -tolerance).all() and (np.abs(slack * x) < tolerance * (1 + x)).all())
    return x * scale, certain


def _block_pivot(h: Array, q: Array) -> Array | None:
    """Exchange all infeasible variables at once; None if H proves singular or rounds too far."""
    k, m = q.shape
    passive = q.T < 0  # [M, K]
    fewest = np.full(m, k + 1)
    chances = np.full(m, 3)
    identity = np.eye(k)
    for _ in range(8 + 4 * k):
        x, slack = _on_support(h, q, passive, identity)
        if x is None or (largest := np.abs(x).max()) > 1e7:
            return None
        tolerance = 64 * EPS * k * (1 + largest)
        wrong = np.where(passive, x, slack) < -tolerance
        count = wrong.sum(1)
        if not count.any():
            found: Array = np.maximum(x, 0).T
            return found
        better = count < fewest
        fewest = np.where(better, count, fewest)
        chances = np.where(better, 3, chances - 1)
        last = k - 1 - wrong[:, ::-1].argmax(1)
        single = (chances < 0) & (count > 0)
        wrong[single] = False
        wrong[single, last[single]] = True
        passive ^= wrong
    return None


def _on_support(
    h: Array, q: Array, passive: npt.NDArray[np.bool_], identity: Array
) -> tuple[Array | None, Array]:
    """Rows x [M, K] with (Hx + q) = 0 on the passive set and x = 0 outside; slack Hx + q."""
    try:
        if len(passive) == 1:
            x = np.zeros_like(q.T)
            on = np.flatnonzero(passive[0])
            if len(on):
                x[0, on] = np.linalg.solve(h[np.ix_(on, on)], -q[on, 0])
        else:
            both = passive[:, :, None] & passive[:, None, :]
            system = np.where(both, h, identity)
            x = np.linalg.solve(system, np.where(passive, -q.T, 0)[..., None])[..., 0]
    except np.linalg.LinAlgError:
        return None, q.T
    return x, x @ h + q.T


def _active_set(h: Array, c: Array) -> Array:
    """Minimise 1/2 x.Hx - c.x over x >= 0 by adding one variable at a time; H may be singular."""
    x = np.zeros_like(c)
    passive = np.zeros(len(c), dtype=bool)
    for _ in range(3 * len(c)):
        slope = np.where(passive, -np.inf, c - h @ x)
        entering = int(slope.argmax())
        if slope[entering] <= 1e-12 * (1 + np.abs(x).max()):
            break
        passive[entering] = True
        for _ in range(len(c)):
            on = np.flatnonzero(passive)
            z = _solve_or_nearest(h[on][:, on], c[on])
            if z.min() > 0:
                x[:] = 0
                x[on] = z
                break
            leaving = z <= 0
            room = x[on][leaving] / np.maximum(x[on][leaving] - z[leaving], EPS)
            x[on] += room.min() * (z - x[on])
            passive[on[(x[on] <= EPS * np.abs(x).max()) & leaving]] = False
            if not passive[on[leaving]].any() and not passive.any():
                break
        x[~passive] = 0
    return x


def _solve_or_nearest(h: Array, c: Array) -> Array:
    """H^-1 c, or the shortest least-squares solution where H is singular to rounding."""
    try:
        z = np.asarray(np.linalg.solve(h, c), dtype=np.float64)
        if np.abs(z).max() < 1e7 * np.abs(c).max():
            return z
    except np.linalg.LinAlgError:
        pass
    return np.asarray(np.linalg.lstsq(h, c, rcond=1e-13)[0], dtype=np.float64)


def min_norm(gramian: Array) -> tuple[Array, bool]:
    """Weights on the simplex that minimise w.Gw.

    The optimum of w.Gw + k (1 - sum w)^2 over w >= 0 is proportional to it for every k > 0; k is
    the shortest row squared, and the support found is solved again without the penalty.
    """
    c, length, inverse = unit_rows(gramian)
    if length.min() == 0:
        dead: Array = np.asarray(length == 0, dtype=np.float64)
        return dead / dead.sum(), True
    ratio = length.min() * inverse  # 1 for the shortest row
    h = c + np.outer(ratio, ratio)
    diagonal = 1 / np.sqrt(h.diagonal())
    x, certain = complementarity(h * np.outer(diagonal, diagonal), -(diagonal * ratio)[:, None])
    u = x[:, 0] * diagonal  # weights of the unit rows
    on = u > 0
    if on.any():
        u[on] = _resolve(c[np.ix_(on, on)], ratio[on], u[on])
    w = u * ratio
    if not w.sum() > 0:
        return np.full(len(w), 1 / len(w)), False
    return w / w.sum(), certain


def _resolve(c: Array, right: Array, found: Array) -> Array:
    """C^-1 r if it is positive and well determined, else what was found before."""
    try:
        z = np.asarray(np.linalg.solve(c, right), dtype=np.float64)
    except np.linalg.LinAlgError:
        return found
    return z if (z > 0).all() and z.max() < 1e7 * right.max() else found


def project_rows(gramian: Array, preference: Array) -> tuple[Array, bool]:
    """Sum of the rows, each projected onto the cone of the directions that harm no row.

    In unit rows, the projection of row i adds the y >= 0 that minimises 1/2 y.Cy + C_i.y: K
    problems with one matrix, each linear in the length of its row.

    Args:
        gramian: [K, K].
        preference: [K] weight of each row before its projection.
    """
    c, length, inverse = unit_rows(gramian)
    if (c >= 0).all():
        return preference.copy(), True
    conflicting = (c < 0).any(0)
    y, certain = complementarity(c, c[:, conflicting])
    added: Array = y @ (preference * length)[conflicting]
    return preference + inverse * added, certain


def project_sum(gramian: Array, preference: Array) -> tuple[Array, bool]:
    """The preferred combination of the rows, projected onto the cone that harms no row."""
    c, length, inverse = unit_rows(gramian)
    q = c @ (preference * length)
    if (q >= 0).all():
        return preference.copy(), True
    y, certain = complementarity(c, q[:, None])
    return preference + inverse * y[:, 0], certain


def balance(gramian: Array, alpha: float) -> tuple[Array, bool]:
    """The w > 0 with Gw = w^(-1/alpha): Nash bargaining for alpha = 1, alpha-fairness else.

    It is the minimum of 1/2 w.Gw - sum psi(w), psi' = w^(-1/alpha), strictly convex: damped
    Newton from the answer for orthogonal rows. Where a positive combination of the rows vanishes
    there is none; a ridge of 1e-6 then bounds it (second result False).
    """
    c, length, _ = unit_rows(gramian)
    exponent = (1 - alpha) / (1 + alpha)
    top = length.max()
    relative = length / top
    target = relative ** (2 * exponent)  # w = length^(-2a/(1+a)) v turns G into c_i c_j C, c = l^e
    h = c * np.outer(np.sqrt(target), np.sqrt(target))
    v, certain = _newton(h, target, alpha)
    if not certain:
        v, _ = _newton(h + 1e-6 * np.diag(target), target, alpha)
    return v * length ** (-2 * alpha / (1 + alpha)), certain


def _newton(h: Array, target: Array, alpha: float) -> tuple[Array, bool]:
    """Minimise 1/2 v.Hv - sum t psi(v) over v > 0; False if it runs away or stalls."""
    v = np.ones_like(target)
    bound = 1e7 * math.sqrt(float(target.max() / target.min()))
    residual = math.inf
    for _ in range(100):
        force = target * v ** (-1 / alpha)
        gradient = h @ v - force
        previous, residual = residual, float(np.abs(gradient / force).max())
        if residual < 1e-13 or (residual < 1e-3 and residual > 0.5 * previous):
            return v, True  # converged, or down to the rounding of nearly opposed rows
        hessian = h.copy()
        hessian.flat[:: len(v) + 1] += force / (alpha * v)
        try:
            step = -np.linalg.solve(hessian, gradient)
        except np.linalg.LinAlgError:
            break
        # v (1 + r) with |r| < 1/4 is close to the minimum; else the damping of self-concordant
        # functions, whose third derivative (1 + 1/alpha) / v is that of 2 / v at alpha = 1
        ratio = step / v
        relative = float(np.abs(ratio).max()) * max(1.0, (1 + 1 / alpha) / 2)
        if relative < 0.25:
            v = v + step
            continue
        decrement = math.sqrt(max(-float(gradient @ step), 0.0))
        damping = max(1 / (1 + relative), 1 / (1 + decrement))
        shrink = float(ratio.min())
        following: Array = v + min(damping, 0.9 / -shrink if shrink < 0 else 1.0) * step
        if not following.max() < bound:
            break
        v = following
    return v, residual < 1e-7


def conflict_averse(gramian: Array, c: float) -> tuple[Array, float, bool]:
    """The w on the simplex that minimises w.Gp + s sqrt(w.Gw), p = 1/K, s = c sqrt(p.Gp).

    With t = |x| / s the optimum x = J.w is the point of the rows' hull nearest to -t g0: a
    min-norm problem. On its support |x(t)|^2 = 1/A + t^2 b, so t follows in closed form; the
    support is found again until it stays, inside a bracket that always shrinks.

    Returns:
        w [K], the factor s / |x| (0 where x or g0 vanishes), and whether the optimum is certain.
    """
    k = len(gramian)
    top = float(gramian.diagonal().max())
    uniform = np.full(k, 1 / k)
    g = gramian / top
    q = g @ uniform
    mean = float(uniform @ q)
    if mean <= 1e-20 or c == 0:
        return uniform, 0.0, c == 0
    s = c * math.sqrt(mean)
    vanishing = 1e-7 * math.sqrt(float(g.diagonal().min()))  # a shorter x has no direction
    low, high, t = 0.0, 2.0 / s, math.sqrt(mean) / s
    w, certain = uniform, True
    for _ in range(100):
        w, certain = min_norm(g + t * (q[:, None] + q) + t * t * mean)
        following, exact = _on_piece(g, q, w, s)
        if exact is not None:
            w, certain = exact, True
            break
        if _length(g, w) > s * t:
            low = t
        else:
            high = t
        if high - low <= 4 * EPS * high or s * high <= vanishing:
            break
        t = following if low < following < high else (low + high) / 2
    size = _length(g, w)
    if size <= vanishing:
        return w, 0.0, False
    return w, s / size, certain


def _length(g: Array, w: Array) -> float:
    return math.sqrt(max(float(w @ g @ w), 0.0))


def _on_piece(g: Array, q: Array, w: Array, s: float) -> tuple[float, Array | None]:
    """The t at which |x(t)| = s t on the support of w (nan if none); w there, if it is optimal."""
    on = np.flatnonzero(w > 0)
    c, length, inverse = unit_rows(g)
    right = np.stack([inverse[on], q[on] * inverse[on]], 1)
    try:
        ones, bent = (np.linalg.solve(c[on][:, on], right) * inverse[on, None]).T
    except np.linalg.LinAlgError:
        return math.nan, None
    a = float(ones.sum())
    turn = ones * (bent.sum() / a) - bent
    scaled = turn * length[on]
    room = s * s - float(scaled @ c[on][:, on] @ scaled)
    if not (a > 0 and room > 0):
        return math.nan, None
    t = 1 / math.sqrt(a * room)
    exact = np.zeros_like(w)
    exact[on] = ones / a + t * turn
    slope = g @ exact + t * q
    excess = (slope - float(exact @ slope)) * inverse
    tolerance = 1e-11 * np.abs(slope * inverse).max()
    optimal = exact.min() >= 0 and excess.min() >= -tolerance and excess[on].max() <= tolerance
    return t, exact if optimal else None
