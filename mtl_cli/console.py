"""Everything that is printed: plain lines, tables, and the live screen of a run.

The only module that prints and the only one that imports rich (on a terminal, when a run starts).
All text is data here: no markup is interpreted, control characters are dropped, and a closed pipe
or a vanished terminal never ends a run.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REFRESH_S = 0.25  # at most 4 frames per second
PLAIN_S = 30.0  # at most one line per step in this time
BAR = 30  # characters

_CONTROL = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])
_RIGHT = re.compile(r"^[-+]?[\d.]")


def say(line: str = "") -> None:
    """Print to stdout: results."""
    _write("stdout", line)


def error(line: str) -> None:
    """Print to stderr, every line of it marked as an error."""
    for one in line.splitlines():
        _write("stderr", f"mtl: error: {one}")


def notice(line: str) -> None:
    """Print one line to stderr that is no error."""
    _write("stderr", f"mtl: {line}")


def trace(text: str) -> None:
    """Print a traceback to stderr as it is."""
    for line in text.splitlines():
        _write("stderr", line)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Aligned lines: numbers to the right, words to the left, two spaces between columns."""
    cells = [[_clean(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [
        bool(column) and all(_RIGHT.match(cell) or cell in ("", "-") for cell in column)
        for column in (zip(*cells, strict=True) if cells else [[] for _ in header])
    ]
    return [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [list(header), *cells]
    ]


def number(value: float | None, digits: int = 4) -> str:
    """A number with ``digits`` significant digits, ``-`` for None."""
    if value is None:
        return "-"
    if value and math.isfinite(value) and 10**digits <= abs(value) < 1e7:
        return f"{value:.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float | None) -> str:
    """Seconds as 41s, 3m07s or 2h05m."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def final_table(summary: Mapping[str, Any]) -> None:
    """The end of a run: per task and metric the constant predictor, the last and the best model.

    Args:
        summary: content of summary.json.
    """
    final, best = summary.get("final") or {}, summary.get("best") or {}
    rows = []
    for task, metrics in (final.get("metrics") or best.get("metrics") or {}).items():
        for position, name in enumerate(metrics):
            unit = summary.get("units", {}).get(task, {}).get(name, "")
            own = summary.get("best_task", {}).get(task) if position == 0 else None
            rows.append(
                [
                    task if position == 0 else "",
                    f"{name} ({unit})" if unit else name,
                    number(summary.get("baseline", {}).get(task, {}).get(name)),
                    number(metrics[name]),
                    number(best.get("metrics", {}).get(task, {}).get(name)),
                    f"{number(own['value'])} @{own['epoch']:g}" if own else "",
                ]
            )
    for line in table(["task", "metric", "constant", "final", "best.pt", "best @epoch"], rows):
        say(line)
    facts = []
    if best.get("score") is not None:
        facts.append(
            f"best.pt: epoch {best['epoch']:g}, score {number(best['score'], 3)} "
            "(mean gain over the constant predictor)"
        )
    facts.append(duration(summary.get("train_seconds")))
    facts.append(f"{number(summary.get('images_per_second'), 3)} images/s")
    say(", ".join(facts))
    say(f"run: {summary.get('run', '-')}")


def sweep_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The end of a sweep: every job, its score, the first metric of every task, its failure.

    Args:
        rows: per job ``job`` (its key), ``state``, ``score``, ``metrics`` and ``units`` {task:
            {name: value}}, ``seconds``, ``exit_code`` and ``reason`` (the last line of its
            failure); all but ``job`` may be missing.
    """
    columns: dict[tuple[str, str], str] = {}  # task and metric -> header
    for row in rows:
        for task, metrics in (row.get("metrics") or {}).items():
            for name in list(metrics)[:1]:
                of = (row.get("units") or {}).get(task, {}).get(name, "")
                columns.setdefault((task, name), f"{task} {name}" + (f" ({of})" if of else ""))
    known = [row["score"] for row in rows if row.get("score") is not None]
    best = max(known, default=None)
    lines = []
    for row in rows:
        score, metrics, state = row.get("score"), row.get("metrics") or {}, row.get("state", "-")
        code = row.get("exit_code")
        lines.append(
            [
                str(row["job"]),
                f"{state} ({code})" if code else str(state),
                number(score) + ("*" if score is not None and score == best else ""),
                *(number(metrics.get(task, {}).get(name)) for task, name in columns),
                duration(row.get("seconds")),
                str(row.get("reason") or ""),
            ]
        )
    for line in table(["job", "state", "score", *columns.values(), "time", ""], lines):
        say(line)
    states = [str(row.get("state", "-")) for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    say(f"{len(rows)} jobs: {counts or 'none'}" + ("; * best score" if known else ""))


@dataclass
class _Row:
    """One objective on the screen; the metric stands in the first row of its task."""

    objective: str
    task: str
    loss: str
    metric: str = ""
    unit: str = ""


class Display:
    """The screen of a run: live on a terminal, else a line per epoch and per half minute.

    Args:
        mode: auto, rich or plain. ``auto`` is live if stderr is a terminal that can move its
            cursor and CI is not set.
        rank: only rank 0 prints.
    """

    def __init__(self, mode: str = "auto", rank: int = 0) -> None:
        self.mode = "off" if rank else resolve(mode)
        self.forced = mode == "rich"
        self.rows: list[_Row] = []
        self.place = ""  # device and precision
        self.device: Any = None
        self.epochs = self.steps_per_epoch = 0
        self.train: Mapping[str, Any] = {}
        self.evaluation: Mapping[str, Any] = {}
        self.best: Mapping[str, Any] = {}
        self.clock: Any = None
        self.current, self.step_in_epoch = 1, 0  # epoch on the screen, from 1
        self._last = float("-inf")
        self._live: Any = None

    def start(self, info: Mapping[str, Any]) -> None:
        """Say where the run is and what it is, before it starts.

        Args:
            info: ``run`` (its path), then any facts, shown as ``name value``; each entry of a
                list gets a line of its own.
        """
        plain = {k: v for k, v in info.items() if k != "run" and not isinstance(v, list)}
        lines = [f"run {info['run']}"] if "run" in info else []
        lines.append(", ".join(f"{name} {value}" for name, value in plain.items()))
        lines += [str(line) for value in info.values() if isinstance(value, list) for line in value]
        for line in filter(None, lines):
            self.message(line)

    def stage(self, name: str, work: Any) -> None:
        """Take over the tasks, losses and length of a stage.

        Args:
            name: its name.
            work: tasks, objectives, losses, epochs, data.steps_per_epoch, device and dtype.
        """
        tasks = {task.name: task for task in work.tasks}
        self.rows = []
        for objective in work.objectives:
            first = all(row.task != objective.task for row in self.rows)
            row = _Row(objective.name, objective.task, snake(type(work.losses[objective.task])))
            task = tasks[objective.task]
            if first and task.metrics:
                row.metric = task.metrics[0]
                row.unit = unit(task.unit, row.metric)
            self.rows.append(row)
        self.epochs, self.steps_per_epoch = work.epochs, work.data.steps_per_epoch
        self.device, self.place = work.device, f"{work.device} {work.dtype}"
        self.train, self.evaluation, self.best = {}, {}, {}
        self.current, self.step_in_epoch = 1, 0
        self.message(f"stage {name}: {self.epochs} epochs of {self.steps_per_epoch} steps")

    def step(self, record: Mapping[str, Any], clock: Any, step_in_epoch: int) -> None:
        """Take a ``train`` line of metrics.jsonl; draw only if it is time.

        Args:
            record: the line.
            clock: throughput: images_per_second, wait_share, saved_at.
            step_in_epoch: steps of the current epoch that are done.
        """
        self.train, self.clock, self.step_in_epoch = record, clock, step_in_epoch
        self.current = max(1, math.ceil(record.get("epoch", 0)))
        if self.mode == "off":
            return
        now = time.monotonic()
        if self.mode == "rich" and now - self._last >= REFRESH_S:
            self._last = now
            self._draw()
        elif self.mode == "plain" and now - self._last >= PLAIN_S:
            self._last = now
            self.message(self._step_line())

    def epoch(self, record: Mapping[str, Any], progress: Any, clock: Any) -> None:
        """Take an ``eval`` line of metrics.jsonl.

        Args:
            record: the line.
            progress: epoch (finished) and best_task {task: {value, epoch}}.
            clock: as in :meth:`step`.
        """
        self.evaluation, self.best, self.clock = record, progress.best_task, clock
        self.current, self.step_in_epoch = round(record.get("epoch", 0)), self.steps_per_epoch
        self._last = time.monotonic()
        if self.mode == "rich":
            self._draw()
        elif self.mode == "plain":
            self.message(self._epoch_line())

    def message(self, line: str) -> None:
        """One line on stderr, above the live screen where there is one."""
        if self.mode != "off":
            _write("stderr", line)

    def stop(self) -> None:
        """Leave the last frame where it is; safe to call twice."""
        live, self._live = self._live, None
        if live is not None:
            with contextlib.suppress(OSError, ValueError):
                self._draw(live)
            with contextlib.suppress(OSError, ValueError):
                live.stop()

    def frame(self, width: int) -> list[str]:
        """The live screen as lines of at most ``width`` characters."""
        lines = [self._bar(width), *self._task_lines(width), self._footer()]
        return [line[:width] for line in lines if line]

    def _draw(self, live: Any = None) -> None:
        from rich.text import Text

        live = live or self._live
        try:
            if live is None:
                live = self._live = _start_live(self.forced)
            lines = self.frame(live.console.width)
            text = Text("\n".join(lines), no_wrap=True, overflow="crop")
            live.update(text, refresh=True)
        except (OSError, ValueError):  # the terminal is gone; the run goes on
            self.mode, self._live = "off", None

    def _bar(self, width: int) -> str:
        steps = max(1, self.steps_per_epoch)
        done = self.step_in_epoch / steps
        length = max(0, min(BAR, width - 30))
        filled = round(length * done)
        bar = "\u2501" * filled + "\u2574" * (length - filled)
        parts = [f"epoch {self.current}/{self.epochs} {bar} {self.step_in_epoch}/{steps}"]
        if self.clock is not None:
            parts.append(f"{number(self.clock.images_per_second, 3)} images/s")
            parts.append(f"data {self.clock.wait_share:.0%} wait")
        return "   ".join(parts)

    def _task_lines(self, width: int) -> list[str]:
        """The table, without the columns that do not fit."""
        columns = {
            "task": [row.objective for row in self.rows],
            "loss": [row.loss for row in self.rows],
            "train": [number(self._at("losses", row), 3) for row in self.rows],
            "val": [self._value(row) for row in self.rows],
            "best": [self._best(row) for row in self.rows],
            "weight": [number(self._at("weights", row), 3) for row in self.rows],
            "|grad|": [number(self._at("grad_norm", row), 3) for row in self.rows],
            "cos": [number(self._at("cos", row), 2) for row in self.rows],
        }
        for optional in ("|grad|", "cos"):  # measured with the first line of the log
            if all(cell == "-" for cell in columns[optional]):
                del columns[optional]
        lines: list[str] = []
        for dropped in ("", "cos", "|grad|", "loss", "weight", "best", "train"):
            columns.pop(dropped, None)
            lines = table(list(columns), zip(*columns.values(), strict=True))
            if max(map(len, lines)) <= width:
                break
        return lines

    def _footer(self) -> str:
        parts = [self.place, f"mem {_memory(self.device)}"]
        if self.train.get("lr") is not None:
            parts.append(f"lr {self.train['lr']:.2g}")
        saved_at = getattr(self.clock, "saved_at", None)
        if saved_at is not None:
            parts.append(f"saved {duration(time.monotonic() - saved_at)} ago")
        return "   ".join(parts)

    def _at(self, key: str, row: _Row) -> float | None:
        values: Mapping[str, float | None] = self.train.get(key) or {}
        return values.get(row.objective)

    def _value(self, row: _Row) -> str:
        if not row.metric:
            return ""
        value = self.evaluation.get("metrics", {}).get(row.task, {}).get(row.metric)
        return " ".join(filter(None, (row.metric, number(value), row.unit)))

    def _best(self, row: _Row) -> str:
        best = self.best.get(row.task) if row.metric else None
        return f"{number(best['value'])} @{best['epoch']:g}" if best else "-"

    def _step_line(self) -> str:
        losses = ", ".join(f"{r.objective} {number(self._at('losses', r), 3)}" for r in self.rows)
        rate = number(self.clock.images_per_second, 3)
        return (
            f"epoch {self.train.get('epoch', 0):.2f}/{self.epochs}  step {self.train.get('step')}"
            f"  losses: {losses}  {rate} images/s"
        )

    def _epoch_line(self) -> str:
        values = ", ".join(
            f"{row.task} {self._value(row)} (best {self._best(row)})"
            for row in self.rows
            if row.metric
        )
        rate = number(self.clock.images_per_second, 3)
        epoch = self.evaluation.get("epoch", 0)
        return f"epoch {epoch:g}/{self.epochs}  {values}  {rate} images/s"


def resolve(mode: str) -> str:
    """Rich or plain, from the mode asked for and the terminal."""
    if mode != "auto":
        return mode
    terminal = sys.stderr is not None and sys.stderr.isatty()
    able = os.environ.get("TERM", "dumb") not in ("", "dumb")
    return "rich" if terminal and able and not os.environ.get("CI") else "plain"


def snake(cls: type) -> str:
    """Class name as its option is written: CrossEntropy -> cross_entropy, SmoothL1 -> smooth_l1."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()


def unit(task_unit: str, metric: str) -> str:
    """Unit of a metric of a task whose targets have ``task_unit``."""
    if not task_unit or metric not in ("mae", "rmse", "mse"):
        return ""
    return f"{task_unit}^2" if metric == "mse" else task_unit


def _start_live(forced: bool) -> Any:
    from rich.console import Console
    from rich.live import Live

    live = Live(
        console=Console(stderr=True, force_terminal=True if forced else None, highlight=False),
        auto_refresh=False,  # no thread of its own: it would be forked into the data workers
        redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),
        redirect_stderr=True,
        vertical_overflow="crop",
    )
    live.start()
    return live


def _memory(device: Any) -> str:
    if getattr(device, "type", "") == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return f"{(total - free) / 2**30:.1f}/{total / 2**30:.0f} GiB"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB"


def _clean(text: str) -> str:
    """Without control characters: a file name must not steer the terminal."""
    return text.translate(_CONTROL)


def _write(name: str, text: str) -> None:
    stream = getattr(sys, name)
    if stream is None:
        return
    text = _clean(text) + "\n"
    try:
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "replace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):  # the reader has gone (| head), or the terminal
        _silence(stream)


def _silence(stream: Any) -> None:
    """Let everything that is written from now on vanish, the flush at exit included."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
