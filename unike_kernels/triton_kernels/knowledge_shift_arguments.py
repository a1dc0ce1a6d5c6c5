"""The arguments of `knowledge_shift` as kernels take them, whatever they are written in. Imports no triton."""

import math
from typing import Any, NamedTuple

from torch import Tensor

from .. import reference
from .launching import contiguous_rows


class Shift(NamedTuple):
    """The arguments of the operator in the layout of the kernels, and what follows from them."""

    h_input: Tensor  # [T, d], columns contiguous, as of the three below
    q: Tensor  # [T, H, hd]
    item_keys: Tensor  # [N, Hkv, hd]
    item_values: Tensor  # [N, Hkv, hv]
    indices: Tensor  # [T or C, K], contiguous
    alpha: Tensor | None
    token_to_case: Tensor | None
    case_tokens: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    encoder: list[Tensor]
    encoder_act: str
    orientation: str
    clamp: bool
    scaling: float
    softcap: float | None
    rescale: bool  # of the raw form only
    encoder_rows: Tensor | None = None  # [N, 1, d], columns contiguous
    folded: Tensor | None = None
    folded_bias: Tensor | None = None

    @property
    def alpha_per_case(self) -> bool:
        """Whether there is one alpha per case."""
        return reference.alpha_is_per_case(self.alpha, self.indices, self.token_to_case, self.case_tokens)

    @property
    def mode(self) -> str:
        """Where alpha comes from, as `knowledge_shift_mix` takes it."""
        return "given" if self.alpha is not None else "token" if self.case_tokens is None else "case"

    @property
    def encoded_per_case(self) -> bool:
        """Whether the encoder ran on the rows of the case tokens only."""
        return self.mode == "case" and (len(self.encoder) > 0 or self.folded is not None)

    @property
    def block_k(self) -> int:
        """The items of a tile."""
        return block(self.indices.shape[1])


def block(size: int) -> int:
    """The smallest power of two that holds `size`, at least 16."""
    return max(16, 1 << (size - 1).bit_length()) if size > 0 else 16


def arguments(*args: Any) -> Shift:
    """The operator's arguments as `Shift`; copies only what has no contiguous columns."""
    h_input, q, item_keys, item_values, indices, alpha, token_to_case, case_tokens, weight, bias, encoder = args[:11]
    encoder_act, orientation, clamp, scaling, softcap, rescale, encoder_rows, folded, folded_bias = args[11:]
    raw = q.dim() == 2
    if raw:
        q, item_keys, item_values = q[:, None], item_keys[:, None], item_values[:, None]
    if item_keys.shape[0] == 0:
        indices = indices[:, :0]
    h_input, q, item_keys, item_values = (contiguous_rows(t) for t in (h_input, q, item_keys, item_values))
    encoder_rows = None if encoder_rows is None else contiguous_rows(encoder_rows[:, None])
    alpha, token_to_case, case_tokens, bias, folded_bias = (
        None if t is None else t.contiguous() for t in (alpha, token_to_case, case_tokens, bias, folded_bias)
    )
    weights = [t if i % 2 == 0 else t.contiguous() for i, t in enumerate(encoder)]  # weights with any strides
    scaling = 1 / math.sqrt(q.shape[2]) if scaling is None else scaling
    return Shift(
        h_input, q, item_keys, item_values, indices.contiguous(), alpha, token_to_case, case_tokens, weight, bias,
        weights, encoder_act, orientation, clamp, scaling, softcap, raw and rescale, encoder_rows, folded, folded_bias,
    )  # fmt: skip
