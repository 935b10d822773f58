"""Reading the words of a subcommand that does not compose a config."""

from __future__ import annotations

from collections.abc import Sequence

from mtl_cli.errors import ConfigError, nearest


def split(
    args: Sequence[str], valued: Sequence[str], flags: Sequence[str], usage: str
) -> tuple[list[str], dict[str, str]]:
    """Separate words from options (``--name value``, ``--name=value`` or a bare flag).

    Raises:
        ConfigError: unknown option, one without its value, or a flag with one.
    """
    words: list[str] = []
    options: dict[str, str] = {}
    rest = iter(args)
    for word in rest:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            words.append(word)
        elif name in flags:
            if equals:
                raise ConfigError(f"{name}: takes no value (found '{value}'); {usage}")
            options[name] = ""
        elif name in valued:
            given = value if equals else next(rest, None)
            if given is None:
                raise ConfigError(f"{name}: expected a value; {usage}")
            options[name] = given
        else:
            raise ConfigError(f"unknown option {name}{nearest(name, [*valued, *flags])}; {usage}")
    return words, options
