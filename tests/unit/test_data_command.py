"""``mtl data`` on the built-in task, and what its config files promise."""

import importlib
import inspect as introspection
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mtl_cli import cli
from mtl_cli.data.base import DataOptions
from mtl_cli.data.cache import clear
from mtl_cli.errors import DataError

CONF = Path(__file__).parents[2] / "conf"
SMALL = ["data.count=60", "data.image_size=16"]


def _run(capsys, *words):
    code = cli.main(["data", *words])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_inspect_check_prepare_preview(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, out, _ = _run(capsys, "inspect", "synthetic", *SMALL)
    assert code == 0
    assert out.startswith("train 48, val 6, test 6")
    assert "size: learned as (value - " in out
    code, out, _ = _run(capsys, "check", "task=type_color", *SMALL)
    assert code == 0
    assert "60 images checked, 0 unreadable, 0 found more than once" in out
    code, out, _ = _run(capsys, "preview", "synthetic", *SMALL, "--write", "sheet.png")
    assert code == 0
    assert Image.open("sheet.png").width == 6 * 128
    code, out, _ = _run(capsys, "prepare", "synthetic", *SMALL)
    assert code == 0
    assert out.startswith("60 images ready")
    code, out, _ = _run(capsys, "cache", "ls")
    assert "60 of 60" in out
    assert _run(capsys, "cache", "clear", "synthetic")[0] == 0
    assert clear() == []


def test_a_sheet_that_cannot_be_written(capsys):
    for name, words in (("x.txt", ".png, .jpg"), ("nowhere/x.png", "No such file or directory")):
        code, _, err = _run(capsys, "preview", "synthetic", *SMALL, "--write", name)
        assert code == 2
        assert words in err


def test_check_lists_bad_and_doubled_images(capsys, tmp_path):
    folder = tmp_path / "UTKFace"
    folder.mkdir()
    for k in range(30):
        colour = (min(k, 28), 0, 0)  # the last two are equal
        Image.new("RGB", (20, 20), colour).save(folder / f"{k + 1}_0_1_201701091505573{k:02d}.png")
    (folder / "5_0_1_20170109150557399.png").write_bytes(b"")
    code, out, err = _run(capsys, "check", "utkface", f"data.root={folder}")
    assert code == DataError.exit_code
    assert "5_0_1_20170109150557399.png: not an image" in out
    assert "31 images checked, 1 unreadable, 1 found more than once" in out
    assert "1 of 31 images cannot be decoded" in err


def test_wrong_words(capsys):
    for words, hint in (
        (["inspekt", "x"], "did you mean 'inspect'"),
        (["check"], "which task?"),
        (["cache", "wipe"], "has ls, clear"),
        (["inspect", "syntetic"], "synthetic"),
        (["inspect", "synthetic", "data.cout=5"], "count"),
    ):
        code, _, err = _run(capsys, *words)
        assert code == 2
        assert hint in err
    code, out, _ = _run(capsys, "--help")
    assert code == 0
    assert "mtl data inspect csv" in out
    assert "utkface" in _run(capsys, "ls")[1]


def test_the_command_to_type_next_is_quoted(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a b").mkdir()
    (tmp_path / "labels.csv").write_text("file,y\na.png,1.5\nb.png,2.5\n")
    for name in "ab":
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    words = ("inspect", "csv", "data.table=labels.csv", "--write", "a b/c d.yaml")
    assert "then: mtl train 'task=./a b/c d.yaml'" in _run(capsys, *words)[1]
    assert "mtl train 'task=./c d.yaml'" in (tmp_path / "a b" / "c d.yaml").read_text()


def test_inspecting_a_table_needs_no_torch(tmp_path):
    (tmp_path / "labels.csv").write_text("file,y\na.png,1.5\nb.png,2.5\n")
    for name in "ab":
        Image.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
    script = (
        "import sys; from mtl_cli.cli import main; "
        "code = main(['data', 'inspect', 'csv', 'data.table=labels.csv']); "
        "sys.exit(code or ('torch' in sys.modules))"
    )
    env = {"PYTHONPATH": str(CONF.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "regression" in done.stdout


def _options(group):
    return sorted(p for p in (CONF / group).glob("*.yaml") if p.stem != "common")


@pytest.mark.parametrize("path", [*_options("data"), *_options("augment")], ids=lambda p: p.stem)
def test_yaml_equals_signature(path):
    node = yaml.safe_load(path.read_text())
    module, _, name = node.pop("_target_").rpartition(".")
    node.pop("defaults", None)
    shape = introspection.signature(getattr(importlib.import_module(module), name)).parameters
    common = yaml.safe_load((CONF / "data" / "common.yaml").read_text())
    own = {key: value for key, value in node.items() if key not in common}
    assert own == {key: parameter.default for key, parameter in shape.items()}


def test_common_keys_equal_the_options():
    common = yaml.safe_load((CONF / "data" / "common.yaml").read_text())
    shape = introspection.signature(DataOptions).parameters
    assert common == {key: parameter.default for key, parameter in shape.items()}


@pytest.mark.parametrize("path", _options("task"), ids=lambda p: p.stem)
def test_tasks_are_whole(path):
    task = yaml.safe_load(path.read_text())
    assert task["name"] == path.stem
    assert list(task["metrics"]) == list(task["outputs"])
    for group in ("heads", "losses"):
        chosen = yaml.safe_load((CONF / group / path.name).read_text())["defaults"]
        names = [next(iter(c)).split("@")[1] for c in chosen if isinstance(c, dict)]
        assert names == list(task["outputs"])


def test_progress_is_said_sparingly(monkeypatch):
    from mtl_cli.commands import data

    said, now = [], [0.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: now[0])
    show = data._progress(said.append)
    for done in range(100):
        now[0] += 0.2
        show("decoding", done, 100)
    assert len(said) == 3
