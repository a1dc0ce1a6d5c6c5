"""ExternalMemory: the items of one site, searched by cosine; rows in fixed storage so that graphs follow a swap."""

import torch
from torch import Tensor, nn

from . import ops


class ExternalMemory(nn.Module):
    """Items (h_sem, h_pos) of one self-attention site, with what the shift needs of each precomputed.

    Storage holds `capacity` items; the first `shared` are the memory, the next `own` belong to one edit each.
    sem [capacity, d]: h_sem as stored; sem_norm [capacity]: its fp32 norm; keys, values: what the attention over the
    items reads, [capacity, kv_heads, head_dim] (`projected`) or the same [capacity, d] h_pos (`raw`).
    Tensors are buffers that move with the module and are never part of a state_dict.
    """

    sem: Tensor
    sem_norm: Tensor
    keys: Tensor
    values: Tensor
    counts: Tensor

    def __init__(self, sem: Tensor, keys: Tensor, values: Tensor, shared: int, capacity: int | None = None) -> None:
        super().__init__()
        capacity = len(sem) if capacity is None else capacity
        for name, rows in (("sem", sem), ("keys", keys), ("values", values)):
            self.register_buffer(name, rows.new_zeros((capacity, *rows.shape[1:])), persistent=False)
        self.register_buffer("sem_norm", torch.zeros(capacity, device=sem.device), persistent=False)
        # [shared, shared + own]: read on the device, so that a captured graph follows a swap
        self.register_buffer("counts", torch.zeros(2, dtype=torch.long, device=sem.device), persistent=False)
        self.load(sem, keys, values, shared)

    @property
    def capacity(self) -> int:
        """Items that fit into the storage."""
        return self.sem.shape[0]

    def check(self, n: int) -> None:
        """Raises ValueError when n items do not fit."""
        if n > self.capacity:
            raise ValueError(f"the memory holds at most {self.capacity} items (max_items at patch time), but got {n}")

    def load(self, sem: Tensor, keys: Tensor, values: Tensor, shared: int) -> None:
        """Replaces all items, in place: sem [n, d], keys and values [n, ...], the first `shared` of no single edit."""
        self.check(len(sem))
        n = len(sem)
        with torch.no_grad():
            self.sem[:n].copy_(sem)
            self.keys[:n].copy_(keys)
            self.values[:n].copy_(values)
            # the norm of the rows as stored, so that rounding to the working dtype does not tilt a cosine
            self.sem_norm[:n].copy_(self.sem[:n].float().norm(dim=-1))
            for rows in (self.sem, self.keys, self.values, self.sem_norm):
                rows[n:].zero_()
            self.counts.copy_(torch.tensor([shared, n]))

    def search(self, q: Tensor, k: int, selected: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scores [T, k] fp32, indices [T, k] int64) of the items nearest to q [T, d] by cosine, -inf and -1 padded.

        Over all items; or, with `selected` [T, m] (the edits routed to each query, -1 padded), over the memory and
        those edits' own items only, so that what a routed case retrieves does not depend on the other edits.
        """
        start = torch.zeros((), dtype=torch.long, device=q.device)
        end = self.counts[1] if selected is None else self.counts[0]
        ranges = torch.stack([start, end]).expand(len(q), 2)
        scores, indices = ops.cosine_topk(q, self.sem, k, key_norm=self.sem_norm, ranges=ranges)
        if selected is None:
            return scores, indices
        own = torch.where(selected >= 0, selected + self.counts[0], -1)  # [T, m]
        fits = (own >= 0) & (own < self.counts[1])
        rows = self.sem[own.clamp(min=0, max=max(self.capacity - 1, 0))].float()  # [T, m, d]
        cosine = torch.nn.functional.cosine_similarity(rows, q.float()[:, None], dim=-1)
        scores = torch.cat([cosine.masked_fill(~fits, -torch.inf), scores], dim=1)
        indices = torch.cat([own.masked_fill(~fits, -1), indices], dim=1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores[:, :k], indices.gather(1, order)[:, :k]

    def extra_repr(self) -> str:
        return f"capacity={self.capacity}, d={self.sem.shape[1]}"
