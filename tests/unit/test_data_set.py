"""Batches are pure functions of (seed, stage, epoch, step): workers, ranks and restarts alike."""

import contextlib
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from mtl_cli.data.base import DataOptions, DataSet, Source, Table, normalise
from mtl_cli.data.loader import Loader, worker_error
from mtl_cli.data.transforms import Light, Plain, Strong, seeded
from mtl_cli.errors import ConfigError, DataError, ResourceError

OUTPUTS = {"y": {"kind": "regression", "center": 0.0, "scale": 1.0}, "b": {"kind": "binary"}}


class Numbers(Source):
    """Row i is noise seeded by i; the label is i. Some rows may misbehave when decoded."""

    def __init__(self, count=60, bad=(), deadly=()):
        self.count, self.bad, self.deadly = count, bad, deadly

    def table(self, outputs):
        rows = [f"n{i}" for i in range(self.count)]
        y = torch.arange(self.count, dtype=torch.float64)
        values = {"y": y, "b": (y % 2).masked_fill(y % 5 == 0, float("nan"))}
        return Table(rows, rows, {name: values[name] for name in outputs})

    def image(self, row, size, resize="crop"):
        if row in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if row in self.bad:
            raise DataError(f"n{row}: damaged")
        return np.random.default_rng(row).integers(0, 255, (size, size, 3), np.uint8)

    def identity(self):
        return f"numbers {self.count} {self.bad}"


def _data(tmp_path, source=None, augment=None, seed=0, **options):
    chosen = {
        "image_size": 8,
        "batch_size": 10,
        "margin": 0.5,
        "cache_dir": str(tmp_path),
        **options,
    }
    return DataSet(
        source or Numbers(), OUTPUTS, DataOptions(**chosen), augment=augment or Light(), seed=seed
    )


def _flat(steps):
    out = []
    for micro in steps:
        for batch in micro:
            if batch is not None:
                out += [batch.images, batch.index, *batch.targets.values(), *batch.valid.values()]
    return out


def _equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_order_is_a_permutation_of_the_training_rows(tmp_path):
    data = _data(tmp_path)
    orders = [data.order(s, e).tolist() for s, e in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(o) == data.splits["train"].tolist() for o in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert _data(tmp_path, seed=1).order(0, 0).tolist() != orders[0]
    assert _data(tmp_path, seed=1).splits["train"].tolist() == data.splits["train"].tolist()


@pytest.mark.parametrize("cache", ["off", "ram", "disk"])
def test_batches_do_not_depend_on_workers_or_cache(tmp_path, cache):
    whole = _flat(_data(tmp_path, cache="off", workers=0).train_batches(stage=0, epoch=3))
    for workers in (0, 2):
        data = _data(tmp_path, cache=cache, workers=workers)
        assert _equal(whole, _flat(data.train_batches(stage=0, epoch=3)))
        assert data.store.kind == cache
        data.close()


@pytest.mark.parametrize("augment", [Light(), Strong()])
def test_an_epoch_can_be_entered_anywhere(tmp_path, augment):
    data = _data(tmp_path, augment=augment)
    whole = list(data.train_batches(stage=1, epoch=2))
    assert len(whole) == data.steps_per_epoch == 4
    late = list(data.train_batches(stage=1, epoch=2, start=3))
    assert _equal(_flat(whole[3:]), _flat(late))
    assert not _equal(_flat(whole), _flat(data.train_batches(stage=1, epoch=3)))


def test_augmentation_changes_with_seed_stage_and_epoch(tmp_path):
    first = _data(tmp_path, batch_size=48, margin=1.0)
    assert first.steps_per_epoch == 1  # every epoch then has the same rows
    views = [
        next(_data(tmp_path, batch_size=48, margin=1.0, seed=seed).train_batches(stage=s, epoch=e))[
            0
        ]
        for s, e, seed in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 1))
    ]
    sorted_views = [view.images[view.index.argsort()] for view in views]
    for other in sorted_views[1:]:
        same = (sorted_views[0] == other).flatten(1).all(1).float().mean()
        assert same < 0.2


def test_an_abandoned_epoch_leaves_nothing_behind(tmp_path):
    expected = _flat(_data(tmp_path).train_batches(stage=0, epoch=1))
    data = _data(tmp_path, workers=2)
    stopped = data.train_batches(stage=0, epoch=0)
    next(stopped)
    val = [b.index for b in data.eval_batches("val")]
    assert _equal(expected, _flat(data.train_batches(stage=0, epoch=1)))
    assert torch.equal(torch.cat(val), data.splits["val"])
    data.close()


def test_global_batch_is_cut_into_consecutive_chunks(tmp_path):
    data = _data(tmp_path)
    whole = [micro[0] for micro in data.train_batches(stage=0, epoch=0)]
    parts = [
        list(data.train_batches(stage=0, epoch=0, accumulate=2, rank=r, world=2)) for r in (0, 1)
    ]
    for step, batch in enumerate(whole):
        chunks = [*parts[0][step], *parts[1][step]]
        assert [len(c) for c in chunks] == [3, 3, 2, 2]
        assert torch.equal(torch.cat([c.images for c in chunks]), batch.images)
        assert torch.equal(torch.cat([c.targets["y"] for c in chunks]), batch.targets["y"])


def test_empty_chunks_are_none(tmp_path):
    data = _data(tmp_path, batch_size=2)
    (first, *_) = data.train_batches(stage=0, epoch=0, accumulate=4)
    assert [c is None for c in first] == [False, False, True, True]


def test_last_smaller_batch_is_kept_or_dropped(tmp_path):
    assert _data(tmp_path, batch_size=9).steps_per_epoch == 5  # 48 training rows
    data = _data(tmp_path, batch_size=9, drop_last=False)
    sizes = [len(m[0]) for m in data.train_batches(stage=0, epoch=0)]
    assert sizes == [9, 9, 9, 9, 9, 3]
    assert _data(tmp_path, batch_size=500).steps_per_epoch == 1


def test_evaluation_is_in_order_complete_and_centred(tmp_path):
    data = _data(tmp_path, batch_size=4)
    batches = list(data.eval_batches("test"))
    assert torch.equal(torch.cat([b.index for b in batches]), data.splits["test"])
    row = int(data.splits["test"][0])
    full = torch.from_numpy(data.source.image(row, 12)).permute(2, 0, 1)
    assert torch.equal(batches[0].images[0], full[:, 2:10, 2:10])
    shared = [b.index for r in (0, 1) for b in data.eval_batches("test", rank=r, world=2)]
    assert sorted(torch.cat(shared).tolist()) == data.splits["test"].tolist()
    assert torch.equal(Plain()(full, 8), full[:, 2:10, 2:10])


def test_global_random_streams_are_untouched(tmp_path):
    data = _data(tmp_path, augment=Strong(), cache="off")
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(data.train_batches(stage=0, epoch=0))
    list(data.eval_batches("val"))
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])
    with seeded(3):
        first = torch.rand(2)
    with seeded(3):
        assert torch.equal(first, torch.rand(2))


def test_missing_labels_are_masked_and_counted(tmp_path):
    data = _data(tmp_path)
    report = data.report
    assert report["samples"] == {"train": 48, "val": 6, "test": 6}
    b = report["tasks"]["b"]
    assert sum(part["missing"] for part in b.values()) == 12
    assert sum(part["labelled"] for part in b.values()) == 48
    for (batch,) in data.train_batches(stage=0, epoch=0):
        assert torch.equal(batch.valid["b"], batch.index % 5 != 0)
        assert torch.equal(batch.targets["y"], batch.index.float())
        assert (batch.targets["b"][~batch.valid["b"]] == 0).all()


@pytest.mark.parametrize("cache", ["off", "disk", "ram"])
def test_bad_images_stop_or_are_masked(tmp_path, cache):
    data = _data(tmp_path, Numbers(bad=(7, 8)), cache=cache)
    everything = (lambda: data.train_batches(stage=0, epoch=0), lambda: data.eval_batches("val"))
    with pytest.raises(DataError, match=r"n\d: damaged.*data\.bad_image=mask"):
        _ = [list(batches()) for batches in (*everything, lambda: data.eval_batches("test"))]
    data = _data(tmp_path, Numbers(bad=(7, 8)), cache=cache, bad_image="mask")
    for (batch,) in data.train_batches(stage=0, epoch=0):
        bad = (batch.index == 7) | (batch.index == 8)
        assert not batch.valid["y"][bad].any()
        assert (batch.images[bad] == 0).all()
    for name in ("val", "test"):
        list(data.eval_batches(name))
    assert list(data.report["bad_images"]) == [7, 8]


def test_bad_image_in_a_worker_is_told_by_its_own_message(tmp_path):
    data = _data(tmp_path, Numbers(bad=tuple(range(60))), cache="off", workers=2)
    with pytest.raises(DataError) as caught:
        list(data.train_batches(stage=0, epoch=0))
    assert "Traceback" not in str(caught.value)
    data.close()


def test_a_killed_worker_is_reported_quickly(tmp_path):
    data = _data(tmp_path, Numbers(deadly=tuple(range(60))), cache="off", workers=2)
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"worker.*data\.workers"):
        list(data.train_batches(stage=0, epoch=0))
    assert time.monotonic() - started < 20  # torch gives each of two workers 5 s to leave
    data.close()


def test_workers_outlive_a_signal_to_the_group(tmp_path):
    """The main process asks for more after it; only a second SIGTERM ends a worker at once."""
    others = set(multiprocessing.active_children())
    data = _data(tmp_path, cache="off", workers=1)
    batches = data.train_batches(stage=0, epoch=0)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
        os.kill(worker.pid, number)
    assert len(list(batches)) == 3
    with contextlib.suppress(RuntimeError):  # torch's report of it, if it listens
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(5)
    with contextlib.suppress(RuntimeError):
        data.close()
    worker.join(5)
    assert worker.exitcode == -signal.SIGTERM


def test_worker_errors_are_told_apart():
    dead = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    assert isinstance(worker_error(dead), ResourceError)
    other = RuntimeError("shapes do not fit")
    assert worker_error(other) is other

    class Gone:
        def __getitem__(self, row):
            raise ConnectionResetError(104, "Connection reset by peer")

    with pytest.raises(ResourceError, match="a worker died"):
        list(Loader(Gone(), workers=0).stream([0]))


def test_fingerprint_follows_files_labels_and_split(tmp_path):
    first = _data(tmp_path).fingerprint
    assert _data(tmp_path, image_size=16, seed=4).fingerprint == first
    assert _data(tmp_path, split_seed=1).fingerprint != first
    assert _data(tmp_path, limit=20).fingerprint != first
    assert _data(tmp_path, Numbers(61)).fingerprint != first


def test_options_report_every_problem():
    with pytest.raises(ConfigError) as caught:
        DataOptions(image_size=2, fraction=0.0, cache="disc", workers="many", resize="stretch")
    assert len(caught.value.problems) == 5


def test_a_task_without_training_labels_is_refused(tmp_path):
    class Empty(Numbers):
        def table(self, outputs):
            table = super().table(outputs)
            table.labels["b"][:] = float("nan")
            return table

    with pytest.raises(DataError, match="no training label for b among 48 samples"):
        _data(tmp_path, Empty())


def test_normalise():
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    out = normalise(white)[0, :, 0, 0]
    expected = [
        (1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ]
    torch.testing.assert_close(out, torch.tensor(expected))
