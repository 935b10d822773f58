"""What a run writes down: log lines, the best so far, skipped steps and checkpoints."""

# T objectives

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl_cli import __version__, dist
from mtl_cli.errors import CheckpointError, DataError, NonFiniteError
from mtl_cli.evaluate import Evaluation
from mtl_cli.metrics import direction
from mtl_cli.predictions import rows, to_csv
from mtl_cli.routes import StepReport
from mtl_cli.run import Run
from mtl_cli.task import Batch
from mtl_cli.work import Work

CONSECUTIVE_SKIPS = 10  # non-finite steps in a row that end a run
SKIP_WINDOW = 1000
SKIP_SHARE = 0.01  # of the last SKIP_WINDOW steps


def note_report(run: Run, work: Work, report: StepReport, micro: Sequence[Batch | None]) -> None:
    """Add a turn to the meter, or count it against the budget of non-finite steps."""
    if report.finite:
        work.meter.add(report)
        return
    if work.scale.enabled and bool(torch.isfinite(report.losses).all()):
        return  # fp16 overflow in the gradients: the scale has been halved, nothing is wrong
    progress = run.progress
    step = progress.total_steps
    progress.skipped = [s for s in progress.skipped if s > step - SKIP_WINDOW] + [step]
    message = describe_nonfinite(work, report, micro, step)
    in_a_row = len(progress.skipped) >= CONSECUTIVE_SKIPS and (
        progress.skipped[-CONSECUTIVE_SKIPS] == step - CONSECUTIVE_SKIPS + 1
    )
    share = len(progress.skipped) > max(CONSECUTIVE_SKIPS, SKIP_SHARE * SKIP_WINDOW)
    if work.on_nonfinite == "stop" or in_a_row or share:
        raise NonFiniteError(
            f"{message}; {len(progress.skipped)} steps skipped so far; checkpoints already "
            "written are intact: lower optimizer.lr, set clip_norm, or look at the files with 'mtl data "
            "check'"
        )
    run.display.message(f"{message}; step skipped")


def describe_nonfinite(
    work: Work, report: StepReport, micro: Sequence[Batch | None], step: int
) -> str:
    """Step, tasks, values and files of a non-finite step."""
    names = [work.objectives[i].name for i in report.present.tolist()]
    values = dict(zip(names, report.losses.tolist(), strict=True))
    bad = [n for n, v in values.items() if not math.isfinite(v)]
    what = f"loss of {', '.join(bad)}" if bad else "gradient of " + ", ".join(names)
    shown = ", ".join(f"{n} {v:.4g}" for n, v in values.items())
    index = torch.cat([b.index for b in micro if b is not None])
    files = [work.data.table.files[i] for i in index[:3].tolist()]
    return (
        f"step {step}: {what} is not finite (losses: {shown}; lr factor "
        f"{work.lr((step - 0.5) / max(1, work.total_steps)):.3g}; batch of {len(index)} with "
        f"{', '.join(files)})"
    )


def note_best(run: Run, work: Work, evaluation: Evaluation) -> tuple[str, ...]:
    """Compare with the best so far; names under which the checkpoint is to be linked.

    Raises:
        NonFiniteError: an output of the model is not finite: such a model is worth nothing.
    """
    refuse_nonfinite(run, work, evaluation)
    progress, names = run.progress, []
    record = {
        "step": progress.total_steps,
        "epoch": progress.epoch,
        "stage": work.stage.name,
        "score": evaluation.score,
        "metrics": evaluation.metrics,
    }
    progress.final = record
    if progress.best_by != work.best_by:
        if progress.best_score is not None:
            run.display.message(
                f"best_by: now {work.best_by or 'the mean gain'}; best.pt starts afresh with epoch "
                f"{progress.epoch}"
            )
        progress.best_by, progress.best_score = work.best_by, None
    value = evaluation.deciding(work.best_by)
    if progress.best_score is None or (value is not None and value > progress.best_score):
        progress.best_score = value if value is not None else float("-inf")
        progress.best, progress.waited = record, 0
        names.append("best")
        if dist.rank() == 0:
            save_predictions(run, work, evaluation)
    else:
        progress.waited += 1
    for task in work.tasks:
        gain = evaluation.gains.get(task.name)
        best = progress.best_task.get(task.name)
        if gain is not None and (best is None or gain > best["gain"]):
            value = evaluation.metrics[task.name][task.metrics[0]]
            progress.best_task[task.name] = {
                "gain": gain,
                "value": value,
                "step": progress.total_steps,
                "epoch": progress.epoch,
            }
            names.append(f"best_{task.name}")
    return tuple(names)


def refuse_nonfinite(run: Run, work: Work, evaluation: Evaluation) -> None:
    """Raise a NonFiniteError that names tasks and files if an output is not finite."""
    wrong = {
        name: ~torch.isfinite(raw).all(dim=1) for name, raw in evaluation.raw.items() if len(raw)
    }
    bad = [name for name, rows in wrong.items() if bool(rows.any())]
    if not bad:
        return
    rows = torch.stack([wrong[name] for name in bad]).any(dim=0)
    files = [work.data.table.files[i] for i in evaluation.index[rows][:3].tolist()]
    raise NonFiniteError(
        f"step {run.progress.total_steps}: evaluation: outputs of {', '.join(bad)} are not finite "
        f"for {int(rows.sum())} of {len(rows)} validation samples ({', '.join(files)}); checkpoints "
        "already written are intact: lower optimizer.lr or set clip_norm"
    )


def log_step(run: Run, work: Work, reports: Sequence[StepReport]) -> None:
    """One line of metrics.jsonl: mean losses and weights since the last one."""
    progress = run.progress
    names = [o.name for o in work.objectives]
    losses, weights, counts = work.meter.line
    means = [_mean(row, counts) for row in (losses, weights)]
    work.meter.line.zero_()
    record: dict[str, Any] = {
        "event": "train",
        "step": progress.total_steps,
        "epoch": round(progress.epoch + progress.step_in_epoch / work.data.steps_per_epoch, 6),
        "stage": work.stage.name,
        "losses": dict(zip(names, means[0], strict=True)),
        "weights": dict(zip(names, means[1], strict=True)),
        "lr": work.peak_lr * work.lr((progress.step - 0.5) / work.total_steps),
        "fallbacks": int(work.weighting.fallbacks),
    }
    for report in reports:
        if report.observed is not None and report.finite:
            record |= gradient_facts(report, names)
    if dist.rank() == 0:
        run.dir.log(record)
        run.dir.log_timing({"step": progress.total_steps, **run.clock.take()})
    run.display.step(record, run.clock, progress.step_in_epoch)


def gradient_facts(report: StepReport, names: Sequence[str]) -> dict[str, Any]:
    """Norms of the objectives' gradients, cosines to their mean, share of conflicting pairs.

    ``grad_wrt`` says of which gradients: those the strategy weighs, else those of the features.
    """
    assert report.observed is not None
    gramian = report.observed
    norms = gramian.diagonal().clamp(min=0).sqrt()
    mean_norm = gramian.mean().clamp(min=0).sqrt()
    cosines = gramian.mean(dim=1) / (norms * mean_norm).clamp(min=1e-30)
    pairs = gramian - torch.diag(gramian.diagonal())
    present = [names[i] for i in report.present.tolist()]
    count = max(1, len(present) * (len(present) - 1))
    return {
        "grad_wrt": report.wrt,
        "grad_norm": dict(zip(present, norms.tolist(), strict=True)),
        "cos": dict(zip(present, cosines.tolist(), strict=True)),
        "conflicts": int((pairs < 0).sum()) / count,
    }


def tell_metrics(work: Work, evaluation: Evaluation) -> None:
    """Hand the strategy each task's first metric as a number in [0, 1], more is better (DTP).

    An error (mae, rmse, mse) becomes exp(-error / error of the constant predictor).
    """
    if "metrics" not in work.weighting.needs:
        return
    known: dict[int, float] = {}
    for task in work.tasks:
        name = task.metrics[0]
        value = evaluation.metrics[task.name][name]
        reference = work.baseline[task.name][name]
        if value is None:
            continue
        if direction(name) == "min":
            value = math.exp(-value / reference) if reference else 0.0
        for index in work.engine.objectives_of(task.name):
            known[index] = min(1.0, max(0.0, value))
    present = torch.tensor(list(known), dtype=torch.int64)
    values = torch.tensor(list(known.values()), dtype=torch.float64)
    work.weighting.observe_metrics(present, values)  # type: ignore[operator]


def save_predictions(run: Run, work: Work, evaluation: Evaluation) -> None:
    """val_predictions.csv of the best checkpoint: prediction and label per image and task."""
    index = evaluation.index
    files = [work.data.table.files[i] for i in index.tolist()]
    labels = {
        t.name: (work.data.targets[t.name][index], work.data.valid[t.name][index])
        for t in work.tasks
    }
    table = rows(files, work.tasks, evaluation.raw, labels)
    run.dir.write_text("val_predictions.csv", to_csv(table))


def log_evaluation(run: Run, work: Work, evaluation: Evaluation, seconds: float) -> None:
    """One eval line in metrics.jsonl, the predictions of rank 0, the screen."""
    progress = run.progress
    names = [o.name for o in work.objectives]
    record = {
        "event": "eval",
        "step": progress.total_steps,
        "epoch": progress.epoch,
        "stage": work.stage.name,
        "split": "val",
        "losses": evaluation.losses,
        "metrics": evaluation.metrics,
        "score": evaluation.score,
        "train_losses": dict(
            zip(names, _mean(work.meter.epoch[0], work.meter.epoch[2]), strict=True)
        ),
        "weights": dict(zip(names, _mean(work.meter.epoch[1], work.meter.epoch[2]), strict=True)),
    }
    if dist.rank() == 0:
        run.dir.log(record)
        run.dir.log_timing({"step": progress.total_steps, "eval_seconds": round(seconds, 3)})
    run.display.epoch(record, progress, run.clock)


def save(run: Run, work: Work, names: tuple[str, ...] = ()) -> None:
    """Write the checkpoint (rank 0); everything that is not a function of the step."""
    if dist.rank() == 0:
        run.progress.log_bytes = run.dir.log_bytes()
        run.dir.checkpoints.save(run.progress.total_steps, state_of(run, work), names)
        run.clock.saved()
    dist.barrier()


def state_of(run: Run, work: Work) -> dict[str, Any]:
    """The checkpoint's content."""
    return {
        "version": __version__,
        "config": run.config_text,
        "tasks": [task.state() for task in work.tasks],
        "baseline": work.baseline,
        "data": work.data.fingerprint,
        "world": dist.world(),
        "device": work.device.type,
        "progress": run.progress.state_dict(),
        "model": dict(work.model.state_dict()),
        "ema": None if work.ema is None else dict(work.ema.state_dict()),
        "optimizers": {name: o.state_dict() for name, o in work.optimizers.items()},
        "weighting": dict(work.weighting.state_dict()),
        "scale": work.scale.state_dict(),
        "meter": work.meter.state_dict(),
        "clock": run.clock.state_dict(),
    }


def restore(work: Work, state: Mapping[str, Any]) -> None:
    """Put a checkpoint back into a freshly built stage.

    Raises:
        DataError: the data are not those of the checkpoint.
        CheckpointError: the parameters are grouped otherwise than in the checkpoint.
    """
    if state["data"] != work.data.fingerprint:
        raise DataError(
            "resume: the data differ from those of the checkpoint (other files, labels or split); "
            "restore them, or start a new run with init_from="
        )
    _load(work.model, state["model"])
    if work.ema is not None:
        _load(work.ema, state["ema"]) if state["ema"] else _load(work.ema.module, state["model"])
    for name, optimizer in work.optimizers.items():
        _restore_optimizer(optimizer, state["optimizers"][name])
    _load(work.weighting, state["weighting"])
    work.scale.load_state_dict(state["scale"])
    work.meter.load_state_dict(state["meter"])


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Take over the moments; hyper-parameters are those of the config, which may have changed.

    Only ``lr`` comes from the state: the schedule sets it anew at every step.
    """
    wanted = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    saved = state["param_groups"]
    if [g.get("names") for g in saved] != [g.get("names") for g in wanted]:
        raise CheckpointError(
            "resume: the optimizer's parameter groups differ from those of the checkpoint (freeze, "
            "lr_mult or layer_decay has changed); put it back, or start a new run with init_from="
        )
    optimizer.load_state_dict(dict(state))
    for group, own, old in zip(optimizer.param_groups, wanted, saved, strict=True):
        group.update(own, lr=old["lr"])


def _load(module: nn.Module, state: Mapping[str, Any]) -> None:
    module.load_state_dict(dict(state))


def _mean(total: Tensor, count: Tensor) -> list[float | None]:
    """Means, None where nothing was counted."""
    return [t / c if c else None for t, c in zip(total.tolist(), count.tolist(), strict=True)]
