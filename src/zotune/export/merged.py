"""The merged export: an ordinary Hugging Face folder that holds the tuned weights."""

from __future__ import annotations

from pathlib import Path

from zotune.errors import ConfigError
from zotune.export import card
from zotune.export.recipe import Recipe
from zotune.runtimes import precision


def write(recipe: Recipe, folder: Path, *, shard_size: str) -> None:
    """Config, generation config, tokenizer, weights and a model card.

    Args:
        recipe: Of the model.
        folder: Empty.
        shard_size: Largest file of weights, as transformers reads it: ``5GB``.

    Raises:
        ModelError: The base model cannot be loaded.
        JournalError: It is not the base model of the recipe's journal.
        ConfigError: The shard size cannot be read.
    """
    model, tokenizer = recipe.load_base()
    runtime = recipe.runtime(model)
    try:
        runtime.export(folder, max_shard_size=shard_size)
    except ValueError as error:
        raise ConfigError(f"cannot write shards of size {shard_size!r}: {error}") from error
    tokenizer.save_pretrained(folder)
    text = card.render(recipe.facts, "merged", dtype=precision.name(model.dtype))
    (folder / "README.md").write_text(text, encoding="utf-8")
