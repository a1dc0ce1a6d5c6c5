"""The kernels of extra_neurons' gradients; `extra_neurons_backward.py` starts them.

With a = x K^T + b, u = x U^T + c, h = act(a) u, r the route weight and e = dy (V + beta zeta)^T, per token and neuron:
    dV = (r h)^T dy    dK = da^T x, da = r e u act'(a)    dU = du^T x, du = r e act(a)    dx = da K + du U    dr = h e
The [T, n] tensors r h, da, du and h e are float32 workspaces, computed again from the inputs; sums over tokens run in
rising order in one program each, so gradients are the same bits in every run.
"""

import triton
import triton.language as tl

from .arithmetic import activate, activate_grad
from .extra_neurons_kernels import acting_end, tile_products, weights


@triton.jit
def route_of_selected(out, selected, route, groups, slots, stride_s, stride_r, BG: tl.constexpr):
    """out[row, g] float32 = the route weight (1 without a route) where row selects g, else 0. Grid (rows, G / BG).

    Bytes: selected once per BG groups, selected weights of the route, 4 per entry written. Rounds nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1).to(tl.int64) * BG + tl.arange(0, BG)
    chosen = tl.zeros([BG], tl.int32)
    for slot in range(0, slots):
        chosen = tl.where(tl.load(selected + row * stride_s + slot) == g, 1, chosen)
    weight = chosen.to(tl.float32)
    acts = (chosen > 0) & (g < groups)
    if route is not None:
        weight = tl.load(route + row * stride_r + g, mask=acts, other=0.0).to(tl.float32)
    tl.store(out + row * groups + g, weight, mask=g < groups)


@triton.jit
def hidden_grads(
    rh, da, du, he, dy, x, keys, key_bias, values, up, up_bias, zeta, route, group_of, group_ptr, token_to_case,
    tokens, n, groups, d, d_out, beta, first_row, count,
    stride_o, stride_y, stride_x, stride_k, stride_v, stride_u, stride_z, stride_r,
    ACT: tl.constexpr, DOT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """rh, da, du (gated) and he (if a route wants a gradient) [T, count] float32 of neurons first_row onwards.

    Grid (count / BN, T / BT). Bytes: keys, up and values once per BT tokens, each output once. Rows of neurons on which
    no token of the tile acts are not read, and their entries are exactly 0. Nothing is rounded below float32.
    """
    local = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    i = first_row + local
    token = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    there = token < tokens
    live = (local < count) & (i < tl.minimum(acting_end(group_ptr, groups, n), n))
    acts = live[:, None] & there[None, :]
    weight = tl.full([BN, BT], 1.0, tl.float32)
    if route is not None:
        weight = weights(route, stride_r, group_of, token_to_case, token, there, i, live)
        acts = weight != 0
        live = tl.max(acts.to(tl.int32), 1) > 0
    h = tl.zeros([BN, BT], tl.float32)
    of_a = tl.zeros([BN, BT], tl.float32)
    of_u = tl.zeros([BN, BT], tl.float32)
    e = tl.zeros([BN, BT], tl.float32)
    if tl.max(live.to(tl.int32), 0) > 0:
        e = tile_products(values, stride_v, i, live, dy, stride_y, token, there, d_out, DOT, BN, BT, BK)
        if zeta is not None:
            g = tl.zeros([BN], tl.int64)
            if group_of is not None:
                g = tl.load(group_of + i, mask=live, other=0).to(tl.int64)
            e += beta * tile_products(zeta, stride_z, g, live, dy, stride_y, token, there, d_out, DOT, BN, BT, BK)
        a = tile_products(keys, stride_k, i, live, x, stride_x, token, there, d, DOT, BN, BT, BK)
        if key_bias is not None:
            a += tl.load(key_bias + i, mask=live, other=0.0).to(tl.float32)[:, None]
        h = activate(a, ACT)
        of_a = e * activate_grad(a, ACT)
        if up is not None:
            u = tile_products(up, stride_u, i, live, x, stride_x, token, there, d, DOT, BN, BT, BK)
            if up_bias is not None:
                u += tl.load(up_bias + i, mask=live, other=0.0).to(tl.float32)[:, None]
            of_u = e * h
            of_a = of_a * u
            h = h * u
    at = token[None, :] * stride_o + local[:, None]
    mask = (local < count)[:, None] & there[None, :]
    tl.store(rh + at, tl.where(acts, weight * h, 0.0), mask=mask)
    tl.store(da + at, tl.where(acts, weight * of_a, 0.0), mask=mask)
    if du is not None:
        tl.store(du + at, tl.where(acts, weight * of_u, 0.0), mask=mask)
    if he is not None:
        tl.store(he + at, tl.where(acts, h * e, 0.0), mask=mask)


@triton.jit
def rows_grads(
    out, m, x, tokens, count, d, first_row, stride_o, stride_m, stride_x,
    DOT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[first_row + i, d] = sum over tokens of m[t, i] x[t], i < count: the gradient of keys, up or values.

    Grid (count / BN, d / BD). Bytes: x once per BN neurons (L2 but for the first), m once per BD columns, out once.
    m is rounded to DOT, out once to its dtype. Tokens that act on none of the neurons are not read.
    """
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    sums = tl.zeros([BN, BD], tl.float32)
    for first in range(0, tokens, BT):
        token = first + tl.arange(0, BT).to(tl.int64)
        part = tl.load(
            m + token[None, :] * stride_m + i[:, None], mask=(i < count)[:, None] & (token < tokens)[None, :], other=0.0
        )
        acts = tl.max((part != 0).to(tl.int32), 0) > 0
        if tl.max(acts.to(tl.int32), 0) > 0:
            x_t = tl.load(
                x + token[:, None] * stride_x + column[None, :], mask=acts[:, None] & (column < d)[None, :], other=0.0
            )
            sums = tl.dot(part.to(DOT), x_t.to(DOT), sums, input_precision="ieee")
    where = out + (first_row + i)[:, None] * stride_o + column[None, :]
    tl.store(where, sums.to(out.dtype.element_ty), mask=(i < count)[:, None] & (column < d)[None, :])


@triton.jit
def bias_grads(out, m, tokens, count, first_row, stride_m, BT: tl.constexpr, BN: tl.constexpr):
    """out[first_row + i] = sum over tokens of m[t, i] float32. Grid (count / BN); m is read once, out rounded once."""
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    sums = tl.zeros([BN], tl.float32)
    for first in range(0, tokens, BT):
        token = first + tl.arange(0, BT).to(tl.int64)
        mask = (token < tokens)[:, None] & (i < count)[None, :]
        sums += tl.sum(tl.load(m + token[:, None] * stride_m + i[None, :], mask=mask, other=0.0), 0)
    tl.store(out + first_row + i, sums.to(out.dtype.element_ty), mask=i < count)


@triton.jit
def group_span(group_ptr, g, first_row, count):
    """The neurons of group g among `count` from first_row on, counted from there; all without pointers."""
    start = g.to(tl.int64) * 0
    end = start + count
    if group_ptr is not None:
        start = tl.maximum(tl.load(group_ptr + g).to(tl.int64) - first_row, start)
        end = tl.minimum(tl.load(group_ptr + g + 1).to(tl.int64) - first_row, end)
    return start, end


@triton.jit
def group_sums(m, stride_m, token, there, start, end, BN: tl.constexpr):
    """[BT] the sum of m[token, start to end].

    Summed up after the loop: where a sum of loads inside a loop is used twice, Triton 3.6 may fail an assertion, which
    ends the process (zeta_grads of one token).
    """
    sums = tl.zeros([token.shape[0], BN], tl.float32)
    for first in range(start, end, BN):
        i = first + tl.arange(0, BN).to(tl.int64)
        mask = there[:, None] & (i < end)[None, :]
        sums += tl.load(m + token[:, None] * stride_m + i[None, :], mask=mask, other=0.0)
    return tl.sum(sums, 1)


@triton.jit
def zeta_grads(
    out, rh, dy, group_ptr, tokens, d_out, beta, first_row, count, stride_m, stride_y,
    ADD: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[g, d_out] float32 (+)= beta sum over tokens of (sum over neurons of g of rh) dy. Grid (G or 1, d_out / BD).

    Bytes: rh once per BD columns, dy once per group that acts; tokens on which g does not act are not read. All in
    float32: the launcher rounds once, at the end.
    """
    g = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    start, end = group_span(group_ptr, g, first_row, count)
    sums = tl.zeros([BD], tl.float32)
    for first in range(0, tl.where(start < end, tokens, 0), BT):
        token = first + tl.arange(0, BT).to(tl.int64)
        s = group_sums(rh, stride_m, token, token < tokens, start, end, BN)
        acts = s != 0
        grad = tl.load(
            dy + token[:, None] * stride_y + column[None, :], mask=acts[:, None] & (column < d_out)[None, :], other=0.0
        )
        sums += tl.sum(s[:, None] * grad.to(tl.float32), 0)
    where = out + g * d_out + column
    sums = beta * sums
    if ADD:
        sums += tl.load(where, mask=column < d_out, other=0.0)
    tl.store(where, sums, mask=column < d_out)


@triton.jit
def route_grads(
    out, he, group_ptr, token_to_case, tokens, rows, groups, first_row, count, stride_m,
    ADD: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[row, g] float32 (+)= sum over tokens of the row and neurons of g of he. Grid (G, rows / BR). BT == BR.

    Bytes: he once per BR rows. Without token_to_case a row is a token, and only its own are read. All in float32: the
    launcher rounds once, at the end.
    """
    g = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1).to(tl.int64) * BR + tl.arange(0, BR)
    start, end = group_span(group_ptr, g, first_row, count)
    if token_to_case is None:
        sums = group_sums(he, stride_m, row, row < tokens, start, end, BN)
    else:
        sums = tl.zeros([BR], tl.float32)
        for first in range(0, tl.where(start < end, tokens, 0), BT):
            token = first + tl.arange(0, BT).to(tl.int64)
            case = tl.load(token_to_case + token, mask=token < tokens, other=-1).to(tl.int64)
            s = group_sums(he, stride_m, token, case >= 0, start, end, BN)
            sums += tl.sum(tl.where(case[None, :] == row[:, None], s[None, :], 0.0), 1)
    where = out + row * groups + g
    if ADD:
        sums += tl.load(where, mask=row < rows, other=0.0)
    tl.store(where, sums, mask=row < rows)
