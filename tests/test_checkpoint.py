from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zotune import checkpoint
from zotune.errors import JournalError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def state(step: int) -> dict[str, Tensor]:
    """Tensors of every dtype that a runtime keeps, other ones for each step."""
    with torch.random.fork_rng():
        torch.manual_seed(step)
        return {f"weight/{dtype}": torch.randn(3, 5).to(dtype) for dtype in DTYPES} | {"empty": torch.zeros(0)}


def save(folder: Path, *steps: int, keep: int = 9) -> None:
    for step in steps:
        checkpoint.save(folder, state(step), step=step, window=step // 3, keep=keep)


def assert_newest_is(folder: Path, step: int) -> None:
    found = checkpoint.newest(folder)
    assert found is not None
    assert found[:2] == (step, step // 3)
    assert found[2].keys() == state(step).keys()
    for name, tensor in state(step).items():
        assert found[2][name].dtype == tensor.dtype
        assert torch.equal(found[2][name], tensor)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_the_newest_comes_back_bit_for_bit(folder: Path) -> None:
    save(folder, 9, 10, 100)
    assert_newest_is(folder, 100)


def test_before_the_first_there_is_none(folder: Path) -> None:
    assert checkpoint.newest(folder) is None
    folder.mkdir()
    assert checkpoint.newest(folder) is None


@pytest.mark.parametrize("keep", [1, 2])
def test_only_the_newest_are_kept(folder: Path, keep: int) -> None:
    save(folder, 5, 9, 10, 11, keep=keep)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000011"][-keep:]


def test_saving_a_step_again_replaces_it(folder: Path) -> None:
    save(folder, 4)
    checkpoint.save(folder, state(8), step=4, window=1, keep=2)
    found = checkpoint.newest(folder)
    assert found is not None
    assert torch.equal(found[2]["weight/torch.float32"], state(8)["weight/torch.float32"])


@pytest.mark.parametrize("file", ["state.safetensors", "checkpoint.json"])
def test_a_truncated_one_is_passed_over(folder: Path, file: str) -> None:
    save(folder, 3, 6)
    path = folder / "step-00000006" / file
    whole = path.read_bytes()
    for size in {0, 1, len(whole) // 2, len(whole) - 3}:
        path.write_bytes(whole[:size])
        assert_newest_is(folder, 3)
    path.unlink()
    assert_newest_is(folder, 3)


def test_a_flipped_bit_of_the_tensors_is_found(folder: Path) -> None:
    save(folder, 3, 6)
    path = folder / "step-00000006" / "state.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        assert_newest_is(folder, 3)


def test_a_flipped_bit_of_the_description_never_changes_where_a_run_goes_on(folder: Path) -> None:
    save(folder, 3, 6)
    path = folder / "step-00000006" / "checkpoint.json"
    whole = path.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 4):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            # Damage to a line break or a blank leaves the description as it was.
            assert_newest_is(folder, 6 if _says(bytes(damaged)) == json.loads(whole) else 3)


def _says(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


@pytest.mark.parametrize("content", ["[]", "3", "null", '{"step": 6}', '{"step": [], "window": {}, "sha256": 0}'])
def test_a_description_that_says_something_else_is_passed_over(folder: Path, content: str) -> None:
    save(folder, 3, 6)
    (folder / "step-00000006" / "checkpoint.json").write_text(content)
    assert_newest_is(folder, 3)


def test_if_all_are_damaged_the_error_says_what_to_do(folder: Path) -> None:
    save(folder, 3, 6)
    for path in folder.glob("*/state.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(JournalError, match=r"all 2 checkpoints in .* are damaged; remove the folder"):
        checkpoint.newest(folder)


def test_what_an_interrupted_save_leaves_is_ignored_and_replaced(folder: Path) -> None:
    save(folder, 3, 6)
    half = folder / ".step-00000009.part"
    shutil.copytree(folder / "step-00000006", half)
    (half / "leftover").touch()
    assert_newest_is(folder, 6)
    save(folder, 9)
    assert_newest_is(folder, 9)
    assert not half.exists()
    assert not (folder / "step-00000009" / "leftover").exists()


def test_a_save_that_fails_leaves_the_last_one(folder: Path) -> None:
    save(folder, 3)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(JournalError, match="cannot write the checkpoint"):
            save(folder, 6, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_newest_is(folder, 3)
