"""TorchJD's weightings, aggregators and scalarizers, by name (optional extra)."""

# T objectives, K present objectives, P columns

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl_cli.errors import ConfigError, nearest
from mtl_cli.task import Objective
from mtl_cli.weighting.base import (
    GradientWeighting,
    GramianWeighting,
    LossWeighting,
    Weighting,
)

COLUMN_LOCAL = ("TrimmedMean", "GradDrop")  # treat every column on its own
ROTATING = ("ConFIG", "NashMTL")  # take the matrix, yet depend on its Gramian alone
OWN = {  # need more than one Gramian; ours are exact
    "ExcessMTL": "excess_mtl",
    "ExcessMTLWeighting": "excess_mtl",
    "MoDoWeighting": "modo",
    "SDMGradWeighting": "sdmgrad",
}


def from_torchjd(
    objectives: Sequence[Objective],
    *,
    method: str,
    arguments: Mapping[str, Any] | None = None,
    seed: int = 0,
    heads: str = "own",
    transform: str = "identity",
    reduction: str = "paper",
) -> Weighting:
    """Build the strategy that runs a class of TorchJD (Quinton & Rey, arXiv 2406.16232).

    Its tolerances and fallbacks are TorchJD's, not ours. State of its classes is saved as far as
    TorchJD keeps it in buffers that exist from the start.

    Args:
        objectives: injected.
        method: class name, such as UPGrad, KrumWeighting, TrimmedMean, PCD, COSMOS.
        arguments: of its constructor; lists become tensors, names of TorchJD classes objects of
            them (CRMOGMWeighting wants ``weighting: MGDAWeighting``).
        seed: injected.
        heads: as in :class:`Weighting`.
        transform: as in :class:`Weighting`.
        reduction: as in :class:`Weighting`.

    Raises:
        ConfigError: TorchJD is not installed, has no such class, refuses the arguments, or the
            class needs more than a Gramian or single columns.
    """
    aggregation, scalarization = _modules()
    found = getattr(aggregation, method, None) or getattr(scalarization, method, None)
    if not isinstance(found, type):
        known = [n for m in (aggregation, scalarization) for n in m.__all__]
        raise ConfigError(
            f"weighting.method: TorchJD has no {method!r} (expected one of "
            f"{', '.join(sorted(known))})" + nearest(method, known)
        )
    if method in OWN:
        raise ConfigError(
            f"weighting.method: {method} needs more than one Gramian; use weighting={OWN[method]}"
        )
    try:
        module = found(**{k: _argument(aggregation, v) for k, v in dict(arguments or {}).items()})
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"weighting.arguments: {method} cannot be built: {error}") from error
    common: dict[str, Any] = {"seed": seed, "transform": transform, "reduction": reduction}
    if isinstance(module, scalarization.Scalarizer):
        return _Scalarized(objectives, module, **common)
    common["heads"] = heads
    if method in COLUMN_LOCAL:
        return _ByColumn(objectives, module, **common)
    if method in ROTATING:
        return _Rotated(objectives, module, **common)
    inner = getattr(module, "gramian_weighting", getattr(module, "weighting", module))
    if method == "CRMOGMWeighting" or not isinstance(module, aggregation.Aggregator):
        inner = module
    if isinstance(inner, aggregation.Weighting):
        return _Weighted(objectives, inner, **common)
    raise ConfigError(
        f"weighting.method: {method} needs the whole gradient matrix at once, which is never "
        "formed here"
    )


def _argument(aggregation: Any, value: Any) -> Any:
    if isinstance(value, str) and isinstance(getattr(aggregation, value, None), type):
        return getattr(aggregation, value)()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return torch.tensor(list(value), dtype=torch.float64)
    return value


def _modules() -> tuple[Any, Any]:
    try:
        return (
            importlib.import_module("torchjd.aggregation"),
            importlib.import_module("torchjd.scalarization"),
        )
    except ImportError as error:
        raise ConfigError(
            "weighting=torchjd: TorchJD is not installed; pip install 'mtl-cli[torchjd]'"
        ) from error


class _Scalarized(LossWeighting):
    """A scalarizer: F(L) is its value at the present losses."""

    affine = False

    def __init__(self, objectives: Sequence[Objective], module: nn.Module, **common: Any) -> None:
        super().__init__(objectives, **common)
        self.module = module

    def objective(self, losses: Tensor, present: Tensor) -> Tensor:
        value: Tensor = self.module(losses)
        return value


class _Weighted(GramianWeighting):
    """A weighting of the Gramian; draws of its own are seeded by (seed, step)."""

    def __init__(self, objectives: Sequence[Objective], module: nn.Module, **common: Any) -> None:
        super().__init__(objectives, **common)
        self.module = module

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        return _seeded(self, step, lambda: self.module(gramian)).double()


class _Rotated(_Weighted):
    """An aggregator that rotates with its rows: run on the square root of the Gramian."""

    def solve(self, gramian: Tensor, losses: Tensor, present: Tensor, step: int) -> Tensor:
        """The w with w' S = what the aggregator makes of S, S S = G."""
        values, vectors = torch.linalg.eigh(gramian)
        root = vectors @ (values.clamp_min(0).sqrt()[:, None] * vectors.T)
        combined = _seeded(self, step, lambda: self.module(root)).double()
        weights: Tensor = torch.linalg.pinv(root, hermitian=True) @ combined
        return weights


class _ByColumn(GradientWeighting):
    """An aggregator that treats each column on its own."""

    def __init__(self, objectives: Sequence[Objective], module: nn.Module, **common: Any) -> None:
        super().__init__(objectives, **common)
        self.module = module

    def combine(
        self, rows: Tensor, present: Tensor, step: int, column: int, losses: Tensor
    ) -> Tensor:
        return _seeded(self, step, lambda: self.module(rows), column)


def _seeded(strategy: Weighting, step: int, call: Callable[[], Tensor], column: int = 0) -> Tensor:
    """Run TorchJD under its own seed and leave the global generators as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(strategy.generator(step, column).initial_seed())
        return call().detach()
