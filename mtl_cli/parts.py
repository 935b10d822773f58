"""Independent parts of a batch, for strategies whose estimate needs more than one sample of it."""

# B batch

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from mtl_cli.task import Batch, mix64
from mtl_cli.work import Work

PARTS = 3  # J1, J2 for the weights, J3 for the direction


def split_parts(
    work: Work, micro: Sequence[Batch | None], step: int
) -> list[Sequence[Batch | None]]:
    """The step's micro-batches, cut into three parts if the strategy needs independent batches."""
    if "batches" not in work.weighting.needs:
        return [micro]
    return [pick(work, micro, step, PARTS, part) for part in range(PARTS)]


def pick(
    work: Work, micro: Sequence[Batch | None], step: int, parts: int, part: int
) -> list[Batch | None]:
    """One of ``parts`` disjoint random parts of a step's samples.

    Which part a sample is in depends on (seed, step, row) alone, so ranks and micro-batches may cut
    the batch as they like. A micro-batch without a sample in the part becomes None, and so does
    one with a single sample where BatchNorm trains: it has no variance.
    """
    least = 2 if any(isinstance(m, _BatchNorm) and m.training for m in work.model.modules()) else 1
    chosen: list[Batch | None] = []
    for batch in micro:
        if batch is None:
            chosen.append(None)
            continue
        mine = [mix64(work.seed, 0x3B, step, row) % parts == part for row in batch.index.tolist()]
        chosen.append(select(batch, torch.tensor(mine)) if sum(mine) >= least else None)
    return chosen


def select(batch: Batch, mask: torch.Tensor) -> Batch:
    """The samples of a batch where ``mask`` [B] is true."""
    return Batch(
        images=batch.images[mask],
        targets={name: t[mask] for name, t in batch.targets.items()},
        valid={name: v[mask] for name, v in batch.valid.items()},
        index=batch.index[mask],
        source=batch.source,
        extra=batch.extra,
    )
