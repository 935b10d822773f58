"""The cache of decoded images: right bytes whatever dies, waits, or runs full."""

import errno
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest

from mtl_cli.data import cache, fill
from mtl_cli.data.base import Source
from mtl_cli.data.cache import Disk, Memory, Store, open_store
from mtl_cli.errors import DataError, ResourceError

FORK = multiprocessing.get_context("fork")


class Slow(Source):
    """Row i is filled with i; every decoding leaves a line in a log."""

    name = "slow"

    def __init__(self, log=None, seconds=0.0, bad=()):
        self.log, self.seconds, self.bad = log, seconds, bad

    def table(self, outputs):
        raise NotImplementedError

    def image(self, row, size, resize="crop"):
        time.sleep(self.seconds)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{row}\n")
        if row in self.bad:
            raise DataError(f"row {row} is damaged")
        return np.full((size, size, 3), row, np.uint8)

    def identity(self):
        return "slow"


def _disk(home, count=200, source=None, size=8):
    return Disk(source or Slow(), size, "crop", count=count, home=home, name="slow")


def _right(store, rows):
    stack, failed = store.take(rows)
    return not failed and all((stack[k] == row).all() for k, row in enumerate(rows))


@pytest.mark.parametrize("workers", [0, 2])
def test_filled_once_and_shared(tmp_path, workers):
    log = tmp_path / "log"
    for _ in range(2):
        store = _disk(tmp_path / "c", source=Slow(log))
        assert fill.fill(store, range(50, 150), workers=workers) == {}
        assert _right(store, [149, 50, 77])
        assert (store.read(99) == 99).all()
    assert len(log.read_text().splitlines()) == 100
    assert store.missing([0, 60]) == [0]


def test_key_holds_everything_that_determines_pixels(tmp_path):
    class Other(Slow):
        def identity(self):
            return "other"

    a = _disk(tmp_path)
    paths = {a.path, _disk(tmp_path, size=9).path, _disk(tmp_path, count=201).path}
    paths |= {_disk(tmp_path, source=Other()).path}
    paths |= {Disk(Slow(), 8, "pad", count=200, home=tmp_path, name="slow").path}
    assert len(paths) == 5
    assert _disk(tmp_path).path == a.path


def _fill_slowly(home, log):
    fill.MARK_S = 0.02
    fill.fill(_disk(home, source=Slow(log, 0.002)), range(200), workers=0)


def test_killed_filler_leaves_only_right_images(tmp_path):
    log, kills, during = tmp_path / "log", 0, 0
    for _ in range(4):
        before = len(_disk(tmp_path / "c").missing(range(200)))
        if not before:
            break
        child = FORK.Process(target=_fill_slowly, args=(tmp_path / "c", log))
        child.start()
        deadline = time.monotonic() + 10
        while len(_disk(tmp_path / "c").missing(range(200))) > max(0, before - 40):
            assert time.monotonic() < deadline, "no progress"
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        store = _disk(tmp_path / "c")
        done = sorted(set(range(200)) - set(store.missing(range(200))))
        during += 0 < len(done) < 200
        assert _right(store, done)
    assert kills >= 2
    assert during >= 2
    store = _disk(tmp_path / "c")
    assert fill.fill(store, range(200)) == {}  # the lock of the dead is free
    assert _right(store, list(range(200)))


def test_two_fillers_share_the_work(tmp_path):
    log = tmp_path / "log"
    children = [FORK.Process(target=_fill_slowly, args=(tmp_path / "c", log)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
        assert child.exitcode == 0
    assert sorted(map(int, log.read_text().split())) == list(range(200))
    assert _right(_disk(tmp_path / "c"), list(range(200)))


def test_bad_images_are_reported_and_tried_again(tmp_path):
    store = _disk(tmp_path, source=Slow(bad=(3, 5)))
    assert fill.fill(store, range(10)) == {3: "row 3 is damaged", 5: "row 5 is damaged"}
    assert store.missing(range(10)) == [3, 5]
    assert fill.fill(_disk(tmp_path), range(10)) == {}


def test_fill_stops_after_enough_bad_images(tmp_path):
    log = tmp_path / "log"
    failed = fill.fill(
        _disk(tmp_path / "c", source=Slow(log, bad=range(200))), range(200), stop_after=5
    )
    assert 5 <= len(failed) <= fill.CHUNK
    assert len(log.read_text().split()) == fill.CHUNK


def test_full_disk_is_one_message_and_keeps_what_is_there(tmp_path, monkeypatch):
    real, written = os.pwrite, []

    def pwrite(file, data, at):
        if len(data) > 1 and len(written) >= 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(at)
        return real(file, data, at)

    store = _disk(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(ResourceError, match=r"no space left.*data\.cache=off"):
            fill.fill(store, range(200), workers=0)
    assert fill.fill(store, range(200), workers=0) == {}
    assert _right(store, list(range(200)))


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    store = _disk(tmp_path)
    monkeypatch.setattr(os, "pwrite", lambda f, d, at: real(f, bytes(d)[:50], at))
    fill.fill(store, range(20), workers=0)
    assert _right(store, list(range(20)))


def test_pixels_are_synced_before_they_are_marked(tmp_path, monkeypatch):
    calls = []
    real_sync, real_write = os.fsync, os.pwrite
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append("sync"), real_sync(f))[1])
    monkeypatch.setattr(
        os,
        "pwrite",
        lambda f, d, at: (calls.append("mark" if len(d) == 1 else "pixels"), real_write(f, d, at))[
            1
        ],
    )
    fill.fill(_disk(tmp_path), range(5), workers=0)
    assert calls == ["pixels"] * 5 + ["sync"] + ["mark"] * 5


def test_damaged_entry_is_made_again(tmp_path):
    store = _disk(tmp_path)
    fill.fill(store, range(10))
    (store.path / "pixels.u8").write_bytes(b"short")
    store = _disk(tmp_path)
    assert store.missing(range(10)) == list(range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_memory_store(workers):
    store = Memory(Slow(), 8, "crop")
    assert fill.fill(store, [5, 9, 7], workers=workers) == {}
    assert _right(store, [9, 5])
    assert fill.fill(store, [7, 30], workers=workers) == {}
    assert _right(store, [30, 7, 9])


def test_auto_prefers_disk_then_memory_and_says_so(tmp_path, caplog, monkeypatch):
    def choose(home, mode="auto"):
        return open_store(
            Slow(), mode=mode, size=8, resize="crop", rows=50, count=200, home=home, name="slow"
        )

    assert isinstance(choose(tmp_path), Disk)
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert isinstance(choose(blocked), Memory)
    assert "no disk cache" in caplog.text
    monkeypatch.setattr(cache, "_available_memory", lambda: 0)
    assert type(choose(blocked)) is Store
    with pytest.raises(ResourceError, match=r"data\.cache_dir"):
        choose(blocked, "disk")


def test_entries_and_clear(tmp_path):
    store = _disk(tmp_path)
    fill.fill(store, range(10))
    (entry,) = cache.entries(tmp_path)
    assert (entry.name, entry.images, entry.size, entry.present) == ("slow", 200, 8, 10)
    assert cache.clear(tmp_path, "another") == []
    assert cache.clear(tmp_path) == [store.path]
    assert cache.entries(tmp_path) == []
