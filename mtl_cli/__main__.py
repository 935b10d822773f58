"""``mtl`` and ``python -m mtl_cli``."""

from __future__ import annotations

import sys

from mtl_cli.cli import main as run


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
