"""Unpacking a downloaded archive of images once, without ever trusting its member names."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

from mtl_cli.data.cache import Progress, default_dir, locked
from mtl_cli.data.images import SUFFIXES
from mtl_cli.errors import DataError, ResourceError

log = logging.getLogger(__name__)
ENDINGS = (".tar.gz", ".tgz", ".tar")
MAX_MEMBERS = 2_000_000
MAX_MEMBER_BYTES = 64 * 2**20
MAX_BYTES = 64 * 2**30
_SHOW_EVERY = 500


def unpack(archive: Path, cache_dir: Path | None, progress: Progress | None = None) -> Path:
    """Write the images of a tar archive into one flat folder of the cache; at once if done before.

    Nothing is extracted by name: the bytes of regular image members are copied to files that this
    function names itself, so links, devices and ``..`` cannot reach anything. The folder appears
    under its name only when it is complete; one process unpacks while others wait.

    Args:
        archive: ``.tar``, ``.tar.gz`` or ``.tgz``.
        cache_dir: cache directory, None for the user's own.
        progress: called with (what, done, total) in bytes of the archive.

    Returns:
        The folder, its files dated as in the archive.

    Raises:
        DataError: damaged, a dangerous member, two images of one name, or above the size limits.
        ResourceError: no room.
    """
    facts = archive.stat()
    mark = f"{archive.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}"
    digest = hashlib.sha256(mark.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    home = (cache_dir or default_dir()) / "archives"
    stem = archive.name.split(".tar")[0].removesuffix(".tgz")
    folder = home / f"{stem}-{digest}"
    if folder.is_dir():
        return folder
    try:
        with locked(folder.with_name(folder.name + ".lock")):
            if not folder.is_dir():
                for stale in home.glob(f"{folder.name}.tmp.*"):
                    shutil.rmtree(stale)
                log.info("unpacking %s into %s, once", archive, home)
                temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp.", dir=home))
                try:
                    _copy_members(archive, temporary, progress)
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise ResourceError(
            f"{home}: cannot unpack {archive.name} ({error.strerror or error}); give another "
            "data.cache_dir"
        ) from error
    return folder


def _copy_members(archive: Path, folder: Path, progress: Progress | None) -> None:
    total, members = 0, 0
    size = archive.stat().st_size
    try:
        with archive.open("rb") as raw, tarfile.open(fileobj=raw, mode="r:*") as tar:
            for member in tar:
                members += 1
                total += member.size
                _refuse(archive, member, members, total)
                name = PurePosixPath(member.name).name
                if not member.isreg() or not name.lower().endswith(SUFFIXES):
                    continue
                if name.startswith("._"):  # a Mac's resource fork
                    continue
                _copy(tar, member, folder / name)
                if progress is not None and members % _SHOW_EVERY == 0:
                    progress(f"unpacking {archive.name}", raw.tell(), size)
    except FileExistsError as error:
        raise DataError(f"{archive}: two images are called {Path(error.filename).name}") from error
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{archive}: damaged archive ({error}); download it again") from error
    except OSError as error:
        if error.errno is None:  # gzip's BadGzipFile
            raise DataError(f"{archive}: damaged archive ({error}); download it again") from error
        raise


def _refuse(archive: Path, member: tarfile.TarInfo, members: int, total: int) -> None:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts:
        raise DataError(f"{archive}: member '{member.name}' points outside; not unpacked")
    if not (member.isreg() or member.isdir()):
        raise DataError(f"{archive}: member '{member.name}' is a link or a device; not unpacked")
    if member.size > MAX_MEMBER_BYTES or total > MAX_BYTES or members > MAX_MEMBERS:
        raise DataError(
            f"{archive}: too large at member '{member.name}' ({members} members, "
            f"{total / 2**30:.1f} GiB; limit {MAX_MEMBERS} and {MAX_BYTES >> 30} GiB)"
        )


def _copy(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    source = tar.extractfile(member)
    if source is None:
        raise DataError(f"{member.name}: no content")
    with source, path.open("xb") as out:
        shutil.copyfileobj(source, out)
    os.utime(path, (member.mtime, member.mtime))
