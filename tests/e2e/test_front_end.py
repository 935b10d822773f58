"""The command as a user types it, in a subprocess; and what an installed wheel holds."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def mtl(*argv: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "mtl_cli", *argv]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["version"], 0),
        (["trian"], 2),
        (["train", "weightin=uncertainty"], 2),
        (["train", "task=utkfac"], 2),
        (["train", "epochs=x", "losses.size=bce"], 2),
        (["conf", "ls"], 0),
        (["_complete", "mtl train weighting="], 0),
        (["train", "-m", "seed=1,2", "--list"], 0),
        (["train", "--cfg", "job"], 0),
    ],
)
def test_answers_without_torch_and_fast(argv, code, tmp_path):
    """Processor time, so that a busy machine does not decide; nothing here waits for anything."""
    script = (
        "import sys, time\n"
        "from mtl_cli.cli import main\n"
        f"code = main({argv!r})\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "print('TOOK', time.process_time(), file=sys.stderr)\n"
        "sys.exit(code)\n"
    )
    for _ in range(3):  # a machine that is busy with others inflates processor time as well
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        took = float(done.stderr.rpartition("TOOK")[2])
        if took < 1:
            break
    assert took < 1
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_one_run_and_the_same_again(tmp_path):
    """One run, then the same directory again: finished, exit 0; then a refused change."""
    small = ["data.count=120", "data.workers=0", "epochs=1", "display=plain", "run_name=first"]
    done = mtl("train", *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "outputs" / "synthetic" / "first"
    assert (run / "config.yaml").is_file()
    assert not (tmp_path / ".hydra").exists(), "Hydra leaves nothing behind"
    assert {path.name for path in tmp_path.iterdir()} == {"outputs"}
    done = mtl("train", f"resume={run}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = mtl("train", f"resume={run}", "backbone=resnet18", cwd=tmp_path)
    assert done.returncode == 6
    assert len(done.stderr.strip().splitlines()) == 1
    assert "init_from=" in done.stderr


def test_sweep_runs_and_is_not_done_twice(tmp_path):
    argv = ["data.count=120", "data.workers=0", "epochs=1", "display=plain", "seed=1,2"]
    done = mtl("train", "-m", *argv, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (sweep,) = (tmp_path / "multirun" / "synthetic").iterdir()
    for seed in (1, 2):
        assert (sweep / f"seed-{seed}" / "summary.json").is_file()
    done = mtl("train", f"resume={sweep}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("finished earlier") == 2


def test_closed_pipe_is_no_error(tmp_path):
    line = f"{sys.executable} -m mtl_cli conf show | head -1"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_wheel_holds_the_config_and_works_outside_the_checkout(tmp_path):
    """Built and unpacked as pip does it; the source tree is not on the path."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in files.stdout.splitlines():
        if name.startswith(("mtl_cli/", "conf/")) or "/" not in name:
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    (source / "README.md").touch()
    build = "from setuptools import build_meta; print(build_meta.build_wheel(r'{}'))"
    done = subprocess.run(
        [sys.executable, "-c", build.format(tmp_path)], cwd=source, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    wanted = {
        f"mtl_cli/conf/{p.relative_to(ROOT / 'conf')}" for p in (ROOT / "conf").rglob("*.yaml")
    }
    assert wanted <= names
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "mtl_cli").rglob("*.py")}
    assert modules <= names, "a package is missing from pyproject.toml"
    done = mtl("conf", "check", cwd=tmp_path, PYTHONPATH=str(site))
    assert (done.returncode, done.stdout) == (0, "in order\n"), done.stderr
    done = mtl("conf", "show", "lr/cosine", cwd=tmp_path, PYTHONPATH=str(site))
    assert "mtl_cli.lr.Cosine" in done.stdout
