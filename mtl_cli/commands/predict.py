"""``mtl predict RUN|CKPT IMAGE|DIR... [--out FILE.csv|FILE.jsonl]``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_cli import allow
from mtl_cli.commands.arguments import split
from mtl_cli.errors import OK, ConfigError, DataError

if TYPE_CHECKING:
    from mtl_cli.predictions import Row

USAGE = "mtl predict RUN|CHECKPOINT IMAGE|DIR... [--out FILE.csv|FILE.jsonl] [--device D] [--allow-code PKG]"


def main(argv: Sequence[str]) -> int:
    """Entry of the command line."""
    from mtl_cli.console import say

    if "--help" in argv or "-h" in argv:
        say(
            f"{USAGE}\n\nPredict images with a trained run: one row per image and task, in units and class names."
        )
        return OK
    return run(argv, say)


def run(args: Sequence[str], say: Callable[[str], None]) -> int:
    """Predict images with a trained run.

    Raises:
        ConfigError: wrong command line.
        DataError: no such image, or some that cannot be decoded; the others' rows are written first.
        CheckpointError: no usable checkpoint.
    """
    words, options = split(args, ("--out", "--device", "--allow-code"), (), USAGE)
    allow.allow(options.get("--allow-code", ""))
    if len(words) < 2:
        raise ConfigError(f"predict: expected a run and at least one image; {USAGE}")
    out = Path(options["--out"]) if "--out" in options else None
    if out is not None and out.suffix not in (".csv", ".jsonl"):
        raise ConfigError(f"predict: --out {out}: unknown format (expected .csv or .jsonl)")
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"predict: --out {out}: no such directory as {out.parent}")
    from mtl_cli.data.labels import SHOWN, summed
    from mtl_cli.predict import Predictor
    from mtl_cli.predictions import rows

    paths = _images(words[1:])
    predictor = Predictor.load(words[0], device=options.get("--device", "auto"))
    table: list[Row] = []
    failed: list[str] = []
    for names, raw in predictor.batches(paths, failed):
        table += rows(names, predictor.tasks, raw)
    _write(table, out, say)
    if out is not None:
        say(f"{len(table)} predictions for {len(paths) - len(failed)} images in {out}")
    if failed:
        remedy = f"{len(failed)} of {len(paths)} images have no prediction; replace them"
        raise DataError(summed(failed[:SHOWN], len(failed), remedy))
    return OK


def _write(table: list[Row], out: Path | None, say: Callable[[str], None]) -> None:
    from mtl_cli.predictions import to_csv

    if out is None:
        for line in to_csv(table).splitlines():
            say(line)
        return
    lines = "".join(json.dumps(row) + "\n" for row in table)
    try:
        out.write_text(to_csv(table) if out.suffix == ".csv" else lines)
    except OSError as error:
        raise ConfigError(f"predict: --out: cannot write {out} ({error.strerror})") from error


def _images(words: Sequence[str]) -> list[str]:
    """Files as they are named; the images below directories, sorted."""
    from mtl_cli.data.images import find

    paths: list[str] = []
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            found = [str(path / name) for name in find(path)]
            if not found:
                raise DataError(f"{path}: no image in this directory")
            paths += found
        elif path.exists():
            paths.append(str(path))
        else:
            raise DataError(f"{path}: no such image or directory")
    return paths
