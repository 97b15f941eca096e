"""A whole run from Python: ``python api.py MODEL ROWS``, with ROWS as JSON lines ``{"text": ..., "label": 0 or 1}``."""

import sys

import zotune

config = zotune.parse_config(
    {
        "output": "runs/api",
        "model": {"path": sys.argv[1]},
        "data": {
            "train": sys.argv[2],
            "prompt": "{text} It was",
            "candidates": [" terrible", " great"],
            "label": "label",
        },
        "method": {"preset": "lozo"},
        "train": {"steps": 200},
    }
)
summary = zotune.start(config)
print(f"loss {summary.first.loss:.3f} -> {summary.last.loss:.3f} in {summary.seconds:.0f} s; picture: ", end="")
print(zotune.plot(summary.path))
