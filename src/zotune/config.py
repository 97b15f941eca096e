"""The configuration of a run: one TOML file, checked before anything is loaded."""

from __future__ import annotations

import json
import numbers
import os
import tomllib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from zotune.errors import ConfigError, listed
from zotune.estimators import EstimatorName
from zotune.layout import Scope
from zotune.paths import StrPath, expand
from zotune.problems import explain
from zotune.schedules import Schedule

AUTO: Final = "auto"

MADE = "zotune.load_config(path) reads one, zotune.parse_config({...}) makes one"
"""How to come by a `Config`."""

PathText = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
"""A path or an id: text, which path objects become."""

Texts = Annotated[list[str], BeforeValidator(lambda value: list(value) if isinstance(value, tuple) else value)]
"""A list of texts, or from Python a tuple."""


class Section(BaseModel):
    """A table of the file; unknown keys are refused, and values of another type: ``lr = true`` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        """From Python, any mapping is a table, and NumPy's integers are whole numbers, too."""
        return {name: _whole(value) for name, value in given.items()} if isinstance(given, Mapping) else given


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value


class ModelConfig(Section):
    """Which model to tune."""

    path: PathText = Field(min_length=1, description="Hugging Face hub id or folder of a causal language model")
    revision: str | None = Field(default=None, description="hub revision")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: bfloat16 where the device multiplies it natively, else float32"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = Field(default=False, description="run modelling code that comes with the checkpoint")


class DataConfig(Section):
    """What to learn: a built-in task, or a user's own rows with a template."""

    task: str | None = Field(default=None, description="built-in task; the other keys below default to its own")
    train: PathText | None = Field(
        default=None, description="JSONL, CSV or Parquet file, or a Hugging Face data set id"
    )
    validation: PathText | None = Field(default=None, description="the same; default: split off the training rows")
    prompt: str | None = Field(default=None, description="template, the row's fields in braces: '{text} It was'")
    candidates: Texts | None = Field(default=None, description="one continuation per class, in label order")
    label: str | None = Field(default=None, description="field with the class: its number or candidate")
    loss: Literal["candidates", "gold"] | None = Field(
        default=None,
        description="with candidates: cross-entropy over them (default), or the right one's negative log-likelihood",
    )
    completion: str | None = Field(default=None, description="template of the text to learn, without candidates")
    answers: str | None = Field(default=None, description="with completion: field with the right answer or answers")
    messages: str | None = Field(default=None, description="field with a conversation; its assistant turns are learnt")
    chat: bool = Field(default=False, description="put prompt and continuation through the tokenizer's chat template")
    fields: dict[str, str] | None = Field(
        default=None, description="other names for a row's fields: {sentence = 'review_body'}"
    )
    train_size: int | None = Field(default=None, ge=1, description="rows to train on; default: all")
    validation_size: int | None = Field(default=None, ge=1, description="rows to evaluate on; default: at most 500")
    split_seed: int = Field(default=0, ge=0, description="seed of the row permutation before rows are taken")
    max_length: int | None = Field(default=None, ge=2, description="tokens per row; default: the model's context")
    bos: Literal["tokenizer", "none"] | int = Field(
        default="tokenizer", description="first token: what the tokenizer prepends, none, or a token id"
    )


class MethodConfig(Section):
    """How to learn; what is left out comes from the preset."""

    preset: str = Field(default="lozo", description="a method by its name; `zotune presets` lists them")
    scope: Scope | None = Field(
        default=None,
        description="linear weights only, every parameter, or the last two fifths of the layers in turn",
    )
    lr: Annotated[float, Field(ge=0, le=1e38)] | Literal["auto"] = Field(
        default=AUTO,
        description="learning rate, LOZO's official code's convention; auto: chosen by probing when the run begins",
    )
    eps: float | None = Field(default=None, gt=0, le=1e38, description="probe distance")
    rank: int | None = Field(default=None, ge=1, le=4096, description="rank of a direction")
    interval: int | None = Field(default=None, ge=1, description="steps that share V (nu)")
    lora_rank: int | None = Field(default=None, ge=1, le=4096, description="rank of the LoRA matrices of mezo-lora")
    lora_alpha: int | None = Field(default=None, ge=1, le=2**16, description="their output counts alpha / rank times")
    directions: int | None = Field(default=None, ge=1, le=4096, description="directions per step")
    estimator: EstimatorName | None = Field(default=None, description="from the losses of probes to coefficients")
    calibrated: bool | None = Field(
        default=None, description="take what the model prefers to answer off every batch's loss"
    )
    momentum: float | None = Field(default=None, ge=0, lt=1, description="beta, of low-rank directions alone")
    weight_decay: float | None = Field(
        default=None, ge=0, le=1e6, description="times lr, the share that weights lose a step; not biases and norms"
    )
    schedule: Schedule | None = Field(default=None, description="of the learning rate, after the warm-up")
    warmup_steps: int | None = Field(default=None, ge=0, description="steps of a linear warm-up")


class TrainConfig(Section):
    """How long, how much at a time, and what to keep."""

    steps: int = Field(default=1000, ge=1, description="length of the run")
    batch_size: int = Field(default=16, ge=1, le=2**16, description="examples per step")
    seed: int = Field(default=0, ge=0, lt=2**63, description="seed of directions and of the batch order")
    eval_every: int = Field(
        default=100, ge=1, description="steps between evaluations; also before the first and after the last"
    )
    eval_minutes: float | None = Field(
        default=None, gt=0, le=1e9, description="evaluate also when so many minutes have passed since the last time"
    )
    patience: int | None = Field(
        default=None, ge=1, description="evaluations in a row without a better validation loss that end the run"
    )
    min_delta: float = Field(
        default=0.0, ge=0, le=1e38, description="what the validation loss must fall by to count as better"
    )
    checkpoint_every: int = Field(
        default=500, ge=1, description="steps between checkpoints; also after the best evaluation so far and at the end"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="newest checkpoints to keep, besides that of the lowest validation loss"
    )
    max_skipped: int = Field(default=10, ge=1, description="non-finite steps in a row before the run stops")


class EngineConfig(Section):
    """How vLLM runs, where it does."""

    compile: bool | None = Field(
        default=None, description="vLLM's compiler and CUDA graphs; default: on CUDA, not on a CPU (minutes to start)"
    )
    tensor_parallel: int = Field(default=1, ge=1, le=1024, description="workers that share every layer")
    own_process: bool = Field(default=False, description="run the engine in a process of its own")
    adapters: Literal["none", "lora"] = Field(
        default="none", description="lora: vLLM's adapter slots, for generation under several states in one batch"
    )
    bank_rank: int = Field(
        default=0, ge=0, le=4096, description="rank of the bank that keeps finished windows beside the weights; 0: none"
    )
    memory_fraction: float = Field(default=0.9, gt=0, le=1, description="of a GPU's memory that vLLM may use")


class ReplicasConfig(Section):
    """How many replicas run, on what, and how a step is cut among them."""

    replicas: int = Field(default=2, ge=1, le=4096, description="runtimes in lock-step")
    inner: Literal["torch", "vllm"] = Field(default="torch", description="what each of them is")
    address: str = Field(
        default="auto",
        min_length=1,
        description="auto: a Ray cluster that runs here, else one of its own; local; or host:port",
    )
    cpus: int | None = Field(
        default=None, ge=1, le=512, description="cores of a replica, and its threads; default: runtime.threads, or 1"
    )
    gpus: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="of a replica; default: tensor_parallel where the cluster has GPUs, else 0",
    )
    pin: bool | None = Field(
        default=None, description="keep each replica on cores of its own; default: on a cluster that the run starts"
    )
    split: Literal["auto", "direction", "sign", "rows"] = Field(
        default="auto", description="what a step is cut by; auto: by direction, small ones together"
    )
    unit_tokens: int | None = Field(
        default=None, ge=1, description="most tokens of a piece of a step, about; default: 1024 on CPUs, 8192 on GPUs"
    )
    check_every: int = Field(default=100, ge=1, description="steps between comparisons of the replicas' states")
    patience: float = Field(
        default=600.0,
        gt=0,
        le=1e7,
        description="seconds until a silent replica is taken for dead, or a missing one for lost",
    )


class RuntimeConfig(Section):
    """Where the tensors live."""

    type: Literal["torch", "vllm", "ray"] = Field(
        default="torch", description="in this process, stock vLLM, or replicas of either on a Ray cluster"
    )
    vllm: EngineConfig = EngineConfig()
    ray: ReplicasConfig = ReplicasConfig()
    fold: Literal["stochastic", "master"] = Field(
        default="stochastic",
        description="keyed stochastic rounding, or a float32 copy of the weights",
    )
    max_tokens: int = Field(default=16384, ge=16, description="tokens per forward; larger batches are cut")
    threads: int | None = Field(default=None, ge=1, le=512, description="CPU threads; default: PyTorch's")

    @property
    def inner(self) -> str:
        """What holds the model: the runtime itself, or each of the replicas."""
        return self.ray.inner if self.type == "ray" else self.type

    @property
    def bank(self) -> int:
        """Columns of the update bank that states of this runtime have beside the weights; 0 without one."""
        return self.vllm.bank_rank if self.inner == "vllm" else 0


class TrackConfig(Section):
    """Who else is told how a run goes."""

    tensorboard: bool = Field(default=True, description="event files in RUN/tensorboard")
    wandb: str | None = Field(default=None, min_length=1, description="Weights & Biases project; needs package wandb")


class Config(Section):
    """A whole run."""

    output: PathText = Field(min_length=1, description="run directory; must not exist")
    model: ModelConfig
    data: DataConfig
    method: MethodConfig = MethodConfig()
    train: TrainConfig = TrainConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    track: TrackConfig = TrackConfig()

    def having(self, table: str, **values: Any) -> Config:
        """The same with other values in a table, which are not checked."""
        return self.model_copy(update={table: getattr(self, table).model_copy(update=values)})


def tables(kind: type[BaseModel] = Config, above: str = "") -> dict[str, type[BaseModel]]:
    """The file's tables by dotted name, each before those in it."""
    found = {}
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[above + name] = field.annotation
            found |= tables(field.annotation, f"{above}{name}.")
    return found


def load(path: StrPath, overrides: Sequence[str] = ()) -> Config:
    """Read and check a configuration file.

    Args:
        path: The TOML file.
        overrides: Assignments such as ``train.steps=10`` that replace what the file says, with values in TOML's
            notation; a value that is not TOML is taken as text.

    Raises:
        ConfigError: The file is missing, is not TOML, or has an unknown key or a value that is not allowed.
    """
    path = expand(path)
    table = read(path)
    for assignment in listed(overrides, "overrides"):
        override(table, assignment)
    return parse(table, source=str(path))


def read(path: StrPath) -> dict[str, Any]:
    """The tables of a TOML file, unchecked.

    Raises:
        ConfigError: The file is missing or is not TOML.
    """
    path = expand(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def parse(table: dict[str, Any], source: str = "configuration") -> Config:
    """Check a configuration given as nested dictionaries, whose paths may be path objects; same errors as `load`."""
    try:
        return Config.model_validate(table)
    except ValidationError as error:
        lines = dict.fromkeys(explain(problem, Config, tables()) for problem in error.errors())
        raise ConfigError("\n".join(f"{source}: {line}" for line in lines)) from None


def override(table: dict[str, Any], assignment: str) -> None:
    """Carry out one ``section.key=value`` in place; see `load`."""
    name, separator, text = assignment.partition("=")
    if not separator or not name.rpartition(".")[2].strip():
        raise ConfigError(f"cannot read the setting {assignment!r}: write it as section.key=value, e.g. train.steps=10")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    assign(table, name.strip(), value)


def assign(table: dict[str, Any], name: str, value: Any) -> None:
    """Set one key, given as ``section.key``, in nested tables.

    Raises:
        ConfigError: What ought to be a table holds something else.
    """
    *sections, key = name.split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"cannot set {name!r}: {section!r} is not a table")
    table[key] = value


def dump(config: Config) -> str:
    """The configuration as TOML text that `load` reads back to an equal configuration."""
    tables = config.model_dump(exclude_none=True)
    lines = [f"output = {_toml(tables.pop('output'))}"]
    for section, values in tables.items():
        lines += ["", f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    # JSON's strings, lists of strings, numbers and booleans are also TOML's.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
