"""kill -9 at random moments; the final weights equal those of the undisturbed run."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtl_cli import checkpoint
from tests import support

ROOT = Path(__file__).parents[2]


def serve(run_dir, kills):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.fault.kill_server", str(run_dir), str(kills)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def content(run_dir):
    state = checkpoint.load(run_dir / "checkpoints" / "last.pt")
    kept = {k: state[k] for k in ("model", "ema", "optimizers", "weighting", "meter")}
    return support.digest(kept), (run_dir / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_killed_run_equals_the_undisturbed_one(tmp_path):
    undisturbed = serve(tmp_path / "a", 0)
    killed = serve(tmp_path / "b", 8)
    assert undisturbed["code"] == killed["code"] == 0
    starts = killed["starts"]
    assert starts[0] == 0
    assert all(later > earlier for earlier, later in itertools.pairwise(starts))
    assert content(tmp_path / "a") == content(tmp_path / "b")
