"""Every strategy on the golden gradient matrices, each entry within its own tolerance."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_cli.weighting.gradient import GradDrop
from mtl_cli.weighting.gramian import surgery, vaccinate
from mtl_cli.weighting.loss_level import Equal
from mtl_cli.weighting.torchjd import from_torchjd
from tests.golden.reference import BUILD, golden, matrix, objectives, tensor

ROBUST = ("krum", "trimmed_mean")
ENTRIES = [e for e in golden()["aggregation"] if e["method"] not in ROBUST]


def name(entry: dict[str, Any]) -> str:
    keys = ("c", "alpha", "scale_mode", "step")
    chosen = [f"{k}{entry['params'][k]}" for k in keys if k in entry["params"]]
    return "-".join([entry["method"], entry["matrix"], *chosen])


def weights(entry: dict[str, Any], gramian: Tensor) -> Tensor:
    method, params, count = entry["method"], entry["params"], len(gramian)
    present = torch.arange(count)
    if method in ("sum", "mean"):
        known = Equal(objectives(count), reduction=method).weights(0, present)
        assert known is not None
        return Equal(objectives(count), reduction=method).rescale(known)
    if method == "pcgrad":
        return torch.from_numpy(surgery(gramian.numpy(), np.array(params["order"])).sum(0))
    if method == "gradvac":
        target = np.zeros((count, count))
        for _ in range(params["step"]):
            found, target = vaccinate(
                gramian.numpy(), np.array(params["order"]), target, params["beta"], params["eps"]
            )
        np.testing.assert_allclose(target, entry["rho_hat_after"], atol=1e-9)
        return torch.from_numpy(found.sum(0))
    return BUILD[method](count, params).solve(gramian, torch.ones(count).double(), present, 0)


def excess(entry: dict[str, Any], found: Tensor, rows: Tensor, wanted: Tensor) -> float:
    """Distance from the golden gradient in units of what the entry's tolerance allows."""
    tol = entry["tol"]
    relative = tol.get("g_rtol", tol.get("rtol", 1e-9))
    absolute = tol.get("g_atol_rel_to_max_row_norm", 1e-12) * float(rows.norm(dim=1).max())
    return float((found - wanted).norm()) / (relative * float(wanted.norm()) + absolute)


@pytest.mark.parametrize("entry", ENTRIES, ids=name)
def test_golden_gradient(entry):
    rows = matrix(entry["matrix"])
    found = weights(entry, rows @ rows.T) @ rows
    assert torch.isfinite(found).all()
    if entry["status"].startswith("ok"):
        wanted = tensor(entry["g"]) if entry["w"] is None else tensor(entry["w"]) @ rows
        assert excess(entry, found, rows, wanted) <= 1


@pytest.mark.skipif(importlib.util.find_spec("torchjd") is None, reason="torchjd is an extra")
@pytest.mark.parametrize(
    "entry", [e for e in golden()["aggregation"] if e["method"] in ROBUST], ids=name
)
def test_torchjd_robust_aggregators(entry):
    rows = matrix(entry["matrix"])
    present = torch.arange(len(rows))
    method = {"krum": "Krum", "trimmed_mean": "TrimmedMean"}[entry["method"]]
    strategy = from_torchjd(objectives(len(rows)), method=method, arguments=entry["params"])
    if method == "Krum":
        solved = strategy.solve(rows @ rows.T, torch.ones(len(rows)), present, 0)
        found, wanted = solved @ rows, tensor(entry["w"]) @ rows
    else:
        found = strategy.combine(rows, present, 0, 0, torch.ones(len(rows)))
        wanted = tensor(entry["g"])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("entry", golden()["graddrop"], ids=lambda e: e["matrix"])
def test_graddrop_two_point_law(entry):
    rows = matrix(entry["matrix"])
    present = torch.arange(len(rows))
    strategy = GradDrop(objectives(len(rows)), seed=5)
    losses = torch.ones(len(rows))
    draws = torch.stack([strategy.combine(rows, present, t, 0, losses) for t in range(2000)])
    positive, negative = tensor(entry["positive_part"]), tensor(entry["negative_part"])
    is_positive = torch.isclose(draws, positive, rtol=1e-9, atol=1e-12)
    assert (is_positive | torch.isclose(draws, negative, rtol=1e-9, atol=1e-12)).all()
    share = tensor(entry["keep_positive_probability"])
    spread = (share * (1 - share)).clamp_min(0).sqrt() * (positive - negative) / 2000**0.5
    assert ((draws.mean(0) - tensor(entry["expected_mean"])).abs() <= 4.5 * spread + 1e-9).all()
