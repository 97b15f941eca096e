"""The public names of zotune."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import zotune


def test_importing_zotune_loads_nothing_heavy() -> None:
    script = """
import sys, zotune
dir(zotune), zotune.ZotuneError, zotune.parse_config
print(*sorted({"torch", "transformers", "numpy", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", zotune.__all__)
def test_every_public_name_is_what_it_says_and_documented(name: str) -> None:
    # Once a submodule is imported it hides a public name that is spelt the same.
    for module in pkgutil.iter_modules(zotune.__path__):
        if module.name != "testing":
            importlib.import_module(f"zotune.{module.name}")
    found = getattr(zotune, name)
    assert not inspect.ismodule(found)
    assert name == "PRESETS" or (inspect.getdoc(found) and found.__module__.startswith("zotune."))


def test_the_names_are_listed_and_others_are_refused() -> None:
    assert dir(zotune) == sorted(zotune.__all__)
    assert len(set(zotune.__all__)) == len(zotune.__all__)
    with pytest.raises(AttributeError, match="module 'zotune' has no attribute 'no_such_name'"):
        _ = zotune.no_such_name


def test_one_except_clause_catches_every_mistake() -> None:
    from zotune import errors

    raised = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert len(raised) > 5
    assert all(issubclass(kind, zotune.ZotuneError) for kind in raised)


EXAMPLE = Path(__file__).parents[1] / "examples" / "sentiment.toml"

MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "start a mapping": (lambda: zotune.start({"output": "run"}), r"got a dict where a Config is.*zotune.parse_config"),
    "start a path": (lambda: zotune.start("config.toml"), r"got a str where a Config is.*zotune.load_config"),
    "dry-run a path": (lambda: zotune.dry_run("config.toml"), r"got a str where a Config is.*zotune.load_config"),
    "one override": (lambda: zotune.load_config(EXAMPLE, "train.steps=9"), r"must be a list, not 'train.steps=9'"),
    "one of several runs": (lambda: zotune.overlay("run", "out.png"), r"runs must be a list, not 'run'"),
    "sweep a path": (lambda: zotune.run_sweep("sweep.toml", zotune.SilentReporter), r"str where a Plan .*read_sweep"),
    "sum a path up": (lambda: zotune.summarise_sweep("sweep.toml", {}), r"got a str where a Plan .*zotune.read_sweep"),
    "load a path": (lambda: zotune.load_model("model"), r"got a str where a ModelConfig is needed"),
    "load a mapping": (lambda: zotune.load_data({}, None, 8), r"got a dict where a DataConfig is needed"),
    "resume a number": (lambda: zotune.resume(5), r"cannot use the path '5': .* give another one"),
}


@pytest.mark.parametrize(("act", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_a_script_gives_wrong_is_told(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(zotune.ZotuneError, match=message):
        act()
