"""Signals to real processes: the step is finished, the checkpoint written, resume= continues.

``python -m tests.fault.test_signals DIR`` imports everything once and forks a child per case: it
never computes itself, so forking is safe and a start is quick. It prints how every case ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_cli import build, checkpoint, train
from mtl_cli.cli import main
from mtl_cli.data.base import DataSet
from mtl_cli.job import run_job
from mtl_cli.run import StopFlag
from tests import support

ROOT = Path(__file__).parents[2]
SMALL = (*support.SMALL, "display=plain", "log_every_steps=2", "save_every_steps=2")
OPTIONS = (*SMALL, "epochs=400")
WORKERS = ("data.workers=2", "data.cache=off")
FIRST = ("INT", "TERM", "HUP", "USR1", "USR2")
WAIT_S = 60.0


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def wait_for(condition: Any, what: str) -> float:
    """Wait until something is true; how long it took in seconds."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < WAIT_S, f"waited too long for {what}"
        time.sleep(0.002)
    return time.monotonic() - started


def newest(run: Path) -> int:
    """Step of the newest checkpoint, 0 if there is none."""
    files = checkpoint.Checkpoints(run / "checkpoints").steps()
    return int(files[0].stem.split("_")[1]) if files else 0


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


# --- the process that forks ----------------------------------------------------------------------


def load_once() -> None:
    """Import what every child would; composing is no computation that a fork could hurt."""
    import torchmetrics

    assert torchmetrics.__name__
    support.compose(*OPTIONS)
    support.compose(*OPTIONS, *WORKERS)


def start(place: Path, name: str, *overrides: str, hold: bool = False) -> int:
    """Fork a child, the leader of a group of its own, that trains."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    log = open(place / f"{name}.log", "w")  # noqa: SIM115
    sys.stdout = sys.stderr = log
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    if hold:  # a step that takes its time: the second signal arrives inside it
        original = train.train_step

        def slow(*args, **options):
            if newest(place / "synthetic" / name) >= 4:
                (place / f"{name}.inside").touch()
                for _ in range(100):
                    time.sleep(0.1)
            return original(*args, **options)

        train.train_step = slow
    typed = [*OPTIONS, *overrides]
    code = run_job(support.compose(*typed), place / "synthetic" / name, typed)
    log.flush()
    os._exit(code)


def ended(pid: int) -> int:
    """Exit code of a child; -N if signal N killed it."""
    found: list[tuple[int, int]] = []

    def gone() -> bool:
        found.append(os.waitpid(pid, os.WNOHANG))
        return found[-1][0] == pid

    wait_for(gone, f"the end of process {pid}")
    return os.waitstatus_to_exitcode(found[-1][1])


def alive(group: int) -> bool:
    """Whether a process of the group is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, 0)
        return True
    return False


def once(place: Path, name: str, number: int, *overrides: str, group: bool = False) -> dict:
    """One signal, to the main process or to its whole group."""
    pid, run = start(place, name, *overrides), place / "synthetic" / name
    wait_for(lambda: newest(run) >= 4, f"step 4 of {name}")
    sent = time.monotonic()
    (os.killpg if group else os.kill)(pid, number)
    code = ended(pid)
    took = time.monotonic() - sent
    wait_for(lambda: not alive(pid), f"the workers of {name}")
    return {"code": code, "seconds": took, "step": newest(run), **status(run)}


def twice(place: Path, name: str, number: int) -> dict:
    """The second signal ends the process at once, in the middle of a step."""
    pid, run = start(place, name, hold=True), place / "synthetic" / name
    wait_for((place / f"{name}.inside").exists, f"the slow step of {name}")
    os.kill(pid, number)
    time.sleep(0.05)
    sent = time.monotonic()
    os.kill(pid, number)
    code = ended(pid)
    return {"code": code, "seconds": time.monotonic() - sent, "step": newest(run)}


def serve(place: Path) -> None:
    load_once()
    found = {name: once(place, name, getattr(signal, f"SIG{name}")) for name in FIRST}
    found["group"] = once(place, "group", signal.SIGTERM, *WORKERS, group=True)
    found["workers"] = once(place, "workers", signal.SIGINT, *WORKERS)
    for name in ("INT", "TERM"):
        found[f"{name} twice"] = twice(place, f"{name}-twice", getattr(signal, f"SIG{name}"))
    (place / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[dict[str, Any], Path]]:
    place = tmp_path_factory.mktemp("signals")
    command = [sys.executable, "-m", "tests.fault.test_signals", str(place)]
    environ = {**environment(), "XDG_CACHE_HOME": str(place / "cache")}
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((place / "found.json").read_text()), place


@pytest.mark.parametrize("name", [*FIRST, "group", "workers"])
def test_a_signal_stops_in_order(name, served):
    found = served[0][name]
    assert found["code"] == found["exit_code"] == 75
    assert found["state"] == "interrupted"
    assert found["seconds"] < 5
    assert found["step"] >= 4
    sent = {"group": "TERM", "workers": "INT"}.get(name, name)
    assert found["reason"] == f"stopped by SIG{sent}"
    run = served[1] / "synthetic" / name
    assert f"continue with: mtl train resume={run}" in (served[1] / f"{name}.log").read_text()
    last = checkpoint.load(run / "checkpoints" / "last.pt")["progress"]["total_steps"]
    assert last == found["step"]
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("name", "code"), [("INT", 130), ("TERM", 143)])
def test_the_second_signal_ends_at_once(name, code, served):
    found = served[0][f"{name} twice"]
    assert found["code"] == code
    assert found["seconds"] < 1
    run = served[1] / "synthetic" / f"{name}-twice"
    assert checkpoint.load(run / "checkpoints" / "last.pt")["progress"]["total_steps"] >= 4


def test_a_stopped_run_continues(served, capsys):
    run = served[1] / "synthetic" / "TERM"
    epochs = served[0]["TERM"]["step"] // 4 + 1
    assert main(["train", f"resume={run}", f"epochs={epochs}"]) == 0
    assert status(run)["state"] == "finished"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert steps == sorted(steps)
    assert steps[-1] == 4 * epochs


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        stop = StopFlag()
        with stop.listening():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.signal == "SIGUSR1"
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["INT", "TERM", "USR1"])
def test_a_signal_while_torch_is_loaded(name, tmp_path):
    """A stand-in for torch takes its time; a scheduler is to start the same command again."""
    code = "import pathlib, time; pathlib.Path('loading').touch(); time.sleep(60)"
    (tmp_path / "torch.py").write_text(code)
    environ = {**environment(), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "mtl_cli", "train"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environ, stderr=subprocess.PIPE, text=True
    )
    wait_for((tmp_path / "loading").exists, "the import of torch")
    process.send_signal(getattr(signal, f"SIG{name}"))
    _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 75
    assert error == f"mtl: stopped by SIG{name} outside of training; start the same command again\n"


# --- at a chosen moment, in the test's own process -----------------------------------------------

EXACT = (*SMALL, "epochs=2", "schedule=transfer", "schedule.stages.probe.epochs=1")


def job(run: Path, resume: bool = False) -> int:
    cfg = support.compose(*EXACT)
    if resume:
        cfg.resume = str(run)
    return run_job(cfg, run, list(EXACT))


def outcome(run: Path) -> tuple[str, str, Any]:
    found = checkpoint.load(run / "checkpoints" / "last.pt")
    kept = {key: found[key] for key in ("model", "optimizers", "weighting", "meter")}
    best = json.loads((run / "summary.json").read_text())["best"]
    return support.digest(kept), (run / "metrics.jsonl").read_text(), best


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(run.parent / "cache"))
        assert job(run) == 0
    return outcome(run)


def signal_in(patch: pytest.MonkeyPatch, where: Any, name: str, call: int) -> None:
    """A SIGTERM at the beginning of one call of a function."""
    original, calls = getattr(where, name), [0]

    def signalled(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    patch.setattr(where, name, signalled)


@pytest.mark.parametrize(
    ("where", "name", "call", "step"),
    [
        (DataSet, "prepare", 1, 1),  # before the first step: it is finished, then saved
        (DataSet, "eval_batches", 1, 4),  # the evaluation is abandoned and done again
        (DataSet, "eval_batches", 3, 12),
        (torch, "save", 3, 5),  # the save is completed; so is the step that it finds begun
        (checkpoint.Checkpoints, "link", 2, 4),  # while best.pt is pointed
        (build.StageBuilder, "__call__", 2, 5),  # between two stages
    ],
)
def test_a_signal_at_a_bad_moment(where, name, call, step, undisturbed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in(patch, where, name, call)
        assert job(run) == 75
    assert newest(run) == step
    events = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert all(event["step"] <= step for event in events)
    assert job(run, resume=True) == 0
    assert outcome(run) == undisturbed


def test_a_torn_line_of_the_log_goes(undisturbed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_in(patch, train, "train_step", 7)
        assert job(run) == 75
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"event": "train", "step": 8, "ep')
    assert job(run, resume=True) == 0
    assert outcome(run) == undisturbed


# --- several ranks -------------------------------------------------------------------------------


@contextlib.contextmanager
def torchrun(place: Path, *overrides: str, restarts: int = 0) -> Iterator[subprocess.Popen[str]]:
    """Two ranks that train until something stops them, started again so many times."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *("--max-restarts", str(restarts)),
        *("-m", "mtl_cli", "train", *SMALL, f"output_dir={place}", "run_name=it", *overrides),
    ]
    with (place / "torchrun.log").open("a") as log:
        process = subprocess.Popen(
            command, cwd=place, env={**environment(), "PYTHONUNBUFFERED": "1"}, text=True,
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def children(pid: int) -> list[int]:
    """Child processes, from the kernel."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(text) for text in found.read_text().split()]


@pytest.mark.slow
@pytest.mark.ddp
def test_two_ranks_stop_together_and_continue(tmp_path):
    run = tmp_path / "synthetic" / "it"
    with torchrun(tmp_path, "epochs=4000") as process:
        wait_for(lambda: newest(run) >= 4, "step 4")
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    assert status(run)["state"] == "interrupted", (tmp_path / "torchrun.log").read_text()[-3000:]
    assert status(run)["exit_code"] == 75
    epochs = newest(run) // 4 + 1
    with torchrun(tmp_path, "resume=auto", f"epochs={epochs}") as process:
        assert process.wait(60) == 0, (tmp_path / "torchrun.log").read_text()[-3000:]
    assert status(run)["state"] == "finished"
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]
    assert steps == sorted(steps)
    assert steps[-1] == 4 * epochs


@pytest.mark.slow
@pytest.mark.ddp
def test_a_killed_rank_ends_the_other(tmp_path):
    run = tmp_path / "synthetic" / "it"
    with torchrun(tmp_path, "epochs=4000") as process:
        wait_for(lambda: newest(run) >= 4, "step 4")
        ranks = children(process.pid)
        assert len(ranks) == 2
        leader = status(run)["pid"]
        (other,) = set(ranks) - {leader}
        killed = time.monotonic()
        os.kill(other, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{leader}").exists(), "the end of rank 0")
        assert time.monotonic() - killed < 30
        assert process.wait(30) == 1
    assert status(run)["state"] == "failed", (tmp_path / "torchrun.log").read_text()[-3000:]
    assert status(run)["exit_code"] == 5
    checkpoint.load(run / "checkpoints" / "last.pt")


@pytest.mark.slow
@pytest.mark.ddp
def test_torchrun_restarts_to_the_same_digest(tmp_path):
    """A killed rank costs the steps since the last checkpoint, and leaves no other trace."""
    found = []
    for name in ("undisturbed", "killed"):
        place = tmp_path / name
        place.mkdir()
        run = place / "synthetic" / "it"
        with torchrun(place, "epochs=50", "weighting=pcgrad", restarts=2) as process:
            for step in (20, 100) if name == "killed" else ():
                wait_for(lambda step=step, run=run: newest(run) >= step, f"step {step}")
                leader = status(run)["pid"]
                (other,) = set(children(process.pid)) - {leader}
                os.kill(other, signal.SIGKILL)
                wait_for(
                    lambda leader=leader, run=run: status(run)["pid"] != leader, "another attempt"
                )
            assert process.wait(120) == 0, (place / "torchrun.log").read_text()[-3000:]
        assert status(run)["state"] == "finished"
        saved = checkpoint.load(run / "checkpoints" / "last.pt")
        kept = {key: saved[key] for key in ("model", "optimizers", "weighting")}
        found.append((support.digest(kept), (run / "metrics.jsonl").read_text()))
    assert found[0] == found[1]


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
