"""Reading a pack back, independently of how it was made."""

from zotune.runtimes.packing import Pack


def contexts(pack: Pack) -> list[list[int]]:
    """Per token of a block, the tokens it attends to, in the order of their row, as the groups say; itself last."""
    found: list[list[int]] = []
    for group in pack.groups:
        assert group.start == len(found), "groups must tile the block"
        length, keys = group.queries.shape[1], group.keys.tolist()
        before = group.keys.shape[1] - length
        for place in group.real.tolist():
            row, at = divmod(place, length)
            found.append(keys[row][: before + at + 1])
        assert group.stop == len(found), "groups must tile the block"
    return found
