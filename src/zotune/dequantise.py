"""From a quantised GGUF file of the Llama family to an ordinary Hugging Face folder in bfloat16.

transformers reads GGUF files too, but what it returns changes from release to release: some keep the weights packed,
some refuse to save them, some need further packages. The format itself is stable, so it is read here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zotune.errors import ModelError

if TYPE_CHECKING:
    from gguf import GGUFReader

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def convert(source: Path, folder: Path) -> None:
    """Write model and tokenizer of a GGUF file to ``folder``, which must exist.

    Raises:
        ModelError: The package ``gguf`` is missing, or the file holds something else than a Llama with a byte-level
            BPE tokenizer of SmolLM's kind.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError("reading a GGUF file needs the package gguf: pip install 'zotune[demo]'")
    from gguf import GGUFReader

    reader = GGUFReader(source)
    kind = tuple(_field(reader, key) for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
    if kind != ("llama", "gpt2", "smollm"):
        raise ModelError(
            f"{source} has architecture, tokenizer and splitting {kind}; only llama, gpt2, smollm are read"
        )
    read_model(reader).save_pretrained(folder)
    read_tokenizer(reader).save_pretrained(folder)


def read_model(reader: GGUFReader) -> LlamaForCausalLM:
    """The model in bfloat16, dequantised in float32 first."""
    from gguf import MODEL_ARCH, dequantize, get_tensor_name_map

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _model_config(reader, tied="output.weight" not in tensors)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.device("meta"):
        wanted = LlamaForCausalLM(config).state_dict()
    state: dict[str, Tensor] = {}
    for name in wanted:
        packed = tensors.get(names.get_name(name, (".weight",)) or "")
        if packed is None and name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if packed is None:
            raise ModelError(f"the GGUF file lacks the tensor for {name}")
        weight = torch.from_numpy(np.array(dequantize(packed.data, packed.tensor_type), dtype=np.float32))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        n_heads = next((number for projection, number in heads.items() if projection in name), None)
        state[name] = (weight if n_heads is None else _unpermute(weight, n_heads)).to(torch.bfloat16)
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=state, dtype=torch.bfloat16)


def read_tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer, which splits digits one by one, with its special tokens and chat template."""
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    named = {role: tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")] for key, role in roles.items()}
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=_field(reader, "llama.context_length"),
        clean_up_tokenization_spaces=False,
        **named,
    )
    result.chat_template = _field(reader, "tokenizer.chat_template")
    return result


def _model_config(reader: GGUFReader, *, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        # Stored as float32: 1e-05 comes back as 9.99999974e-06 unless it is rounded to what float32 can tell apart.
        rms_norm_eps=float(str(np.float32(_field(reader, "llama.attention.layer_norm_rms_epsilon")))),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_field(reader, "tokenizer.ggml.padding_token_id"),
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def _unpermute(weight: Tensor, n_heads: int) -> Tensor:
    """Undo GGUF's order of rotary rows: it interleaves the two halves of each head, Hugging Face keeps them apart."""
    rows, width = weight.shape
    return weight.view(n_heads, rows // n_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ModelError(f"the GGUF file has no field {key}")
    return field.contents()
