"""Reading a pack back, independently of how it was made."""

from zotune.runtimes.packing import BranchGroup, Pack


def contexts(pack: Pack) -> list[list[int]]:
    """Per token of a block, the tokens it attends to, in the order of their row, as the groups say; itself last."""
    found: list[list[int]] = []
    for group in pack.groups:
        assert group.start == len(found), "groups must tile the block"
        for number in range(group.count):
            first = group.start + number * group.length
            before = group.prompts[number].tolist() if isinstance(group, BranchGroup) else []
            found += [[*before, *range(first, first + length)] for length in range(1, group.length + 1)]
    return found
