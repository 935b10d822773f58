"""What the K x K problem of every Gramian strategy costs, and how exact the Gramian is.

    python scripts/bench_solvers.py
    python scripts/bench_solvers.py --k 3 10 --strategies mgda cagrad nash_mtl

The time is that of everything a strategy computes in a step: its weights from the Gramian and the
update of its state, without the rows. The Gramian is that of a ResNet-18's gradients, against the
same rows multiplied in float64.
"""

# K rows, P columns

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from bench_common import cpu_and_wall, machine, median, table
from torch import Tensor

from mtl_cli import build
from mtl_cli.rows import Grads, gramian_of
from mtl_cli.task import Objective
from mtl_cli.weighting.base import GramianWeighting, Weighting

CONF = Path(__file__).resolve().parents[1] / "conf" / "weighting"
TARGET_US = {2: 200, 3: 200, 5: 200, 10: 500, 40: 5000}
TARGET_ERROR = 2e-5


def strategy(name: str, count: int) -> Weighting | None:
    """A strategy with the values of its YAML over K objectives; None where it takes no Gramian."""
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    if name == "torchjd":  # another library's solvers
        return None
    objectives = [Objective(f"task{k:02}", f"task{k:02}") for k in range(count)]
    built: Weighting = build.make(node, "weighting", objectives=objectives, seed=0)
    return built if isinstance(built, GramianWeighting) else None


def gramians(count: int, number: int) -> list[Tensor]:
    """Gramians of random rows that conflict, their lengths spread over two decades."""
    generator = torch.Generator().manual_seed(count)
    found = []
    for _ in range(number):
        rows = torch.randn(count, 2 * count, generator=generator, dtype=torch.float64)
        common = torch.randn(2 * count, generator=generator, dtype=torch.float64)
        signs = torch.randint(0, 2, (count, 1), generator=generator) * 2 - 1
        length = 10 ** (2 * torch.rand(count, 1, generator=generator, dtype=torch.float64) - 1)
        rows = length * (rows + 0.5 * signs * common)
        found.append(rows @ rows.T)
    return found


def solve_us(weighting: GramianWeighting, matrices: Sequence[Tensor], repeats: int) -> list[float]:
    """Microseconds of one step per matrix, the fastest of the repeats."""
    count = len(matrices[0])
    present, losses = torch.arange(count), torch.linspace(0.5, 2.0, count, dtype=torch.float64)

    def step(gramian: Tensor, number: int) -> None:
        weights = weighting.weights(number, present)
        if weights is None:
            weights = weighting.row_weights(gramian, losses, present, number)
        weighting.rescale(weights)
        weighting.update(number, present, losses, gramian)

    step(matrices[0], 0)
    return [
        min(1e6 * cpu_and_wall(lambda g=g, n=n: step(g, n))[0] for n in range(repeats))
        for g in matrices
    ]


def solver_table(names: Sequence[str], counts: Sequence[int], number: int, repeats: int) -> str:
    """Median and slowest time per strategy and K; a star where the median misses the target."""
    rows = []
    for name in names:
        cells = []
        for count in counts:
            weighting = strategy(name, count)
            if not isinstance(weighting, GramianWeighting):
                break
            times = solve_us(weighting, gramians(count, number), repeats)
            missed = median(times) > TARGET_US.get(count, float("inf"))
            cells.append(f"{median(times):.0f} ({max(times):.0f}){'*' if missed else ''}")
        if cells:
            rows.append([name, *cells])
    head = ["us: median (slowest matrix)", *(f"K = {count}" for count in counts)]
    targets = ["target", *(f"{TARGET_US.get(count, '-')}" for count in counts)]
    return table(head, [*rows, targets])


def network_rows(count: int) -> list[Grads]:
    """Gradients of K classification losses in the parameters of a ResNet-18."""
    from torchvision.models import resnet18

    torch.manual_seed(0)
    trunk = resnet18(weights=None)
    trunk.fc = torch.nn.Identity()
    features = trunk(torch.randn(16, 3, 64, 64))
    parameters = list(trunk.parameters())
    rows = []
    for _ in range(count):
        head = torch.nn.Linear(512, 5)
        loss = F.cross_entropy(head(features), torch.randint(0, 5, (16,)))
        rows.append(list(torch.autograd.grad(loss, parameters, retain_graph=True)))
    return rows


def gramian_table(count: int, repeats: int) -> str:
    """Error against float64 and time, by tensors and as one flat float32 product."""
    real = network_rows(count)
    generator = torch.Generator().manual_seed(1)
    noise = [[torch.randn(t.shape, generator=generator) for t in row] for row in real]
    lines = []
    for name, rows in (("ResNet-18 gradients", real), ("standard normal", noise)):
        flat = torch.stack([torch.cat([t.flatten() for t in row]) for row in rows])
        exact = flat.double() @ flat.double().T
        scale = exact.diagonal().sqrt()
        ways = {
            "by tensor, float64 sums": lambda rows=rows: gramian_of(rows),
            "flat float32 product": lambda flat=flat: flat @ flat.T,
        }
        for way, call in ways.items():
            error = float(((call().double() - exact).abs() / torch.outer(scale, scale)).max())
            times = [1e3 * cpu_and_wall(call)[0] for _ in range(repeats)]
            ours = way.startswith("by")
            judged = ("ok" if error <= TARGET_ERROR else "MISSED") if ours else "-"
            lines.append([f"{name}: {way}", f"{error:.1e}", judged, f"{median(times):.1f}"])
    return table(
        [f"Gramian, K = {count}, P = 11.2 M", "error", f"<= {TARGET_ERROR:.0e}", "CPU ms"], lines
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, nargs="+", default=[2, 3, 5, 10, 40])
    parser.add_argument("--strategies", nargs="+")
    parser.add_argument("--matrices", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.strategies or sorted(path.stem for path in CONF.glob("*.yaml"))
    print(machine())
    print(f"\n{solver_table(names, options.k, options.matrices, options.repeats)}")
    print("\n* over the target\n")
    print(gramian_table(3, options.repeats))


if __name__ == "__main__":
    main()
