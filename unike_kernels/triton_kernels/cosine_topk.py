"""cosine_topk in Triton: one pass over the keys with a running top-K in every program, then a merge.

Two launches for up to 8192 queries. A score and its index are one int64: the score's bits, made to order as
integers do, above the inverted index, so that one comparison gives the larger score and, among equal ones, the lower
index. A row's score depends on the row and the query alone (d is always walked in the same steps), so the result does
not depend on how the rows were divided.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .launching import contiguous_rows

CHUNK = 8192  # queries at a time
MOST_LISTS = 512  # of a query: a chunk of what is merged has room for one of each
NOTHING = tl.constexpr(-(2**63))  # below every packed score: no finite score has this pattern


@triton.jit
def _pack(scores, index):
    """int64 of float32 scores and indices below 2**31; scores that are not finite become NOTHING."""
    finite = tl.abs(scores) < float("inf")  # False for NaN
    bits = (scores + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 = 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    packed = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return tl.where(finite, packed, NOTHING)


@triton.jit
def _first_columns(x, LIVE: tl.constexpr):
    """The first LIVE columns of x [R, C], exactly."""
    if x.shape[1] == LIVE:
        return x
    else:
        apart = tl.reshape(x, [x.shape[0], x.shape[1] // LIVE, LIVE])
        first = tl.arange(0, x.shape[1] // LIVE)[None, :, None] == 0
        return tl.sum(tl.where(first, apart, 0), axis=1)


@triton.jit
def _topk_by_sorting(x, k: tl.constexpr):
    """The k largest of each row of x [R, C], the largest first."""
    return _first_columns(tl.sort(x, descending=True), k)


# Triton has topk from 3.4 on; it leaves out most of the sorting.
_topk = getattr(tl, "topk", _topk_by_sorting)


@triton.jit
def _keep_best(best, new, KP: tl.constexpr):
    """The KP largest of two lists [R, KP] and [R, KP]."""
    both = tl.reshape(tl.join(best, new), [best.shape[0], 2 * KP])
    return _topk(both, KP)


@triton.jit
def cosine_topk_scan(
    q,  # [T, d]
    keys,  # [N, d]
    key_norm,  # [N] or None
    ranges,  # [T, 2] int64, rows maybe all the same one, or None
    token_to_case,  # [T] int64, -1: a query that retrieves nothing; or None: all do
    selected,  # [C, M] int64, with token_to_case: the edits of each case, -1 padded; or None
    spans,  # [2, 2] int64, with selected: spans[0, 1] rows belong to no edit, those of edits end at spans[1, 1]
    found,  # [T, KP, P] int64, out: the best of this program's rows for each query, the best of all programs first
    counters,  # [4] int32, out: zeros, which the next launch counts in; or None
    T,
    N,
    d,
    q_stride,
    key_stride,
    norm_stride,
    range_stride,
    M,
    WIDE: tl.constexpr,  # products in float32 instead of on tensor cores
    EVEN: tl.constexpr,  # d is a multiple of BLOCK_D
    KP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    LIVE: tl.constexpr,  # at least the queries of a tile: BLOCK_T, or less where one tile holds all
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr = 16,  # at least M
    OWN: tl.constexpr = 0,  # with selected: how many programs, the last ones, see a query's own rows each
):
    """Program (p, t): the KP best of row blocks p, p + P, ... for a tile of queries. q and keys: float16, bfloat16 or
    float32, each on its own. Bytes: the keys once per tile of queries, the queries per block (L1), 8 KP a list out.
    With selected, a query of a case without any edit retrieves nothing; one of others also sees row spans[0, 1] + e of
    every edit e of its case: program P + j takes these for query j of the tile, and its list is the one behind all P.

    Dot of keys [BLOCK_N, BLOCK_D] and queries [BLOCK_D, BLOCK_T]: keys on the left, so that few queries waste little.
    Only LIVE columns of it are sorted: with all 16, 5,000 of a block's instructions sorted what belonged to no query.
    Accumulates in float32; nothing is rounded after that but the two divisions.
    """
    if counters is not None:
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(counters + tl.arange(0, 4), tl.zeros((4,), tl.int32))
    programs = tl.num_programs(0) - OWN
    of_tile = tl.program_id(1) * BLOCK_T + tl.arange(0, LIVE)
    is_query = of_tile < T
    if token_to_case is not None:
        case = tl.load(token_to_case + of_tile, mask=is_query, other=-1)
        is_query = is_query & (case >= 0)
    if selected is not None:
        edit = tl.arange(0, BLOCK_M)
        routed = is_query[:, None] & (edit < M)[None, :]
        routed_to = tl.load(selected + case[:, None] * M + edit[None, :], mask=routed, other=-1)
        is_query = is_query & (tl.max((routed_to >= 0).to(tl.int32), axis=1) > 0)
    if ranges is not None:
        start = tl.load(ranges + range_stride * of_tile, mask=is_query, other=0)
        end = tl.load(ranges + range_stride * of_tile + 1, mask=is_query, other=0)
        first = tl.minimum(tl.maximum(tl.min(tl.where(is_query & (start < end), start, N)), 0), N)
        last = tl.minimum(tl.max(tl.where(is_query & (start < end), end, 0)), N)
    else:
        start = tl.zeros([LIVE], tl.int64)
        end = start + N
        first = tl.zeros([], tl.int64)
        last = first + N
    # Blocks keep their places whatever the range, so that a row is always in the same place of its tile.
    first_block = (first // BLOCK_N).to(tl.int32)
    last_block = tl.cdiv(last, BLOCK_N).to(tl.int32)
    if selected is None:
        begin = first_block + (tl.program_id(0) - first_block % programs + programs) % programs
        step_of = programs
    else:
        stride = tl.maximum(programs, 1)  # no program for the memory's rows where there are none
        begin = first_block + (tl.program_id(0) - first_block % stride + stride) % stride
        step_of = stride
        mine = tl.program_id(0) - programs  # the query of the tile whose own rows these are; below 0: none
        is_mine = tl.arange(0, LIVE) == mine
        if mine >= 0:
            begin = tl.zeros([], tl.int32)
            last_block = tl.max((is_mine & is_query).to(tl.int32))  # M is at most BLOCK_N: one block
            case_of = tl.sum(tl.where(is_mine & is_query, case, 0))
        else:
            case_of = tl.zeros([], tl.int64)
        shared, total = tl.load(spans + 1), tl.load(spans + 3)

    in_dot = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    at_query = q + in_dot.to(tl.int64)[:, None] * q_stride
    in_dot = in_dot[:, None] < T
    column = tl.arange(0, BLOCK_D)
    best = tl.full([LIVE, KP], NOTHING, tl.int64)
    for block in tl.range(begin, last_block, step_of):
        row = block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        is_row = row < N
        if selected is not None:
            one = tl.load(selected + case_of * M + row, mask=(mine >= 0) & (row < M), other=-1)
            for slot in range(0, tl.where(mine >= 0, M - 1, 0)):  # an edit that is named twice is one
                one = tl.where((row > slot) & (one == tl.load(selected + case_of * M + slot)), -1, one)
            is_row = tl.where(mine >= 0, (one >= 0) & (one + shared < total), is_row)
            row = tl.where(mine >= 0, one + shared, row)
        at_key = keys + row[:, None] * key_stride
        if key_norm is not None:  # asked for before the walk, there behind it
            norm = tl.load(key_norm + row * norm_stride, mask=is_row, other=1.0).to(tl.float32)
        dots = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
        squares_q = tl.zeros([BLOCK_T], tl.float32)
        squares_k = tl.zeros([BLOCK_N], tl.float32)
        for step in tl.range(0, tl.cdiv(d, BLOCK_D)):
            at = step * BLOCK_D + column
            if EVEN:
                k_tile = tl.load(at_key + at[None, :], mask=is_row[:, None], other=0.0)
                q_tile = tl.load(at_query + at[None, :], mask=in_dot, other=0.0)
            else:
                k_tile = tl.load(at_key + at[None, :], mask=is_row[:, None] & (at < d)[None, :], other=0.0)
                q_tile = tl.load(at_query + at[None, :], mask=in_dot & (at < d)[None, :], other=0.0)
            wide_q = q_tile.to(tl.float32)
            squares_q += tl.sum(wide_q * wide_q, axis=1)
            if WIDE:
                wide_k = k_tile.to(tl.float32)
                dots = tl.dot(wide_k, tl.trans(wide_q), dots, input_precision="ieee")
            else:
                dots = tl.dot(k_tile, tl.trans(q_tile), dots)
            if key_norm is None:
                wide_k = k_tile.to(tl.float32)
                squares_k += tl.sum(wide_k * wide_k, axis=1)
        if key_norm is None:
            norm = tl.sqrt_rn(squares_k)
        dots = _first_columns(dots, LIVE)
        norm_q = tl.sqrt_rn(tl.sum(_first_columns(squares_q[None, :], LIVE), axis=0))
        # A zero vector has cosine 0. Dividing twice, as the reference does, cannot overflow where its result does not.
        scores = tl.div_rn(dots, tl.where(norm_q == 0, float("inf"), norm_q)[None, :] + tl.zeros_like(dots))
        scores = tl.div_rn(scores, tl.where(norm == 0, float("inf"), norm)[:, None] + tl.zeros_like(dots))
        seen = (is_row[:, None] & is_query[None, :]) & (row[:, None] >= start[None, :]) & (row[:, None] < end[None, :])
        if selected is not None:
            own = (is_row[:, None] & is_query[None, :]) & is_mine[None, :]
            seen = tl.where(mine >= 0, own, seen)
        packed = tl.where(seen, _pack(scores, row.to(tl.int32)[:, None]), NOTHING)
        packed = tl.trans(packed)  # [LIVE, BLOCK_N]
        # Most blocks hold nothing better than what is known: no sort for them.
        worst = tl.min(best, axis=1)
        if tl.max((packed > worst[:, None]).to(tl.int32)) > 0:
            best = _keep_best(best, _topk(packed, KP), KP)
    written = of_tile < T
    if selected is None:
        lists = programs
        list_of = tl.program_id(0)
    else:
        lists = programs + 1
        list_of = tl.minimum(tl.program_id(0), programs)
        written = written & ((mine < 0) | is_mine)
    place = (of_tile.to(tl.int64)[:, None] * KP + tl.arange(0, KP)[None, :]) * lists + list_of
    tl.store(found + place, best, mask=written[:, None])


@triton.jit
def merged(found, row, count, KP: tl.constexpr, BLOCK: tl.constexpr):
    """The KP best [1, KP], packed, of the `count` that all programs found for query `row`, in chunks of BLOCK.

    Every program's best come first, then every one's second, so that a chunk or two hold the result. BLOCK is at least
    the number of programs, so a chunk has one of each: where none of them is good enough, none behind them is.
    """
    best = tl.full([1, KP], NOTHING, tl.int64)
    start = 0
    while start < count:
        at = start + tl.arange(0, BLOCK)[None, :]
        new = tl.load(found + row * count + at, mask=at < count, other=NOTHING)
        start += BLOCK
        if tl.max((new > tl.min(best, axis=1)[:, None]).to(tl.int32)) > 0:
            best = _keep_best(best, _topk(new, KP), KP)
        else:
            start = count
    return best


@triton.jit
def unpacked(best):
    """Scores and indices of packed ones: -inf and -1 where there is nothing."""
    ordered = (best >> 32).to(tl.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    missing = best == NOTHING
    score = tl.where(missing, float("-inf"), bits.to(tl.float32, bitcast=True))
    return score, tl.where(missing, -1, 0x7FFFFFFF - (best & 0xFFFFFFFF))


@triton.jit
def cosine_topk_merge(
    found,  # [T, KP * P] int64
    scores,  # [T, K] float32, out
    indices,  # [T, K] int64, out
    count,  # KP * P
    K,
    KP: tl.constexpr,
    BLOCK: tl.constexpr,  # at least KP
):
    """Program t: the K best of what all programs found for query t. Reads 8 P KP bytes of int64, writes 12 K. Rounds
    nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    score, index = unpacked(merged(found, row, count, KP, BLOCK))
    at = tl.arange(0, KP)[None, :]
    tl.store(scores + row * K + at, score, mask=at < K)
    tl.store(indices + row * K + at, index, mask=at < K)


# programs: for 132 SMs, two each. Estimated.
tuning.ROWS += [
    tuning.Row("cosine_topk", tuning.INTERPRETER, {}, {"BLOCK_N": 64, "BLOCK_T": 16, "BLOCK_D": 64, "programs": 3}),
    tuning.Row(
        "cosine_topk",
        0,
        {"bytes": 2, "T": 16},
        {"BLOCK_N": 64, "BLOCK_T": 16, "BLOCK_D": 128, "programs": 264, "num_warps": 4, "num_stages": 4},
    ),
    tuning.Row(
        "cosine_topk",
        0,
        {"bytes": 2},
        {"BLOCK_N": 64, "BLOCK_T": 32, "BLOCK_D": 128, "programs": 264, "num_warps": 4, "num_stages": 3},
    ),
    tuning.Row(
        "cosine_topk",
        0,
        {},
        {"BLOCK_N": 64, "BLOCK_T": 16, "BLOCK_D": 32, "programs": 264, "num_warps": 8, "num_stages": 3},
    ),
]


def cosine_topk(
    q: Tensor, keys: Tensor, k: int, key_norm: Tensor | None, ranges: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launches the scan and the merge, CHUNK queries at a time.

    q [..., d]; keys [N, d] of fp16, bf16 or fp32; k at most 128. fp16 or bf16 products run on tensor cores where both
    have the same dtype, all others in float32. Norms are computed on the way where key_norm is None.
    Workspace: 8 KP bytes for each of CHUNK + 8448 lists at most (16 MiB for k = 128), whatever T and N are.
    """
    lead, d = q.shape[:-1], keys.shape[1]
    q, keys = contiguous_rows(q.reshape(-1, d)), contiguous_rows(keys)
    ranges = None if ranges is None else contiguous_rows(ranges)
    tokens = q.shape[0]
    scores = launching.new((tokens, k), torch.float32, q.device)
    indices = launching.new((tokens, k), torch.int64, q.device)
    for first in range(0, tokens if k else 0, CHUNK):
        part = slice(first, first + CHUNK)
        _launch(q[part], keys, k, key_norm, None if ranges is None else ranges[part], scores[part], indices[part])
    return scores.view(*lead, k), indices.view(*lead, k)


def _launch(
    q: Tensor, keys: Tensor, k: int, key_norm: Tensor | None, ranges: Tensor | None, scores: Tensor, indices: Tensor
) -> None:
    """Both launches for queries q [T, d]; scores and indices [T, k] are written."""
    found = scan(q, keys, k, key_norm, ranges)
    tokens, kp, programs = found.shape
    merge = {"KP": kp, "BLOCK": merge_block(found), "num_warps": 4}
    launching.launch(cosine_topk_merge, (tokens,), found, scores, indices, programs * kp, k, **merge)


def merge_block(found: Tensor) -> int:
    """How many of what `scan` found are merged at once: at least one of every program's."""
    _, kp, programs = found.shape
    return max(kp, triton.next_power_of_2(programs + 1), min(1024, triton.next_power_of_2(max(programs, 1) * kp)))


def scan(
    q: Tensor,
    keys: Tensor,
    k: int,
    key_norm: Tensor | None,
    ranges: Tensor | None,
    token_to_case: Tensor | None = None,
    selected: Tensor | None = None,
    spans: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """The first launch for queries q [T, d]: found [T, KP, lists] int64, packed, to be merged; 0 lists: not started.

    q, keys and ranges with contiguous columns; token_to_case [T], selected [C, M], spans [2, 2] and counters [4]
    contiguous, as `cosine_topk_scan` takes them.
    """
    tokens, (n, d) = q.shape[0], keys.shape
    wide = q.dtype != keys.dtype or q.dtype == torch.float32
    size = 4 if wide else 2
    choice = dict(tuning.choose("cosine_topk", q.device, T=tokens, bytes=size))
    block_n, block_t, most = choice["BLOCK_N"], choice["BLOCK_T"], choice.pop("programs")
    kp = max(16, triton.next_power_of_2(k))
    width = 0 if selected is None else selected.shape[1]
    block_m = max(16, triton.next_power_of_2(width))
    choice["BLOCK_N"] = block_n = max(block_n, kp, block_m)  # a block holds at least as many rows as are kept of it
    choice = tuning.fitting(choice, block_n + block_t, size, q.device)
    tiles = triton.cdiv(tokens, block_t)
    programs = min(triton.cdiv(n, block_n), max(1, min(most, MOST_LISTS - 1) // tiles))
    own = 0 if selected is None else min(tokens, block_t)
    found = launching.new((tokens, kp, programs + (own > 0)), torch.int64, q.device)
    launching.launch(
        cosine_topk_scan,
        (programs + own, tiles),
        q,
        keys,
        key_norm,
        ranges,
        token_to_case,
        selected,
        spans,
        found,
        counters,
        tokens,
        n,
        d,
        q.stride(0),
        keys.stride(0),
        0 if key_norm is None else key_norm.stride(0),
        0 if ranges is None else ranges.stride(0),
        width,
        WIDE=wide,
        EVEN=d % choice["BLOCK_D"] == 0,
        LIVE=min(block_t, triton.next_power_of_2(tokens)),
        KP=kp,
        BLOCK_M=block_m,
        OWN=own,
        **choice,
    )
    return found
