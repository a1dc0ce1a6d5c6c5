"""The kernels of extra_neurons' forward; `extra_neurons.py` starts them and says when which.

Each tensor is float16, bfloat16 or float32 on its own; ids, cases and pointers are int64.
Names: T tokens, n neurons, m rows of `route` and `selected` (one per case, or per token). A dot takes DOT operands
(float16 or bfloat16 where all tensors of the operator have that dtype, else float32 without TF32) and sums in float32.
Offsets of rows are int64: 200,000 neurons of 4096 are more than 2^29 elements, and int32 bytes end there.
"""

import triton
import triton.language as tl

from .arithmetic import activate


@triton.jit
def bounds(group_ptr, g, n):
    """First and one past the last neuron of group g; without pointers one group owns all n."""
    if group_ptr is not None:
        return tl.load(group_ptr + g).to(tl.int64), tl.load(group_ptr + g + 1).to(tl.int64)
    else:
        return (g * 0).to(tl.int64), (g * 0 + n).to(tl.int64)


@triton.jit
def chosen_group(selected, row, stride_row, slot, route, stride_route, group_ptr, n):
    """The group in a slot of `selected`: id, weight, bounds; equal bounds: -1, a repetition or weight 0."""
    g = tl.load(selected + row * stride_row + slot).to(tl.int64)
    acts = g >= 0
    for first in range(0, slot, 32):
        earlier = first + tl.arange(0, 32)
        known = tl.load(selected + row * stride_row + earlier, mask=earlier < slot, other=-1)
        acts = acts & (tl.max((known == g).to(tl.int32), 0) == 0)
    g = tl.where(acts, g, 0)
    weight = 1.0
    if route is not None:
        weight = tl.load(route + row * stride_route + g, mask=acts, other=0.0).to(tl.float32)
        acts = acts & (weight != 0)
    start, end = bounds(group_ptr, g, n)
    return g, weight, start, tl.where(acts, end, start)


@triton.jit
def row_products(rows, stride, more_rows, more_stride, i, live, x, d, BN: tl.constexpr, BK: tl.constexpr):
    """[BN] rows[i] . x and more_rows[i] . x (0 if None) in float32 on CUDA cores, x one token: no product is rounded.

    One walk for both, in long steps: what it costs is the wait for memory in every step. On an H100, d = 4096, 8 steps
    take 12.3 us and 4 steps 10.3, of which the bytes explain 2.
    """
    sums = tl.zeros([BN, BK // 8], tl.float32)
    more = tl.zeros([BN, BK // 8], tl.float32)
    for first in range(0, d, BK):
        k = first + tl.arange(0, BK)
        mask = live[:, None] & (k < d)[None, :]
        row_k = tl.load(rows + i[:, None] * stride + k[None, :], mask=mask, other=0.0)
        if more_rows is not None:
            more_k = tl.load(more_rows + i[:, None] * more_stride + k[None, :], mask=mask, other=0.0)
        x_k = tl.load(x + k, mask=k < d, other=0.0).to(tl.float32)
        sums += eighths(row_k.to(tl.float32) * x_k[None, :], BN, BK)
        if more_rows is not None:
            more += eighths(more_k.to(tl.float32) * x_k[None, :], BN, BK)
    return tl.sum(sums, 1), tl.sum(more, 1)


@triton.jit
def eighths(x, BN: tl.constexpr, BK: tl.constexpr):
    """[BN, BK / 8] sums of eight neighbours, which a thread has loaded together: an eighth of the registers."""
    return tl.sum(tl.reshape(x, [BN, BK // 8, 8]), 2)


@triton.jit
def tile_products(
    rows, stride, i, live, x, stride_x, token, there, d,
    DOT: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BN, BT] rows[i] . x[token]: the neurons on the left, so that 64 of them make a wgmma whatever the tokens are."""
    sums = tl.zeros([BN, BT], tl.float32)
    for first in range(0, d, BK):
        k = first + tl.arange(0, BK)
        left = tl.load(rows + i[:, None] * stride + k[None, :], mask=live[:, None] & (k < d)[None, :], other=0.0)
        right = tl.load(x + token[None, :] * stride_x + k[:, None], mask=there[None, :] & (k < d)[:, None], other=0.0)
        sums = tl.dot(left.to(DOT), right.to(DOT), sums, input_precision="ieee")
    return sums


@triton.jit
def write(y, more, mask, IN_PLACE: tl.constexpr):
    """y = more, or y += more rounded once. In place, what gains exactly 0 is not written: it keeps every bit."""
    if IN_PLACE:
        before = tl.load(y, mask=mask, other=0.0).to(tl.float32)
        tl.store(y, (before + more).to(y.dtype.element_ty), mask=mask & (more != 0))
    else:
        tl.store(y, more.to(y.dtype.element_ty), mask=mask)


@triton.jit
def selected_rows(
    y, x, keys, key_bias, values, up, up_bias, zeta, route, group_ptr, token_to_case, selected,
    n, d, d_out, slots, beta, stride_y, stride_x, stride_k, stride_v, stride_u, stride_z, stride_r, stride_s,
    ACT: tl.constexpr, IN_PLACE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y[t, BD columns] for one token and its selected groups, in one launch; all arithmetic float32, y rounded once.

    Grid (T, d_out / BD). Every program computes the hidden activations of its token again, BN neurons at a time. Bytes
    of one token with m groups of 10 neurons, gated, d = 4096, bf16: m * 246 kB from memory; the 164 kB of keys are read
    d_out / BD times, from L2 but for the first (computed). A launch for the activations alone would read the same keys
    with one program per token, so at T = 1 it could only add its start.
    """
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = column < d_out
    row = t
    if token_to_case is not None:
        row = tl.load(token_to_case + t).to(tl.int64)
    more = tl.zeros([BD], tl.float32)
    for slot in range(0, tl.where(row < 0, 0, slots)):
        g, weight, start, end = chosen_group(selected, row, stride_s, slot, route, stride_r, group_ptr, n)
        for first in range(start, end, BN):
            i = first + tl.arange(0, BN).to(tl.int64)
            live = i < end
            a, u = row_products(keys, stride_k, up, stride_u, i, live, x + t * stride_x, d, BN, BK)
            if key_bias is not None:
                a += tl.load(key_bias + i, mask=live, other=0.0).to(tl.float32)
            o = activate(a, ACT)
            if up is not None:
                if up_bias is not None:
                    u += tl.load(up_bias + i, mask=live, other=0.0).to(tl.float32)
                o = o * u
            o = tl.where(live, weight * o, 0.0)
            v = tl.load(
                values + i[:, None] * stride_v + column[None, :], mask=live[:, None] & inside[None, :], other=0.0
            ).to(tl.float32)
            more += tl.sum(o[:, None] * v, 0)
            if zeta is not None:
                z = tl.load(zeta + g * stride_z + column, mask=inside, other=0.0).to(tl.float32)
                more += beta * tl.sum(o, 0) * z
    write(y + t * stride_y + column, more, inside, IN_PLACE)


@triton.jit
def selected_tiles(
    y, x, keys, key_bias, values, up, up_bias, zeta, route, group_ptr, token_to_case, selected,
    tokens, n, d, d_out, slots, beta, stride_y, stride_x, stride_k, stride_v, stride_u, stride_z, stride_r, stride_s,
    ACT: tl.constexpr, IN_PLACE: tl.constexpr, DOT: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y[BT tokens, BD columns] where tokens of a case lie together: a group's rows are read once per tile and case.

    Grid (T / BT, d_out / BD). Walks over the distinct cases of the tile in rising order, then over their slots. The
    activations, float32, are rounded to DOT before they meet the values, as an FFN rounds its own; y once. Bytes:
    x once per BD columns (from L2 but for the first), y once, rows of groups once per tile and BD columns.
    """
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    there = token < tokens
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = column < d_out
    none = 0x7FFFFFFFFFFFFFF
    row = tl.load(token_to_case + token, mask=there, other=-1).to(tl.int64)
    more = tl.zeros([BT, BD], tl.float32)
    case = tl.min(tl.where(row >= 0, row, none), 0)
    while case < none:
        mine = row == case
        for slot in range(0, slots):
            g, weight, start, end = chosen_group(selected, case, stride_s, slot, route, stride_r, group_ptr, n)
            for first in range(start, end, BN):
                i = first + tl.arange(0, BN).to(tl.int64)
                live = i < end
                a = tile_products(keys, stride_k, i, live, x, stride_x, token, mine, d, DOT, BN, BT, BK)
                if key_bias is not None:
                    a += tl.load(key_bias + i, mask=live, other=0.0).to(tl.float32)[:, None]
                o = activate(a, ACT)
                if up is not None:
                    u = tile_products(up, stride_u, i, live, x, stride_x, token, mine, d, DOT, BN, BT, BK)
                    if up_bias is not None:
                        u += tl.load(up_bias + i, mask=live, other=0.0).to(tl.float32)[:, None]
                    o = o * u
                o = tl.where(live[:, None] & mine[None, :], weight * o, 0.0)
                v = tl.load(
                    values + i[:, None] * stride_v + column[None, :], mask=live[:, None] & inside[None, :], other=0.0
                )
                gain = tl.dot(tl.trans(o).to(DOT), v.to(DOT), input_precision="ieee")
                if zeta is not None:
                    z = tl.load(zeta + g * stride_z + column, mask=inside, other=0.0).to(tl.float32)
                    gain += beta * tl.sum(o, 0)[:, None] * z[None, :]
                more += tl.where(mine[:, None], gain, 0.0)  # 0 * inf of a neighbour's group would be NaN
        case = tl.min(tl.where(row > case, row, none), 0)
    where = y + token[:, None] * stride_y + column[None, :]
    write(where, more, there[:, None] & inside[None, :], IN_PLACE)


@triton.jit
def neuron_groups(group_of, group_ptr, groups, n, STEPS: tl.constexpr, BN: tl.constexpr):
    """group_of [n] int32: the group of each neuron, -1 for spare ones. Grid (n / BN). 4 n bytes written.

    Bisects group_ptr [groups + 1] int64 in STEPS = bit length of groups steps. Integers only, nothing is rounded.
    """
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    low = tl.zeros([BN], tl.int64)
    high = low + groups
    for _ in range(STEPS):
        middle = (low + high) // 2
        searching = low < high
        behind = tl.load(group_ptr + middle + 1, mask=searching, other=0) <= i
        low = tl.where(searching & behind, middle + 1, low)
        high = tl.where(searching & ~behind, middle, high)
    tl.store(group_of + i, tl.where(low < groups, low, -1).to(tl.int32), mask=i < n)


@triton.jit
def weights(route, stride_r, group_of, token_to_case, token, there, i, live):
    """[BN, BT] the route weights of neurons i for tokens; 0 for tokens of no case and neurons that never act."""
    g = tl.zeros(i.shape, tl.int64)
    if group_of is not None:
        g = tl.load(group_of + i, mask=live, other=-1).to(tl.int64)
    row = token
    if token_to_case is not None:
        row = tl.load(token_to_case + token, mask=there, other=-1).to(tl.int64)
    known = (live & (g >= 0))[:, None] & (there & (row >= 0))[None, :]
    return tl.load(route + row[None, :] * stride_r + g[:, None], mask=known, other=0.0).to(tl.float32)


@triton.jit
def acting_end(group_ptr, groups, n):
    """One past the last neuron that may act."""
    if group_ptr is not None:
        return tl.load(group_ptr + groups).to(tl.int64)
    else:
        return tl.zeros([], tl.int64) + n  # a 1 is a plain int for the compiler: it has no .to


@triton.jit
def hidden(
    o, x, keys, key_bias, up, up_bias, route, group_of, group_ptr, token_to_case,
    tokens, n, groups, d, stride_o, stride_x, stride_k, stride_u, stride_r,
    ACT: tl.constexpr, DOT: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """o[T, n] = route * act(x K^T + b) [* (x U^T + c)], rounded to o.s dtype, DOT, as in an FFN; 0 for spare.

    Grid (n / BN, T / BT). Bytes: keys (and up) once per BT tokens, o once. Where no token of the tile has weight for a
    neuron its rows are not read; where that is so for the whole tile nothing is but the weights.
    """
    i = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    token = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    there = token < tokens
    live = i < tl.minimum(acting_end(group_ptr, groups, n), n)
    acts = live[:, None] & there[None, :]
    if route is not None:
        weight = weights(route, stride_r, group_of, token_to_case, token, there, i, live)
        acts = weight != 0
        live = tl.max(acts.to(tl.int32), 1) > 0
    result = tl.zeros([BN, BT], tl.float32)
    if tl.max(live.to(tl.int32), 0) > 0:
        result = tile_products(keys, stride_k, i, live, x, stride_x, token, there, d, DOT, BN, BT, BK)
        if key_bias is not None:
            result += tl.load(key_bias + i, mask=live, other=0.0).to(tl.float32)[:, None]
        result = activate(result, ACT)
        if up is not None:
            u = tile_products(up, stride_u, i, live, x, stride_x, token, there, d, DOT, BN, BT, BK)
            if up_bias is not None:
                u += tl.load(up_bias + i, mask=live, other=0.0).to(tl.float32)[:, None]
            result = result * u
        if route is not None:
            result = result * weight
        result = tl.where(acts, result, 0.0)
    out = o + token[None, :] * stride_o + i[:, None]
    tl.store(out, result.to(o.dtype.element_ty), mask=(i < n)[:, None] & there[None, :])


@triton.jit
def weighted_rows(
    y, o, values, zeta, group_of, group_ptr, tokens, n, groups, d_out, beta, first_row,
    stride_y, stride_o, stride_v, stride_z,
    IN_PLACE: tl.constexpr, DOT: tl.constexpr, ROUTED: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y[T, d_out] (+)= sum over i of o[t, i] (values[first_row + i] + beta zeta of i's group): i < n, below the end.

    Grid (T / BT, d_out / BD), summed over neurons in rising order in float32, y rounded once. zeta [d_out] is exact;
    values + beta zeta[g] with a zeta per group is rounded to DOT. Bytes: values once per BT tokens, o once per BD
    columns (from L2). ROUTED: rows on which no token of the tile acts are not read, and a row that is not finite
    makes NaN of the BD columns of those tokens only that it acts on, never of a neighbour.
    """
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    there = token < tokens
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = column < d_out
    end = tl.minimum(acting_end(group_ptr, groups, first_row + n) - first_row, n)
    more = tl.zeros([BD, BT], tl.float32)
    lost = tl.zeros([BD, BT], tl.float32)
    total = tl.zeros([BT], tl.float32)
    spoilt = tl.zeros([BT], tl.int32)
    for first in range(0, end, BN):
        i = first + tl.arange(0, BN).to(tl.int64)
        live = i < end
        part = tl.load(
            o + token[None, :] * stride_o + i[:, None], mask=(i < n)[:, None] & there[None, :], other=0.0
        )  # [BN, BT], 0 from end on; a mask by `end`, which the compiler does not know, would forbid wide loads
        if ROUTED:
            live = tl.max((part.to(tl.float32) != 0).to(tl.int32), 1) > 0
        if (not ROUTED) or tl.max(live.to(tl.int32), 0) > 0:
            row = first_row + i
            mask = live[:, None] & inside[None, :]
            v = tl.load(values + row[:, None] * stride_v + column[None, :], mask=mask, other=0.0)
            if zeta is not None:
                if group_of is not None:
                    g = tl.load(group_of + row, mask=live, other=0).to(tl.int64)
                    z = tl.load(zeta + g[:, None] * stride_z + column[None, :], mask=mask, other=0.0)
                    v = v.to(tl.float32) + beta * z.to(tl.float32)
                else:
                    total += tl.sum(part.to(tl.float32), 0)
            if ROUTED:
                finite = tl.abs(v.to(tl.float32)) < float("inf")
                bad = tl.max((~finite).to(tl.int32), 1) > 0
                v = tl.where(finite, v, 0.0)
                spoilt = tl.maximum(spoilt, tl.max((bad[:, None] & (part.to(tl.float32) != 0)).to(tl.int32), 0))
            if more.dtype == DOT:
                # Tiles are added with what the sum before lost (Kahan): 2,000 terms one after the other were 2.6e-4 off
                # on an H100 where torch, which adds in parts, was 6e-5.
                gain = tl.dot(tl.trans(v.to(DOT)), part.to(DOT), input_precision="ieee") - lost
                larger = more + gain
                lost = (larger - more) - gain
                more = larger
            else:
                more = tl.dot(tl.trans(v.to(DOT)), part.to(DOT), more, input_precision="ieee")
    result = tl.trans(more)
    if zeta is not None:
        if group_of is None:
            z = tl.load(zeta + column, mask=inside, other=0.0).to(tl.float32)
            result += beta * total[:, None] * z[None, :]
    if ROUTED:
        result = tl.where((spoilt > 0)[:, None], float("nan"), result)
    where = y + token[:, None] * stride_y + column[None, :]
    write(where, result, there[:, None] & inside[None, :], IN_PLACE)
