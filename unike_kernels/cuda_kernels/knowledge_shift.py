"""Launcher of `knowledge_shift` for few tokens: one launch, a cluster of blocks per token and key head."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..triton_kernels import launching as allocating
from ..triton_kernels import tuning
from ..triton_kernels.knowledge_shift_arguments import Shift, arguments
from ..triton_kernels.tuning import Row
from .launching import address, launch, name_of

KERNEL = "knowledge_shift_cluster"
MOST_TOKENS = 16  # more fill the device without clusters
MOST_ITEMS = 128
MOST_CASES = 2**16 - 1 - MOST_TOKENS  # to decide: a grid has a block or cluster for each, and for each token
MOST_COLUMNS = 1024  # of one block
MOST_CELLS = 2048  # columns x query heads of one block
MOST_ROWS = 4  # query heads of one block: with 8, a thread takes 200 registers
CLUSTERS = 90  # the architecture from which on a cluster may have more than one block

# SPLIT: blocks that share the columns of a head; ROWS: query heads of a key head that a cluster takes. Estimated: a
# block draws about 110 GB/s from the L2 cache and an exchange between blocks costs some 0.3 us, so that slices of fewer
# than 128 columns do not pay; up to two blocks for each of 132 multiprocessors, query heads apart are quicker.
tuning.ROWS += [
    Row(KERNEL, 0, {"columns": 128, "heads": 264}, {"SPLIT": 1, "ROWS": 1}),
    Row(KERNEL, 0, {"columns": 128}, {"SPLIT": 1, "ROWS": 4}),
    Row(KERNEL, 0, {"columns": 256}, {"SPLIT": 2, "ROWS": 4}),
    Row(KERNEL, 0, {"columns": 512}, {"SPLIT": 4, "ROWS": 4}),
    Row(KERNEL, 0, {}, {"SPLIT": 8, "ROWS": 2}),
]


def refusal(args: Sequence[Any]) -> str | None:
    """Why the kernel cannot take the operator's arguments; None: it can."""
    h_input, q, item_keys, item_values, indices, alpha, _, case_tokens, weight, _, encoder = args[:11]
    heads = 1 if q.dim() == 2 else q.shape[1]
    if h_input.shape[0] > MOST_TOKENS:
        return f"there are {h_input.shape[0]} tokens, and it takes at most {MOST_TOKENS}"
    if indices.shape[1] > MOST_ITEMS:
        return f"there are {indices.shape[1]} items per token, and it takes at most {MOST_ITEMS}"
    if alpha is None and case_tokens is not None and indices.shape[0] > MOST_CASES:
        return f"there are {indices.shape[0]} cases whose alpha is to be computed, and it takes at most {MOST_CASES}"
    if weight is not None:
        return "there is an output projection, and it projects nothing"
    if alpha is None and any(t is not None for t in args[17:19]):
        return "alpha is to be computed from encoder_rows or folded weights, and it compares what is known itself"
    if alpha is None and (encoder or heads > 1):
        return f"alpha is to be computed from {'an encoder' if encoder else f'{heads} heads'}, and it compares one head"
    if item_keys.dtype != item_values.dtype:
        return f"keys are {item_keys.dtype}, values {item_values.dtype}, and it takes both in one dtype"
    columns, arch = max(item_keys.shape[-1], item_values.shape[-1]), _architecture(h_input.device)
    if _width(columns, _most_blocks(arch)) > MOST_COLUMNS:
        most = MOST_COLUMNS * _most_blocks(arch)
        return f"a head has {columns} columns, and it takes at most {most} on compute capability {arch / 10}"
    return None


def faster(args: Sequence[Any]) -> bool:
    """Whether it is quicker than Triton's: for one head as wide as the hidden state, whose columns blocks share.

    H100, bf16, 40 items, d = 4096, one token: 17 against 77 us (16 tokens are one wave of blocks too, not measured);
    with 32 heads of 128 it loses, 10 against 6, and 17 against 10 at 16 tokens.
    """
    return args[1].dim() == 2


def _architecture(device: torch.device) -> int:
    """Of the code that runs: a module that was built for less than a device has runs on it without clusters."""
    arch, built = tuning.architecture(device), native.built_for(device)
    return arch if built is None else min(arch, built)


def _most_blocks(arch: int) -> int:
    return 8 if arch >= CLUSTERS or arch == tuning.INTERPRETER else 1


def _width(columns: int, split: int) -> int:
    """Columns of a block: multiples of 8, as csrc/knowledge_shift.cu has them."""
    return max(8, -(-columns // (8 * split)) * 8)


def choose(s: Shift) -> tuple[int, int]:
    """(blocks of a cluster, query heads of a cluster), each a power of two."""
    heads, group = s.q.shape[1], s.q.shape[1] // s.item_values.shape[1]
    columns = max(s.q.shape[2], s.item_values.shape[2])
    choice = tuning.choose(KERNEL, s.q.device, columns=columns, heads=s.q.shape[0] * heads)
    split = min(choice["SPLIT"], _most_blocks(_architecture(s.q.device)))
    while _width(columns, split) > MOST_COLUMNS:
        split *= 2
    rows = min(choice["ROWS"], MOST_ROWS, 1 << (group - 1).bit_length())
    while rows * _width(columns, split) > MOST_CELLS:
        rows //= 2
    return split, 2 if s.mode == "case" else rows


def knowledge_shift(*args: Any) -> tuple[Tensor, Tensor]:
    """h [T, d], dtype of h_input, and the alpha used, float32: see `ops.knowledge_shift`."""
    s = arguments(*args)
    tokens, d = s.h_input.shape
    cases, items = s.indices.shape
    out = allocating.new((tokens, d), s.h_input.dtype, s.h_input.device)
    used = allocating.new((cases if s.alpha_per_case else tokens,), torch.float32, s.h_input.device)
    if tokens == 0 and used.shape[0] == 0:
        return out, used
    key_heads, hv = s.item_values.shape[1:]
    launch(
        "knowledge_shift", out.device, (KERNEL,),
        *(_place(t, t.stride(1)) for t in (s.q, s.item_keys, s.item_values)), _place(s.h_input, hv),
        address(s.indices), address(s.token_to_case), address(s.case_tokens if s.mode == "case" else None),
        address(s.alpha), name_of((s.h_input if s.alpha is None else s.alpha).dtype), s.alpha_per_case, address(out),
        address(used), tokens, cases, items, key_heads, s.q.shape[1] // key_heads, s.q.shape[2], hv, s.scaling,
        s.softcap or 0.0, s.orientation == "input", s.clamp, s.rescale, *choose(s),
    )  # fmt: skip
    return out, used


def _place(t: Tensor, head: int) -> tuple[int, int, int, str]:
    """As the module takes a tensor: address, strides of rows and of heads, dtype."""
    return address(t), t.stride(0), head, name_of(t.dtype)
