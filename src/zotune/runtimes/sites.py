"""Finding a model's sites by module structure, whatever its modules are called."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from typing_extensions import TypeIs

from zotune.errors import ModelError
from zotune.figures import counted, percent
from zotune.layout import Layout, Site
from zotune.runtimes import norms

_UNDECAYED = ("bias", "layer_norm", "layernorm")
"""Parts of parameter names that weight decay skips, as in LOZO's and MeZO's code."""


def find_sites(model: PreTrainedModel, scope: str, *, lora: bool = False) -> dict[Site, Tensor]:
    """The sites to tune and their weights, in the order of ``named_parameters``.

    A weight that is stored transposed (GPT-2) is given as a transposed view, so that all are ``(out, in)``. Of a model
    that sees or hears as well, only the text model and the output head are looked at.

    Args:
        model: Any causal language model.
        scope: Of `zotune.layout.Scope`; ``linear`` leaves out experts as well, which do not see every token.
        lora: Only the LoRA matrices.

    Raises:
        ModelError: A parameter in scope belongs to a module whose structure is not known to be exact, or there is none.
    """
    owners = _owners(model)
    head, text = model.get_output_embeddings(), _text_parameters(model)
    turns = _last_layers(model) if scope == "last-layers" else None
    found: dict[Site, Tensor] = {}
    unknown: list[str] = []
    for name, parameter in model.named_parameters():
        if id(parameter) not in text:
            continue
        owner, routed = owners[id(parameter)], is_routed(name)
        linear = is_linear(owner) and parameter is owner.weight and not routed
        if lora and not (linear and ".lora_" in name):
            continue
        if scope == "linear" and (not linear or owner is head):
            continue
        if turns is not None and id(parameter) not in turns:
            continue
        if routed or not (_is_plain(owner) or norms.is_norm(owner)):
            unknown.append(f"{name} ({type(owner).__name__})")
            continue
        weight = parameter.data.T if isinstance(owner, Conv1D) and linear else parameter.data
        turn = Site.turn if turns is None else turns[id(parameter)]
        found[Site(name, tuple(weight.shape), decays(name), turn)] = weight
    if unknown:
        raise ModelError(
            f"scope {scope!r} cannot tune {counted(len(unknown), 'parameter')} exactly, among them "
            f"{', '.join(unknown[:3])}. Set scope = 'linear' to tune the linear layers only."
        )
    if not found:
        raise ModelError(f"{type(model).__name__} has no parameter in scope {scope!r}")
    return found


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter of this name."""
    return not any(part in name for part in _UNDECAYED)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the text model, first to last; none where they are not one list of modules."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    decoder = model.get_decoder()
    lists = [] if decoder is None else [each for each in decoder.modules() if isinstance(each, nn.ModuleList)]
    return next((list(each) for each in lists if len(each) == count), [])


def _last_layers(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """Turns of the parameters of the last fifth of the layers and of the fifth below it, of one layer at least each."""
    layers = decoder_layers(model)[::-1]
    fifth = max(1, len(layers) // 5)
    parts = [part for part in (layers[:fifth], layers[fifth : 2 * fifth]) if part]
    return {
        id(parameter): (k, len(parts))
        for k, part in enumerate(parts)
        for layer in part
        for parameter in layer.parameters()
    }


def left_out(model: PreTrainedModel, layout: Layout) -> list[str]:
    """Notices of what a user may take to be tuned and is not: experts with their routers, and other towers.

    Args:
        model: Whose sites were found.
        layout: Those sites.
    """
    sites, owners = {site.name for site in layout.sites}, _owners(model)
    text, total = _text_parameters(model), sum(parameter.numel() for parameter in model.parameters())
    experts: dict[str, int] = {}
    towers: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if id(parameter) not in text:
            towers[name] = parameter.numel()
        elif name not in sites and parameter.dim() > 1 and (is_routed(name) or not _is_plain(owners[id(parameter)])):
            experts[name] = parameter.numel()
    told = (
        (experts, "matrices but no linear layers that see every token (experts, routers), left as they are"),
        (towers, "of no text model, left as they are"),
    )
    return [
        f"{counted(len(names), 'parameter')}, {percent(sum(names.values()) / total)} of the model: {what}; "
        f"among them {next(iter(names))}"
        for names, what in told
        if names
    ]


def _owners(model: PreTrainedModel) -> dict[int, nn.Module]:
    """The module that holds each parameter, by the parameter's id."""
    return {id(parameter): module for module in model.modules() for parameter in module.parameters(recurse=False)}


def is_linear(module: nn.Module) -> TypeIs[nn.Linear | Conv1D]:
    """Whether a module is a linear layer and nothing else; a router may be one that gives more than a product."""
    return isinstance(module, nn.Linear | Conv1D) and type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _is_plain(module: nn.Module) -> bool:
    return is_linear(module) or isinstance(module, nn.Embedding)


def _text_parameters(model: PreTrainedModel) -> set[int]:
    """Ids of the parameters that text alone passes through: not those of a vision tower, for example."""
    if model.config.get_text_config() is model.config:
        return {id(parameter) for parameter in model.parameters()}
    decoder = model.get_decoder()
    if decoder in (None, model, model.base_model):
        raise ModelError(
            f"cannot tell the text model of {type(model).__name__} from its other parts: its configuration has one, "
            "but get_decoder() does not give it. Use a text-only checkpoint."
        )
    parts = (decoder, model.get_output_embeddings())
    return {id(parameter) for part in parts if part is not None for parameter in part.parameters()}


def is_routed(name: str) -> bool:
    """Whether a module or parameter belongs to one expert of several, which sees the tokens routed to it only."""
    return "experts" in name.split(".")
