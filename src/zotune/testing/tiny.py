"""Tiny random models of every supported family, and rows to score with them.

A model has two layers and a few ten thousand parameters, so that a whole suite takes seconds. Every parameter is
random, biases and norm gains too: a runtime that forgets one gives other scores.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from zotune.errors import ModelError, unknown
from zotune.models import automatic_class
from zotune.rows import Candidate, Example, Row

VOCABULARY = 96
"""Token ids of every tiny model are ``0 .. VOCABULARY - 1``."""

CONTEXT = 64
"""Longest sequence of every tiny model."""

_DECODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
}
_GEMMA: dict[str, Any] = {**_DECODER, "query_pre_attn_scalar": 8, "sliding_window": 8}


_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "dropout": 0.0,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": CONTEXT}),
    "llama": ("llama", {**_DECODER, "tie_word_embeddings": False}),
    "llama-tied": ("llama", {**_DECODER, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {**_DECODER, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_DECODER, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}),
    "gemma3": ("gemma3_text", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "mistral": ("mistral", {**_DECODER, "sliding_window": 8, "tie_word_embeddings": False}),
}

FAMILIES: tuple[str, ...] = tuple(_CONFIGS)
"""Names that `model` takes: one per mechanism that a runtime has to get right."""

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "tie_word_embeddings": False}
_ROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", {**_DECODER, **_EXPERTS, "num_experts": 4}),
    "qwen2-moe": ("qwen2_moe", {**_DECODER, **_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24}),
}

_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
_SEEING: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": (
        "llava",
        {
            "text_config": {"model_type": "llama", "vocab_size": VOCABULARY, **_DECODER},
            "vision_config": {"model_type": "clip_vision_model", **_VISION, "image_size": 8, "patch_size": 4},
            "image_token_index": 4,
        },
    ),
    "qwen2-vl": (
        "qwen2_vl",
        {
            "text_config": {
                "vocab_size": VOCABULARY,
                **{key: value for key, value in _DECODER.items() if key != "head_dim"},
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        },
    ),
    "gemma3-vl": (
        "gemma3",
        {
            "text_config": {"vocab_size": VOCABULARY, **_CONFIGS["gemma3"][1]},
            "vision_config": {**_VISION, "image_size": 8, "patch_size": 4},
            "mm_tokens_per_image": 4,
        },
    ),
}

ROUTED: tuple[str, ...] = tuple(_ROUTED)
"""More names that `model` takes: mixtures of experts, of which scope ``linear`` alone is exact."""

SEEING: tuple[str, ...] = tuple(_SEEING)
"""More names that `model` takes: vision-language models, of which the text model is tuned."""


def config(family: str, head_size: int = 8) -> PretrainedConfig:
    """The transformers configuration of a tiny model.

    Args:
        family: Its name.
        head_size: Width of an attention head. vLLM's attention on a CPU wants 32 or more.

    Raises:
        ModelError: No such family.
    """
    known = _CONFIGS | _ROUTED | _SEEING
    if family not in known:
        raise ModelError(unknown("tiny model", family, known))
    kind, values = known[family]
    if head_size != 8:
        wide = dict.fromkeys(("n_embd", "word_embed_proj_dim"), 4 * head_size) | {"head_dim": head_size}
        # Those whose heads are as wide as the model divided by their number, in vLLM at least.
        wide |= {"hidden_size": 4 * head_size} if family in ("opt", "qwen2") else {}
        values = values | {key: value for key, value in wide.items() if key in values}
    make: Callable[..., PretrainedConfig] = CONFIG_MAPPING[kind]
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    return make(vocab_size=VOCABULARY, attn_implementation="eager", **special, **values)


def model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, head_size: int = 8) -> nn.Module:
    """A tiny random causal language model in evaluation mode, the same for the same arguments.

    Weights are spread so that attention and logits are far from flat; norm gains and biases are random.

    Raises:
        ModelError: No such family.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chosen = config(family, head_size)
        made: nn.Module = automatic_class(chosen).from_config(chosen, dtype=torch.float32)
        with torch.no_grad():
            for parameter in made.parameters():
                _randomise(parameter)
    return made.to(dtype).eval()


def save(model: Any, folder: Path) -> None:
    """Write a tiny model as a checkpoint, with a tokenizer of words that are numbers, which engines want to see."""
    model.save_pretrained(folder)
    backend = Tokenizer(WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="0"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="0", bos_token="2", eos_token="3")
    tokenizer.save_pretrained(folder)


def _randomise(parameter: nn.Parameter) -> None:
    """Spread a matrix to variance 2 / in; move a vector off its initial value (a gain's 0 or 1, a bias's 0)."""
    if parameter.dim() > 1:
        parameter.normal_(0.0, (2.0 / min(parameter.shape)) ** 0.5)
    else:
        parameter.add_(torch.randn_like(parameter), alpha=0.2)


def rows(
    kind: Literal["single", "multi", "mixed"] = "mixed", count: int = 6, *, seed: int = 0, longest: int = 24
) -> tuple[Row, ...]:
    """Random rows whose prompts have 1 to ``longest`` tokens, both ends included from two rows on.

    Args:
        kind: ``single``: two candidates of one token each; ``multi``: one to three candidates of up to four tokens,
            some of them not scored; ``mixed``: both in turn.
        count: Number of rows.
        seed: Equal seeds give equal rows.
        longest: Longest prompt, in tokens.
    """
    draw = random.Random(seed)
    lengths = [longest, 1, *(draw.randint(1, longest) for _ in range(count))][:count]
    draw.shuffle(lengths)
    made = []
    for number, length in enumerate(lengths):
        prompt = tuple(draw.randrange(4, VOCABULARY) for _ in range(length))
        single = kind == "single" or (kind == "mixed" and number % 2 == 0)
        made.append(Row(prompt, _one_token(draw) if single else _several_tokens(draw)))
    return tuple(made)


def examples(count: int, *, seed: int = 0) -> tuple[Example, ...]:
    """Something to learn by heart: `rows` of one kind, ``single``, whose candidates are right in turn."""
    return tuple(Example(row, gold=number % 2) for number, row in enumerate(rows("single", count, seed=seed)))


def _one_token(draw: random.Random) -> tuple[Candidate, ...]:
    return tuple(Candidate((token,), (0,)) for token in draw.sample(range(4, VOCABULARY), 2))


def _several_tokens(draw: random.Random) -> tuple[Candidate, ...]:
    made = []
    for length in (4, *(draw.randint(1, 4) for _ in range(draw.randint(0, 2)))):
        tokens = tuple(draw.randrange(4, VOCABULARY) for _ in range(length))
        scored = sorted(draw.sample(range(length), draw.randint(1, length)))
        made.append(Candidate(tokens, tuple(scored)))
    return tuple(made)
