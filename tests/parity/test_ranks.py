"""Two ranks with half the batch each equal one rank with the whole, for every strategy."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parity import rank_worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("ranks") / "weights.pt"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *("-m", "tests.parity.rank_worker", str(out)),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)


@functools.cache
def on_one_rank(strategy: str, precision: str) -> torch.Tensor:
    return rank_worker.trained(strategy, precision)


@pytest.mark.ddp
@pytest.mark.slow
@pytest.mark.parametrize("case", rank_worker.cases(), ids=str)
def test_two_ranks_equal_one(case, on_two_ranks):
    strategy, precision, accumulate = case
    one = on_one_rank(strategy, precision)
    two = on_two_ranks[f"{strategy} {precision} {accumulate}"]
    bound = 1e-12 if precision == "fp64" else 1e-5
    assert torch.isfinite(one).all()
    assert (one - two).norm() <= bound * one.norm()
