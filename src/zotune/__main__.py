"""``python -m zotune`` is the program ``zotune``."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Entry point of the program; Ctrl-C while the command line is still loaded ends it with one line, too."""
    try:
        from zotune.cli import main as program

        program()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


# A process that starts another one by spawning it is imported there once more.
if __name__ == "__main__":
    main()
