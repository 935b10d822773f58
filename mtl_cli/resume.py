"""Continues a run: what was saved, plus what is typed now, minus what must not change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl_cli.compose import Composer
from mtl_cli.config import REDACTED, check, leaves, raise_all, read_yaml, to_text
from mtl_cli.errors import CheckpointError, ConfigError
from mtl_cli.overrides import Command
from mtl_cli.taskfile import unquote

CONFIG, OVERRIDES, STATUS = "config.yaml", "overrides.txt", "status.json"
SPEC = "multirun.yaml"  # of a sweep: its overrides and its jobs, in the directory above theirs
# First match decides: free to change, refused, else allowed with a warning.
FREE = (
    "resume", "init_from", "run_name", "output_dir", "epochs", "device", "display", "patience",
    "save_every_steps", "log_every_steps", "best_by", "on_nonfinite", "data.workers",
    "data.cache*", "logger*", "backbone.pretrained",
)  # fmt: skip
REFUSED = (
    "task.name", "task.outputs*", "heads*", "losses*._target_", "backbone*", "weighting*",
    "data._target_", "data.split_seed", "schedule._target_", "schedule.mode",
    "schedule.stages.*.task", "schedule.stages.*.resolved*", "optimizer._target_", "only",
)  # fmt: skip

# Groups whose other options a saved state never fits; saved keys of the old option would not compose.
SWAPPED = ("task", "backbone", "weighting", "schedule", "optimizer")


@dataclass(frozen=True)
class Resumed:
    """A run to be continued, or to be started under a fixed name.

    Args:
        cfg: the checked config; ``cfg.resume`` is the run directory, or null to start afresh.
        run_dir: where the run lives.
        overrides: the saved overrides with the new ones.
        notes: what the user should read.
    """

    cfg: DictConfig
    run_dir: Path
    overrides: list[str]
    notes: list[str] = field(default_factory=list)


def split(overrides: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take ``resume=`` out of the overrides: its value (None if absent or null) and the rest."""
    value: str | None = None
    rest = []
    for text in overrides:
        key, found, typed = text.partition("=")
        if key.lstrip("+") == "resume" and found:
            value = None if typed in {"", "null"} else unquote(typed)
        else:
            rest.append(text)
    if value and any(t.partition("=")[0] == "init_from" and t != "init_from=null" for t in rest):
        raise ConfigError("resume and init_from: only one of them; init_from starts a new run")
    return value, rest


def merge(saved: Sequence[str], new: Sequence[str]) -> list[str]:
    """Saved overrides with the new ones; a key typed again wins."""
    typed = {_key(text) for text in new}
    kept = [text for text in saved if _key(text) not in typed]
    last = {_key(text): text for text in new}
    return [*kept, *last.values()]


def load(composer: Composer, command: Command, value: str) -> Resumed:
    """Compose the config of the run that ``resume=value`` names.

    Raises:
        CheckpointError: there is no such run, or what is typed does not fit it (exit 6).
        ConfigError: the result has problems.
    """
    if value == "auto":
        return _auto(composer, command)
    texts = _waiting(Path(value).expanduser())
    if texts is not None:
        return _start_job(composer, command, Path(value).expanduser().resolve(), texts)
    return continue_run(composer, command, find(value))


def _waiting(path: Path) -> list[str] | None:
    """Overrides of a sweep's job that has no state to continue, None if the path is no such job."""
    spec = path.resolve().parent / SPEC
    if not spec.is_file() or any(path.glob("checkpoints/*.pt")):
        return None
    texts = (read_yaml(spec).get("jobs") or {}).get(path.resolve().name)
    return None if texts is None else [str(text) for text in texts]


def _start_job(composer: Composer, command: Command, run_dir: Path, texts: list[str]) -> Resumed:
    """A job of a sweep, in the directory that the sweep has for it."""
    from mtl_cli.launch import prepare

    overrides = merge(texts, command.overrides)
    cfg, problems = prepare(composer, dataclasses.replace(command, overrides=overrides))
    raise_all(problems)
    assert cfg is not None
    return Resumed(cfg, run_dir, overrides, [f"starts {run_dir}"])


def find(value: str) -> Path:
    """Run directory behind a path: itself, or the one that a checkpoint lies in.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(value).expanduser()
    for place in (path, path.parent, path.parent.parent):
        if (place / CONFIG).is_file():
            if place != path and path.name != "checkpoints" and path.stem != "last":
                raise CheckpointError(
                    f"resume={value}: a run continues from its newest checkpoint; type "
                    f"resume={place}, or init_from={value} to start a new run from these weights"
                )
            return place.resolve()
    state = "nothing there" if not path.exists() else f"no {CONFIG} in it"
    raise CheckpointError(f"resume={value}: not a run ({state}); ls outputs/*/ shows the runs")


def continue_run(composer: Composer, command: Command, run_dir: Path) -> Resumed:
    """Saved overrides plus the new ones, if they still give the saved config; else the file."""
    from mtl_cli.launch import prepare

    saved = read_yaml(run_dir / CONFIG)
    texts = _lines(run_dir / OVERRIDES)
    base, problems = prepare(composer, dataclasses.replace(command, overrides=texts))
    changed = None if base is None or problems else difference(saved, plain(base))
    notes = [f"continues {run_dir}"]
    if base is not None and changed is not None and all(_matches(key, FREE) for key, *_ in changed):
        overrides = merge(texts, command.overrides)
        cfg, problems = prepare(composer, dataclasses.replace(command, overrides=overrides))
        if problems and (other := [t for t in command.overrides if _key(t) in SWAPPED]):
            raise CheckpointError(
                f"resume={run_dir}: its state does not fit {', '.join(other)}; "
                f"type init_from={run_dir} to start a new run from its weights"
            )
        raise_all(problems)
        assert cfg is not None
    else:
        why = ", ".join(key for key, *_ in (changed or [])[:3]) or (problems or ["?"])[0]
        notes.append(f"resume: its overrides no longer give its {CONFIG} ({why}); the file decides")
        cfg = OmegaConf.create(saved)
        _apply(cfg, command.overrides, run_dir)
        overrides = merge(texts, command.overrides)
        raise_all(check(cfg))
    notes += judge(difference(saved, plain(cfg)), run_dir)
    cfg.resume = str(run_dir)
    return Resumed(cfg, run_dir, overrides, notes)


def _auto(composer: Composer, command: Command) -> Resumed:
    """The run with this name, or with the name that these overrides give; fresh if there is none."""
    from mtl_cli.launch import prepare

    cfg, problems = prepare(composer, command)
    raise_all(problems)
    assert cfg is not None
    name = cfg.run_name or "auto-" + digest(command.overrides)
    run_dir = (Path(cfg.output_dir).expanduser() / cfg.task.name / name).resolve()
    cfg.run_name = name
    if not (run_dir / CONFIG).is_file() or not any(run_dir.glob("checkpoints/*.pt")):
        cfg.resume = None
        return Resumed(cfg, run_dir, command.overrides, [f"resume=auto: starts {run_dir}"])
    notes = judge(difference(read_yaml(run_dir / CONFIG), plain(cfg)), run_dir)
    cfg.resume = str(run_dir)
    return Resumed(cfg, run_dir, command.overrides, [f"resume=auto: continues {run_dir}", *notes])


def digest(overrides: Sequence[str], length: int = 8) -> str:
    """Short name for a set of overrides, whatever their order."""
    return hashlib.sha256("\n".join(sorted(overrides)).encode()).hexdigest()[:length]


def setting(tree: dict[str, Any], free: Sequence[str]) -> str:
    """Text that is equal for equal configs; keys that match ``free`` do not count."""
    flat = leaves(OmegaConf.create(tree))
    kept = {key: value for key, value in flat.items() if not _matches(key, free)}
    return json.dumps(kept, sort_keys=True, default=str)


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every leaf that differs; redacted values count as equal."""
    before, after = leaves(OmegaConf.create(old)), leaves(OmegaConf.create(new))
    return [
        (key, before.get(key), after.get(key))
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and REDACTED not in (before.get(key), after.get(key))
    ]


def judge(changes: Sequence[tuple[str, Any, Any]], run_dir: Path) -> list[str]:
    """Say what differs from the saved config.

    Raises:
        CheckpointError: something changed that the saved state does not fit.
    """
    notes, refused = [], []
    for key, old, new in changes:
        if key == "resume":
            continue
        text = f"{key} {_show(old)} -> {_show(new)}"
        if _matches(key, FREE):
            notes.append(f"resume: {text}")
        elif _matches(key, REFUSED):
            refused.append(text)
        else:
            notes.append(f"resume: warning: {text}; the run is no longer the one that was started")
    if refused:
        raise CheckpointError(
            f"resume={run_dir}: its state does not fit {'; '.join(refused)}; "
            f"type init_from={run_dir} to start a new run from its weights"
        )
    return notes


def _apply(cfg: DictConfig, overrides: Sequence[str], run_dir: Path) -> None:
    """Set plain keys on a saved config."""
    known = leaves(cfg)
    for text in overrides:
        key, found, value = text.lstrip("+").partition("=")
        inside = any(path == key or path.startswith(f"{key}.") for path in known)
        parent = OmegaConf.select(cfg, key.rpartition(".")[0], default=None)
        group = OmegaConf.is_dict(OmegaConf.select(cfg, key, default=None)) and "{" not in value
        rule = key.rpartition(".")[0].endswith(("lr_mult", "unfreeze_at"))
        if not found or group or "@" in key or not (inside or (rule and parent is not None)):
            raise CheckpointError(
                f"resume={run_dir}: '{text}' cannot be applied to its {CONFIG} "
                f"(its options are fixed: the config files have changed since); "
                f"type init_from={run_dir} to start a new run from its weights"
            )
        OmegaConf.update(cfg, key, OmegaConf.from_dotlist([f"value={value}"]).value)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config as its file would read."""
    plain = OmegaConf.to_container(OmegaConf.create(to_text(cfg)))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [line for line in text.splitlines() if line.strip()]


def _key(text: str) -> str:
    return text.lstrip("+~").partition("=")[0]


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(key, p) or fnmatch(key, f"{p.rstrip('*')}.*") for p in patterns)


def _show(value: Any) -> str:
    return "null" if value is None else str(value)
