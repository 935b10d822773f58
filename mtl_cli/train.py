"""Training, in the order it runs: train -> run_stage -> train_epoch -> train_step."""

# T objectives, B batch

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from mtl_cli import dist
from mtl_cli.checkpoint import find
from mtl_cli.errors import ResourceError
from mtl_cli.evaluate import evaluate
from mtl_cli.params import format_table, set_train_mode, set_trainable
from mtl_cli.parts import split_parts
from mtl_cli.passes import forward, label_counts, look_ahead, seed_step
from mtl_cli.record import log_evaluation, log_step, note_best, note_report, save, tell_metrics
from mtl_cli.routes import StepReport, Update
from mtl_cli.run import Run, Stopped
from mtl_cli.task import Batch
from mtl_cli.validation import probe_validation
from mtl_cli.work import Work


def train(run: Run) -> None:
    """Run every stage that is not finished yet.

    Raises:
        Stopped: a signal came; the checkpoint is written.
        NonFiniteError: more non-finite steps than the budget.
    """
    while not run.progress.finished:
        stage = run.stages[run.progress.stage]
        work: Work = run.stage(stage)
        run.display.stage(stage.name, work)
        if dist.rank() == 0:
            name = "params.txt" if len(run.stages) == 1 else f"params_{stage.name}.txt"
            run.dir.write_text(name, "".join(f"{line}\n" for line in format_table(work.rows)))
        run_stage(run, work)
        earlier = [o for o in run.progress.outcomes if o["stage"] != stage.name]
        run.progress.outcomes = [*earlier, {"stage": stage.name, "best": run.progress.best}]
        if stage.index + 1 < len(run.stages):
            if dist.rank() == 0:
                for kind in ("best", "last"):
                    run.dir.checkpoints.link(find(run.dir.path, kind), f"{stage.name}_{kind}")
            dist.barrier()
            run.progress.next_stage()
        else:
            run.progress.finished = True
            save(run, work)
        work.data.close()


def run_stage(run: Run, work: Work) -> None:
    """Epochs of training and evaluation, until they are done or patience runs out."""
    progress = run.progress
    while progress.epoch < work.epochs and not out_of_patience(run, work):
        set_trainable(work.rows, progress.epoch)
        if progress.step_in_epoch < work.data.steps_per_epoch:
            train_epoch(run, work)
        stop_here(run, work)
        started = time.perf_counter()
        evaluation = evaluate(work, "val", stop=run.stop)
        if evaluation is None:  # a signal came in between: evaluate again after the resume
            stop_here(run, work)
            raise AssertionError("evaluate returns None only when a stop is asked for")
        work.weighting.end_epoch()
        tell_metrics(work, evaluation)
        progress.epoch += 1
        progress.step_in_epoch = 0
        names = note_best(run, work, evaluation)
        seconds = time.perf_counter() - started
        run.clock.evaluated_s += seconds
        log_evaluation(run, work, evaluation, seconds)
        work.meter.epoch.zero_()
        save(run, work, names)


def out_of_patience(run: Run, work: Work) -> bool:
    """True if the score has not risen for ``patience`` evaluations."""
    waited = run.progress.waited
    if work.patience is None or waited < work.patience:
        return False
    run.display.message(f"no gain for {waited} evaluations: stage {work.stage.name} ends early")
    return True


def train_epoch(run: Run, work: Work) -> None:
    """The rest of the current epoch, from ``step_in_epoch`` on."""
    progress = run.progress
    set_train_mode(work.model, work.rows)
    batches = work.data.train_batches(
        stage=work.stage.index,
        epoch=progress.epoch,
        start=progress.step_in_epoch,
        accumulate=work.accumulate,
        rank=dist.rank(),
        world=dist.world(),
    )
    for micro in timed(run, work, batches):
        logged = (progress.total_steps + 1) % work.log_every_steps == 0
        reports = train_step(work, micro, progress.step, progress.epoch, observe=logged)
        progress.step += 1
        progress.step_in_epoch += 1
        progress.total_steps += 1
        for report in reports:
            note_report(run, work, report, micro)
        if logged:
            log_step(run, work, reports)
        if work.save_every_steps and progress.total_steps % work.save_every_steps == 0:
            save(run, work)
        stop_here(run, work)


def train_step(
    work: Work, micro: Sequence[Batch | None], step: int, epoch: int, observe: bool = False
) -> list[StepReport]:
    """One optimizer step on this rank's micro-batches; every turn of it.

    Args:
        work: the stage's set.
        micro: micro-batches; None where this rank has no sample.
        step: steps attempted in the stage.
        epoch: epochs finished in the stage.
        observe: measure the tasks' gradients for the log.
    """
    seed_step(work, step)
    parts = split_parts(work, micro, step)
    local = torch.stack([label_counts(work, part) for part in parts])
    counts = dist.sum_on_host(local, work.device)
    resident = [[b if b is None else b.to(work.device) for b in part] for part in parts]
    if "validation" in work.weighting.needs:
        probe_validation(work, micro, step)
    reports = []
    for turn in work.stage.turns.at(step, epoch):
        buffers = [b.clone() for b in work.model.buffers()]
        work.engine.begin(turn, step, counts, observe)
        for number, part in enumerate(resident):
            for batch in part:
                if batch is not None and work.engine.tasks:
                    forward(work, work.engine, batch, number)
        report = work.engine.finalize()
        if report.finite:
            apply(work, report.updates, step)
            report.updates = []  # kept, they would lie beside the next step's gradients
            if len(report.present):
                work.weighting.advance(step, report.present, report.losses, report.gramian)
            if work.weighting.recompute and len(report.present):
                look_ahead(work, resident[0], step, report)
        else:  # the forward pass has moved BatchNorm statistics: take that back as well
            torch._foreach_copy_(list(work.model.buffers()), buffers)
        work.scale.update(report.finite)
        reports.append(report)
    if work.ema is not None and all(r.finite for r in reports):
        work.ema.update_parameters(work.model)
    return reports


def apply(work: Work, updates: Sequence[Update], step: int) -> None:
    """Clip, set the learning rate, step every optimizer on its own gradients."""
    factor = work.lr((step + 0.5) / work.total_steps)
    for update in updates:
        optimizer = work.optimizers[update.optimizer]
        if work.clip_norm is not None and update.optimizer != "weighting":
            norm = torch.nn.utils.get_total_norm(update.grads)
            coefficient = (work.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(update.grads, coefficient)
        task_factor = work.stage.task_lr.get(update.optimizer, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = work.peak_lr * factor * task_factor * group["lr_mult"]
        for parameter, grad in zip(update.parameters, update.grads, strict=True):
            parameter.grad = grad
        if update.optimizer == "weighting":
            step_present(optimizer, update.parameters, work.engine.present)
        else:
            optimizer.step()
        for parameter in update.parameters:
            parameter.grad = None


def step_present(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], present: Tensor
) -> None:
    """Step a strategy's learned scalars [T]; value and moments of absent objectives rest.

    Their gradient is 0, but momentum would still move them.
    """
    rests = torch.ones(len(parameters[0]), dtype=torch.bool)
    rests[present] = False

    def tensors() -> list[Tensor]:
        moments = [m for p in parameters for m in optimizer.state[p].values()]
        return [*parameters, *(m for m in moments if m.shape == parameters[0].shape)]

    before = [t.detach()[rests].clone() for t in tensors()]
    optimizer.step()
    with torch.no_grad():
        for number, tensor in enumerate(tensors()):
            tensor[rests] = before[number] if number < len(before) else 0.0


def timed(
    run: Run, work: Work, batches: Iterator[list[Batch | None]]
) -> Iterator[list[Batch | None]]:
    """Count the time spent waiting for data, and training."""
    while True:
        before = time.perf_counter()
        try:
            micro = next(batches, None)
        except (ResourceError, RuntimeError) as error:
            if run.stop:  # the signal went to the whole group and killed the workers
                stop_here(run, work)
            if isinstance(error, ResourceError):
                raise
            raise ResourceError(f"data worker: {str(error).splitlines()[0]}") from error
        if micro is None:
            return
        ready = time.perf_counter()
        yield micro
        run.clock.add(
            waited=ready - before,
            worked=time.perf_counter() - ready,
            images=sum(len(b) for b in micro if b is not None) * dist.world(),
        )


def stop_here(run: Run, work: Work) -> None:
    """Save and leave if any rank was asked to stop; all ranks agree on the step."""
    asked = dist.sum_on_host(torch.tensor([float(bool(run.stop))]), work.device)
    if float(asked) == 0:
        return
    save(run, work)
    raise Stopped(run.stop.signal or "another rank")
