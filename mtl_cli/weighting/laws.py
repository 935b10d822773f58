"""Laws of weighting strategies, tried on a zoo of gradient matrices: ``mtl conf check X --laws``.

A law is a generator over what breaks it, given a way to build the strategy. Required laws are what
training, resuming and several ranks rely on; facts are properties that some methods have.
"""

# T objectives, K present objectives, P columns

from __future__ import annotations

import io
import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtl_cli.weighting.base import GradientWeighting, LossWeighting
from mtl_cli.weighting.zoo import (
    CASES,
    COLUMNS,
    COUNTS,
    REGULAR,
    SINGULAR,
    Build,
    matrix,
    objectives,
    run,
    some_losses,
    take_step,
)


@dataclass(frozen=True)
class Finding:
    """What one law says about one strategy; ``required`` is False for facts."""

    law: str
    ok: bool
    detail: str
    required: bool = True


def close(found: Tensor, wanted: Tensor, relative: float) -> bool:
    """Whether two tensors differ by no more than a share of the second one's length."""
    return float((found - wanted).norm()) <= relative * float(wanted.norm()) + 1e-300


def finite(
    build: Build, counts: Sequence[int] = COUNTS, cases: Sequence[str] = REGULAR
) -> Iterator[str]:
    """Gradient and weights are finite on regular matrices, and in the step after them."""
    for count in counts:
        for case in cases:
            strategy = build(objectives(count))
            for step, rows in enumerate((case, case, "random")):
                found = take_step(strategy, matrix(rows, count), some_losses(count, step), step)
                named = zip(("gradient", "weights"), found, (COLUMNS, count), strict=True)
                for name, tensor, size in named:
                    if tensor.shape != (size,) or not bool(torch.isfinite(tensor).all()):
                        yield f"{name} not [{size}] finite on '{case}', K = {count}, step {step}"


def degenerate(build: Build, counts: Sequence[int] = COUNTS) -> Iterator[str]:
    """They are so with zero, opposed and dependent gradients, and in the step after them."""
    yield from finite(build, counts, SINGULAR)


def shapes(build: Build, counts: Sequence[int] = COUNTS) -> Iterator[str]:
    """What comes out is [P] and [K] float64, detached; before the backward it is that or None."""
    for count in counts:
        strategy, present = build(objectives(count)), torch.arange(count)
        for step in range(2):
            known = strategy.weights(step, present)
            if known is None and isinstance(strategy, LossWeighting) and strategy.affine:
                yield f"affine, yet weights() is None at step {step}"
            gradient, weights = take_step(
                strategy, matrix("random", count), some_losses(count, step), step
            )
            if gradient.shape != (COLUMNS,):
                yield f"gradient {list(gradient.shape)}, expected [{COLUMNS}]"
            for tensor in (weights, weights if known is None else known):
                if tensor.shape != (count,) or tensor.dtype != torch.float64:
                    kind = f"{list(tensor.shape)} {tensor.dtype}".replace("torch.", "")
                    yield f"weights {kind}, expected [{count}] float64"
                if tensor.requires_grad:
                    yield "weights require grad; detach them"


def single(build: Build) -> Iterator[str]:
    """One objective trains as without a strategy, up to scale; one present of five trains."""
    rows = matrix("random", 1)
    gradient, weights = take_step(build(objectives(1)), rows, some_losses(1))
    if not (float(weights) > 0 and close(gradient / gradient.norm(), rows[0] / rows.norm(), 1e-7)):
        yield "with one objective, the gradient is not a positive multiple of its own"
    strategy = build(objectives(5))
    run(strategy, 0, 4)
    for i in range(5):
        one = torch.tensor([i])
        found = take_step(strategy, matrix("random", 5)[one], some_losses(5)[one], 4 + i, one)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in found):
            yield f"not finite when only objective {i} of 5 is present"


def order(
    build: Build, counts: Sequence[int] = (3, 8), steps: int = 3, tolerance: float = 1e-4
) -> Iterator[str]:
    """Permuted objectives give permuted weights and the same gradient, rounding aside."""
    for count in counts:
        mixed = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        one, other = build(objectives(count)), build(objectives(count, mixed))
        for step in range(steps):
            rows, losses = matrix("random", count) * (1 + step), some_losses(count, step)
            gradient, weights = take_step(one, rows, losses, step)
            found, permuted = take_step(other, rows[mixed], losses[mixed], step)
            if not (
                close(found, gradient, tolerance) and close(permuted, weights[mixed], tolerance)
            ):
                yield f"the order of {count} objectives changes step {step}"


def absent(build: Build) -> Iterator[str]:
    """State entries [T, ...] of objectives without a label in a step stay as they were."""
    strategy = build(objectives(5))
    run(strategy, 0, 4)
    before = {k: v.clone() for k, v in strategy.state_dict().items()}
    present = torch.tensor([0, 2, 4])
    rows, losses = matrix("conflicting", 5), some_losses(5, 77)
    take_step(strategy, rows[present], losses[present], 4, present)
    after = strategy.state_dict()
    for key, value in before.items():
        if value.ndim and len(value) == 5 and not _same(after[key][[1, 3]], value[[1, 3]]):
            yield f"'{key}' of absent objectives moves"


def resumes(build: Build) -> Iterator[str]:
    """A saved and loaded state continues to the bit."""
    whole, before, after = (build(objectives(5)) for _ in range(3))
    expected = run(whole, 0, 12)
    run(before, 0, 7)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after.load_state_dict(torch.load(file, weights_only=True))
    for i, (found, wanted) in enumerate(zip(run(after, 7, 12), expected[14:], strict=True)):
        if not torch.equal(found, wanted):
            yield f"step {7 + i // 2} differs after loading; keep state in buffers or parameters"
            return
    for key, value in whole.state_dict().items():
        if not _same(after.state_dict()[key], value):
            yield f"'{key}' differs after loading"


def draws(build: Build) -> Iterator[str]:
    """Two strategies of one seed agree to the bit, whatever the global generators hold."""
    expected = run(build(objectives(5)), 0, 4)
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    found = run(build(objectives(5)), 0, 4)
    if not all(map(torch.equal, found, expected)):
        yield "the same seed draws other numbers; draw from self.generator(step)"


def generators(build: Build) -> Iterator[str]:
    """Building and stepping leave the global generators alone."""
    before = _global_state()
    run(build(objectives(5)), 0, 3)
    for name, state in _global_state().items():
        if state != before[name]:
            yield f"moves the global generator of {name}; draw from self.generator(step)"


def columns(build: Build) -> Iterator[str]:
    """A gradient combined piece by piece (one parameter at a time) is that of all columns."""
    strategy, pieces = build(objectives(3)), build(objectives(3))
    if isinstance(strategy, GradientWeighting) and isinstance(pieces, GradientWeighting):
        rows, losses, present = matrix("random", 3), some_losses(3), torch.arange(3)
        whole = strategy.combine(rows.clone(), present, 5, 100, losses)
        parts = [
            pieces.combine(rows[:, a:b].clone(), present, 5, 100 + a, losses)
            for a, b in ((0, 17), (17, 40), (40, COLUMNS))
        ]
        if not close(torch.cat(parts), whole, 1e-9):
            yield "depends on how the columns are split into parameters"


def homogeneous(build: Build) -> Iterator[str]:
    """All losses times c: the gradient times c."""
    for case in ("random", "conflicting", "scaled"):
        for c in (1e-6, 1e6):
            one, other = build(objectives(4)), build(objectives(4))
            for step in range(2):
                rows, losses = matrix(case, 4) * (1 + step), some_losses(4, step)
                gradient, _ = take_step(one, rows, losses, step)
                found, _ = take_step(other, rows * c, losses * c, step)
                if not close(found / c, gradient, 1e-7):
                    ratio = float(found.norm() / gradient.norm())
                    yield f"losses x {c:.0e} make the gradient x {ratio:.1e} ('{case}')"


def rotates(build: Build, steps: int = 2) -> Iterator[str]:
    """Rotated or padded rows give the rotated or padded gradient: only the Gramian matters."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(COLUMNS, COLUMNS, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(normal)[0]
    padding = torch.eye(COLUMNS, COLUMNS + 6, dtype=torch.float64)
    for case, count in (("random", 5), ("conflicting", 3)):
        for name, change, tolerance in (("rotated", rotation, 1e-7), ("padded", padding, 1e-9)):
            one, other = build(objectives(count)), build(objectives(count))
            for step in range(steps):
                rows, losses = matrix(case, count) * (1 + step), some_losses(count, step)
                gradient, _ = take_step(one, rows, losses, step)
                found, _ = take_step(other, rows @ change, losses, step)
                if not close(found, gradient @ change, tolerance) or bool(found[COLUMNS:].any()):
                    yield f"'{case}' rows {name} change step {step}"


def harmless(build: Build) -> Iterator[str]:
    """No loss rises to first order: no negative product of the step with a gradient."""
    for count in COUNTS[1:]:
        for case in REGULAR:
            rows = matrix(case, count)
            gradient, _ = take_step(build(objectives(count)), rows, torch.ones(count).double())
            cosines = rows @ gradient / (rows.norm(dim=1) * gradient.norm())
            if float(cosines.min()) < -1e-9 * float(cosines.abs().max()):
                yield f"cosine {float(cosines.min()):.2g} with a gradient of '{case}', K = {count}"


def simplex(build: Build) -> Iterator[str]:
    """Weights are not negative and sum to 1."""
    for case in CASES[:-2]:
        strategy = build(objectives(3))
        for step in range(4):
            _, weights = take_step(strategy, matrix(case, 3), some_losses(3, step), step)
            total, least = float(weights.sum()), float(weights.min())
            if least < 0 or abs(total - 1) > 1e-7:
                yield f"smallest {least:.3g}, sum {total:.3g} on '{case}', step {step}"
                break


REQUIRED: dict[str, Callable[..., Iterator[str]]] = {
    "finite": finite,
    "degenerate matrices": degenerate,
    "shapes": shapes,
    "single objective": single,
    "order of objectives": order,
    "absent objectives": absent,
    "saved state": resumes,
    "draws": draws,
    "global generators": generators,
    "columns": columns,
}
FACTS: dict[str, Callable[..., Iterator[str]]] = {
    "homogeneous": homogeneous,
    "rotates": rotates,
    "harmless": harmless,
    "simplex": simplex,
}


def examine(build: Build) -> Iterator[Finding]:
    """Try every law on one strategy, required ones first."""
    for law in (*REQUIRED, *FACTS):
        yield judge(law, build)


def judge(law: str, build: Build, **options: Any) -> Finding:
    """Try one law; an exception of the strategy breaks it. Global generators are put back.

    Args:
        law: key of :data:`REQUIRED` or :data:`FACTS`.
        build: makes the strategy over given objectives, always with the same seed.
        options: of the law, to try less of it or more strictly.
    """
    call = {**REQUIRED, **FACTS}[law]
    wrong: list[str] = []
    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        wrong.extend(call(build, **options))
    except Exception as error:  # any fault of a user's class is what this looks for
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = (str(error).splitlines() or [""])[0]
        wrong.append(f"{type(error).__name__}: {text} ({place.filename}:{place.lineno})")
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])
    wrong = list(dict.fromkeys(wrong))
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    summary = (call.__doc__ or "").splitlines()[0].rstrip(".")
    return Finding(law, not wrong, f"{wrong[0]}{more}" if wrong else summary, law in REQUIRED)


def _same(found: Tensor, wanted: Tensor) -> bool:
    alike = found.dtype == wanted.dtype and found.shape == wanted.shape
    return alike and torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True)


def _global_state() -> dict[str, Any]:
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    held = numpy.pop("state")
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (held["key"].tolist(), held["pos"], numpy),
        "random": random.getstate(),
    }
