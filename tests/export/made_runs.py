"""Run directories of tiny models whose journals hold made-up coefficients: nothing has to be trained to export them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from zotune.config import parse
from zotune.journal import Entry, Header, Journal
from zotune.optimizer import Optimizer
from zotune.presets import PRESETS
from zotune.protocol import CLEAN
from zotune.rows import Candidate, Row
from zotune.run import RunDirectory
from zotune.runtimes.embedded import EmbeddedRuntime
from zotune.testing import tiny

STEPS = 7
_PROMPT = tuple(range(4, 24))
_ROW = Row(_PROMPT, tuple(Candidate((token,), (0,)) for token in range(4, tiny.VOCABULARY)))


@dataclass(frozen=True)
class MadeRun:
    """A run, its base model and a runtime that has taken its steps one by one."""

    path: Path
    base: Path
    live: EmbeddedRuntime

    def scores(self) -> Tensor:
        """Log-probabilities of the next token, as the live model gives them."""
        return torch.from_numpy(self.live.score([CLEAN], [_ROW])[0])


def make(
    folder: Path,
    family: str,
    preset: str,
    *,
    dtype: str = "float32",
    fold: str = "stochastic",
    steps: int = STEPS,
    **method: Any,
) -> MadeRun:
    """A run of ``steps`` steps, the third of them skipped; ``method`` replaces values of the preset."""
    base = folder / "base"
    tiny.model(family, getattr(torch, dtype)).save_pretrained(base)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(base)
    config = parse(
        {
            "output": str(folder / "run"),
            "model": {"path": str(base), "dtype": dtype, "device": "cpu"},
            "data": {"train": str(folder / "rows.jsonl"), "completion": "{text}"},
            "method": {"preset": preset},
            "runtime": {"fold": fold},
        }
    )
    chosen = replace(PRESETS[preset].method, **method)
    live = EmbeddedRuntime(load(base), chosen, seed=3, fold=fold)
    header = Header(3, asdict(chosen), STEPS, 4, live.fingerprint, live.layout.fingerprint, "0", fold)
    run = RunDirectory.create(config, header)
    journal = Journal.open(run.journal)
    journal.claim()
    optimizer = Optimizer(chosen, STEPS)
    for step in range(steps):
        coefficients = () if step == 2 else tuple(1.0 + step + index for index in range(chosen.directions))
        update = optimizer.update(step, coefficients)
        journal.append(Entry(step, (0.5,), coefficients, update.lr, 0))
        live.apply(update)
    journal.close()
    return MadeRun(run.path, base, live)


def load(folder: Path) -> Any:
    """A model in the dtype of its checkpoint."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@torch.no_grad()
def scores(model: Any) -> Tensor:
    """What `MadeRun.scores` gives, of a model by its own forward."""
    return model(torch.tensor([_PROMPT])).logits[0, -1].float().log_softmax(-1)[4 : tiny.VOCABULARY]
