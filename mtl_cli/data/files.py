"""Image files on disk as a source: where data may lie, and what tells one state from another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

ENVIRONMENT = "MTL_DATA"


def places(root: str | None) -> list[tuple[str, Path]]:
    """Where to look, in order, each with how to name it: ``data.root``, ``$MTL_DATA``, ``./data``.

    A given root is the only place: nothing else is taken silently instead.
    """
    if root is not None:
        return [("data.root", Path(root).expanduser())]
    own = os.environ.get(ENVIRONMENT)
    found = [(f"${ENVIRONMENT}", Path(own).expanduser())] if own else []
    return [*found, ("./data", Path("data").resolve())]


def identity(root: Path, names: Sequence[str]) -> str:
    """Digest of the folder's place and of names, sizes and modification times of its files.

    A file that is missing counts as such; reading it reports the error with its row.
    """
    digest = hashlib.sha256(str(root.resolve()).encode("utf-8", "surrogateescape"))
    for name in names:
        try:
            facts = os.stat(root / name)
            state = f"{name}\0{facts.st_size}\0{facts.st_mtime_ns}\n"
        except OSError:
            state = f"{name}\0missing\n"
        digest.update(state.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
