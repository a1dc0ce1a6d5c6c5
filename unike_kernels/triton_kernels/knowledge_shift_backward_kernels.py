"""The kernels of the gradient of `knowledge_shift`: through the mix and the cosine, the attention, to the items.

Everything between is float32; sums run in a fixed order, without atomics, so that equal runs give equal bits.
"""

import triton
import triton.language as tl

from .arithmetic import activate, activate_grad
from .knowledge_shift_kernels import NO_CASE, alpha_of, attention, cosine_of, dot_right, items_of, over


@triton.jit(do_not_specialize=["T"])
def knowledge_shift_alpha_grad(
    grad, h_input, h_t, know, encoded, indices, token_to_case, case_tokens, alpha, weights, grad_alpha, T, K, D,
    PER_CASE: tl.constexpr, ALPHA_PER_CASE: tl.constexpr, MODE: tl.constexpr, ENCODED_PER_CASE: tl.constexpr,
    CLAMP: tl.constexpr, INPUT: tl.constexpr, RESCALE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per token: weights [T], the alpha that it is mixed with, and grad_alpha [T] = grad . d h / d alpha, both float32.

    grad, h_input [T, D], any dtype, know float32 [T, D]; the rest as in `knowledge_shift_mix`. Grid (T,). A row that
    is kept has no gradient to its alpha. Bytes: grad, h_input and know once, encoded and h_input for the cosine.
    Rounds nowhere below float32.
    """
    pid = tl.program_id(0).to(tl.int64)
    owner = pid
    if PER_CASE:
        owner = tl.load(token_to_case + pid)
    _, _, found = items_of(indices, owner, K, BLOCK_K)
    row = tl.maximum(owner, 0) if ALPHA_PER_CASE else pid
    a, _, _, _, _, _ = alpha_of(
        row, found, alpha, encoded, h_input, h_t, case_tokens, D, MODE, ENCODED_PER_CASE, CLAMP, INPUT, BLOCK
    )
    tl.store(weights + pid, a)
    live = a != (1.0 if INPUT else 0.0)
    grow = tl.cast(1.0, tl.float32)
    if RESCALE:
        if live:
            unused, k_norm, h_norm = cosine_of(know + pid * D, h_input + pid * h_t, D, BLOCK)
            grow = over(h_norm, k_norm)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = (cols < D) & live
        g = tl.load(grad + pid * D + cols, mask=mask, other=0.0).to(tl.float32)
        h = tl.load(h_input + pid * h_t + cols, mask=mask, other=0.0).to(tl.float32)
        k = tl.load(know + pid * D + cols, mask=mask, other=0.0)
        total += g * (k * grow - h)
    tl.store(grad_alpha + pid, -tl.sum(total, 0) if INPUT else tl.sum(total, 0))


@triton.jit(do_not_specialize=["T", "C"])
def knowledge_shift_case_sum(x, token_to_case, out, T, C, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """out[c] = sum of x over the tokens of case c, in the order of the tokens. x [T], out [C] float32; grid over C.

    Bytes: 12 T once per BLOCK_C cases. Rounds nowhere below float32.
    """
    case = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_C, BLOCK), tl.float32)
    for start in range(0, T, BLOCK):
        t = start + tl.arange(0, BLOCK)
        owner = tl.load(token_to_case + t, mask=t < T, other=-1)
        part = tl.load(x + t, mask=t < T, other=0.0)
        total += tl.where(owner[None, :] == case[:, None], part[None, :], 0.0)
    tl.store(out + case, tl.sum(total, 1), mask=case < C)


@triton.jit
def knowledge_shift_cosine_grad(
    h_input, h_t, encoded, indices, case_tokens, alpha, grad_used, grad_alpha, grad_encoded, slopes, K, D,
    OWN_ITEMS: tl.constexpr, token_to_case, MODE: tl.constexpr, ENCODED_PER_CASE: tl.constexpr, CLAMP: tl.constexpr,
    INPUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per alpha (a token's, or a case's): the gradient of what is compared with h_input.

    grad_used, grad_alpha [M]: the gradients of the alpha that was returned and of the mix; their sum goes, where alpha
    is given, into slopes [M] (0 where it is not used), else through clamp and cosine into grad_encoded float32 [M, D]
    and slopes [M], d loss / d cosine. OWN_ITEMS: row m of indices is that of alpha m. Grid (M,). Bytes: rows of encoded
    and h_input twice, grad_encoded once. Rounds nowhere below float32.
    """
    m = tl.program_id(0).to(tl.int64)
    owner = m
    if not OWN_ITEMS:
        owner = tl.load(token_to_case + m)
    _, _, found = items_of(indices, owner, K, BLOCK_K)
    _, known, cos, e_norm, h_norm, at = alpha_of(
        m, found, alpha, encoded, h_input, h_t, case_tokens, D, MODE, ENCODED_PER_CASE, CLAMP, INPUT, BLOCK
    )
    slope = tl.load(grad_used + m).to(tl.float32) + tl.load(grad_alpha + m)
    if CLAMP and MODE != "given":
        slope = tl.where((cos < 0) | (cos > 1), 0.0, slope)
    slope = tl.where(known, slope, 0.0)
    tl.store(slopes + m, slope)
    if MODE != "given":
        at = tl.maximum(at, 0)
        e_row = encoded + (m if ENCODED_PER_CASE else at) * D
        for start in range(0, D, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask = (cols < D) & known
            e = tl.load(e_row + cols, mask=mask, other=0.0)
            h = tl.load(h_input + at * h_t + cols, mask=mask, other=0.0).to(tl.float32)
            de = over(slope * (over(h, h_norm) - over(e, e_norm) * cos), e_norm)
            tl.store(grad_encoded + m * D + cols, de, mask=cols < D)


@triton.jit(do_not_specialize=["T"])
def knowledge_shift_mix_grad(
    grad, h_input, h_t, know, encoded, case_tokens, indices, token_to_case, weights, slopes, through, grad_input,
    grad_know, T, K, D,
    PER_CASE: tl.constexpr, MODE: tl.constexpr, ENCODED_PER_CASE: tl.constexpr, INPUT: tl.constexpr,
    RESCALE: tl.constexpr, WANT_INPUT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per token: grad_input [T, D], dtype of h_input, rounded once, and grad_know float32 [T, D].

    weights [T], slopes: as stored by the two kernels above; through float32 [M, D]: the gradient of h_know by way of
    the encoder (MODE "case": of the row of the case token). Grid (T,). Bytes: grad once (RESCALE: twice), grad_input
    and grad_know once; h_input, know and encoded where an alpha or a norm depends on them; through at rows of an alpha.
    """
    pid = tl.program_id(0).to(tl.int64)
    owner = pid
    if PER_CASE:
        owner = tl.load(token_to_case + pid)
    _, _, found = items_of(indices, owner, K, BLOCK_K)
    a = tl.load(weights + pid)
    live = a != (1.0 if INPUT else 0.0)
    of_know = 1.0 - a if INPUT else a
    compared = found & (MODE != "given")  # the row whose cosine is an alpha
    m = pid
    if MODE == "case":
        m = tl.maximum(owner, 0)
        compared = compared & (tl.load(case_tokens + m, mask=found, other=-1) == pid)
    slope = tl.cast(0.0, tl.float32)
    cos = tl.cast(0.0, tl.float32)
    e_norm, h_norm, e_row = cos, cos, encoded + pid * D
    if ENCODED_PER_CASE:
        e_row = encoded + m * D
    if compared:
        slope = tl.load(slopes + m)
        cos, e_norm, h_norm = cosine_of(e_row, h_input + pid * h_t, D, BLOCK)
    grow = tl.cast(1.0, tl.float32)
    turn = tl.cast(0.0, tl.float32)  # the part of the gradient along h_know, which the rescaling takes away
    k_norm, into_norm = turn, turn
    if RESCALE:
        if live:
            unused, k_norm, into_norm = cosine_of(know + pid * D, h_input + pid * h_t, D, BLOCK)
            grow = over(into_norm, k_norm)
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, D, BLOCK):
                cols = start + tl.arange(0, BLOCK)
                g = tl.load(grad + pid * D + cols, mask=cols < D, other=0.0).to(tl.float32)
                total += g * tl.load(know + pid * D + cols, mask=cols < D, other=0.0)
            turn = over(of_know * tl.sum(total, 0), k_norm)
    for start in range(0, D, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < D
        g = tl.load(grad + pid * D + cols, mask=inside, other=0.0).to(tl.float32)
        dk = tl.where(live, of_know * g, 0.0)
        dh = tl.where(live, (1.0 - of_know) * g, g)
        if RESCALE:
            k = tl.load(know + pid * D + cols, mask=inside & live, other=0.0)
            h = tl.load(h_input + pid * h_t + cols, mask=inside & live, other=0.0).to(tl.float32)
            dk = grow * (dk - over(k, k_norm) * turn)
            dh += turn * over(h, into_norm)
        if MODE != "given":
            e = tl.load(e_row + cols, mask=inside & compared, other=0.0)
            h = tl.load(h_input + pid * h_t + cols, mask=inside & compared, other=0.0).to(tl.float32)
            dh += over(slope * (over(e, e_norm) - over(h, h_norm) * cos), h_norm)
            dk += tl.load(through + m * D + cols, mask=inside & compared, other=0.0)
        tl.store(grad_know + pid * D + cols, dk, mask=inside)
        if WANT_INPUT:
            tl.store(grad_input + pid * D + cols, dh.to(grad_input.dtype.element_ty), mask=inside)


@triton.jit
def knowledge_shift_activation_grad(x, grad, width, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """grad *= act'(x), in place. Both float32 [M, width]; grid (M, ceil(width / BLOCK)). Bytes: x once, grad once in
    and once out. Rounds nowhere below float32.
    """
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * width + cols
    slope = activate_grad(tl.load(x + at, mask=cols < width, other=0.0), ACT)
    g = tl.load(grad + at, mask=cols < width, other=0.0)
    tl.store(grad + at, tl.where(g == 0, 0.0, g * slope), mask=cols < width)


@triton.jit
def _attend_case_grad(
    case, mine, token, head, kv, q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, indices, grad, grad_q, p_out, s_out,
    K, scaling, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr, HV: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The rows `mine` of a tile, which share the items of one case."""
    ids, there, found = items_of(indices, case, K, BLOCK_K)
    rows = token.to(tl.int64)
    q_out = grad_q + (rows * HEADS + kv * GROUP + head) * HD
    if found:
        p, slope = attention(
            q, q_t, q_h, keys, k_n, k_h, token, head, mine, ids, there, kv, K, scaling, cap,
            GROUP, HD, SOFTCAP, BLOCK_R, BLOCK_K, BLOCK_D,
        )  # fmt: skip
        g_row = grad + (rows * HEADS + kv * GROUP + head) * HV
        v_row = values + kv.to(tl.int64) * v_h + ids * v_n
        dp = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for start in range(0, HV, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            g = tl.load(g_row[:, None] + cols[None, :], mask=mine[:, None] & (cols < HV)[None, :], other=0.0)
            v = tl.load(v_row[:, None] + cols[None, :], mask=there[:, None] & (cols < HV)[None, :], other=0.0)
            dp = dot_right(g, tl.trans(v), dp)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * slope * scaling
        ds = tl.where(there[None, :], ds, 0.0)
        k_row = keys + kv.to(tl.int64) * k_h + ids * k_n
        for start in range(0, HD, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            y = tl.load(k_row[:, None] + cols[None, :], mask=there[:, None] & (cols < HD)[None, :], other=0.0)
            dq = dot_right(ds, y, tl.zeros((BLOCK_R, BLOCK_D), tl.float32))
            at = q_out[:, None] + cols[None, :]
            tl.store(at, dq.to(grad_q.dtype.element_ty), mask=mine[:, None] & (cols < HD)[None, :])
        k = tl.arange(0, BLOCK_K)
        at = ((rows * HEADS + kv * GROUP + head) * K)[:, None] + k[None, :]
        tl.store(p_out + at, p, mask=mine[:, None] & (k < K)[None, :])
        tl.store(s_out + at, ds, mask=mine[:, None] & (k < K)[None, :])
    else:
        zeros = tl.zeros((BLOCK_R, BLOCK_D), tl.float32).to(grad_q.dtype.element_ty)
        for start in range(0, HD, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            tl.store(q_out[:, None] + cols[None, :], zeros, mask=mine[:, None] & (cols < HD)[None, :])


@triton.jit(do_not_specialize=["T"])
def knowledge_shift_attend_grad(
    q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, indices, token_to_case, grad, grad_q, p_out, s_out,
    T, K, scaling, cap,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr, HV: tl.constexpr, PER_CASE: tl.constexpr,
    TILED: tl.constexpr, SOFTCAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """From the gradient of the heads, float32 [T, HEADS HV]: grad_q [T, HEADS, HD], dtype of q, and for the items
    p_out and s_out, float32 [T, HEADS, K]: the softmax weights and the gradients of q . k_i. Rows of tokens without
    items stay unwritten there. Inputs, grid and tiles as in `knowledge_shift_attend`; the weights are computed again.
    Bytes: q, grad and the outputs once, keys of items twice and values once per program and case. Everything between is
    float32; grad_q is rounded once.
    """
    tile, kv = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, BLOCK_R)
    if TILED:
        token = (tile * BLOCK_R + r) // GROUP
        head = (tile * BLOCK_R + r) % GROUP
        inside = token < T
        case = tl.load(token_to_case + token, mask=inside, other=NO_CASE)
        case = tl.where(inside, tl.maximum(case, -1), NO_CASE)
        current = tl.min(case, 0)
        while current < NO_CASE:
            _attend_case_grad(
                current, case == current, token, head, kv, q, q_t, q_h, keys, k_n, k_h, values, v_n, v_h, indices,
                grad, grad_q, p_out, s_out, K, scaling, cap, HEADS, GROUP, HD, HV, SOFTCAP, BLOCK_R, BLOCK_K, BLOCK_D,
                BLOCK_V,
            )  # fmt: skip
            current = tl.min(tl.where(case > current, case, NO_CASE), 0)
    else:
        owner = tile.to(tl.int64)
        if PER_CASE:
            owner = tl.load(token_to_case + tile)
        _attend_case_grad(
            owner, r < GROUP, tile + tl.zeros((BLOCK_R,), tl.int32), r, kv, q, q_t, q_h, keys, k_n, k_h, values, v_n,
            v_h, indices, grad, grad_q, p_out, s_out, K, scaling, cap, HEADS, GROUP, HD, HV, SOFTCAP, BLOCK_R, BLOCK_K,
            BLOCK_D, BLOCK_V,
        )  # fmt: skip


@triton.jit
def knowledge_shift_items_grad(
    first, order, weights, x, x_t, x_h, out, K,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[n, kv] = sum over the entries (t, k) of item n, and the heads h of its group, of weights[t, h, k] x[t, h].

    first int64 [N + 1], order int64 [T K]: entry j of item n is t K + k = order[first[n] + j], in rising order, which
    is the order of the sum. weights float32 [T, HEADS, K]; x [T, HEADS, WIDTH], any dtype; out [N, Hkv, WIDTH],
    rounded once. Grid (N, Hkv, ceil(WIDTH / BLOCK)). Bytes: x once per entry and head.
    """
    n, kv = tl.program_id(0).to(tl.int64), tl.program_id(1)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(first + n), tl.load(first + n + 1)
    total = tl.zeros((BLOCK_J, BLOCK), tl.float32)
    for start in range(begin, end, BLOCK_J):
        j = start + tl.arange(0, BLOCK_J)
        entry = tl.load(order + j, mask=j < end, other=0)
        token, k = entry // K, entry % K
        for g in range(0, GROUP):
            head = kv * GROUP + g
            w = tl.load(weights + (token * HEADS + head) * K + k, mask=j < end, other=0.0)
            at = x + (token * x_t + head.to(tl.int64) * x_h)[:, None] + cols[None, :]
            part = tl.load(at, mask=(j < end)[:, None] & (cols < WIDTH)[None, :], other=0.0)
            total += w[:, None] * part.to(tl.float32)
    rounded = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + (n * (HEADS // GROUP) + kv) * WIDTH + cols, rounded, mask=cols < WIDTH)


@triton.jit
def knowledge_shift_outer(
    grad, x, rows, slopes, out, M, N, K, x_m,
    ACT: tl.constexpr, GATHER: tl.constexpr, SOME: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of the weight of `knowledge_shift_linear`: out = grad^T act(x[rows]), or (BIAS) the sum of grad.

    grad float32 [M, N]; x float32 [*, K]; out [N, K] or (BIAS) [N], rounded once. SOME: rows where slopes [M] is 0
    have no gradient and are not read. Grid (ceil(N / BLOCK_N), ceil(K / BLOCK_K)), BIAS: one column
    of programs. Products in float32, without TF32. Bytes: grad once per BLOCK_K columns
    of x, x once per BLOCK_N columns of grad.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    if BIAS:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, M, BLOCK_M):
            m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
            total += tl.load(grad + m[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
        tl.store(out + n, tl.sum(total, 0).to(out.dtype.element_ty), mask=n < N)
    else:
        acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for start in range(0, M, BLOCK_M):
            m = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
            row = m
            known = m < M
            if GATHER:
                row = tl.load(rows + m, mask=known, other=-1)
                known = row >= 0
            if SOME:
                known = known & (tl.load(slopes + m, mask=known, other=0.0) != 0)
            g = tl.load(grad + m[:, None] * N + n[None, :], mask=(m < M)[:, None] & (n < N)[None, :], other=0.0)
            y = tl.load(x + row[:, None] * x_m + k[None, :], mask=known[:, None] & (k < K)[None, :], other=0.0)
            acc = tl.dot(tl.trans(g), activate(y, ACT), acc, input_precision="ieee")
        at = out + n[:, None].to(tl.int64) * K + k[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])
