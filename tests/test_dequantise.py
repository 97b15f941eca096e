import importlib.util
from pathlib import Path

import pytest
import tiny_gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from zotune.dequantise import convert
from zotune.errors import ModelError


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    packed = tmp_path_factory.mktemp("packed") / "tiny.gguf"
    tiny_gguf.write(packed, tiny_gguf.model())
    convert(packed, folder)
    return folder


def test_the_checkpoint_computes_what_the_packed_model_did(converted: Path) -> None:
    got = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    tokens = torch.arange(4, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(got(tokens).logits, tiny_gguf.model()(tokens).logits)


def test_a_head_of_its_own_stays_one(tmp_path: Path) -> None:
    source = tiny_gguf.model(tied=False)
    tiny_gguf.write(tmp_path / "tiny.gguf", source)
    convert(tmp_path / "tiny.gguf", tmp_path)
    got = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not got.config.tie_word_embeddings
    assert torch.equal(got.lm_head.weight.float(), source.lm_head.weight)


def test_the_checkpoint_is_an_ordinary_tied_bfloat16_one(converted: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rms_norm_eps == 1e-5
    assert not hasattr(model.config, "quantization_config")


def test_the_tokenizer_merges_splits_digits_and_keeps_special_tokens(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert tokenizer.tokenize("It was great 42<|im_end|>") == [*"ItĠwas", "Ġgreat", *"Ġ42", "<|im_end|>"]
    assert tokenizer.decode(tokenizer("It was great 42").input_ids) == "It was great 42"
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "tiny.gguf", tiny_gguf.model(), architecture="gemma")
    with pytest.raises(ModelError, match=r"'gemma'.*only llama"):
        convert(tmp_path / "tiny.gguf", tmp_path)


def test_a_missing_gguf_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'zotune\[demo\]'"):
        convert(tmp_path / "tiny.gguf", tmp_path)
