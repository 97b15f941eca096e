"""Model cards: what a tuned model is, what it learnt from and how to load it, from what the run has on record."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData, metadata_load

from zotune.config import Config, DataConfig
from zotune.evaluate import Metrics
from zotune.figures import counted, finite, percent
from zotune.journal import Journal
from zotune.presets import PRESETS
from zotune.run import RunDirectory

_SHOWN = ("lr", "eps", "scope", "directions", "weight_decay", "schedule")
_SHOWN_LOW_RANK = ("rank", "interval", "momentum")
_SHOWN_LORA = ("lora_rank", "lora_alpha")

_LOAD_MERGED = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH"{options})
tokenizer = AutoTokenizer.from_pretrained("PATH")"""

_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{base}", dtype="{dtype}"{options})
model = PeftModel.from_pretrained(model, "PATH")"""

_CAPPED = (
    "The attention scores of this model pass through a soft cap, which transformers' default attention leaves out; "
    "`eager` has it."
)


@dataclass(frozen=True)
class Facts:
    """What people should know of a run, as plain values; no path of the machine that it ran on.

    Attributes:
        base: Hub id of the base model, or the name of its folder.
        hub: Whether ``base`` is a hub id.
        revision: Of the hub id.
        license: Of the base model, if its own card says.
        data: What it learnt from.
        preset: Name of the method.
        method: The method's values.
        seed: Of the run.
        batch_size: Examples per step.
        steps: Finished steps.
        skipped: How many of them had no estimate.
        evaluations: First and last on record: finished steps, loss, shares (such as accuracy) by name, examples.
        command: The command line that trained it.
        versions: Of the packages that trained it.
    """

    base: str
    hub: bool
    revision: str | None
    license: str | None
    data: str
    preset: str
    method: dict[str, Any]
    seed: int
    batch_size: int
    steps: int
    skipped: int
    evaluations: list[dict[str, Any]]
    command: str
    versions: dict[str, str | None]

    @classmethod
    def of_run(cls, run: RunDirectory, config: Config, journal: Journal) -> Facts:
        """What a run directory says."""
        folder = Path(config.model.path)
        local = folder.is_absolute() or folder.is_dir()
        # After a power cut there may be evaluations of steps that the journal has lost.
        known = dict(sorted(run.evaluations(upto=len(journal.entries)).items()))
        manifest = run.read_manifest()
        return cls(
            base=folder.name if local else config.model.path,
            hub=not local,
            revision=config.model.revision,
            license=_license(folder) if local else None,
            data=_data(config.data),
            preset=config.method.preset,
            method=journal.header_at(len(journal.entries)).method,
            seed=journal.header.seed,
            batch_size=journal.header.batch_size,
            steps=len(journal.entries),
            skipped=sum(not entry.coefficients for entry in journal.entries),
            evaluations=[_evaluation(step, known[step]) for step in sorted({*list(known)[:1], *list(known)[-1:]})],
            command=_command(manifest.get("command")),
            versions=manifest.get("versions") or {},
        )


def render(facts: Facts, kind: str, *, dtype: str, capped: bool = False, notes: Sequence[str] = ()) -> str:
    """The text of a README.md.

    Args:
        facts: Of the run.
        kind: ``merged`` or ``peft``.
        dtype: Of the base model's weights.
        capped: Whether its attention scores pass through a soft cap, which transformers' default attention leaves out.
        notes: What else to know of this export, a sentence each.
    """
    library = "peft" if kind == "peft" else "transformers"
    front = ModelCardData(
        base_model=facts.base if facts.hub else None,
        library_name=library,
        license=facts.license,
        pipeline_tag="text-generation",
        tags=["zotune", "zeroth-order-optimization", facts.preset],
    )
    what = "A PEFT adapter for" if kind == "peft" else "A fine-tune of"
    load = _LOAD_ADAPTER if kind == "peft" else _LOAD_MERGED
    options = f', revision="{facts.revision}"' if facts.revision and kind == "peft" else ""
    if capped:
        options += ', attn_implementation="eager"'
        notes = (*notes, _CAPPED)
    load = load.format(base=facts.base if facts.hub else "BASE", dtype=dtype, options=options)
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in _rows(facts, dtype) if value)
    parts = [
        f"---\n{front.to_yaml().strip()}\n---",
        f"# {Path(facts.base).name}, tuned with {facts.preset}",
        f"{what} {facts.base}, trained with forward passes only by zotune (zeroth-order optimization).",
        f"| | |\n|---|---|\n{rows}",
        *notes,
        f"```python\n{load}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _rows(facts: Facts, dtype: str) -> list[tuple[str, str]]:
    preset = PRESETS.get(facts.preset)
    low_rank = _SHOWN_LOW_RANK if facts.method.get("family") == "low-rank" else ()
    lora = _SHOWN_LORA if facts.method.get("lora_rank") else ()
    values = [f"{name} = {facts.method[name]}" for name in (*_SHOWN, *low_rank, *lora) if facts.method.get(name)]
    skipped = f", {facts.skipped} of them without an estimate" if facts.skipped else ""
    return [
        ("base model", facts.base + (f", revision {facts.revision}" if facts.revision else "")),
        ("dtype", dtype),
        ("data", facts.data),
        ("method", f"`{facts.preset}`" + (f": {preset.citation}" if preset else "")),
        ("settings", ", ".join(values)),
        ("steps", f"{facts.steps}{skipped}, batches of {facts.batch_size}, seed {facts.seed}"),
        *((f"after {counted(each['step'], 'step')}", _metrics(each)) for each in facts.evaluations),
        ("trained by", f"`{facts.command}`" if facts.command else ""),
        ("versions", ", ".join(f"{name} {number}" for name, number in facts.versions.items() if number)),
    ]


def _evaluation(step: int, metrics: Metrics) -> dict[str, Any]:
    return {"step": step, "loss": finite(metrics.loss), "shares": metrics.shares, "examples": metrics.examples}


def _metrics(evaluation: dict[str, Any]) -> str:
    loss = [] if evaluation["loss"] is None else [f"loss {evaluation['loss']:.4f}"]
    shares = [f"{name} {percent(share)}" for name, share in evaluation["shares"].items()]
    rows = counted(evaluation["examples"], "validation row")
    return f"{', '.join(loss + shares)} on {rows}" if loss or shares else ""


def _data(data: DataConfig) -> str:
    """Task and files of the data, files by their names alone."""
    sources = [("train", data.train), ("validation", data.validation)]
    files = [
        f"{role} {Path(source).name if Path(source).is_absolute() else source}" for role, source in sources if source
    ]
    return ", ".join(([f"task {data.task}"] if data.task else []) + files)


def _command(words: Any) -> str:
    """A command line, absolute paths in it by their names alone."""
    if not isinstance(words, list) or not words:
        return ""
    program, *rest = map(str, words)
    # What Python says of -m, which is no program that could be called.
    module = Path(program).parts[-2:] == ("zotune", "__main__.py")
    return shlex.join([*(("python", "-m", "zotune") if module else [_nameless(program)]), *map(_nameless, rest)])


def _nameless(word: str) -> str:
    """A word of a command line; of one that is an absolute path, or sets something to one, without its folders."""
    for start in (0, word.find("=") + 1):
        # Such as output="/runs/first", quoted as in the file.
        path = Path(word[start:].strip(" \"'"))
        if path.is_absolute():
            return word[:start] + path.name
    return word


def _cell(value: str) -> str:
    """A text as a cell of a table, which is one line and ends at the next bar."""
    return " ".join(value.splitlines()).replace("|", "\\|")


def _license(folder: Path) -> str | None:
    """What the base model's own card says, if it is there."""
    try:
        found = (metadata_load(folder / "README.md") or {}).get("license")
    except Exception:  # A card that cannot be read says nothing; what it raises depends on the YAML library.
        return None
    return found if isinstance(found, str) else None
