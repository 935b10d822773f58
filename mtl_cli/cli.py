"""argv -> subcommand -> exit code. Help, typos and config errors are answered without torch."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from mtl_cli.errors import OK, UNEXPECTED, ConfigError, MtlError, ResourceError, nearest

# Loaded when called; each has ``main(argv) -> exit code``, its own --help included.
MODULES: dict[str, str] = {
    "train": "mtl_cli.launch:train",
    "eval": "mtl_cli.commands.eval:main",
    "predict": "mtl_cli.commands.predict:main",
    "compare": "mtl_cli.commands.compare:main",
    "data": "mtl_cli.commands.data:main",
    "conf": "mtl_cli.commands.conf:main",
    "doctor": "mtl_cli.commands.doctor:main",
    "completion": "mtl_cli.commands.completion:main",
    "version": "mtl_cli.commands.doctor:version",
    "_complete": "mtl_cli.commands.completion:answer",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its documented exit code.

    Args:
        argv: without the program's name; None takes ``sys.argv``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if arguments[:1] != ["train"]:  # the job itself reports its errors
        arguments = [a for a in arguments if a != "--debug"]
    try:
        return _command(arguments)
    except MtlError as error:
        _report(error, debug)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # mtl conf ls | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except MemoryError as error:
        _report(error, debug)
        return ResourceError.exit_code
    except Exception as error:
        _report(error, debug)
        return UNEXPECTED


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        from mtl_cli.usage import overview

        sys.stdout.write(overview())
        return OK
    name, *rest = arguments
    if name == "--version":
        name = "version"
    if name not in MODULES:
        known = [command for command in MODULES if not command.startswith("_")]
        hint = nearest(name, known)
        if "=" in name or name.startswith("-"):
            hint = f"; did you mean: mtl train {' '.join(arguments)}"
        raise ConfigError(f"unknown command '{name}'{hint or ' (has ' + ', '.join(known) + ')'}")
    module, _, function = MODULES[name].partition(":")
    run: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
    return run(rest)


def _report(error: BaseException, debug: bool) -> None:
    """One line per problem on stderr; the traceback only if asked."""
    if isinstance(error, ConfigError) and os.environ.get("RANK", "0") != "0":
        return  # every rank reads the same command line; rank 0 says it
    if debug:
        traceback.print_exception(error)
    text = str(error) if isinstance(error, MtlError) else f"{type(error).__name__}: {error}"
    for line in text.splitlines() or [type(error).__name__]:
        sys.stderr.write(f"mtl: error: {line}\n")
    if not debug and not isinstance(error, MtlError):
        sys.stderr.write("mtl: this is a fault of mtl; --debug shows the traceback\n")
