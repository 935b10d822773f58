"""Faults that were found by using the tool, each with the test that showed it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mtl_cli.cli import main
from mtl_cli.run import RunDir
from tests import support

SMALL = (*support.SMALL, "display=plain", "log_every_steps=2")


def train(*overrides):
    return main(["train", *SMALL, *overrides])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made")
    assert train("epochs=2", f"output_dir={place}", "run_name=it") == 0
    return place / "synthetic" / "it"


@pytest.fixture
def run(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_a_name_in_use_is_not_overwritten(capsys):
    """Today the old run's step files stay, push the new ones out, and resume= loads them."""
    assert train("epochs=3", "run_name=it") == 0
    run = Path("outputs/synthetic/it")
    before = (run / "metrics.jsonl").read_bytes()
    assert train("epochs=1", "seed=5", "run_name=it") in {2, 8}
    assert "resume=" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["..", "a/../../../b", "/tmp/mtl-escaped"])
def test_a_name_that_is_a_path(name):
    assert train("epochs=1", f"run_name={name}") == 2


def test_resume_uses_last_where_step_files_are_gone(run):
    for path in run.glob("checkpoints/step_*.pt"):
        path.unlink()
    before = (run / "metrics.jsonl").read_text()
    assert main(["train", f"resume={run}", "epochs=3"]) in {0, 6}
    assert (run / "metrics.jsonl").read_text().startswith(before)


def test_resume_without_any_checkpoint_is_refused(run):
    shutil.rmtree(run / "checkpoints")
    before = (run / "metrics.jsonl").read_text()
    assert main(["train", f"resume={run}", "epochs=3"]) == 6
    assert (run / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["siz", "size/acuracy", "size/rmse", "size/"])
def test_best_by_is_checked_before_training(name, capsys):
    assert train("epochs=1", f"best_by={name}") == 2
    assert "best_by" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [("data.limit=1",), ("data.fraction=0.01",), ("data.batch_size=15", "data.drop_last=false")],
)
def test_a_batch_of_one_under_batchnorm_is_refused(options, capsys):
    assert train("epochs=1", *options) in {2, 3}
    assert "BatchNorm" in capsys.readouterr().err


def test_a_negative_rate_is_refused():
    assert train("epochs=1", "lr_mult.backbone=-1") == 2


def test_resume_with_another_backbone_when_one_of_its_keys_was_typed(run, capsys):
    assert main(["train", f"resume={run}", "backbone=resnet18"]) == 6
    assert "init_from=" in capsys.readouterr().err


def test_predictions_into_a_folder_that_is_not_there(run, capsys):
    from PIL import Image

    Image.new("RGB", (20, 20)).save("a.png")
    assert main(["predict", str(run), "a.png", "--out", "none/p.csv"]) in {0, 2, 8}


def test_a_full_disk_for_the_log_only(monkeypatch, capsys):
    """Warn once, go on."""
    original = RunDir.start_logs

    def full(self, log_bytes):
        original(self, log_bytes)
        self._metrics = open("/dev/full", "a")  # noqa: SIM115 - ENOSPC at every flush

    monkeypatch.setattr(RunDir, "start_logs", full)
    assert train("epochs=1") == 0
    assert capsys.readouterr().err.count("cannot write the log") == 1
