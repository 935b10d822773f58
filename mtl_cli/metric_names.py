"""Metric names by kind of output, and whether less or more is better. Plain data, no torch."""

from __future__ import annotations

METRICS: dict[str, dict[str, str]] = {
    "regression": {"mae": "min", "rmse": "min", "mse": "min", "r2": "max"},
    "binary": {"accuracy": "max", "f1": "max", "auroc": "max", "precision": "max", "recall": "max"},
    "multiclass": {"accuracy": "max", "f1": "max", "balanced_accuracy": "max"},
    "multilabel": {"f1": "max", "map": "max", "accuracy": "max", "auroc": "max"},
}
DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "regression": ("mae",),
    "binary": ("accuracy",),
    "multiclass": ("accuracy", "f1"),
    "multilabel": ("f1", "map"),
}
DEFAULT_HEAD: dict[str, str] = dict.fromkeys(METRICS, "linear")
DEFAULT_LOSS: dict[str, str] = {
    "regression": "l1",
    "binary": "bce",
    "multiclass": "cross_entropy",
    "multilabel": "multilabel_bce",
}
