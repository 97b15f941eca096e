"""Loading a model and its tokenizer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from zotune import hub
from zotune.config import ModelConfig
from zotune.errors import ModelError, reason, required
from zotune.paths import expand
from zotune.runtimes.precision import product_dtype


def load(config: ModelConfig, *, mapped: bool = False) -> tuple[Any, Any]:
    """The model, in evaluation mode on its device, and its tokenizer.

    A vision-language checkpoint is loaded whole; only its text model is ever run or tuned.

    Args:
        config: The checkpoint.
        mapped: Leave the weights where they are, mapped from the checkpoint's files: for who only reads some of them.

    Raises:
        ModelError: There is no such model, its files cannot be read or lack weights, or the device is not there.
    """
    device = chosen_device(required(config, ModelConfig, "take Config.model, or ModelConfig(path=...)").device)
    tokenizer = load_tokenizer(config)
    options = {"dtype": dtype_of(config), "output_loading_info": True}
    model, found = _load(config, automatic_class(load_config(config)), **options)
    if missing := sorted(found["missing_keys"]):
        raise ModelError(
            f"the model {config.path!r} lacks {len(missing)} of its weights, among them {missing[0]}. transformers "
            "would fill them with random numbers; give a complete checkpoint of a causal language model."
        )
    if mapped:
        return model.eval(), tokenizer
    model = model.to(device).eval()
    if device.type == "cpu":
        # They are mapped from the checkpoint's file, where the first write to every page is slow.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    return model, tokenizer


def load_config(config: ModelConfig) -> Any:
    """The model's configuration alone; same errors as `load`."""
    from transformers import AutoConfig

    return _load(config, AutoConfig)


def is_quantised(config: ModelConfig) -> bool:
    """Whether the checkpoint's weights are quantised; same errors as `load`."""
    return getattr(load_config(config), "quantization_config", None) is not None


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer alone; same errors as `load`."""
    from transformers import AutoTokenizer

    return _load(config, AutoTokenizer)


def automatic_class(config: Any) -> Any:
    """transformers' automatic class for a configuration: a causal language model, or one that also sees."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto as auto

    causal = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    sees = config.model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if sees and not causal and not remote else AutoModelForCausalLM


def _load(config: ModelConfig, automatic: Any, **options: Any) -> Any:
    """What an automatic class of transformers makes of the checkpoint, which is a folder or on the hub."""
    path = folder_or_id(config.path)
    reachable = Path(path).is_dir() or hub.reachable()
    options |= {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    try:
        with hub.offline(not reachable), _without_bars():
            return automatic.from_pretrained(path, **options)
    # What is raised depends on the versions of several libraries below, and all of it means the same to the user.
    except Exception as error:
        why = reason(error)
        if not reachable:
            why = f"it is not in the local cache, and the Hugging Face hub cannot be reached: {hub.WITHOUT}"
        raise ModelError(
            f"cannot load the model {config.path!r}: {why}. "
            "Give a folder with config.json, weights and tokenizer, or the id of a model on the hub."
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bar of transformers' in here; downloads keep theirs, and so does what the caller loads later."""
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda bar, args, options: bar(*args, **options | {"disable": True}))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def context_length(model: Any) -> int:
    """Longest sequence in tokens that the model's positions allow, and all of it is treated as any shorter one is.

    Longer ones change what LongRoPE makes of the short rows beside them, and Llama 4's attention cuts them into chunks.
    """
    config = model.config.get_text_config()
    allowed = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", 0) or 2**20
    return int(min(allowed, getattr(config, "attention_chunk_size", None) or allowed, _first_rope(config) or allowed))


def _first_rope(config: Any) -> int | None:
    """The length up to which a model with LongRoPE has its short factors; None without it."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


def head_width(config: Any) -> int:
    """Elements of an attention head's queries and keys, by a text model's configuration."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def caps_attention(config: Any) -> bool:
    """Whether a model's attention scores pass through a soft cap, by its configuration (Gemma 2)."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def embeddings(model: Any) -> int:
    """Tokens that the model has embeddings of; their ids count from 0."""
    table = model.get_input_embeddings()
    return int(getattr(table, "num_embeddings", None) or table.weight.shape[0])


def chosen_device(name: str = "auto") -> torch.device:
    """The device of a name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ModelError: It is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusal = f"device {name!r} is not there. Use 'auto', 'cpu' or a CUDA device that PyTorch sees."
    # PyTorch knows others: on "meta" are no numbers, and on the rest nothing was ever tuned.
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ModelError(refusal)
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(refusal) from error
    return device


def dtype_of(config: ModelConfig) -> torch.dtype:
    """What the model's weights are loaded in.

    Raises:
        ModelError: The device is not there.
    """
    if config.dtype == "auto":
        return product_dtype(torch.bfloat16, chosen_device(config.device).type)
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.dtype]


def folder_or_id(path: str) -> str:
    """What transformers and vLLM are to load: an existing folder's path, or a hub id as it is.

    Raises:
        ModelError: There is no such folder, or no checkpoint in it.
    """
    folder = expand(path)
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not folder.is_dir():
        beside = [each.name for each in folder.parent.glob("*") if each.is_dir()]
        close = difflib.get_close_matches(folder.name, beside, n=1, cutoff=0.5)
        hint = f" Did you mean {str(folder.parent / close[0])!r}?" if close else ""
        raise ModelError(f"the model folder {path!r} does not exist.{hint}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(f"the model folder {path!r} has no config.json, so it is not a Hugging Face checkpoint")
    return str(folder) if folder.is_dir() else path
