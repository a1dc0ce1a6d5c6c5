"""The second of two launches of `knowledge_shift` where few tokens take an alpha each: projection, alpha and mix.

alpha needs all of Enc(h_know), every column of the result needs alpha. So the programs draw tickets: the first half of
them multiplies by the folded weight and leaves its share of the cosine's three sums, the second half multiplies by the
output projection, keeps its columns in registers, waits for the first half and mixes. Who waits has a later ticket than
those it waits for, which run already and wait for nothing: however few programs a device has room for, it comes to an
end. The sums are added in the order of their columns, so that the result does not depend on who came first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .knowledge_shift_arguments import Shift
from .knowledge_shift_kernels import clamped, dot_left, mixed, over
from .tuning import Row

# As the linear maps of the general path; estimated, no GPU has measured them.
tuning.ROWS += [
    Row("knowledge_shift_project", tuning.INTERPRETER, {}, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}),
    Row(
        "knowledge_shift_project",
        0,
        {"rows": 16, "bytes": 2, "fp16": 0},
        _FEW := {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128},
    ),
    Row("knowledge_shift_project", 0, {"rows": 16}, {**_FEW, "BLOCK_K": 64}),
    Row("knowledge_shift_project", 0, {"bytes": 2}, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}),
    Row("knowledge_shift_project", 0, {}, {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8}),
]


@triton.jit
def _columns(
    heads, weight, w_n, w_k, bias, n, m, T, N, K, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Columns n of heads weight^T + bias for tokens m: [BLOCK_N, BLOCK_M], as exact as float32."""
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        w_at = weight + n[:, None].to(tl.int64) * w_n + k[None, :].to(tl.int64) * w_k
        w = tl.load(w_at, mask=(n < N)[:, None] & (k < K)[None, :], other=0.0)
        x = tl.load(heads + m[:, None] * K + k[None, :], mask=(m < T)[:, None] & (k < K)[None, :], other=0.0)
        acc = dot_left(w, tl.trans(x), acc)
    if bias is not None:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    return acc


@triton.jit(do_not_specialize=["T"])
def knowledge_shift_project(
    heads, weight, w_n, w_k, bias, folded, f_n, f_k, folded_bias, h_input, h_t, indices, token_to_case, arrived, sums,
    out, used, T, D, W, K,
    CLAMP: tl.constexpr, INPUT: tl.constexpr, ITEMS: tl.constexpr, TILES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = h_input mixed with heads weight^T + bias by alpha = cos(heads folded^T + folded_bias, h_input), per token.

    heads float32 [T, W]; weight, folded [D, W] with both strides, bias, folded_bias [D] or None; h_input [T, D] with
    its stride: float16, bfloat16 or float32; indices int64 [T, K], or [C, K] with token_to_case [T]: a row without an
    item keeps h_input. arrived int32 [16]: zeros; sums float32 [token tiles, TILES, 3, BLOCK_M]: workspace.
    out [T, D], dtype of h_input; used float32 [T]. Grid (2 TILES, ceil(T / BLOCK_M)), TILES = ceil(D / BLOCK_N).
    Bytes: both weights once per tile of tokens, heads per program from L2, h_input twice, out once, sums (12 BLOCK_M
    TILES) per program of the second half from L2. All in float32; rounds once, where out is stored.
    """
    tile = tl.program_id(1)
    ticket = tl.atomic_add(arrived + 2 * tile, 1, sem="relaxed", scope="gpu")
    done = arrived + 2 * tile + 1
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = m.to(tl.int64)
    n = (ticket % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (n < D)[:, None] & (m < T)[None, :]
    at_h = h_input + row[None, :] * h_t + n[:, None]
    lane = tl.arange(0, BLOCK_M)
    of_tile = sums + tile * (TILES * 3 * BLOCK_M)
    if ticket < TILES:
        e = _columns(heads, folded, f_n, f_k, folded_bias, n, row, T, D, W, BLOCK_N, BLOCK_M, BLOCK_K)
        e = tl.where(mask, e, 0.0)
        wide = tl.load(at_h, mask=mask, other=0.0).to(tl.float32)
        at = of_tile + ticket * (3 * BLOCK_M) + lane
        tl.store(at, tl.sum(e * e, 0))
        tl.store(at + BLOCK_M, tl.sum(wide * wide, 0))
        tl.store(at + 2 * BLOCK_M, tl.sum(e * wide, 0))
        tl.debug_barrier()  # all threads' sums are written before one thread says so
        tl.atomic_add(done, 1, sem="acq_rel", scope="gpu")
    else:
        know = _columns(heads, weight, w_n, w_k, bias, n, row, T, D, W, BLOCK_N, BLOCK_M, BLOCK_K)
        owner = row
        if token_to_case is not None:
            owner = tl.load(token_to_case + m, mask=m < T, other=-1)
        item = tl.arange(0, ITEMS)
        known = ((m < T) & (owner >= 0))[:, None] & (item < K)[None, :]
        ids = tl.load(indices + owner[:, None] * K + item[None, :], mask=known, other=-1)
        found = tl.max((ids >= 0).to(tl.int32), 1) > 0

        ready = tl.atomic_add(done, 0, sem="acquire", scope="gpu")
        while ready < TILES:
            ready = tl.atomic_add(done, 0, sem="acquire", scope="gpu")
        ee = tl.zeros((BLOCK_M,), tl.float32)
        hh = tl.zeros((BLOCK_M,), tl.float32)
        eh = tl.zeros((BLOCK_M,), tl.float32)
        for start in range(0, TILES, 32):
            part = start + tl.arange(0, 32)
            at = of_tile + part[:, None] * (3 * BLOCK_M) + lane[None, :]
            there = (part < TILES)[:, None] & (lane < BLOCK_M)[None, :]  # past the L1 cache, which knows no others
            ee += tl.sum(tl.load(at, mask=there, other=0.0, cache_modifier=".cg"), 0)
            hh += tl.sum(tl.load(at + BLOCK_M, mask=there, other=0.0, cache_modifier=".cg"), 0)
            eh += tl.sum(tl.load(at + 2 * BLOCK_M, mask=there, other=0.0, cache_modifier=".cg"), 0)
        a = clamped(over(over(eh, tl.sqrt(ee)), tl.sqrt(hh)), CLAMP)
        a = tl.where(found, a, 1.0 if INPUT else 0.0)
        if ticket == TILES:
            tl.store(used + m, a, mask=m < T)
        h = tl.load(at_h, mask=mask, other=0.0)
        mix = mixed(h, know, a[None, :] + tl.zeros_like(know), INPUT)
        tl.store(out + row[None, :] * D + n[:, None], mix, mask=mask)


def project(s: Shift, heads: Tensor, arrived: Tensor, indices: Tensor, out: Tensor, used: Tensor) -> None:
    """Starts `knowledge_shift_project`; arrived [16] int32 as `knowledge_shift_attend` left it, zero."""
    assert s.weight is not None and s.folded is not None
    (tokens, d), device = s.h_input.shape, s.h_input.device
    widest = max(s.weight.dtype.itemsize, s.folded.dtype.itemsize)
    fp16 = int(torch.float16 in (s.weight.dtype, s.folded.dtype))  # in two parts: BLOCK_K 128 spills
    options = tuning.choose("knowledge_shift_project", device, rows=tokens, bytes=widest, fp16=fp16)
    tiles, rows = -(-d // options["BLOCK_N"]), -(-tokens // options["BLOCK_M"])
    sums = launching.new((rows, tiles, 3, options["BLOCK_M"]), torch.float32, device)
    launching.launch(
        knowledge_shift_project, (2 * tiles, rows), heads, s.weight, s.weight.stride(0), s.weight.stride(1), s.bias,
        s.folded, s.folded.stride(0), s.folded.stride(1), s.folded_bias, s.h_input, s.h_input.stride(0), indices,
        s.token_to_case, arrived, sums, out, used, tokens, d, s.weight.shape[1], indices.shape[1], CLAMP=s.clamp,
        INPUT=s.orientation == "input", ITEMS=s.block_k, TILES=tiles, **options,
    )  # fmt: skip
