from __future__ import annotations

import json
import os
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
    save(folder, 3)
    checkpoint.save(folder, state(6), step=6, window=2, keep=9, journal="0123abcd")
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


def test_each_that_is_damaged_is_named(folder: Path) -> None:
    save(folder, 3, 6)
    notices: list[str] = []
    for step in (6, 3):
        (folder / f"step-0000000{step}" / "state.safetensors").write_bytes(b"")
        notices.clear()
        found = checkpoint.newest(folder, notice=notices.append)
        assert (found is None) == (step == 3)
    assert [notice.split(" is damaged")[0] for notice in notices] == [
        f"the checkpoint {folder}/step-0000000{step}" for step in (6, 3)
    ]


def test_the_newest_that_is_not_too_new(folder: Path) -> None:
    save(folder, 3, 6, 9)
    for upto, expected in ((2, None), (3, 3), (8, 6), (9, 9), (99, 9)):
        found = checkpoint.newest(folder, upto=upto)
        assert (found and found[0]) == expected


def test_only_one_that_verifies_is_sound(folder: Path) -> None:
    save(folder, 3, 6)
    (folder / "step-00000006" / "checkpoint.json").write_text("{}")
    assert [checkpoint.sound(folder, step) for step in (3, 6, 9)] == [True, False, False]


def test_one_of_another_run_is_named_and_passed_over(folder: Path) -> None:
    for step, journal in ((3, None), (6, "own"), (9, "other"), (12, "other")):
        checkpoint.save(folder, state(step), step=step, window=step // 3, keep=9, journal=journal)
    own: dict[int, str] = {3: "own", 6: "own", 9: "own"}
    notices: list[str] = []
    found = checkpoint.newest(folder, upto=9, identity=own.get, notice=notices.append)
    assert found is not None
    assert found[0] == 6
    expected = "is of another run and not used; an older one or the journal makes up for it"
    assert notices == [f"the checkpoint {folder}/step-00000009 {expected}"]
    # Earlier versions wrote no identity, and of a step that the journal does not have yet there is none.
    assert [checkpoint.sound(folder, step, own.get) for step in (3, 6, 9, 12)] == [True, True, False, True]
    assert checkpoint.newest(folder, upto=3, identity=own.get) is not None


def test_one_of_another_bank_is_named_and_passed_over(folder: Path) -> None:
    for step, columns in ((3, 0), (6, 4), (9, 6)):
        bank = {f"bank/v/{site}": torch.zeros(5, columns) for site in ("a", "b") if columns}
        checkpoint.save(folder, state(step) | bank, step=step, window=0, keep=9)
    for columns, expected, others in ((0, 3, ((9, 6), (6, 4))), (4, 6, ((9, 6),)), (6, 9, ())):
        notices: list[str] = []
        found = checkpoint.newest(folder, notice=notices.append, bank=columns)
        assert found is not None
        assert found[0] == expected
        assert [notice.split(", and not used")[0] for notice in notices] == [
            f"the checkpoint {folder}/step-0000000{step} is of runtime.vllm.bank_rank = {other}, not {columns}"
            for step, other in others
        ]


def test_the_best_stays_however_old_it_is(folder: Path) -> None:
    for step, best in ((2, 2), (4, 4), (6, 4), (8, 4), (10, 10), (12, 10), (14, None)):
        checkpoint.save(folder, state(step), step=step, window=0, keep=2, best=best)
        assert (folder / f"step-{best:08d}").exists() if best else True
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000012", "step-00000014"]


def test_a_checkpoint_of_an_earlier_step_than_there_are_is_not_dropped_at_once(folder: Path) -> None:
    save(folder, 20, 30)
    save(folder, 25, keep=1)
    assert checkpoint.sound(folder, 25)


def test_what_a_user_puts_beside_them_is_no_checkpoint_and_stays(folder: Path) -> None:
    save(folder, 3, 6)
    names = ("step-00000006.bak", "step-best", "step-", "step-6", "step-9", "step-0000000006", "step-\u0663")
    for name in names:
        shutil.copytree(folder / "step-00000003", folder / name)
    (folder / "step-00000099").touch()
    assert checkpoint.steps(folder) == [3, 6]
    assert_newest_is(folder, 6)
    save(folder, 12, keep=1)
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "step-00000012", "step-00000099"])


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


def test_all_of_it_is_on_disk_before_it_has_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace, events = os.replace, []

    def named(draft: Path, target: Path) -> None:
        events.append(f"{draft.name} becomes {target.name}")
        replace(draft, target)

    monkeypatch.setattr(os, "replace", named)
    monkeypatch.setattr(checkpoint, "sync", lambda path: events.append(path.name))
    save(folder, 3)
    draft = ".step-00000003.part"
    assert events == ["state.safetensors", "checkpoint.json", draft, f"{draft} becomes step-00000003", "checkpoints"]


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
