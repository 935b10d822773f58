"""Which device a run uses, and why not the GPU."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

from mtl_cli import dist
from mtl_cli.errors import ConfigError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def resolve(name: str) -> torch.device:
    """``auto`` is CUDA, then MPS, then the CPU, whose allocator is then made ready for training.

    Raises:
        ConfigError: the device is not there, or there is an NVIDIA GPU that torch cannot use.
    """
    if name == "auto":
        name = _automatic()
    try:
        device = torch.device(f"cuda:{dist.local_rank()}" if name == "cuda" else name)
    except RuntimeError as error:
        raise ConfigError(
            f"device: unknown (found '{name}', expected auto, cpu, cuda, cuda:N or mps)"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device: {name} cannot be used ({why_no_cuda()}); use device=cpu")
        if device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device: no {device} (found {torch.cuda.device_count()} CUDA devices)"
            )
        torch.cuda.set_device(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device: mps cannot be used on this machine; use device=cpu")
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def why_no_cuda() -> str:
    """One phrase on why torch has no CUDA device."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not nvidia_present():
        return "no NVIDIA driver on this machine"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    return (
        f"torch {torch.__version__} needs CUDA {torch.version.cuda}, which the installed NVIDIA "
        "driver does not offer; update the driver or install an older torch"
    )


def nvidia_present() -> bool:
    """True if an NVIDIA kernel driver is loaded."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


def _automatic() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if nvidia_present() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise ConfigError(
            f"device: there is an NVIDIA GPU but torch cannot use it ({why_no_cuda()}); "
            "device=cpu trains without it"
        )
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _keep_freed_memory() -> None:
    """Let glibc keep the pages that a step frees: the next step wants them again.

    By default it returns the top of the heap to the kernel after every step; 20,000 pages of a
    ResNet-18's activations and gradients are then faulted in and zeroed anew, 10 % of a step. The
    peak stays as it is. Other C libraries have no ``mallopt`` and keep their ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 32 << 20)  # glibc's largest
