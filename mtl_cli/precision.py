"""Number formats: which autocast a run uses, and the loss scale that fp16 needs."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mtl_cli.data.base import normalise
from mtl_cli.errors import ConfigError

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(dtype: str, device: torch.device) -> str:
    """Turn ``auto`` into fp32, bf16 or fp16 (fp64 only where asked for: it checks numbers).

    CUDA: bf16 where the chip has it, else fp16 with loss scaling. CPU and MPS: fp32.

    Raises:
        ConfigError: unknown name, or fp16 on a device other than CUDA.
    """
    if dtype == "auto":
        if device.type != "cuda":
            return "fp32"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if dtype not in ("fp32", "fp64", *AUTOCAST):
        raise ConfigError(
            f"precision.dtype: unknown (found '{dtype}', expected auto, fp32, bf16, fp16 or fp64)"
        )
    if dtype == "fp16" and device.type != "cuda":
        raise ConfigError(
            f"precision: fp16 needs a CUDA device (found {device.type}); use precision=bf16 or fp32"
        )
    return dtype


def native_bf16_on_cpu() -> bool:
    """True where bf16 autocast is faster than fp32 on this processor."""
    return (
        bool(torch.cpu._is_avx512_bf16_supported())
        if hasattr(torch.cpu, "_is_avx512_bf16_supported")
        else False
    )


def as_input(images: Tensor, dtype: str) -> Tensor:
    """Uint8 pixels [B,3,H,W] -> what the network reads: normalised, float64 for fp64."""
    pixels = normalise(images)
    if pixels.is_cuda:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    return pixels.double() if dtype == "fp64" else pixels


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[None]:
    """The autocast context of a resolved dtype."""
    if dtype not in AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST[dtype])


class LossScale:
    """Dynamic loss scale for fp16, over all rows and optimizers of a step.

    torch's GradScaler skips each optimizer by itself; here a step is taken whole or not at all.
    """

    def __init__(self, initial: float = 1.0, growth_interval: int = 0) -> None:
        self.scale = initial
        self.growth_interval = growth_interval
        self.good_steps = 0

    @property
    def enabled(self) -> bool:
        """False for fp32 and bf16."""
        return self.growth_interval > 0

    def update(self, finite: bool) -> None:
        """Halve after an overflow, double after ``growth_interval`` good steps."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale *= 0.5
        elif self.good_steps == self.growth_interval:
            self.scale *= 2.0
            self.good_steps = 0

    def unscale_(self, grads: list[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if self.enabled and grads:
            torch._foreach_mul_(grads, 1.0 / self.scale)

    def state_dict(self) -> dict[str, float]:
        """Plain values."""
        return {"scale": self.scale, "good_steps": float(self.good_steps)}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.scale = state["scale"]
        self.good_steps = int(state["good_steps"])
