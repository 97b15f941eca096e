"""Presets: published methods as compositions of direction family, estimator and update rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from zotune.config import AUTO, MethodConfig
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
        lr_published: Whether its learning rate is one that was published.
    """

    name: str
    summary: str
    citation: str
    deviations: tuple[str, ...]
    method: Method
    lr_published: bool = True


_LOZO = (
    "Chen, Zhang, Cao, Yuan and Wen 2025, "
    "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures"
)
_MEZO = "Malladi, Gao, Nichani, Damian, Lee, Chen and Arora 2023, Fine-Tuning Language Models with Just Forward Passes"
_SIGNS = (
    "directions are s t^T with vectors of signs, s fresh every step and t kept for a window, so that all of them ride "
    "in one low-rank forward; the paper draws a sign per weight"
)
_APPLIES_PROBED = "applies the direction that was probed on every step; the official code redraws U on refresh steps"
_V_SIDE = "V is on the input side of every linear map, also where a checkpoint stores the weight transposed (GPT-2)"
_FURTHER = "eps is ten times the published one: at 1e-4 most of what 16-bit losses differ by is their rounding"
_TRANSIENT = "perturbs one site at a time inside the forward, so the weights are never touched and need no restoring"

_MANY: dict[str, Any] = {"distribution": "rademacher", "rank": 1}

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
        Preset(
            "lozo-late",
            "lozo on the last two fifths of the layers in turn, sixteen directions a step, answers calibrated",
            f"{_LOZO}; calibration: Zhou et al. 2024, Batch Calibration; turns: Park et al. 2025, MeZO-BCD",
            (
                _V_SIDE,
                "one clean score for all directions in place of two points for each",
                "scope and objective are ours",
            ),
            Method(
                scope="last-layers",
                estimator="one-sided",
                directions=16,
                calibrated=True,
                # Ten times LOZO's: the last layers change a loss so little that 16-bit activations round it away.
                eps=1e-2,
                lr=1e-2,
                schedule="linear",
            ),
            lr_published=False,
        ),
        Preset(
            "fzoo",
            "eight sign directions a step against one clean score, the step in units of their losses' spread",
            "FZOO 2025, fast zeroth-order fine-tuning with Rademacher directions and steps normalised by their losses",
            (
                _SIGNS,
                _FURTHER,
                "the standard deviation is that of the N losses themselves, not an estimate of a population's",
            ),
            Method(**_MANY, estimator="standardised", directions=8, lr=5e-5, eps=1e-3),
        ),
        Preset(
            "spsa-1.5",
            "forty sign directions a step against one clean score, large slopes damped: few large steps, large batches",
            "1.5-SPSA 2026, few-step zeroth-order fine-tuning with many probes of one shared clean loss",
            (
                _SIGNS,
                "eps falls with lr to half of itself and no further, where rounding would outweigh what it probes; its "
                "ratio to lr is a setting",
            ),
            Method(**_MANY, estimator="damped", directions=40, lr=1e-4, eps=1e-3, schedule="linear"),
            lr_published=False,
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

    The learning rate is the preset's own where the configuration leaves it to be chosen; see `zotune.learning_rate`.

    Raises:
        ConfigError: The preset is unknown, or a value has no meaning for it.
    """
    unset = {"preset", "lr"} if config.lr == AUTO else {"preset"}
    chosen = config.model_dump(exclude=unset, exclude_none=True)
    return replace(get(config.preset).method, **chosen)


def unused(preset: Preset) -> tuple[str, ...]:
    """The settings that a preset has no use for."""
    method = preset.method
    low_rank = ("rank", "interval") if method.family == "dense" else ()
    return low_rank if method.lora_rank else (*low_rank, "lora_rank", "lora_alpha")


def refuse_unused(config: MethodConfig) -> None:
    """Refuse a value that a preset has no use for: two runs that differ in it alone would be the same run.

    Raises:
        ConfigError: One is set, and not as the preset itself has it.
    """
    preset = get(config.preset)
    for name in unused(preset):
        if getattr(config, name) not in (None, getattr(preset.method, name)):
            own = ". The rank of its LoRA matrices is method.lora_rank" if preset.method.lora_rank else ""
            raise ConfigError(f"method.{name} means nothing for the preset {preset.name!r}{own}. Leave it out.")


def departures(config: MethodConfig) -> list[str]:
    """A notice of what is set otherwise than the preset has it; such as all of another preset, in a run's own file."""
    own = get(config.preset).method
    values = config.model_dump(exclude={"preset", "lr"}, exclude_none=True)
    other = {name: value for name, value in values.items() if value != getattr(own, name)}
    told = ", ".join(f"method.{name} = {value} (there {getattr(own, name)})" for name, value in other.items())
    return [f"settings other than the preset {config.preset!r} has: {told}"] if other else []


NEAREST_IN_16_BITS = 1e-3
"""Probe distance below which losses of a model in 16 bits differ by rounding more than by what is probed.

See docs/numerics.md, "Probe distance".
"""


def too_near(method: Method, bits: int) -> list[str]:
    """A notice, if probes of a model in so many bits are too near to tell a slope from rounding."""
    if bits > 16 or method.eps >= NEAREST_IN_16_BITS:
        return []
    return [
        f"method.eps = {method.eps:g} is below {NEAREST_IN_16_BITS:g}: the losses of a model in {bits} bits differ by "
        "rounding more than by so near a probe. Use a larger one, or model.dtype = 'float32'"
    ]
