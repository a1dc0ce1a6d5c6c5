"""cosine_topk in CUDA C++: few queries, one pass over the keys, csrc/cosine_topk.cu."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..triton_kernels import launching as allocating
from ..triton_kernels import tuning
from ..triton_kernels.tuning import Row
from .launching import address, launch, name_of, on
from .zeros import Zeros

# As csrc/cosine_topk.cuh has them.
MOST_QUERIES, MOST_ITEMS, MOST_COLUMNS, MOST_KEYS = 64, 128, 2**20, 2**31 - 2**20
KERNEL = "cosine_topk_stream"

# launches: 1, the block that comes last chooses for all queries, a warp for each; or 2, a block for each. H100, one
# query: 16 + 8 us (the second starts early) against 32 among 1,000 keys, 54 + at most 8 against 64 among 10,000: where
# a block sees a few units only, lists are too long for a warp. Estimated for more queries.
# copies: 1, every thread copies its 16 bytes; or 2, the copy engine brings rows, where csrc/cosine_topk.cuh says that
# it can. H100, one query: 16 against 18 us among 1,000 keys, 54 against 58 among 10,000.
tuning.ROWS += [
    Row(KERNEL, 0, {"n": 16384}, {"launches": 2, "copies": 1}),
    Row(KERNEL, 0, {"queries": 8}, {"launches": 1, "copies": 1}),
    Row(KERNEL, 0, {}, {"launches": 2, "copies": 1}),
]

ZEROS = Zeros(MOST_QUERIES * 8 * 257 + 128)  # what csrc/cosine_topk.cu wants for the most queries and items


def refusal(args: Sequence[Any]) -> str | None:
    """Why the kernel cannot take the operator's arguments; None: it can."""
    q, keys, k, *_ = args
    queries, (n, d) = math.prod(q.shape[:-1]), keys.shape
    if queries > MOST_QUERIES:
        return f"there are {queries} queries, and it takes at most {MOST_QUERIES}"
    if k > MOST_ITEMS:
        return f"k is {k}, and it finds at most {MOST_ITEMS} items"
    if n > MOST_KEYS:
        return f"there are {n} keys, and it takes at most {MOST_KEYS}"
    if not 0 < d <= MOST_COLUMNS:
        return f"a key has {d} elements, and it takes 1 to {MOST_COLUMNS}"
    return None


def faster(args: Sequence[Any]) -> bool:
    """Whether it is quicker than Triton's: for the queries of a decoding step, in half precision.

    H100, bf16, d = 4096, one query (up to 8 are the same work): 25 against 46 us of 1,000 keys, 57 against 76 of
    10,000, 335 against 418 of 100,000, 2,926 against 2,989 of a million.
    """
    q, keys = args[:2]
    return math.prod(q.shape[:-1]) <= 8 and q.dtype == keys.dtype and q.dtype.itemsize == 2


def cosine_topk(
    q: Tensor, keys: Tensor, k: int, key_norm: Tensor | None, ranges: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launches the scan, and the choice of the best if the table says so. Workspace: 2060 bytes a query and SM.

    q [..., d], at most 64 queries; keys [N, d] of fp16, bf16 or fp32; k at most 128. Half precision runs on tensor
    cores where both have the same dtype, all others in float32. Without key_norm the norms are computed on the way.
    """
    lead, (n, d) = q.shape[:-1], keys.shape
    q = q.reshape(-1, d)
    if q.dtype != keys.dtype:
        q = q.float()
    q = q if q.stride(1) == 1 or d == 1 else q.contiguous()
    keys = keys if keys.stride(1) == 1 or d == 1 else keys.contiguous()
    tokens, device = q.shape[0], q.device
    scores = allocating.new((tokens, k), torch.float32, device)
    indices = allocating.new((tokens, k), torch.int64, device)
    if tokens == 0 or k == 0:
        return scores.view(*lead, k), indices.view(*lead, k)
    key_norm = None if key_norm is None else key_norm.to(torch.float32).contiguous()
    ranges = None if ranges is None else ranges.contiguous()
    sizes = (name_of(q.dtype), name_of(keys.dtype), tokens, n, d, k)
    with on(device):
        needed = native.cuda().cosine_topk_workspace(*sizes)
        zeros = ZEROS.of(device, native.cuda().cosine_topk_zeros(tokens, k))
    workspace = allocating.new((needed,), torch.uint8, device)
    choice = tuning.choose(KERNEL, device, n=n, queries=tokens)
    alone, bulk = n > 0 and choice["launches"] == 1, choice.get("copies") == 2
    try:
        launch(
            "cosine_topk",
            device,
            (*([KERNEL] if n else []), *([] if alone else ["cosine_topk_select"])),
            *(address(q), q.stride(0), address(keys), keys.stride(0), address(key_norm), address(ranges), *sizes),
            *(address(workspace), needed, zeros, alone, bulk, address(scores), address(indices)),
        )
    except BaseException:
        ZEROS.forget(zeros)
        raise
    return scores.view(*lead, k), indices.view(*lead, k)
