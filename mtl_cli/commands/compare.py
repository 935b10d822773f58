"""``mtl compare DIR... [--by key] [--html FILE|--csv|--md|--json]``: the table of many runs."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from mtl_cli.commands.arguments import split
from mtl_cli.comparison import Comparison, Group, RunRecord, compare, find_runs, flatten
from mtl_cli.console import duration, number, table
from mtl_cli.errors import OK, ConfigError, nearest

USAGE = "mtl compare DIR... [--by KEY[,KEY]] [--html FILE | --csv | --md | --json]"
HELP = f"""usage: {USAGE}

One row per setting: mean +- standard deviation over its runs (seeds) of the metrics of best.pt.
  --by KEY[,KEY]   group by these keys only (weighting, optimizer.lr, ...); default: all that vary
  --html FILE      write a page; --csv, --md, --json print in that form instead of aligned text
"""


def main(argv: Sequence[str]) -> int:
    """Entry of the command line."""
    from mtl_cli.console import say

    return run(list(argv), say)


def run(args: Sequence[str], say: Callable[[str], None]) -> int:
    """Compare runs and print the tables.

    Args:
        args: words of the command line after ``compare``.
        say: prints a line.

    Raises:
        ConfigError: wrong command line, a key that no run has, or a file that cannot be written.
        DataError: there is no run in the directories.
    """
    if "--help" in args or "-h" in args:
        say(HELP)
        return OK
    directories, options = split(args, ("--by", "--html"), ("--csv", "--md", "--json"), USAGE)
    if not directories:
        raise ConfigError(f"compare: expected at least one directory; {USAGE}")
    forms = [name for name in options if name != "--by"]
    if len(forms) > 1:
        raise ConfigError(f"compare: {' and '.join(forms)} exclude each other; {USAGE}")
    runs = find_runs(directories)
    by = [key.strip() for key in options.get("--by", "").split(",") if key.strip()]
    _refuse_unknown(by, runs)
    comparisons = [
        compare(task, [r for r in runs if r.task == task], by)
        for task in dict.fromkeys(r.task for r in runs)
    ]
    if "--html" in options:
        path = Path(options["--html"]).expanduser()
        try:
            path.write_text(as_html(comparisons), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"compare: --html: cannot write {path} ({error})") from error
        say(f"written: {path}")
        return OK
    form = forms[0] if forms else ""
    writers = {"--csv": as_csv, "--md": as_markdown, "--json": as_json}
    for line in writers.get(form, as_text)(comparisons):
        say(line)
    return OK


def _refuse_unknown(by: Sequence[str], runs: Sequence[RunRecord]) -> None:
    """A key that no run has would put different settings into one row."""
    leaves = {key for run in runs for key in (*flatten(run.config), *run.overrides)}
    parts = [key.split(".") for key in leaves]
    known = {".".join(words[:n]) for words in parts for n in range(1, len(words) + 1)}
    problems = []
    for key in by:
        if key not in known:
            close = sorted(name for name in known if name.endswith(f".{key}"))
            hint = f"; did you mean '{close[0]}'?" if close else nearest(key, known)
            problems.append(f"compare: --by: no run has '{key}'{hint}")
    if problems:
        raise ConfigError(problems)


def as_text(comparisons: Sequence[Comparison]) -> list[str]:
    """Aligned tables, one per task."""
    lines: list[str] = []
    for comparison in comparisons:
        header, rows = cells(comparison)
        lines += ["", *_title(comparison), *table(header, rows), *_below(comparison)]
    return lines[1:]


def as_markdown(comparisons: Sequence[Comparison]) -> list[str]:
    """Tables to paste into a README or an issue."""
    lines: list[str] = []
    for comparison in comparisons:
        header, rows = cells(comparison)
        lines += ["", *_title(comparison), ""]
        for row in (header, ["---"] * len(header), *rows):
            escaped = [cell.replace("|", "\\|").replace("*", "\\*") for cell in row]
            lines.append(f"| {' | '.join(escaped)} |")
        lines += ["", *(f"- {line}" for line in _below(comparison))]
    return lines[1:]


def as_html(comparisons: Sequence[Comparison]) -> str:
    """One page that needs nothing else."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>mtl compare</title><style>"
        "body{font:14px sans-serif;margin:2em}td,th{padding:.3em .8em;text-align:right;"
        "border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}</style>"
    ]
    for comparison in comparisons:
        header, rows = cells(comparison)
        parts.append(f"<h1>{html.escape(' '.join(_title(comparison)))}</h1><table>")
        parts.append(f"<tr>{''.join(f'<th>{html.escape(cell)}' for cell in header)}")
        for row in rows:
            shown = (f"<b>{html.escape(c)}</b>" if c.endswith("*") else html.escape(c) for c in row)
            parts.append(f"<tr>{''.join(f'<td>{cell}' for cell in shown)}")
        parts.append("</table>")
        parts += [f"<p>{html.escape(line)}" for line in _below(comparison)]
    return "\n".join(parts) + "\n"


def as_csv(comparisons: Sequence[Comparison]) -> list[str]:
    """One line per row with full precision, all tasks below each other."""
    records = [record for comparison in comparisons for record in _records(comparison)]
    flat = [
        {
            **{key: value for key, value in record.items() if not isinstance(value, (dict, list))},
            **record["setting"],
            **{
                f"{task}.{name}.{part}": figures[part]
                for task, metrics in record["metrics"].items()
                for name, figures in metrics.items()
                for part in ("mean", "sd")
            },
        }
        for record in records
    ]
    text = io.StringIO()
    keys = dict.fromkeys(key for record in flat for key in record)
    writer = csv.DictWriter(text, list(keys), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue().splitlines()


def as_json(comparisons: Sequence[Comparison]) -> list[str]:
    """Everything, with full precision."""
    content = [
        {
            "task": comparison.task,
            "columns": comparison.columns,
            "rows": _records(comparison),
            "notes": comparison.notes,
        }
        for comparison in comparisons
    ]
    return [json.dumps(content, indent=1)]


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows as text: settings, runs, metrics, delta-m, time."""
    header = [*comparison.columns, "runs"]
    for task, name in comparison.metrics:
        unit = comparison.units.get((task, name))
        header.append(f"{task} {name}" + (f" ({unit})" if unit else ""))
    header += ["delta-m %", "time"]
    best = {metric: comparison.best(metric) for metric in comparison.metrics}
    rows = []
    for group in comparison.groups:
        finished, all_runs = len(group.counted), len(group.runs)
        row = [*group.label, str(finished) if finished == all_runs else f"{finished}/{all_runs}"]
        for metric in comparison.metrics:
            values = group.values[metric]
            mark = "*" if values and mean(values) == best[metric] else ""
            row.append(spread(values) + mark)
        rows.append([*row, spread(group.delta_m, sign="+"), duration(group.seconds)])
    return header, rows


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean, and the standard deviation of the sample where there are several."""
    if not values:
        return "-"
    text = f"{mean(values):+.2f}" if sign else number(mean(values))
    return text if len(values) == 1 else f"{text} \u00b1 {number(stdev(values), 2)}"


def _title(comparison: Comparison) -> list[str]:
    runs = [run for group in comparison.groups for run in group.runs]
    return [f"task {comparison.task or '-'}: {len(runs)} runs, best.pt on the validation split"]


def _below(comparison: Comparison) -> list[str]:
    """Legend, notes, and every run that did not finish."""
    lines = ["* best; \u00b1 standard deviation over runs", *comparison.notes]
    for group in comparison.groups:
        for run in group.runs:
            if not run.counted:
                code = run.status.get("exit_code")
                exit_code = f" (exit {code})" if code else ""
                lines.append(f"{run.state}{exit_code}: {run.path}: {_reason(run.status)}")
    return lines


def _reason(status: dict[str, Any]) -> str:
    lines = str(status.get("reason") or "").strip().splitlines()
    return lines[-1] if lines else "no summary"


def _records(comparison: Comparison) -> list[dict[str, Any]]:
    return [_record(comparison, group) for group in comparison.groups]


def _record(comparison: Comparison, group: Group) -> dict[str, Any]:
    """A row with full precision; unlike the text it names its runs."""
    metrics: dict[str, dict[str, Any]] = {}
    for (task, name), values in group.values.items():
        metrics.setdefault(task, {})[name] = {**_figures(values), "values": values}
    delta = _figures(group.delta_m)
    return {
        "task": comparison.task,
        "setting": dict(zip(comparison.columns, group.label, strict=True)),
        "finished": len(group.counted),
        "runs": len(group.runs),
        "metrics": metrics,
        "delta_m": delta["mean"],
        "delta_m_sd": delta["sd"],
        "seconds": group.seconds,
        "paths": [str(run.path) for run in group.runs],
        "states": [run.state for run in group.runs],
    }


def _figures(values: Sequence[float]) -> dict[str, float | None]:
    return {
        "mean": mean(values) if values else None,
        "sd": stdev(values) if len(values) > 1 else None,
    }
