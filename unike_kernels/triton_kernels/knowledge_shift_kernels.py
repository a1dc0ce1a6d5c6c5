"""The kernels of `knowledge_shift`: attention over the chosen items, exact linear maps of few rows, cosine and mix.

Whatever stands between the inputs and the outputs stays in float32. A product of a float32 tile and a half precision
tile runs on tensor cores without losing digits: the float32 side is split into three bfloat16 parts (24 bits), a
float16 side into two (11 bits), so that every product is exact.
"""

import triton
import triton.language as tl

from .arithmetic import activate, tanh
from .cosine_topk import merged, unpacked

NO_CASE = tl.constexpr(1 << 62)  # of rows past the last token
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the score of a missing item, as in the reference


@triton.jit
def dot_right(a, b, acc):
    """acc + a b, a float32 [m, k], b [k, n] of any dtype; as exact as float32."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    a1 = a.to(tl.bfloat16)
    rest = a - a1.to(tl.float32)
    a2 = rest.to(tl.bfloat16)
    a3 = (rest - a2.to(tl.float32)).to(tl.bfloat16)
    b1 = b.to(tl.bfloat16)
    if b.dtype == tl.float16:
        b2 = (b.to(tl.float32) - b1.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(a2, b2, acc)
        acc = tl.dot(a1, b2, acc)
    acc = tl.dot(a3, b1, acc)
    acc = tl.dot(a2, b1, acc)
    return tl.dot(a1, b1, acc)


@triton.jit
def dot_left(a, b, acc):
    """acc + a b, a [m, k] of any dtype, b float32 [k, n]; as exact as float32."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    b1 = b.to(tl.bfloat16)
    rest = b - b1.to(tl.float32)
    b2 = rest.to(tl.bfloat16)
    b3 = (rest - b2.to(tl.float32)).to(tl.bfloat16)
    a1 = a.to(tl.bfloat16)
    if a.dtype == tl.float16:
        a2 = (a.to(tl.float32) - a1.to(tl.float32)).to(tl.bfloat16)
        acc = tl.dot(a2, b2, acc)
        acc = tl.dot(a2, b1, acc)
    acc = tl.dot(a1, b3, acc)
    acc = tl.dot(a1, b2, acc)
    return tl.dot(a1, b1, acc)


@triton.jit
def items_of(indices, row, K, BLOCK_K: tl.constexpr):
    """The ids [BLOCK_K] of row `row` of indices [C, K] (0 where there is none), which are there, whether any is."""
    k = tl.arange(0, BLOCK_K)
    ids = tl.load(indices + row * K + k, mask=(k < K) & (row >= 0), other=-1)
    there = ids >= 0
    return tl.where(there, ids, 0), there, tl.max(there.to(tl.int32), 0) > 0


@triton.jit
def attention(
    q, q_t, q_h, keys, k_n, k_h, token, head, mine, ids, there, kv, K, scaling, cap,
    GROUP: tl.constexpr, HD: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Softmax weights p [BLOCK_R, BLOCK_K] of rows (token, head) over items ids, and d score / d (scaling q . k)."""
    s = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    # Heads may be the outer dimension of many tokens or of a large memory.
    q_row = q + token.to(tl.int64) * q_t + (kv * GROUP + head).to(tl.int64) * q_h
    k_row = keys + kv.to(tl.int64) * k_h + ids * k_n
    for start in range(0, HD, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        x = tl.load(q_row[:, None] + cols[None, :], mask=mine[:, None] & (cols < HD)[None, :], other=0.0)
        y = tl.load(k_row[:, None] + cols[None, :], mask=there[:, None] & (cols < HD)[None, :], other=0.0)
        if x.dtype == y.dtype:
            s = tl.dot(x, tl.trans(y), s, input_precision="ieee")
        else:
            s = tl.dot(x.to(tl.float32), tl.trans(y.to(tl.float32)), s, input_precision="ieee")
    s = s * scaling
    slope = tl.full((BLOCK_R, BLOCK_K), 1.0, tl.float32)
    if SOFTCAP:
        bent = tanh(s / cap)
        s = cap * bent
        slope = 1.0 - bent * bent
    inside = tl.arange(0, BLOCK_K) < K
    s = tl.where(inside[None, :], tl.where(there[None, :], s, LOWEST), float("-inf"))
    e = tl.exp(s - tl.max(s, 1)[:, None])
    return e / tl.sum(e, 1)[:, None], slope


@triton.jit
def clamped(a, CLAMP: tl.constexpr):
    """a into [0, 1] if CLAMP; a NaN stays a NaN."""
    if CLAMP:
        a = tl.where(a < 0, 0.0, tl.where(a > 1, 1.0, a))
    return a


@triton.jit
def over(x, norm):
    """x / norm, 0 where the norm is 0."""
    return tl.where(norm == 0, 0.0, x / tl.where(norm == 0, 1.0, norm))


@triton.jit
def mixed(h, know, a, INPUT: tl.constexpr):
    """(1 - a) h + a know, or the other way round; h where the knowledge's weight is 0. Rounds once, to h's dtype."""
    wide = h.to(tl.float32)
    if INPUT:
        return tl.where(a == 1.0, h, (a * wide + (1.0 - a) * know).to(h.dtype))
    return tl.where(a == 0.0, h, ((1.0 - a) * wide + a * know).to(h.dtype))


@triton.jit
def attend_case(
    case, ids, there, live, mine, token, head, kv, q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, h_input, h_t, alpha,
    out, used, encoded, e_n, K, scaling, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr, HV: tl.constexpr, MIX: tl.constexpr, COS: tl.constexpr,
    ALPHA_PER_CASE: tl.constexpr, INPUT: tl.constexpr, CLAMP: tl.constexpr, RESCALE: tl.constexpr,
    SOFTCAP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The rows `mine` of a tile, which share the items of one case: ids, which are there, whether any is. Without out
    only their alpha is wanted.
    """
    rows = token.to(tl.int64)
    column = (kv * GROUP + head) * HV
    h_row = h_input + rows * h_t + column
    untouched = 1.0 if INPUT else 0.0
    a = tl.full((BLOCK_R,), untouched, tl.float32)
    if MIX and not COS:
        if live:
            at = case + tl.zeros((BLOCK_R,), tl.int64) if ALPHA_PER_CASE else rows
            a = tl.load(alpha + at, mask=mine, other=untouched).to(tl.float32)
        if not ALPHA_PER_CASE:
            tl.store(used + rows, a, mask=mine & (head == 0) & (kv == 0))
        live = tl.max((mine & (a != untouched)).to(tl.int32), 0) > 0
    if live:
        p, _ = attention(
            q, q_t, q_h, keys, k_n, k_h, token, head, mine, ids, there, kv, K, scaling, cap,
            GROUP, HD, SOFTCAP, BLOCK_R, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        v_row = values + kv.to(tl.int64) * v_h + ids * v_n
        grow = tl.full((BLOCK_R,), 1.0, tl.float32)
        if COS or RESCALE:  # one head as wide as h: its norm and its product with h first
            kk = tl.zeros((BLOCK_R,), tl.float32)
            hh = tl.zeros((BLOCK_R,), tl.float32)
            kh = tl.zeros((BLOCK_R,), tl.float32)
            ee = tl.zeros((BLOCK_R,), tl.float32)
            eh = tl.zeros((BLOCK_R,), tl.float32)
            for start in range(0, HV, BLOCK_V):
                cols = start + tl.arange(0, BLOCK_V)
                h = tl.load(h_row[:, None] + cols[None, :], mask=mine[:, None] & (cols < HV)[None, :], other=0.0)
                h = h.to(tl.float32)
                hh += tl.sum(h * h, 1)
                if RESCALE or encoded is None:
                    v = tl.load(v_row[:, None] + cols[None, :], mask=there[:, None] & (cols < HV)[None, :], other=0.0)
                    know = dot_right(p, v, tl.zeros((BLOCK_R, BLOCK_V), tl.float32))
                    kk += tl.sum(know * know, 1)
                    kh += tl.sum(know * h, 1)
                if encoded is not None:
                    e_row = encoded + ids * e_n
                    e = tl.load(e_row[:, None] + cols[None, :], mask=there[:, None] & (cols < HV)[None, :], other=0.0)
                    e = dot_right(p, e, tl.zeros((BLOCK_R, BLOCK_V), tl.float32))
                    ee += tl.sum(e * e, 1)
                    eh += tl.sum(e * h, 1)
            if COS:
                if encoded is None:
                    a = clamped(over(over(kh, tl.sqrt(kk)), tl.sqrt(hh)), CLAMP)
                else:
                    a = clamped(over(over(eh, tl.sqrt(ee)), tl.sqrt(hh)), CLAMP)
            if RESCALE:
                grow = over(tl.sqrt(hh), tl.sqrt(kk))
        if out is not None:
            out_row = out + rows * (HEADS * HV) + column
            for start in range(0, HV, BLOCK_V):
                cols = start + tl.arange(0, BLOCK_V)
                v = tl.load(v_row[:, None] + cols[None, :], mask=there[:, None] & (cols < HV)[None, :], other=0.0)
                know = dot_right(p, v, tl.zeros((BLOCK_R, BLOCK_V), tl.float32))
                mask = mine[:, None] & (cols < HV)[None, :]
                if MIX:
                    h = tl.load(h_row[:, None] + cols[None, :], mask=mask, other=0.0)
                    know = mixed(h, know * grow[:, None], a[:, None], INPUT)
                tl.store(out_row[:, None] + cols[None, :], know, mask=mask)
    elif out is not None:
        out_row = out + rows * (HEADS * HV) + column
        for start in range(0, HV, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            mask = mine[:, None] & (cols < HV)[None, :]
            if MIX:
                h = tl.load(h_row[:, None] + cols[None, :], mask=mask, other=0.0)
                tl.store(out_row[:, None] + cols[None, :], h, mask=mask)
            else:
                tl.store(out_row[:, None] + cols[None, :], tl.zeros((BLOCK_R, BLOCK_V), tl.float32), mask=mask)
    if COS:
        tl.store(used + rows, a, mask=mine)


@triton.jit
def attend_tile(
    tile, kv, q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, indices, token_to_case, h_input, h_t, alpha, out, used,
    encoded, e_n, found, count, scores, T, K, scaling, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr, HV: tl.constexpr, PER_CASE: tl.constexpr,
    TILED: tl.constexpr, MIX: tl.constexpr, COS: tl.constexpr, ALPHA_PER_CASE: tl.constexpr, INPUT: tl.constexpr,
    CLAMP: tl.constexpr, RESCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_MERGE: tl.constexpr,
):  # fmt: skip
    """What a program of `knowledge_shift_attend` does for one tile and one key head."""
    r = tl.arange(0, BLOCK_R)
    if TILED:
        token = (tile * BLOCK_R + r) // GROUP
        head = (tile * BLOCK_R + r) % GROUP
        inside = token < T
        case = tl.load(token_to_case + token, mask=inside, other=NO_CASE)
        case = tl.where(inside, tl.maximum(case, -1), NO_CASE)
        current = tl.min(case, 0)
        while current < NO_CASE:
            ids, there, live = items_of(indices, current, K, BLOCK_K)
            attend_case(
                current, ids, there, live, case == current, token, head, kv, q, q_t, q_h, keys, k_n, k_h, values, v_n,
                v_h, h_input, h_t, alpha, out, used, encoded, e_n, K, scaling, cap, HEADS, GROUP, HD, HV, MIX, COS,
                ALPHA_PER_CASE, INPUT, CLAMP, RESCALE, SOFTCAP, BLOCK_R, BLOCK_K, BLOCK_D, BLOCK_V,
            )  # fmt: skip
            current = tl.min(tl.where(case > current, case, NO_CASE), 0)
    else:
        inside = (r < GROUP) & (tile < T)
        owner = tl.where(tile < T, tile, -1).to(tl.int64)
        if PER_CASE:
            owner = tl.load(token_to_case + tile, mask=tile < T, other=-1)
        if found is None:
            ids, there, live = items_of(indices, owner, K, BLOCK_K)
        else:
            k = tl.arange(0, BLOCK_K)
            score, index = unpacked(merged(found, tl.maximum(owner, 0), count, BLOCK_K, BLOCK_MERGE))
            ids = tl.reshape(index, [BLOCK_K])
            if kv == 0:
                at = tile.to(tl.int64) * K + k
                tl.store(indices + at, ids, mask=(k < K) & (tile < T))
                tl.store(scores + at, tl.reshape(score, [BLOCK_K]), mask=(k < K) & (tile < T))
            there = (ids >= 0) & (k < K) & (owner >= 0)
            ids = tl.where(there, ids, 0)
            live = tl.max(there.to(tl.int32), 0) > 0
        attend_case(
            owner, ids, there, live, inside, tile + tl.zeros((BLOCK_R,), tl.int32), r, kv, q, q_t, q_h, keys, k_n, k_h,
            values, v_n, v_h, h_input, h_t, alpha, out, used, encoded, e_n, K, scaling, cap, HEADS, GROUP, HD, HV, MIX,
            COS, ALPHA_PER_CASE, INPUT, CLAMP, RESCALE, SOFTCAP, BLOCK_R, BLOCK_K, BLOCK_D, BLOCK_V,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "C"])
def knowledge_shift_attend(
    q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, indices, token_to_case, h_input, h_t, alpha, out, used,
    encoded, e_n, found, count, scores, T, C, K, scaling, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr, HV: tl.constexpr, PER_CASE: tl.constexpr,
    TILED: tl.constexpr, MIX: tl.constexpr, COS: tl.constexpr, ALPHA_PER_CASE: tl.constexpr, INPUT: tl.constexpr,
    CLAMP: tl.constexpr, RESCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_MERGE: tl.constexpr = 16,
):  # fmt: skip
    """softmax(scaling q . k_i) v_i over the items of each token; MIX: mixed with h_input at once, by a given alpha or
    (COS, one head as wide as h) alpha = cos(Enc(h_know), h_input).

    q [T, HEADS, HD], keys [N, Hkv, HD], values [N, Hkv, HV], h_input [T, HEADS HV]: float16, bfloat16 or float32, each
    with its strides; indices [T, K], or (PER_CASE) [C, K] with token_to_case [T]: int64. alpha [T] or (ALPHA_PER_CASE)
    [C]; used float32 likewise. out [T, HEADS HV]: MIX: dtype of h_input, else float32, zeros in rows without items.
    encoded [N, HV] (COS): Enc of every item, None: Enc is the identity.
    found, count: None, or what `cosine_topk_scan` found, [T, count] packed; every program merges its token's lists by
    itself, 8 count bytes from L2, and that of the first head writes indices [T, K] and scores float32 [T, K].
    Grid (T, Hkv), a program per token and key head, or (TILED) (ceil(T GROUP / BLOCK_R), Hkv), a program per BLOCK_R
    rows (token, query head), which takes the cases of its rows one after the other: mostly one.
    Bytes: q, h_input, out once; K (HD + HV) of items per program and case, from L2 after the first; with COS or RESCALE
    the values twice (COS with encoded and without RESCALE: once), and encoded once. Scores, weights and sums are
    float32; the result is rounded once, where it is stored.
    """
    tile, kv = tl.program_id(0), tl.program_id(1)
    attend_tile(
        tile, kv, q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, indices, token_to_case, h_input, h_t, alpha, out, used,
        encoded, e_n, found, count, scores, T, K, scaling, cap, HEADS, GROUP, HD, HV, PER_CASE, TILED, MIX, COS,
        ALPHA_PER_CASE, INPUT, CLAMP, RESCALE, SOFTCAP, BLOCK_R, BLOCK_K, BLOCK_D, BLOCK_V, BLOCK_MERGE,
    )  # fmt: skip
    if MIX and ALPHA_PER_CASE:
        if kv == 0:
            for c in range(tile, C, tl.num_programs(0)):
                _, _, some = items_of(indices, tl.cast(c, tl.int64), K, BLOCK_K)
                a = tl.load(alpha + c).to(tl.float32)
                tl.store(used + c, tl.where(some, a, 1.0 if INPUT else 0.0))


@triton.jit(do_not_specialize=["M"])
def knowledge_shift_linear(
    x, rows, weight, w_n, w_k, bias, out, M, N, K, x_m,
    ACT: tl.constexpr, GATHER: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = act(x[rows]) weight^T + bias, as exact as float32, whatever the dtype of the weight.

    x float32 [*, K], rows (GATHER) int64 [M], -1: zeros; weight [N, K] with both strides, any dtype, bias [N] (BIAS);
    out float32 [M, N]. Grid (ceil(N / BLOCK_N), ceil(M / BLOCK_M)); the weight is read once per BLOCK_M rows, as it is,
    on the left of the products, so that few rows still fill tensor cores. Rounds nowhere below float32.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = m.to(tl.int64)
    known = m < M
    if GATHER:
        row = tl.load(rows + m, mask=known, other=-1)
        known = row >= 0
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w_at = weight + n[:, None].to(tl.int64) * w_n + k[None, :].to(tl.int64) * w_k
        w = tl.load(w_at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        part = tl.load(x + row[:, None] * x_m + k[None, :], mask=known[:, None] & (k < K)[None, :], other=0.0)
        part = tl.where((k < K)[None, :], activate(part, ACT), 0.0)
        acc = dot_left(w, tl.trans(part), acc)
    if BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = out + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(at, acc, mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def cosine_of(e_row, h_row, D, BLOCK: tl.constexpr):
    """cos of two rows, and their norms; a zero row has cosine 0."""
    ee = tl.zeros((BLOCK,), tl.float32)
    hh = tl.zeros((BLOCK,), tl.float32)
    eh = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        e = tl.load(e_row + cols, mask=cols < D, other=0.0).to(tl.float32)
        h = tl.load(h_row + cols, mask=cols < D, other=0.0).to(tl.float32)
        ee += e * e
        hh += h * h
        eh += e * h
    e_norm, h_norm = tl.sqrt(tl.sum(ee, 0)), tl.sqrt(tl.sum(hh, 0))
    return over(over(tl.sum(eh, 0), e_norm), h_norm), e_norm, h_norm


@triton.jit
def alpha_of(
    row, found, alpha, encoded, h_input, h_t, case_tokens, D,
    MODE: tl.constexpr, ENCODED_PER_CASE: tl.constexpr, CLAMP: tl.constexpr, INPUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The alpha of case or token `row`: read (MODE "given"), or the cosine at that token, or at the case's token.

    Also whether it is one that was computed or read, the cosine before the clamp, the norms and the row of h_input.
    """
    a = tl.cast(1.0 if INPUT else 0.0, tl.float32)
    cos = tl.cast(0.0, tl.float32)
    e_norm, h_norm = cos, cos
    at = row
    known = found
    if MODE == "given":
        if found:
            a = tl.load(alpha + row).to(tl.float32)
    else:
        if MODE == "case":
            at = tl.load(case_tokens + row, mask=found, other=-1)
            known = found & (at >= 0)
        if known:
            e_row = encoded + (row if ENCODED_PER_CASE else at) * D
            cos, e_norm, h_norm = cosine_of(e_row, h_input + at * h_t, D, BLOCK)
            a = clamped(cos, CLAMP)
    return a, known, cos, e_norm, h_norm, at


@triton.jit(do_not_specialize=["T"])
def knowledge_shift_mix(
    h_input, h_t, know, encoded, indices, token_to_case, case_tokens, alpha, out, used, T, K, D,
    PER_CASE: tl.constexpr, ALPHA_PER_CASE: tl.constexpr, MODE: tl.constexpr, ENCODED_PER_CASE: tl.constexpr,
    CLAMP: tl.constexpr, INPUT: tl.constexpr, RESCALE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = h_input mixed with know, by the alpha that is given (MODE "given") or the cosine of encoded and h_input,
    at each token ("token") or once per case ("case").

    h_input [T, D] with its stride; know float32 [T, D], encoded float32 [T, D] or (ENCODED_PER_CASE) [C, D]; indices,
    token_to_case, case_tokens int64; alpha, used [T] or (ALPHA_PER_CASE) [C]; out [T, D], dtype of h_input.
    Grid: a program per token, then (ALPHA_PER_CASE) one per case, which only stores its alpha. Bytes: h_input twice,
    encoded, know and out once (RESCALE: know twice). All in float32; rounds once, where out is stored.
    """
    pid = tl.program_id(0).to(tl.int64)
    if pid >= T:
        _, _, found = items_of(indices, pid - T, K, BLOCK_K)
        a, _, _, _, _, _ = alpha_of(
            pid - T, found, alpha, encoded, h_input, h_t, case_tokens, D, MODE, ENCODED_PER_CASE,
            CLAMP, INPUT, BLOCK,
        )  # fmt: skip
        tl.store(used + pid - T, a)
    else:
        owner = pid
        if PER_CASE:
            owner = tl.load(token_to_case + pid)
        _, _, found = items_of(indices, owner, K, BLOCK_K)
        if ALPHA_PER_CASE:
            a, _, _, _, _, _ = alpha_of(
                tl.maximum(owner, 0), found, alpha, encoded, h_input, h_t, case_tokens, D, MODE,
                ENCODED_PER_CASE, CLAMP, INPUT, BLOCK,
            )  # fmt: skip
        else:
            a, _, _, _, _, _ = alpha_of(
                pid, found, alpha, encoded, h_input, h_t, case_tokens, D, MODE,
                ENCODED_PER_CASE, CLAMP, INPUT, BLOCK,
            )  # fmt: skip
            tl.store(used + pid, a)
        grow = tl.cast(1.0, tl.float32)
        live = a != (1.0 if INPUT else 0.0)
        if RESCALE:
            if live:
                unused, k_norm, h_norm = cosine_of(know + pid * D, h_input + pid * h_t, D, BLOCK)
                grow = over(h_norm, k_norm)
        for start in range(0, D, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            h = tl.load(h_input + pid * h_t + cols, mask=cols < D, other=0.0)
            k = tl.load(know + pid * D + cols, mask=(cols < D) & live, other=0.0)
            tl.store(out + pid * D + cols, mixed(h, k * grow, a, INPUT), mask=cols < D)
