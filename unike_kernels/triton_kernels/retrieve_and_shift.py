"""Launcher of `retrieve_and_shift`, two launches: the scan of the search, then the shift, which merges what that found.

Merging in every program of a token reads the lists (8 KP bytes each, 80 KB for 10,000 items) once per key head from the
L2 cache, and saves a launch.
"""

from typing import Any

import torch
from torch import Tensor

from . import launching
from .cosine_topk import scan
from .knowledge_shift import attend, project
from .knowledge_shift_arguments import arguments
from .launching import contiguous_rows
from .tickets import COUNTERS


def retrieve_and_shift(
    h_input: Tensor,
    q: Tensor,
    item_keys: Tensor,
    item_values: Tensor,
    tap: Tensor,
    sem: Tensor,
    k: int,
    sem_norm: Tensor | None,
    spans: Tensor,
    token_to_case: Tensor | None,
    selected: Tensor | None,
    alpha: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    encoder_rows: Tensor | None,
    folded: Tensor | None,
    folded_bias: Tensor | None,
    orientation: str,
    clamp: bool,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `ops.retrieve_and_shift`, for up to 64 tokens and k, M up to 128: h, alpha, scores and indices."""
    (tokens, d), device = h_input.shape, h_input.device
    indices = launching.new((tokens, k), torch.int64, device)
    scores = launching.new((tokens, k), torch.float32, device)
    out = launching.new((tokens, d), h_input.dtype, device)
    used = launching.new((tokens,), torch.float32, device)
    if tokens == 0:
        return out, used, scores, indices
    s = arguments(
        h_input, q, item_keys, item_values, indices, alpha, None, None, weight, bias, [], "identity", orientation,
        clamp, *rest, encoder_rows, folded, folded_bias,
    )._replace(indices=indices)  # fmt: skip
    tap, sem = contiguous_rows(tap), contiguous_rows(sem)
    spans = spans.contiguous()
    ranges = spans[1 if selected is None else 0].expand(tokens, 2)
    token_to_case, selected = (None if t is None else t.contiguous() for t in (token_to_case, selected))
    counters = None if weight is None else launching.new((COUNTERS,), torch.int32, device)
    found = scan(tap, sem, k, sem_norm, ranges, token_to_case, selected, spans, counters)
    if counters is None:
        attend(s, out, used, mix=True, found=found, scores=scores)
        return out, used, scores, indices
    if found.shape[2] == 0:  # nothing to search: no launch has set them
        counters.zero_()
    project(s, counters, out, used, found, scores)
    return out, used, scores, indices
