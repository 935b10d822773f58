"""UTKFace: names as they are in the wild, archives that nobody should trust."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from mtl_cli.data import archive
from mtl_cli.data.base import DataOptions, DataSet
from mtl_cli.data.transforms import Light
from mtl_cli.data.utkface import RACES, UTKFace
from mtl_cli.errors import ConfigError, DataError

OUTPUTS = {
    "age": {"kind": "regression", "unit": "years"},
    "gender": {"kind": "binary", "classes": ["male", "female"]},
    "race": {"kind": "multiclass", "classes": list(RACES)},
}
ODD = {
    "61_1_20170109150557335.jpg.chip.jpg": (61, 1, None),
    "55_0_0_20170116232725357jpg.chip.jpg": (55, 0, 0),
    "24_0_1_20170116220224657 .jpg.chip.jpg": (24, 0, 1),
    "116_1_3_20170112213500903.jpg.chip.jpg": (116, 1, 3),
    "1_0_4_20161219203650636.jpg": (1, 0, 4),
}


def _faces(folder, names):
    folder.mkdir(parents=True, exist_ok=True)
    for k, name in enumerate(names):
        Image.fromarray(np.full((20, 20, 3), k, np.uint8)).save(folder / name)
    return folder


def _tar(path, folder, extra=()):
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, "UTKFace")
        for member in extra:
            tar.addfile(member, io.BytesIO(b"x" * member.size))
    return path


def _member(name, kind=tarfile.REGTYPE, link="", size=0):
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, link, size
    return member


def _labels(source, cache):
    source.prepare(cache)
    table = source.table(OUTPUTS)
    columns = [table.labels[n].tolist() for n in ("age", "gender", "race")]
    found = zip(table.files, *columns, strict=True)
    return {n: (a, g, None if r != r else r) for n, a, g, r in found}, table


def test_names_in_the_wild(tmp_path):
    _faces(tmp_path / "UTKFace", [*ODD, "holiday.jpg", "1_5_0_20170109150557335.jpg"])
    found, table = _labels(UTKFace(str(tmp_path)), tmp_path / "c")
    assert found == ODD
    assert table.notes[0].startswith("1 files have no race in their name: masked (61_1_")
    assert table.notes[1].startswith("2 images are not named like UTKFace: left out")


def test_archive_gives_what_the_folder_gives(tmp_path):
    folder = _faces(tmp_path / "UTKFace", ODD)
    path = _tar(tmp_path / "UTKFace.tar.gz", folder)
    a, _ = _labels(UTKFace(str(folder)), tmp_path / "c")
    packed = UTKFace(str(path))
    b, _ = _labels(packed, tmp_path / "c")
    assert a == b
    assert packed.folder.parent == tmp_path / "c" / "archives"
    again = UTKFace(str(path))
    stamp = packed.folder.stat().st_mtime_ns
    again.prepare(tmp_path / "c")
    assert again.folder == packed.folder
    assert again.folder.stat().st_mtime_ns == stamp
    assert again.identity() == packed.identity()
    np.testing.assert_array_equal(packed.image(0, 8), UTKFace.image(again, 0, 8))


def test_places_are_searched_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _faces(tmp_path / "data" / "UTKFace", list(ODD)[:2])
    assert len(_labels(UTKFace(), tmp_path / "c")[0]) == 2
    _faces(tmp_path / "env", list(ODD)[:3])
    monkeypatch.setenv("MTL_DATA", str(tmp_path / "env"))
    assert len(_labels(UTKFace(), tmp_path / "c")[0]) == 3
    with pytest.raises(DataError, match=r"data\.root = .*nowhere, which is not there"):
        UTKFace("nowhere").prepare(tmp_path / "c")


def test_absent_data_say_what_to_type(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        UTKFace().prepare(tmp_path / "c")
    for line in (
        "mtl train task=utkface data.root=PATH/UTKFace.tar.gz",
        "export MTL_DATA=PATH",
        "mv UTKFace.tar.gz data/",
    ):
        assert line in str(caught.value)
    assert caught.value.exit_code == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 images, none named so"):
        UTKFace(str(tmp_path / "empty")).prepare(tmp_path / "c")


HOSTILE = {
    "up": _member("UTKFace/../../escaped_1_1_20170109150557335.jpg", size=3),
    "absolute": _member("/tmp/1_1_1_20170109150557335.jpg", size=3),
    "link": _member("UTKFace/2_1_1_20170109150557335.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    "hard": _member("UTKFace/3_1_1_20170109150557335.jpg", tarfile.LNKTYPE, "/etc/passwd"),
    "device": _member("UTKFace/4_1_1_20170109150557335.jpg", tarfile.CHRTYPE),
    "pipe": _member("UTKFace/5_1_1_20170109150557335.jpg", tarfile.FIFOTYPE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_dangerous_members_are_refused_and_nothing_stays(tmp_path, name):
    folder = _faces(tmp_path / "UTKFace", list(ODD)[:1])
    path = _tar(tmp_path / "UTKFace.tar.gz", folder, [HOSTILE[name]])
    with pytest.raises(DataError, match="not unpacked"):
        UTKFace(str(path)).prepare(tmp_path / "c")
    assert [p for p in (tmp_path / "c" / "archives").iterdir() if p.is_dir()] == []
    assert not list(tmp_path.rglob("escaped*"))


def test_size_limits_damage_and_doubles(tmp_path, monkeypatch):
    folder = _faces(tmp_path / "UTKFace", ODD)
    path = _tar(tmp_path / "UTKFace.tar.gz", folder)
    cut = tmp_path / "cut.tar.gz"
    cut.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match="damaged archive"):
        archive.unpack(cut, tmp_path / "c")
    (tmp_path / "text.tar.gz").write_text("<html>")
    with pytest.raises(DataError, match="damaged archive"):
        archive.unpack(tmp_path / "text.tar.gz", tmp_path / "c")
    twice = _tar(tmp_path / "twice.tar.gz", folder, [_member("other/" + next(iter(ODD)), size=2)])
    with pytest.raises(DataError, match="two images are called 61_1_"):
        archive.unpack(twice, tmp_path / "c")
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    with pytest.raises(DataError, match="too large"):
        archive.unpack(path, tmp_path / "c")


def test_interrupted_unpacking_starts_again(tmp_path):
    path = _tar(tmp_path / "UTKFace.tar.gz", _faces(tmp_path / "UTKFace", ODD))
    done = archive.unpack(path, tmp_path / "c")
    stale = done.with_name(done.name + ".tmp.dead")
    done.rename(stale)
    (stale / next(iter(ODD))).unlink()
    assert sorted(p.name for p in archive.unpack(path, tmp_path / "c").iterdir()) == sorted(ODD)
    assert not stale.exists()


def test_unknown_output_is_named(tmp_path):
    source = UTKFace(str(_faces(tmp_path / "UTKFace", ODD)))
    source.prepare(tmp_path)
    with pytest.raises(ConfigError, match=r"no 'sex' \(expected one of age, gender, race\)"):
        source.table({"sex": {"kind": "binary"}})


@pytest.mark.slow
def test_the_real_archive(tmp_path, real_data):
    source = UTKFace(str(real_data / "UTKFace.tar.gz"))
    options = DataOptions(image_size=32, limit=200, cache_dir=str(tmp_path))
    data = DataSet(source, OUTPUTS, options, augment=Light(), seed=0)
    assert len(data.table.files) == 20199
    assert int(torch.isnan(data.table.labels["race"]).sum()) == 3
    assert sum(len(m[0]) for m in data.train_batches(stage=0, epoch=0)) == 192
    age = data.tasks[0]
    assert 30 < age.center < 36
    assert 17 < age.scale < 23
