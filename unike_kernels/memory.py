"""ExternalMemory: the items of one site, searched by cosine; rows in fixed storage so that graphs follow a swap."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from .choosing import ChoosesBackend
from .indexing import KeptIndex
from .keeping import to_keep
from .reference import compute_dtype
from .room import lack, refuse
from .triton_kernels import MAX_K
from .unchanged import Table


class Items(NamedTuple):
    """A memory's items from `start` on, those before being as they were; what `ExternalMemory.load` takes."""

    sem: Tensor  # [n - start, d]
    keys: Tensor  # [n - start, kv_heads, head_dim], or [n - start, d]
    values: Tensor
    shared: int  # how many of all n belong to no single edit
    start: int
    made_of: list[Table]  # (h_sem, h_pos) of the memory, and of the edits' own


class ExternalMemory(ChoosesBackend):
    """Items (h_sem, h_pos) of one self-attention site, with what the shift needs of each precomputed.

    Storage holds `capacity` items; the first `shared` are the memory, the next `own` belong to one edit each.
    sem [capacity, d]: h_sem as stored; sem_norm [capacity]: its norm, in fp32 at least; keys, values: what the
    attention over the items reads, [capacity, kv_heads, head_dim] (`projected`) or twice h_pos [capacity, d] (`raw`).
    kept: the int8 copy that a large memory is searched through, see `indexing.KeptIndex`.
    Tensors are buffers that move with the module and are never part of a state_dict.
    """

    sem: Tensor
    sem_norm: Tensor
    keys: Tensor
    values: Tensor
    spans: Tensor

    def __init__(
        self,
        sem: Tensor,
        keys: Tensor,
        values: Tensor,
        shared: int,
        capacity: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.kept = KeptIndex()
        capacity = len(sem) if capacity is None else capacity
        for name, rows in (("sem", sem), ("keys", keys), ("values", values)):
            self.register_buffer(name, rows.new_zeros((capacity, *rows.shape[1:])), persistent=False)
        norm = torch.zeros(capacity, dtype=compute_dtype(sem), device=sem.device)
        self.register_buffer("sem_norm", norm, persistent=False)
        # Rows of the memory, and of memory and own items: read on the device, so that a captured graph follows a swap
        self.register_buffer("spans", torch.zeros(2, 2, dtype=torch.long, device=sem.device), persistent=False)
        self.choose(backend)
        self.load(sem, keys, values, shared)

    @property
    def counts(self) -> Tensor:
        """[2] int64: how many items are of no single edit, and how many there are."""
        return self.spans[:, 1]

    @property
    def capacity(self) -> int:
        """Items that fit into the storage."""
        return self.sem.shape[0]

    def lacks(self, n: int) -> list[str]:
        """Whether n items do not fit into the storage, in words."""
        return lack(self.capacity, n, "items (max_items at patch time)")

    def load(self, sem: Tensor, keys: Tensor, values: Tensor, shared: int, start: int = 0) -> None:
        """Replaces the items from `start` on, in place; the first `shared` of all are of no single edit.

        sem [n - start, d], keys and values [n - start, ...].
        """
        n = start + len(sem)
        refuse(self.lacks(n))
        with torch.no_grad():
            for rows, new in ((self.sem, sem), (self.keys, keys), (self.values, values)):
                rows[start:n].copy_(new)
                rows[n:].zero_()
            self.spans.copy_(torch.tensor([[0, shared], [0, n]]))
            self._measure(start)
            self.kept.follow()

    def _measure(self, start: int = 0) -> None:
        """The norm of the rows as stored, so that rounding to the working dtype does not tilt a cosine."""
        rows = self.sem[start:].to(self.sem_norm.dtype)
        self.sem_norm[start:].copy_(torch.linalg.vector_norm(rows, dim=-1))

    @to_keep()
    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> "ExternalMemory":
        before = self.sem
        super()._apply(fn, *args, **kwargs)  # .to(), .half(), .cuda()
        if self.sem is not before:
            self.kept = KeptIndex()  # the old one would keep the old rows
        self.sem_norm = self.sem_norm.to(compute_dtype(self.sem))
        self._measure()
        return self

    def search(self, q: Tensor, k: int, selected: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scores [T, k] fp32, indices [T, k] int64) of the items nearest to q [T, d] by cosine, -inf and -1 padded.

        Over all items; or, with `selected` [T, m] (the edits routed to each query, -1 padded), over the memory and
        those edits' own items only, so that what a routed case retrieves does not depend on the other edits.
        """
        ranges = self.spans[1 if selected is None else 0].expand(len(q), 2)
        index = self.kept.of(q, self.sem, self.sem_norm, k, self.asked)
        if index is not None:  # few queries, many items; on the CPU, or where CUDA kernels were asked for
            scores, indices = index.search(q, k, ranges)
        else:
            backend = self.kernels if k <= MAX_K else self.asked  # for more, "auto" looks for one that has room
            scores, indices = ops.cosine_topk(q, self.sem, k, key_norm=self.sem_norm, ranges=ranges, backend=backend)
        if selected is None or self.capacity == 0:
            return scores, indices
        own = torch.where(selected >= 0, selected + self.counts[0], -1)  # [T, m]
        if own.shape[1] > 1:  # an edit that is named twice is one
            own = own.masked_fill((own[:, :, None] == own[:, None]).tril(-1).any(2), -1)
        own_scores = self._cosine(q, own.clamp(min=0, max=self.capacity - 1)).to(scores.dtype)
        # Not finite: a NaN query retrieves nothing, a NaN item is never retrieved.
        missing = (own < 0) | (own >= self.counts[1]) | ~own_scores.isfinite()
        scores = torch.cat([scores, own_scores.masked_fill(missing, -torch.inf)], dim=1)
        indices = torch.cat([indices, own.masked_fill(missing, -1)], dim=1)
        # Stable, and the memory comes first: among equal scores the lowest index wins.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores[:, :k], indices.gather(1, order)[:, :k]

    def _cosine(self, q: Tensor, items: Tensor) -> Tensor:
        """cos(q, sem[i]) of q [T, d] and items [T, m] -> [T, m]; 0 for zero vectors."""
        dtype = compute_dtype(q, self.sem)
        q, rows = q.to(dtype), self.sem[items].to(dtype)  # [T, d], [T, m, d]
        norm = torch.linalg.vector_norm(q, dim=-1, keepdim=True) * self.sem_norm[items]
        # No matrix product: autocast would round it to half precision.
        return (q[:, None] * rows).sum(-1) / norm.masked_fill(norm == 0, torch.inf)

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, d={self.sem.shape[1]}"
