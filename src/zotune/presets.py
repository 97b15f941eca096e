"""Presets: published methods as compositions of direction family, estimator and update rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

from zotune.config import MethodConfig
from zotune.errors import ConfigError, unknown
from zotune.optimizer import Method


@dataclass(frozen=True)
class Preset:
    """A named, cited method.

    Attributes:
        name: What a configuration calls it.
        summary: One line.
        citation: Where it comes from.
        deviations: How zotune differs from the published code.
        method: Its defaults.
    """

    name: str
    summary: str
    citation: str
    deviations: tuple[str, ...]
    method: Method


_LOZO = (
    "Chen, Zhang, Cao, Yuan and Wen 2025, "
    "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures"
)
_MEZO = "Malladi, Gao, Nichani, Damian, Lee, Chen and Arora 2023, Fine-Tuning Language Models with Just Forward Passes"
_APPLIES_PROBED = "applies the direction that was probed on every step; the official code redraws U on refresh steps"
_V_SIDE = "V is on the input side of every linear map, also where a checkpoint stores the weight transposed (GPT-2)"
_TRANSIENT = "perturbs one site at a time inside the forward, so the weights are never touched and need no restoring"

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "lozo",
            "low-rank directions U V^T, V fixed for 50 steps, two-point estimate, SGD",
            _LOZO,
            (_APPLIES_PROBED, _V_SIDE),
            Method(lr=1e-6),
        ),
        Preset(
            "lozo-m",
            "lozo with momentum kept in factor space and projected at each refresh of V",
            _LOZO,
            (_APPLIES_PROBED, _V_SIDE),
            Method(lr=1e-6, momentum=0.9),
        ),
        Preset(
            "mezo-factorized",
            "MeZO with directions U V^T / sqrt(r) of high rank, both factors fresh every step",
            "Li and Ding 2026",
            ("biases and norm gains use dense unit normal directions",),
            Method(lr=1e-6, rank=128, interval=1, normalised=True),
        ),
        Preset(
            "mezo",
            "dense normal directions, two-point estimate, SGD",
            _MEZO,
            (_TRANSIENT,),
            Method(family="dense", lr=1e-6),
        ),
        Preset(
            "mezo-lora",
            "MeZO on freshly added LoRA matrices of the query and value projections",
            _MEZO,
            (_TRANSIENT,),
            Method(family="dense", lr=5e-5, eps=1e-2, lora_rank=8, lora_alpha=16),
        ),
    )
}


def get(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ConfigError: There is none; the message has the nearest name.
    """
    if name not in PRESETS:
        raise ConfigError(unknown("preset", name, PRESETS))
    return PRESETS[name]


def resolve(config: MethodConfig) -> Method:
    """The preset's method with the values that the configuration sets itself.

    Raises:
        ConfigError: The preset is unknown, or a value has no meaning for it.
    """
    chosen = config.model_dump(exclude={"preset"}, exclude_none=True)
    return replace(get(config.preset).method, **chosen)
