"""What is known of an affine Enc_sem before any token comes: its rows of a memory, or one map with the projection.

Made by whichever call comes first, on its stream; it is there when these return, as others read it from theirs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .cuda_kernels.launching import wait_for_stream
from .reference import compute_dtype


@torch.no_grad()
def encoded_rows(values: Tensor, encoder: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Enc of every item, [N, d] of values [N, d]; in fp32, rounded once to their dtype.

    As Enc's own output would be in that dtype. The rounding is independent from element to element, so that it moves a
    cosine by 2^-9 / sqrt(3 d) or so, 2e-5 for bf16 and d = 4096; rows in fp32 would double the bytes of every token.
    """
    wide = compute_dtype(values)
    with torch.autocast(values.device.type, enabled=False):
        parts = [reference.encode(part.to(wide), encoder).to(values.dtype) for part in values.split(4096)]
    rows = torch.cat(parts) if parts else values
    wait_for_stream(rows.device)
    return rows


@torch.no_grad()
def folded(weight: Tensor, bias: Tensor | None, encoder: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Enc behind the projection (weight [d, H hv], bias [d] or None) as one (weight, bias); in fp32, rounded once."""
    wide = compute_dtype(weight)
    with torch.autocast(weight.device.type, enabled=False):
        w, b = weight.to(wide), weight.new_zeros(len(weight), dtype=wide) if bias is None else bias.to(wide)
        for weight_i, bias_i in encoder:
            w, b = weight_i.to(wide) @ w, weight_i.to(wide) @ b + bias_i.to(wide)
    narrow = w.to(weight.dtype), b.to(weight.dtype)
    wait_for_stream(weight.device)
    return narrow
