"""State of the strategies: saved, frozen for absent objectives, drawn by name and step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl_cli.weighting.laws import judge
from mtl_cli.weighting.zoo import matrix, run, some_losses, take_step
from tests.property.built import OURS, build, maker

RANDOM = ["rlw", "pcgrad", "gradvac", "graddrop"]


@pytest.mark.parametrize("options", [{}, {"transform": "initial"}], ids=["plain", "initial"])
@pytest.mark.parametrize("name", OURS)
def test_resumed_equals_uninterrupted_to_the_bit(name, options):
    found = judge("saved state", maker(name, **options))
    assert found.ok, found


@pytest.mark.parametrize("name", OURS)
def test_state_of_an_absent_objective_is_frozen(name):
    strategy = build(name, 5, transform="initial")
    run(strategy, 0, 4)
    for key, value in strategy.state_dict().items():
        assert value.ndim == 0 or value.shape[0] == 5, key
    found = judge("absent objectives", maker(name, transform="initial"))
    assert found.ok, found


@pytest.mark.parametrize("name", RANDOM)
def test_draws_depend_on_seed_and_step_alone(name):
    rows, losses = matrix("conflicting", 8), some_losses(8)

    def gradient(step: int, seed: int) -> Tensor:
        strategy = build(name, 8)
        strategy.seed = seed
        return take_step(strategy, rows, losses, step)[0]

    assert torch.equal(gradient(3, 1), gradient(3, 1))
    assert not torch.equal(gradient(3, 1), gradient(4, 1))
    assert not torch.equal(gradient(3, 1), gradient(3, 2))


@pytest.mark.parametrize("name", OURS)
def test_global_generators_are_left_alone(name):
    for law in ("global generators", "draws"):
        found = judge(law, maker(name))
        assert found.ok, found


def test_graddrop_does_not_depend_on_how_columns_are_split():
    strategy, rows = build("graddrop", 3), matrix("random", 3)
    present, losses = torch.arange(3), some_losses(3)
    whole = strategy.combine(rows, present, 5, 100, losses)
    pieces = [
        strategy.combine(rows[:, a:b], present, 5, 100 + a, losses)
        for a, b in ((0, 17), (17, 40), (40, 64))
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_weights_are_kept_between_solves():
    strategy = build("upgrad", 3, update_every=3)
    present = torch.arange(3)
    assert strategy.weights(0, present) is None
    _, solved = take_step(strategy, matrix("conflicting", 3), some_losses(3), 0)
    for step in (1, 2):
        kept = strategy.weights(step, present)
        assert kept is not None
        assert torch.equal(kept, solved)
    assert strategy.weights(3, present) is None
    fresh = build("upgrad", 3, update_every=3)
    assert fresh.weights(1, present) is None  # nothing kept yet
