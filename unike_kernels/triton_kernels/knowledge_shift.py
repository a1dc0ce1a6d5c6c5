"""Launcher of `knowledge_shift`: one launch where alpha is given, one head is compared, or weights are folded.

Else, for encoders that are not affine or that gradients reach: attention, linear maps as exact as float32, and the mix.
"""

from typing import Any

import torch
from torch import Tensor

from . import launching, tuning
from .cosine_topk import MOST_LISTS, merge_block
from .knowledge_shift_arguments import Shift, arguments, block
from .knowledge_shift_cases import knowledge_shift_cases
from .knowledge_shift_kernels import knowledge_shift_attend, knowledge_shift_linear, knowledge_shift_mix
from .knowledge_shift_project import knowledge_shift_project
from .tickets import COUNTERS
from .tuning import Row

FEW_TOKENS = 64  # up to here a program takes one token, then a tile of tokens; this operator's own choice of grid

# Tiles hold BLOCK_R x BLOCK_K scores in float32; BLOCK_D, BLOCK_V: the columns of keys and values read at once.
tuning.ROWS += [
    Row("knowledge_shift_attend", tuning.INTERPRETER, {}, {"BLOCK_R": 32, "BLOCK_D": 32, "BLOCK_V": 32}),
    # The last rows are float32's: products without tensor cores keep both operands in registers.
    Row("knowledge_shift_attend", 0, {"bytes": 2, "rows": 16, "items": 64}, _DECODE := {"BLOCK_R": 16, "num_warps": 4}),
    Row("knowledge_shift_attend", 0, {"bytes": 2, "rows": 16, "items": 128}, {**_DECODE, "BLOCK_D": 64, "BLOCK_V": 64}),
    Row(
        "knowledge_shift_attend",
        0,
        {"bytes": 2, "items": 64},
        {"BLOCK_R": 64, "BLOCK_D": 64, "BLOCK_V": 64, "num_warps": 4},
    ),
    Row(
        "knowledge_shift_attend",
        0,
        {"bytes": 2, "items": 128},
        {"BLOCK_R": 64, "BLOCK_D": 64, "BLOCK_V": 64, "num_warps": 8},
    ),
    Row("knowledge_shift_attend", 0, {"rows": 16, "items": 128}, {"BLOCK_R": 16, "BLOCK_D": 16, "BLOCK_V": 16}),
    Row("knowledge_shift_attend", 0, {"items": 128}, {"BLOCK_R": 32, "BLOCK_D": 16, "BLOCK_V": 16, "num_warps": 8}),
    Row("knowledge_shift_attend", 0, {}, {"BLOCK_R": 16, "BLOCK_D": 16, "BLOCK_V": 16, "num_warps": 8}),
    Row("knowledge_shift_linear", tuning.INTERPRETER, {}, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}),
    Row("knowledge_shift_linear", 0, {"rows": 16, "bytes": 2}, _FEW := {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128}),
    Row("knowledge_shift_linear", 0, {"rows": 16}, {**_FEW, "BLOCK_K": 64}),
    Row("knowledge_shift_linear", 0, {"bytes": 2}, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}),
    Row("knowledge_shift_linear", 0, {}, {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8}),
    Row("knowledge_shift_mix", 0, {}, {"BLOCK": 1024, "num_warps": 4}),
]


def knowledge_shift(*args: Any) -> tuple[Tensor, Tensor]:
    """h [T, d], dtype of h_input, and the alpha used, float32: see `ops.knowledge_shift`."""
    s = arguments(*args)
    tokens, d = s.h_input.shape
    count = s.indices.shape[0] if s.alpha_per_case else tokens
    out = launching.new((tokens, d), s.h_input.dtype, s.h_input.device)
    used = launching.new((count,), torch.float32, s.h_input.device)
    if s.weight is not None and s.folded is None and not (s.encoder or s.rescale):
        s = s._replace(folded=s.weight, folded_bias=s.bias)  # the encoder is the identity
    if s.weight is None:
        one_head, affine = s.q.shape[1] == 1, not s.encoder and s.folded is None
        if s.mode == "given" or (s.mode == "token" and one_head and affine):
            attend(s, out, used, mix=True)
            return out, used
        if s.mode == "case" and one_head and affine:
            shift_cases(s, _counters(out), out, used)
            return out, used
    elif not s.rescale and (s.mode == "given" or s.folded is not None):
        project(s, _counters(out), out, used)
        return out, used
    know, encoded, _ = knowledge(s)
    mix(s, know, encoded, out, used)
    return out, used


def knowledge(s: Shift) -> tuple[Tensor, Tensor, tuple[Tensor, list[Tensor]]]:
    """h_know [T, d] and what alpha compares with h_input, per token or (encoded per case) per case; and the steps
    between, for gradients: the heads, and the input of each layer of the encoder. All float32.
    """
    tokens = s.h_input.shape[0]
    heads = launching.new((tokens, s.q.shape[1] * s.item_values.shape[2]), torch.float32, s.h_input.device)
    attend(s, heads, heads, mix=False)
    know = heads if s.weight is None else linear(heads, s.weight, s.bias)
    encoded, rows = know, s.case_tokens if s.mode == "case" else None
    inputs: list[Tensor] = []
    if s.mode == "given":
        return know, know, (heads, inputs)
    if s.folded is not None:
        return know, linear(heads, s.folded, s.folded_bias, rows=rows), (heads, inputs)
    if s.encoder_rows is not None:
        encoded = launching.new(s.h_input.shape, torch.float32, s.h_input.device)
        attend(s._replace(item_values=s.encoder_rows), encoded, encoded, mix=False)
        return know, encoded, (heads, inputs)
    layers = list(zip(s.encoder[::2], s.encoder[1::2], strict=True))
    for i, (weight, bias) in enumerate(layers):
        inputs.append(encoded)
        at, act = (rows, "identity") if i == 0 else (None, s.encoder_act)
        encoded = linear(encoded, weight, bias, rows=at, act=act)
    return know, encoded, (heads, inputs)


def attend(
    s: Shift, out: Tensor, used: Tensor, *, mix: bool, found: Tensor | None = None, scores: Tensor | None = None
) -> None:
    """Starts `knowledge_shift_attend`: the heads into `out`, or, with mix, the result and the alphas.

    found: of a search; then s.indices and scores are written.
    """
    encoded = s.encoder_rows if mix and s.mode == "token" else None
    tokens, heads, hd = s.q.shape
    kv_heads, hv = s.item_values.shape[1:]
    tiled = s.token_to_case is not None and tokens > FEW_TOKENS
    options = attend_options(s, tiled, found=found)
    grid = (attend_tiles(s, tiled, options["BLOCK_R"]), kv_heads)
    launching.launch(
        knowledge_shift_attend, grid,
        s.q, s.q.stride(0), s.q.stride(1), s.item_keys, s.item_keys.stride(0), s.item_keys.stride(1),
        s.item_values, s.item_values.stride(0), s.item_values.stride(1), s.indices,
        s.indices if s.token_to_case is None else s.token_to_case, s.h_input, s.h_input.stride(0),
        s.h_input if s.alpha is None else s.alpha, out, used, encoded, 0 if encoded is None else encoded.stride(0),
        found, 0 if found is None else found.shape[1] * found.shape[2], scores, tokens, s.indices.shape[0],
        s.indices.shape[1],
        s.scaling, 1.0 if s.softcap is None else s.softcap,
        HEADS=heads, GROUP=heads // kv_heads, HD=hd, HV=hv, PER_CASE=s.token_to_case is not None, TILED=tiled, MIX=mix,
        COS=mix and s.mode == "token", ALPHA_PER_CASE=s.alpha_per_case, INPUT=s.orientation == "input",
        CLAMP=s.clamp, RESCALE=mix and s.rescale, SOFTCAP=s.softcap is not None, **options,
    )  # fmt: skip


def shift_cases(s: Shift, counters: Tensor, out: Tensor, used: Tensor) -> None:
    """Starts `knowledge_shift_cases`; counters [COUNTERS] int32, zeros."""
    (tokens, _, hd), cases = s.q.shape, s.indices.shape[0]
    tiled = tokens > FEW_TOKENS
    options = attend_options(s, tiled)
    encoded = s.encoder_rows
    launching.launch(
        knowledge_shift_cases, (cases + attend_tiles(s, tiled, options["BLOCK_R"]),),
        s.q, s.q.stride(0), s.q.stride(1), s.item_keys, s.item_keys.stride(0), s.item_keys.stride(1),
        s.item_values, s.item_values.stride(0), s.item_values.stride(1), s.indices, s.token_to_case, s.h_input,
        s.h_input.stride(0), s.case_tokens, out, used, encoded, 0 if encoded is None else encoded.stride(0), counters,
        tokens, cases, s.indices.shape[1], s.scaling, 1.0 if s.softcap is None else s.softcap,
        HD=hd, TILED=tiled, INPUT=s.orientation == "input", CLAMP=s.clamp, RESCALE=s.rescale,
        SOFTCAP=s.softcap is not None, **options,
    )  # fmt: skip


def _counters(out: Tensor) -> Tensor:
    """Zeros for a launch that draws tickets. Nothing runs before it that could set them, hence a fill of 16 bytes."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=out.device)


def attend_tiles(s: Shift, tiled: bool, rows: int) -> int:
    """How many tiles of `rows` rows (token, query head) a key head has; one per token, unless tiled."""
    tokens, heads, _ = s.q.shape
    return -(-tokens * (heads // s.item_values.shape[1]) // rows) if tiled else max(tokens, 1)


def attend_options(
    s: Shift, tiled: bool, kernel: str = "knowledge_shift_attend", found: Tensor | None = None
) -> dict[str, int]:
    """Blocks and warps of the attention kernels: rows (token, head) of a tile, items, columns."""
    heads, hd = s.q.shape[1:]
    group, hv = heads // s.item_values.shape[1], s.item_values.shape[2]
    few = block(group)
    sizes = {"items": s.block_k, "bytes": max(t.dtype.itemsize for t in (s.q, s.item_keys, s.item_values))}
    options: dict[str, int] = dict(tuning.choose(kernel, s.q.device, rows=1 << 30 if tiled else few, **sizes))
    if not tiled:
        options["BLOCK_R"] = few
    # With a second table beside the values, float16 in two parts spills at 128.
    wide = 128 if s.block_k <= 64 and (s.encoder_rows is None or s.encoder_rows.dtype != torch.float16) else 64
    options["BLOCK_D"] = min(options.get("BLOCK_D", wide), block(hd))
    options["BLOCK_V"] = min(options.get("BLOCK_V", wide), block(hv))
    if found is not None:
        # 128 of 1024 spill. Never less than the lists of a query, at most MOST_LISTS: see `merged`.
        options["BLOCK_MERGE"] = min(merge_block(found), 1024 if s.block_k < 128 else MOST_LISTS)
    return {"BLOCK_K": s.block_k, **options}


def project(
    s: Shift, counters: Tensor, out: Tensor, used: Tensor, found: Tensor | None = None, scores: Tensor | None = None
) -> None:
    """Starts `knowledge_shift_project`; counters [COUNTERS] int32, zeros. found: of a search, as in `attend`."""
    assert s.weight is not None
    (tokens, d), (_, heads, hd), (kv_heads, hv) = s.h_input.shape, s.q.shape, s.item_values.shape[1:]
    cases, device, width = s.indices.shape[0], s.h_input.device, heads * hv
    tiled = s.token_to_case is not None and tokens > FEW_TOKENS
    attending = attend_options(s, tiled, found=found)
    folded = None if s.mode == "given" else s.folded
    weights = [w for w in (s.weight, folded) if w is not None]
    options = tuning.choose(
        "knowledge_shift_project", device, rows=tokens, bytes=max(w.dtype.itemsize for w in weights),
        fp16=int(torch.float16 in (w.dtype for w in weights)),  # in two parts: BLOCK_W 128 spills
    )  # fmt: skip
    block_m, tiles = options["BLOCK_M"], -(-d // options["BLOCK_N"])
    rows = -(-(cases if s.mode == "case" else tokens) // block_m)
    heads_of = launching.new((tokens, width), torch.float32, device)
    sums = None if folded is None else launching.new((rows, tiles, 3, block_m), torch.float32, device)
    attend_tickets = attend_tiles(s, tiled, attending["BLOCK_R"]) * kv_heads
    fold_tickets = 0 if folded is None else rows * tiles
    launching.launch(
        knowledge_shift_project, (attend_tickets + fold_tickets + max(1, -(-tokens // block_m)) * tiles,),
        s.q, s.q.stride(0), s.q.stride(1), s.item_keys, s.item_keys.stride(0), s.item_keys.stride(1),
        s.item_values, s.item_values.stride(0), s.item_values.stride(1), s.indices, s.token_to_case, s.h_input,
        s.h_input.stride(0), s.alpha, s.case_tokens, found, 0 if found is None else found.shape[1] * found.shape[2],
        scores, s.weight, s.weight.stride(0), s.weight.stride(1), s.bias, folded,
        0 if folded is None else folded.stride(0), 0 if folded is None else folded.stride(1),
        None if folded is None else s.folded_bias, heads_of, sums, counters, out, used, tokens, cases, d,
        s.indices.shape[1], s.scaling, 1.0 if s.softcap is None else s.softcap, attend_tickets, fold_tickets,
        HEADS=heads, GROUP=heads // kv_heads, HD=hd, HV=hv, TILED=tiled, MODE=s.mode, ALPHA_PER_CASE=s.alpha_per_case,
        INPUT=s.orientation == "input", CLAMP=s.clamp, SOFTCAP=s.softcap is not None, TILES=tiles,
        **{**attending, **options},
    )  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, rows: Tensor | None = None, act: str = "identity"
) -> Tensor:
    """act(x[rows]) weight^T + bias, float32; x float32, contiguous; weight [out, in] with any strides."""
    count = x.shape[0] if rows is None else rows.shape[0]
    out = launching.new((count, weight.shape[0]), torch.float32, x.device)
    options = tuning.choose("knowledge_shift_linear", x.device, rows=count, bytes=weight.dtype.itemsize)
    grid = (-(-weight.shape[0] // options["BLOCK_N"]), -(-count // options["BLOCK_M"]))
    launching.launch(
        knowledge_shift_linear, grid, x, x if rows is None else rows, weight, weight.stride(0), weight.stride(1),
        x if bias is None else bias, out, count, weight.shape[0], weight.shape[1], x.shape[1],
        ACT=act, GATHER=rows is not None, BIAS=bias is not None, **options,
    )  # fmt: skip
    return out


def mix(s: Shift, know: Tensor, encoded: Tensor, out: Tensor, used: Tensor) -> None:
    """Starts `knowledge_shift_mix`."""
    tokens, d = s.h_input.shape
    grid = (tokens + (s.indices.shape[0] if s.alpha_per_case else 0),)
    launching.launch(
        knowledge_shift_mix, grid, s.h_input, s.h_input.stride(0), know, encoded, s.indices,
        s.indices if s.token_to_case is None else s.token_to_case,
        s.indices if s.case_tokens is None else s.case_tokens, know if s.alpha is None else s.alpha, out, used, tokens,
        s.indices.shape[1], d, PER_CASE=s.token_to_case is not None, ALPHA_PER_CASE=s.alpha_per_case, MODE=s.mode,
        ENCODED_PER_CASE=s.encoded_per_case, CLAMP=s.clamp, INPUT=s.orientation == "input", RESCALE=s.rescale,
        BLOCK_K=s.block_k, **tuning.choose("knowledge_shift_mix", s.h_input.device),
    )  # fmt: skip
