"""Sweeps: all checked first, none stopped by another, continued without redoing."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import types

import pytest
import torch
from omegaconf import OmegaConf

from mtl_cli import sweep
from mtl_cli.cli import main
from mtl_cli.config import to_text
from mtl_cli.errors import DataError


class Job:
    """A stand-in for training: writes what a run directory holds and ends as told."""

    def __init__(self):
        self.started = []
        self.ends = {}

    def __call__(self, cfg, run_dir, overrides, *, dry_run=False, debug=False):
        self.started.append((run_dir.name if run_dir else None, cfg.resume, cfg.seed))
        if dry_run:
            return 0
        end = self.ends.pop(cfg.seed, 0)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_text(cfg))
        (run_dir / "overrides.txt").write_text("\n".join(overrides) + "\n")
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        (run_dir / "checkpoints" / "last.pt").write_bytes(b"x")
        torch.manual_seed(cfg.seed + 100)
        torch.use_deterministic_algorithms(True)
        if callable(end):
            end()
        state = {0: "finished", 75: "interrupted"}.get(end, "failed")
        status = {"state": state, "exit_code": end, "reason": None if end == 0 else "it broke"}
        (run_dir / "status.json").write_text(json.dumps(status))
        if end == 0:
            summary = {"best": {"score": cfg.seed / 10, "metrics": {}}}
            (run_dir / "summary.json").write_text(json.dumps(summary))
        return end


@pytest.fixture
def job(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = Job()
    module = types.ModuleType("mtl_cli.job")
    module.run_job = found
    monkeypatch.setitem(sys.modules, "mtl_cli.job", module)
    return found


@pytest.fixture
def root(tmp_path):
    """The only sweep's directory."""
    return lambda: next(tmp_path.glob("multirun/*/*"))


def test_every_job_runs_in_its_own_directory(job, root, capsys):
    assert main(["train", "-m", "weighting=equal,dwa", "seed=1,2"]) == 0
    names = [name for name, *_ in job.started]
    assert names == [
        "weighting-equal_seed-1",
        "weighting-equal_seed-2",
        "weighting-dwa_seed-1",
        "weighting-dwa_seed-2",
    ]
    spec = OmegaConf.load(root() / "multirun.yaml")
    assert spec.grid == {"weighting": ["equal", "dwa"], "seed": ["1", "2"]}
    assert list(spec.jobs) == names
    out = capsys.readouterr().out
    assert all(name in out for name in names)
    assert str(root()) in out


def test_all_jobs_are_checked_before_the_first(job, capsys, tmp_path):
    assert main(["train", "-m", "optimizer.lr=0.1,-1,fast", "losses.size=l1,bce"]) == 2
    error = capsys.readouterr().err
    assert "found -1" in error
    assert "'fast'" in error
    assert "BCE does not fit" in error
    assert len(error.splitlines()) == 3
    assert job.started == []
    assert not (tmp_path / "multirun").exists()


def test_a_failed_job_stops_no_other(job, root, capsys):
    def crash():
        raise ValueError("a bug in one job")

    def bad_data():
        raise DataError("labels.csv:3: no")

    job.ends = {1: 3, 2: crash, 3: bad_data}
    assert main(["train", "-m", "seed=1,2,3,4"]) == 7
    assert [seed for *_, seed in job.started] == [1, 2, 3, 4]
    text = capsys.readouterr()
    for reason in ("it broke", "a bug in one job", "labels.csv:3: no"):
        assert reason in text.out
    assert "Traceback" in (root() / "seed-2" / "error.txt").read_text()


def test_system_exit_is_a_failure_not_an_end(job):
    job.ends = {1: lambda: sys.exit(1)}
    assert main(["train", "-m", "seed=1,2"]) == 7
    assert len(job.started) == 2


def test_a_signal_stops_the_sweep_and_it_continues(job, root, capsys):
    job.ends = {2: 75}
    assert main(["train", "-m", "seed=1,2,3"]) == 75
    place = root()
    assert f"mtl train resume={shlex.quote(str(place))}" in capsys.readouterr().err
    assert len(job.started) == 2
    job.started.clear()
    assert main(["train", f"resume={place}"]) == 0
    assert job.started == [
        ("seed-2", str(place / "seed-2"), 2),
        ("seed-3", None, 3),
    ]
    job.started.clear()
    assert main(["train", f"resume={place}"]) == 0
    assert job.started == [], "finished jobs are not done again"


def test_a_signal_between_two_jobs_ends_in_a_table(job, root, monkeypatch, capsys):
    run_job = sweep._run_job

    def signalled(command, point, title):
        run_job(command, point, title)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sweep, "_run_job", signalled)
    assert main(["train", "-m", "seed=1,2"]) == 75
    text = capsys.readouterr()
    assert "seed-1  finished" in text.out
    assert f"mtl train resume={root()}" in text.err
    assert len(job.started) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failed_job_is_done_again_from_the_start(job, root):
    job.ends = {1: 5}
    assert main(["train", "-m", "seed=1,2"]) == 7
    (root() / "seed-1" / "error.txt").write_text("first time")
    job.started.clear()
    assert main(["train", f"resume={root()}"]) == 0
    assert job.started == [("seed-1", None, 1)]
    assert (root() / "seed-1" / "error.1.txt").read_text() == "first time"


def test_a_larger_grid_in_the_same_directory(job, root):
    main(["train", "-m", "seed=1,2"])
    job.started.clear()
    assert main(["train", "-m", f"resume={root()}", "seed=1,2,3"]) == 0
    assert job.started == [("seed-3", None, 3)]


def test_a_new_axis_does_not_repeat_what_is_done(job, root):
    """The jobs get longer names, but a job that is there keeps its directory."""
    main(["train", "-m", "optimizer.lr=0.001,0.01"])
    job.started.clear()
    assert main(["train", f"resume={root()}", "seed=0,1"]) == 0
    assert job.started == [("lr-0.001_seed-1", None, 1), ("lr-0.01_seed-1", None, 1)]
    spec = OmegaConf.load(root() / "multirun.yaml")
    assert set(spec.jobs) == {"lr-0.001", "lr-0.01", "lr-0.001_seed-1", "lr-0.01_seed-1"}
    assert spec.jobs["lr-0.001"] == ["optimizer.lr=0.001", "seed=0"]


def test_a_new_axis_and_more_epochs_continue_what_is_done(job, root):
    main(["train", "-m", "optimizer.lr=0.001"])
    (first,) = (name for name, *_ in job.started)
    job.started.clear()
    assert main(["train", f"resume={root()}", "epochs=20", "seed=0,1"]) == 0
    assert job.started == [(first, str(root() / first), 0), ("seed-1", None, 1)]
    job.started.clear()
    assert main(["train", f"resume={root()}", "epochs=20,30"]) == 0
    assert len({name for name, *_ in job.started}) == len(job.started) == 2, "none twice"
    assert all(resumed is None for _, resumed, _ in job.started), "20 epochs are done"


def test_a_damaged_config_costs_its_own_job_only(job, root, capsys):
    main(["train", "-m", "seed=1,2"])
    (root() / "seed-1" / "config.yaml").write_text("a: [")
    job.started.clear()
    assert main(["train", f"resume={root()}"]) == 7
    assert "seed-1/config.yaml:1:" in capsys.readouterr().out
    assert job.started == []


def test_a_job_whose_state_does_not_fit_is_reported_and_kept(job, root, capsys):
    main(["train", "-m", "seed=1,2"])
    assert main(["train", f"resume={root()}", "backbone.width=8"]) == 7
    assert "init_from=" in capsys.readouterr().out
    assert (root() / "seed-1" / "checkpoints" / "last.pt").is_file()


def test_resume_auto_finds_the_sweep_of_the_same_line(job, root, tmp_path):
    job.ends = {2: 75}
    line = ["train", "-m", "seed=1,2", "resume=auto"]
    assert main(line) == 75
    assert main(line) == 0
    assert len(list(tmp_path.glob("multirun/*/*"))) == 1
    assert job.started[-1][0] == "seed-2"


def test_resume_auto_looks_below_output_dir(job, tmp_path):
    job.ends = {2: 75}
    line = ["train", "-m", "seed=1,2", "output_dir=elsewhere", "resume=auto"]
    assert main(line) == 75
    assert main(line) == 0
    assert [path.parent.name for path in tmp_path.glob("elsewhere/*/*/")] == ["synthetic"]
    assert job.started[-1] == ("seed-2", job.started[-1][1], 2)
    assert job.started[-1][1] is not None


def test_jobs_do_not_inherit_state(job):
    before = torch.initial_seed()
    main(["train", "-m", "seed=1,2"])
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.initial_seed() == before


def test_list_prints_lines_that_can_be_typed(job, capsys, tmp_path):
    assert main(["train", "-m", "weighting=equal,dwa", "losses.size=l1,mse", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(set(lines)) == 4
    assert job.started == []
    assert not (tmp_path / "multirun").exists()
    runs = set()
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["mtl", "train"]
        assert words[-1] == "resume=auto"
        assert main(words[1:]) == 0
        runs.add(job.started[-1][0])
        assert main(words[1:]) == 0
        assert job.started[-1][1] is not None, "the same line continues its run"
    assert len(runs) == 4


def test_list_of_a_sweep_continues_its_jobs(job, root, capsys):
    job.ends = {2: 75}
    assert main(["train", "-m", "seed=1,2,3"]) == 75
    place = root()
    job.started.clear()
    capsys.readouterr()
    assert main(["train", f"resume={place}", "seed=1,2,3,4", "epochs=20", "--list"]) == 0
    text = capsys.readouterr()
    assert job.started == []
    assert text.out.splitlines() == [
        f"mtl train resume={place}/seed-{seed} epochs=20" for seed in (1, 2, 3, 4)
    ]
    assert main(["train", f"resume={place}", "epochs=10", "--list"]) == 0
    text = capsys.readouterr()
    assert [line.rpartition("/")[2] for line in text.out.splitlines()] == [
        f"seed-{seed} epochs=10" for seed in (2, 3, 4)
    ]
    assert "1 of 4 jobs finished earlier" in text.err
    for line in text.out.splitlines():
        assert main(shlex.split(line)[1:]) == 0
    assert job.started == [
        ("seed-2", str(place / "seed-2"), 2), ("seed-3", None, 3), ("seed-4", None, 4),
    ]  # fmt: skip
    assert main(["train", f"resume={place}/seed-5"]) == 6


def test_dry_run_of_a_sweep_checks_all_and_shows_the_first(job, tmp_path):
    assert main(["train", "-m", "seed=1,2", "--dry-run"]) == 0
    assert job.started == [(None, None, 1)]
    assert not (tmp_path / "multirun").exists()


def test_ranks_do_not_sweep(job, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "-m", "seed=1,2"]) == 2
    assert "without torchrun" in capsys.readouterr().err


def test_keys_stay_apart_and_short(job):
    values = "x" * 130
    assert main(["train", "-m", "heads.size.hidden=1,2", "head@heads.size=mlp",
                 f"run_name={values}a,{values}b"]) == 0  # fmt: skip
    names = [name for name, *_ in job.started]
    assert len(set(names)) == len(names) == 4
    assert max(map(len, names)) <= 110
