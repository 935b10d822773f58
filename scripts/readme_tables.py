"""Writes the tables of README.md and docs/ from conf/ and the classes that it names.

    python scripts/readme_tables.py            # write them
    python scripts/readme_tables.py --check    # exit 1 if one is out of date, write nothing

A table stands between ``<!-- table:NAME -->`` and ``<!-- /table:NAME -->``; NAME is one of
``TABLES``. What a strategy needs, keeps and costs is read off an instance with three objectives.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mtl_cli.config import read_yaml  # noqa: E402
from mtl_cli.task import Objective  # noqa: E402
from mtl_cli.weighting.base import (  # noqa: E402
    GradientWeighting,
    GramianWeighting,
    LossWeighting,
    Weighting,
)

CONF = ROOT / "conf"
MARKER = re.compile(r"<!-- table:(\w+) -->\n.*?<!-- /table:\1 -->", re.DOTALL)
OBJECTIVES = tuple(Objective(name, name) for name in ("a", "b", "c"))
K = len(OBJECTIVES)
COMMON = ("_target_", "heads", "wrt", "update_every", "transform", "reduction")
FAMILIES = ((LossWeighting, "losses"), (GramianWeighting, "Gramian"), (GradientWeighting, "rows"))
KEPT_FOR_ALL = {"fallbacks", "last_weights", "initial_losses"}  # state that is no method's own


@dataclass(frozen=True)
class Option:
    """One file of a config group.

    Args:
        name: how it is chosen: ``weighting=name``.
        comment: the first line, what it is.
        command: the first line, what to type.
        node: the file's keys.
    """

    name: str
    comment: str
    command: str
    node: dict[str, Any]

    def own_keys(self) -> str:
        """Keys that only this option has, with their defaults."""
        keys = [f"`{k}={_plain(v)}`" for k, v in self.node.items() if k not in COMMON]
        return " ".join(keys) or "-"


def options(group: str) -> list[Option]:
    """All options of a group, by name."""
    found = []
    for path in sorted((CONF / group).glob("*.yaml")):
        if path.stem == "common":
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        line = next(line for line in lines if not line.startswith("# @package"))
        comment, _, command = line.removeprefix("#").strip().partition(": mtl ")
        found.append(Option(path.stem, comment, f"mtl {command}", read_yaml(path)))
    return found


def load(option: Option) -> Any:
    """The class, or the function that chooses one."""
    module, _, name = str(option.node["_target_"]).rpartition(".")
    return getattr(importlib.import_module(module), name)


def build(option: Option) -> Weighting | None:
    """The strategy on three objectives; None where a function chooses the class."""
    target = load(option)
    if not isinstance(target, type):
        return None
    arguments = {key: value for key, value in option.node.items() if key != "_target_"}
    strategy = target(OBJECTIVES, seed=0, **arguments)
    assert isinstance(strategy, Weighting)
    return strategy


def family(strategy: Weighting) -> str:
    """What the weights are made from."""
    return next(name for kind, name in FAMILIES if isinstance(strategy, kind))


def paper(option: Option) -> str:
    """Authors, venue and year from the YAML, linked where the class names an arXiv id."""
    explained = inspect.getdoc(load(option)) or ""
    cited = re.search(r"\(([^()]*\b\d{4})\)", option.comment)
    if cited is None and not isinstance(load(option), type):
        cited = re.search(r"\(([^()]*), arXiv", explained)
    arxiv = re.search(r"arXiv (\d{4}\.\d{5})", explained)
    if cited is None:
        return "-"
    return f"[{cited[1]}](https://arxiv.org/abs/{arxiv[1]})" if arxiv else cited[1]


def needs(strategy: Weighting) -> str:
    """What a step must give before, or after, the weights are known."""
    import torch

    found = []
    if isinstance(strategy, LossWeighting):
        known = strategy.weights(0, torch.arange(K)) is not None
        found.append("nothing" if known else "this step's losses")
    elif isinstance(strategy, GramianWeighting):
        places = {"shared": "shared", "last_shared": "last-layer", "features": "feature"}
        found.append(f"{places[strategy.wrt]} gradients")
    else:
        found.append("shared gradients")
    extra = {
        "batches": "three parts of the batch",
        "validation": "a virtual step on half the batch",
        "metrics": "validation metrics",
    }
    found += [extra[need] for need in strategy.needs if need != "rows"]
    found += ["a second forward pass"] if strategy.recompute else []
    found = found[1:] if found[0] == "nothing" and len(found) > 1 else found
    return ", ".join(found)


def state(strategy: Weighting) -> str:
    """What a checkpoint holds for the strategy, per task."""
    if "rows" in strategy.needs:
        return "a gradient per task"
    learned = sum(p.numel() for p in strategy.parameters()) // K
    kept = {n: b for n, b in strategy.state_dict().items() if n not in KEPT_FOR_ALL}
    kept = {n: b for n, b in kept.items() if n not in dict(strategy.named_parameters())}
    matrices = sum(b.ndim == 2 for b in kept.values())
    numbers = sum(b.ndim == 1 for b in kept.values())
    found = [f"{learned} learned"] if learned else []
    found += [f"{numbers} per task"] if numbers else []
    found += ["K x K"] if matrices else []
    return ", ".join(found) or "none"


def cost(strategy: Weighting) -> str:
    """Joint steps per step; forward : input gradient : weight gradient = 1 : 1 : 1."""
    if isinstance(strategy, LossWeighting):
        if "validation" in strategy.needs:
            return "7/3"  # two half batches forward and back, two forward
        return "4/3" if strategy.recompute else "1"
    if isinstance(strategy, GramianWeighting) and strategy.wrt != "shared":
        return "about 1"
    return "(1+2K)/3"


def strategies() -> list[str]:
    """One row per strategy, families together."""
    order = [name for _, name in FAMILIES]
    rows: list[tuple[int, list[str]]] = []
    for option in options("weighting"):
        strategy = build(option)
        if strategy is None:
            cells = [f"`{option.name}`", "any", paper(option), "as the wrapped class",
                     "the wrapped class's", "1 or (1+2K)/3", option.node["heads"]]  # fmt: skip
            rows.append((len(order), cells))
            continue
        cells = [f"`{option.name}`", family(strategy), paper(option), needs(strategy),
                 state(strategy), cost(strategy), strategy.heads]  # fmt: skip
        rows.append((order.index(family(strategy)), cells))
    rows.sort(key=lambda row: row[0])
    header = ["`weighting=`", "family", "paper", "needs", "state", "cost", "heads"]
    return table(header, [cells for _, cells in rows])


def strategy_keys() -> list[str]:
    """One row per strategy: what it does and the keys of its own."""
    rows = [
        [f"`{o.name}`", re.sub(r" \([^()]*\b\d{4}\)", "", o.comment), o.own_keys()]
        for o in options("weighting")
    ]
    return table(["`weighting=`", "what it does", "keys of its own, with defaults"], rows)


def tasks() -> list[str]:
    """One row per task: outputs, backbone and what it is."""
    rows = []
    for option in options("task"):
        outputs = [f"{name} ({spec['kind']})" for name, spec in option.node["outputs"].items()]
        rows.append([f"`{option.name}`", option.comment, ", ".join(outputs)])
    return table(["`task=`", "what it is", "outputs"], rows)


def plain(group: str, flag: str) -> Callable[[], list[str]]:
    """A table of names, first lines and commands."""

    def rows() -> list[str]:
        cells = [[f"`{o.name}`", o.comment, f"`{o.command}`"] for o in options(group)]
        return table([f"`{flag}=`", "what it is", "for example"], cells)

    return rows


TABLES: dict[str, Callable[[], list[str]]] = {
    "strategies": strategies,
    "strategy_keys": strategy_keys,
    "tasks": tasks,
    "backbones": plain("backbone", "backbone"),
    "schedules": plain("schedule", "schedule"),
    "losses": plain("loss", "losses.OUTPUT"),
    "heads": plain("head", "heads.OUTPUT"),
}


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def renew(text: str) -> str:
    """The text with every marked table made anew.

    Raises:
        SystemExit: a marker names no table.
    """

    def made(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise SystemExit(f"no table '{name}' (has {', '.join(TABLES)})")
        body = "\n".join(TABLES[name]())
        return f"<!-- table:{name} -->\n{body}\n<!-- /table:{name} -->"

    return MARKER.sub(made, text)


def documents() -> list[Path]:
    """The files that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(argv: Sequence[str]) -> int:
    """Write, or with ``--check`` compare; returns the exit code."""
    if unknown := [word for word in argv if word != "--check"]:
        raise SystemExit(f"unknown word {unknown[0]} (expected --check or nothing)")
    stale = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        fresh = renew(text)
        if fresh == text:
            continue
        stale.append(path)
        if "--check" not in argv:
            path.write_text(fresh, encoding="utf-8")
    for path in stale:
        verb = "is out of date; run: make docs" if "--check" in argv else "written"
        print(f"{path.relative_to(ROOT)} {verb}")
    return 1 if stale and "--check" in argv else 0


def _plain(value: Any) -> str:
    """A value as YAML writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
