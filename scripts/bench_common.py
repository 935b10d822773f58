"""What the benchmarks share: the machine, CPU time, peak memory, and parts of a run."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

MIB = 1 << 20


def machine() -> str:
    """One line: processor, cores, load, versions, threads."""
    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    load = os.getloadavg()[0]
    return (
        f"{name}, {os.cpu_count()} cores, load {load:.1f}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), CPU only"
    )


def cpu_and_wall(call: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of this process and wall seconds of one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - cpu, time.perf_counter() - wall


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def fastest(values: Sequence[float]) -> float:
    """Mean of the fastest quarter: what other processes disturb least."""
    return statistics.fmean(sorted(values)[: max(1, len(values) // 4)])


def spread(values: Sequence[float]) -> str:
    """``first quartile-third quartile``, or ``min-max`` of fewer than four values."""
    if len(values) < 4:
        return f"{min(values):.2f}-{max(values):.2f}"
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.2f}-{high:.2f}"


def resident_mib() -> float:
    """Resident memory of this process now, freed heap given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


def peak_mib() -> float:
    """Largest resident memory of this process so far.

    Not ``ru_maxrss``: that of a child starts at its parent's, across ``exec`` too.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (peak,) = (line for line in lines if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024


def tensor_peak_mib(call: Callable[[], Any]) -> float:
    """Peak of the tensors of a call above what lies before it, exact, whatever the allocator does.

    Only the second of two calls counts: what it frees was allocated under the profiler's eyes.
    """
    with silent_stderr(), torch.profiler.profile(profile_memory=True) as profiler:
        call()
        with torch.profiler.record_function("second call"):
            call()
    assert profiler.profiler is not None
    events = sorted(profiler.profiler.kineto_results.events(), key=lambda e: e.start_ns())
    start = next(i for i, e in enumerate(events) if e.name() == "second call")
    sizes = [e.nbytes() for e in events[start:] if e.name() == "[memory]"]
    levels = list(itertools.accumulate(sizes, initial=0))
    return (max(levels) - min(levels)) / MIB


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Leave out what native code writes to stderr (the profiler, about GPUs that are not there)."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def in_child(call: Callable[[], Any]) -> Any:
    """Result of a call in a forked process, so that its memory is its own.

    Fork before this process computes anything: OpenMP's threads do not survive a fork.
    """
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_answer, args=(call, theirs))
    child.start()
    theirs.close()
    try:
        result = mine.recv()
    except EOFError:
        raise SystemExit("a measuring process died; out of memory?") from None
    child.join()
    return result


def _answer(call: Callable[[], Any], pipe: Connection) -> None:
    pipe.send(call())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns aligned, the first one to the left."""
    widths = [max(len(str(row[i])) for row in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *others = cells
        padded = [f"{first:<{widths[0]}}"]
        padded += [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(head), line(rule), *(line(row) for row in rows)])


def verdict(value: float, target: float | None) -> str:
    """``<= 1.05 ok`` or ``<= 1.05 MISSED``; a dash without a target."""
    if target is None:
        return "-"
    return f"<= {target:.2f} {'ok' if value <= target else 'MISSED'}"


def settings(*overrides: str) -> dict[str, Any]:
    """The config that ``mtl train OVERRIDES`` would run, as plain values."""
    from mtl_cli import build
    from mtl_cli.compose import Composer
    from mtl_cli.launch import prepare
    from mtl_cli.overrides import parse

    cfg, problems = prepare(Composer(), parse(list(overrides)))
    if cfg is None or problems:
        raise SystemExit("\n".join(problems))
    return build.plain_config(cfg)
