"""Launcher of `knowledge_shift_backward`: the forward's steps are computed again, then run backwards.

The gradients of the items are gathered, not scattered: a stable sort of the indices says which entries (token, place)
hold an item, and a program per item adds them up in that order. Workspaces: float32 rows of the tokens, and 8 bytes
per token, head and place. Nothing is accumulated with atomics: equal runs give equal bits.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launching, tuning
from .knowledge_shift import FEW_TOKENS, attend_options, knowledge, linear
from .knowledge_shift_arguments import Shift, arguments, block
from .knowledge_shift_backward_kernels import (
    knowledge_shift_activation_grad,
    knowledge_shift_alpha_grad,
    knowledge_shift_attend_grad,
    knowledge_shift_case_sum,
    knowledge_shift_cosine_grad,
    knowledge_shift_items_grad,
    knowledge_shift_mix_grad,
    knowledge_shift_outer,
)
from .tuning import Row

tuning.ROWS += [
    Row("knowledge_shift_attend_grad", tuning.INTERPRETER, {}, {"BLOCK_R": 32, "BLOCK_D": 32, "BLOCK_V": 32}),
    Row("knowledge_shift_attend_grad", 0, {"rows": 16, "items": 64}, {"num_warps": 4, "BLOCK_D": 64, "BLOCK_V": 64}),
    Row("knowledge_shift_attend_grad", 0, {"rows": 16, "items": 128}, {"num_warps": 8, "BLOCK_D": 64, "BLOCK_V": 64}),
    # Tiles of 64 rows spill: 129 local stores on sm_90 with 4 warps and 64 items, 24 with 8 warps.
    Row("knowledge_shift_attend_grad", 0, {"items": 64}, {"BLOCK_R": 32, "BLOCK_D": 64, "BLOCK_V": 64, "num_warps": 8}),
    Row(
        "knowledge_shift_attend_grad", 0, {"items": 128}, {"BLOCK_R": 32, "BLOCK_D": 32, "BLOCK_V": 32, "num_warps": 8}
    ),
    Row("knowledge_shift_attend_grad", 0, {}, {"BLOCK_R": 16, "BLOCK_D": 16, "BLOCK_V": 16, "num_warps": 8}),
    Row("knowledge_shift_items_grad", 0, {}, {"BLOCK_J": 16, "num_warps": 4}),
    Row("knowledge_shift_case_sum", 0, {}, {"BLOCK_C": 16, "BLOCK": 128, "num_warps": 4}),
    Row("knowledge_shift_outer", tuning.INTERPRETER, {}, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}),
    Row("knowledge_shift_outer", 0, {}, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4}),
]


def knowledge_shift_backward(grads: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    """The gradients of the leaves that `needs`, the last argument, asks for, in their order, shape and dtype."""
    *args, needs = rest
    s, leaves = arguments(*args), [*args[:10], *args[10]]
    wants = list(needs[: len(leaves)])
    grad, grad_used = grads[0].contiguous(), grads[1].contiguous()
    know, encoded, (heads, inputs) = knowledge(s)
    found: dict[int, Tensor] = {}

    weights, slopes, through = _through_alpha(s, grad, grad_used, know, encoded)
    if wants[5]:
        found[5] = slopes.to(args[5].dtype)
    if s.mode != "given" and s.encoder:
        of_encoder, through = _through_encoder(s, through, slopes, inputs, wants[10:])
        found |= {10 + i: gradient for i, gradient in of_encoder.items()}
    grad_input, grad_know = _through_mix(s, grad, know, encoded, weights, slopes, through, wants[0])
    if wants[0]:
        found[0] = grad_input

    of_heads = grad_know
    if s.weight is not None:
        if wants[8]:
            found[8] = _outer(grad_know, heads, s.weight.dtype)
        if wants[9] and s.bias is not None:
            found[9] = _outer(grad_know, None, s.bias.dtype)
        if any(wants[1:4]):
            of_heads = linear(grad_know, s.weight.t(), None)
    if any(wants[1:4]):
        found |= _through_attention(s, of_heads, wants)
    return [found[i].view(leaves[i].shape) for i, wanted in enumerate(wants) if wanted]


def _flags(s: Shift) -> dict[str, Any]:
    return {
        "MODE": s.mode,
        "ENCODED_PER_CASE": s.encoded_per_case,
        "INPUT": s.orientation == "input",
        "BLOCK_K": s.block_k,
        **tuning.choose("knowledge_shift_mix", s.h_input.device),
    }


def _pointers(s: Shift) -> tuple[Tensor, Tensor]:
    """token_to_case and case_tokens, or any tensor where there is none: it is not read."""
    return (
        s.indices if s.token_to_case is None else s.token_to_case,
        s.indices if s.case_tokens is None else s.case_tokens,
    )


def _through_alpha(
    s: Shift, grad: Tensor, grad_used: Tensor, know: Tensor, encoded: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The alpha of each token [T]; per alpha, the gradient of the number given or of the cosine [M]; and of what is
    compared with h_input, [M, d].
    """
    (tokens, d), device = s.h_input.shape, s.h_input.device
    cases, items = s.indices.shape
    owner, at = _pointers(s)
    alpha = know if s.alpha is None else s.alpha
    weights, of_alpha = (launching.new((tokens,), torch.float32, device) for _ in range(2))
    launching.launch(
        knowledge_shift_alpha_grad, (tokens,), grad, s.h_input, s.h_input.stride(0), know, encoded, s.indices, owner,
        at, alpha, weights, of_alpha, tokens, items, d, PER_CASE=s.token_to_case is not None,
        ALPHA_PER_CASE=s.alpha_per_case, CLAMP=s.clamp, RESCALE=s.rescale, **_flags(s),
    )  # fmt: skip
    count = tokens
    if s.alpha_per_case:
        count, of_token = cases, of_alpha
        of_alpha = launching.new((cases,), torch.float32, device)
        options = tuning.choose("knowledge_shift_case_sum", device)
        grid = (-(-cases // options["BLOCK_C"]),)
        launching.launch(knowledge_shift_case_sum, grid, of_token, owner, of_alpha, tokens, cases, **options)
    slopes = launching.new((count,), torch.float32, device)
    through = launching.new((0 if s.mode == "given" else count, d), torch.float32, device)
    launching.launch(
        knowledge_shift_cosine_grad, (count,), s.h_input, s.h_input.stride(0), encoded, s.indices, at, alpha,
        grad_used, of_alpha, through, slopes, items, d, OWN_ITEMS=s.token_to_case is None or s.alpha_per_case,
        token_to_case=owner, CLAMP=s.clamp, **_flags(s),
    )  # fmt: skip
    return weights, slopes, through


def _through_encoder(
    s: Shift, grad: Tensor, slopes: Tensor, inputs: list[Tensor], wants: Sequence[bool]
) -> tuple[dict[int, Tensor], Tensor]:
    """The gradients of the encoder's tensors by their place, and of the encoder's input."""
    found: dict[int, Tensor] = {}
    for i in reversed(range(len(inputs))):
        weight, bias = s.encoder[2 * i], s.encoder[2 * i + 1]
        rows = s.case_tokens if i == 0 and s.mode == "case" else None
        act = "identity" if i == 0 else s.encoder_act
        if wants[2 * i]:
            found[2 * i] = _outer(grad, inputs[i], weight.dtype, rows=rows, act=act, slopes=slopes)
        if wants[2 * i + 1]:
            found[2 * i + 1] = _outer(grad, None, bias.dtype)
        grad = linear(grad, weight.t(), None)
        if act != "identity":
            options = tuning.choose("knowledge_shift_mix", grad.device)
            grid = (grad.shape[0], -(-grad.shape[1] // options["BLOCK"]))
            launching.launch(knowledge_shift_activation_grad, grid, inputs[i], grad, grad.shape[1], ACT=act, **options)
    return found, grad


def _through_mix(
    s: Shift, grad: Tensor, know: Tensor, encoded: Tensor, weights: Tensor, slopes: Tensor, through: Tensor, want: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of h_input, dtype of h_input, and of h_know, float32."""
    tokens, d = s.h_input.shape
    owner, at = _pointers(s)
    grad_know = launching.new((tokens, d), torch.float32, s.h_input.device)
    grad_input = launching.new((tokens if want else 0, d), s.h_input.dtype, s.h_input.device)
    launching.launch(
        knowledge_shift_mix_grad, (tokens,), grad, s.h_input, s.h_input.stride(0), know, encoded, at, s.indices, owner,
        weights, slopes, through, grad_input, grad_know, tokens, s.indices.shape[1], d,
        PER_CASE=s.token_to_case is not None, RESCALE=s.rescale, WANT_INPUT=want, **_flags(s),
    )  # fmt: skip
    return grad_input, grad_know


def _outer(
    grad: Tensor, x: Tensor | None, dtype: torch.dtype, *, rows: Tensor | None = None, act: str = "identity",
    slopes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """grad^T act(x[rows]); without x, the sum of the rows of grad. slopes: 0 where a row of grad is 0 and x unknown."""
    (count, out), width = grad.shape, 0 if x is None else x.shape[1]
    result = launching.new((out,) if x is None else (out, width), dtype, grad.device)
    options = tuning.choose("knowledge_shift_outer", grad.device)
    grid = (-(-out // options["BLOCK_N"]), 1 if x is None else -(-width // options["BLOCK_K"]))
    launching.launch(
        knowledge_shift_outer, grid, grad, grad if x is None else x, grad if rows is None else rows,
        grad if slopes is None else slopes, result, count, out, width, width, ACT=act, GATHER=rows is not None,
        SOME=slopes is not None, BIAS=x is None, **options,
    )  # fmt: skip
    return result


def _through_attention(s: Shift, grad: Tensor, wants: Sequence[bool]) -> dict[int, Tensor]:
    """The gradients of q, item_keys and item_values (places 1, 2, 3) from that of the heads [T, H hv], float32."""
    tokens, heads, hd = s.q.shape
    kv_heads, hv = s.item_values.shape[1:]
    device, items, group = s.q.device, s.indices.shape[1], heads // kv_heads
    tiled = s.token_to_case is not None and tokens > FEW_TOKENS
    options = attend_options(s, tiled, "knowledge_shift_attend_grad")
    grad_q = launching.new((tokens, heads, hd), s.q.dtype, device)
    p, ds = (launching.new((tokens, heads, items), torch.float32, device) for _ in range(2))
    launching.launch(
        knowledge_shift_attend_grad, (-(-tokens * group // options["BLOCK_R"]) if tiled else tokens, kv_heads),
        s.q, s.q.stride(0), s.q.stride(1), s.item_keys, s.item_keys.stride(0), s.item_keys.stride(1),
        s.item_values, s.item_values.stride(0), s.item_values.stride(1), s.indices, _pointers(s)[0], grad, grad_q,
        p, ds, tokens, items, s.scaling, 1.0 if s.softcap is None else s.softcap, HEADS=heads, GROUP=group, HD=hd,
        HV=hv, PER_CASE=s.token_to_case is not None, TILED=tiled, SOFTCAP=s.softcap is not None, **options,
    )  # fmt: skip
    found = {1: grad_q}
    if not (wants[2] or wants[3]):
        return found
    first, order = _entries(s)
    grad = grad.view(tokens, heads, hv)
    for place, weights, x, like in ((2, ds, s.q, s.item_keys), (3, p, grad, s.item_values)):
        if not wants[place]:
            continue
        found[place] = launching.new(like.shape, like.dtype, device)
        count, _, width = like.shape
        blocks = {"BLOCK": min(128, block(width)), **tuning.choose("knowledge_shift_items_grad", device)}
        launching.launch(
            knowledge_shift_items_grad, (count, kv_heads, -(-width // blocks["BLOCK"])), first, order, weights, x,
            x.stride(0), x.stride(1), found[place], items, HEADS=heads, GROUP=group, WIDTH=width, **blocks,
        )  # fmt: skip
    return found


def _entries(s: Shift) -> tuple[Tensor, Tensor]:
    """order [T K]: the places of the flattened indices of the tokens, by item, then by token; first [N + 1]: where each
    item begins in it. By torch's stable sort: shapes do not depend on the data, and the order is fixed.
    """
    indices, owner = s.indices, s.token_to_case
    if owner is not None:
        none = indices.new_full((1, indices.shape[1]), -1)
        indices = torch.cat([none, indices])[owner.clamp(min=-1) + 1]
    items, order = indices.flatten().sort(stable=True)
    return torch.searchsorted(items, torch.arange(s.item_keys.shape[0] + 1, device=items.device)), order
