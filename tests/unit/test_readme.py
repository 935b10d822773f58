"""What users read stays true: generated tables, commands that compose, links that lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest

from mtl_cli.compose import Composer
from mtl_cli.launch import prepare
from mtl_cli.overrides import expand, parse

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
USERS = ("--config-dir", "./", "losses.size_mm")  # commands on files that only a user has
COMMAND = re.compile(r"^(?:\$ )?(mtl train .*?)(?:  +#.*|> \S+)?$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def tables():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(
        "readme_tables", ROOT / "scripts/readme_tables.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def commands(page: Path) -> list[str]:
    """Every ``mtl train ...`` of a page: lines of blocks, and inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    inline = re.findall(
        r"`(mtl train [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    )
    found = [match.strip() for match in COMMAND.findall(blocks)] + inline
    return list(dict.fromkeys(found))


def composes(command: str) -> bool:
    """Whether the line can be checked without files that are not in the repository."""
    return not any(word in command for word in USERS) and "resume=" not in command


TYPED = sorted({c for page in PAGES for c in commands(page) if composes(c)})


def test_tables_are_up_to_date(tables):
    assert tables.main(["--check"]) == 0


def test_check_finds_a_stale_table(tables, tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("<!-- table:tasks -->\n| old |\n<!-- /table:tasks -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    assert tables.main(["--check"]) == 1
    assert page.read_text().count("old") == 1
    assert "make docs" in capsys.readouterr().out
    assert tables.main([]) == 0
    assert tables.main(["--check"]) == 0
    assert "`synthetic`" in page.read_text()


def test_every_strategy_has_a_row(tables):
    rows = [line.split("|")[1].strip(" `") for line in tables.strategies()[2:]]
    assert sorted(rows) == sorted(p.stem for p in (ROOT / "conf/weighting").glob("*.yaml"))


def test_cost_follows_the_engine(tables):
    """The column says what the routes of the engine do; counted on the backbone."""
    from mtl_cli.train import train_step
    from tests import support

    for name, expected in (("equal", 1), ("gls", 1), ("famo", 4 / 3), ("mgda", 7 / 3),
                           ("gradnorm", 1), ("graddrop", 7 / 3), ("modo", 7 / 3)):  # fmt: skip
        work = support.make_work(f"weighting={name}", "data.batch_size=48")
        passes = {"forward": 0, "backward": 0}

        def count(module, args, output, passes=passes):
            share = len(output) / 48
            passes["forward"] += share
            if output.requires_grad:
                output.register_hook(lambda _: passes.update(backward=passes["backward"] + share))

        work.model.backbone.blocks[1][0].register_forward_hook(count)
        train_step(work, support.first_step(work), 0, 0)
        counted = (passes["forward"] + 2 * passes["backward"]) / 3
        option = next(o for o in tables.options("weighting") if o.name == name)
        typed = tables.cost(tables.build(option))
        values = {"1": 1, "about 1": 1, "4/3": 4 / 3, "(1+2K)/3": 7 / 3}
        assert counted == pytest.approx(expected)
        assert values[typed] == pytest.approx(expected)


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 300


def test_commands_were_found():
    assert len(TYPED) > 20
    assert (
        "mtl train -m task=utkface weighting=equal,uncertainty,gradnorm,pcgrad seed=1,2,3" in TYPED
    )


@pytest.mark.parametrize("line", TYPED)
def test_command_composes(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    command = parse(shlex.split(line)[2:])
    composer = Composer(command.config_dirs)
    jobs = expand(composer, command.overrides) if command.multirun else [command.overrides]
    for words in {tuple(word for word in job if not word.startswith("seed=")) for job in jobs}:
        cfg, problems = prepare(composer, parse(list(words)))
        assert not problems
        assert cfg is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_nothing_unfinished():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"\b(TODO|FIXME|XXX|TBD)\b|LOGLINE", text)
