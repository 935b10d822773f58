"""Transform, reduction, heads and the YAML files: what all strategies share."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest
import torch
import yaml

from mtl_cli.errors import ConfigError
from mtl_cli.weighting.base import GradientWeighting, GramianWeighting, LossWeighting
from mtl_cli.weighting.torchjd import from_torchjd
from mtl_cli.weighting.transform import transform
from mtl_cli.weighting.zoo import matrix, some_losses, take_step
from tests.golden.reference import objectives
from tests.property.built import FILES, NAMES, OURS, build, kind, settings, target

INJECTED = {"objectives", "seed"}


def parameters(called: Any) -> dict[str, inspect.Parameter]:
    """Constructor parameters, the bases' included where they are passed on as ``**common``."""
    if not isinstance(called, type):
        return dict(inspect.signature(called).parameters)
    found: dict[str, inspect.Parameter] = {}
    for base in called.__mro__:
        if "__init__" not in vars(base):
            continue
        own = dict(inspect.signature(base.__init__).parameters)
        passed_on = own.pop("common", None)
        found = {**own, **found}
        if passed_on is None:
            break
    return {k: v for k, v in found.items() if k != "self"}


@pytest.mark.parametrize("name", NAMES)
def test_yaml_keys_are_the_constructor_arguments(name):
    values = {k: v for k, v in settings(name).items() if k != "_target_"}
    accepted = {k: v for k, v in parameters(target(name)).items() if k not in INJECTED}
    assert set(values) == set(accepted)
    for key, parameter in accepted.items():
        default = parameter.default
        if default is not inspect.Parameter.empty and not (default is None and values[key] == {}):
            assert values[key] == default, key
            assert type(values[key]) is type(default), key


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_yaml_says_what_it_is(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert f"mtl train weighting={path.stem}" in lines[0]
    for line in lines[2:]:
        assert "  # " in line, line
    assert max(map(len, lines)) <= 160
    assert yaml.safe_load(path.read_text())["_target_"].startswith("mtl_cli.weighting.")


@pytest.mark.parametrize("name", OURS)
def test_reduction_changes_the_length_only(name):
    rows, losses = matrix("random", 4), some_losses(4)
    found = {
        r: take_step(build(name, 4, reduction=r), rows, losses) for r in ("paper", "sum", "mean")
    }
    unit = found["paper"][0] / found["paper"][0].norm()
    for reduction, goal in (("sum", 4.0), ("mean", 1.0)):
        gradient, weights = found[reduction]
        torch.testing.assert_close(gradient / gradient.norm(), unit)
        if not issubclass(kind(name), GradientWeighting):
            torch.testing.assert_close(weights.abs().sum(), torch.tensor(goal).double())
    torch.testing.assert_close(found["sum"][0], 4 * found["mean"][0])


@pytest.mark.parametrize(
    "name",
    [n for n in OURS if issubclass(kind(n), GramianWeighting) and not kind(n).positive_losses],
)
def test_log_transform_makes_the_scale_of_a_loss_irrelevant(name):
    rows, losses = matrix("random", 4), some_losses(4)
    factors = torch.tensor([1e-2, 1.0, 30.0, 1e3]).double()
    expected, _ = take_step(build(name, 4, transform="log"), rows, losses)
    found, _ = take_step(build(name, 4, transform="log"), rows * factors[:, None], losses * factors)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # log(L + 1e-8)


@pytest.mark.parametrize("name", [n for n in OURS if kind(n).positive_losses])
def test_log_transform_is_refused_where_losses_must_be_positive(name):
    with pytest.raises(ConfigError, match="needs losses > 0"):
        build(name, transform="log")


def test_transforms():
    losses = torch.tensor([0.5, 4.0, 0.0]).double()
    initial = torch.tensor([2.0, float("nan"), 1.0]).double()
    values, slopes = transform(losses, initial, "initial")
    torch.testing.assert_close(values, torch.tensor([0.25, 1.0, 0.0]).double())
    torch.testing.assert_close(slopes, torch.tensor([0.5, 0.25, 1.0]).double())
    values, slopes = transform(losses, initial, "log")
    torch.testing.assert_close(values[:2], losses[:2].log(), rtol=1e-7, atol=1e-7)
    assert torch.isfinite(slopes).all()
    assert torch.equal(transform(losses, initial, "identity")[0], losses)


def test_initial_losses_are_the_first_ones_of_each_objective():
    strategy = build("equal", 3, transform="initial")
    strategy.advance(0, torch.tensor([0, 1]), torch.tensor([2.0, 5.0]))
    strategy.advance(1, torch.arange(3), torch.tensor([1.0, 1.0, 8.0]))
    assert strategy.initial_losses.tolist() == [2.0, 5.0, 8.0]
    values, _ = strategy.transformed(torch.tensor([1.0, 1.0, 4.0]), torch.arange(3))
    torch.testing.assert_close(values, torch.tensor([0.5, 0.2, 0.5]).double())


@pytest.mark.parametrize("name", OURS)
def test_head_weights(name):
    strategy = build(name, 3)
    found = strategy.head_weights(torch.tensor([0.1, 2.0, 3.0]).double(), torch.arange(3))
    wanted = [0.1, 2.0, 3.0] if strategy.heads == "weighted" else [1.0, 1.0, 1.0]
    torch.testing.assert_close(found, torch.tensor(wanted).double())


@pytest.mark.parametrize("name", OURS)
def test_weights_known_beforehand_agree_with_the_objective(name):
    strategy = build(name, 3)
    if not isinstance(strategy, LossWeighting) or not strategy.affine:
        return
    known = strategy.weights(0, torch.arange(3))
    assert known is not None
    assert known.dtype == torch.float64
    assert not known.requires_grad


def test_fixed_weights_by_objective_and_task():
    strategy = build("fixed", 3, weights={"task07": 0.25})
    assert strategy.weights(0, torch.arange(3)).tolist() == [1.0, 0.25, 1.0]


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("fixed", {"weights": {"task7": 1}}, "did you mean 'task07'"),
        ("fixed", {"weights": {"task07": -1}}, "negative"),
        ("uncertainty", {"form": "halve"}, "did you mean 'half'"),
        ("dwa", {"window": "epochs"}, "weighting.window"),
        ("mgda", {"wrt": "feature"}, "did you mean 'features'"),
        ("mgda", {"transform": "ln"}, "weighting.transform"),
        ("mgda", {"reduction": "avg"}, "weighting.reduction"),
        ("stch", {"form": "nadir"}, "weighting.form"),
    ],
)
def test_wrong_options_are_named(name, options, says):
    with pytest.raises(ConfigError, match=says):
        build(name, 3, **options)


def test_torchjd_absent_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchjd.aggregation", None)
    with pytest.raises(ConfigError, match=r"pip install 'mtl-cli\[torchjd\]'"):
        from_torchjd(objectives(3), method="UPGrad")


@pytest.mark.skipif(importlib.util.find_spec("torchjd") is None, reason="torchjd is an extra")
class TestTorchJD:
    @pytest.mark.parametrize(
        ("method", "arguments"),
        [
            ("PCGrad", {}),
            ("MGDAWeighting", {}),
            ("AlignedMTL", {}),
            ("PCD", {}),
            ("Random", {}),
            ("Constant", {"weights": [1, 2, 3]}),
            ("ConFIG", {}),
            ("TrimmedMean", {"trim_number": 1}),
            ("CRMOGMWeighting", {"weighting": "MGDAWeighting"}),
            ("GeometricMean", {}),
            ("UW", {"shape": 3}),
        ],
    )
    def test_runs(self, method, arguments):
        strategy = build("torchjd", 3, method=method, arguments=arguments)
        gradient, _ = take_step(strategy, matrix("random", 3), some_losses(3))
        assert torch.isfinite(gradient).all()
        again, _ = take_step(strategy, matrix("random", 3), some_losses(3), 0)
        assert again.shape == gradient.shape

    @pytest.mark.parametrize(
        ("method", "arguments", "says"),
        [
            ("PCGrab", {}, "did you mean 'PCGrad'"),
            ("Krum", {}, "weighting.arguments"),
            ("SDMGradWeighting", {}, "weighting=sdmgrad"),
        ],
    )
    def test_refuses(self, method, arguments, says):
        with pytest.raises(ConfigError, match=says):
            from_torchjd(objectives(3), method=method, arguments=arguments)

    def test_agrees_where_torchjd_is_exact(self):
        rows, losses = matrix("random", 5), some_losses(5)
        for ours, theirs in (
            ("imtl_g", "IMTLG"),
            ("aligned_mtl", "AlignedMTL"),
            ("config", "ConFIG"),
        ):
            expected, _ = take_step(build("torchjd", 5, method=theirs), rows, losses)
            found, _ = take_step(build(ours, 5), rows, losses)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_double_sampling_agrees_with_torchjd(self):
        aggregation = pytest.importorskip("torchjd.aggregation")
        pairs = [
            (build("modo", 3, gamma=0.1, rho=0.1), aggregation.MoDoWeighting(0.1, 0.1)),
            (build("sdmgrad", 3), aggregation.SDMGradWeighting(lr=5.0)),
        ]
        for ours, theirs in pairs:
            for step in range(12):
                one, other = matrix("random", 8)[:3], matrix("random", 40)[step : step + 3]
                cross = one @ other.T
                found = ours.row_weights(cross, some_losses(3), torch.arange(3), step)
                torch.testing.assert_close(found, theirs(cross))

    def test_mgda_of_torchjd_is_longer_than_the_minimum(self):
        rows, losses = matrix("scaled", 8), some_losses(8)
        theirs, _ = take_step(build("torchjd", 8, method="MGDA"), rows, losses)
        ours, _ = take_step(build("mgda", 8), rows, losses)
        assert float(theirs.norm()) > 1.05 * float(ours.norm())
