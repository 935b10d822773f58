"""``mtl doctor``: does this machine do what training needs? ``mtl version``."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import mtl_cli
from mtl_cli.errors import OK, UNEXPECTED

Finding = tuple[bool | None, str, str]  # in order (None: only a hint), subject, what was found


def version(argv: Sequence[str] = ()) -> int:
    """Print the versions that matter; torch is not imported."""
    del argv
    words = [f"mtl {mtl_cli.__version__}"]
    words += [f"{name} {_installed(name)}" for name in ("torch", "torchvision", "hydra-core")]
    sys.stdout.write(", ".join([*words, f"Python {platform.python_version()}"]) + "\n")
    return OK


def main(argv: Sequence[str]) -> int:
    """Print one line per finding; exit 1 if training would not work."""
    if argv and argv[0] in {"-h", "--help"}:
        sys.stdout.write("usage: mtl doctor\n\nChecks torch, GPU, precision, disk and workers.\n")
        return OK
    version()
    bad = False
    for fine, subject, text in _findings():
        bad = bad or fine is False
        mark = {True: "ok", False: "BAD", None: "note"}[fine]
        sys.stdout.write(f"{mark:<5} {subject:<12} {text}\n")
        sys.stdout.flush()
    return UNEXPECTED if bad else OK


def _findings() -> Iterator[Finding]:
    yield _python()
    fit = _torchvision()
    yield fit
    if fit[0] is not False:
        yield from _accelerator()
        yield _precision()
    yield _config()
    yield _disk()
    yield _workers()
    yield _threads()


def _python() -> Finding:
    fine = sys.version_info >= (3, 10)
    return fine, "python", f"{platform.python_version()} (needs 3.10 or newer)"


def _torchvision() -> Finding:
    """The two must come from one index: a CPU torch beside a CUDA torchvision fails at import."""
    try:
        import torch
    except Exception as error:
        return False, "torch", f"cannot be imported ({_line(error)}); pip install torch torchvision"
    try:
        import torchvision
        from torchvision.ops import nms

        nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except Exception as error:
        return (
            False,
            "torchvision",
            f"does not fit torch {torch.__version__} ({_line(error)}); install both from one index",
        )
    return True, "torchvision", f"{torchvision.__version__} fits torch {torch.__version__}"


def _accelerator() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _cuda(index)
        return
    if torch.backends.mps.is_available():
        yield True, "gpu", "mps"
        return
    reason = _why_no_cuda()
    # A GPU that torch cannot use is an error for device=auto; no GPU at all is not.
    yield (None if reason is None else False), "gpu", reason or "none; training runs on the CPU"


def _cuda(index: int) -> Finding:
    import torch

    name = torch.cuda.get_device_name(index)
    try:
        square = torch.ones(64, 64, device=f"cuda:{index}")
        total = float((square @ square).sum())
        free, size = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return False, f"cuda:{index}", f"{name} does not compute ({_line(error)})"
    fine = total == 64.0**3
    return fine, f"cuda:{index}", f"{name}, {free / 2**30:.1f} of {size / 2**30:.1f} GiB free"


def _why_no_cuda() -> str | None:
    """Why a GPU that the driver sees cannot be used, None if there is none."""
    import torch

    if shutil.which("nvidia-smi") is None:
        return None
    answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    if answer.returncode != 0 or "GPU" not in answer.stdout:
        return None
    if torch.version.cuda is None:
        return "there is one, but this torch is a CPU build; install the CUDA build, or device=cpu"
    return (
        f"there is one, but torch (CUDA {torch.version.cuda}) cannot use it; "
        "the driver may be too old: nvidia-smi shows what it supports; or device=cpu"
    )


def _precision() -> Finding:
    import torch

    if torch.cuda.is_available():
        chosen = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return True, "precision", f"auto = {chosen}"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            native = any(word in line for line in lines for word in ("amx_bf16", "avx512_bf16"))
    except OSError:
        native = False
    hint = "; this CPU has bf16: precision=bf16 is faster" if native else ""
    return True, "precision", f"auto = fp32{hint}"


def _config() -> Finding:
    from mtl_cli.compose import Composer
    from mtl_cli.launch import prepare
    from mtl_cli.overrides import Command

    composer = Composer()
    _, problems = prepare(composer, Command([], []))
    text = problems[0] if problems else "the default config is in order"
    return not problems, "config", f"{composer.home}: {text}"


def _disk() -> Finding:
    free = shutil.disk_usage(".").free / 2**30
    writable = os.access(".", os.W_OK)
    text = f"{free:.1f} GiB free here" + ("" if writable else ", but this directory is read-only")
    return (writable and free > 0.5) or False, "disk", text


def _workers() -> Finding:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    try:
        shared = shutil.disk_usage("/dev/shm").free / 2**20
    except OSError:
        return True, "workers", f"{cores} cores"
    if shared < 128:
        text = f"{cores} cores, but only {shared:.0f} MiB in /dev/shm; use data.workers=0"
        return None, "workers", text
    return True, "workers", f"{cores} cores, {shared / 1024:.1f} GiB in /dev/shm"


def _threads() -> Finding:
    typed = os.environ.get("OMP_NUM_THREADS")
    return True, "threads", f"OMP_NUM_THREADS={typed}" if typed else "one per core"


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _installed(name: str) -> str:
    try:
        return installed(name)
    except PackageNotFoundError:
        return "missing"
