"""The merged export: an ordinary Hugging Face folder that holds the tuned weights."""

from __future__ import annotations

import re
from pathlib import Path

from zotune import models
from zotune.errors import ConfigError
from zotune.export import card
from zotune.export.recipe import Recipe
from zotune.runtimes import precision

_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]B)", re.IGNORECASE | re.ASCII)


def require_shard_size(text: str) -> None:
    """Make sure that transformers can cut weights by a largest file's size.

    Raises:
        ConfigError: It is no number above 0, up to 1000, with a unit.
    """
    # Transformers takes a size of nothing, and of less, for a file per weight, and fails at infinity.
    found = _SIZE.fullmatch(text.strip())
    if found is None or not 0 < float(found[1]) <= 1000:
        raise ConfigError(
            f"got the shard size {text!r}; allowed is a number above 0, up to 1000, with KB, MB, GB or TB, e.g. 500MB."
        )


def write(recipe: Recipe, folder: Path, *, shard_size: str) -> None:
    """Config, generation config, tokenizer, weights and a model card.

    Args:
        recipe: Of the model.
        folder: Empty.
        shard_size: Largest file of weights, which `require_shard_size` has let pass.

    Raises:
        ModelError: The base model cannot be loaded.
        JournalError: It is not the base model of the recipe's journal.
    """
    model, tokenizer = recipe.load_base()
    recipe.runtime(model).export(folder, max_shard_size=shard_size)
    tokenizer.save_pretrained(folder)
    capped = models.caps_attention(model.config)
    text = card.render(recipe.facts, "merged", dtype=precision.name(model.dtype), capped=capped)
    (folder / "README.md").write_text(text, encoding="utf-8")
