"""``mtl`` and ``python -m mtl_cli``."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from mtl_cli.cli import main as run
from mtl_cli.errors import STOPPED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Entry point of the console script."""
    if sys.argv[1:2] == ["train"]:
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _stop)  # under nohup a HUP is nobody's business
    sys.exit(run())


def _stop(number: int, frame: FrameType | None) -> None:
    """A signal while the job does not listen itself, as in the seconds that torch takes to load.

    There is nothing to save, and a scheduler may start the same command again.
    """
    del frame
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        text = f"mtl: stopped by {name} outside of training; start the same command again\n"
        os.write(2, text.encode())
    os._exit(STOPPED)


if __name__ == "__main__":
    main()
