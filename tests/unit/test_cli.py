"""What the user types and what comes back: messages, exit codes, argv repair."""

from __future__ import annotations

import sys
import types

import pytest
from omegaconf import OmegaConf

from mtl_cli.cli import MODULES, main
from mtl_cli.commands.completion import candidates
from mtl_cli.compose import Composer
from mtl_cli.errors import ResourceError
from mtl_cli.overrides import expand, parse, repair
from mtl_cli.usage import COMMANDS


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """Jobs that were started: a stand-in for the part that trains."""
    monkeypatch.chdir(tmp_path)
    started = []

    def run_job(cfg, run_dir, overrides, *, dry_run=False, debug=False):
        started.append(types.SimpleNamespace(**locals()))
        return 0

    module = types.ModuleType("mtl_cli.job")
    module.run_job = run_job
    monkeypatch.setitem(sys.modules, "mtl_cli.job", module)
    return started


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("train task=synthetc", "no 'synthetc' in group 'task'; did you mean synthetic? choices:"),
        ("train weightin=uncertainty", "unknown key 'weightin'; did you mean 'weighting'?"),
        (
            "train weighting=dwa weighting.temperatur=2",
            "unknown key 'weighting.temperatur'; did you mean 'weighting.temperature'?",
        ),
        (
            "train weighting=dwa +weighting.temperatur=2",
            "unknown key 'weighting.temperatur'; did you mean 'temperature'?",
        ),
        ("train weighting=equal,dwa", "did you mean: mtl train -m weighting=equal,dwa"),
        ("train data.split_seed=/a(b)", "type 'data.split_seed=\"/a(b)\"'"),
        ("train heads.age.hidden=3", "task 'synthetic' has no 'age' (has shape, colour, size)"),
        ("train heads.age=mlp", "task 'synthetic' has no 'age' (has shape, colour, size)"),
        ("train lr=1e-3", "did you mean optimizer.lr=1e-3?"),
        ("train weighting=null", "no 'null' in group 'weighting'; choices: "),
        ("train batch_size=8", "unknown key 'batch_size'; did you mean 'data.batch_size'?"),
        ("train uncertainty", "(expected key=value); did you mean weighting=uncertainty?"),
        ("train optimizer.foo=1", "unknown key 'optimizer.foo' (optimizer has lr, weight_decay"),
        ("train --dryrun", "unknown option '--dryrun'; did you mean '--dry-run'?"),
        ("train --config-dir /nowhere/at/all", "no such directory (found /nowhere/at/all)"),
        ("train task=./nowhere.yaml", "no such file"),
        ("trian", "unknown command 'trian'; did you mean 'train'?"),
        ("task=synthetic epochs=2", "did you mean: mtl train task=synthetic epochs=2"),
        ("conf shwo", "no 'shwo'; did you mean 'show'?"),
        ("conf ls weigting", "no group 'weigting'; did you mean 'weighting'?"),
        ("completion tcsh", "no completion for 'tcsh'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(argv, line, jobs, capsys):
    assert main(argv.split()) == 2
    error = capsys.readouterr().err
    assert line in error
    assert len(error.splitlines()) == 1
    assert error.startswith("mtl: error: ")
    assert jobs == []


def test_refused_for_safety_is_exit_9(jobs, capsys):
    assert main(["train", "++augment._target_=os.system"]) == 9
    assert "os.system" in capsys.readouterr().err
    assert jobs == []


def test_debug_shows_the_traceback(capsys):
    assert main(["conf", "ls", "nope", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_other_failures_have_their_codes(monkeypatch, capsys):
    module = types.ModuleType("broken")
    module.main = lambda argv: 1 / 0
    monkeypatch.setitem(sys.modules, "broken", module)
    monkeypatch.setitem(MODULES, "broken", "broken:main")
    assert main(["broken"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err

    def exhausted(argv):
        raise MemoryError

    module.main = exhausted
    assert main(["broken"]) == ResourceError.exit_code == 5


def test_train_hands_over_one_checked_config(jobs):
    assert main(["train", "epochs=3", "losses.size=smooth_l1", "losses.size.beta=0.5"]) == 0
    (job,) = jobs
    assert job.cfg.epochs == 3
    assert job.cfg.losses.size == {"_target_": "mtl_cli.losses.SmoothL1", "beta": 0.5}
    assert job.run_dir is None
    assert job.overrides == ["epochs=3", "loss@losses.size=smooth_l1", "losses.size.beta=0.5"]
    assert (job.dry_run, job.debug) == (False, False)


def test_no_experiment_may_be_said(jobs):
    assert main(["train", "experiment=null"]) == 0


def test_exit_code_is_the_jobs(jobs, monkeypatch):
    monkeypatch.setattr(sys.modules["mtl_cli.job"], "run_job", lambda *a, **k: 75)
    assert main(["train"]) == 75


def test_flags_may_stand_anywhere(jobs):
    assert main(["train", "seed=1", "--dry-run", "epochs=2", "--debug"]) == 0
    assert jobs[0].dry_run
    assert jobs[0].debug
    assert jobs[0].cfg.epochs == 2


@pytest.mark.parametrize(
    ("typed", "repaired"),
    [
        ("losses.age=smooth_l1", "loss@losses.age=smooth_l1"),
        ("heads.age=mlp,linear", "head@heads.age=mlp,linear"),
        ("heads.age.hidden=3", "heads.age.hidden=3"),
        ("heads.age={_target_: a.B}", "heads.age={_target_: a.B}"),
        ("+experiment=x", "experiment=x"),
        ("run_name=007", "run_name='007'"),
        ("run_name=first", "run_name=first"),
        ("output_dir=1e3", "output_dir='1e3'"),
        ("epochs=007", "epochs=007"),
        ("task=synthetic,utkface", "task=synthetic,utkface"),
    ],
)
def test_repair(typed, repaired):
    assert repair(typed) == repaired


def test_task_files_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert repair("task=./a.yaml,b.yml") == f"task={tmp_path}/a.yaml,{tmp_path}/b.yml"
    assert repair("task='my file.yaml'") == f'task="{tmp_path}/my file.yaml"'
    stage = "schedule.stages.pretrain.task"
    assert repair(f"{stage}=a.yaml") == f"{stage}={tmp_path}/a.yaml"


def test_expand_follows_hydras_grammar():
    composer = Composer()
    found = expand(
        composer, ["epochs=2", "seed=range(1,3)", "weighting=choice(equal,dwa)", "seed=5,6"]
    )
    assert found == [
        ["epochs=2", "weighting=equal", "seed=5"],
        ["epochs=2", "weighting=equal", "seed=6"],
        ["epochs=2", "weighting=dwa", "seed=5"],
        ["epochs=2", "weighting=dwa", "seed=6"],
    ]
    assert expand(composer, ["lr=glob(c*)"]) == [["lr=constant"], ["lr=cosine"]]
    assert expand(composer, ["freeze=[a,b],[]"]) == [["freeze=[a,b]"], ["freeze=[]"]]
    assert expand(composer, ["losses.a='x,y'"]) == [["losses.a='x,y'"]]


def test_parse_splits_flags():
    command = parse(["a=1", "-m", "b=2,3", "--list", "--config-dir", "x", "--config-dir", "y"])
    assert command.overrides == ["a=1", "b=2,3"]
    assert command.multirun
    assert command.list_jobs
    assert command.config_dirs == ["x", "y"]


def test_cfg_job_prints_what_would_run(jobs, capsys):
    assert main(["train", "--cfg", "job", "only=size"]) == 0
    cfg = OmegaConf.create(capsys.readouterr().out)
    assert list(cfg.heads) == ["size"]
    assert main(["train", "--cfg", "job", "-p", "lr"]) == 0
    assert capsys.readouterr().out.startswith("_target_: mtl_cli.lr.Cosine")
    assert jobs == []


def test_hydras_info_still_works(jobs, capsys):
    assert main(["train", "losses.size=l1", "--info", "defaults"]) == 0
    assert "loss/l1" in capsys.readouterr().out
    assert main(["train", "--cfg", "hydra"]) == 0
    assert "sweeper:" in capsys.readouterr().out
    assert jobs == []


def test_help_lists_groups_and_every_command_is_listed(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "export" not in text, "not there yet, so not promised"
    assert {name for name in MODULES if not name.startswith("_")} == set(COMMANDS)
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "uncertainty" in text
    assert "epochs=10" in text


def test_conf_ls_show_copy_check(jobs, capsys, tmp_path):
    assert main(["conf", "ls", "lr"]) == 0
    assert "cosine" in capsys.readouterr().out
    assert main(["conf", "show", "lr/cosine"]) == 0
    assert "mtl_cli.lr.Cosine" in capsys.readouterr().out
    assert main(["conf", "show", "epochs=4"]) == 0
    assert OmegaConf.create(capsys.readouterr().out).epochs == 4
    assert main(["conf", "copy", "lr/cosine", "lr/mine.yaml"]) == 0
    assert (tmp_path / "lr" / "mine.yaml").is_file()
    assert main(["conf", "copy", "lr/cosine", "lr/mine.yaml"]) == 2
    assert main(["train", "lr=mine", "--config-dir", str(tmp_path)]) == 0
    assert main(["conf", "check", "seed=1,2"]) == 0
    capsys.readouterr()
    assert main(["conf", "check", "epochs=0"]) == 2
    assert "epochs: out of range" in capsys.readouterr().err


def test_conf_check_reads_a_saved_config(jobs, capsys, tmp_path):
    main(["conf", "show"])
    (tmp_path / "config.yaml").write_text(
        capsys.readouterr().out.replace("epochs: 10", "epohcs: 1")
    )
    assert main(["conf", "check", str(tmp_path / "config.yaml")]) == 2
    assert "unknown key 'epohcs'; did you mean 'epochs'?" in capsys.readouterr().err


def test_version_and_doctor(capsys):
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("mtl ")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for subject in ("torchvision", "gpu", "precision", "config", "disk", "workers"):
        assert subject in text


def test_completion():
    assert candidates("mtl tr") == ["train"]
    assert candidates("mtl train lr=co") == ["lr=constant", "lr=cosine"]
    assert candidates("mtl train weighting=equal,unc") == ["weighting=equal,uncertainty"]
    assert "optimizer.lr=" in candidates("mtl train optimizer.l")
    assert "losses.size=smooth_l1" in candidates("mtl train losses.size=s")


def test_a_launcher_plugin_gets_checked_jobs(jobs, tmp_path):
    argv = ["train", "-m", "hydra/launcher=basic", "seed=1,2", "losses.size=mse"]
    assert main(argv) == 0
    assert [job.cfg.seed for job in jobs] == [1, 2]
    assert all(job.cfg.losses.size._target_.endswith("MSE") for job in jobs)
    assert len({job.run_dir for job in jobs}) == 2
    jobs.clear()
    assert main(["train", "-m", "hydra/launcher=basic", "seed=1,x"]) == 2
    assert jobs == []
