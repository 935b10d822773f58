"""Train multi-task deep networks from config files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtl_cli.predict import Predictor

__version__ = "0.1.0"


def load(run: str, *, device: str = "auto") -> Predictor:
    """Load a trained run (its best checkpoint) or a checkpoint file for prediction.

    Args:
        run: a run directory or a checkpoint file.
        device: auto, cpu, cuda or mps.

    Raises:
        CheckpointError: there is no usable checkpoint.
    """
    from mtl_cli.predict import Predictor

    return Predictor.load(run, device=device)


def __dir__() -> list[Any]:
    return ["__version__", "load"]
