"""Building real parts of a run in the test's own process."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from mtl_cli import build
from mtl_cli.compose import Composer
from mtl_cli.data.base import DataSet
from mtl_cli.launch import prepare
from mtl_cli.overrides import parse
from mtl_cli.run import Progress, StopFlag
from mtl_cli.work import Work

# One strategy per way of keeping state, for tests that are too dear for all of them by default.
ONE_OF_EACH = {
    "equal",
    "uncertainty",
    "dwa",
    "famo",
    "gradnorm",
    "pcgrad",
    "graddrop",
    "db_mtl",
    "modo",
}
CONF = Path(__file__).parent.parent / "conf"
SMALL = ("data.count=96", "data.image_size=16", "data.batch_size=16", "backbone.width=4")


def strategies() -> list[str]:
    """Every strategy that ships, by the name of its YAML."""
    return sorted(path.stem for path in (CONF / "weighting").glob("*.yaml"))


def marked_slow(names: list[str], quick: set[str]) -> list[Any]:
    """All names as parameters; those that are not ``quick`` run with ``-m slow`` only."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


def compose(*overrides: str) -> DictConfig:
    """Compose, normalise and check as the command line does."""
    return copy.deepcopy(_composed(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    command = parse(list(overrides))
    cfg, problems = prepare(Composer(), command)
    assert cfg is not None, problems
    assert not problems, problems
    return cfg


def config(*overrides: str) -> dict[str, Any]:
    """The config as plain values, small enough for a unit test."""
    return build.plain_config(compose(*SMALL, *overrides))


def make_work(*overrides: str, tasks: Path | None = None) -> Work:
    """The first stage of a run on the synthetic task, as ``mtl train`` would build it."""
    settings = config(*overrides)
    schedule = build.make(settings["schedule"], "schedule")
    stages = schedule.stages(tuple(settings["task"]["outputs"]))
    builder = build.StageBuilder(
        settings,
        Path(),
        schedule,
        torch.device("cpu"),
        Progress(),
        None,
        lambda line: None,
        StopFlag(),
    )
    work = builder.plan(stages[0])
    work.model.train()
    return work


def rest_batchnorm(work: Work) -> None:
    """Statistics of a batch depend on how it is cut; parity of the rest does not."""
    for module in work.model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def punch_holes(data: DataSet, share: float = 0.4) -> None:
    """Remove labels at random, different ones for every task."""
    generator = torch.Generator().manual_seed(1)
    for name, valid in data.valid.items():
        kept = torch.rand(valid.shape, generator=generator) > share
        data.valid[name] = valid & kept
        data.targets[name] = torch.where(
            data.valid[name], data.targets[name], torch.zeros_like(data.targets[name])
        )


def first_step(work: Work, world: int = 1, rank: int = 0) -> list[Any]:
    """The micro-batches of the first step."""
    batches = work.data.train_batches(
        stage=0, epoch=0, start=0, accumulate=work.accumulate, rank=rank, world=world
    )
    return next(batches)


def steps(work: Work, count: int) -> list[Any]:
    """The micro-batches of the first ``count`` steps."""
    found: list[Any] = []
    epoch = 0
    while len(found) < count:
        found += list(
            work.data.train_batches(
                stage=0, epoch=epoch, start=0, accumulate=work.accumulate, rank=0, world=1
            )
        )
        epoch += 1
    return found[:count]


def weights(work: Work) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten().double() for p in work.model.parameters()])


def digest(state: Any) -> str:
    """SHA-256 over a nested structure of tensors and plain values."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sha.update(value.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                sha.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif dataclasses.is_dataclass(value):
            add(dataclasses.asdict(value))  # type: ignore[arg-type]
        else:
            sha.update(repr(value).encode())

    add(state)
    return sha.hexdigest()
