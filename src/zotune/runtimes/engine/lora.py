"""LoRA matrices beside the layers of an engine's model, which `mezo-lora` tunes.

They are zotune's own: made as PEFT makes them (`zotune.runtimes.embedded.lora`), kept as attributes of the module whose
outputs they add to, and multiplied by behind its own product. vLLM's adapters are not involved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from zotune.layout import Site
from zotune.runtimes.engine.layers import Place
from zotune.runtimes.engine.tokens import Part

_MARK = ".lora_"


def bases(sites: Sequence[Site]) -> dict[str, Site]:
    """The weights that LoRA matrices stand beside, by the name of the layer; A is ``(r, in)``, B ``(out, r)``."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for site in sites:
        shapes.setdefault(_layer(site), []).append(site.shape)
    return {path: Site(f"{path}.weight", (up[0], down[1])) for path, (down, up) in shapes.items()}


def beside(places: Mapping[str, Place], sites: Sequence[Site], dtype: torch.dtype, device: torch.device) -> list[Place]:
    """Make LoRA matrices, all zero, and say where they are.

    Args:
        places: Of the weights beside which they stand, by the name of the layer.
        sites: The matrices, A and then B of each layer.
        dtype: Of the matrices.
        device: Where they are to be.
    """
    return [_made(places[_layer(site)], site, dtype, device) for site in sites]


def _made(base: Place, site: Site, dtype: torch.dtype, device: torch.device) -> Place:
    """One matrix: A has the inputs that the weight has here, B its outputs."""
    whole = slice(0, site.shape[0])
    if f"{_MARK}A." in site.name:
        shape = site.shape[0], len(range(*base.part.columns.indices(site.shape[1])))
        part = Part(site, whole, whole, base.part.columns)
    else:
        shape = base.part.local.stop - base.part.local.start, site.shape[1]
        part = Part(site, slice(0, shape[0]), base.part.rows)
    setattr(base.module, site.name, torch.zeros(shape, dtype=dtype, device=device))
    return Place(base.path, base.module, site.name, "lora", part, base)


def _layer(site: Site) -> str:
    return site.name.partition(_MARK)[0]
