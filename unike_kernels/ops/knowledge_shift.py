"""knowledge_shift: a self-attention output moved towards retrieved knowledge (equations 8 or 2, and 7)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import Layer, compute_dtype
from ._checks import Check, check_shape, require, require_act, require_tensors, shape


def knowledge_shift(
    h_input: Tensor,
    q: Tensor,
    item_keys: Tensor,
    item_values: Tensor,
    indices: Tensor,
    *,
    alpha: Tensor | float | None = None,
    encoder: Sequence[Layer] | None = None,
    orientation: str = "knowledge",
    clamp: bool = True,
    token_to_case: Tensor | None = None,
    out_proj: Layer | None = None,
    scaling: float | None = None,
    case_tokens: Tensor | None = None,
    encoder_act: str = "identity",
    rescale: bool = True,
    softcap: float | None = None,
    encoder_rows: Tensor | None = None,
    folded: Layer | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """h = (1 - alpha) h_input + alpha h_know, h_know = out_proj(softmax(scaling q . k_i) v_i) over retrieved items i.

    h_input: [T, d] float, the self-attention output.
    q, item_keys, item_values: `projected` form [T, H, hd], [N, Hkv, hd], [N, Hkv, hv], H a multiple of Hkv;
        `raw` form [T, d], [N, d], [N, d], one head.
    indices: [T, K] int64, the items of each token, or [C, K], those of each case, with token_to_case; -1: none.
    alpha: None, a number, or a tensor [T] or, with token_to_case, [C] (which wins where T = C).
        A number is taken per case with token_to_case, else per token.
        None: cos(encoder(h_know), h_input), per token; with case_tokens, once per case.
    encoder: (weight [out, in], bias [out] or None) pairs, with encoder_act between them. None: identity.
    encoder_rows: [N, d], in place of an affine encoder in the `raw` form: Enc of every item. Softmax weights sum to 1,
        so that Enc(h_know) = sum_i p_i encoder_rows[i] exactly, and one launch does it all.
    folded: (weight [d, H hv], bias [d] or None), in place of an affine encoder in the `projected` form: W_enc W_o and
        W_enc b_o + b_enc, which take the concatenated heads to Enc(h_know) at once.
    orientation: "knowledge", as above, or "input": alpha is the weight of h_input.
    clamp: the alpha computed here into [0, 1].
    token_to_case: [T] int64, the case of each token; -1: the token is left alone.
    out_proj: (weight [d, H hv], bias [d] or None). None: the concatenated heads are already in the space of h_input.
    scaling: of the scores before the softmax; None: 1 / sqrt(hd). softcap: scores become softcap tanh(score / softcap).
    case_tokens: [C] int64, the row of h_input where the alpha of each case is taken, a row of that case; -1: there is
        none here, and the case is left alone. Not used where alpha is given.
    rescale: `raw` form only, h_know gets the norm of h_input, token by token, after the encoder saw it as it was.
    backend: "auto" (for CUDA tensors triton, or CUDA C++ for one head as wide as h; native code for few tokens on the
        CPU; the reference elsewhere and for float64), or one of them by name.
    Returns h [T, d], dtype of h_input, computed in float32 (float64 if an input is), and the alpha used, in float32
    (float64), [C] if it is per case, else [T].

    A row without any item, or where the knowledge's weight is 0, keeps h_input bit for bit. Without an item, the alpha
    returned is 0 (orientation "input": 1). Differentiable once, in h_input, q, items, alpha, encoder and out_proj; with
    encoder_rows or folded, which are for inference, only the reference has gradients, and triton by name refuses.
    """
    require_act(encoder_act)
    if orientation not in ("knowledge", "input"):
        raise ValueError(f"orientation must be 'knowledge' or 'input', but got {orientation!r}")
    weight, bias = (None, None) if out_proj is None else out_proj
    layers = [] if encoder is None else list(encoder)
    given = alpha if isinstance(alpha, Tensor) else None
    floats = {"h_input": h_input, "q": q, "item_keys": item_keys, "item_values": item_values, "alpha": given}
    required = ["h_input", "q", "item_keys", "item_values", "indices"]
    if out_proj is not None:  # torch 2.6's compiler has no |= for dicts
        floats.update({"out_proj weight": weight, "out_proj bias": bias})
    for i, (layer_weight, layer_bias) in enumerate(layers):
        floats.update({f"encoder[{i}] weight": layer_weight, f"encoder[{i}] bias": layer_bias})
        required.append(f"encoder[{i}] weight")
    folded_weight, folded_bias = (None, None) if folded is None else folded
    if encoder_rows is not None or folded is not None:
        floats.update({"encoder_rows": encoder_rows, "folded weight": folded_weight, "folded bias": folded_bias})
    require_tensors(required, floats, {"indices": indices, "token_to_case": token_to_case, "case_tokens": case_tokens})
    if alpha is not None and not isinstance(alpha, Tensor):
        count = h_input.shape[0] if token_to_case is None else indices.shape[0]
        alpha = h_input.new_full((count,), float(alpha), dtype=compute_dtype(h_input))
    # A list of optional tensors cannot be differentiated through an operator: a missing bias becomes zeros.
    flat = [t for w, b in layers for t in (w, w.new_zeros(w.shape[:1]) if b is None else b)]
    args = (h_input, q, item_keys, item_values, indices, alpha, token_to_case, case_tokens, weight, bias, flat)
    known = (encoder_rows, folded_weight, folded_bias)
    check_arguments(require, *args, *known)
    options = (encoder_act, orientation, clamp, scaling, softcap, rescale)
    return torch.ops.unike.knowledge_shift(*args, *options, *known, backend)


def check_arguments(
    check: Check,
    h_input: Tensor,
    q: Tensor,
    item_keys: Tensor,
    item_values: Tensor,
    indices: Tensor,
    alpha: Tensor | None,
    token_to_case: Tensor | None,
    case_tokens: Tensor | None,
    out_weight: Tensor | None,
    out_bias: Tensor | None,
    encoder: Sequence[Tensor],
    encoder_rows: Tensor | None,
    folded_weight: Tensor | None,
    folded_bias: Tensor | None,
) -> None:
    """The shapes of all arguments agree."""
    check(h_input.dim() == 2, lambda: f"h_input must be [T, d], but got {shape(h_input)}")
    tokens, d = h_input.shape
    raw = q.dim() == 2
    check_shape(check, "q", q, (tokens, None) if raw else (tokens, None, None), h_input=h_input)
    check_shape(check, "item_keys", item_keys, (None, q.shape[1]) if raw else (None, None, q.shape[2]), q=q)
    check_shape(check, "item_values", item_values, (*item_keys.shape[:-1], None), item_keys=item_keys)
    heads = 1 if raw else q.shape[1]
    if not raw:
        check(
            item_keys.shape[1] > 0 and heads % item_keys.shape[1] == 0,
            lambda: f"q has {heads} heads, which is no multiple of the {item_keys.shape[1]} heads of item_keys",
        )
    if token_to_case is not None:
        check_shape(check, "token_to_case", token_to_case, (tokens,), h_input=h_input)
    rows = tokens if token_to_case is None else None
    check_shape(check, "indices", indices, (rows, None), h_input=h_input, token_to_case=token_to_case)
    cases = indices.shape[0]
    if case_tokens is not None:
        check(token_to_case is not None, lambda: f"case_tokens is {shape(case_tokens)}, but token_to_case is None")
        check_shape(check, "case_tokens", case_tokens, (cases,), indices=indices)
    if alpha is not None:
        per_case = token_to_case is not None and alpha.dim() == 1 and alpha.shape[0] == cases
        check(
            per_case or (alpha.dim() == 1 and alpha.shape[0] == tokens),
            lambda: f"alpha must be [{tokens}] or, with token_to_case, [{cases}], but got {shape(alpha)}",
        )
    width = heads * item_values.shape[-1]
    check(
        out_weight is not None or width == d,
        lambda: f"the heads make {width} features, h_input has {d}, and out_proj is None",
    )
    if out_weight is not None:
        check_shape(check, "out_proj weight", out_weight, (d, width), h_input=h_input, q=q, item_values=item_values)
        check_shape(check, "out_proj bias", out_bias, (d,), h_input=h_input)
    if not encoder and encoder_rows is None and folded_weight is None:
        return  # what is not given costs nothing: a call of one token takes some thirty microseconds in all
    size, source = d, {"h_input": h_input}
    for i in range(0, len(encoder), 2):
        weight, bias = encoder[i], encoder[i + 1]
        check_shape(check, f"encoder[{i // 2}] weight", weight, (None, size), **source)
        size, source = weight.shape[0], {"weight": weight}
        check_shape(check, f"encoder[{i // 2}] bias", bias, (size,), **source)
    check(size == d, lambda: f"the encoder returns {size} features, h_input has {d}")
    ways = {"encoder": encoder, "encoder_rows": encoder_rows is not None, "folded": folded_weight is not None}
    given = [name for name, there in ways.items() if there]
    check(len(given) < 2, lambda: f"the encoder is given in one way at a time, but got {' and '.join(given)}")
    check(encoder_rows is None or raw, lambda: f"encoder_rows are for one head (q [T, d]), but q is {shape(q)}")
    check_shape(check, "encoder_rows", encoder_rows, (item_keys.shape[0], d), item_keys=item_keys, h_input=h_input)
    check_shape(check, "folded weight", folded_weight, (d, width), h_input=h_input, q=q, item_values=item_values)
    check_shape(check, "folded bias", folded_bias, (d,), h_input=h_input)
