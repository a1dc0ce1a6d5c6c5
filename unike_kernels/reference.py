"""The specification: one function per equation of UniKE (arXiv 2409.19872) in plain PyTorch, and the kernel of the CPU.

Rows are vectors. Every function takes any float dtype, float64 included: half precision is computed in float32 and
rounded once, at the end, to the dtype of the first argument. Scores, alphas and losses stay in float32 (or float64).
Letters: T tokens, d hidden size, d' FFN width, n neurons, G groups, C cases, N items, K retrieved, S selected.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Maybe: TypeAlias = Tensor | None
Layer: TypeAlias = tuple[Tensor, Maybe]  # weight [out, in] and bias [out], as nn.Linear keeps them

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "identity": lambda x: x,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The activation function of that name."""
    if name not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, but got {name!r}")
    return ACTIVATIONS[name]


def compute_dtype(*tensors: Maybe) -> torch.dtype:
    """The dtype of the computation: the common one of the tensors, but at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _wide(*tensors: Maybe) -> list[Any]:
    """The tensors in the dtype of the computation."""
    dtype = compute_dtype(*tensors)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index], with a row of zeros where the index is -1."""
    return torch.cat([table.new_zeros(1, *table.shape[1:]), table])[(index + 1).clamp(min=0)]


def _over_norm(x: Tensor, norm: Tensor) -> Tensor:
    """x / norm, and 0 where the norm is 0. A row that is not finite stays NaN."""
    return x / norm.masked_fill(norm == 0, math.inf)


def _unit(x: Tensor) -> Tensor:
    """Rows of x with length 1; zero rows stay zero."""
    return _over_norm(x, torch.linalg.vector_norm(x, dim=-1, keepdim=True))


# ----------------------------------------------------------------------------------------------- intrinsic knowledge


def _hidden(x: Tensor, act: str, keys: Tensor, key_bias: Maybe, up: Maybe, up_bias: Maybe) -> Tensor:
    """o = act(x K + b), gated: times (x U + c). The inner half of equations 1 and 3. keys [..., n, d] -> [..., n]."""
    o = x @ keys.mT
    o = activation(act)(o if key_bias is None else o + key_bias.unsqueeze(-2))
    if up is None:
        return o
    return o * (x @ up.mT if up_bias is None else x @ up.mT + up_bias.unsqueeze(-2))


def _neurons(x: Tensor, act: str, keys: Tensor, key_bias: Maybe, values: Tensor, up: Maybe, up_bias: Maybe) -> Tensor:
    """o V: what neurons add. x [..., T, d], values [..., n, d_out] -> [..., T, d_out]."""
    return _hidden(x, act, keys, key_bias, up, up_bias) @ values


def ffn(
    x: Tensor, w_k: Tensor, b_k: Maybe, w_v: Tensor, b_v: Maybe, *, act: str, w_up: Maybe = None, b_up: Maybe = None
) -> Tensor:
    """FFN(q) = o W_V + b_V, o = act(q W_K + b_K), gated: times (q W_up + b_up). Equation 1.

    x [..., d]; w_k, w_up [d', d] and w_v [d, d'], as nn.Linear keeps them; b_k, b_up [d'], b_v [d]. Returns [..., d].
    """
    q, w_k, b_k, w_v, b_v, w_up, b_up = _wide(x, w_k, b_k, w_v, b_v, w_up, b_up)
    y = _hidden(q, act, w_k, b_k, w_up, b_up) @ w_v.mT
    return (y if b_v is None else y + b_v).to(x.dtype)


def extra_neurons(
    x: Tensor, keys: Tensor, key_bias: Maybe, values: Tensor, *,
    act: str, up: Maybe = None, up_bias: Maybe = None, zeta: Maybe = None, beta: float = 0.0,
    group_ptr: Maybe = None, route: Maybe = None, token_to_case: Maybe = None, selected: Maybe = None,
) -> Tensor:  # fmt: skip
    """sum over groups g of r[t, g] o_g (V_g + beta zeta'_g), o_g = act(q K_g + b_g): what an FFN gains. Equations 3, 6.

    x [..., d], T tokens; keys, up [n, d]; key_bias, up_bias [n]; values [n, d_out]; zeta [d_out] or [G, d_out].
    group_ptr [G + 1] int64: group g owns neurons group_ptr[g] to group_ptr[g + 1] (None: one group of all); neurons
    past the last pointer are spare and never act. route [T, G], or [C, G] with token_to_case [T] int64 (-1: a token of
    no case). selected [C, S] int64 group ids, -1 padded, instead of a route or to restrict it. Neither: r = 1.
    Returns [..., d_out]. A group that is not selected, or of route weight 0, is skipped: nothing of it is read.
    """
    dtype, lead = x.dtype, x.shape[:-1]
    group_ptr, groups, weight = _acting(keys, group_ptr, route, token_to_case, selected)
    sizes = group_ptr.diff()[groups]
    read: Any = slice(0, int(group_ptr[-1]))
    if weight is not None:  # only the neurons of groups that act
        spans = zip(group_ptr[groups].tolist(), group_ptr[groups + 1].tolist(), strict=True)
        read = torch.cat([groups[:0], *(torch.arange(*span, device=x.device) for span in spans)])
    rows = (None if t is None else t[read] for t in (keys, key_bias, values, up, up_bias))
    x, weight, keys, key_bias, values, up, up_bias = _wide(x.reshape(-1, x.shape[-1]), weight, *rows)
    if zeta is not None and beta != 0:
        zeta = zeta if zeta.dim() == 1 else zeta[groups].repeat_interleave(sizes, dim=0)
        values = values + beta * zeta.to(values.dtype)
    neurons = (keys, key_bias, values, up, up_bias)
    y = _neurons(x, act, *neurons) if weight is None else _grouped(x, act, neurons, sizes.tolist(), weight)
    return y.to(dtype).view(*lead, values.shape[1])


def extra_neurons_(y: Tensor, x: Tensor, keys: Tensor, key_bias: Maybe, values: Tensor, **options: Any) -> None:
    """y += extra_neurons(x, ...), rounded once, in place; rows of y where no neuron acts are not touched at all."""
    more = extra_neurons(_wide(x)[0], keys, key_bias, values, **options)
    routing = (options.get(name) for name in ("group_ptr", "route", "token_to_case", "selected"))
    group_ptr, _, weight = _acting(keys, *routing)
    acts = group_ptr[-1] > 0 if weight is None else (weight != 0).any(1).view(*y.shape[:-1], 1)
    y.copy_(torch.where(acts, (y + more).to(y.dtype), y))


def _acting(
    keys: Tensor, group_ptr: Maybe, route: Maybe, token_to_case: Maybe, selected: Maybe
) -> tuple[Tensor, Tensor, Maybe]:
    """The pointers [G + 1], the ids [A] of groups that act on any token, and r [T, A] (None: 1 everywhere)."""
    if group_ptr is None:
        group_ptr = torch.tensor([0, len(keys)], device=keys.device)
    sizes = group_ptr.diff()
    if selected is not None:
        chosen = torch.zeros(len(selected), len(sizes), dtype=torch.bool, device=sizes.device)
        case, slot = (selected >= 0).nonzero(as_tuple=True)
        chosen[case, selected[case, slot]] = True
        route = chosen.float() if route is None else torch.where(chosen, route, 0)
    if route is None:
        return group_ptr, torch.arange(len(sizes), device=sizes.device), None
    groups = ((route != 0).any(0) & (sizes > 0)).nonzero()[:, 0]
    weight = route[:, groups]
    return group_ptr, groups, weight if token_to_case is None else _rows(weight, token_to_case)


def _grouped(x: Tensor, act: str, neurons: Sequence[Any], sizes: list[int], weight: Tensor) -> Tensor:
    """sum over groups g of weight[t, g] o_g V_g: one product per group, over the tokens that it acts on.

    x [T, d]; neurons: keys, key_bias, values, up and up_bias of A groups of these sizes; weight [T, A].
    """
    group, token = weight.detach().t().nonzero(as_tuple=True)  # sorted by group
    counts = group.bincount(minlength=len(sizes))
    tokens = counts.tolist()
    if len(set(sizes)) == 1 and len(sizes) * max(tokens) <= 2 * len(token):  # as when a batch trains one edit per case
        stacked = (None if t is None else t.unflatten(0, (len(sizes), -1)) for t in neurons)
        place = torch.arange(len(token), device=x.device) - (counts.cumsum(0) - counts)[group]  # in its group, padded
        x_g = x.new_zeros(len(sizes), max(tokens), x.shape[1]).index_put((group, place), x[token])
        o_v = _neurons(x_g, act, *stacked)[group, place]
    else:
        split = [[None] * len(sizes) if t is None else t.split(sizes) for t in neurons]
        each = zip(x[token].split(tokens), *split, strict=True)
        o_v = torch.cat([neurons[2][:0], *(_neurons(x_g, act, *of_g) for x_g, *of_g in each)])
    return x.new_zeros(len(x), o_v.shape[1]).index_add(0, token, weight[token, group][:, None] * o_v)


def augmented_ffn(
    x: Tensor, w_k: Tensor, b_k: Maybe, w_v: Tensor, b_v: Maybe, keys: Tensor, key_bias: Maybe, values: Tensor, *,
    act: str, w_up: Maybe = None, b_up: Maybe = None, up: Maybe = None, up_bias: Maybe = None,
    zeta: Maybe = None, beta: float = 0.0,
) -> Tensor:  # fmt: skip
    """FFN_edit(q) = FFN(q) + o_x (W_Vx + beta zeta'), rounded once. Equations 3 (beta = 0) and 6.

    Shapes as in `ffn` and `extra_neurons`; zeta [d]. Returns [..., d].
    """
    q, w_k, b_k, w_v, b_v, w_up, b_up = _wide(x, w_k, b_k, w_v, b_v, w_up, b_up)
    y = ffn(q, w_k, b_k, w_v, b_v, act=act, w_up=w_up, b_up=b_up)
    more = extra_neurons(q, keys, key_bias, values, act=act, up=up, up_bias=up_bias, zeta=zeta, beta=beta)
    return (y + more).to(x.dtype)


# ------------------------------------------------------------------------------------------------ external knowledge


def cosine_topk(
    q: Tensor, keys: Tensor, k: int, *, key_norm: Maybe = None, ranges: Maybe = None
) -> tuple[Tensor, Tensor]:
    """The k rows of largest cos(q, key) = q . key / (|q| |key|), largest first; among equal scores the lowest index.

    q [..., d]; keys [N, d]; key_norm [N]: the |key| to divide by (None: computed here; ones: rows are unit vectors).
    ranges [T, 2] int64: query t sees keys ranges[t, 0] to ranges[t, 1] only. Returns scores, indices int64: [..., k],
    padded with -inf and -1 where fewer than k rows can be had. A zero vector has cosine 0; a query that is not finite
    retrieves nothing, a key that is not finite is never retrieved.
    """
    lead, n, dtype = q.shape[:-1], keys.shape[0], compute_dtype(q, keys, key_norm)
    q = _unit(q.reshape(-1, q.shape[-1]).to(dtype))
    tiles = [keys] if keys.dtype == dtype else keys.split(8192)  # half precision is widened tile by tile, never at once
    if key_norm is None:
        key_norm = torch.cat([torch.linalg.vector_norm(rows.to(dtype), dim=-1) for rows in tiles])
    scores = torch.cat([q @ rows.to(dtype).mT for rows in tiles], dim=1)
    scores = _over_norm(scores, key_norm.to(dtype)) + 0.0  # -0.0 + 0.0 = 0.0: the two zeros are one score
    hidden = ~scores.isfinite()
    if ranges is not None:
        index = torch.arange(n, device=q.device)
        start, end = ranges.reshape(-1, 2).T[..., None]
        hidden |= (index < start) | (index >= end)
    scores, indices = _topk_lowest_index(scores.masked_fill(hidden, -math.inf), min(k, n))
    indices = indices.masked_fill(scores == -math.inf, -1)
    scores, indices = F.pad(scores, (0, k - min(k, n)), value=-math.inf), F.pad(indices, (0, k - min(k, n)), value=-1)
    return scores.view(*lead, k), indices.view(*lead, k)


def _topk_lowest_index(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first k columns of a stable descending sort of scores [T, N], without sorting all N."""
    if k == 0:
        return scores[:, :0], scores[:, :0].long()
    kth = scores.topk(k).values[:, -1:]
    above, tied = scores > kth, scores == kth
    kept = above | (tied & (tied.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    indices = kept.nonzero()[:, 1].view(-1, k)
    scores, order = scores.gather(1, indices).sort(dim=-1, descending=True, stable=True)
    return scores, indices.gather(1, order)


def knowledge_attention(
    q: Tensor, item_keys: Tensor, item_values: Tensor, indices: Tensor, *,
    scaling: float | None = None, softcap: float | None = None, token_to_case: Maybe = None,
) -> Tensor:  # fmt: skip
    """softmax(scaling q . k_i) v_i over the retrieved items i: equations 2 and 8, before the output projection.

    `projected`: q [T, H, hd], item_keys [N, Hkv, hd], item_values [N, Hkv, hv], H a multiple of Hkv -> [T, H, hv].
    `raw`: q [T, d], item_keys = item_values = h_pos [N, d] -> [T, d]. indices [T, K], or [C, K] with token_to_case [T]
    (-1: a token of no case); index -1 is skipped, and a token without any item gives zeros. scaling: 1 / sqrt(hd).
    """
    if q.dim() == 2:  # one head
        options: Any = {"scaling": scaling, "softcap": softcap, "token_to_case": token_to_case}
        return knowledge_attention(q[:, None], item_keys[:, None], item_values[:, None], indices, **options)[:, 0]
    out = q.new_zeros(*q.shape[:2], item_values.shape[-1])
    if len(item_keys) == 0 or len(q) == 0:
        return out
    attend = partial(_attend, item_keys=item_keys, item_values=item_values, scaling=scaling, softcap=softcap)
    if token_to_case is None:
        return attend(q[:, None], indices)[:, 0]

    # Tokens of one case share its items: these are gathered once per case, its tokens padded to the longest case.
    order = token_to_case.argsort(stable=True)[int((token_to_case < 0).sum()) :]
    cases, row, counts = token_to_case[order].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(order), device=q.device) - (counts.cumsum(0) - counts)[row]  # of a token in its case
    padded = q.new_zeros(len(cases), int(counts.max()) if len(counts) else 0, *q.shape[1:])
    padded = padded.index_put((row, place), q[order])
    parts = attend(padded, indices[cases])[row, place]
    return out.index_copy(0, order, parts)


def _logits(q: Tensor, keys: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """Scores of q [B, L, H, hd] and keys [B, Hkv, K, hd]: [B, Hkv, (H / Hkv) L, K]."""
    q = q.transpose(1, 2).unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
    s = (1 / math.sqrt(q.shape[-1]) if scaling is None else scaling) * q @ keys.mT
    return s if softcap is None else softcap * torch.tanh(s / softcap)


def _attend(
    q: Tensor, indices: Tensor, item_keys: Tensor, item_values: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """q [B, L, H, hd] attends to items indices [B, K] -> [B, L, H, hv]; the L queries of a row share its items."""
    dtype, missing, (b, tokens, heads, _) = q.dtype, (indices < 0)[:, None, :, None], q.shape
    # [B, Hkv, K, ...], gathered as the products read them
    at, head = indices.clamp(min=0)[:, None], torch.arange(item_keys.shape[1], device=q.device)[:, None]
    q, keys, values = _wide(q, item_keys[at, head], item_values[at, head])
    # Zeros where there is no item, so that nothing of the row read in its place (a NaN, say) gets through.
    keys, values = (rows.masked_fill_(missing, 0) for rows in (keys, values))
    s = _logits(q, keys, scaling, softcap).masked_fill(missing.mT, torch.finfo(q.dtype).min)
    return (s.softmax(-1) @ values).view(b, heads, tokens, values.shape[-1]).transpose(1, 2).to(dtype)


def softmax_share(
    q: Tensor, item_keys: Tensor, input_keys: Tensor, indices: Tensor, *,
    q_input: Maybe = None, visible: Maybe = None, scaling: float | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """sum_know exp(s) / (sum_know exp(s) + sum_input exp(s)) per token and head: the knowledge's share. Equation 9.

    q [T, H, hd] (not rotated: a memory has no position), q_input [T, H, hd] (rotated; None: q), item_keys [N, Hkv, hd],
    input_keys [L, Hkv, hd], indices [T, K]; visible [T, L] bool (None: causal, the T tokens being the last of the L).
    share * attention(items) + (1 - share) * attention(input) is attention over [items, input]. Returns [T, H].
    """
    tokens, length = len(q), len(input_keys)
    if visible is None:
        visible = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)
    q, q_input, items, input_keys = _wide(q, q if q_input is None else q_input, _rows(item_keys, indices), input_keys)

    def log_mass(query: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
        s = _logits(query[:, None], keys.transpose(1, 2), scaling, softcap).flatten(1, 2)
        return s.masked_fill(~kept[:, None], -math.inf).logsumexp(-1)

    know = log_mass(q, items, indices >= 0)
    return torch.sigmoid(know - log_mass(q_input, input_keys.expand(tokens, *input_keys.shape), visible))


def encode(x: Tensor, layers: Sequence[Layer], act: str = "identity") -> Tensor:
    """Enc(x): linear maps with an activation between them. x [..., d]; layers: (weight, bias or None)."""
    dtype = x.dtype
    for i, (weight, bias) in enumerate(layers):
        x, weight, bias = _wide(x, weight, bias)
        x = F.linear(x if i == 0 else activation(act)(x), weight, bias)
    return x.to(dtype)


def alpha(
    h_know: Tensor,
    h_input: Tensor,
    *,
    encoder: Callable[[Tensor], Tensor] | Sequence[Layer] | None = None,
    act: str = "identity",
    clamp: bool = True,
) -> Tensor:
    """alpha = cos(Enc_sem(h_know), h_input), clamped to [0, 1]; 0 for zero vectors. Equation 7.

    h_know, h_input [..., d] -> [...]. encoder: None (identity), a callable, or layers as in `encode`.
    """
    h_know, h_input = _wide(h_know, h_input)
    if encoder is not None:
        h_know = encoder(h_know) if callable(encoder) else encode(h_know, encoder, act)
    h_know, h_input = _wide(h_know, h_input)
    cosine = (_unit(h_know) * _unit(h_input)).sum(-1)
    return cosine.clamp(0, 1) if clamp else cosine


def rescale(h_know: Tensor, h_input: Tensor) -> Tensor:
    """h_know with the norm of h_input, token by token: what the `raw` form adds. [..., d], [..., d] -> [..., d]."""
    know, into = _wide(h_know, h_input)
    return (_unit(know) * torch.linalg.vector_norm(into, dim=-1, keepdim=True)).to(h_know.dtype)


def shift(h_input: Tensor, h_know: Tensor, alpha: Tensor | float, *, orientation: str = "knowledge") -> Tensor:
    """h = (1 - alpha) h_input + alpha h_know; orientation "input": alpha h_input + (1 - alpha) h_know. Equation 7.

    h_input, h_know [..., d], alpha [...] or a number. Where the knowledge's weight is 0, h_input is kept bit for bit:
    h_know is not looked at there, and no gradient reaches alpha.
    """
    if orientation not in ("knowledge", "input"):
        raise ValueError(f"orientation must be 'knowledge' or 'input', but got {orientation!r}")
    dtype = h_input.dtype
    h_input, h_know = _wide(h_input, h_know)
    a = alpha[..., None].to(h_input.dtype) if isinstance(alpha, Tensor) else h_input.new_tensor(alpha)
    kept = a == (0 if orientation == "knowledge" else 1)
    h_know = torch.where(kept, 0, h_know)
    h = (1 - a) * h_input + a * h_know if orientation == "knowledge" else a * h_input + (1 - a) * h_know
    return torch.where(kept, h_input, h).to(dtype)


def alpha_is_per_case(alpha: Maybe | float, indices: Tensor, token_to_case: Maybe, case_tokens: Maybe) -> bool:
    """Whether `knowledge_shift` returns one alpha per case, or one per token."""
    if token_to_case is None or alpha is None:
        return token_to_case is not None and case_tokens is not None
    return not isinstance(alpha, Tensor) or len(alpha) == len(indices)


_alpha, _rescale = alpha, rescale  # the next function has arguments of these names


def knowledge_shift(
    h_input: Tensor, q: Tensor, item_keys: Tensor, item_values: Tensor, indices: Tensor, *,
    alpha: Maybe | float = None, encoder: Sequence[Layer] | None = None, encoder_act: str = "identity",
    orientation: str = "knowledge", clamp: bool = True, token_to_case: Maybe = None, case_tokens: Maybe = None,
    out_proj: Layer | None = None, scaling: float | None = None, softcap: float | None = None, rescale: bool = True,
    encoder_rows: Maybe = None, folded: Layer | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Retrieved knowledge attended to, projected, weighed and mixed in: equations 8 (or 2) and 7 in one.

    h_input [T, d]; q, item_keys, item_values, indices, token_to_case as in `knowledge_attention`; out_proj: weight
    [d, H hv] and bias (None: the heads are already in the space of h_input); encoder as in `encode`, or, where it is
    affine, what is known of it before: encoder_rows [N, d], Enc(h_pos) of every item, of which Enc(h_know) is the same
    average as h_know of the values (one head), or folded, encoder and out_proj as one layer on the heads. alpha: None
    (equation 7: per token, or with case_tokens [C] per case, taken at that row of h_input; -1: such a case is left
    alone), a number, or a tensor [T] or, with token_to_case, [C] (which wins if T = C). rescale: of the `raw` form.
    Returns h [T, d] and the alpha used: [C] if it is per case (a number is, with token_to_case), else [T].
    A row without an item keeps h_input bit for bit, with alpha 0 (orientation "input": 1).
    """
    dtype = h_input.dtype
    untouched = 0.0 if orientation == "knowledge" else 1.0
    h_input, q = _wide(h_input, q)
    found = (indices >= 0).any(-1) & (len(item_keys) > 0)
    acts = found if token_to_case is None else _rows(found, token_to_case)  # [T]

    h_know = encoded = torch.zeros_like(h_input)
    rows = acts.nonzero()[:, 0]  # the others cost nothing
    if len(rows) > 0:
        owner = None if token_to_case is None else token_to_case[rows]
        items = indices[rows] if owner is None else indices
        options: Any = {"scaling": scaling, "softcap": softcap, "token_to_case": owner}
        heads = knowledge_attention(q[rows], item_keys, item_values, items, **options).flatten(1)
        projected = heads if out_proj is None else encode(heads, [out_proj])
        h_know = h_know.index_copy(0, rows, projected.to(h_know.dtype))
        if folded is not None:
            encoded = encoded.index_copy(0, rows, encode(heads, [folded]).to(encoded.dtype))
        elif encoder_rows is not None:
            mean = knowledge_attention(q[rows], item_keys, encoder_rows, items, **options).to(encoded.dtype)
            encoded = encoded.index_copy(0, rows, mean)
    if folded is None and encoder_rows is None:
        encoded = h_know

    # `a`: alpha per case or per token, as asked for; `per_token`: spread over the tokens of each case.
    per_case = alpha_is_per_case(alpha, indices, token_to_case, case_tokens)
    if alpha is None and case_tokens is not None:
        found = found & (case_tokens >= 0)
    known = found if per_case else acts
    a = h_input.new_full(known.shape, untouched)
    if alpha is None:
        slots = known.nonzero()[:, 0]
        at = slots if case_tokens is None else case_tokens[slots]
        if len(slots) > 0:
            a = a.index_copy(0, slots, _alpha(encoded[at], h_input[at], encoder=encoder, act=encoder_act, clamp=clamp))
    else:
        a = torch.where(known, alpha.to(a.dtype) if isinstance(alpha, Tensor) else alpha, a)
    per_token = a
    if token_to_case is not None and per_case:
        per_token = torch.where(acts, _rows(a, token_to_case), untouched)

    if rescale and q.dim() == 2:
        h_know = _rescale(h_know, h_input)
    return shift(h_input, h_know, per_token, orientation=orientation).to(dtype), a


def retrieve_and_shift(
    h_input: Tensor, q: Tensor, item_keys: Tensor, item_values: Tensor, tap: Tensor, sem: Tensor, k: int, *,
    spans: Tensor, sem_norm: Maybe = None, token_to_case: Maybe = None, selected: Maybe = None, **shift_options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`cosine_topk` of every token by itself, and `knowledge_shift` by what it finds: retrieval with per="token".

    tap [T, d'] are the queries, sem [N, d'] the items' keys, sem_norm [N]. spans [2, 2] int64: the rows of the memory,
    and of all items, from and to. Without selected every token sees all items. selected [C, M] int64, -1 padded: the
    edits of each case; its tokens see the memory and these edits' own items, rows spans[0, 1] + e; nothing, if there is
    no edit. token_to_case [T] int64 (-1: sees nothing). shift_options: as of `knowledge_shift`.
    Returns h [T, d], alpha [T], scores and indices [T, k].
    """
    # All items in order, of which those that a token does not see are taken out.
    scores, indices = cosine_topk(tap, sem, len(sem), key_norm=sem_norm)
    (start, end), (_, last) = spans[int(selected is None)], spans[1]
    seen = (indices >= start) & (indices < end)
    if token_to_case is not None:
        case = token_to_case.clamp(min=0)
        if selected is not None:
            edits = torch.where(selected >= 0, selected + spans[0, 1], -1)[case]  # [T, M] rows of their own items
            edits = edits.masked_fill(edits >= last, -1)
            seen |= (indices[:, :, None] == edits[:, None, :]).any(-1) & (indices >= 0)
            seen &= (selected[case] >= 0).any(-1, keepdim=True)
        seen &= (token_to_case >= 0)[:, None]
    order = (~seen).int().argsort(dim=1, stable=True)[:, :k]
    seen = seen.gather(1, order) & (indices := indices.gather(1, order)).ge(0)
    scores, indices = scores.gather(1, order).masked_fill(~seen, -math.inf), indices.masked_fill(~seen, -1)
    scores = F.pad(scores, (0, k - scores.shape[1]), value=-math.inf)
    indices = F.pad(indices, (0, k - indices.shape[1]), value=-1)
    h, used = knowledge_shift(h_input, q, item_keys, item_values, indices, **shift_options)
    return h, used, scores, indices


# --------------------------------------------------------------------------------------------------- disentanglement


def _similarities(a: Tensor, b: Tensor, temperature: float) -> Tensor:
    """s(a_i, b_j) = cos(a_i, b_j) / temperature. [B, d], [M, d] -> [B, M]."""
    return _unit(a) @ _unit(b).mT / temperature


def truthfulness_loss(enc_pos: Tensor, enc_neg: Tensor, temperature: float = 0.1) -> Tensor:
    """Positives attract positives, negatives negatives, in the truthfulness space. Equation 4, mean over the batch.

    enc_pos = Enc_tru(h_pos) = P, enc_neg = Enc_tru(h_neg) = Q, [B, d]; the anchor is one of its positives. Scalar.
    """
    p, n = _wide(enc_pos, enc_neg)
    pool = torch.cat([p, n])

    def log_share(own: Tensor) -> Tensor:
        return _similarities(own, own, temperature).logsumexp(-1) - _similarities(own, pool, temperature).logsumexp(-1)

    return -(log_share(p) + log_share(n)).mean()


def semantic_loss(anchors: Tensor, enc_pos: Tensor, enc_neg: Tensor, temperature: float = 0.1) -> Tensor:
    """Each anchor attracts its own two encoded states, true or not. Equation 5, mean over the batch.

    anchors a_i, not encoded; enc_pos = Enc_sem(h_pos) = P', enc_neg = Enc_sem(h_neg) = Q'; all [B, d]. Scalar.
    """
    a, p, n = _wide(anchors, enc_pos, enc_neg)
    to_p, to_n = _similarities(a, p, temperature), _similarities(a, n, temperature)
    own = torch.logaddexp(to_p.diagonal(), to_n.diagonal())
    return -(own - torch.cat([to_p, to_n], dim=1).logsumexp(-1)).mean()


def zeta(enc_pos: Tensor, enc_neg: Tensor) -> Tensor:
    """zeta = mean Enc_tru(h_pos) - mean Enc_tru(h_neg): the direction of truth. [B, d], [B, d] -> [d]."""
    p, n = _wide(enc_pos, enc_neg)
    return (p.mean(0) - n.mean(0)).to(enc_pos.dtype)
