from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM
from transformers.utils import logging

from zotune import models
from zotune.config import ModelConfig
from zotune.errors import ModelError
from zotune.runtimes.precision import product_dtype
from zotune.testing import tiny


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return shutil.copytree(tiny_model_folder, tmp_path / "tiny-llama")


def load(path: object, **values: Any) -> Any:
    return models.load(ModelConfig(path=str(path), device="cpu", **values))


def refusal(path: object, **values: Any) -> str:
    """What a user reads: one line."""
    with pytest.raises(ModelError) as caught:
        load(path, **values)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_model_comes_in_the_dtype_that_is_asked_for_ready_to_score(folder: Path, name: str) -> None:
    model, tokenizer = load(folder, dtype=name)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, name)}
    assert not model.training
    assert tokenizer("the film").input_ids == [tokenizer.vocab["the"], tokenizer.vocab["film"]]


def test_loading_shows_no_bar_and_leaves_those_of_others(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bars = []

    def mine(factory: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        bars.append(options)
        return factory(*args, **options)

    before = logging.set_tqdm_hook(mine)
    try:
        model, _ = load(folder)
        assert (bars, capfd.readouterr().err) == ([], "")
        type(model).from_pretrained(folder)
        assert "Loading weights" in capfd.readouterr().err
        assert bars
    finally:
        assert logging.set_tqdm_hook(before) is mine


def test_the_automatic_dtype_is_the_one_that_the_device_multiplies_best(folder: Path) -> None:
    model, _ = load(folder)
    assert model.dtype == product_dtype(torch.bfloat16, "cpu")


def test_embeddings_are_counted_by_the_module_or_by_its_rows(folder: Path) -> None:
    model, _ = load(folder)
    assert models.embeddings(model) == 64
    del model.get_input_embeddings().num_embeddings
    assert models.embeddings(model) == 64


def test_a_folder_may_be_in_the_home_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert load(f"~/{folder.name}")[0].config.model_type == "llama"


def test_a_folder_that_is_not_there_gets_the_nearest_one(folder: Path) -> None:
    expected = f"the model folder '{folder.parent}/tiny-lama' does not exist. Did you mean '{folder}'?"
    assert refusal(folder.parent / "tiny-lama") == expected
    assert refusal(folder / "weights" / "latest").endswith("does not exist.")
    assert refusal(folder / "config.json").endswith("does not exist.")


def test_a_folder_without_a_model_is_said_to_have_none(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path)


def test_a_name_that_is_no_hub_id_is_refused() -> None:
    assert "cannot load the model 'my model'" in refusal("my model")


def test_a_hub_id_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("nobody/no-such-model")
    assert message.startswith("cannot load the model 'nobody/no-such-model': ")
    assert "the id of a model on the hub" in message


def test_a_hub_that_cannot_be_reached_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing listens at this port of this machine.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    began = time.monotonic()
    message = refusal("nobody/no-such-model")
    assert "not in the local cache, and the Hugging Face hub cannot be reached" in message
    assert "Give a folder" in message
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("family", [*tiny.SEEING, *tiny.ROUTED])
def test_models_that_see_or_route_are_loaded_whole(family: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    made: Any = tiny.model(family)
    made.save_pretrained(tmp_path)
    for path in tiny_model_folder.glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    model, _ = load(tmp_path, dtype="float32")
    assert type(model) is type(made)
    assert models.context_length(model) == tiny.CONTEXT
    for name, parameter in made.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=0)


def _set(**values: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no file named model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"xx"), "cannot load"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x20" + b"\0" * 99), "cannot load"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a valid json file"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot load"),
        (_set(model_type="no-such-kind"), "no-such-kind"),
        (_set(model_type="t5"), "automodelforcausallm"),
        (_set(vocab_size="many"), "vocab_size"),
        (_set(num_attention_heads=5), "not a multiple of the number of attention heads"),
        (_set(hidden_size=64), "cannot load"),
        (_set(num_hidden_layers=3), "lacks 9 of its weights, among them model.layers.2."),
    ],
)
def test_a_spoilt_checkpoint_is_refused_in_one_line(
    folder: Path, spoil: Callable[[Path], object], expected: str
) -> None:
    spoil(folder)
    message = refusal(folder)
    assert str(folder) in message
    assert expected in message.lower()


@pytest.mark.parametrize("device", ["cuda:99", "cuda:x", "meta", "meta:x", "gpu", "mps"])
def test_a_device_that_is_not_there_is_named(folder: Path, device: str) -> None:
    with pytest.raises(ModelError, match=f"device '{device}' is not there. Use 'auto', 'cpu' or a CUDA device"):
        models.load(ModelConfig(path=str(folder), device=device))


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "gemma3"])
def test_the_context_is_what_the_positions_allow(family: str) -> None:
    model = tiny.model(family)
    length = models.context_length(model)
    assert length == tiny.CONTEXT
    with torch.no_grad():
        assert model(torch.full((1, length), 5)).logits.shape[1] == length


def test_a_model_without_a_limit_has_a_large_context() -> None:
    small = BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=2)
    assert models.context_length(BloomForCausalLM(small)) >= 100_000
