"""What a run has learnt, served: by the run's own engine, and by `vllm serve` from what was exported."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm")

from tiny_runs import Recorder, configure
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import zotune
from zotune import demo
from zotune.config import Config
from zotune.export import export_run
from zotune.session import Session

SEEN = 12
"""Likeliest tokens whose log-probabilities are compared."""

CLOSE = 5e-3
"""Largest difference of log-probabilities that other orders of float32 sums may make; training makes larger ones."""


@dataclass(frozen=True)
class Trained:
    """A run that is over, and what was exported of it."""

    run: Path
    base: Path
    merged: Path
    adapter: Path
    rank: int
    prompts: list[list[int]]


@dataclass(frozen=True)
class Server:
    """A server of OpenAI's API on loopback."""

    port: int

    def ask(self, path: str, **body: Any) -> Any:
        """What it answers."""
        data = json.dumps(body).encode() if body else None
        asked = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def next_tokens(self, model: str, prompt: list[int]) -> dict[int, float]:
        """Log-probabilities of the likeliest next tokens."""
        options = {"max_tokens": 1, "temperature": 0, "logprobs": SEEN, "return_tokens_as_token_ids": True}
        answer = self.ask("/v1/completions", model=model, prompt=prompt, **options)
        (likeliest,) = answer["choices"][0]["logprobs"]["top_logprobs"]
        return {int(name.removeprefix("token_id:")): value for name, value in likeliest.items()}


@contextmanager
def serving(model: Path, log: Path, *options: str) -> Iterator[Server]:
    """What `vllm serve` starts, until the end of the block: the command itself does not know vLLM's CPU build."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        "base",
        "--enforce-eager",
        "--max-logprobs",
        str(SEEN + 1),
    ]
    # Without it, vLLM serves a float32 checkpoint in 16 bits.
    command += ["--dtype", "float32", "--max-model-len", "64", "--kv-cache-memory-bytes", str(128 << 20), *options]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    server = Server(port)
    try:
        _wait(server, process, log)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 180
    while time.monotonic() < end and process.poll() is None:
        try:
            server.ask("/health")
            return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"no server: {log.read_text()[-3000:]}")


def expected(folder: Path, prompt: list[int]) -> Tensor:
    """Log-probabilities of the next token as transformers computes them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: Tensor = model(torch.tensor([prompt])).logits[0, -1].float().log_softmax(-1)
    return found


def apart(found: dict[int, float], wanted: Tensor) -> float:
    """Largest difference of what was found."""
    assert len(found) >= SEEN
    return max(abs(value - float(wanted[token])) for token, value in found.items())


def export(run: Path, base: Path, folder: Path, texts: tuple[str, ...]) -> Trained:
    """Export a run both ways."""
    export_run(run, folder / "merged")
    exported = export_run(run, folder / "adapter", "peft")
    assert exported.rank is not None
    tokenizer = AutoTokenizer.from_pretrained(base)
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    return Trained(run, base, folder / "merged", folder / "adapter", exported.rank, prompts)


@pytest.fixture(scope="module")
def config(
    tiny_model_folder: Path, sentiment_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Config:
    """A run of the tiny model with heads as wide as vLLM's attention wants them, ending within a window."""
    folder = tmp_path_factory.mktemp("served")
    wide = AutoConfig.from_pretrained(tiny_model_folder)
    wide.head_dim = 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(wide).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder / "base")
    return configure(
        folder,
        folder / "base",
        sentiment_files,
        method={"scope": "linear", "lr": 0.02, "eps": 1e-2, "interval": 3},
        train={"steps": 7},
    )


@pytest.fixture(scope="module")
def trained(config: Config) -> Trained:
    """The run, after its end."""
    zotune.start(config, Recorder())
    run = Path(config.output)
    texts = ("the film was", "a plot is very", "It was the cast and")
    return export(run, Path(config.model.path), run.parent, texts)


def plain_answers(llm: Any, prompts: list[list[int]]) -> list[dict[int, float]]:
    """Log-probabilities of the likeliest next tokens, through the engine's ordinary requests."""
    from vllm import SamplingParams

    options = SamplingParams(temperature=0.0, max_tokens=1, logprobs=SEEN, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": each} for each in prompts], options, use_tqdm=False)
    return [{token: each.logprob for token, each in answer.outputs[0].logprobs[0].items()} for answer in answers]


def check(answers: list[dict[int, float]], trained: Trained, folder: Path) -> None:
    """They are those of a folder's model; training has moved it further than what is let pass."""
    for prompt, answer in zip(trained.prompts, answers, strict=True):
        tuned, base = expected(trained.merged, prompt), expected(trained.base, prompt)
        assert (tuned - base).abs().max() > 5 * CLOSE
        assert apart(answer, tuned if folder == trained.merged else base) < CLOSE


def test_after_its_last_step_an_engine_serves_the_tuned_model(trained: Trained, config: Config) -> None:
    with closing(Session.build(config.having("runtime", type="vllm", threads=None))) as session:
        objective = session.data.objective
        for step in range(config.train.steps):
            proposal, (examples, _) = session.optimizer.ask(step), session.batch(step)
            rows = [example.row for example in examples]
            scores = session.runtime.score(proposal.probes, rows, normalised=objective.normalised)
            losses = objective.losses(scores, examples).mean(axis=1).tolist()
            session.runtime.apply(session.optimizer.tell(proposal, losses))
        check(plain_answers(session.runtime.llm, trained.prompts), trained, trained.merged)  # type: ignore[attr-defined]


def check_adapter(trained: Trained, log: Path) -> None:
    """An adapter beside its base model on one server."""
    options = ["--enable-lora", "--max-lora-rank", str(trained.rank), "--lora-modules", f"tuned={trained.adapter}"]
    with serving(trained.base, log, *options) as server:
        for name, folder in (("base", trained.base), ("tuned", trained.merged)):
            check([server.next_tokens(name, prompt) for prompt in trained.prompts], trained, folder)


def check_merged(trained: Trained, log: Path) -> None:
    """A merged folder on a server of its own."""
    with serving(trained.merged, log) as server:
        check([server.next_tokens("base", prompt) for prompt in trained.prompts], trained, trained.merged)


def test_an_adapter_under_vllm_serve(trained: Trained, tmp_path: Path) -> None:
    check_adapter(trained, tmp_path / "log")


@pytest.mark.slow
def test_a_merged_folder_under_vllm_serve(trained: Trained, tmp_path: Path) -> None:
    check_merged(trained, tmp_path / "log")


@pytest.mark.slow
def test_a_real_model_under_vllm_serve(tmp_path: Path, sentiment_files: tuple[Path, Path]) -> None:
    base = Path(demo.fetch().model)
    config = configure(
        tmp_path,
        base,
        sentiment_files,
        method={"scope": "linear", "lr": 1e-4, "eps": 1e-3, "interval": 4},
        train={"steps": 10},
        runtime={"type": "vllm", "threads": None},
    )
    zotune.start(config, Recorder())
    made = export(Path(config.output), base, tmp_path, ("The film was", "It is a plot that", "The cast is very"))
    check_adapter(made, tmp_path / "first")
    check_merged(made, tmp_path / "second")
