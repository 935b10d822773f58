"""A run that is stopped and resumed equals the uninterrupted one to the bit."""

from __future__ import annotations

import os
import signal

import pytest

from mtl_cli import checkpoint, train
from mtl_cli.job import run_job
from tests import support
from tests.parity.test_accumulation import EXTRAS

BASE = (*support.SMALL, "epochs=2", "log_every_steps=2", "display=plain")
STEPS = 8  # 76 training images, batch 16, two epochs
SCHEDULES = (
    "joint",
    "freeze",
    "finetune",
    "alternate",
    "alternate schedule.mode=simultaneous",
    "alternate schedule.mode=same_batch",
    "alternate schedule.mode=epochs",
    "transfer",
    "pretrain schedule.stages.pretrain.task=type_color",
)


def result(run_dir):
    """Everything that must be equal: weights, moments, strategy, counters and the log."""
    state = checkpoint.load(run_dir / "checkpoints" / "last.pt")
    kept = {k: state[k] for k in ("model", "ema", "optimizers", "weighting", "scale", "meter")}
    progress = {k: v for k, v in state["progress"].items() if k != "log_bytes"}
    return support.digest(kept), progress, (run_dir / "metrics.jsonl").read_text()


def full_run(run_dir, overrides):
    assert run_job(support.compose(*BASE, *overrides), run_dir, list(overrides)) == 0
    return result(run_dir)


def interrupted_run(run_dir, overrides, stops, monkeypatch, more=()):
    """Stop by SIGTERM after each of the given steps (counted over the whole run) and go on."""
    taken = 0
    original = train.train_step

    def counted(*args, **options):
        nonlocal taken
        reports = original(*args, **options)
        taken += 1
        if taken in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return reports

    monkeypatch.setattr(train, "train_step", counted)
    codes = [run_job(support.compose(*BASE, *overrides), run_dir, list(overrides))]
    while codes[-1] == 75:
        cfg = support.compose(*BASE, *overrides, *more)
        cfg.resume = str(run_dir)
        codes.append(run_job(cfg, run_dir, list(overrides)))
    monkeypatch.setattr(train, "train_step", original)
    assert codes == [75] * len(stops) + [0]
    return result(run_dir)


STRATEGIES = sorted(set(support.strategies()) - EXTRAS)


@pytest.mark.parametrize("strategy", support.marked_slow(STRATEGIES, support.ONE_OF_EACH))
def test_every_strategy(strategy, tmp_path, monkeypatch):
    overrides = (f"weighting={strategy}", "ema.decay=0.9", "heads.size.dropout=0.2")
    whole = full_run(tmp_path / "a", overrides)
    assert interrupted_run(tmp_path / "b", overrides, {3, 6}, monkeypatch) == whole


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule, tmp_path, monkeypatch):
    overrides = tuple(f"schedule={schedule}".split())
    whole = full_run(tmp_path / "a", overrides)
    assert interrupted_run(tmp_path / "b", overrides, {1, 5}, monkeypatch) == whole


def test_every_step(tmp_path, monkeypatch):
    whole = full_run(tmp_path / "a", ())
    for step in range(1, STEPS):
        assert interrupted_run(tmp_path / str(step), (), {step}, monkeypatch) == whole


def test_many_times_in_a_row(tmp_path, monkeypatch):
    whole = full_run(tmp_path / "a", ())
    assert interrupted_run(tmp_path / "b", (), set(range(1, STEPS)), monkeypatch) == whole


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 0), (1, 3)])
def test_other_number_of_workers(first, then, tmp_path, monkeypatch):
    whole = full_run(tmp_path / "a", ("data.workers=0",))
    overrides = (f"data.workers={first}",)
    found = interrupted_run(
        tmp_path / "b", overrides, {3}, monkeypatch, more=(f"data.workers={then}",)
    )
    assert found == whole


def test_the_comparison_can_fail(tmp_path):
    assert full_run(tmp_path / "a", ("seed=0",))[0] != full_run(tmp_path / "b", ("seed=1",))[0]
