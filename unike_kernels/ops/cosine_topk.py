"""cosine_topk: the K keys nearest to each query by cosine."""

import math

import torch
from torch import Tensor

from ._checks import Check, check_shape, require, require_tensors, shape


def cosine_topk(
    q: Tensor,
    keys: Tensor,
    k: int,
    *,
    key_norm: Tensor | None = None,
    ranges: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k rows of `keys` with the largest cosine to each query, largest first.

    Equivalent to `(F.normalize(q) @ F.normalize(keys).T).topk(k)`, but among equal scores the lowest index wins.

    q: [..., d] float, T queries in all. keys: [N, d] float. k: 0 or more, also more than N.
    key_norm: [N], what to divide the rows of keys by. None: their own norms, computed here. Ones: the rows are unit
        vectors already. Keeping the norms of a memory saves one of two passes over it.
    ranges: [T, 2] int64, query t sees keys ranges[t, 0] up to, not including, ranges[t, 1]. None: all.
    backend: "auto" (for CUDA tensors triton, or CUDA C++ where an H100 has measured that it is faster, and the
        reference for k above 128; native code on a CPU; the reference elsewhere and for float64), or one by name;
        "cuda" has its own kernel for up to 64 queries.
    Returns scores [..., k] float32 (float64 if an input is), and indices [..., k] int64. Where fewer than k rows can be
    had, scores are padded with -inf and indices with -1.

    A zero vector has cosine 0 to everything. A query that is not finite retrieves nothing; a key that is not finite is
    never retrieved. Not differentiable: the scores carry no gradient.
    """
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, but got {type(k).__name__}")
    require_tensors(("q", "keys"), {"q": q, "keys": keys, "key_norm": key_norm}, {"ranges": ranges})
    check_arguments(require, q, keys, k, key_norm, ranges)
    key_norm = None if key_norm is None else key_norm.detach()
    return torch.ops.unike.cosine_topk(q.detach(), keys.detach(), k, key_norm, ranges, backend)


def check_arguments(
    check: Check, q: Tensor, keys: Tensor, k: int, key_norm: Tensor | None, ranges: Tensor | None
) -> None:
    """The shapes of all arguments agree."""
    check(
        q.dim() >= 1 and keys.dim() == 2, lambda: f"q must be [..., d], keys [N, d], but got {shape(q)}, {shape(keys)}"
    )
    check(q.shape[-1] == keys.shape[1], lambda: f"q has {q.shape[-1]} features, keys have {keys.shape[1]}")
    check(k >= 0, lambda: f"k must be 0 or more, but got {k}")
    check_shape(check, "key_norm", key_norm, (keys.shape[0],), keys=keys)
    queries = math.prod(q.shape[:-1])  # .numel() would fix a symbolic size
    check_shape(check, "ranges", ranges, (queries, 2), q=q)
