"""What breaks a checkpoint in life, and what must survive it."""

from __future__ import annotations

import builtins
import errno
import os
import pickle
import random
import signal
import time

import numpy as np
import pytest
import torch

from mtl_cli import checkpoint
from mtl_cli.errors import CheckpointError, NonFiniteError, RunDirError, SafetyError


def state(size=20_000, step=0):
    return {"model": {"w": torch.full((size,), float(step))}, "progress": {"step": step}}


def write_forever(path, naive):
    step = 0
    while True:
        step += 1
        if naive:
            with path.open("wb") as file:
                torch.save({"format": 1, **state(step=step)}, file)
        else:
            checkpoint.save(path, state(step=step))


def survivors(path, naive, kills):
    """Kill a writer at random moments; how often is the file readable, and how many were torn."""
    readable = torn = 0
    rng = random.Random(0)
    for _ in range(kills):
        if naive:
            path.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            write_forever(path, naive)
        while not path.exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0.005, 0.03))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        torn += bool(list(path.parent.glob(".*.tmp.*")))
        for leftover in path.parent.glob(".*.tmp.*"):
            leftover.unlink()
        try:
            checkpoint.load(path)
            readable += 1
        except CheckpointError:
            pass
    return readable, torn


def test_kill_while_writing_never_loses_the_file(tmp_path):
    readable, torn = survivors(tmp_path / "a.pt", naive=False, kills=40)
    assert readable == 40
    assert torn >= 10, "the kills missed the writes: the test proved nothing"


def test_writing_in_place_would_lose_it(tmp_path):
    readable, _ = survivors(tmp_path / "a.pt", naive=True, kills=12)
    assert readable < 12


def test_order_of_the_calls_that_make_a_write_durable(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *a, n=name, f=original, **k: (calls.append(n), f(*a, **k))[1]
        )
    checkpoint.save(tmp_path / "a.pt", state())
    assert calls == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.95, 0.999])
def test_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(path)


def test_flipped_bits_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state())
    data = path.read_bytes()
    payload = data.index(torch.full((4,), 0.0).numpy().tobytes(), len(data) // 3)
    for offset in range(payload, payload + 20):
        broken = bytearray(data)
        broken[offset] ^= 1
        path.write_bytes(bytes(broken))
        with pytest.raises(CheckpointError, match=r"record .* fails its CRC|damaged"):
            checkpoint.load(path)


def test_falls_back_to_the_previous_one(tmp_path):
    files = checkpoint.Checkpoints(tmp_path)
    files.clean()
    for step in (1, 2, 3):
        files.save(step, state(step=step))
    newest = files.steps()[0]
    newest.write_bytes(newest.read_bytes()[:1000])
    warnings = []
    found = files.newest(warnings.append)
    assert found["progress"]["step"] == 2
    assert "step_00000003.pt" in warnings[0]


def test_no_valid_one_left(tmp_path):
    files = checkpoint.Checkpoints(tmp_path)
    files.clean()
    files.save(1, state())
    files.steps()[0].write_bytes(b"")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        files.newest(lambda line: None)


def test_best_survives_the_retention_of_steps(tmp_path):
    files = checkpoint.Checkpoints(tmp_path)
    files.clean()
    files.save(1, state(step=1), ("best",))
    for step in range(2, 6):
        files.save(step, state(step=step))
    assert checkpoint.load(tmp_path / "best.pt")["progress"]["step"] == 1
    assert checkpoint.load(tmp_path / "last.pt")["progress"]["step"] == 5
    assert len(files.steps()) == checkpoint.KEEP


def test_links_become_copies_where_links_fail(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    files = checkpoint.Checkpoints(tmp_path)
    files.clean()
    files.save(7, state(step=7), ("best",))
    assert checkpoint.load(tmp_path / "best.pt")["progress"]["step"] == 7


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_disk_errors_keep_the_previous_one(tmp_path, monkeypatch, code):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state(step=1))
    original = torch.save

    def failing(obj, file):
        original(obj, file)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(RunDirError, match="the previous checkpoint is intact"):
        checkpoint.save(path, state(step=2))
    assert checkpoint.load(path)["progress"]["step"] == 1
    assert not list(tmp_path.glob(".*.tmp.*"))


def test_file_size_limit_is_worded(tmp_path):
    """``ulimit -f`` reaches us as torch's RuntimeError about positions."""
    pid = os.fork()
    if pid == 0:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            checkpoint.save(tmp_path / "a.pt", state())
        except RunDirError as error:
            os._exit(0 if "cannot write" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not list(tmp_path.iterdir())


class Payload:
    def __reduce__(self):
        return builtins.open, ("/tmp/mtl-payload-ran", "w")


def test_code_in_a_checkpoint_is_refused(tmp_path):
    marker = "/tmp/mtl-payload-ran"
    if os.path.exists(marker):
        os.unlink(marker)
    path = tmp_path / "a.pt"
    torch.save({"format": 1, "model": Payload()}, path)
    with pytest.raises((SafetyError, CheckpointError)):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps({"format": 1, "model": Payload()}))
    with pytest.raises((SafetyError, CheckpointError)):
        checkpoint.load(path)
    assert not os.path.exists(marker)


@pytest.mark.parametrize("value", [np.float64(1.0), {1, 2}, np.zeros(3), object()])
def test_only_plain_types_are_saved(tmp_path, value):
    with pytest.raises(TypeError, match=r"'progress\.odd' is a"):
        checkpoint.save(tmp_path / "a.pt", {"progress": {"odd": value}})
    assert not list(tmp_path.iterdir())


def test_nan_is_never_saved(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, state(step=1))
    with pytest.raises(NonFiniteError, match=r"model\.w"):
        checkpoint.save(path, {"model": {"w": torch.tensor([float("nan")])}})
    assert checkpoint.load(path)["progress"]["step"] == 1


def test_newer_format(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"format": 99, "version": "9.0"}, path)
    with pytest.raises(CheckpointError, match=r"written by mtl 9\.0"):
        checkpoint.load(path)
