"""What goes wrong in life: one line, the documented exit code, at once, and nothing lost."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mtl_cli
from mtl_cli import checkpoint, dist, passes, train
from mtl_cli.cli import main
from mtl_cli.errors import CheckpointError, DataError, SafetyError
from mtl_cli.evaluate import unjudged
from mtl_cli.run import RunDir
from mtl_cli.task import Task
from tests import support

SMALL = (*support.SMALL, "display=plain", "log_every_steps=2")
PLAIN = ("data.image_size=16", "data.batch_size=4", "backbone=tiny", "backbone.width=4")
STEPS = 4  # of an epoch: 76 training scenes, batch 16


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def fails(capsys):
    """Runs a command and returns the one line that it prints about its failure."""

    def run(code: int, *argv: str) -> str:
        capsys.readouterr()
        started = time.monotonic()
        assert main(list(argv)) == code
        assert time.monotonic() - started < 20
        _, error = capsys.readouterr()
        assert "Traceback" not in error
        found = [line for line in error.splitlines() if line.startswith("mtl: error: ")]
        assert len(found) == 1, error
        return found[0]

    return run


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run that was stopped in its second epoch."""
    place = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        signal_at(patch, STEPS + 2)
        options = ("epochs=2", f"output_dir={place}", "run_name=it")
        assert main(["train", *SMALL, *options]) == 75
    return place / "synthetic" / "it"


@pytest.fixture
def run(interrupted, tmp_path) -> Path:
    return Path(shutil.copytree(interrupted, tmp_path / "run"))


def signal_at(patch: pytest.MonkeyPatch, step: int) -> None:
    """A SIGTERM in the middle of a step."""
    original, taken = train.train_step, [0]

    def counted(*args, **options):
        taken[0] += 1
        if taken[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **options)

    patch.setattr(train, "train_step", counted)


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def contents(run: Path) -> dict[str, str]:
    """Digest of everything that a failed command must leave alone."""
    kept = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(run)): support.digest(path.read_bytes()) for path in kept}


# --- data ----------------------------------------------------------------------------------------


def faces(folder: Path, count: int = 40) -> Path:
    """Images with the names that UTKFace's have."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
        name = f"{20 + number}_{number % 2}_{number % 5}_2017010915055{number:04}.jpg.chip.jpg"
        Image.fromarray(pixels).save(folder / name, format="JPEG")
    return folder


def table(tmp_path: Path, rows: str) -> None:
    """A task of one's own, with the given cells in its second column."""
    (tmp_path / "photos").mkdir()
    lines = ["photo,kind"]
    for number, cell in enumerate(rows.split()):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
        lines.append(f"{number}.png,{cell}")
    (tmp_path / "labels.csv").write_text("\n".join(lines) + "\n")
    task = {
        "name": "kitchen",
        "data": {"table": "labels.csv", "root": "photos", "image_column": "photo"},
        "outputs": {"kind": {"kind": "multiclass", "classes": ["cup", "pan", "jar"]}},
        "metrics": {"kind": ["accuracy"]},
    }
    (tmp_path / "kitchen.yaml").write_text(yaml.safe_dump(task))


@pytest.mark.parametrize("root", [None, "nowhere", "empty"])
def test_no_data(root, tmp_path, capsys):
    """The message says where it looked, and the lines to type."""
    (tmp_path / "empty").mkdir()
    where = [f"data.root={root}"] if root else []
    assert main(["train", "task=utkface", *where, *PLAIN]) == 3
    error = capsys.readouterr().err
    assert (root or "./data") in error
    assert "  mtl train task=utkface data.root=PATH/UTKFace.tar.gz" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("kind", ["truncated", "text", "zero", "fifo", "link"])
def test_an_image_that_is_none(kind, fails, tmp_path, capsys):
    folder = faces(tmp_path / "faces")
    bad = sorted(folder.iterdir())[5]
    content = bad.read_bytes()
    bad.unlink()
    if kind == "fifo":
        os.mkfifo(bad)
    elif kind == "link":
        bad.symlink_to("gone.jpg")
    else:
        bad.write_bytes(
            {"truncated": content[:300], "text": b"<html>gone</html>", "zero": b""}[kind]
        )
    line = fails(3, "train", "task=utkface", "data.root=faces", *PLAIN, "epochs=1")
    assert bad.name in line
    assert "bad_image=mask" in line
    (run,) = [path for path in Path("outputs/utkface").iterdir() if not path.is_symlink()]
    assert status(run)["exit_code"] == 3
    if kind == "truncated":
        masked = ("data.bad_image=mask", "epochs=1", "display=plain")
        capsys.readouterr()
        assert (
            main(["train", "task=utkface", "data.root=faces", *PLAIN, *masked, "run_name=m"]) == 0
        )
        assert "data: masked as bad: 1 images" in capsys.readouterr().err
        run = Path("outputs/utkface/m")
        assert json.loads((run / "summary.json").read_text())["masked"] == {"images": 1}


def test_a_class_out_of_range(fails, tmp_path, capsys):
    table(tmp_path, "cup pan jar " * 8 + "lid")
    small = ("task=./kitchen.yaml", "data.image_size=16", "data.batch_size=4", "epochs=1")
    line = fails(3, "train", *small)
    assert "labels.csv:26" in line
    assert "'lid'" in line
    assert "cup, pan, jar" in line
    masked = ("data.bad_label=mask", "backbone.width=4", "run_name=m")
    assert main(["train", *small, *masked]) == 0
    assert "data: masked as bad: 1 labels of kind" in capsys.readouterr().err
    run = Path("outputs/kitchen/m")
    assert "masked: labels.csv:26 (24.png): kind: found 'lid'" in (run / "mtl.log").read_text()
    assert json.loads((run / "summary.json").read_text())["masked"] == {"labels of kind": 1}


def test_an_output_without_a_label(fails, tmp_path):
    table(tmp_path, "cup pan jar " * 8)
    text = (tmp_path / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text(
        "\n".join([text[0], *(f"{r.split(',')[0]}," for r in text[1:])])
    )
    line = fails(3, "train", "task=./kitchen.yaml", *PLAIN)
    assert "kind" in line


def test_a_validation_split_without_labels():
    task, other = Task("size", "regression", metrics=("mae",)), Task("age", "regression")
    labelled, none = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    data = SimpleNamespace(splits={"val": torch.arange(4)}, valid={"size": none, "age": labelled})
    assert unjudged((task, other), data, "age/mae") == [
        "validation: no label of size among 4 samples: its metrics stay '-'"
    ]
    with pytest.raises(DataError, match="best_by: size/mae cannot be judged"):
        unjudged((task, other), data, "size/mae")
    (line,) = unjudged((task,), data, None)
    assert "no label at all among 4 samples" in line


# --- what is typed -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("weightin=uncertainty", "did you mean 'weighting'"),
        ("weighting=uncertanty", "uncertainty"),
        ("+weighting.temperatur=2", "temperatur"),
        ("epochs=ten", "epochs"),
        ("device=cuda", "cannot be used"),
        ("heads.age=mlp", "age"),
        ("weighting=equal,dwa", "-m"),
        ("freeze=[spine]", "spine"),
        ("data.batch_size=1", "BatchNorm"),
        ("only=weight", "weight"),
        ("lr=1e-3", "optimizer.lr"),
        ("freeze=[backbone,heads]", "nothing is left to train"),
        ("unfreeze_at={backbone:1,heads:1}", "nothing trains in epoch 0"),
    ],
)
def test_a_command_that_cannot_run(typed, words, fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert words in fails(2, "train", *SMALL[:3], typed)
    assert not Path("outputs").exists() or list(Path("outputs").glob("*/*/error.txt"))


@pytest.mark.parametrize(
    "changes",
    [
        ("backbone.width=8",),
        ("weighting=dwa",),
        ("data.split_seed=3",),
        ("freeze=[backbone]",),
        ("layer_decay=0.5",),
        ("lr_mult.heads.size=0.1",),
    ],
)
def test_resume_with_what_does_not_fit(changes, fails, run):
    before = contents(run)
    line = fails(6, "train", f"resume={run}", *changes)
    assert "init_from=" in line
    assert contents(run) == before


def test_resume_with_other_data(fails, run):
    before = contents(run)
    line = fails(3, "train", f"resume={run}", "data.count=128")
    assert "differ" in line
    assert contents(run) == before
    assert main(["train", f"resume={run}"]) == 0


def test_one_rank_says_what_all_find(monkeypatch):
    """Rank 0 publishes its failure; another rank is silent if its own reads the same."""
    assert not dist.said_elsewhere("before the ranks have met")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert dist.said_elsewhere("before the ranks have met")
    monkeypatch.setattr(dist, "_store", torch.distributed.HashStore())
    monkeypatch.setattr(dist, "SAME_WORDS_S", 0.01)
    monkeypatch.setenv("RANK", "1")
    assert not dist.said_elsewhere("bad data"), "rank 0 is well"
    monkeypatch.setenv("RANK", "0")
    assert not dist.said_elsewhere("bad data")
    monkeypatch.setenv("RANK", "1")
    assert dist.said_elsewhere("bad data")
    assert not dist.said_elsewhere("a file that is missing here only")


# --- the run directory ---------------------------------------------------------------------------


def test_a_second_process_in_the_same_directory(fails, run):
    before = contents(run)
    ready, done = os.pipe(), os.pipe()
    holder = os.fork()
    if holder == 0:
        directory = RunDir(run)
        directory.open()
        os.write(ready[1], b"x")
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    try:
        line = fails(8, "train", f"resume={run}")
        assert f"pid {holder}" in line
        assert contents(run) == before
        assert status(run)["state"] == "interrupted", "the holder's status is not touched"
    finally:
        os.write(done[1], b"x")
        os.waitpid(holder, 0)


@pytest.mark.parametrize("place", ["/proc/mtl", "file"])
def test_a_place_that_cannot_be_written(place, fails, tmp_path):
    (tmp_path / "file").write_text("here is a file")
    started = time.monotonic()
    line = fails(8, "train", *SMALL, f"output_dir={place}")
    assert "output_dir=" in line
    assert time.monotonic() - started < 5


def full_disk(patch: pytest.MonkeyPatch, after: int) -> None:
    """ENOSPC from the given checkpoint on."""
    original, written = torch.save, [0]

    def save(state, file):
        written[0] += 1
        if written[0] > after:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(state, file)

    patch.setattr(torch, "save", save)


def test_a_full_disk(fails, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        full_disk(patch, after=2)
        options = ("epochs=2", "save_every_steps=2", "run_name=it")
        line = fails(8, "train", *SMALL, *options)
    assert "No space left" in line
    run = Path("outputs/synthetic/it")
    assert not list((run / "checkpoints").glob(".*"))
    assert checkpoint.load(run / "checkpoints" / "last.pt")["progress"]["total_steps"] == STEPS
    assert main(["train", f"resume={run}"]) == 0


# --- workers and numbers -------------------------------------------------------------------------


def test_a_killed_worker(fails, monkeypatch):
    original = train.train_step

    def kill_one(*args, **options):
        (worker, *_) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        return original(*args, **options)

    monkeypatch.setattr(train, "train_step", kill_one)
    options = ("data.workers=2", "data.cache=off", "data.batch_size=4", "epochs=9")
    for name in ("one", "two"):  # the second job of a process hears of it as quickly
        started = time.monotonic()
        line = fails(5, "train", *SMALL, *options, f"run_name={name}")
        assert time.monotonic() - started < 15
        assert "worker" in line
        assert "workers" in line
        assert status(Path(f"outputs/synthetic/{name}"))["exit_code"] == 5
        assert multiprocessing.active_children() == []


def nan_in(patch: pytest.MonkeyPatch, task: str, steps: set[int]) -> None:
    original, taken = passes.loss_sums, [0]

    def poisoned(*args):
        taken[0] += 1
        sums = original(*args)
        if taken[0] in steps:
            index = [t.name for t in args[0].tasks].index(task)
            sums[index] = sums[index] * float("nan")
        return sums

    patch.setattr(passes, "loss_sums", poisoned)


def test_a_loss_that_is_not_a_number_is_skipped(monkeypatch, capsys):
    nan_in(monkeypatch, "colour", {2, 3})
    assert main(["train", *SMALL, "epochs=1", "run_name=it"]) == 0
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if "step skipped" in line]
    assert len(lines) == 2
    assert "step 2: loss of colour is not finite" in lines[0]
    assert "scene-" in lines[0]
    state = checkpoint.load(Path("outputs/synthetic/it/checkpoints/last.pt"))
    assert state["progress"]["skipped"] == [2, 3]
    assert all(torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point())


def test_too_many_of_them_end_the_run(fails, monkeypatch):
    with monkeypatch.context() as patch:
        nan_in(patch, "colour", set(range(STEPS + 1, 100)))
        line = fails(4, "train", *SMALL, "epochs=9", "run_name=it")
    assert f"step {STEPS + 10}: loss of colour" in line
    assert "scene-" in line
    run = Path("outputs/synthetic/it")
    found = checkpoint.load(run / "checkpoints" / "last.pt")
    values = [v for v in found["model"].values() if v.is_floating_point()]
    assert all(torch.isfinite(v).all() for v in values)
    assert (run / "error.txt").is_file()
    assert main(["train", f"resume={run}", "epochs=4"]) == 0


def test_stop_at_the_first(fails, monkeypatch):
    nan_in(monkeypatch, "size", {3})
    line = fails(4, "train", *SMALL, "epochs=1", "on_nonfinite=stop")
    assert "step 3: loss of size" in line


def test_a_model_that_says_nan_is_no_result(fails):
    line = fails(4, "train", *SMALL, "epochs=1", "optimizer.lr=1e20", "run_name=it")
    assert "evaluation: outputs of shape, colour, size are not finite for 10 of 10" in line
    assert "scene-" in line
    assert status(Path("outputs/synthetic/it"))["state"] == "failed"


# --- checkpoints ---------------------------------------------------------------------------------


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()  # another name of the same file stays whole
    path.write_bytes(content[: len(content) // 2])


def test_a_damaged_checkpoint_falls_back(run, capsys):
    newest = max(run.glob("checkpoints/step_*.pt"))
    damage(newest)
    assert main(["train", f"resume={run}"]) == 0
    text = capsys.readouterr().err
    assert newest.name in text
    assert "trying the one before it" in text
    assert status(run)["state"] == "finished"


def test_all_checkpoints_damaged(run, capsys):
    for path in run.glob("checkpoints/*.pt"):
        damage(path)
    assert main(["train", f"resume={run}"]) == 6
    error = capsys.readouterr().err
    assert "no valid checkpoint" in error
    assert "Traceback" not in error
    assert main(["eval", str(run)]) == 6
    assert main(["predict", str(run), str(run)]) in {3, 6}


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("ran").absolute(),)


@pytest.fixture(params=["zip", "pickle", "deep"])
def hostile(request, run) -> Path:
    """A run whose checkpoints would run code."""
    (run / "checkpoints" / "best.pt").unlink()
    good = checkpoint.load(run / "checkpoints" / "last.pt")
    bad = {**good, "meter": Payload()} if request.param == "deep" else {"format": 1, "x": Payload()}
    for path in run.glob("checkpoints/*.pt"):
        path.unlink()
        if request.param == "pickle":
            path.write_bytes(pickle.dumps(bad))
        else:
            torch.save(bad, path)
    return run


def test_code_in_a_checkpoint_never_runs(hostile, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save("a.png")
    commands = (
        ["train", f"resume={hostile}"],
        ["train", *SMALL, f"init_from={hostile}", "epochs=1"],
        ["train", *SMALL, f"init_from={hostile}/checkpoints/last.pt", "epochs=1"],
        ["eval", str(hostile)],
        ["predict", str(hostile), "a.png"],
    )
    for command in commands:
        assert main(command) in {6, 9}, command
        assert "Traceback" not in capsys.readouterr().err
    with pytest.raises((SafetyError, CheckpointError)):
        mtl_cli.load(str(hostile))
    assert not (tmp_path / "ran").exists()


def test_code_in_the_config_of_a_checkpoint_never_runs(run, fails, tmp_path):
    path = run / "checkpoints" / "best.pt"
    state = checkpoint.load(path)
    target = "_target_: mtl_cli.data.transforms.Light"
    assert target in state["config"]
    state["config"] = state["config"].replace(target, "_target_: os.mkdir\n  path: ran")
    path.unlink()
    checkpoint.save(path, state)
    Image.new("RGB", (20, 20)).save("a.png")
    assert "os.mkdir" in fails(9, "eval", str(run))
    assert main(["predict", str(run), "a.png"]) in {0, 9}
    assert not (tmp_path / "ran").exists()


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (
            ["--name", "nosuch"],
            "--name: no such checkpoint (found 'nosuch', expected one of best, ",
        ),
        (["--name=best_ag"], "did you mean 'best_age'?"),
        (["--json=foo"], "--json: takes no value (found 'foo')"),
    ],
)
def test_eval_refuses_what_it_would_ignore(argv, part, fails, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "best_age.pt").touch()
    assert part in fails(2, "eval", "run", *argv)
