"""A user's day with the tool, from training to prediction, in the test's own process."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import mtl_cli
from mtl_cli import checkpoint
from mtl_cli.cli import main
from tests import support

SMALL = (*support.SMALL, "display=plain", "log_every_steps=2")
STEPS = 4  # of an epoch: 76 training scenes, batch 16


def train(*overrides: str) -> int:
    return main(["train", *SMALL, *overrides])


def read(run: Path, name: str = "summary.json"):
    return json.loads((run / name).read_text())


def log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def state(run: Path, name: str = "last") -> dict:
    return checkpoint.load(run / "checkpoints" / f"{name}.pt")


def learned(run: Path, name: str = "last") -> str:
    found = state(run, name)
    return support.digest([found["model"], found["ema"], found["optimizers"], found["weighting"]])


def say(*argv: str, capsys) -> str:
    """What a command prints when it ends well."""
    capsys.readouterr()
    assert main(list(argv)) == 0
    return capsys.readouterr().out


@pytest.fixture(scope="module", autouse=True)
def _one_thread(tmp_path_factory):
    """Such models are quicker so; and what fixtures of the module do stays in a private cache."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a run once per module and gives copies of it to the tests."""
    runs: dict[tuple[str, ...], Path] = {}

    def make(*overrides: str) -> Path:
        if overrides not in runs:
            place = tmp_path_factory.mktemp("made")
            assert train(*overrides, f"output_dir={place}", "run_name=it") == 0
            (runs[overrides],) = place.glob("*/it")
        copy = Path.cwd() / f"run{len(list(Path.cwd().glob('run*')))}"
        shutil.copytree(runs[overrides], copy, symlinks=True)
        return copy

    return make


@pytest.fixture
def photos(tmp_path) -> list[Path]:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 90, (24, 20, 3), dtype=np.uint8)
        pixels[..., number % 3] += 120
        Image.fromarray(pixels).save(folder / f"p{number:02}.png")
    return sorted(folder.iterdir())


# --- what comes out of a run ---------------------------------------------------------------------


def test_run_directory(made):
    run = made("epochs=2")
    wanted = {
        *("config.yaml", "overrides.txt", "environment.json", "status.json", "summary.json"),
        *("metrics.jsonl", "timing.jsonl", "mtl.log", "val_predictions.csv"),
    }
    assert wanted <= {path.name for path in run.iterdir()}
    assert not (run / "error.txt").exists()
    assert read(run, "status.json")["state"] == "finished"
    files = {path.stem for path in (run / "checkpoints").iterdir()}
    assert {"last", "best", "best_shape", "best_colour", "best_size"} <= files
    assert [event["event"] for event in log(run)].count("eval") == 2
    assert [event["step"] for event in log(run) if event["event"] == "train"] == [2, 4, 6, 8]


@pytest.mark.parametrize(
    "overrides",
    [
        ("epochs=2",),
        ("epochs=2", "ema.decay=0.5", "weighting=pcgrad"),
        ("epochs=1", "precision=bf16", "data.drop_last=false", "only=[size,shape]"),
        ("epochs=1", "schedule=transfer"),
    ],
    ids=" ".join,
)
def test_eval_reproduces_what_training_reported(overrides, made, capsys):
    run = made(*overrides)
    summary = read(run)
    for name in ("best", "final"):
        kind = "best" if name == "best" else "last"
        found = json.loads(say("eval", str(run), "--name", kind, "--json", capsys=capsys))
        assert found["metrics"] == summary[name]["metrics"]
        assert found["score"] == summary[name]["score"]
        assert found["step"] == summary[name]["step"]
    for task, best in summary["best_task"].items():
        path = str(run / "checkpoints" / f"best_{task}.pt")
        found = json.loads(say("eval", path, "--json", capsys=capsys))
        assert next(iter(found["metrics"][task].values())) == best["value"]


def test_eval_of_the_test_split_and_per_class(made, capsys):
    found = json.loads(say("eval", str(made("epochs=2")), "--split=test", "--json", capsys=capsys))
    assert found["samples"] == 10
    assert sum(row["labels"] for row in found["per_class"]["shape"]) == 10
    text = say("eval", str(made("epochs=2")), capsys=capsys)
    assert "circle" in text
    assert "px" in text


def test_what_changes_on_resume_takes_effect(made, capsys):
    """Optimizer keys reach the loaded groups; another ``best_by`` compares with nothing before."""
    run = made("epochs=1")
    changes = ("epochs=2", "optimizer.weight_decay=5", "best_by=size/mae")
    assert main(["train", f"resume={run}", *changes]) == 0
    assert "best.pt starts afresh with epoch 2" in capsys.readouterr().err
    decayed, rest = state(run)["optimizers"]["model"]["param_groups"]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (5.0, 0.0)
    assert state(run, "best")["progress"]["epoch"] == 2
    mae = read(run)["final"]["metrics"]["size"]["mae"]
    assert state(run)["progress"]["best_score"] == -mae


def test_best_by_of_a_task_that_a_stage_does_not_have(capsys):
    stages = ("schedule=transfer", "schedule.stages.probe.only=[shape]")
    assert train("epochs=1", *stages, "best_by=size", "run_name=it") == 0
    text = capsys.readouterr().err
    assert text.count("stage probe: has no size (has shape); the mean gain decides") == 1
    found = state(Path("outputs/synthetic/it"))["progress"]
    assert found["best_by"] == "size"
    assert found["best_score"] == -found["best"]["metrics"]["size"]["mae"]


def test_double_precision_is_evaluated_and_predicted_as_trained(made, photos, capsys):
    run = made("epochs=1", "precision=fp64")
    metrics = json.loads(say("eval", str(run), "--json", capsys=capsys))["metrics"]
    assert metrics == read(run)["best"]["metrics"]
    assert say("predict", str(run), str(photos[0]), capsys=capsys).count("p00.png") == 3


# --- using the model -----------------------------------------------------------------------------


def test_predict_from_shell_and_python_agree(made, photos, capsys):
    run = made("epochs=2")
    for out in ("a.csv", "a.jsonl"):
        say("predict", str(run), str(photos[0].parent), "--out", out, capsys=capsys)
    with open("a.csv") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    assert len(rows) == len(lines) == 3 * len(photos)
    for row, line in zip(rows, lines, strict=True):
        assert {k: v for k, v in row.items() if v} == {k: v for k, v in line.items() if v}
    model = mtl_cli.load(str(run))
    found = model.predict(photos[3])
    pixels = np.asarray(Image.open(photos[3]))
    assert model.predict(Image.open(photos[3])) == model.predict(pixels) == found
    mine = {row["task"]: row for row in rows if row["image"] == str(photos[3])}
    assert mine["shape"]["class"] == found["shape"]["class"]
    assert sum(found["shape"]["probabilities"].values()) == pytest.approx(1)
    top = max(found["colour"]["probabilities"].values())
    assert float(mine["colour"]["probability"]) == pytest.approx(top, abs=1e-4)
    assert float(mine["size"]["value"]) == pytest.approx(found["size"]["value"], rel=1e-5)
    assert mine["size"]["unit"] == found["size"]["unit"] == "px"
    assert mtl_cli.load(str(run / "checkpoints" / "last.pt")).predict(pixels) != {}


def test_predict_goes_on_after_an_image_that_is_none(made, photos, capsys):
    run = made("epochs=2")
    photos[3].write_bytes(b"<html>gone</html>")
    assert main(["predict", str(run), str(photos[0].parent), "--out", "a.csv"]) == 3
    error = capsys.readouterr().err
    assert "p03.png" in error
    assert "1 of 40 images have no prediction" in error
    assert len(Path("a.csv").read_text().splitlines()) == 1 + 3 * 39
    assert main(["predict", str(run), str(photos[0]), "--out", "/proc/o.csv"]) == 2
    assert "cannot write /proc/o.csv" in capsys.readouterr().err


def own_table(photos: list[Path]) -> Path:
    """Labels of a user: a price with holes, a colour, a flag, their own split."""
    table = photos[0].parent.parent / "labels.csv"
    lines = ["photo,price,colour,used,split"]
    for number, path in enumerate(photos):
        price = "" if number % 4 == 1 else f"{10 + number * 0.5:.2f}"
        colour = "" if number == 7 else ("red", "green", "blue")[number % 3]
        part = ("train", "train", "train", "val", "test")[number % 5]
        lines.append(f"{path.name},{price},{colour},{'yes' if number % 2 else 'no'},{part}")
    table.write_text("\n".join(lines) + "\n")
    return table


def test_own_table_from_inspection_to_prediction(photos, tmp_path, capsys):
    own_table(photos)
    inspect = ("data", "inspect", "csv", "data.table=labels.csv", "data.root=photos")
    text = say(*inspect, "--write", "mine.yaml", capsys=capsys)
    assert "price" in text
    task = yaml.safe_load(Path("mine.yaml").read_text())
    assert set(task["outputs"]) == {"price", "colour", "used"}
    small = ("data.image_size=16", "data.batch_size=8", "backbone.width=4", "display=plain")
    assert main(["train", "task=./mine.yaml", *small, "epochs=2", "run_name=it"]) == 0
    (run,) = Path("outputs").glob("*/it")
    found = json.loads(say("eval", str(run), "--json", capsys=capsys))
    assert found["metrics"] == read(run)["best"]["metrics"]
    assert found["samples"] == 8
    with (run / "val_predictions.csv").open() as file:
        judged = list(csv.DictReader(file))
    assert len(judged) == 3 * 8
    unlabelled = [row for row in judged if not row["label"]]
    assert {row["task"] for row in unlabelled} == {"price"}
    names = sorted({row["image"] for row in judged})
    say("predict", str(run), *(f"photos/{n}" for n in names), "--out", "p.csv", capsys=capsys)
    with open("p.csv") as file:
        fresh = {(Path(r["image"]).name, r["task"]): r for r in csv.DictReader(file)}
    for row in judged:
        other = fresh[row["image"], row["task"]]
        assert other["class"] == row["class"]
        if row["value"]:
            assert float(other["value"]) == pytest.approx(float(row["value"]), rel=1e-4)
    assert main(["train", "task=./mine.yaml", *small, f"resume={run}"]) == 0


# --- sweeps --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Four jobs, one of which diverges."""
    place = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        lrs = "optimizer.lr=1e-3,1e30,1e-2,3e-3"
        code = main(["train", "-m", *SMALL, "epochs=1", "on_nonfinite=stop", lrs])
    (found,) = (place / "multirun" / "synthetic").iterdir()
    return code, found


def test_a_failed_job_stops_no_other(sweep):
    code, root = sweep
    assert code == 7
    states = [read(run, "status.json") for run in root.glob("*/")]
    (bad,) = [status for status in states if status["state"] != "finished"]
    assert len(states) == 4
    assert (bad["state"], bad["exit_code"]) == ("failed", 4)
    assert "not finite" in bad["reason"]


def test_a_sweep_continues_without_redoing(sweep, tmp_path, capsys):
    root = Path(shutil.copytree(sweep[1], tmp_path / "again"))
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/metrics.jsonl")}
    capsys.readouterr()
    assert main(["train", f"resume={root}"]) == 7
    assert capsys.readouterr().err.count("finished earlier") == 3
    changed = [path for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert [read(path.parent, "status.json")["exit_code"] for path in changed] == [4]


def test_compare_lists_failed_runs_too(sweep, capsys):
    text = say("compare", str(sweep[1]), capsys=capsys)
    assert "failed (exit 4)" in text
    (table,) = json.loads(say("compare", str(sweep[1]), "--json", capsys=capsys))
    found = {row["setting"]["optimizer.lr"]: row["finished"] for row in table["rows"]}
    assert found == {"0.001": 1, "1e+30": 0, "0.01": 1, "0.003": 1}
    say("compare", str(sweep[1]), "--html", "table.html", capsys=capsys)
    assert "1e+30" in Path("table.html").read_text()


def test_a_listed_line_runs_and_is_found_again(capsys):
    argv = ["train", "-m", *SMALL, "epochs=1", "seed=1,2", "--list"]
    lines = say(*argv, capsys=capsys).splitlines()
    assert len(lines) == 2
    words = shlex.split(lines[1])[1:]
    assert main(words) == 0
    (run,) = Path("outputs/synthetic").glob("seed-2-*")
    before = (run / "metrics.jsonl").read_bytes()
    assert main(words) == 0
    assert "already finished" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


# --- stages and starting weights -----------------------------------------------------------------


def test_transfer_freezes_then_moves(made):
    run = made("epochs=1", "schedule=transfer")
    assert [event["stage"] for event in log(run) if event["event"] == "eval"] == [
        "probe",
        "finetune",
    ]
    probe, tuned = state(run, "probe_best")["model"], state(run)["model"]
    work = support.make_work("log_every_steps=2")
    start = work.model.state_dict()
    backbone = [name for name in start if name.startswith("backbone.")]
    assert all(torch.equal(probe[name], start[name]) for name in backbone)
    assert any(not torch.equal(probe[name], tuned[name]) for name in backbone)


def test_pretrain_on_another_task(capsys):
    code = train(
        "epochs=1", "schedule=pretrain", "schedule.stages.pretrain.task=type_color", "run_name=it"
    )
    assert code == 0
    text = "".join(capsys.readouterr())
    assert "missing" in text
    run = Path("outputs/synthetic/it")
    assert [task["name"] for task in state(run, "pretrain_best")["tasks"]] == ["type", "color"]
    assert [task["name"] for task in state(run)["tasks"]] == ["shape", "colour", "size"]
    assert set(read(run)["best"]["metrics"]) == {"shape", "colour", "size"}


def test_init_from_reports_what_fits(made, capsys):
    run = made("epochs=1", "heads.size=mlp")
    own = len(state(run)["model"])
    still = ("optimizer.lr=1e-12", "lr=constant", "epochs=1")
    changes = ("heads.size=mlp", "heads.size.hidden=7", "heads.shape=mlp", "run_name=next")
    capsys.readouterr()
    assert train(f"init_from={run}", *changes, *still) == 0
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "loaded" in text]
    assert f"of {own + 2} tensors" in line
    assert "missing (heads.shape" in line
    assert "5 of another shape" in line
    old, new = state(run, "best")["model"], state(Path("outputs/synthetic/next"))["model"]
    for name in (n for n in old if n.startswith("backbone.") and n.endswith("weight")):
        assert torch.allclose(old[name], new[name], atol=1e-6)


# --- when a run ends -----------------------------------------------------------------------------


def test_patience_ends_a_run():
    still = ("optimizer.lr=1e-12", "lr=constant", "patience=2", "best_by=loss", "augment=none")
    freeze = ("freeze=[backbone]", "backbone.width=4")
    assert train(*still, *freeze, "epochs=50", "run_name=it") == 0
    run = Path("outputs/synthetic/it")
    assert read(run)["final"]["epoch"] < 10
    epoch = read(run)["final"]["epoch"]
    assert main(["train", f"resume={run}", "patience=null", f"epochs={epoch + 1}"]) == 0
    assert read(run)["final"]["epoch"] == epoch + 1


def test_more_epochs_equal_a_longer_run(made):
    """With a constant rate, one epoch and then one more is two."""
    short, long = made("epochs=1", "lr=constant"), made("epochs=2", "lr=constant")
    assert main(["train", f"resume={short}", "epochs=2"]) == 0
    assert learned(short) == learned(long)
    assert log(short) == log(long)
    assert read(short)["final"]["epoch"] == 2


def test_resume_auto_finds_its_name(capsys):
    line = ("epochs=1", "run_name=mine", "resume=auto")
    assert train(*line) == 0
    capsys.readouterr()
    assert train(*line) == 0
    assert "already finished" in capsys.readouterr().err
    assert train("epochs=2", "run_name=mine", "resume=auto") == 0
    assert [path.name for path in Path("outputs/synthetic").iterdir() if not path.is_symlink()] == [
        "mine"
    ]
    assert read(Path("outputs/synthetic/mine"))["final"]["epoch"] == 2


# --- options that change what is computed --------------------------------------------------------


def test_best_by(made):
    run = made("epochs=3", "best_by=size/mae")
    curve = {e["epoch"]: e["metrics"]["size"]["mae"] for e in log(run) if e["event"] == "eval"}
    best = min(curve, key=curve.get)
    assert read(run)["best"]["epoch"] == best
    assert state(run, "best")["progress"]["epoch"] == best


def test_ema_is_what_is_judged(made):
    run = made("epochs=2", "ema.decay=0.5", "weighting=pcgrad")
    found = state(run)
    averaged = checkpoint.weights(found)
    assert any(not torch.equal(averaged[name], found["model"][name]) for name in averaged)
    heads = mtl_cli.load(str(run / "checkpoints" / "last.pt")).model.state_dict()
    assert all(torch.equal(heads[name], averaged[name]) for name in averaged)


def test_only_prunes_the_task(made):
    run = made("epochs=1", "precision=bf16", "data.drop_last=false", "only=[size,shape]")
    assert set(read(run)["best"]["metrics"]) == {"size", "shape"}
    assert not [name for name in state(run)["model"] if name.startswith("heads.colour")]
    assert log(run)[-1]["step"] == STEPS + 1, "drop_last=false: the last, smaller batch counts"


def test_same_seed_same_run(made):
    first = made("epochs=2", "lr=constant")
    assert train("epochs=2", "lr=constant", "run_name=other") == 0
    second = Path("outputs/synthetic/other")
    assert learned(first) == learned(second)
    assert (first / "metrics.jsonl").read_bytes() == (second / "metrics.jsonl").read_bytes()
    assert train("epochs=2", "lr=constant", "run_name=third", "seed=1") == 0
    assert learned(first) != learned(Path("outputs/synthetic/third"))
