"""What the driver must know of a quantised checkpoint, without loading it.

transformers may not have the packages that a format needs, and would hold every layer in another form. The names and
shapes of the sites are those of the same model unquantised, so that model is built without memory; what the checkpoint
stores unquantised (embeddings, norms, the head) is mapped into it from the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from zotune import hub, models
from zotune.config import ModelConfig
from zotune.errors import ModelError, reason
from zotune.paths import expand
from zotune.runtimes.fingerprint import digest

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


def load(config: ModelConfig) -> tuple[Any, Any]:
    """As `zotune.models.load` for who only reads the model, and a quantised checkpoint as its `skeleton`."""
    if not models.is_quantised(config):
        return models.load(config, mapped=True)
    return skeleton(config), models.load_tokenizer(config)


def skeleton(config: ModelConfig) -> Any:
    """The model of a quantised checkpoint as it would be unquantised.

    Returns:
        The model, not to be run: parameters that the checkpoint stores unquantised are mapped from its files, the
        others are on the device ``meta``.

    Raises:
        ModelError: There is no such model, or its files are no safetensors.
    """
    about = models.load_config(config)
    del about.quantization_config
    with torch.device("meta"):
        model = models.automatic_class(about).from_config(
            about, dtype=models.dtype_of(config), trust_remote_code=config.trust_remote_code
        )
    named = dict(model.named_parameters(remove_duplicate=False))
    stored = {name: tensor for name, tensor in _tensors(config) if name in named and _is_plain(tensor, named[name])}
    for name, tensor in stored.items():
        whole = nn.Parameter(tensor.to(named[name].dtype), requires_grad=False)
        for other in (other for other, each in named.items() if each is named[name]):
            path, _, own = other.rpartition(".")
            model.get_submodule(path)._parameters[own] = whole
    return model.eval()


def fingerprint(config: ModelConfig, model: Any) -> str:
    """Hexadecimal SHA-256 of the base weights: of a `skeleton` that of all that its files hold, packed as it is.

    Args:
        config: The checkpoint.
        model: What `load` made of it.
    """
    packed = any(parameter.is_meta for parameter in model.parameters())
    return digest(_tensors(config) if packed else model.named_parameters())


def _is_plain(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a stored tensor is the parameter itself, not a packed or scaled form of it."""
    return tensor.shape == parameter.shape and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _tensors(config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint's files by name, in the order of names; mapped, not read."""
    folder = _folder(config)
    try:
        index = json.loads((folder / _INDEX).read_text())["weight_map"] if (folder / _INDEX).is_file() else {}
        files = [safe_open(folder / name, "pt") for name in sorted(set(index.values()) or {_WHOLE})]
        by_name = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        for name in sorted(by_name):
            yield name, by_name[name].get_tensor(name)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot read the weights of the quantised model {config.path!r}: {reason(error)}. It needs {_WHOLE}, or "
            f"{_INDEX} and the files that it names."
        ) from error


def _folder(config: ModelConfig) -> Path:
    """Where the checkpoint's files are; those of a model on the hub are fetched."""
    if (folder := expand(config.path)).is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        with hub.offline(not hub.reachable()):
            found = snapshot_download(config.path, revision=config.revision, allow_patterns=["*.json", "*.safetensors"])
    # What is raised depends on the versions of several libraries below, and all of it means the same to the user.
    except Exception as error:
        raise ModelError(f"cannot fetch the weights of the model {config.path!r}: {reason(error)}") from error
    return Path(found)
