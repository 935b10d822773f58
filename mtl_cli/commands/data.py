"""``mtl data``: look at data, check and prepare them, start a task from a table of labels."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtl_cli import allow, console
from mtl_cli.errors import OK, ConfigError, DataError, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from mtl_cli.data.base import DataSet

Say = Callable[[str], None]
Compose = Callable[[list[str]], "DictConfig"]

USAGE = """\
usage: mtl data ls                                             tasks that come with mtl
       mtl data inspect csv data.table=labels.csv [data.root=DIR] [--write my.yaml [--force]]
                                                               a task from your own table
       mtl data inspect TASK [key=value ...]                   counts and histograms per split
       mtl data check TASK [key=value ...]                     decode every file, find doubles
       mtl data preview TASK [key=value ...] [--write x.png]   a sheet of training samples
       mtl data prepare TASK [key=value ...]                   unpack, decode, fetch weights
       mtl data cache ls | clear [NAME]                        decoded images kept on disk
"""
PICTURES = (".png", ".jpg", ".jpeg")  # formats of --write for preview
_EVERY_S = 5.0


def main(argv: Sequence[str]) -> int:
    """Run ``mtl data`` as typed.

    Raises:
        ConfigError: an unknown verb, or a config that does not compose.
    """
    from mtl_cli.overrides import parse

    args, options = _options(list(argv))
    if not args or options.get("help"):
        sys.stdout.write(USAGE)
        return OK
    command = parse(args[1:])
    for package in command.allow_code:
        allow.allow(package)

    def compose(overrides: list[str]) -> DictConfig:
        from mtl_cli.compose import Composer
        from mtl_cli.config import raise_all
        from mtl_cli.launch import prepare

        composer = Composer(command.config_dirs)
        cfg, problems = prepare(composer, dataclasses.replace(command, overrides=overrides))
        raise_all(problems)
        assert cfg is not None
        return cfg

    return run([args[0], *command.overrides], compose, console.say, options)


def run(args: list[str], compose: Compose, say: Say, options: dict[str, str] | None = None) -> int:
    """Run one verb.

    Args:
        args: verb and words.
        compose: turns overrides into the composed, checked config.
        say: prints one line.
        options: ``write`` (a path) and ``force``.

    Raises:
        ConfigError: an unknown verb or missing word.
        DataError: the data are missing or bad; ``check`` raises it after the list.
    """
    verb, *words = args
    options = options or {}
    if verb == "ls":
        return _ls(say)
    if verb == "cache":
        return _cache(words, say)
    verbs = {"inspect": _inspect, "check": _check, "preview": _preview, "prepare": _prepare}
    if verb not in verbs:
        known = ["ls", *verbs, "cache"]
        raise ConfigError(f"mtl data: no '{verb}'{nearest(verb, known)} (has {', '.join(known)})")
    if not words:
        raise ConfigError(f"mtl data {verb}: which task? e.g. mtl data {verb} synthetic")
    if verb == "inspect" and words[0] in ("csv", "table"):
        return _inspect_table(words[1:], say, options)
    if verb == "preview" and Path(options.get("write", "x.png")).suffix not in PICTURES:
        raise ConfigError(
            f"--write: found {options['write']}, expected a name that ends in {', '.join(PICTURES)}"
        )
    first = words[0] if "=" in words[0] else f"task={words[0]}"
    cfg = compose([first, *words[1:]])
    verbs[verb](_open(cfg, say), say, options)
    if verb == "prepare":
        _fetch_weights(cfg, say)
    return OK


def _options(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take this command's own options out; the rest is as for ``mtl train``."""
    options: dict[str, str] = {}
    rest = []
    words = iter(argv)
    for word in words:
        name, _, value = word.partition("=")
        if name == "--write":
            options["write"] = value or next(words, "")
            if not options["write"]:
                raise ConfigError("--write: expected a file name")
        elif word in ("--force", "-h", "--help"):
            options["force" if word == "--force" else "help"] = "yes"
        else:
            rest.append(word)
    return rest, options


def _open(cfg: DictConfig, say: Say) -> DataSet:
    import torch

    from mtl_cli.build import open_data, plain_config

    data = open_data(plain_config(cfg), torch.device("cpu"))
    data.progress = _progress(say)
    return data


def _inspect(data: DataSet, say: Say, _: dict[str, str]) -> None:
    from mtl_cli.data.survey import summary

    for line in summary(data, console.table):
        say(line)


def _check(data: DataSet, say: Say, _: dict[str, str]) -> None:
    from mtl_cli.data.survey import check

    found = check(data, data.progress)
    for row, message in sorted(found.failed.items()):
        say(f"{data.table.where(row)}: {message}")
    files = data.table.files
    for rows in found.leaks:
        say(f"equal images in training and outside it: {', '.join(files[r] for r in rows)}")
    say(f"{found.checked} images checked, {len(found.failed)} unreadable, {len(found.twins)} found "
        f"more than once, {len(found.leaks)} of them in training and validation or test")  # fmt: skip
    if found.failed:
        raise DataError(
            f"{len(found.failed)} of {found.checked} images cannot be decoded; replace them, or "
            "data.bad_image=mask"
        )


def _preview(data: DataSet, say: Say, options: dict[str, str]) -> None:
    from mtl_cli.data.survey import sheet

    path = Path(options.get("write", f"preview-{data.source.name}.png"))
    try:
        count = sheet(data, path)
    except OSError as error:
        raise ConfigError(f"--write: cannot write {path} ({error.strerror or error})") from error
    say(f"{path}: {count} training images as the network sees them")


def _prepare(data: DataSet, say: Say, _: dict[str, str]) -> None:
    started = time.perf_counter()
    data.prepare(("train", "val", "test"))
    report = data.report
    where = getattr(data.store, "path", data.store.kind)
    total = sum(report["samples"].values())
    say(f"{total} images ready in {time.perf_counter() - started:.1f} s: {where}")


def _fetch_weights(cfg: DictConfig, say: Say) -> None:
    """Pretrained weights too, so that a compute node without network can start."""
    from mtl_cli.build import make, plain_config

    node = plain_config(cfg)["backbone"]
    if node.get("pretrained"):
        make(node, "backbone")
        say(f"weights of {cfg.backbone.get('name', 'the backbone')} ready")


def _inspect_table(words: list[str], say: Say, options: dict[str, str]) -> int:
    """``mtl data inspect csv``: needs neither torch nor a composed config."""
    from mtl_cli.data import inspect

    given = _pairs(words)
    if "table" not in given:
        raise ConfigError("mtl data inspect csv: data.table=FILE.csv is missing")
    target = Path(options.get("write", f"{Path(given['table']).stem}.yaml"))
    if "write" in options and target.exists() and "force" not in options:
        raise ConfigError(f"{target}: exists already; choose another name or add --force")
    found = inspect.inspect(
        given["table"],
        given.get("root"),
        separator=given.get("separator", "auto"),
        image_column=given.get("image_column"),
    )
    for line in inspect.lines(found, console.table):
        say(line)
    text = inspect.to_yaml(found, target.stem)
    say("")
    if "write" not in options:
        say("to make it a task, add: --write " + target.name)
        return OK
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--write: cannot write {target} ({error.strerror})") from error
    place = target if target.is_absolute() or target.parts[0] == ".." else f"./{target}"
    say(f"{target} written; look it over, then: {shlex.join(['mtl', 'train', f'task={place}'])}")
    return OK


def _pairs(words: list[str]) -> dict[str, str]:
    known = ("table", "root", "separator", "image_column")
    given = {}
    for word in words:
        key, equals, value = word.removeprefix("data.").partition("=")
        if not equals or key not in known:
            choices = [f"data.{name}" for name in known]
            raise ConfigError(
                f"mtl data inspect csv: unknown word '{word}'{nearest(word, choices)} "
                f"(has {', '.join(choices)}, --write FILE)"
            )
        given[key] = value.strip("'\"")
    return given


def _ls(say: Say) -> int:
    from mtl_cli.config import conf_dir

    rows = []
    for path in sorted((conf_dir() / "task").glob("*.yaml")):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        rows.append([path.stem, first.removeprefix("# ")])
    for line in console.table(["task", "what it is"], rows):
        say(line)
    say("your own table of labels: mtl data inspect csv data.table=labels.csv --write my.yaml")
    return OK


def _cache(words: list[str], say: Say) -> int:
    from mtl_cli.data.cache import clear, default_dir, entries

    verb, name, *_ = [*words, "", ""]
    if verb not in ("ls", "clear"):
        raise ConfigError(f"mtl data cache: no '{verb}' (has ls, clear)")
    if verb == "clear":
        removed = clear(name=name or None)
        say(f"{len(removed)} entries removed from {default_dir()}")
        return OK
    rows = [
        [e.name, str(e.size), f"{e.present} of {e.images}", f"{e.bytes_on_disk / 2**20:.0f}",
         time.strftime("%Y-%m-%d %H:%M", time.localtime(e.used)), e.path.name]
        for e in entries()
    ]  # fmt: skip
    say(f"{default_dir()}: {len(rows)} entries")
    if rows:
        for line in console.table(["data", "px", "images", "MiB", "last used", "entry"], rows):
            say(line)
    return OK


def _progress(say: Say) -> Callable[[str, int, int], None]:
    """Say how far it is, at most every few seconds."""
    shown = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > _EVERY_S:
            shown = time.monotonic()
            say(f"{what}: {done} of {total}")

    return show
