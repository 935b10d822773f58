"""One job: from a composed config to a finished run directory and an exit code.

Nothing escapes from here: every failure ends in status.json, error.txt and a documented exit code,
so that a sweep goes on and a scheduler can tell what to do.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import platform
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from omegaconf import DictConfig

from mtl_cli import __version__, build, console, device, dist, precision
from mtl_cli.config import to_text
from mtl_cli.data.loader import WorkerLost, worker_error
from mtl_cli.errors import (
    OK,
    STOPPED,
    UNEXPECTED,
    CheckpointError,
    ConfigError,
    MtlError,
    ResourceError,
    RunDirError,
)
from mtl_cli.metrics import direction
from mtl_cli.params import format_table
from mtl_cli.run import Progress, Run, RunDir, StopFlag, Stopped, new_run_path, point_latest
from mtl_cli.train import train
from mtl_cli.work import Work

log = logging.getLogger(__name__)


def run_job(
    cfg: DictConfig,
    run_dir: Path | None,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    debug: bool = False,
) -> int:
    """Train one config and return the exit code; every error is reported here.

    Args:
        cfg: composed and checked; ``cfg.resume`` is a run directory or null.
        run_dir: where to write (a job of a sweep); None names a directory under ``output_dir``.
        overrides: the command line's overrides, saved for ``resume=``.
        dry_run: build everything, print the parameter table, train nothing.
        debug: print tracebacks.
    """
    stop = StopFlag()
    directory: RunDir | None = None
    worker_reports: Any = None
    try:
        with stop.listening():
            config = build.plain_config(cfg)
            where = device.resolve(config["device"])
            dist.setup(where)
            set_determinism(config, where)
            build.check_combination(config)
            if dry_run:
                return show_plan(config, where)
            directory = open_directory(config, run_dir)
            with log_file(directory.path):
                return train_in(directory, config, cfg, overrides, where, stop)
    except Stopped as stopped:
        return finish(directory, "interrupted", STOPPED, f"stopped by {stopped}")
    except Exception as error:
        # torch reports a dead worker wherever the main thread is, and again with every other one
        # that ends: not while this is written down
        worker_reports = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        error = understood(error)
        if stop and isinstance(error, WorkerLost):
            # the signal went to the whole group: the last checkpoint stands
            return finish(directory, "interrupted", STOPPED, f"stopped by {stop.signal}")
        return fail(directory, error, debug)
    finally:
        if directory is not None:
            directory.close()
        if worker_reports is not None:  # the next job of a sweep wants to hear of its own
            gc.collect()  # ends the loaders that the traceback held
            signal.signal(signal.SIGCHLD, worker_reports)


def train_in(
    directory: RunDir,
    config: dict[str, Any],
    cfg: DictConfig,
    overrides: Sequence[str],
    where: torch.device,
    stop: StopFlag,
) -> int:
    """Train (or go on training) in an open run directory."""
    display = console.Display(config["display"], rank=dist.rank())
    progress = Progress()
    directory.warn = display.message
    state = saved_state(directory, display) if config["resume"] else None
    if state is not None:
        progress.load_state_dict(state["progress"])
        note_world(state, where, display)
    text = to_text(cfg)
    schedule = build.make(config["schedule"], "schedule")
    stages = schedule.stages(tuple(config["task"]["outputs"]))
    if progress.finished:
        patience = config["patience"]
        ended_early = patience is not None and progress.waited >= patience
        epochs = stages[-1].epochs or config["epochs"]
        progress.finished = ended_early or progress.epoch >= epochs
    if progress.finished:
        display.message(f"{directory.path}: already finished, nothing to do")
        dist.shutdown()
        return OK
    builder = build.StageBuilder(
        config, directory.path, schedule, where, progress, state, display.message, stop
    )
    run = Run(
        dir=directory,
        config_text=text,
        stages=stages,
        stage=builder,
        progress=progress,
        stop=stop,
        display=display,
    )
    if state is not None:
        run.clock.load_state_dict(state["clock"])

    def begin() -> None:
        if dist.rank() == 0:
            write_facts(directory, text, overrides, where, config)
            directory.status("running", step=progress.total_steps)
            directory.start_logs(progress.log_bytes)
        directory.begun = True
        log.info("%s from step %d", directory.path, progress.total_steps)

    if config["resume"]:  # what is typed now may yet be refused: the run is as it was till then
        builder.built = begin
    else:
        begin()
    display.start({"run": str(directory.path), **describe(config, where)})
    try:
        train(run)
    finally:
        display.stop()
    if dist.rank() == 0:
        summary = summarise(run, builder.work, config, overrides)
        directory.write_json("summary.json", summary)
        directory.status("finished", step=progress.total_steps, exit_code=OK)
        log.info("finished at step %d, best %s", progress.total_steps, progress.best)
        console.final_table(summary)
        forget_launch(config)
    dist.shutdown()
    return OK


def saved_state(directory: RunDir, display: console.Display) -> dict[str, Any] | None:
    """The checkpoint to go on from; None if the run was killed before it could save one.

    Raises:
        CheckpointError: the run has finished an epoch, so its checkpoints have been taken away.
    """
    state = directory.checkpoints.newest(display.message)
    if state is None:
        if directory.finished_an_epoch():
            raise CheckpointError(
                f"{directory.path}: its checkpoints are gone (metrics.jsonl shows finished "
                "epochs); bring them back, or start a new run"
            )
        display.message(f"{directory.path}: nothing was saved yet, starts from the beginning")
    return state


def open_directory(config: dict[str, Any], run_dir: Path | None) -> RunDir:
    """The run's directory, locked by rank 0, whose name all ranks take."""
    parent = Path(config["output_dir"]) / config["task"]["name"]
    note = parent / f".torchrun-{dist.group_name()}"  # which run a restarted group goes on with
    if dist.attempt() > 0 and note.exists():
        config["resume"] = note.read_text()
    if config["resume"]:
        path = Path(config["resume"])
    elif run_dir is not None:
        path = run_dir
    else:
        path = parent / config["run_name"] if config["run_name"] else new_run_path(parent)
    directory = RunDir(Path(dist.broadcast(str(path))))
    directory.begun = not config["resume"]
    if dist.rank() == 0:
        directory.open()
        if not config["resume"] and directory.checkpoints.any():
            directory.close()
            raise ConfigError(
                f"run_name: {directory.path} holds a run already; continue it with "
                f"resume={directory.path}, or choose another run_name"
            )
        if run_dir is None:  # the jobs of a sweep have no latest
            point_latest(directory.path)
        if dist.launched():
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(str(directory.path))
    return directory


def forget_launch(config: dict[str, Any]) -> None:
    """Remove torchrun's note about which run it is."""
    parent = Path(config["output_dir"]) / config["task"]["name"]
    (parent / f".torchrun-{dist.group_name()}").unlink(missing_ok=True)


def set_determinism(config: dict[str, Any], where: torch.device) -> None:
    """Reproducible kernels, by default on a CPU only."""
    wanted = config["deterministic"]
    wanted = where.type == "cpu" if wanted is None else wanted
    if wanted and where.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    # filling every new tensor with NaN finds reads of memory never written, at 3 % of a CPU step
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not wanted and where.type == "cuda"


def describe(config: dict[str, Any], where: torch.device) -> dict[str, Any]:
    """Facts for the first lines of the screen."""
    dtype = precision.resolve(config["precision"]["dtype"], where)
    hints = []
    if where.type == "cpu" and dtype == "fp32" and precision.native_bf16_on_cpu():
        hints.append("this CPU has bf16: precision=bf16 takes about 0.6 of the time")
    if str(config["schedule"]["_target_"]).endswith(".Alternate") and (
        not str(config["weighting"]["_target_"]).endswith(".Equal")
        and "adam" in str(config["optimizer"]["_target_"]).lower()
    ):
        hints.append("with Adam per task a weight has no effect: each optimizer undoes the scale")
    if config["backbone"].get("pretrained") is False:
        hints.append("the backbone starts from scratch; backbone.pretrained=true usually helps")
    return {
        "task": config["task"]["name"],
        "device": str(where),
        "dtype": dtype,
        "world": dist.world(),
        "threads": torch.get_num_threads(),
        "hints": hints,
    }


def note_world(state: dict[str, Any], where: torch.device, display: console.Display) -> None:
    """Say what makes a resumed run differ from the uninterrupted one."""
    for what, old, new in (
        ("ranks", state["world"], dist.world()),
        ("device", state["device"], where.type),
    ):
        if old != new:
            display.message(f"resume: not bit-exact: {what} changed {old} -> {new}")


def write_facts(
    directory: RunDir,
    text: str,
    overrides: Sequence[str],
    where: torch.device,
    config: dict[str, Any],
) -> None:
    """config.yaml, overrides.txt and environment.json."""
    directory.write_text("config.yaml", text)
    directory.write_text("overrides.txt", "".join(f"{line}\n" for line in overrides))
    facts = {
        "mtl": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "platform": platform.platform(),
        "device": str(where),
        "gpu": torch.cuda.get_device_name(where) if where.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "world": dist.world(),
        "seed": config["seed"],
        "argv": sys.argv,
    }
    directory.write_json("environment.json", facts)


def show_plan(config: dict[str, Any], where: torch.device) -> int:
    """``--dry-run``: build every stage, print its parameter table, train nothing."""

    def say(line: str) -> None:
        if dist.rank() == 0:
            console.say(line)

    schedule = build.make(config["schedule"], "schedule")
    builder = build.StageBuilder(
        {**config, "init_from": None},
        Path(),
        schedule,
        where,
        Progress(),
        None,
        say,
        StopFlag(),
    )
    for stage in schedule.stages(tuple(config["task"]["outputs"])):
        work = builder.plan(stage)
        say(
            f"stage {stage.name}: {work.epochs} epochs, {work.total_steps} steps, tasks "
            f"{', '.join(t.name for t in work.tasks)}, optimizers {', '.join(work.optimizers)}"
        )
        for line in format_table(work.rows):
            say(line)
    return OK


def summarise(
    run: Run, work: Work, config: dict[str, Any], overrides: Sequence[str]
) -> dict[str, Any]:
    """The content of summary.json."""
    progress = run.progress
    return {
        "task": config["task"]["name"],
        "run": str(run.dir.path),
        "state": "finished",
        "overrides": list(overrides),
        "best": progress.best,
        "final": progress.final,
        "best_task": progress.best_task,
        "baseline": work.baseline,
        "masked": work.data.masked,
        "directions": {t.name: {m: direction(m) for m in t.metrics} for t in work.tasks},
        "units": {t.name: {m: console.unit(t.unit, m) for m in t.metrics} for t in work.tasks},
        "stages": progress.outcomes,
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "train_seconds": round(run.clock.seconds, 1),
        "images_per_second": round(run.clock.images_per_second, 1),
        "seed": config["seed"],
        "world": dist.world(),
    }


def finish(directory: RunDir | None, state: str, code: int, reason: str) -> int:
    """Write the end of an interrupted run."""
    if directory is not None and dist.rank() == 0:
        if directory.begun:
            directory.status(state, exit_code=code, reason=reason)
            console.notice(f"{reason}; continue with: mtl train resume={directory.path}")
        else:
            console.notice(f"{reason}; {directory.path} is as it was: type the same command again")
    dist.shutdown()
    return code


def understood(error: Exception) -> Exception:
    """Name what torch raises for memory, lost ranks and lost workers; others come back unchanged."""
    first = (str(error).splitlines() or [""])[0]
    if isinstance(error, torch.OutOfMemoryError):
        found: Exception = ResourceError(f"{first}; lower data.batch_size or raise accumulate")
    elif dist.lost_peer(error):
        found = ResourceError(f"another rank is gone ({first[:120]})")
    elif isinstance(error, RuntimeError):
        found = worker_error(error)  # raised by a signal handler, wherever we were
    else:
        return error
    if found is not error:
        found.__cause__ = error
    return found


def fail(directory: RunDir | None, error: Exception, debug: bool) -> int:
    """Report a failure on the screen and in the run directory; never raises."""
    code, reason = UNEXPECTED, f"unexpected {type(error).__name__}: {error}"
    if isinstance(error, MtlError):
        code, reason = error.exit_code, str(error)
    details = "".join(traceback.format_exception(error))
    if debug or code == UNEXPECTED:
        console.trace(details)
    ranks_alike = isinstance(error, MtlError) and not isinstance(error, ResourceError)
    if not (ranks_alike and dist.said_elsewhere(reason)):
        for line in getattr(error, "problems", [reason]):
            console.error(line)
    ours = directory is not None and directory.begun and dist.rank() == 0
    if directory is not None and ours and code != RunDirError.exit_code:
        with contextlib.suppress(MtlError, OSError):
            directory.status("failed", exit_code=code, reason=reason)
            directory.write_text("error.txt", details)
    dist.abandon()
    return code


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Send the package's log records to mtl.log (rank 0)."""
    if dist.rank() != 0:
        yield
        return
    handler = logging.FileHandler(path / "mtl.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("mtl_cli")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
