"""State of the strategies: saved, frozen for absent objectives, drawn by name and step."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from mtl_cli.weighting.base import Weighting
from tests.property.zoo import OURS, build, matrix, some_losses, take_step

RANDOM = ["rlw", "pcgrad", "gradvac", "graddrop"]


def run(strategy: Weighting, first: int, last: int) -> list[Tensor]:
    """Steps of five objectives of which one or two are absent now and then."""
    seen = []
    for step in range(first, last):
        rows, losses = matrix("random", 5) * (1 + 0.3 * step), some_losses(5, step)
        present = torch.tensor([i for i in range(5) if (i + step) % 4 or step < 2])
        gradient, weights = take_step(strategy, rows[present], losses[present], step, present)
        seen += [gradient, weights]
        if step % 3 == 2:
            strategy.end_epoch()
        if "metrics" in strategy.needs:
            strategy.observe_metrics(present, torch.sigmoid(losses[present] - 2))  # type: ignore[operator]
        if "validation" in strategy.needs:
            strategy.observe_validation(present, losses[present], losses[present] * 0.9, 0.01, 0.1)  # type: ignore[operator]
    return seen


def tensors(strategy: Weighting) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in strategy.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"transform": "initial"}], ids=["plain", "initial"])
@pytest.mark.parametrize("name", OURS)
def test_resumed_equals_uninterrupted_to_the_bit(name, options):
    whole = build(name, 5, **options)
    expected = run(whole, 0, 12)
    before = build(name, 5, **options)
    run(before, 0, 7)
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    after = build(name, 5, **options)
    after.load_state_dict(torch.load(file, weights_only=True))
    found = run(after, 7, 12)
    for one, other in zip(expected[14:], found, strict=True):
        assert torch.equal(one, other)
    for key, value in tensors(whole).items():
        torch.testing.assert_close(tensors(after)[key], value, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OURS)
def test_state_of_an_absent_objective_is_frozen(name):
    strategy = build(name, 5, transform="initial")
    run(strategy, 0, 4)
    before = tensors(strategy)
    present = torch.tensor([0, 2, 4])
    rows, losses = matrix("conflicting", 5), some_losses(5, 77)
    take_step(strategy, rows[present], losses[present], 4, present)
    after = tensors(strategy)
    for key, value in before.items():
        if value.ndim == 0:
            continue
        assert value.shape[0] == 5, key
        for absent in (1, 3):
            torch.testing.assert_close(
                after[key][absent], value[absent], rtol=0, atol=0, equal_nan=True, msg=key
            )


@pytest.mark.parametrize("name", OURS)
def test_one_present_objective_is_enough(name):
    strategy = build(name, 5)
    run(strategy, 0, 4)
    rows, losses = matrix("random", 5), some_losses(5)
    for i in range(5):
        one = torch.tensor([i])
        gradient, weights = take_step(strategy, rows[one], losses[one], 4 + i, one)
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(weights).all()


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
    state = torch.get_rng_state()
    run(build(name, 5), 0, 3)
    assert torch.equal(torch.get_rng_state(), state)


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
