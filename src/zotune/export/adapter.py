"""The PEFT export: a LoRA adapter folder whose matrices are the change of the weights.

Linear layers and plain embeddings carry their change as LoRA matrices. What LoRA cannot carry goes along whole: norms,
embeddings with a forward of their own, and a head that is tied to an embedding, as ``modules_to_save``; biases as
``bias = "lora_only"``. Those are the tuned tensors themselves, so that 16-bit rounding cannot lose the change.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from zotune import models
from zotune.errors import ConfigError, ModelError
from zotune.export import card
from zotune.export.changes import collect
from zotune.export.recipe import Recipe
from zotune.export.truncation import Truncation
from zotune.layout import Site
from zotune.runtimes import precision
from zotune.runtimes.engine.slots import RANKS, served_rank
from zotune.runtimes.sites import find_sites

LARGEST = RANKS[-1]
"""The rank that an export does not go beyond unless it is told to: the largest that vLLM serves."""

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Adapter:
    """What was written.

    Attributes:
        rank: Of the change that the adapter holds.
        stored: Columns of the LoRA matrices: ``rank``, and zeros up to a rank that vLLM serves.
        error: Frobenius norm of what the adapter leaves out, relative to the whole change.
        worst: The site with the largest relative error, and that error; None if no site has one.
        served: Whether vLLM's LoRA loader takes it.
    """

    rank: int
    stored: int
    error: float
    worst: tuple[str, float] | None
    served: bool

    @property
    def notes(self) -> tuple[str, ...]:
        """What to know of it, a sentence or two each."""
        if self.worst is None:
            exact = f"The adapter has rank {self.rank}, which holds the whole change of its weight matrices."
        else:
            site, error = self.worst
            exact = (
                f"The change is cut to rank {self.rank}. Relative Frobenius error: {self.error:.2e} overall, "
                f"{error:.2e} at worst ({site})."
            )
        if self.served and self.stored <= LARGEST:
            padded = f" It is padded with zeros to rank {self.stored}." if self.stored > self.rank else ""
            option = f"--max-lora-rank {served_rank(self.stored)}"
            return exact, f"vLLM, where it has LoRA for this architecture, loads it with {option}.{padded}"
        why = f"its rank is above {LARGEST}" if self.served else "it tunes more than the weights of linear layers"
        return exact, f"vLLM's LoRA loader does not take it, because {why}; the format merged is the way there."


@dataclass(frozen=True)
class Places:
    """Where in an adapter each site goes.

    Attributes:
        linear: Weights of linear layers.
        embeddings: Tables of plain embeddings.
        biases: Biases of linear layers.
        saved: Modules that go along whole.
    """

    linear: tuple[Site, ...]
    embeddings: tuple[Site, ...]
    biases: tuple[Site, ...]
    saved: tuple[str, ...]

    @classmethod
    def of(cls, model: Any, sites: Collection[Site]) -> Places:
        """The places of these sites of a model."""
        linear: list[Site] = []
        embeddings: list[Site] = []
        biases: list[Site] = []
        saved = dict.fromkeys(_tied_head(model, sites))
        for site in sites:
            name, _, parameter = site.name.rpartition(".")
            module = model.get_submodule(name)
            if name in saved:
                continue
            if isinstance(module, nn.Linear | Conv1D):
                (linear if parameter == "weight" else biases).append(site)
            elif type(module) is nn.Embedding:
                embeddings.append(site)
            else:
                saved[name] = None
        return cls(tuple(linear), tuple(embeddings), tuple(biases), tuple(saved))

    @property
    def matrices(self) -> tuple[Site, ...]:
        """What LoRA carries."""
        return self.linear + self.embeddings

    @property
    def served(self) -> bool:
        """Whether vLLM's LoRA loader takes adapters with sites in these places."""
        return not (self.embeddings or self.biases or self.saved)


def write(recipe: Recipe, folder: Path, *, rank: int | None, max_error: float) -> Adapter:
    """Adapter configuration, matrices, tokenizer and a model card.

    Args:
        recipe: Of the model.
        folder: Empty.
        rank: Of the adapter at most; None for as many as the change has, up to `LARGEST`.
        max_error: The largest relative error of a site that is let pass.

    Raises:
        ModelError: PEFT is not installed, or the base model cannot be loaded.
        JournalError: It is not the base model of the recipe's journal.
        ConfigError: A site's error would be larger than ``max_error``, or a rank is given for what has one.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ModelError("the format peft needs PEFT: pip install 'zotune[peft]'") from error
    model, tokenizer = recipe.load_base()
    if recipe.method.lora_rank is None:
        made, tensors, settings = _from_change(recipe, model, rank, max_error)
    elif rank is None:
        made, tensors, settings = _from_lora(recipe, model)
    else:
        raise ConfigError(f"the run tuned LoRA matrices of rank {recipe.method.lora_rank}; leave --rank out")
    config = LoraConfig(
        **settings,
        task_type="CAUSAL_LM",
        base_model_name_or_path=recipe.model.path,
        revision=recipe.model.revision,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    owned = {_PREFIX + name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(owned, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    dtype, capped = precision.name(model.dtype), models.caps_attention(model.config)
    text = card.render(recipe.facts, "peft", dtype=dtype, capped=capped, notes=made.notes)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return made


Parts = tuple[Adapter, dict[str, Tensor], dict[str, Any]]
"""What is written, its tensors by name, and settings of PEFT's LoraConfig."""


def _from_lora(recipe: Recipe, model: Any) -> Parts:
    """The LoRA matrices that the run tuned, bit for bit."""
    rank = recipe.method.lora_rank or 0
    state = recipe.runtime(model).state()
    tuned = {name.removeprefix("weight/"): each for name, each in state.items() if name.startswith("weight/")}
    tensors = {name.replace(".default.", "."): each for name, each in tuned.items()}
    settings = {"r": rank, "lora_alpha": recipe.method.lora_alpha}
    return Adapter(rank, rank, 0.0, None, True), tensors, settings | _targets(model, tensors)


def _from_change(recipe: Recipe, model: Any, rank: int | None, max_error: float) -> Parts:
    """LoRA matrices that are the change of the weights, and whole modules where LoRA cannot carry it."""
    method = recipe.method
    weights = find_sites(model, method.scope)
    places = Places.of(model, weights)
    full = method.family == "dense" or method.weight_decay > 0
    if full or not places.served:
        recipe.require_plain(model)
    truncation = Truncation(rank or LARGEST, max_error, full=full)
    changes = collect(weights, method, recipe.journal.header.seed, recipe.updates())
    kept = {site: truncation.cut(site, changes.pop(site).decompose(weights[site])) for site in places.matrices}
    stored = served_rank(truncation.rank) if places.served else truncation.rank
    tensors: dict[str, Tensor] = {}
    for site, spectrum in kept.items():
        tensors |= _lora(site, *spectrum.factors(stored), embedding=site in places.embeddings)
    settings = {"r": stored, "lora_alpha": stored, **_targets(model, tensors)}
    if not places.served:
        tensors |= _whole(places, model, recipe.runtime(model).tuned())
        settings |= {"bias": "lora_only" if places.biases else "none", "modules_to_save": list(places.saved)}
    return Adapter(truncation.rank, stored, truncation.error, truncation.worst, places.served), tensors, settings


def _lora(site: Site, left: Tensor, right: Tensor, *, embedding: bool) -> dict[str, Tensor]:
    """PEFT's tensors of a site whose change is ``left @ right.T``, float32 ``(out, r)`` and ``(in, r)``."""
    name = site.name.removesuffix(".weight")
    if embedding:
        # A token picks a column of A, so the vocabulary is on that side.
        return {f"{name}.lora_embedding_A": left.T, f"{name}.lora_embedding_B": right}
    return {f"{name}.lora_A.weight": right.T, f"{name}.lora_B.weight": left}


def _whole(places: Places, model: Any, tuned: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that go along as they are, by PEFT's names."""
    names = [f"{module}.{part}" for module in places.saved for part in model.get_submodule(module).state_dict()]
    biases = {site.name.removesuffix("bias") + "base_layer.bias": tuned[site.name] for site in places.biases}
    return {name: tuned[name] for name in names} | biases


def _targets(model: Any, tensors: Collection[str]) -> dict[str, Any]:
    """The setting that makes PEFT put LoRA on the modules that these tensors are of, and on no other."""
    modules = {name.partition(".lora_")[0] for name in tensors}
    leaves = {name.rpartition(".")[2] for name in modules}
    # Short names are what people know and other programs expect; they do if they mean nothing else in this model.
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in leaves}
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in modules)
    return {"target_modules": sorted(leaves if meant == modules else modules), "fan_in_fan_out": transposed}


def _tied_head(model: Any, sites: Collection[Site]) -> list[str]:
    """The name of the output head, if it shows the weights of an embedding that is a site.

    LoRA on both would be right until PEFT merges it, which would add the change twice to the one weight.
    """
    head = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is head]
    own = {site.name for site in sites}
    shared = {name for name, each in model.named_parameters() if head is not None and each is head.weight}
    return names if shared & own and not shared & {f"{name}.weight" for name in names} else []
