"""A tiny model as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from zotune.config import ModelConfig
from zotune.testing import tiny


def write(model: Any, folder: Path) -> ModelConfig:
    """Save a model as a checkpoint, with a tokenizer of words that are numbers."""
    model.save_pretrained(folder)
    backend = Tokenizer(WordLevel({str(token): token for token in range(tiny.VOCABULARY)}, unk_token="0"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="0", bos_token="2", eos_token="3")
    tokenizer.save_pretrained(folder)
    return ModelConfig(path=str(folder), dtype=str(model.dtype).removeprefix("torch."), device="cpu")
