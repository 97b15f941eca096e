"""``python -m zotune`` is the program ``zotune``."""

from zotune.cli import main

# A process that starts another one by spawning it is imported there once more.
if __name__ == "__main__":
    main()
