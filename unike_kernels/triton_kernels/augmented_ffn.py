"""augmented_ffn: an FFN and its extra neurons as if their weights were concatenated, in two launches for decoding.

Up to TOKENS tokens the weights' bytes are all that counts, so each weight is read once and the extra rows cost what
their bytes cost: the first launch computes the hidden values of base and extra neurons, the second one sums them times
the value rows. No weight is copied. Weights stand on the left of each product and tokens on the right, because a dot
with less than 64 rows on its left never becomes wgmma. More tokens go through cuBLAS and the kernel of `extra_neurons`:
extra rows are 1.5 % of the work there, and a kernel of one's own does not get that back.

Where it rounds. Up to TOKENS tokens: the hidden values, to the dtype of x where w_v has it too (so that the second
product runs on tensor cores; elsewhere they stay float32), and the result. Hidden values beyond 65504 overflow in
float16, as in the base FFN. More tokens: the base as torch's modules round it (each linear map, the activation, the
product with the gate), once more where the extra neurons' float32 sum is added. Without any extra neurons that is the
base FFN bit for bit.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .. import reference
from . import launching, tuning
from .arithmetic import activate
from .launching import contiguous_rows

TOKENS = 64  # at most so many go through the kernels of this file, whose tiles hold all tokens
ALIGNED = 16  # columns of the hidden workspace start and end at multiples of it, for 16-byte loads
MAX_SPLITS = 16

# Estimated from the H200's figures (132 multiprocessors, 4.3 TB/s: 26 KB in flight on each), measured nowhere yet.
# `programs`: what the second grid is split up to. tokens: 16, 32 or 64; bytes: of the widest element; gated: 0, 1.
ROWS = [
    # The interpreter takes about 4 ms per dot, whatever its size.
    tuning.Row("augmented_ffn_hidden", tuning.INTERPRETER, {}, {"BM": 64, "BK": 64, "num_warps": 4, "num_stages": 1}),
    tuning.Row(
        "augmented_ffn_output",
        tuning.INTERPRETER,
        {},
        {"BM": 64, "BK": 64, "programs": 4, "num_warps": 4, "num_stages": 1},
    ),
    # Few tokens: tiles of 32 rows, 2.4 programs a multiprocessor for the 10240 neurons of OPT-2.7B instead of 1.2.
    tuning.Row(
        "augmented_ffn_hidden",
        0,
        {"tokens": 16, "bytes": 2},
        {"BM": 32, "BK": 128, "num_warps": 4, "num_stages": 3},
    ),
    tuning.Row(
        "augmented_ffn_output",
        0,
        {"tokens": 16, "bytes": 2},
        {"BM": 32, "BK": 128, "programs": 528, "num_warps": 4, "num_stages": 4},
    ),
    # 64 rows: wgmma. 16 (gated) or 8 KB of weights a stage; the shared memory of sm_89 (99 KB) has room for it.
    tuning.Row("augmented_ffn_hidden", 0, {"bytes": 2}, {"BM": 64, "BK": 64, "num_warps": 4, "num_stages": 4}),
    tuning.Row(
        "augmented_ffn_output", 0, {"bytes": 2}, {"BM": 64, "BK": 64, "programs": 264, "num_warps": 4, "num_stages": 4}
    ),
    # float32: no tensor cores, the products are bound by arithmetic from 16 tokens on.
    tuning.Row("augmented_ffn_hidden", 0, {}, {"BM": 32, "BK": 32, "num_warps": 4, "num_stages": 3}),
    tuning.Row("augmented_ffn_output", 0, {}, {"BM": 32, "BK": 32, "programs": 528, "num_warps": 4, "num_stages": 3}),
]
tuning.ROWS += ROWS


# ---------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _dot(a, b, acc):
    """acc + a b, float32: on tensor cores where both are of one half precision, otherwise without TF32."""
    # A comparison with a constant has no `and` in Triton before 3.4.
    HALF: tl.constexpr = a.dtype != tl.float32
    SAME: tl.constexpr = a.dtype == b.dtype
    if HALF & SAME:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")


@triton.jit
def _hidden_tile(
    h,
    x,
    keys,
    key_bias,
    up,
    up_bias,
    start,
    rows,
    T,
    d,
    stride_h,
    stride_x,
    stride_keys,
    stride_up,
    ACT: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """h[:T, start : start + BM] = act(x keys^T + key_bias) [* (x up^T + up_bias)], and 0 for a row from `rows` on."""
    m = start + tl.arange(0, BM)
    t = tl.arange(0, BT)
    acc = tl.zeros((BM, BT), dtype=tl.float32)
    gate = tl.zeros((BM, BT), dtype=tl.float32)
    row = m.to(tl.int64)[:, None]
    for k0 in range(0, d, BK):
        k = k0 + tl.arange(0, BK)
        mask = (m[:, None] < rows) & (k[None, :] < d)
        x_t = tl.load(
            x + t.to(tl.int64)[None, :] * stride_x + k[:, None], mask=(k[:, None] < d) & (t[None, :] < T), other=0.0
        )
        acc = _dot(tl.load(keys + row * stride_keys + k[None, :], mask=mask, other=0.0), x_t, acc)
        if up is not None:
            gate = _dot(tl.load(up + row * stride_up + k[None, :], mask=mask, other=0.0), x_t, gate)
    if key_bias is not None:
        acc += tl.load(key_bias + m, mask=m < rows, other=0.0).to(tl.float32)[:, None]
    o = activate(acc, ACT)
    if up is not None:
        if up_bias is not None:
            gate += tl.load(up_bias + m, mask=m < rows, other=0.0).to(tl.float32)[:, None]
        o *= gate
    o = tl.where(m[:, None] < rows, o, 0.0)  # 0 times a token that is not finite would be NaN
    out = h + t.to(tl.int64)[None, :] * stride_h + m[:, None]
    padded = (rows + 15) // 16 * 16
    tl.store(out, o.to(h.dtype.element_ty), mask=(m[:, None] < padded) & (t[None, :] < T))


@triton.jit(do_not_specialize=["T", "n", "base_tiles", "tiles"])
def augmented_ffn_hidden(
    h,
    arrived,
    x,
    w_k,
    b_k,
    w_up,
    b_up,
    keys,
    key_bias,
    up,
    up_bias,
    T,
    d,
    width,
    n,
    base_tiles,
    tiles,
    stride_h,
    stride_x,
    stride_w_k,
    stride_w_up,
    stride_keys,
    stride_up,
    ACT: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """First launch: h = act(x [w_k; keys]^T + [b_k; key_bias]) [* (x [w_up; up]^T + [b_up; up_bias])].

    x [T, d]; w_k, w_up [width, d]; keys, up [n, d]; biases as long, or None; up None: without a gate. float16,
    bfloat16, float32, each on its own. h [T, width + n], both parts padded to 16 columns, of the dtype of x or float32.
    Grid: base_tiles programs for rows of w_k, then those for rows of keys, BM rows each.
    Reads (width + n) d elements (twice that gated) once, x from the L2 cache once a program; writes h.
    Accumulates in float32, rounds h once. Zeroes `arrived` [tiles], which the second launch counts in.
    """
    program = tl.program_id(0)
    if arrived is not None:
        if program == 0:
            for i in range(0, tiles, 128):
                at = i + tl.arange(0, 128)
                tl.store(arrived + at, tl.zeros((128,), dtype=tl.int32), mask=at < tiles)
    if program < base_tiles:
        _hidden_tile(
            h, x, w_k, b_k, w_up, b_up, program * BM, width, T, d, stride_h, stride_x, stride_w_k, stride_w_up,
            ACT, BT, BM, BK,
        )  # fmt: skip
    else:
        more = h + (width + 15) // 16 * 16
        start = (program - base_tiles) * BM
        _hidden_tile(
            more, x, keys, key_bias, up, up_bias, start, n, T, d, stride_h, stride_x, stride_keys, stride_up,
            ACT, BT, BM, BK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["T", "n", "base_chunks", "chunks", "chunks_each"])
def augmented_ffn_output(
    y,
    partial,
    arrived,
    h,
    w_v,
    b_v,
    values,
    zeta,
    beta,
    T,
    d,
    width,
    n,
    base_chunks,
    chunks,
    chunks_each,
    stride_h,
    stride_w_v,
    stride_values,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """Second launch: y = h [w_v^T; values + beta zeta] + b_v.

    h [T, width + n] as the first launch leaves it; w_v [d, width]; values [n, d]; b_v, zeta [d] or None; y [T, d].
    float16, bfloat16, float32, each on its own. Grid: (tiles of BM columns of y, splits); a program takes chunks_each
    chunks of BK neurons, the base's first. Reads w_v and values once, h from the L2 cache once a tile; writes y.

    Splits (partial not None) leave float32 sums in partial [splits, tiles, BM, BT]; the program of a tile that comes
    last adds them in the order of the splits, so the result does not depend on which one that was. The workspace stays
    in the L2 cache: 4 BT d bytes a split. zeta' adds beta zeta' sum(h) to the sum: the values are never rounded again.
    Accumulates in float32, rounds y once.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    m = tile * BM + tl.arange(0, BM)
    t = tl.arange(0, BT)
    acc = tl.zeros((BM, BT), dtype=tl.float32)
    first = split * chunks_each
    last = tl.minimum(first + chunks_each, chunks)
    row = m.to(tl.int64)[:, None]
    token = t.to(tl.int64)[None, :] * stride_h

    base_end = (width + 15) // 16 * 16
    for chunk in range(first, tl.minimum(last, base_chunks)):
        k = chunk * BK + tl.arange(0, BK)
        o = tl.load(h + token + k[:, None], mask=(k[:, None] < base_end) & (t[None, :] < T), other=0.0)
        w = tl.load(w_v + row * stride_w_v + k[None, :], mask=(m[:, None] < d) & (k[None, :] < width), other=0.0)
        acc = _dot(w, o, acc)

    extra = h + base_end
    extra_end = (n + 15) // 16 * 16
    total = tl.zeros((BT,), dtype=tl.float32)
    for chunk in range(tl.maximum(first, base_chunks), last):
        k = (chunk - base_chunks) * BK + tl.arange(0, BK)
        o = tl.load(extra + token + k[:, None], mask=(k[:, None] < extra_end) & (t[None, :] < T), other=0.0)
        at = values + k.to(tl.int64)[:, None] * stride_values + m[None, :]
        v = tl.load(at, mask=(k[:, None] < n) & (m[None, :] < d), other=0.0)
        acc = _dot(tl.trans(v), o, acc)
        if zeta is not None:
            total += tl.sum(o.to(tl.float32), axis=0)
    if zeta is not None:
        direction = beta * tl.load(zeta + m, mask=m < d, other=0.0).to(tl.float32)
        acc += direction[:, None] * total[None, :]

    done = True
    if partial is not None:
        splits = tl.num_programs(1)
        tiles = tl.num_programs(0)
        place = tl.arange(0, BM)[:, None] * BT + t[None, :]
        tl.store(partial + (split * tiles + tile).to(tl.int64) * (BM * BT) + place, acc)
        tl.debug_barrier()  # all threads' sums are written before one thread says so
        done = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu") == splits - 1
        if done:
            acc = tl.zeros((BM, BT), dtype=tl.float32)
            for s in range(splits):  # past the L1 cache, which does not know of other programs
                at = partial + (s * tiles + tile).to(tl.int64) * (BM * BT) + place
                acc += tl.load(at, cache_modifier=".cg")
    if done:
        if b_v is not None:
            acc += tl.load(b_v + m, mask=m < d, other=0.0).to(tl.float32)[:, None]
        out = y + t.to(tl.int64)[None, :] * d + m[:, None]
        tl.store(out, acc.to(y.dtype.element_ty), mask=(m[:, None] < d) & (t[None, :] < T))


# --------------------------------------------------------------------------------------------------------- launcher


def augmented_ffn(
    x: Tensor,
    w_k: Tensor,
    b_k: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    keys: Tensor,
    key_bias: Tensor | None,
    values: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    zeta: Tensor | None,
    act: str,
    beta: float,
) -> Tensor:
    """As `ops.augmented_ffn`: x [..., d] -> [..., d]. Weights whose last dimension is not contiguous are copied."""
    d = x.shape[-1]
    flat = x.reshape(-1, d)
    if flat.numel() == 0:
        return launching.new(x.shape, x.dtype, x.device)
    zeta = None if beta == 0 or len(keys) == 0 else zeta
    if len(flat) > TOKENS:
        y = _through_blas(flat, w_k, b_k, w_v, b_v, w_up, b_up, act)
        if len(keys):
            from .extra_neurons import extra_neurons_

            routing = (None, None, None, None)  # route, group_ptr, token_to_case, selected
            extra_neurons_(y, flat, keys, key_bias, values, up, up_bias, zeta, *routing, act, beta)
        return y.view(x.shape)
    y = launching.new(flat.shape, x.dtype, x.device)
    _launch(y, flat, w_k, b_k, w_v, b_v, w_up, b_up, keys, key_bias, values, up, up_bias, zeta, act, beta)
    return y.view(x.shape)


def _launch(
    y: Tensor,
    x: Tensor,
    w_k: Tensor,
    b_k: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    keys: Tensor,
    key_bias: Tensor | None,
    values: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    zeta: Tensor | None,
    act: str,
    beta: float,
) -> None:
    """Both launches: y [T, d] for x [T, d], T at most TOKENS."""
    (tokens, d), (width, n) = x.shape, (len(w_k), len(keys))
    x, w_k, w_v, keys, values = (contiguous_rows(t) for t in (x, w_k, w_v, keys, values))
    b_k, b_v, b_up, key_bias, up_bias, zeta = (
        t if t is None else t.contiguous() for t in (b_k, b_v, b_up, key_bias, up_bias, zeta)
    )
    w_up, up = (None if t is None else contiguous_rows(t) for t in (w_up, up))
    columns = max(16, triton.next_power_of_2(tokens))  # a dot takes 16 and more
    # Tensors of several widths, and rows that allow no wide loads, take the small tiles of float32: others spill.
    narrow = d % 8 == 0 and width % 8 == 0
    widest = max(t.element_size() for t in (x, w_k, w_v, keys, values))
    sizes = {"tokens": columns, "bytes": widest if narrow else 4, "gated": int(up is not None)}
    hidden = tuning.choose("augmented_ffn_hidden", x.device, **sizes)
    output = dict(tuning.choose("augmented_ffn_output", x.device, **sizes))

    base_tiles, extra_tiles = triton.cdiv(width, hidden["BM"]), triton.cdiv(n, hidden["BM"])
    base_chunks = triton.cdiv(width, output["BK"])
    chunks = base_chunks + triton.cdiv(n, output["BK"])
    tiles = triton.cdiv(d, output["BM"])
    splits = max(1, min(triton.cdiv(output.pop("programs"), tiles), chunks, MAX_SPLITS))
    each = triton.cdiv(chunks, splits)
    splits = max(1, triton.cdiv(chunks, each) if each else 1)  # none of them empty

    h = launching.new(
        (tokens, _aligned(width) + _aligned(n)), x.dtype if w_v.dtype == x.dtype else torch.float32, x.device
    )
    partial = arrived = None
    if splits > 1:
        partial = launching.new((splits, tiles, output["BM"], columns), torch.float32, x.device)
        arrived = launching.new((tiles,), torch.int32, x.device)
    launching.launch(
        augmented_ffn_hidden,
        (base_tiles + extra_tiles,),
        h,
        arrived,
        x,
        w_k,
        b_k,
        w_up,
        b_up,
        keys,
        key_bias,
        up,
        up_bias,
        tokens,
        d,
        width,
        n,
        base_tiles,
        tiles,
        h.stride(0),
        x.stride(0),
        w_k.stride(0),
        0 if w_up is None else w_up.stride(0),
        keys.stride(0),
        0 if up is None else up.stride(0),
        ACT=act,
        BT=columns,
        **hidden,
    )
    launching.launch(
        augmented_ffn_output,
        (tiles, splits),
        y,
        partial,
        arrived,
        h,
        w_v,
        b_v,
        values,
        zeta,
        float(beta),
        tokens,
        d,
        width,
        n,
        base_chunks,
        chunks,
        each,
        h.stride(0),
        w_v.stride(0),
        values.stride(0),
        BT=columns,
        **output,
    )


def _aligned(columns: int) -> int:
    return triton.cdiv(columns, ALIGNED) * ALIGNED


def _through_blas(
    x: Tensor,
    w_k: Tensor,
    b_k: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    act: str,
) -> Tensor:
    """The base FFN [T, d] as its modules compute it. Tensors of several dtypes: all in float32 (weights are copied)."""
    given: list[Any] = [x, w_k, b_k, w_v, b_v, w_up, b_up]
    dtype = x.dtype
    if any(t is not None and t.dtype != dtype for t in given):
        given = [None if t is None else t.float() for t in given]
    q, w_k, b_k, w_v, b_v, w_up, b_up = given
    with no_autocast(x.device):
        o = reference.activation(act)(F.linear(q, w_k, b_k))
        if w_up is not None:
            o = o * F.linear(q, w_up, b_up)
        return F.linear(o, w_v, b_v).to(dtype)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Without autocast, which would choose other dtypes than those of the tensors."""
    on = device.type != "meta" and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()
