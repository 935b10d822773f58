"""``mtl conf check X --laws``: the laws tell a sound strategy from a broken one, by name."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch

from mtl_cli import signature
from mtl_cli.cli import main
from mtl_cli.config import conf_dir
from mtl_cli.weighting import laws

STRATEGIES = """
import torch
from mtl_cli.weighting.base import GradientWeighting, GramianWeighting, LossWeighting

class Good(GramianWeighting):
    def __init__(self, objectives, *, power: float = 1.0, **common):
        super().__init__(objectives, **common)
        self.power = power
        self.register_buffer("seen", self.per_objective())
    def solve(self, gramian, losses, present, step):
        self.seen[present] += 1
        return gramian.diagonal().rsqrt() ** self.power

class Broken(GradientWeighting):
    def combine(self, rows, present, step, column, losses):
        torch.manual_seed(step)
        unit = rows / rows.norm(dim=1, keepdim=True)
        return (unit * torch.arange(1, len(rows) + 1)[:, None]).sum(0)

class Forgetful(LossWeighting):
    affine = False
    def __init__(self, objectives, **common):
        super().__init__(objectives, **common)
        self.calls = 0
        self.register_buffer("mean", self.per_objective())
    def objective(self, losses, present):
        return (losses * (1 + self.calls + torch.rand(()))).sum()
    def update(self, step, present, losses, gramian=None):
        self.calls += 1
        self.mean += losses.mean()

class Raises(LossWeighting):
    def objective(self, losses, present):
        raise ValueError("no such objective")

class Stranger:
    def __init__(self, objectives, seed):
        pass
"""


@pytest.fixture
def strategy(tmp_path, monkeypatch):
    """Write a package of strategies and the YAML of one of them; returns what to type."""
    package = f"theirs_{tmp_path.name.replace('-', '_')}"
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(STRATEGIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("MTL_ALLOW_CODE", "")
    signature.source_file.cache_clear()

    def write(name: str, text: str = "") -> list[str]:
        (tmp_path / "mine.yaml").write_text(f"_target_: {package}.{name}\n{text}")
        return ["conf", "check", "mine.yaml", "--laws", "--allow-code", package]

    return write


def broken(out: str) -> set[str]:
    return {m[1] for m in re.finditer(r"^BREAKS +(\S+(?: \S+)*)  ", out, re.MULTILINE)}


def test_a_good_strategy_passes(strategy, capsys):
    assert main(strategy("Good", "power: 1.0\n")) == 0
    out = capsys.readouterr().out
    assert broken(out) == set()
    assert out.count("keeps") == len(laws.REQUIRED)
    assert re.search(r"does not hold +homogeneous .*gradient x 1\.0e\+00", out)
    assert re.search(r"holds +rotates", out)


def test_a_broken_strategy_fails_by_name(strategy, capsys):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert main(strategy("Broken")) == 2
    out, err = capsys.readouterr()
    assert broken(out) == {
        *("degenerate matrices", "order of objectives", "global generators", "columns")
    }
    assert "gradient not [64] finite on 'zero row'" in out
    assert "moves the global generator of torch" in out
    assert "mine.yaml: breaks 4 of 10 required laws (degenerate matrices" in err
    assert torch.equal(torch.get_rng_state(), state), "put back"


def test_state_and_draws_of_its_own_are_found(strategy, capsys):
    assert main(strategy("Forgetful")) == 2
    assert broken(capsys.readouterr().out) == {
        *("order of objectives", "absent objectives", "saved state", "draws", "global generators")
    }


def test_an_exception_is_a_finding_with_its_place(strategy, capsys):
    assert main(strategy("Raises")) == 2
    out = capsys.readouterr().out
    assert "finite" in broken(out)
    assert re.search(r"ValueError: no such objective \(.*__init__\.py:\d+\)", out)


@pytest.mark.parametrize(
    ("name", "text", "code", "says"),
    [
        ("Good", "powre: 2\n", 2, "'weighting.powre'; did you mean 'power'"),
        ("Good", "power: much\n", 2, "weighting.power: wrong type"),
        ("Good", "wrt: share\n", 2, "did you mean 'shared'"),
        ("Stranger", "", 2, "not a weighting strategy"),
        ("Absent", "", 2, "cannot import"),
    ],
)
def test_the_config_is_checked_first(strategy, capsys, name, text, code, says):
    assert main(strategy(name, text)) == code
    out, err = capsys.readouterr()
    assert says in err
    assert out == ""


def test_code_that_is_not_allowed_is_not_imported(strategy, capsys):
    command = strategy("Good")
    assert main(command[:-2]) == 9
    assert f"--allow-code {command[-1]}" in capsys.readouterr().err
    assert command[-1] not in sys.modules


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["mgad"], "did you mean mgda"),
        ([], "found 0 strategies, expected one"),
        (["absent.yaml"], "cannot be read"),
        (["mgda", "weighting.wtr=shared"], "did you mean 'weighting.wrt'"),
    ],
)
def test_wrong_lines_say_so(argv, says, capsys):
    assert main(["conf", "check", *argv, "--laws"]) == 2
    assert says in capsys.readouterr().err


def test_a_file_may_build_on_an_option(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("defaults: [mgda]\nnormalization: l2\n")
    assert main(["conf", "check", "mine.yaml", "--laws"]) == 0
    assert re.search(r"^does not hold +harmless", capsys.readouterr().out, re.MULTILINE)


def test_a_shipped_strategy_by_name(capsys):
    assert main(["conf", "check", "equal", "--laws", "weighting.reduction=mean"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^holds +simplex", out, re.MULTILINE)
    assert re.search(r"^does not hold +harmless", out, re.MULTILINE)


@pytest.mark.parametrize("name", sorted(p.stem for p in (conf_dir() / "weighting").glob("*.yaml")))
def test_every_shipped_strategy_keeps_its_required_laws(name):
    from tests.property.built import maker, needs_torchjd

    if needs_torchjd(name):
        pytest.skip("torchjd is an extra")
    for law in laws.REQUIRED:  # the whole zoo is for tests/property
        few = {"counts": (3,)} if law in {"finite", "degenerate matrices"} else {}
        found = laws.judge(law, maker(name), **few)
        assert found.ok, found


@pytest.mark.parametrize(
    ("fact", "keep", "do_not"),
    [
        ("homogeneous", ["mgda", "upgrad", "equal"], ["nash_mtl", "log"]),
        ("rotates", ["cagrad", "dualproj"], ["graddrop", "excess_mtl"]),
        ("harmless", ["mgda", "nash_mtl", "fairgrad", "upgrad", "dualproj"], ["equal", "cagrad"]),
        ("simplex", ["mgda", "moco", "rlw", "famo"], ["equal", "nash_mtl"]),
    ],
)
def test_facts(fact, keep, do_not):
    from tests.property.built import maker

    found = {name: laws.judge(fact, maker(name)) for name in (*keep, *do_not)}
    assert {name: f.ok for name, f in found.items()} == {
        **dict.fromkeys(keep, True),
        **dict.fromkeys(do_not, False),
    }
    assert not any(f.required for f in found.values())


def test_global_generators_are_put_back():
    def build(objectives):
        np.random.seed(3)
        torch.manual_seed(3)
        raise RuntimeError

    before = np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    assert not laws.judge("finite", build).ok
    assert (np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()) == before
