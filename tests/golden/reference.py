"""Reading golden.json, and the strategies in the forms that its entries name."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl_cli.task import Objective
from mtl_cli.weighting.base import GramianWeighting
from mtl_cli.weighting.gramian import (
    IMTLG,
    MGDA,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    NashMTL,
    UPGrad,
)
from mtl_cli.weighting.row_state import DBMTL
from mtl_cli.weighting.stochastic import SDMGrad


@cache
def golden() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "golden.json").read_text())


def objectives(count: int, likelihood: str | None = None) -> list[Objective]:
    return [Objective(f"t{i:02}", f"t{i:02}", likelihood) for i in range(count)]


def matrix(name: str) -> Tensor:
    return torch.tensor(golden()["matrices"][name]["J"], dtype=torch.float64)


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


BUILD: dict[str, Callable[[int, dict[str, Any]], GramianWeighting]] = {
    "mgda": lambda k, p: MGDA(objectives(k), normalization=p["normalization"]),
    "mgda_l2": lambda k, p: MGDA(objectives(k), normalization=p["normalization"]),
    "cagrad": lambda k, p: CAGrad(objectives(k), c=p["c"], rescale=p["rescale"]),
    "nash": lambda k, p: NashMTL(objectives(k), max_norm=p["max_norm"]),
    "fairgrad": lambda k, p: FairGrad(objectives(k), alpha=p["alpha"], max_norm=0),
    "imtl_g": lambda k, p: IMTLG(objectives(k)),
    "aligned_mtl": lambda k, p: AlignedMTL(objectives(k), scale_mode=p["scale_mode"]),
    "upgrad": lambda k, p: UPGrad(objectives(k), reg_eps=p["reg_eps"], norm_eps=p["norm_eps"]),
    "upgrad_exact": lambda k, p: UPGrad(objectives(k)),
    "dualproj": lambda k, p: DualProj(objectives(k), reg_eps=p["reg_eps"], norm_eps=p["norm_eps"]),
    "dualproj_exact": lambda k, p: DualProj(objectives(k)),
    "dbmtl_gradnorm": lambda k, p: DBMTL(objectives(k), beta=p["beta"], eps=p["eps"]),
    "config": lambda k, p: ConFIG(objectives(k)),
    "sdmgrad": lambda k, p: SDMGrad(
        objectives(k),
        mean_pull=p["lambda"],
        lr=p["lr"],
        momentum=p["momentum"],
        iterations=p["n_iter"],
    ),
}
