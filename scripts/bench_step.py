"""What one optimizer step costs per strategy, in units of a joint step with equal weights.

    python scripts/bench_step.py --quick
    python scripts/bench_step.py --k 2 3 5 10 --rounds 9 --peers
    python scripts/bench_step.py --strategies mgda "mgda wrt=features" "famo lookahead=next_batch"

Every strategy takes ``mtl_cli.train.train_step`` on the same random batch, between two joint steps;
its ratio is CPU time over their mean, the median over the rounds. A joint step is one forward pass,
one pass for input gradients and one for weight gradients, each a third; K exact gradient rows
repeat the last two K times: (1 + 2K) / 3. ``--peers`` adds TorchJD's own ``mtl_backward`` and
``jac_to_grad`` (if installed) and a loop of K whole backward passes as LibMTL runs it. Memory is the
peak of the tensors that a step allocates, above a joint step's, in gradients of the shared part (P).
"""

# T = K objectives, P shared parameters, B batch, H W pixels

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bench_common import (
    MIB,
    cpu_and_wall,
    in_child,
    machine,
    median,
    peak_mib,
    settings,
    spread,
    table,
    tensor_peak_mib,
    verdict,
)
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mtl_cli import build, device
from mtl_cli.job import set_determinism
from mtl_cli.precision import as_input
from mtl_cli.task import Batch
from mtl_cli.train import train_step
from mtl_cli.work import Work

SIZE = 64
CLASSES = 5
STRATEGIES = (
    "uncertainty", "dwa", "rlw", "famo lookahead=next_batch", "famo",
    "gradnorm", "mgda wrt=features", "mgda wrt=last_shared", "mgda update_every=10",
    "mgda", "pcgrad", "cagrad", "nash_mtl", "upgrad", "imtl_g", "graddrop",
)  # fmt: skip
QUICK = (
    "uncertainty", "dwa", "gradnorm", "mgda wrt=features", "mgda update_every=10", "mgda",
    "graddrop",
)  # fmt: skip
PEERS = ("plain loop", "LibMTL-style", "TorchJD", "TorchJD chunk=1")
CPU = device.resolve("cpu")


@dataclass
class Method:
    """One way to take a step.

    Args:
        name: shown.
        parts: (share of the steps, step); the cost is their weighted sum.
        bound: arithmetic bound in joint steps.
        target: what it may cost.
        ours: runs under the tool's settings (deterministic kernels), the peers under torch's own.
    """

    name: str
    parts: list[tuple[float, Callable[[], Any]]]
    bound: float
    target: float | None
    ours: bool = True

    def step(self) -> None:
        """Every part once."""
        for _, part in self.parts:
            part()


class Bench:
    """K tasks on a ResNet-18, and every method on them.

    Args:
        count: K; classification and regression take turns.
        batch_size: B.
    """

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size
        self.names = [f"task{k}" for k in range(count)]
        self.config = self._config()
        self.schedule = build.make(self.config["schedule"], "schedule")
        (self.stage,) = self.schedule.stages(tuple(self.names))
        self.data = build.open_data(self.config, CPU)
        self.batch = self._batch()
        self.forward_flops, self.last_flops = 0, 0

    def _config(self) -> dict[str, Any]:
        config = settings(
            "task=synthetic", "backbone=resnet18", f"data.image_size={SIZE}", "data.count=80",
            f"data.batch_size={self.batch_size}", "precision=fp32", "optimizer.lr=1e-5",
            "data.cache=off", "heads.size=mlp",
        )  # fmt: skip
        task, heads, losses = (config[key] for key in ("task", "heads", "losses"))
        outputs = [
            {**task["outputs"]["size"], "column": "size"}
            if k % 2
            else {**task["outputs"]["shape"], "column": "shape"}
            for k in range(self.count)
        ]
        kinds = ["size" if k % 2 else "shape" for k in range(self.count)]
        config["task"] = {
            **task,
            "outputs": dict(zip(self.names, outputs, strict=True)),
            "metrics": {n: task["metrics"][k] for n, k in zip(self.names, kinds, strict=True)},
        }
        config["heads"] = dict.fromkeys(self.names, heads["size"])
        config["losses"] = {n: losses[k] for n, k in zip(self.names, kinds, strict=True)}
        return config

    def _batch(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        b = self.batch_size
        images = torch.randint(0, 256, (b, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
        targets = {
            name: torch.randn(b, generator=generator)
            if k % 2
            else torch.randint(0, CLASSES, (b,), generator=generator)
            for k, name in enumerate(self.names)
        }
        valid = {name: torch.ones(b, dtype=torch.bool) for name in self.names}
        return Batch(images, targets, valid, torch.arange(b))

    def work(self, strategy: str = "equal") -> Work:
        """What ``mtl train weighting=...`` would train with."""
        name, *options = strategy.split()
        overrides = [f"weighting={name}", *(f"weighting.{option}" for option in options)]
        config = {**self.config, "weighting": settings(*overrides)["weighting"]}
        work = build.assemble(config, self.stage, self.data, CPU, self.schedule)
        work.model.train()
        return work

    def ours(self, strategy: str) -> Method:
        """One of the tool's strategies, by its name and options."""
        work = self.work(strategy)
        every = int(getattr(work.weighting, "update_every", 1))

        def step(number: int) -> None:
            train_step(work, [self.batch], number, 0)

        if every == 1:
            parts: list[tuple[float, Callable[[], Any]]] = [(1.0, lambda: step(0))]
        else:
            parts = [(1 / every, lambda: step(0)), (1 - 1 / every, lambda: step(1))]
        return Method(strategy, parts, *self._limits(work, every))

    def _limits(self, work: Work, every: int) -> tuple[float, float]:
        """Arithmetic bound and target of a strategy."""
        exact = (1 + 2 * self.count) / 3
        wrt = getattr(work.weighting, "wrt", "")
        if work.weighting.recompute:
            return 4 / 3, 1.38
        if wrt == "shared" and every > 1:
            kept = (every - 1) / every
            # 1.16 is for K = 3 and every = 10; at K = 5 the bound alone is 1.27
            return exact / every + kept, max(1.16, 1.01 * (1.05 * exact / every + kept))
        if wrt == "shared":
            return exact, 1.05 * exact
        if wrt == "last_shared":
            return 1 + self.count * self._last_share() / 3, 1.18
        return 1.0, 1.05 if wrt == "features" else 1.03

    def _last_share(self) -> float:
        """Share of the last shared layer in the forward pass."""
        if not self.forward_flops:
            model = self.work().model
            with FlopCounterMode(display=False, depth=None) as counter:
                model(as_input(self.batch.images, "fp32"))
            counts = {name: sum(ops.values()) for name, ops in counter.flop_counts.items()}
            last = f"backbone.{model.backbone.last_shared()}"
            self.forward_flops = counts["Global"]
            self.last_flops = next(v for k, v in counts.items() if k.endswith(last))
        return self.last_flops / self.forward_flops

    def peer(self, name: str) -> Method:
        """Code that is not the tool's, on the same model, batch and optimizer."""
        model = build.build_model(self.config, self.data.tasks).train()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.05, fused=True)
        step = {
            "plain loop": lambda: plain_step(self, model, optimizer),
            "LibMTL-style": lambda: whole_passes(self, model, optimizer),
            "TorchJD": lambda: torchjd_step(self, model, optimizer, None),
            "TorchJD chunk=1": lambda: torchjd_step(self, model, optimizer, 1),
        }[name]
        bound = 1.0 if name == "plain loop" else (1 + 2 * self.count) / 3
        return Method(name, [(1.0, step)], bound, None, ours=False)

    def losses(self, features: dict[str, Tensor], model: Any) -> list[Tensor]:
        """Mean losses, as one would write them."""
        raw, targets = model.outputs(features), self.batch.targets
        return [
            F.l1_loss(raw[name].squeeze(1), targets[name])
            if k % 2
            else F.cross_entropy(raw[name], targets[name])
            for k, name in enumerate(self.names)
        ]


def plain_step(bench: Bench, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Sum of the losses, one backward pass."""
    losses = bench.losses(model.features(as_input(bench.batch.images, "fp32")), model)
    sum(losses).backward()
    optimizer.step()
    optimizer.zero_grad()


def whole_passes(bench: Bench, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """K backward passes through everything, rows copied into a flat matrix, combined, copied back.

    The combination has equal weights: no solver is timed, only what surrounds it.
    """
    optimizer.zero_grad()
    losses = bench.losses(model.features(as_input(bench.batch.images, "fp32")), model)
    shared = list(model.backbone.parameters())
    sizes = [p.numel() for p in shared]
    rows = torch.zeros(len(losses), sum(sizes))
    for k, loss in enumerate(losses):
        loss.backward(retain_graph=k + 1 < len(losses))
        start = 0
        for parameter, size in zip(shared, sizes, strict=True):
            rows[k, start : start + size] = parameter.grad.flatten()
            start += size
            parameter.grad = None
    gramian = rows @ rows.T
    weights = torch.full((len(losses),), 1 / len(losses)) * torch.isfinite(gramian).all()
    combined = sum(weights[k] * rows[k] for k in range(len(losses)))
    for parameter, piece in zip(shared, combined.split(sizes), strict=True):
        parameter.grad = piece.view_as(parameter).clone()
    optimizer.step()


def torchjd_step(
    bench: Bench, model: Any, optimizer: torch.optim.Optimizer, chunk: int | None
) -> None:
    """UPGrad by TorchJD: its defaults, or sequential passes and the Gramian summed by tensor."""
    from torchjd.aggregation import UPGrad
    from torchjd.autojac import jac_to_grad, mtl_backward

    features = model.features(as_input(bench.batch.images, "fp32"))
    losses = bench.losses(features, model)
    mtl_backward(losses, features=list(features.values()), parallel_chunk_size=chunk)
    jac_to_grad(
        model.backbone.parameters(), UPGrad(), optimize_gramian_computation=chunk is not None
    )
    optimizer.step()
    optimizer.zero_grad()


def torchjd_missing() -> str:
    """Why TorchJD cannot be measured; empty if it can."""
    try:
        from torchjd.aggregation import UPGrad

        UPGrad()
    except ImportError as error:
        return str(error).splitlines()[0]
    return ""


def known_peers(wanted: bool) -> list[str]:
    """The peers that can run here."""
    if not wanted:
        return []
    return [p for p in PEERS if not (p.startswith("TorchJD") and torchjd_missing())]


def compare(
    joint: Method, method: Method, config: dict[str, Any], rounds: int
) -> tuple[list[float], list[float]]:
    """Ratios of a step to the joint steps before and after it; seconds of the joint steps."""

    def seconds(measured: Method) -> float:
        if measured.ours:
            set_determinism(config, CPU)
        else:
            torch.use_deterministic_algorithms(False)
        return sum(share * cpu_and_wall(part)[0] for share, part in measured.parts)

    seconds(method)  # warm-up
    gc.collect()
    gc.disable()
    joints, ratios = [seconds(joint)], []
    for _ in range(rounds):
        own = seconds(method)
        joints.append(seconds(joint))
        ratios.append(own / ((joints[-2] + joints[-1]) / 2))
    gc.enable()
    return ratios, joints[1:]


def memory_of(make: Callable[[], Method]) -> float:
    """Peak resident MiB of a process that takes three steps."""

    def measure() -> float:
        method = make()
        for _ in range(3):
            method.step()
        return peak_mib()

    return float(in_child(measure))


def resident(bench: Bench, options: argparse.Namespace) -> dict[str, float]:
    """Peak resident MiB by method, the joint step's included."""
    found = {}
    for name in ("equal", *options.strategies):
        found[name] = memory_of(lambda name=name: bench.ours(name))
    for name in known_peers(options.peers):
        found[name] = memory_of(lambda name=name: bench.peer(name))
    return found


def measure(bench: Bench, rss: dict[str, float], options: argparse.Namespace) -> str:
    """The table of one K."""
    joint = bench.ours("equal")
    joint.step()
    floor = tensor_peak_mib(joint.step)
    row_mib = sum(p.numel() for p in bench.work().model.shared_parameters()) * 4 / MIB
    makers = [(bench.ours, name) for name in options.strategies]
    makers += [(bench.peer, name) for name in known_peers(options.peers)]
    rows, joints = [], []
    for make, name in makers:
        method = make(name)
        ratios, seconds = compare(joint, method, bench.config, options.rounds)
        joints += seconds
        extra = (tensor_peak_mib(method.parts[0][1]) - floor) / row_mib
        line = [name, f"{median(ratios):.3f}", spread(ratios), f"{method.bound:.2f}",
                verdict(median(ratios), method.target), f"{extra:+.2f} P"]  # fmt: skip
        if rss:
            line.append(f"{(rss[name] - rss['equal']) / row_mib:+.1f} P")
        rows.append(line)
    head = ["step", "ratio", "quartiles", "bound", "target", "tensors above joint"]
    head += ["resident above joint"] if rss else []
    facts = (
        f"K = {bench.count}: joint step {1e3 * median(joints):.0f} CPU-ms, its tensors {floor:.0f} "
        f"MiB at most; one gradient of the shared part, P = {row_mib:.1f} MiB"
    )
    return f"\n{facts}\n\n{table(head, rows)}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, nargs="+", default=[3], help="numbers of tasks")
    parser.add_argument("--strategies", nargs="+", help='such as mgda "mgda wrt=features"')
    parser.add_argument("--peers", action="store_true", help="measure TorchJD and LibMTL's way too")
    parser.add_argument("--rounds", type=int, help="measurements per strategy")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few strategies and rounds")
    parser.add_argument("--resident", action="store_true", help="peak of a process per strategy")
    options = parser.parse_args()
    options.strategies = options.strategies or (QUICK if options.quick else STRATEGIES)
    options.rounds = options.rounds or (5 if options.quick else 9)
    torch.set_num_threads(options.threads)
    known = {path.stem for path in (Path(build.__file__).parents[1] / "conf/weighting").glob("*")}
    if unknown := [s for s in options.strategies if known and s.split()[0] not in known]:
        parser.error(f"no such strategy: {', '.join(unknown)}")
    print(machine())
    print(f"resnet18, {SIZE} px, batch {options.batch}, fp32, {options.rounds} rounds")
    if options.peers and (missing := torchjd_missing()):
        print(f"TorchJD is left out: {missing}")
    benches = [Bench(count, options.batch) for count in options.k]
    # first: a process is forked before this one has computed anything
    rss = [resident(bench, options) if options.resident else {} for bench in benches]
    for bench, peaks in zip(benches, rss, strict=True):
        print(measure(bench, peaks, options), flush=True)


if __name__ == "__main__":
    main()
