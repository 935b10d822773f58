"""One rank of ``test_ranks``: every strategy for a few steps, rank 0 saves the weights."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch

from mtl_cli import build, dist
from mtl_cli.train import train_step
from tests import support

STEPS = 2
OPTIMIZER = ("optimizer=sgd", "optimizer.lr=0.05")
BATCH = ("data.batch_size=15", "data.drop_last=false")  # uneven parts, and a short last batch


def trained(strategy: str, precision: str, accumulate: int = 1) -> torch.Tensor:
    """Weights and strategy state after two steps, the second on a batch that leaves a rank empty."""
    # BatchNorm rests in these runs, so a micro-batch of one sample, or none, is fine.
    with mock.patch.object(build, "_refuse_tiny_batches"):
        work = support.make_work(
            f"weighting={strategy}",
            f"precision={precision}",
            f"accumulate={accumulate}",
            *OPTIMIZER,
            *BATCH,
        )
    support.punch_holes(work.data, share=0.6)
    support.rest_batchnorm(work)
    start = work.data.steps_per_epoch - STEPS
    batches = work.data.train_batches(
        stage=0,
        epoch=0,
        start=start,
        accumulate=accumulate,
        rank=dist.rank(),
        world=dist.world(),
    )
    for number, micro in enumerate(batches):
        train_step(work, micro, start + number, 0)
    state = [v.double().flatten().nan_to_num() for v in work.weighting.state_dict().values()]
    return torch.cat([support.weights(work), *state])


def cases() -> list[tuple[str, str, int]]:
    """Strategy, precision, micro-batches."""
    from tests.parity.test_accumulation import EXTRAS

    names = sorted(set(support.strategies()) - EXTRAS)
    return [
        *((name, "fp64", 1) for name in names),
        *((name, "fp64", 2) for name in names),
        *((name, "fp32", 1) for name in names),
    ]


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.setup(torch.device("cpu"))
    found = {case: trained(*case) for case in cases()}
    if dist.rank() == 0:
        torch.save({" ".join(map(str, k)): v for k, v in found.items()}, Path(sys.argv[1]))
    dist.shutdown()
