"""`knowledge_shift` behind an output projection, in one launch: attention, projection, alpha from folded weights, mix.

The projection needs every head of the attention, alpha all of Enc(h_know), every column of the result alpha. So the
programs draw tickets: the first ones attend; the next ones wait for these, multiply by the folded weight and leave
their share of the cosine's three sums; the last ones wait for the heads too, multiply by the output projection, keep
their columns in registers, wait for the sums and mix. The sums are added in the order of their columns, so that the
result does not depend on who came first.
"""

import triton
import triton.language as tl

from . import tuning
from .knowledge_shift_kernels import attend_tile, clamped, dot_left, mixed, over
from .tickets import draw, say_done, wait_for
from .tuning import Row

# As the linear maps of the general path, warps as attention has them; estimated, no GPU has measured them.
tuning.ROWS += [
    Row("knowledge_shift_project", tuning.INTERPRETER, {}, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_W": 64}),
    # 128 columns at once spill on sm_89, whose SMs want 8 KB under way, not 32.
    Row("knowledge_shift_project", 89, {"rows": 16, "bytes": 2}, {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_W": 64}),
    Row(
        "knowledge_shift_project",
        0,
        {"rows": 16, "bytes": 2, "fp16": 0},
        _FEW := {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_W": 128},
    ),
    Row("knowledge_shift_project", 0, {"rows": 16}, {**_FEW, "BLOCK_W": 64}),
    Row("knowledge_shift_project", 0, {"bytes": 2}, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_W": 64}),
    Row("knowledge_shift_project", 0, {}, {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_W": 16, "num_warps": 4}),
]


@triton.jit
def _columns(
    heads, row, there, weight, w_n, w_k, bias, n, N, W,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Columns n of heads[row] weight^T + bias, as exact as float32: [BLOCK_N, BLOCK_M]."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, W, BLOCK_W):
        k = start + tl.arange(0, BLOCK_W)
        w_at = weight + n[:, None].to(tl.int64) * w_n + k[None, :].to(tl.int64) * w_k
        w = tl.load(w_at, mask=(n < N)[:, None] & (k < W)[None, :], other=0.0)
        x = tl.load(heads + row[:, None] * W + k[None, :], mask=there[:, None] & (k < W)[None, :], other=0.0)
        acc = dot_left(w, tl.trans(x), acc)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit
def _alphas(
    of, owner, there, alpha, case_tokens, indices, sums, K,
    MODE: tl.constexpr, CLAMP: tl.constexpr, INPUT: tl.constexpr, ITEMS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """alpha [BLOCK_M] of tokens or cases `of` where `there`, by the items in rows `owner`: read, or from the sums."""
    item = tl.arange(0, ITEMS)
    known = (there & (owner >= 0))[:, None] & (item < K)[None, :]
    ids = tl.load(indices + owner[:, None] * K + item[None, :], mask=known, other=-1)
    found = tl.max((ids >= 0).to(tl.int32), 1) > 0
    if MODE == "given":
        a = tl.load(alpha + of, mask=found, other=0.0).to(tl.float32)
    else:
        if MODE == "case":
            found = found & (tl.load(case_tokens + of, mask=found, other=-1) >= 0)
        ee = tl.zeros((BLOCK_M,), tl.float32)
        hh = tl.zeros((BLOCK_M,), tl.float32)
        eh = tl.zeros((BLOCK_M,), tl.float32)
        first = sums + (of // BLOCK_M) * (TILES * 3 * BLOCK_M) + of % BLOCK_M
        for start in range(0, TILES, 32):
            part = start + tl.arange(0, 32)
            at = first[None, :] + part[:, None] * (3 * BLOCK_M)
            left = (part < TILES)[:, None] & found[None, :]  # past the L1 cache, which knows no others
            ee += tl.sum(tl.load(at, mask=left, other=0.0, cache_modifier=".cg"), 0)
            hh += tl.sum(tl.load(at + BLOCK_M, mask=left, other=0.0, cache_modifier=".cg"), 0)
            eh += tl.sum(tl.load(at + 2 * BLOCK_M, mask=left, other=0.0, cache_modifier=".cg"), 0)
        a = clamped(over(over(eh, tl.sqrt(ee)), tl.sqrt(hh)), CLAMP)
    return tl.where(found, a, 1.0 if INPUT else 0.0)


@triton.jit
def _fold_tile(
    tile, heads, folded, f_n, f_k, folded_bias, h_input, h_t, case_tokens, sums, T, C, D, W,
    MODE: tl.constexpr, TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The share of BLOCK_N columns in |e|^2, |h|^2 and e . h, e = heads folded^T + folded_bias, of BLOCK_M rows."""
    m = (tile // TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = m.to(tl.int64)
    there = m < T
    if MODE == "case":
        row = tl.load(case_tokens + m, mask=m < C, other=-1)
        there = row >= 0
    mask = (n < D)[:, None] & there[None, :]
    e = _columns(heads, row, there, folded, f_n, f_k, folded_bias, n, D, W, BLOCK_N, BLOCK_M, BLOCK_W)
    e = tl.where(mask, e, 0.0)
    h = tl.load(h_input + row[None, :] * h_t + n[:, None], mask=mask, other=0.0).to(tl.float32)
    at = sums + tile * (3 * BLOCK_M) + tl.arange(0, BLOCK_M)
    tl.store(at, tl.sum(e * e, 0))
    tl.store(at + BLOCK_M, tl.sum(h * h, 0))
    tl.store(at + 2 * BLOCK_M, tl.sum(e * h, 0))


@triton.jit
def _mix_tile(
    tile, heads, weight, w_n, w_k, bias, indices, token_to_case, h_input, h_t, alpha, case_tokens, sums, counters, out,
    used, T, C, D, K, W, folding,
    MODE: tl.constexpr, ALPHA_PER_CASE: tl.constexpr, INPUT: tl.constexpr, CLAMP: tl.constexpr, ITEMS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns of h_input, mixed with those of heads weight^T + bias, for BLOCK_M tokens; some of the alphas."""
    m = (tile // TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tile % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = m.to(tl.int64)
    know = _columns(heads, row, m < T, weight, w_n, w_k, bias, n, D, W, BLOCK_N, BLOCK_M, BLOCK_W)
    owner = row
    if token_to_case is not None:
        owner = tl.load(token_to_case + m, mask=m < T, other=-1)
    if MODE != "given":
        wait_for(counters + 2, folding)
    a = _alphas(
        owner if ALPHA_PER_CASE else row, owner, m < T, alpha, case_tokens, indices, sums, K, MODE, CLAMP, INPUT,
        ITEMS, TILES, BLOCK_M,
    )  # fmt: skip
    mask = (n < D)[:, None] & (m < T)[None, :]
    h = tl.load(h_input + row[None, :] * h_t + n[:, None], mask=mask, other=0.0)
    mix = mixed(h, know, a[None, :] + tl.zeros_like(know), INPUT)
    tl.store(out + row[None, :] * D + n[:, None], mix, mask=mask)
    if tile % TILES == 0:
        if ALPHA_PER_CASE:
            for start in range(tile // TILES * BLOCK_M, C, tl.cdiv(tl.maximum(T, 1), BLOCK_M) * BLOCK_M):
                c = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
                of_case = _alphas(
                    c, c, c < C, alpha, case_tokens, indices, sums, K, MODE, CLAMP, INPUT, ITEMS, TILES, BLOCK_M
                )
                tl.store(used + c, of_case, mask=c < C)
        else:
            tl.store(used + m, a, mask=m < T)


@triton.jit(do_not_specialize=["T", "C", "attending", "folding"])
def knowledge_shift_project(
    q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, indices, token_to_case, h_input, h_t, alpha, case_tokens,
    found, count, scores, weight, w_n, w_k, bias, folded, f_n, f_k, folded_bias, heads, sums, counters, out, used,
    T, C, D, K, scaling, cap, attending, folding,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr, HV: tl.constexpr, TILED: tl.constexpr,
    MODE: tl.constexpr, ALPHA_PER_CASE: tl.constexpr, INPUT: tl.constexpr, CLAMP: tl.constexpr, SOFTCAP: tl.constexpr,
    TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_MERGE: tl.constexpr = 16,
):  # fmt: skip
    """out = h_input mixed with heads weight^T + bias, heads = softmax(scaling q . k_i) v_i over each token's items.

    MODE "given": by alpha [T], or [C] (ALPHA_PER_CASE); "token": by cos(heads folded^T + folded_bias, h_input) of each
    token; "case": by that cosine at the token case_tokens [C] of its case (-1: none).
    q to indices, token_to_case (or None), found, count and scores as in `knowledge_shift_attend`; weight, folded
    [D, W], W = HEADS HV, with both strides, bias, folded_bias [D] or None; h_input [T, D] with its stride: float16,
    bfloat16 or float32. A row without an item keeps h_input. out [T, D], dtype of h_input; used float32 [T] or [C].
    Workspace: heads float32 [T, W]; sums float32 [ceil(rows / BLOCK_M), TILES, 3, BLOCK_M], rows = T or (MODE "case")
    C, TILES = ceil(D / BLOCK_N); counters int32 [4], zeros before, used up after.
    Grid: `attending` tickets for tiles of attention, `folding` ones for the folded weight (0 in MODE "given"), TILES
    ones for each BLOCK_M tokens.
    Bytes: attention as there; both weights once per tile of tokens, heads per program from L2, h_input twice, out
    once, sums (12 BLOCK_M TILES) per program of the last kind from L2. All in float32; rounds once, where out is
    stored.
    """
    ticket = draw(counters)
    if ticket < attending:
        kv_heads: tl.constexpr = HEADS // GROUP
        attend_tile(
            ticket // kv_heads, ticket % kv_heads, q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, indices,
            indices if token_to_case is None else token_to_case, h_input, h_t, heads, heads, heads, None, 0, found,
            count, scores, T, K, scaling, cap, HEADS, GROUP, HD, HV, token_to_case is not None, TILED, False, False,
            False, False, False, False, SOFTCAP, BLOCK_R, BLOCK_K, BLOCK_D, BLOCK_V, BLOCK_MERGE,
        )  # fmt: skip
        say_done(counters + 1)
    else:
        ticket -= attending
        wait_for(counters + 1, attending)
        if folded is None:
            _mix_tile(
                ticket, heads, weight, w_n, w_k, bias, indices, token_to_case, h_input, h_t, alpha, case_tokens, sums,
                counters, out, used, T, C, D, K, HEADS * HV, folding, MODE, ALPHA_PER_CASE, INPUT, CLAMP, BLOCK_K,
                TILES, BLOCK_M, BLOCK_N, BLOCK_W,
            )  # fmt: skip
        elif ticket < folding:
            _fold_tile(
                ticket, heads, folded, f_n, f_k, folded_bias, h_input, h_t, case_tokens, sums, T, C, D, HEADS * HV,
                MODE, TILES, BLOCK_M, BLOCK_N, BLOCK_W,
            )  # fmt: skip
            say_done(counters + 2)
        else:
            _mix_tile(
                ticket - folding, heads, weight, w_n, w_k, bias, indices, token_to_case, h_input, h_t, alpha,
                case_tokens, sums, counters, out, used, T, C, D, K, HEADS * HV, folding, MODE, ALPHA_PER_CASE, INPUT,
                CLAMP, BLOCK_K, TILES, BLOCK_M, BLOCK_N, BLOCK_W,
            )  # fmt: skip
