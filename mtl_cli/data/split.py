"""Which samples train, validate and test: a function of the table and ``data.split_seed`` only."""

# N rows of the table

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl_cli.errors import DataError
from mtl_cli.task import mix64

SPLITS = ("train", "val", "test")
VAL, TEST = 0.1, 0.1  # shares of the rows
EVAL_SHARE = 8  # data.limit=N caps validation and test at N/8
_STREAM = 0x5B117


def assign(
    rows: int, seed: int, split: Sequence[str] | None, group: Sequence[str] | None
) -> dict[str, list[int]]:
    """Cut the table into train, val and test, each in a shuffled order.

    Args:
        rows: number of rows N.
        seed: ``data.split_seed``; the run's seed never moves the split.
        split: ``train``, ``val`` or ``test`` per row, or None to draw 80/10/10.
        group: rows with the same non-empty text stay together; None if rows are independent.

    Raises:
        DataError: a split would be empty, or all rows are one group.
    """
    units = _units(range(rows), group)
    if split is None:
        return _draw(_shuffled(units, seed), rows)
    named: dict[str, list[int]] = {name: [] for name in SPLITS}
    for unit in _shuffled(units, seed):
        for row in unit:
            named[split[row]].append(row)
    if not named["train"]:
        raise DataError("data: the split column has no row 'train' (expected train, val, test)")
    if not named["val"]:  # a table with train and test only: validate on a tenth of train
        inside = [unit for unit in (_keep(u, split, "train") for u in units) if unit]
        drawn = _draw(_shuffled(inside, seed), len(named["train"]), test=0.0)
        named["train"], named["val"] = drawn["train"], drawn["val"]
    return named


def restrict(splits: dict[str, list[int]], limit: int | None, fraction: float) -> dict[str, Tensor]:
    """Keep a fraction of the training samples, then at most ``limit``; sort each split.

    Smaller sets are subsets of larger ones, so that a data-size sweep is nested.

    Args:
        splits: rows in shuffled order, as :func:`assign` returns them.
        limit: training samples at most; validation and test are capped at ``limit // 8``.
        fraction: share of the training samples, 0..1; validation and test stay whole.

    Returns:
        int64 row indices per split, ascending.
    """
    kept = dict(splits)
    kept["train"] = kept["train"][: max(1, round(fraction * len(kept["train"])))]
    if limit is not None:
        small = max(1, limit // EVAL_SHARE)
        kept = {name: rows[: limit if name == "train" else small] for name, rows in kept.items()}
    return {name: torch.tensor(sorted(kept[name]), dtype=torch.int64) for name in SPLITS}


def straddling(split: Sequence[str], group: Sequence[str]) -> int:
    """Number of groups that a given split column tears apart."""
    seen: dict[str, set[str]] = {}
    for part, name in zip(split, group, strict=True):
        if name:
            seen.setdefault(name, set()).add(part)
    return sum(len(parts) > 1 for parts in seen.values())


def _units(rows: Sequence[int], group: Sequence[str] | None) -> list[list[int]]:
    """Rows that move together, in order of first appearance; an empty group is a unit alone."""
    if group is None:
        return [[row] for row in rows]
    units: dict[object, list[int]] = {}
    for row in rows:
        units.setdefault(group[row] or row, []).append(row)
    return list(units.values())


def _shuffled(units: list[list[int]], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(mix64(seed, _STREAM))
    return [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]


def _draw(units: list[list[int]], rows: int, test: float = TEST) -> dict[str, list[int]]:
    """Fill test and val with whole units up to their shares; train takes the rest."""
    if rows < 3:
        raise DataError(f"data: {rows} samples cannot be split (expected at least 3)")
    if len(units) < 3:
        raise DataError(
            f"data: the group column has {len(units)} different values (expected at least 3); "
            "without data.group every row is on its own"
        )
    wanted = {"test": round(test * rows), "val": max(1, round(VAL * rows))}
    out: dict[str, list[int]] = {name: [] for name in SPLITS}
    rest = list(units)
    for name, count in wanted.items():
        while len(out[name]) < count and len(rest) > 1:
            out[name] += rest.pop(0)
    out["train"] = [row for unit in rest for row in unit]
    return out


def _keep(unit: list[int], split: Sequence[str], name: str) -> list[int]:
    return [row for row in unit if split[row] == name]
