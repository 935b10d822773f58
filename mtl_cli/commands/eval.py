"""``mtl eval RUN|CKPT [--split val|test] [--data PATH] [--json] [--allow-code PKG]``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_cli import allow
from mtl_cli.commands.arguments import split
from mtl_cli.errors import OK, ConfigError, nearest

USAGE = (
    "mtl eval RUN|CHECKPOINT [--split train|val|test] [--data PATH] [--name best|last] "
    "[--device D] [--json]"
)


def main(argv: Sequence[str]) -> int:
    """Entry of the command line."""
    from mtl_cli.console import say

    if "--help" in argv or "-h" in argv:
        say(
            f"{USAGE}\n\nJudge a trained run on a split, under its own config, the constant predictor beside it."
        )
        return OK
    return run(argv, say)


def run(args: Sequence[str], say: Callable[[str], None]) -> int:
    """Judge a trained run on a split, under its own config.

    Raises:
        ConfigError: wrong command line.
        CheckpointError: no usable checkpoint.
        DataError: the data are missing.
    """
    words, options = split(
        args, ("--split", "--data", "--device", "--allow-code", "--name"), ("--json",), USAGE
    )
    allow.allow(options.get("--allow-code", ""))
    if len(words) != 1:
        raise ConfigError(f"eval: expected one run or checkpoint; {USAGE}")
    name = options.get("--split", "val")
    if name not in ("train", "val", "test"):
        raise ConfigError(f"eval: --split: found '{name}', expected train, val or test")
    if "--name" in options:
        _refuse_unknown(Path(words[0]).expanduser(), options["--name"])
    result = judge(words[0], name, options)
    if "--json" in options:
        say(json.dumps(result, indent=1))
        return OK
    for line in table(result):
        say(line)
    return OK


def _refuse_unknown(path: Path, name: str) -> None:
    """Another checkpoint than the one that is asked for must not be judged in silence."""
    if path.is_file():
        raise ConfigError(f"eval: --name: {path} is a checkpoint already; name its run, or no name")
    known = sorted({"best", "last", *(file.stem for file in path.glob("checkpoints/*.pt"))})
    if name not in known:
        raise ConfigError(
            f"eval: --name: no such checkpoint (found '{name}', expected one of "
            f"{', '.join(known)}){nearest(name, known)}"
        )


def judge(run_path: str, split: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Metrics of a checkpoint on a split, the constant predictor beside them."""
    from mtl_cli import build, checkpoint, device, precision
    from mtl_cli.evaluate import constant_metrics, evaluate_model
    from mtl_cli.metrics import TaskMetrics

    path = checkpoint.find(Path(run_path).expanduser(), options.get("--name", "best"))
    state = checkpoint.load(path)
    config, tasks, model = build.reopen(state)
    if "--data" in options:
        config["data"] = {**config["data"], "root": options["--data"]}
    where = device.resolve(options.get("--device", "auto"))
    statistics = {t.name: {"center": t.center, "scale": t.scale} for t in tasks}
    data = build.open_data(config, where, statistics)
    losses = build.build_losses(config, tasks).to(where)
    dtype = precision.resolve(config["precision"]["dtype"], where)
    evaluation = evaluate_model(
        model.to(where), tasks, losses, data, state["baseline"], split, where, dtype
    )
    assert evaluation is not None
    constants = constant_metrics(tasks, data, split)
    per_class = {}
    for task in tasks:
        metrics = TaskMetrics(task)
        index = evaluation.index
        metrics.update(
            evaluation.raw[task.name], data.targets[task.name][index], data.valid[task.name][index]
        )
        per_class[task.name] = metrics.per_class()
    data.close()
    return {
        "checkpoint": str(path),
        "split": split,
        "samples": len(evaluation.index),
        "step": state["progress"]["total_steps"],
        "metrics": evaluation.metrics,
        "losses": evaluation.losses,
        "score": evaluation.score,
        "baseline": constants,
        "units": {t.name: t.unit for t in tasks},
        "per_class": per_class,
    }


def table(result: Mapping[str, Any]) -> list[str]:
    """The result as lines: a row per metric, then a row per class."""
    lines = [
        f"{result['checkpoint']} (step {result['step']}), {result['split']}: "
        f"{result['samples']} samples"
    ]
    for task, metrics in result["metrics"].items():
        for name, value in metrics.items():
            shown = "-" if value is None else f"{value:.6g}"
            unit = result["units"][task] if name in ("mae", "rmse") else ""
            constant = result["baseline"].get(task, {}).get(name)
            beside = "" if constant is None else f"(constant predictor {constant:.4g})"
            lines.append(f"  {task:<16} {name:<18} {shown} {unit} {beside}".rstrip())
    for task, rows in result["per_class"].items():
        for row in rows:
            figures = "  ".join(
                f"{key} {'-' if row[key] is None else format(row[key], '.3f')}"
                for key in ("precision", "recall", "f1")
            )
            lines.append(
                f"  {task:<16} {row['class']!s:<18} {int(row['labels'])} labels  {figures}"
            )
    return lines
