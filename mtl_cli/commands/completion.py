"""``mtl completion SHELL``: commands, groups, options and keys complete with Tab; no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mtl_cli.errors import OK, ConfigError, nearest

SCRIPTS: dict[str, str] = {
    "bash": """\
_mtl() {
  COMPREPLY=($(mtl _complete "${COMP_LINE:0:$COMP_POINT}" 2>/dev/null))
  [[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
}
COMP_WORDBREAKS=${COMP_WORDBREAKS//=}
complete -o default -F _mtl mtl
""",
    "zsh": """\
_mtl() { local -a words_; words_=(${(f)"$(mtl _complete "$BUFFER" 2>/dev/null)"}); compadd -S '' -a words_; _files; }
compdef _mtl mtl
""",
    "fish": """\
complete -c mtl -a '(mtl _complete (commandline -cp) 2>/dev/null)'
""",
}


def main(argv: Sequence[str]) -> int:
    """Print the script for one shell.

    Raises:
        ConfigError: the shell is not known.
    """
    if not argv or argv[0] in {"-h", "--help"}:
        sys.stdout.write(
            'usage: eval "$(mtl completion bash|zsh)"\n       mtl completion fish | source\n'
        )
        return OK
    if argv[0] not in SCRIPTS:
        raise ConfigError(
            f"no completion for '{argv[0]}'{nearest(argv[0], SCRIPTS)} (has bash, zsh, fish)"
        )
    sys.stdout.write(SCRIPTS[argv[0]])
    return OK


def answer(argv: Sequence[str]) -> int:
    """Print what may follow the line typed so far, one candidate per line."""
    for candidate in candidates(argv[0] if argv else "mtl "):
        sys.stdout.write(f"{candidate}\n")
    return OK


def candidates(line: str) -> list[str]:
    """What may stand for the last word of ``line``."""
    from mtl_cli.usage import COMMANDS

    words = line.split(" ")
    last = words[-1]
    if len([w for w in words if w]) <= 1 or (len(words) == 2 and last):
        return [name for name in COMMANDS if name.startswith(last)]
    if words[1] not in {"train", "conf"}:
        return []
    return [text for text in _overrides(last, words[2:-1]) if text.startswith(last)]


def _overrides(last: str, typed: Sequence[str]) -> list[str]:
    """Groups with ``=``, their options, and dotted keys level by level."""
    from mtl_cli.compose import Composer
    from mtl_cli.overrides import Command, repair, resolve

    composer = Composer()
    key, found, value = last.partition("=")
    single = {"heads": "head", "losses": "loss"}.get(key.partition(".")[0], key)
    if found:
        head, comma, _ = value.rpartition(",")
        options = composer.options(single) if single in composer.groups() else []
        files = [str(p) for p in Path().glob("*.yaml")] if key == "task" else []
        return [f"{key}={head}{comma}{option}" for option in (*options, *files)]
    usable = [repair(text) for text in typed if "=" in text]
    composed, _ = resolve(composer, Command(usable, usable))
    if composed is None:
        return [f"{group}=" for group in composer.groups()]
    from omegaconf import OmegaConf

    parent, _, _ = key.rpartition(".")
    node = OmegaConf.select(composed.cfg, parent, default=None) if parent else composed.cfg
    prefix = f"{parent}." if parent else ""
    keys = [str(k) for k in node if not str(k).startswith("_")] if OmegaConf.is_dict(node) else []
    words = [f"{prefix}{k}{'.' if OmegaConf.is_dict(node[k]) else '='}" for k in keys]
    if not parent:
        words += [f"{group}=" for group in composer.groups() if group not in {"head", "loss"}]
    elif parent in {"heads", "losses"}:
        words += [f"{prefix}{k}=" for k in keys]
    return words
