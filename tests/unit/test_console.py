"""The console: tables, plain lines, the live screen, and everything that terminals do to a run."""

import os
import pty
import re
import select
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from mtl_cli import console
from mtl_cli.console import Display, duration, error, final_table, number, say, sweep_table, table


class L1: ...


class CrossEntropy: ...


@dataclass
class Clock:
    images_per_second: float = 512.0
    wait_share: float = 0.031
    saved_at: float | None = None


@dataclass
class Progress:
    epoch: int = 2
    best_task: dict = field(
        default_factory=lambda: {
            "age": {"value": 5.58, "epoch": 1},
            "race": {"value": 0.801, "epoch": 2},
        }
    )


def work():
    age = SimpleNamespace(name="age", metrics=("mae",), unit="years")
    race = SimpleNamespace(name="race", metrics=("accuracy", "f1"), unit="")
    return SimpleNamespace(
        tasks=(age, race),
        objectives=tuple(SimpleNamespace(name=t.name, task=t.name) for t in (age, race)),
        losses={"age": L1(), "race": CrossEntropy()},
        epochs=30,
        data=SimpleNamespace(steps_per_epoch=370),
        device="cpu",
        dtype="fp32",
    )


TRAIN = {
    "event": "train",
    "step": 212,
    "epoch": 1.57,
    "losses": {"age": 0.4173, "race": None},
    "weights": {"age": 0.42, "race": 0.88},
    "lr": 9.1e-4,
}
EVAL = {
    "event": "eval",
    "epoch": 2,
    "metrics": {"age": {"mae": 5.6123}, "race": {"accuracy": 0.798, "f1": None}},
}
SUMMARY = {
    "run": "outputs/utkface/x",
    "best": {"epoch": 6, "score": 0.4123, "metrics": {"age": {"mae": 5.58}, "race": {"f1": None}}},
    "final": {"epoch": 8, "metrics": {"age": {"mae": 5.61}, "race": {"f1": None}}},
    "best_task": {"age": {"value": 5.58, "epoch": 6, "step": 1}},
    "baseline": {"age": {"mae": 15.02}, "race": {"f1": 0.12}},
    "units": {"age": {"mae": "years"}},
    "train_seconds": 187.2,
    "images_per_second": 512.3,
}


def shown(mode="plain"):
    display = Display(mode)
    display.stage("joint", work())
    return display


def test_table_aligns_numbers_right_and_words_left():
    assert table(["task", "mae"], [["age", "5.6"], ["size", "12.25"], ["x", "-"]]) == [
        "task    mae",
        "age     5.6",
        "size  12.25",
        "x         -",
    ]


def test_table_of_nothing_is_its_header():
    assert table(["a", "bb"], []) == ["a  bb"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (0.0, "0"),
        (5.6123, "5.612"),
        (12345.6, "12346"),
        (1e-9, "1e-09"),
        (float("nan"), "nan"),
        (-3.0, "-3"),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, "-"), (41, "41s"), (59.6, "1m00s"), (187, "3m07s")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_duration_of_hours():
    assert duration(7500) == "2h05m"


def test_results_go_to_stdout_and_errors_to_stderr(capsys):
    say("result")
    error("one\ntwo")
    captured = capsys.readouterr()
    assert captured.out == "result\n"
    assert captured.err == "mtl: error: one\nmtl: error: two\n"


def test_text_is_data_not_markup_nor_control(capsys):
    say("[bold]x[/bold] [/] \x1b[31mred\x07")
    assert capsys.readouterr().out == "[bold]x[/bold] [/] [31mred\n"


def test_final_table(capsys):
    final_table(SUMMARY)
    assert capsys.readouterr().out.splitlines() == [
        "task  metric       constant  final  best.pt  best @epoch",
        "age   mae (years)     15.02   5.61     5.58      5.58 @6",
        "race  f1               0.12      -        -",
        "best.pt: epoch 6, score 0.412 (mean gain over the constant predictor), "
        "3m07s, 512 images/s",
        "run: outputs/utkface/x",
    ]


def test_final_table_of_an_empty_summary_does_not_raise(capsys):
    final_table({})
    assert "run: -" in capsys.readouterr().out


def test_sweep_table_lists_every_job(capsys):
    units = {"age": {"mae": "years"}}
    metrics = {"age": {"mae": 5.9, "rmse": 7.0}, "race": {"accuracy": 0.79}}
    sweep_table(
        [
            {"job": "a", "state": "finished", "score": 0.31, "metrics": metrics, "units": units},
            {"job": "b", "state": "failed", "exit_code": 3, "reason": "no 'x'", "seconds": 3},
            {"job": "c", "state": "finished", "score": 0.41, "metrics": {"age": {"mae": 5.6}}},
        ]
    )
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines == [
        "job state score age mae (years) race accuracy time",
        "a finished 0.31 5.9 0.79 -",
        "b failed (3) - - - 3s no 'x'",
        "c finished 0.41* 5.6 - -",
        "3 jobs: 2 finished, 1 failed; * best score",
    ]


def test_plain_lines_come_once_per_half_minute_and_epoch(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    display = shown()
    capsys.readouterr()
    for _ in range(100):  # 1 s per step
        display.step(TRAIN, Clock(), 212)
        now[0] += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4  # at 0, 30, 60 and 90 s
    assert lines[0] == ("epoch 1.57/30  step 212  losses: age 0.417, race -  512 images/s")
    display.epoch(EVAL, Progress(), Clock())
    assert capsys.readouterr().err == (
        "epoch 2/30  age mae 5.612 years (best 5.58 @1), "
        "race accuracy 0.798 (best 0.801 @2)  512 images/s\n"
    )
    display.step(TRAIN, Clock(), 213)  # right after the line of the epoch
    assert capsys.readouterr().err == ""


def words(line):
    return " ".join(line.split())


def test_frame_shows_what_a_user_wants_to_see():
    display = shown("plain")
    display.epoch(EVAL, Progress(), Clock())
    clock = Clock(saved_at=console.time.monotonic() - 41)
    display.step({**TRAIN, "grad_norm": {"age": 0.81}, "cos": {"age": 0.74}}, clock, 212)
    lines = display.frame(120)
    assert lines[0].startswith("epoch 2/30 ━")
    assert "212/370   512 images/s   data 3% wait" in lines[0]
    assert words(lines[1]) == "task loss train val best weight |grad| cos"
    assert words(lines[2]) == "age l1 0.417 mae 5.612 years 5.58 @1 0.42 0.81 0.74"
    assert words(lines[3]) == "race cross_entropy - accuracy 0.798 0.801 @2 0.88 - -"
    assert re.fullmatch(r"cpu fp32   mem [\d.]+ GiB   lr 0.00091   saved 41s ago", lines[4])


def test_the_bar_is_full_when_an_epoch_is_done():
    display = shown()
    full = "epoch 2/30 " + 30 * "\u2501" + " 370/370"
    display.step({**TRAIN, "epoch": 2.0}, Clock(), 370)
    assert display.frame(120)[0].startswith(full)
    display.epoch(EVAL, Progress(), Clock())
    assert display.frame(120)[0].startswith(full)


def test_gradient_columns_only_where_there_are_gradients():
    display = shown()
    display.step(TRAIN, Clock(), 1)
    assert "cos" not in display.frame(120)[1]


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 200])
def test_frame_fits_any_width(width):
    display = shown()
    display.step(TRAIN, Clock(), 212)
    display.epoch(EVAL, Progress(), Clock())
    lines = display.frame(width)
    assert max(map(len, lines)) <= width
    if width >= 40:
        assert any("5.612" in line for line in lines)


def test_frame_before_anything_has_happened():
    assert shown().frame(80)[1].split() == ["task", "loss", "train", "val", "best", "weight"]


def test_other_ranks_are_silent(capsys):
    display = Display("plain", rank=1)
    display.start({"run": "x", "device": "cpu"})
    display.stage("joint", work())
    display.step(TRAIN, Clock(), 1)
    display.epoch(EVAL, Progress(), Clock())
    display.stop()
    assert capsys.readouterr() == ("", "")


def test_start_names_the_run_and_its_facts(capsys):
    hints = ["bf16 is faster"]
    Display("plain").start({"run": "outputs/a", "device": "cpu", "seed": 0, "hints": hints})
    assert capsys.readouterr().err == "run outputs/a\ndevice cpu, seed 0\nbf16 is faster\n"


@pytest.mark.parametrize(
    ("tty", "environment", "expected"),
    [
        (True, {"TERM": "xterm"}, "rich"),
        (True, {"TERM": "dumb"}, "plain"),
        (True, {}, "plain"),
        (True, {"TERM": "xterm", "CI": "true"}, "plain"),
        (False, {"TERM": "xterm"}, "plain"),
    ],
)
def test_live_only_on_a_real_terminal(monkeypatch, tty, environment, expected):
    for name in ("TERM", "CI"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: tty))
    assert console.resolve("auto") == expected


SCRIPT = """
import sys
sys.path.insert(0, {root!r}); sys.path.insert(0, {tests!r})
from test_console import *
display = Display()
display.start({{"run": "outputs/[red]x"}})
display.stage("joint", work())
for i in range(5):
    display._last = float("-inf")
    display.step(TRAIN, Clock(), i)
    if i == 2: display.message("a [bold] message")
display.epoch(EVAL, Progress(), Clock())
display.stop(); display.stop()
final_table(SUMMARY)
"""


def script():
    tests = os.path.dirname(__file__)
    return SCRIPT.format(root=os.path.dirname(os.path.dirname(tests)), tests=tests)


def on_a_terminal(columns, **environment):
    """Run the script on a pseudo-terminal of that width; what it wrote and its exit status."""
    master, slave = pty.openpty()
    variables = {"PATH": os.environ["PATH"], "TERM": "xterm", **environment}
    process = subprocess.Popen(
        [sys.executable, "-c", script()],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**variables, "COLUMNS": str(columns), "LINES": "30"},
    )
    os.close(slave)
    written = b""
    while select.select([master], [], [], 30)[0]:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the child has closed its side
            break
        if not chunk:
            break
        written += chunk
    os.close(master)
    return written.decode(), process.wait(timeout=30)


def test_live_screen_on_a_terminal_without_home():
    written, status = on_a_terminal(100)
    assert status == 0, written
    assert "\x1b[" in written  # it moved the cursor
    assert "a [bold] message" in written
    assert "outputs/[red]x" in written
    assert "mae 5.612 years" in written
    assert written.rstrip().endswith("run: outputs/utkface/x")


def test_live_screen_on_twenty_columns():
    written, status = on_a_terminal(20)
    assert status == 0, written


def test_a_closed_pipe_does_not_end_the_run():
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script() + "\nfor _ in range(20000): say('x' * 80)\n"],
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    os.close(reader)
    _, written = process.communicate(timeout=60)
    assert process.returncode == 0, written
    assert b"Traceback" not in written
    assert b"BrokenPipe" not in written


def test_streams_that_were_closed_before_the_start():
    command = f'exec "{sys.executable}" -c "$0" >&- 2>&-'
    assert subprocess.run(["sh", "-c", command, script()], check=False).returncode == 0


def test_ascii_terminal_gets_replacements():
    code = textwrap.dedent(
        """
        from mtl_cli.console import say
        say("größe \\u2501 \\udcff")
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONIOENCODING": "ascii", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=True,
    )
    assert done.stdout == b"gr??e ? ?\n"


def test_importing_the_console_is_cheap():
    code = "import sys, mtl_cli.console; print({'rich', 'torch'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True
    )
    assert done.stdout == b"set()\n"
