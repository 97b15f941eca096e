from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes is for `zotune bench` to say: on a busy machine, or when tables are built at first use, a
# limit would fail tests of something else.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

GOOD = ("fine", "lovely", "moving", "bright", "warm")
BAD = ("dull", "weak", "boring", "stale", "cold")
OTHER = ("the", "a", "film", "plot", "cast", "is", "was", "and", "very", "It", "great", "terrible", ".", "<unk>", "<s>")


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of some ten thousand parameters with a tokenizer that knows the words of `sentiment_files`."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate((*OTHER, *GOOD, *BAD))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="<s>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sentiment_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """JSON lines ``{"text", "label"}`` (1 good, 0 bad): 48 rows to train on and 24 others to evaluate on."""
    words = [(word, label) for label, group in ((1, GOOD), (0, BAD)) for word in group]
    rows = [
        {"text": f"{start} {noun} {verb} {word} .", "label": label}
        for start, noun, verb, (word, label) in itertools.product(
            ("the", "a"), ("film", "plot", "cast"), ("is", "was"), words
        )
    ]
    random.Random(0).shuffle(rows)
    folder = tmp_path_factory.mktemp("data")
    train, validation = folder / "train.jsonl", folder / "validation.jsonl"
    train.write_text("".join(json.dumps(row) + "\n" for row in rows[:48]))
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows[48:72]))
    return train, validation


@pytest.fixture
def everywhere_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors are stored beside the weights of tiny float32 layers, too, without columns that are not needed."""
    from zotune.runtimes.spaces import appended

    monkeypatch.setattr(appended, "pays", lambda dtype, device: True)
    monkeypatch.setattr(appended, "_STEP", 1)
    monkeypatch.setattr(appended, "_SHARE", 0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On tiny models a second thread only waits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
