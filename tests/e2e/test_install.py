"""Installed as a user does: a wheel outside the checkout, and an editable install.

``MTL_TEST_INSTALL=1 pytest tests/e2e/test_install.py``; the environment of the tests lends its
packages, so that nothing is downloaded.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("MTL_TEST_INSTALL") != "1", reason="MTL_TEST_INSTALL=1"),
]


def sh(*command: str | Path, cwd: Path) -> str:
    """Run a command without what the environment of the tests would lend it; its output."""
    private = ("PYTHON", "MTL_", "VIRTUAL_ENV")
    env = {k: v for k, v in os.environ.items() if not k.startswith(private)}
    env |= {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cwd / "cache")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture
def source(tmp_path) -> Path:
    """The files that a clean clone would have, and those not yet committed."""
    pytest.importorskip("setuptools", minversion="77")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    (tmp_path / "source" / "README.md").touch()
    return tmp_path / "source"


@pytest.fixture
def python(tmp_path) -> Path:
    """The interpreter of an empty environment that borrows the packages of this one."""
    sh(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv", cwd=tmp_path)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return tmp_path / "venv" / "bin" / "python"


def install(python: Path, *what: str | Path, cwd: Path) -> Path:
    """``pip install`` without dependencies or downloads; the installed command."""
    pip = (python, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", "--no-index")
    sh(*pip, "--no-build-isolation", "--ignore-installed", *what, cwd=cwd)
    return python.parent / "mtl"


def test_a_wheel_works_outside_the_checkout(source, python, tmp_path):
    build = "from setuptools import build_meta; build_meta.build_wheel({!r})"
    sh(sys.executable, "-c", build.format(str(tmp_path)), cwd=source)
    (wheel,) = tmp_path.glob("*.whl")
    source.rename(tmp_path / "gone")
    mtl = install(python, wheel, cwd=tmp_path)
    where = sh(python, "-c", "import mtl_cli; print(mtl_cli.__file__)", cwd=tmp_path)
    assert str(tmp_path / "venv") in where
    assert (Path(where.strip()).parent / "conf" / "train.yaml").is_file()
    assert "utkface" in sh(mtl, "conf", "ls", "task", cwd=tmp_path)
    assert sh(mtl, "conf", "check", cwd=tmp_path) == "in order\n"
    work = tmp_path / "work"
    work.mkdir()
    small = ("epochs=1", "data.count=200", "run_name=it", "display=plain")
    text = sh(mtl, "train", *small, cwd=work)
    assert "outputs/synthetic/it" in text
    assert "accuracy" in sh(mtl, "eval", "outputs/synthetic/it", cwd=work)
    load = "import mtl_cli; print(len(mtl_cli.load('outputs/synthetic/it').tasks))"
    assert sh(python, "-c", load, cwd=work) == "3\n"
    assert {path.name for path in work.iterdir()} == {"outputs", "cache"}


def test_an_editable_install_follows_an_edit_in_conf(source, python, tmp_path):
    mtl = install(python, "-e", source, cwd=tmp_path)
    assert re.search(r"^epochs: 10\b", sh(mtl, "conf", "show", cwd=tmp_path), re.MULTILINE)
    path = source / "conf" / "train.yaml"
    path.write_text(re.sub(r"^epochs: 10\b", "epochs: 11", path.read_text(), flags=re.MULTILINE))
    assert re.search(r"^epochs: 11\b", sh(mtl, "conf", "show", cwd=tmp_path), re.MULTILINE)
    (source / "conf" / "lr" / "mine.yaml").write_text("_target_: mtl_cli.lr.Constant\nwarmup: 0\n")
    assert "mine" in sh(mtl, "conf", "ls", "lr", cwd=tmp_path)
    module = source / "mtl_cli" / "__init__.py"
    module.write_text(re.sub(r'__version__ = ".*"', '__version__ = "9.9"', module.read_text()))
    assert "9.9" in sh(mtl, "version", cwd=tmp_path)
