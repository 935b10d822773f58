"""Runs side by side: read run directories, group them by setting, average over seeds.

No torch and no config tree: a run directory says everything. A group is one setting; failed and
unfinished runs stay in their group and are listed, never dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from mtl_cli.errors import DataError

CONVENTION = (
    "delta-m: mean over tasks of the relative gain over the single-task runs (only=TASK) in %, "
    "averaged within a task first; higher is better"
)

# These do not change the model that comes out, or are what is averaged over.
_IGNORED = (
    "seed",
    "task",
    "run_name",
    "output_dir",
    "resume",
    "display",
    "log_every_steps",
    "save_every_steps",
    "data.workers",
    "data.cache",
    "data.cache_dir",
)
_FREE_IN_REFERENCE = ("weighting", "schedule", "only")  # mean little where one task learns alone
_OF_TASKS = ("heads", "losses", "task.outputs", "task.metrics")


@dataclass
class RunRecord:
    """What a run directory says about its run."""

    path: Path
    status: dict[str, Any]
    summary: dict[str, Any]
    config: dict[str, Any]
    overrides: dict[str, str]

    @property
    def state(self) -> str:
        """finished, failed, interrupted, running or unknown."""
        return str(self.status.get("state") or self.summary.get("state") or "unknown")

    @property
    def counted(self) -> bool:
        """Whether its numbers enter the means."""
        return self.state == "finished" and bool(self.metrics)

    @property
    def metrics(self) -> dict[str, dict[str, float | None]]:
        """Of best.pt, by task."""
        return (self.summary.get("best") or {}).get("metrics") or {}

    @property
    def seed(self) -> Any:
        """The run's seed."""
        return self.config.get("seed", self.summary.get("seed", self.overrides.get("seed", 0)))

    @property
    def task(self) -> str:
        """Name of the task."""
        named = (self.config.get("task") or {}).get("name")
        return str(self.summary.get("task") or named or self.overrides.get("task", ""))

    @property
    def only(self) -> tuple[str, ...]:
        """The outputs that it was pruned to; empty: all."""
        only = self.config.get("only", self.overrides.get("only"))
        if isinstance(only, str):
            only = [word.strip() for word in only.strip("[]").split(",") if word.strip()]
        return tuple(only or ()) if only != ["null"] else ()

    def setting(self) -> dict[str, Any]:
        """Everything that decides about its result, as flat keys; the seed left out."""
        flat = flatten(self.config) if self.config else dict(self.overrides)
        return {key: value for key, value in flat.items() if not _ignored(key)}


@dataclass
class Group:
    """Runs of one setting.

    Args:
        label: values of the columns.
        runs: all of them, failed ones included.
        values: (task, metric) -> values over the runs that count.
        delta_m: in %, over the runs that count; empty without single-task runs.
    """

    label: tuple[str, ...]
    runs: list[RunRecord]
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    delta_m: list[float] = field(default_factory=list)

    @property
    def counted(self) -> list[RunRecord]:
        """The runs that enter the means."""
        return [run for run in self.runs if run.counted]

    @property
    def seconds(self) -> float | None:
        """Mean training time."""
        known = [s for run in self.counted if (s := run.summary.get("train_seconds")) is not None]
        return mean(known) if known else None


@dataclass
class Comparison:
    """One table: the runs of one task."""

    task: str
    columns: list[str]
    groups: list[Group]
    metrics: dict[tuple[str, str], str]  # (task, metric) -> min or max
    units: dict[tuple[str, str], str]
    notes: list[str]

    def best(self, metric: tuple[str, str]) -> float | None:
        """The best mean of a metric over all groups."""
        means = [mean(group.values[metric]) for group in self.groups if group.values.get(metric)]
        if not means:
            return None
        return min(means) if self.metrics[metric] == "min" else max(means)


def find_runs(directories: Iterable[str]) -> list[RunRecord]:
    """Every run directory at or below the given ones; links inside them are not followed.

    Raises:
        DataError: a directory is missing, or there is no run in any of them.
    """
    found: dict[Path, RunRecord] = {}
    for directory in directories:
        root = Path(directory).expanduser()
        if not root.is_dir():
            raise DataError(f"compare: no such directory (found {directory}); give runs or sweeps")
        for place, folders, files in os.walk(root.resolve()):
            folders.sort()
            if {"status.json", "summary.json"} & set(files):
                folders.clear()  # nothing below a run is a run
                found.setdefault(Path(place), read_run(Path(place)))
    if not found:
        listed = ", ".join(directories)
        raise DataError(f"compare: no run in {listed} (expected status.json or summary.json)")
    return list(found.values())


def read_run(path: Path) -> RunRecord:
    """Read a run directory; what is missing or damaged is empty."""
    config = _read(path / "config.yaml", yaml.safe_load)
    lines = _text(path / "overrides.txt").splitlines()
    summary = _read(path / "summary.json", json.loads)
    overrides = {}
    for line in summary.get("overrides") or lines:
        key, _, value = str(line).strip().removeprefix("- ").strip("'\"").partition("=")
        overrides[_plain_key(key)] = value
    return RunRecord(path, _read(path / "status.json", json.loads), summary, config, overrides)


def compare(task: str, runs: Sequence[RunRecord], by: Sequence[str] = ()) -> Comparison:
    """Group the runs of one task and fill in means, spread and delta-m.

    Args:
        task: its name.
        runs: all of its runs.
        by: keys to group by; by default everything that varies but the seed. Runs of some tasks
            only are kept apart from the others whatever it says.
    """
    names = _option_names(runs)
    columns = list(by) or _varying(runs, names)
    if "only" not in columns and len({record.only for record in runs}) > 1:
        columns.append("only")  # single-task runs are references, never seeds of a joint run
    groups: dict[tuple[str, ...], Group] = {}
    for record in sorted(runs, key=lambda r: len(r.only) == 1):  # references at the end
        label = tuple(_value(record, key, names) for key in columns)
        groups.setdefault(label, Group(label, [])).runs.append(record)
    metrics: dict[tuple[str, str], str] = {}
    units: dict[tuple[str, str], str] = {}
    for record in runs:
        for name, directions in (record.summary.get("directions") or {}).items():
            for metric, direction in directions.items():
                metrics[name, metric] = direction
                of = (record.summary.get("units") or {}).get(name, {}).get(metric, "")
                units[name, metric] = of
    for group in groups.values():
        for name, metric in metrics:
            known = [r.metrics.get(name, {}).get(metric) for r in group.counted]
            group.values[name, metric] = [value for value in known if value is not None]
    rows = list(groups.values())
    notes = [
        *_fill_delta_m(rows, runs, metrics),
        *_seed_notes(rows, columns),
        *(_pooled_notes(rows) if by else []),
    ]
    return Comparison(task, columns, rows, metrics, units, notes)


def delta_m(
    metrics: Mapping[str, Mapping[str, float | None]],
    reference: Mapping[str, Mapping[str, float | None]],
    directions: Mapping[tuple[str, str], str],
) -> float | None:
    """Mean relative gain over single-task training in %, higher is better.

    Maninis et al., CVPR 2019 (arXiv 1904.08918); several metrics of a task are averaged within it
    first, as Vandenhende et al. do. A gain is taken relative to |reference|.

    Args:
        metrics: task -> metric -> value.
        reference: the same of the single-task runs.
        directions: (task, metric) -> min or max.

    Returns:
        None if some task has no reference.
    """
    gains = []
    for task, values in metrics.items():
        own = []
        for name, value in values.items():
            base = reference.get(task, {}).get(name)
            if value is not None and base:
                sign = -1 if directions[task, name] == "min" else 1
                own.append(sign * (value - base) / abs(base))
        if not own:
            return None
        gains.append(mean(own))
    return 100 * mean(gains) if gains else None


def _fill_delta_m(
    groups: Sequence[Group], runs: Sequence[RunRecord], directions: Mapping[tuple[str, str], str]
) -> list[str]:
    """Compare every multi-task group with the single-task runs of the same settings."""
    singles = [r for r in runs if len(r.only) == 1 and r.counted]
    if not singles:
        return []
    missing: dict[str, None] = {}
    for group in groups:
        for record in group.counted:
            if len(record.metrics) < 2:
                continue
            reference = {
                task: _reference(record, task, singles, directions) for task in record.metrics
            }
            missing.update(dict.fromkeys(task for task, found in reference.items() if not found))
            gain = delta_m(record.metrics, reference, directions)
            if gain is not None:
                group.delta_m.append(gain)
    notes = [CONVENTION]
    if missing:
        notes.append(
            f"no single-task run of {', '.join(missing)} has the same other settings as some rows: "
            "delta-m is - there"
        )
    return notes


def _reference(
    record: RunRecord,
    task: str,
    singles: Sequence[RunRecord],
    directions: Mapping[tuple[str, str], str],
) -> dict[str, float | None]:
    """Mean metrics of the single-task runs that match, else {}.

    All settings must be equal but the strategy and the schedule, which mean little where one task
    learns alone; of several such sets the one with the best first metric is the reference.
    """
    wanted = _comparable(record, task)
    sets: dict[str, list[RunRecord]] = {}
    for single in singles:
        if single.only == (task,) and _comparable(single, task) == wanted:
            key = json.dumps(single.setting(), sort_keys=True, default=str)
            sets.setdefault(key, []).append(single)
    means = []
    for runs in sets.values():
        names = list(runs[0].metrics.get(task, {}))
        columns = {n: [v for r in runs if (v := r.metrics[task].get(n)) is not None] for n in names}
        means.append({n: mean(values) if values else None for n, values in columns.items()})
    if not means:
        return {}
    first = next(iter(means[0]))
    sign = -1 if directions[task, first] == "min" else 1
    return max(means, key=lambda m: float("-inf") if m[first] is None else sign * (m[first] or 0.0))


def _comparable(record: RunRecord, task: str) -> dict[str, Any]:
    """The setting without strategy and schedule, and with the parts of one task only."""
    return {
        key: value
        for key, value in record.setting().items()
        if not _under(key, _FREE_IN_REFERENCE)
        and (
            not _under(key, _OF_TASKS) or _under(key, tuple(f"{part}.{task}" for part in _OF_TASKS))
        )
    }


def _seed_notes(groups: Sequence[Group], columns: Sequence[str]) -> list[str]:
    notes = []
    for group in groups:
        seeds = [run.seed for run in group.counted]
        twice = sorted({str(s) for s in seeds if seeds.count(s) > 1})
        if twice and len(group.runs) > 1:
            where = ", ".join(f"{c}={v}" for c, v in zip(columns, group.label, strict=True))
            notes.append(f"seed {', '.join(twice)} more than once in {where or 'the only row'}")
    found = {
        frozenset(str(run.seed) for run in group.counted)
        for group in groups
        if any(len(run.only) != 1 for run in group.counted)
    }
    if len(found) > 1:
        notes.append("the rows have different seeds: compare them with care")
    return notes


def _pooled_notes(groups: Sequence[Group]) -> list[str]:
    pooled: dict[str, None] = {}
    for group in groups:
        settings = [run.setting() for run in group.runs]
        keys = dict.fromkeys(key for setting in settings for key in setting)
        pooled.update({k: None for k in keys if len({str(s.get(k)) for s in settings}) > 1})
    return [f"rows pool runs that differ in {', '.join(pooled)}"] if pooled else []


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mapping -> dotted keys; lists and empty mappings stay values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _varying(runs: Sequence[RunRecord], names: Mapping[tuple[str, str], str]) -> list[str]:
    """Columns that tell all settings apart: overrides first, then config keys where they must."""
    given = dict.fromkeys(k for r in runs for k in r.overrides if not _ignored(k))
    keys = sorted(given, key=lambda key: key == "only")  # the last column
    columns = [key for key in keys if len({_value(r, key, names) for r in runs}) > 1]
    for _ in range(8):  # each pass tells at least two settings apart
        settings: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for record in runs:
            label = tuple(_value(record, key, names) for key in columns)
            seen = settings.setdefault(label, [])
            if record.config and record.setting() not in seen:
                seen.append(record.setting())
        mixed = next((found for found in settings.values() if len(found) > 1), None)
        if mixed is None:
            break
        differing = [k for k in mixed[0] if len({str(s.get(k)) for s in mixed}) > 1]
        differing += [k for s in mixed[1:] for k in s if k not in mixed[0]]
        columns.append(differing[0])
    return columns


def _option_names(runs: Sequence[RunRecord]) -> dict[tuple[str, str], str]:
    """(key, content of a config node) -> the option's name, from runs that spelt it out."""
    return {
        (key, str(node)): value
        for record in runs
        for key, value in record.overrides.items()
        if isinstance(node := _node(record.config, key), Mapping)
    }


def _value(record: RunRecord, key: str, names: Mapping[tuple[str, str], str]) -> str:
    """Value of a key in a run; of a component the name of the option, as far as it is known."""
    node = _node(record.config, key)
    if isinstance(node, Mapping):
        if key in record.overrides:
            return record.overrides[key]
        described = node.get("name") or str(node.get("_target_", "")).rpartition(".")[2].lower()
        return names.get((key, str(node)), str(described or "default"))
    if node is None:
        return record.overrides.get(key, "-")
    if isinstance(node, list):
        return f"[{','.join(map(str, node))}]"
    return str(node).lower() if isinstance(node, bool) else str(node)


def _node(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _plain_key(key: str) -> str:
    """``+a`` -> a, ``loss@losses.age`` -> losses.age."""
    return key.lstrip("+~").rpartition("@")[2]


def _ignored(key: str) -> bool:
    return key in _IGNORED or key.startswith(("hydra.", "hydra/"))


def _under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        found = parse(_text(path) or "{}")
    except (ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}
