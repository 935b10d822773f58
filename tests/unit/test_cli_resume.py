"""resume= and init_from=: what is composed again, what may change, what is refused."""

from __future__ import annotations

import json
import sys
import types

import pytest
from omegaconf import OmegaConf

from mtl_cli.cli import main
from mtl_cli.config import to_text
from mtl_cli.resume import difference, judge, merge, split


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    started = []

    def run_job(cfg, run_dir, overrides, *, dry_run=False, debug=False):
        started.append(types.SimpleNamespace(**locals()))
        place = run_dir or tmp_path / "outputs" / cfg.task.name / (cfg.run_name or "first")
        (place / "checkpoints").mkdir(parents=True, exist_ok=True)
        (place / "checkpoints" / "last.pt").write_bytes(b"x")
        (place / "config.yaml").write_text(to_text(cfg))
        (place / "overrides.txt").write_text("".join(f"{o}\n" for o in overrides))
        (place / "status.json").write_text(json.dumps({"state": "interrupted"}))
        return 75

    module = types.ModuleType("mtl_cli.job")
    module.run_job = run_job
    monkeypatch.setitem(sys.modules, "mtl_cli.job", module)
    return started


@pytest.fixture
def run(jobs, tmp_path):
    """A run that was interrupted."""
    main(["train", "task=type_color", "weighting=dwa", "losses.color=cross_entropy", "epochs=3"])
    jobs.clear()
    return tmp_path / "outputs" / "type_color" / "first"


def test_saved_overrides_come_back(run, jobs, capsys):
    assert main(["train", f"resume={run}"]) == 75
    (job,) = jobs
    assert job.run_dir == run
    assert job.cfg.resume == str(run)
    assert job.cfg.task.name == "type_color"
    assert job.cfg.weighting._target_.endswith("DWA")
    assert job.overrides == [
        "task=type_color",
        "weighting=dwa",
        "loss@losses.color=cross_entropy",
        "epochs=3",
    ]
    assert "warning" not in capsys.readouterr().err


def test_a_key_of_the_runs_own_task_may_be_typed(run, jobs, capsys):
    assert main(["train", f"resume={run}", "weighting.temperature=2.0"]) in {6, 75}
    assert "unknown key" not in capsys.readouterr().err


def test_free_changes_are_printed(run, jobs, capsys):
    assert main(["train", f"resume={run}", "epochs=40", "data.workers=3", "display=plain"]) == 75
    error = capsys.readouterr().err
    assert "epochs 3 -> 40" in error
    assert "warning" not in error
    assert jobs[0].cfg.epochs == 40
    assert jobs[0].overrides[-3:] == ["epochs=40", "data.workers=3", "display=plain"]
    assert jobs[0].overrides.count("epochs=3") == 0


def test_learning_rate_warns(run, jobs, capsys):
    assert main(["train", f"resume={run}", "optimizer.lr=1e-4", "data.batch_size=8"]) == 75
    error = capsys.readouterr().err
    assert "warning: optimizer.lr 0.001 -> 0.0001" in error
    assert "warning: data.batch_size" in error


@pytest.mark.parametrize(
    "change",
    [
        "backbone=resnet18",
        "backbone.width=8",
        "heads.color=mlp",
        "weighting=equal",
        "data.split_seed=1",
        "task=synthetic",
        "only=color",
        "optimizer=sgd",
        "schedule=transfer",
    ],
)
def test_what_the_state_does_not_fit_is_refused(run, jobs, capsys, change):
    assert main(["train", f"resume={run}", change]) == 6
    assert f"init_from={run}" in capsys.readouterr().err
    assert jobs == []


def test_when_the_tree_has_changed_the_file_decides(run, jobs, capsys):
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.data.difficulty = 0.123
    OmegaConf.save(cfg, run / "config.yaml")
    assert main(["train", f"resume={run}", "epochs=5", "lr_mult.backbone=0.5"]) == 75
    assert jobs[0].cfg.data.difficulty == 0.123
    assert jobs[0].cfg.epochs == 5
    assert jobs[0].cfg.lr_mult == {"backbone": 0.5}
    assert "the file decides" in capsys.readouterr().err
    assert main(["train", f"resume={run}", "backbone=resnet18"]) == 6
    assert main(["train", f"resume={run}", "epochs=0"]) == 2


def test_saved_configs_pass_the_same_gate(run, jobs):
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.augment = {"_target_": "os.system", "command": "touch pwned"}
    OmegaConf.save(cfg, run / "config.yaml")
    assert main(["train", f"resume={run}"]) == 9
    assert jobs == []


def test_a_checkpoint_inside_a_run(run, jobs, capsys):
    assert main(["train", f"resume={run}/checkpoints/last.pt"]) == 75
    assert jobs[0].run_dir == run
    (run / "checkpoints" / "step_10.pt").write_bytes(b"x")
    assert main(["train", f"resume={run}/checkpoints/step_10.pt"]) == 6
    assert "init_from=" in capsys.readouterr().err


def test_no_run_there(jobs, capsys, tmp_path):
    assert main(["train", "resume=nowhere"]) == 6
    assert "nothing there" in capsys.readouterr().err
    assert main(["train", f"resume={tmp_path}"]) == 6
    assert main(["train", "-m", "seed=1,2", f"resume={tmp_path}"]) == 6


def test_resume_and_init_from_do_not_mix(run, jobs, capsys):
    assert main(["train", f"resume={run}", f"init_from={run}"]) == 2
    assert "only one of them" in capsys.readouterr().err


def test_auto_starts_then_continues(jobs, tmp_path):
    line = ["train", "seed=4", "epochs=2", "resume=auto"]
    assert main(line) == 75
    assert main(["train", "epochs=2", "resume=auto", "seed=4"]) == 75
    first, second = jobs
    assert first.cfg.resume is None
    assert first.run_dir.parent == tmp_path / "outputs" / "synthetic"
    assert second.cfg.resume == str(first.run_dir) == str(second.run_dir), "order does not matter"
    assert main(["train", "epochs=2", "resume=auto", "seed=5"]) == 75
    assert jobs[2].cfg.resume is None, "other overrides, another run"


def test_auto_with_a_name(jobs, tmp_path):
    assert main(["train", "run_name=nightly", "resume=auto"]) == 75
    assert jobs[0].run_dir == tmp_path / "outputs" / "synthetic" / "nightly"
    assert main(["train", "run_name=nightly", "resume=auto", "epochs=20"]) == 75
    assert jobs[1].cfg.resume == str(jobs[0].run_dir)
    assert main(["train", "run_name=nightly", "resume=auto", "backbone.width=8"]) == 6


def test_auto_without_a_checkpoint_starts_afresh(jobs):
    assert main(["train", "run_name=x", "resume=auto"]) == 75
    (jobs[0].run_dir / "checkpoints" / "last.pt").unlink()
    assert main(["train", "run_name=x", "resume=auto"]) == 75
    assert jobs[1].cfg.resume is None
    assert jobs[1].run_dir == jobs[0].run_dir


def test_merge_and_split():
    assert merge(["a=1", "b=2"], ["b=3", "+c=4", "b=5"]) == ["a=1", "b=5", "+c=4"]
    assert split(["a=1", "resume='x y'"]) == ("x y", ["a=1"])
    assert split(["resume=null"]) == (None, [])


def test_difference_ignores_what_is_redacted(tmp_path):
    old = {"a": {"token": "REDACTED"}, "b": 1, "c": [1, 2]}
    new = {"a": {"token": "x"}, "b": 2, "c": [1, 2]}
    assert difference(old, new) == [("b", 1, 2)]
    assert judge([("epochs", 1, 2)], tmp_path) == ["resume: epochs 1 -> 2"]
