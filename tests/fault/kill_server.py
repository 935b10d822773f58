"""Runs a job in a forked child and kills it (-9) at random moments; prints what happened.

The parent imports everything once and never computes, so forking it is safe and a start is quick.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import mtl_cli.job
from mtl_cli.checkpoint import Checkpoints
from tests import support

OPTIONS = (
    *support.SMALL,
    *("epochs=6", "save_every_steps=1", "log_every_steps=3", "display=plain"),
    *("weighting=gradnorm", "ema.decay=0.9", "heads.size.dropout=0.1"),
)


def start(run_dir: Path, resume: bool, workers: int) -> int:
    """Fork a child that trains; its exit code is that of the job."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    import torch

    torch.set_num_threads(1)
    cfg = support.compose(*OPTIONS, f"data.workers={workers}")
    if resume:
        cfg.resume = str(run_dir)
    os._exit(mtl_cli.job.run_job(cfg, run_dir, list(OPTIONS)))


def newest(run_dir: Path) -> int:
    """Step of the newest checkpoint file, 0 if there is none."""
    files = Checkpoints(run_dir / "checkpoints").steps()
    return int(files[0].stem.split("_")[1]) if files else 0


def main(run_dir: Path, kills: int) -> None:
    """Kill ``kills`` times, each after new progress, then let the run finish."""
    rng = random.Random(1)
    starts, torn = [], 0
    for number in range(kills + 1):
        begun = newest(run_dir)
        starts.append(begun)
        pid = start(run_dir, resume=begun > 0, workers=rng.choice((0, 0, 2)))
        if number == kills:
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            break
        while newest(run_dir) <= begun:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        torn += bool(list((run_dir / "checkpoints").glob(".*.tmp.*")))
    print(json.dumps({"starts": starts, "torn": torn, "code": code}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
