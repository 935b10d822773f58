"""The tool against a hand-written PyTorch loop doing the same work: time and peak memory.

    python scripts/bench_overhead.py
    python scripts/bench_overhead.py --data UTKFace.tar.gz --rounds 21

ResNet-18 at 64 pixels, equal weights, AdamW (fused), random crop and flip of images from the same
decoded cache. The tool's side is ``mtl_cli.train.train_epoch`` with its logs; the other side is
``bench_plain.py``. Chunks of steps alternate in one process; memory is measured in a process each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_common import (
    cpu_and_wall,
    machine,
    median,
    peak_mib,
    resident_mib,
    settings,
    spread,
    table,
    verdict,
)
from bench_plain import IGNORED, Arrays, PlainLoop

SIZE = 64
LR = 1e-4
TARGET_TIME, TARGET_MEMORY = 1.05, 1.10


def config(options: argparse.Namespace) -> dict[str, Any]:
    """The tool's config: UTKFace where its archive is given, else the synthetic task."""
    task = (
        ["task=utkface", f"data.root={options.data}"]
        if options.data
        else ["task=synthetic", "data.margin=0.125"]
    )
    return settings(
        *task,
        "backbone=resnet18",
        f"data.image_size={SIZE}",
        f"data.batch_size={options.batch}",
        f"data.limit={options.batch * options.steps}",
        "data.cache=disk",
        f"optimizer.lr={LR}",
        "epochs=1000",
        "precision=fp32",
        "display=plain",
    )


class Tool:
    """A run of the tool without evaluation and checkpoints, an epoch at a time."""

    def __init__(self, settled: dict[str, Any], folder: Path) -> None:
        from mtl_cli import build
        from mtl_cli.console import Display
        from mtl_cli.run import Progress, Run, RunDir, StopFlag

        self.config = settled
        progress, display = Progress(), Display("plain", rank=1)  # only rank 0 prints
        schedule = build.make(settled["schedule"], "schedule")
        stages = schedule.stages(tuple(settled["task"]["outputs"]))
        directory = RunDir(folder / "run")
        directory.open()
        directory.start_logs(0)
        builder = build.StageBuilder(
            settled, directory.path, schedule, torch.device("cpu"), progress, None, display.message
        )
        self.run = Run(directory, "", stages, builder, progress, StopFlag(), display)
        self.work = builder(stages[0])
        display.stage(stages[0].name, self.work)
        self.work.data.prepare()

    def epoch(self) -> int:
        """One pass; returns the number of steps."""
        from mtl_cli.job import set_determinism
        from mtl_cli.train import train_epoch

        set_determinism(self.config, torch.device("cpu"))
        progress = self.run.progress
        train_epoch(self.run, self.work)
        steps, progress.step_in_epoch = progress.step_in_epoch, 0
        progress.epoch += 1
        torch.use_deterministic_algorithms(False)
        return steps

    def arrays(self) -> Arrays:
        """The same data for the plain loop."""
        data = self.work.data
        targets = {}
        for task in self.work.tasks:
            target, valid = data.targets[task.name], data.valid[task.name]
            rows = data.splits["train"]
            if task.kind == "multiclass":
                target = torch.where(valid, target, IGNORED)
            elif not bool(valid[rows].all()):
                raise SystemExit(f"the plain loop has no mask for missing {task.name} labels")
            targets[task.name] = target
        store: Any = data.store
        first: Any = self.work.model.heads[self.work.tasks[0].name]
        hidden = [m.out_features for m in first.layers if isinstance(m, torch.nn.Linear)][:-1]
        return Arrays(
            pixels=str(store.path / "pixels.u8"),
            side=store.size,
            rows=data.splits["train"].tolist(),
            kinds={t.name: t.kind for t in self.work.tasks},
            widths={t.name: t.width for t in self.work.tasks},
            hidden=hidden[0] if hidden else 0,
            targets=targets,
        )


def plain_loop(folder: Path, options: argparse.Namespace) -> PlainLoop:
    """The loop on the data that the tool wrote into ``folder``."""
    return PlainLoop(Arrays.load(folder), SIZE, options.batch, LR)


def time_both(tool: Tool, plain: PlainLoop, rounds: int) -> dict[str, list[float]]:
    """CPU and wall milliseconds per step of both sides, and their ratios, round by round."""
    found: dict[str, list[float]] = {}
    for number in range(-1, rounds):
        sides = [("tool", tool), ("plain", plain)]
        measured = {}
        for name, side in sides if number % 2 else sides[::-1]:
            cpu, wall = cpu_and_wall(side.epoch)
            measured[name] = cpu, wall
        if number < 0:
            continue  # warm-up: optimizer state, oneDNN's choice of kernels
        for i, clock in enumerate(("cpu", "wall")):
            for name in measured:
                found.setdefault(f"{name} {clock}", []).append(measured[name][i])
            ratio = measured["tool"][i] / measured["plain"][i]
            found.setdefault(f"ratio {clock}", []).append(ratio)
    return found


def measure_memory(options: argparse.Namespace) -> None:
    """Run one side alone and print its memory as JSON (started by :func:`memory_of`)."""
    folder = Path(options.folder)
    if options.memory == "tool":
        from mtl_cli import build, console, job, train  # noqa: F401 - before the first reading

        start = resident_mib()
        side: Tool | PlainLoop = Tool(config(options), folder)
        model: torch.nn.Module = side.work.model
    else:
        start = resident_mib()
        side = plain_loop(folder, options)
        model = side.model
    for _ in range(2):
        side.epoch()
    bytes_ = sum(p.numel() * p.element_size() for p in model.parameters())
    fixed = 3 * bytes_ / 2**20  # weights and AdamW's two moments
    peak = peak_mib()
    print(json.dumps({"total": peak, "above": peak - start - fixed, "start": start}))


def memory_of(side: str, folder: Path, argv: list[str]) -> dict[str, float]:
    """Memory of one side in a process of its own."""
    command = [sys.executable, __file__, *argv, "--memory", side, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def report(
    times: dict[str, list[float]], memory: list[dict[str, float]], steps: int, batch: int
) -> str:
    """Both tables."""
    rows = []
    for clock in ("cpu", "wall"):
        tool, plain = (1e3 * median(times[f"{s} {clock}"]) / steps for s in ("tool", "plain"))
        ratios = times[f"ratio {clock}"]
        target = TARGET_TIME if clock == "cpu" else None
        rows.append(
            [f"{clock} ms per step of {batch}", f"{tool:.1f}", f"{plain:.1f}",
             f"{median(ratios):.3f} ({spread(ratios)})", verdict(median(ratios), target)]
        )  # fmt: skip
    tool_memory, plain_memory = memory
    names = {"above": "peak MiB above imports, model, optimizer", "total": "peak MiB in all"}
    for key, name in names.items():
        ratio = tool_memory[key] / plain_memory[key]
        rows.append(
            [name, f"{tool_memory[key]:.0f}", f"{plain_memory[key]:.0f}", f"{ratio:.3f}",
             verdict(ratio, TARGET_MEMORY)]
        )  # fmt: skip
    return table(["", "mtl", "plain loop", "ratio (quartiles)", "target"], rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="UTKFace folder or archive; without it the synthetic task")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3, help="steps per chunk")
    parser.add_argument("--rounds", type=int, default=11, help="chunks of either side")
    parser.add_argument("--memory", choices=("tool", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory:
        measure_memory(options)
        return
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tool = Tool(config(options), folder)
        tool.arrays().save(folder)
        plain = plain_loop(folder, options)
        print(
            f"task {tool.config['task']['name']}, {options.rounds} chunks of {options.steps} steps"
        )
        times = time_both(tool, plain, options.rounds)
        tool.run.dir.close()
        memory = [memory_of(side, folder, sys.argv[1:]) for side in ("tool", "plain")]
    print(report(times, memory, options.steps, options.batch))


if __name__ == "__main__":
    main()
