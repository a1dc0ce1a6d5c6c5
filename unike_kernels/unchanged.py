"""Whether tensors are still what they were, so that what was made of them need not be made again."""

import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Table = Sequence[Tensor]  # all of as many rows

CHUNK = 800  # rows compared at once: 8 MB of 2,560 features in fp32; of tables that differ early little is read


class Seen:
    """Tensors, as they were when something was made of them.

    What counts is torch's own count of changes in place, which `.data` and numpy pass by. Tensors of inference mode,
    of which nobody counts the changes, are never the same as before; nor are those of a copy, which count anew. They
    are not kept alive: what `.to()` replaced on a GPU is to be free.
    """

    def __init__(self) -> None:
        self._as_they_were: list[tuple[Callable[[], Tensor | None], int]] | None = None

    def __getstate__(self) -> dict[str, object]:
        return vars(Seen())

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Remembers them as they are now."""
        there = list(tensors)
        counted = not any(t.is_inference() for t in there)
        self._as_they_were = [(weakref.ref(t), t._version) for t in there] if counted else None

    def same(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are the very tensors noted, not changed since."""
        before, there = self._as_they_were, list(tensors)
        if before is None or len(before) != len(there):
            return False
        return all(t._version == count and t is old() for t, (old, count) in zip(there, before, strict=True))


class Written:
    """What the rows of a storage were written from, so that a swap writes those alone that differ.

    Writing that fails half way has changed the storage, of which nothing is known then.
    """

    def __init__(self) -> None:
        self._storage, self._source = Seen(), Seen()
        self._tables: list[Table] = []

    def __getstate__(self) -> dict[str, object]:
        return vars(Written())

    def note(self, storage: Iterable[Tensor], tables: Sequence[Table]) -> None:
        """After writing. storage: what was written, and all else that it hangs on; tables: what from."""
        self._tables = [tuple(table) for table in tables]
        self._storage.note(storage)
        self._source.note(t for table in tables for t in table)

    def alike(self, storage: Iterable[Tensor], tables: Sequence[Table]) -> list[int]:
        """How many first rows of each table are those that the storage was written from; none if it changed since."""
        source = (t for table in self._tables for t in table)
        known = self._storage.same(storage) and self._source.same(source) and len(tables) == len(self._tables)
        if not known:
            return [0] * len(tables)
        pairs = zip(self._tables, tables, strict=True)
        return [min(map(_first_alike, before, now)) for before, now in pairs]

    def all_alike(self, storage: Iterable[Tensor], tables: Sequence[Table]) -> bool:
        """Whether the storage was written from just these tables' rows."""
        counts = self.alike(storage, tables)
        return len(tables) == len(self._tables) and all(map(_whole, self._tables, tables, counts))

    def in_a_row(self, storage: Iterable[Tensor], tables: Sequence[Table]) -> int:
        """How many first rows of a storage that holds the tables' rows one after the other need not be written."""
        total = 0
        for before, now, count in zip(self._tables, tables, self.alike(storage, tables), strict=False):
            total += count
            if not _whole(before, now, count):
                break
        return total


def _whole(before: Table, now: Table, count: int) -> bool:
    return count == len(before[0]) == len(now[0])


def _first_alike(before: Tensor, now: Tensor) -> int:
    """How many first rows of two tables are equal, to a chunk."""
    if before.dtype != now.dtype or before.device != now.device or before.shape[1:] != now.shape[1:]:
        return 0
    n, at = min(len(before), len(now)), 0
    for one, other in zip(before[:n].split(CHUNK), now[:n].split(CHUNK), strict=True):
        if not torch.equal(one, other):
            break
        at += len(one)
    return at
