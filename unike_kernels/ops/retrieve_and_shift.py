"""retrieve_and_shift: cosine_topk and knowledge_shift of every token in one, for few tokens while decoding."""

import torch
from torch import Tensor

from ..reference import Layer, compute_dtype
from ._checks import Check, check_shape, require, require_tensors, shape
from .cosine_topk import check_arguments as check_search
from .knowledge_shift import check_arguments as check_shift


def retrieve_and_shift(
    h_input: Tensor,
    q: Tensor,
    item_keys: Tensor,
    item_values: Tensor,
    tap: Tensor,
    sem: Tensor,
    k: int,
    *,
    spans: Tensor,
    sem_norm: Tensor | None = None,
    token_to_case: Tensor | None = None,
    selected: Tensor | None = None,
    alpha: Tensor | None = None,
    out_proj: Layer | None = None,
    encoder_rows: Tensor | None = None,
    folded: Layer | None = None,
    orientation: str = "knowledge",
    clamp: bool = True,
    scaling: float | None = None,
    softcap: float | None = None,
    rescale: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """knowledge_shift by the k items that cosine_topk finds for every token, in two launches.

    h_input, q, item_keys, item_values, out_proj, encoder_rows, folded, orientation, clamp, scaling, softcap, rescale:
        as in `knowledge_shift`; alpha: [T], or None, which takes one head (`raw`) or out_proj and folded (`projected`).
    tap: [T, d'], the queries; sem: [N, d'], the items' keys; sem_norm: [N], their norms (None: computed here).
    spans: [2, 2] int64, on the device: the memory's rows are spans[0, 0] to spans[0, 1], those of all items spans[1, 0]
        to spans[1, 1]. Without selected, every token sees spans[1].
    token_to_case: [T] int64, -1: a token that retrieves nothing and is left alone. None: there is none.
    selected: [C, M] int64, with token_to_case: the edits of each case, -1 padded. A token then sees spans[0], and the
        own item spans[0, 1] + e of each edit e of its case, where there is one; nothing, if its case has no edit.
    backend: as everywhere; triton takes up to 64 tokens, k and M to 128.
    Returns h [T, d], alpha [T] and scores [T, k], float32 (float64 if an input is), and indices [T, k] int64, as the
    two operators do: ties go to the lowest index, -inf and -1 pad. For inference: nothing here has a gradient.
    """
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, but got {type(k).__name__}")
    if orientation not in ("knowledge", "input"):
        raise ValueError(f"orientation must be 'knowledge' or 'input', but got {orientation!r}")
    (weight, bias), (folded_weight, folded_bias) = out_proj or (None, None), folded or (None, None)
    floats = {"h_input": h_input, "q": q, "item_keys": item_keys, "item_values": item_values, "tap": tap, "sem": sem}
    required = [*floats, "spans"]
    # torch 2.6's compiler has no |= for dicts.
    floats.update({"sem_norm": sem_norm, "alpha": alpha, "out_proj weight": weight, "out_proj bias": bias})
    floats.update({"encoder_rows": encoder_rows, "folded weight": folded_weight, "folded bias": folded_bias})
    require_tensors(required, floats, {"spans": spans, "token_to_case": token_to_case, "selected": selected})
    known = (weight, bias, encoder_rows, folded_weight, folded_bias)
    args = (h_input, q, item_keys, item_values, tap, sem, k, sem_norm, spans, token_to_case, selected, alpha, *known)
    check_arguments(require, *args)
    if torch.is_grad_enabled():
        wanting = [name for name, t in floats.items() if t is not None and t.requires_grad]
        require(
            not wanting,
            lambda: f"retrieve_and_shift has no gradients, but {', '.join(wanting)} want some: use knowledge_shift",
        )
    return torch.ops.unike.retrieve_and_shift(*args, orientation, clamp, scaling, softcap, rescale, backend)


def check_arguments(
    check: Check,
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
    folded_weight: Tensor | None,
    folded_bias: Tensor | None,
) -> None:
    """The shapes of all arguments agree, and alpha can be had."""
    check(tap.dim() == 2, lambda: f"tap must be [T, d], but got {shape(tap)}")
    check_search(check, tap, sem, k, sem_norm, None)
    tokens = h_input.shape[0]
    check_shape(check, "tap", tap, (tokens, None), h_input=h_input)
    check_shape(check, "sem", sem, (item_keys.shape[0], None), item_keys=item_keys)
    check_shape(check, "spans", spans, (2, 2))
    check_shape(check, "token_to_case", token_to_case, (tokens,), h_input=h_input)
    check_shape(check, "selected", selected, (None, None))
    check(
        selected is None or token_to_case is not None,
        lambda: f"selected is {shape(selected)}, but token_to_case is None",
    )
    found = torch.empty((tokens, k), dtype=torch.int64, device="meta")  # of which the shape alone is looked at
    known = (encoder_rows, folded_weight, folded_bias)
    check_shift(check, h_input, q, item_keys, item_values, found, alpha, None, None, weight, bias, [], *known)
    if alpha is None:
        check(
            (q.dim() == 2 and weight is None) or (weight is not None and folded_weight is not None),
            lambda: (
                f"alpha is None, so q must be [T, d] without out_proj, or out_proj and folded be given, "
                f"but q is {shape(q)}, out_proj {shape(weight)} and folded {shape(folded_weight)}"
            ),
        )
    else:
        check(weight is None, lambda: f"alpha is given, so mix before the projection, but out_proj is {shape(weight)}")


def scores_dtype(h_input: Tensor, q: Tensor, tap: Tensor, sem: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Of the alphas and of the scores."""
    return compute_dtype(h_input, q), compute_dtype(tap, sem)
