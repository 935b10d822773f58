"""The tool against a hand-written PyTorch loop doing the same work: time and peak memory.

    python scripts/bench_overhead.py
    python scripts/bench_overhead.py --data UTKFace.tar.gz --rounds 41

ResNet-18 at 64 pixels, equal weights, AdamW (fused), random crop and flip of images from the same
decoded cache. The tool's side is ``mtl_cli.train.train_epoch`` with its logs; the other side is
``bench_plain.py``. Each side has a process of its own, as in life; chunks of steps alternate.
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
    MIB,
    cpu_and_wall,
    fastest,
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
        from mtl_cli import build, device
        from mtl_cli.console import Display
        from mtl_cli.run import Progress, Run, RunDir, StopFlag

        self.config, self.device = settled, device.resolve("cpu")
        progress, display = Progress(), Display("plain", rank=1)  # only rank 0 prints
        schedule = build.make(settled["schedule"], "schedule")
        stages = schedule.stages(tuple(settled["task"]["outputs"]))
        directory = RunDir(folder / "run")
        directory.open()
        directory.start_logs(0)
        builder = build.StageBuilder(
            settled,
            directory.path,
            schedule,
            self.device,
            progress,
            None,
            display.message,
            StopFlag(),
        )
        self.run = Run(directory, "", stages, builder, progress, StopFlag(), display)
        self.work = builder(stages[0])
        display.stage(stages[0].name, self.work)
        self.work.data.prepare()

    def epoch(self) -> int:
        """One pass; returns the number of steps."""
        from mtl_cli.job import set_determinism
        from mtl_cli.train import train_epoch

        set_determinism(self.config, self.device)
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


class Side:
    """One side in a process of its own, which rests while the other one runs.

    Args:
        name: tool or plain.
        argv: this script's arguments.
        folder: where the tool puts the data for the plain loop.
    """

    def __init__(self, name: str, argv: list[str], folder: Path) -> None:
        command = [sys.executable, __file__, *argv, "--side", name, "--folder", str(folder)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.reply()

    def ask(self, command: str) -> dict[str, float]:
        """Send one word, wait for the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self.reply()

    def reply(self) -> dict[str, float]:
        """Read one answer."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a measured process died; its message is above")
        found: dict[str, float] = json.loads(line)
        return found


def serve(options: argparse.Namespace) -> None:
    """Be one side: an epoch per line of stdin, then the memory."""
    folder = Path(options.folder)
    if options.side == "tool":
        side: Tool | PlainLoop = Tool(config(options), folder)
        side.arrays().save(folder)
        model: torch.nn.Module = side.work.model
    else:
        side = PlainLoop(Arrays.load(folder), SIZE, options.batch, LR)
        model = side.model
    built = resident_mib()
    side.epoch()  # warm-up: optimizer state, oneDNN's choice of kernels
    print("{}", flush=True)
    for line in sys.stdin:
        if line.strip() == "memory":
            moments = 2 * sum(p.numel() * p.element_size() for p in model.parameters()) / MIB
            answer = {"total": peak_mib(), "step": peak_mib() - built - moments}
        else:
            cpu, wall = cpu_and_wall(side.epoch)
            answer = {"cpu": cpu, "wall": wall}
        print(json.dumps(answer), flush=True)


def alternate(tool: Side, plain: Side, rounds: int) -> dict[str, list[float]]:
    """CPU and wall seconds per chunk of both sides, and their ratios, round by round."""
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        pair = [("tool", tool), ("plain", plain)]
        measured = {name: side.ask("run") for name, side in (pair if number % 2 else pair[::-1])}
        for clock in ("cpu", "wall"):
            for name, times in measured.items():
                found.setdefault(f"{name} {clock}", []).append(times[clock])
            ratio = measured["tool"][clock] / measured["plain"][clock]
            found.setdefault(f"ratio {clock}", []).append(ratio)
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
        tool, plain = (1e3 * fastest(times[f"{s} {clock}"]) / steps for s in ("tool", "plain"))
        rows.append(
            [f"{clock} ms, fastest quarter", f"{tool:.1f}", f"{plain:.1f}",
             f"{tool / plain:.3f}", "-"]
        )  # fmt: skip
    tool_memory, plain_memory = memory
    names = {
        "step": "peak MiB of a step: activations, gradients",
        "total": "peak MiB of the process",
    }
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
    parser.add_argument("--steps", type=int, default=2, help="steps per chunk")
    parser.add_argument("--rounds", type=int, default=15, help="chunks of either side")
    parser.add_argument("--side", choices=("tool", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.side:
        serve(options)
        return
    print(machine())
    print(
        f"task {'utkface' if options.data else 'synthetic'}, resnet18, {SIZE} px, "
        f"{options.rounds} chunks of {options.steps} steps of either side"
    )
    with tempfile.TemporaryDirectory() as folder:
        sides = [Side(name, sys.argv[1:], Path(folder)) for name in ("tool", "plain")]
        times = alternate(*sides, options.rounds)
        memory = [side.ask("memory") for side in sides]
        for side in sides:
            side.process.communicate()
    print(report(times, memory, options.steps, options.batch))


if __name__ == "__main__":
    main()
