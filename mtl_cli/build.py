"""From the composed config to a run: the only place that turns a ``_target_`` into an object."""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mtl_cli import allow, checkpoint, dist
from mtl_cli import precision as number_format
from mtl_cli.backward import BackwardEngine
from mtl_cli.data.base import DataOptions, DataSet
from mtl_cli.errors import ConfigError, SafetyError
from mtl_cli.evaluate import constant_metrics, deciding_by, unjudged
from mtl_cli.losses import Loss
from mtl_cli.model import ByTask, MultiTaskModel, NamedSeed
from mtl_cli.params import ParamRow, ParamRules, param_groups, param_table, rename_rules
from mtl_cli.precision import LossScale
from mtl_cli.record import restore
from mtl_cli.run import Progress, StopFlag, Stopped
from mtl_cli.schedule.base import JOINT_OPTIMIZER, Schedule, Stage, rules_from
from mtl_cli.task import Objective, Task
from mtl_cli.weighting.base import GradientWeighting, GramianWeighting, LossWeighting, Weighting
from mtl_cli.work import Meter, Work

Config = dict[str, Any]
SAY_EVERY_S = 5.0
OPTIONS = tuple(inspect.signature(DataOptions).parameters)
# What the engine can give a strategy beside losses and Gramian.
SUPPLIED = ("rows", "batches", "validation", "metrics")


def make(node: Mapping[str, Any], where: str, **injected: Any) -> Any:
    """Build the object that a config node describes.

    Args:
        node: ``_target_`` and its arguments.
        where: dotted place in the config; decides which classes are allowed.
        injected: arguments that come from the program.

    Raises:
        SafetyError: the target is not allowed at this place.
        ConfigError: it does not exist, or its arguments do not fit.
    """
    factory = factory_of(node, where)
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    try:
        inspect.signature(factory).bind(**arguments, **injected)
    except TypeError as error:
        raise ConfigError(f"{where}: {node['_target_']} {error}") from error
    return factory(**arguments, **injected)


def factory_of(node: Mapping[str, Any], where: str) -> Callable[..., Any]:
    """The class or function that a config node names; see :func:`make`."""
    target = node.get("_target_")
    if reason := allow.refuse(where, target):
        raise SafetyError(reason)
    module, _, name = str(target).rpartition(".")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{where}._target_: cannot import {target} ({error})") from error
    return factory


def open_data(config: Config, device: torch.device, statistics: Any = None) -> DataSet:
    """The data set of a task, with tasks, splits and encoded labels.

    Args:
        config: has ``task``, ``data``, ``augment`` and ``seed``.
        device: where batches go.
        statistics: centre and scale of regression targets, from a checkpoint.
    """
    node = config["data"]
    options = DataOptions(**{k: node[k] for k in OPTIONS if node.get(k) is not None})
    source = make({k: v for k, v in node.items() if k not in OPTIONS}, "data")
    return DataSet(
        source,
        config["task"]["outputs"],
        options,
        augment=make(config["augment"], "augment"),
        seed=config["seed"],
        metrics=config["task"]["metrics"],
        statistics=statistics,
        device=device,
    )


def build_losses(config: Config, tasks: Sequence[Task]) -> ByTask[Loss]:
    """One loss per task."""
    return ByTask(
        {t.name: make(config["losses"][t.name], f"losses.{t.name}", task=t) for t in tasks}
    )


def build_model(config: Config, tasks: Sequence[Task]) -> MultiTaskModel:
    """Backbone and heads; each part's initial weights depend on (seed, its name) alone."""
    seed = config["seed"]
    with NamedSeed(seed, "backbone"):
        backbone = make(config["backbone"], "backbone")
    heads: dict[str, nn.Module] = {}
    for task in tasks:
        where = f"heads.{task.name}"
        with NamedSeed(seed, where):
            heads[task.name] = make(
                config["heads"][task.name], where, channels=backbone.channels, task=task
            )
    return MultiTaskModel(backbone, heads)


def build_objectives(losses: ByTask[Loss], tasks: Sequence[Task]) -> tuple[Objective, ...]:
    """The loss vector: every task's terms in the order of the tasks."""
    return tuple(
        Objective(f"{task.name}/{term}" if term else task.name, task.name, likelihood, prior)
        for task in tasks
        for term, likelihood, prior in zip(
            losses[task.name].terms,
            losses[task.name].likelihoods,
            losses[task.name].priors,
            strict=True,
        )
    )


def check_combination(config: Config) -> None:
    """Refuse what has no meaning together, as far as the classes tell, before anything is made.

    Raises:
        ConfigError: see :func:`refuse_combination`.
    """
    schedule = make(config["schedule"], "schedule")
    kind = factory_of(config["weighting"], "weighting")
    if isinstance(kind, type) and issubclass(kind, Weighting):
        refuse_combination(schedule, kind)


def refuse_combination(schedule: Schedule, weighting: Weighting | type[Weighting]) -> None:
    """Refuse before training what has no meaning together.

    Raises:
        ConfigError: with the reason.
    """
    kind = weighting if isinstance(weighting, type) else type(weighting)
    name, needs_rows = kind.__name__, issubclass(kind, (GramianWeighting, GradientWeighting))
    if schedule.per_step and (weighting.couples or needs_rows):
        raise ConfigError(
            f"weighting: {name} weighs tasks against each other and needs all of them in one step, "
            "but schedule=alternate gives a step to one task; use schedule=joint, or a strategy "
            "that treats tasks alone (equal, fixed, uncertainty)"
        )
    if schedule.split and needs_rows:
        raise ConfigError(
            f"weighting: {name} combines the tasks' gradients into one, but with "
            "schedule.mode=simultaneous every task has its own optimizer; use schedule=joint"
        )
    if "validation" in weighting.needs and (schedule.per_step or schedule.split):
        raise ConfigError(f"weighting: {name} needs the joint step; use schedule=joint")
    missing = [need for need in weighting.needs if need not in SUPPLIED]
    if missing:
        raise ConfigError(f"weighting: {name} needs {', '.join(missing)}, which is not supplied")


class StageBuilder:
    """Builds a stage's own set; data sets are shared by the stages that use the same.

    Args:
        config: the resolved config as plain values.
        run_dir: the run's directory, for stages that start from an earlier one.
        schedule: for combinations that are refused.
        device: where the model lives.
        progress: where the run is.
        state: checkpoint to continue from, or None.
        say: prints one line.
        stop: a signal ends a long preparation.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        schedule: Schedule,
        device: torch.device,
        progress: Progress,
        state: Mapping[str, Any] | None,
        say: Callable[[str], None],
        stop: StopFlag,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.schedule = schedule
        self.device = device
        self.progress = progress
        self.state = state
        self.say = say
        self.stop = stop
        self.work: Work  # of the stage that was built last
        self.built: Callable[[], None] = lambda: None  # called once, with the first stage in place
        self._data: dict[str, DataSet] = {}
        self._said_at = time.monotonic()

    def plan(self, stage: Stage) -> Work:
        """Build the stage without its starting weights."""
        config = stage_config(self.config, stage)
        self.work = assemble(config, stage, self._open(config), self.device, self.schedule)
        if self.work.best_by != config["best_by"]:
            self.say(
                f"stage {stage.name}: has no {config['best_by']} (has "
                f"{', '.join(t.name for t in self.work.tasks)}); the mean gain decides about its best.pt"
            )
        for note in unjudged(self.work.tasks, self.work.data, self.work.best_by):
            self.say(note)
        return self.work

    def __call__(self, stage: Stage) -> Work:
        """Build the stage and put its starting weights, or the checkpoint, into it."""
        work = self.plan(stage)
        if self.state is not None:
            restore(work, self.state)
            self.state = None
        else:
            self._start_weights(work)
        self.built()
        self.built = lambda: None
        return work

    def _open(self, config: Config) -> DataSet:
        key = repr((config["task"], config["data"]))
        if key not in self._data:
            data = self._data[key] = open_data(config, self.device)
            data.prepare(progress=self._progress)
            for note in data.report["notes"]:
                self.say(note)
            if masked := data.masked:
                counts = ", ".join(f"{count} {what}" for what, count in masked.items())
                self.say(f"data: masked as bad: {counts}; mtl.log names the first of them")
        return self._data[key]

    def _progress(self, what: str, done: int, total: int) -> None:
        """Say how far a long preparation is, every few seconds."""
        if self.stop:
            raise Stopped(self.stop.signal)
        now = time.monotonic()
        if now - self._said_at > SAY_EVERY_S and done < total:
            self._said_at = now
            self.say(f"{what}: {done} of {total}")

    def _start_weights(self, work: Work) -> None:
        """Weights from an earlier stage, a run or a checkpoint, with a report of what fits."""
        source = work.stage.start_from
        if work.stage.index == 0 and source is None:
            source = self.config["init_from"]
        if source is None:
            return
        if source in ("previous", "previous_best"):
            names = [outcome["stage"] for outcome in self.progress.outcomes]
            if not names:
                raise ConfigError(
                    f"schedule.stages.{work.stage.name}.start_from: no stage before it (found "
                    f"{source})"
                )
            kind = "best" if source == "previous_best" else "last"
            path = self.run_dir / "checkpoints" / f"{names[-1]}_{kind}.pt"
        else:
            path = checkpoint.find(Path(source).expanduser())
        weights = checkpoint.weights(checkpoint.load(path))
        report = checkpoint.load_weights(work.model, weights, str(path))
        if work.ema is not None:
            work.ema.module.load_state_dict(work.model.state_dict())
        self.say(f"stage {work.stage.name}: {path.name}: {checkpoint.describe(*report)}")


def reopen(state: Mapping[str, Any]) -> tuple[Config, tuple[Task, ...], MultiTaskModel]:
    """The config, tasks and model of a checkpoint, its weights loaded (averaged where there are).

    The config goes through the same allow-list as one from the command line.
    """
    config = plain_config(OmegaConf.create(state["config"]))
    stages = make(config["schedule"], "schedule").stages(tuple(config["task"]["outputs"]))
    config = stage_config(config, stages[state["progress"]["stage"]])
    if "pretrained" in config["backbone"]:
        config["backbone"] = {**config["backbone"], "pretrained": False}  # weights come from here
    tasks = tuple(Task.from_state(t) for t in state["tasks"])
    model = build_model(config, tasks)
    if config["precision"]["dtype"] == "fp64":
        model = model.double()
    model.load_state_dict(checkpoint.weights(state))
    return config, tasks, model.eval()


def plain_config(cfg: DictConfig) -> Config:
    """The config as plain values, interpolations resolved."""
    config = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}


def stage_config(config: Config, stage: Stage) -> Config:
    """The config of a stage: that of the run, with the task of the stage where it has one."""
    merged = dict(config)
    if stage.resolved is not None:
        merged.update({k: v for k, v in stage.resolved.items() if v is not None})
        common = {key: config["data"][key] for key in OPTIONS if key in config["data"]}
        merged["data"] = {**merged["data"], **common}  # one image size and batch size for the run
    if stage.only is not None:
        task = merged["task"]
        merged["task"] = {
            **task,
            "outputs": {k: v for k, v in task["outputs"].items() if k in stage.only},
        }
    return merged


def assemble(
    config: Config,
    stage: Stage,
    data: DataSet,
    device: torch.device,
    schedule: Schedule,
) -> Work:
    """Put the parts of a stage together.

    Raises:
        ConfigError: the parts do not fit together; see :func:`refuse_combination`.
    """
    tasks = data.tasks
    model = build_model(config, tasks).to(device)
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
        model = synchronised(config, model, len(data.splits["train"]))
    dtype = number_format.resolve(config["precision"]["dtype"], device)
    if dtype == "fp64":
        model = model.double()
    losses = build_losses(config, tasks).to(device)
    objectives = build_objectives(losses, tasks)
    weighting: Weighting = make(
        config["weighting"], "weighting", objectives=objectives, seed=config["seed"]
    )
    refuse_combination(schedule, weighting)
    rules = stage.rules.over(root_rules(config))
    rows = param_table(model, rename_rules(rules, {t.name for t in tasks}), model.layers())
    if len(schedule.stages(tuple(config["task"]["outputs"]))) == 1:
        _refuse_idle_strategy(weighting, rows, len(objectives))
    _refuse_tiny_batches(config, model, len(data.splits["train"]))
    node = config["precision"]
    scale = (
        LossScale(float(node["init_scale"]), int(node["growth_interval"]))
        if dtype == "fp16"
        else LossScale()
    )
    engine = BackwardEngine(
        model, objectives, weighting, micro_batches=config["accumulate"], scale=scale
    )
    peak_lr = float(stage.lr if stage.lr is not None else config["optimizer"]["lr"])
    work = Work(
        stage=stage,
        seed=config["seed"],
        data=data,
        tasks=tasks,
        model=model,
        losses=losses,
        objectives=objectives,
        weighting=weighting,
        engine=engine,
        scale=scale,
        optimizers=build_optimizers(config, stage, rows, weighting, peak_lr),
        rows=rows,
        lr=make(config["lr"], "lr"),
        peak_lr=peak_lr,
        epochs=int(stage.epochs or config["epochs"]),
        device=device,
        dtype=dtype,
        accumulate=config["accumulate"],
        clip_norm=config["clip_norm"],
        patience=config["patience"],
        on_nonfinite=config["on_nonfinite"],
        best_by=deciding_by(config["best_by"], tasks),
        log_every_steps=config["log_every_steps"],
        save_every_steps=config["save_every_steps"],
        ema=build_ema(model, config["ema"]["decay"]),
        meter=Meter(len(objectives)),
    )
    work.baseline = constant_metrics(tasks, data, "val")
    return work


def build_optimizers(
    config: Config, stage: Stage, rows: Sequence[ParamRow], weighting: Weighting, peak_lr: float
) -> dict[str, torch.optim.Optimizer]:
    """The optimizers of the stage's turns, and one for learned weights of the strategy."""
    node = dict(config["optimizer"])
    decay = float(node.pop("weight_decay"))
    node["lr"] = peak_lr
    optimizers = {}
    for name, tasks in stage.turns.optimizers().items():
        mine = {
            row.name
            for row in rows
            if not row.name.startswith("heads.") or row.name.split(".")[1] in tasks
        }
        groups = param_groups(rows, mine, decay)
        if not groups:
            raise ConfigError(f"freeze: nothing is left to train in stage '{stage.name}'")
        if all(row.frozen or row.unfreeze_at > 0 for row in rows if row.name in mine):
            whose = "" if name == JOINT_OPTIMIZER else f" of '{name}'"
            raise ConfigError(
                f"unfreeze_at: nothing{whose} trains in epoch 0 of stage '{stage.name}'; let a part "
                "train from the beginning"
            )
        optimizers[name] = make(node, "optimizer", params=groups, fused=True)
    learned = list(weighting.parameters())
    if learned:
        assert isinstance(weighting, (LossWeighting, GramianWeighting))
        group = {"params": learned, "lr_mult": weighting.lr_mult, "weight_decay": 0.0}
        optimizers["weighting"] = make(node, "optimizer", params=[group])
    return optimizers


def build_ema(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Exponential moving average of the weights; buffers are copied."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]


def root_rules(config: Config) -> ParamRules:
    """The parameter rules that hold in every stage."""
    return rules_from(
        config["freeze"], config["lr_mult"], config["layer_decay"], config["unfreeze_at"]
    )


def _refuse_idle_strategy(weighting: Weighting, rows: Sequence[ParamRow], objectives: int) -> None:
    """Gradient rows of nothing: a backbone that is always frozen gives a strategy no material.

    In one stage of several it may rest: the heads then learn from their own losses.
    """
    needs_rows = isinstance(weighting, (GramianWeighting, GradientWeighting))
    moving = any(not r.frozen and not r.name.startswith("heads.") for r in rows)
    if needs_rows and not moving and objectives > 1:
        raise ConfigError(
            f"weighting: {type(weighting).__name__} weighs gradients of shared parameters, but "
            "none is trained (backbone frozen); use weighting=equal or another loss-level strategy"
        )


def synchronised(config: Config, model: MultiTaskModel, samples: int) -> MultiTaskModel:
    """BatchNorm over all ranks (CUDA only: torch has no other).

    Raises:
        ConfigError: the last batch would leave a rank without a sample, which then never joins.
    """
    chunks = dist.world() * config["accumulate"]
    if dist.world() == 1 or not _normed(model):
        return model
    last = samples % config["data"]["batch_size"]
    if not config["data"].get("drop_last", True) and 0 < last < chunks:
        raise ConfigError(
            f"data.drop_last: the last batch of {last} samples is too small for {chunks} ranks x "
            "micro-batches with SyncBatchNorm; use data.drop_last=true"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return,no-untyped-call]


def _normed(model: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _refuse_tiny_batches(config: Config, model: nn.Module, samples: int) -> None:
    """BatchNorm cannot train on one sample; a rank or micro-batch must not be empty."""
    chunks = dist.world() * config["accumulate"]
    size = config["data"]["batch_size"]
    if size < chunks:
        raise ConfigError(
            f"data.batch_size: {size} samples cannot be cut into {dist.world()} ranks x "
            f"{config['accumulate']} micro-batches; expected {chunks} or more"
        )
    sizes = [min(size, samples)]
    if not config["data"].get("drop_last", True) and samples % size:
        sizes.append(samples % size)
    short = [n for n in sizes if n % chunks + n // chunks and n // chunks < 2]
    if _normed(model) and short:
        raise ConfigError(
            f"data.batch_size: {size} cuts {samples} training samples so that a micro-batch of "
            f"{max(1, short[0] // chunks)} remains, on which BatchNorm cannot train; use another "
            "batch size, more samples or data.drop_last=true"
        )
