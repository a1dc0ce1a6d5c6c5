"""The specification: one function per equation of UniKE (arXiv 2409.19872) in plain PyTorch, and the kernel of the CPU.

Rows are vectors. Every function takes any float dtype, float64 included: half precision is computed in float32 and
rounded once, at the end, to the dtype of the first argument. Scores, alphas and losses stay in float32 (or float64).
Letters: T tokens, d hidden size, d' FFN width, n neurons, G groups, C cases, N items, K retrieved, S selected.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Layer = tuple[Tensor, Tensor | None]  # weight [out, in] and bias [out], as nn.Linear keeps them

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


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the computation: the common one of the tensors, but at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    return dtype


def _wide(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the dtype of the computation."""
    dtype = compute_dtype(*tensors)
    return [None if tensor is None else tensor.to(dtype) for tensor in tensors]


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """table[index], with a row of zeros where the index is -1."""
    return torch.cat([table, table.new_zeros(1, *table.shape[1:])])[index]


def _over_norm(x: Tensor, norm: Tensor) -> Tensor:
    """x / norm, and 0 where the norm is 0. A row that is not finite stays NaN."""
    return x / norm.masked_fill(norm == 0, math.inf)


def _unit(x: Tensor) -> Tensor:
    """Rows of x with length 1; zero rows stay zero."""
    return _over_norm(x, torch.linalg.vector_norm(x, dim=-1, keepdim=True))


# ----------------------------------------------------------------------------------------------- intrinsic knowledge


def _hidden(x: Tensor, keys: Tensor, key_bias: Tensor | None, act: str, up: Tensor | None, up_bias: Tensor | None):
    """o = act(x K + b), times (x U + c) if gated: the inner half of equations 1 and 3. keys [..., n, d] -> [..., n]."""
    o = x @ keys.mT
    o = activation(act)(o if key_bias is None else o + key_bias.unsqueeze(-2))
    if up is None:
        return o
    gate = x @ up.mT
    return o * (gate if up_bias is None else gate + up_bias.unsqueeze(-2))


def ffn(
    x: Tensor,
    w_k: Tensor,
    b_k: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    *,
    act: str,
    w_up: Tensor | None = None,
    b_up: Tensor | None = None,
) -> Tensor:
    """FFN(q) = o W_V + b_V, o = act(q W_K + b_K), gated: times (q W_up + b_up). Equation 1.

    x [..., d]; w_k, w_up [d', d] and w_v [d, d'], as nn.Linear keeps them; b_k, b_up [d'], b_v [d]. Returns [..., d].
    """
    dtype = x.dtype
    x, w_k, b_k, w_v, b_v, w_up, b_up = _wide(x, w_k, b_k, w_v, b_v, w_up, b_up)
    y = _hidden(x, w_k, b_k, act, w_up, b_up) @ w_v.mT
    return (y if b_v is None else y + b_v).to(dtype)


def extra_neurons(
    x: Tensor,
    keys: Tensor,
    key_bias: Tensor | None,
    values: Tensor,
    *,
    act: str,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
    zeta: Tensor | None = None,
    beta: float = 0.0,
    group_ptr: Tensor | None = None,
    route: Tensor | None = None,
    token_to_case: Tensor | None = None,
    selected: Tensor | None = None,
) -> Tensor:
    """sum over groups g of r[t, g] o_g (V_g + beta zeta'_g), o_g = act(q K_g + b_g): what an FFN gains. Equations 3, 6.

    x [..., d], T tokens; keys, up [n, d]; key_bias, up_bias [n]; values [n, d_out]; zeta [d_out] or [G, d_out].
    group_ptr [G + 1] int64: group g owns neurons group_ptr[g] to group_ptr[g + 1] (None: one group of all); neurons
    past the last pointer are spare and never act. route [T, G], or [C, G] with token_to_case [T] int64 (-1: a token of
    no case). selected [C, S] int64 group ids, -1 padded, instead of a route or to restrict it. Neither: r = 1.
    Returns [..., d_out]. A group that is not selected, or of route weight 0, is skipped: nothing of it is read.
    """
    _, y = _addition(
        x.reshape(-1, x.shape[-1]),
        keys,
        key_bias,
        values,
        act=act,
        up=up,
        up_bias=up_bias,
        zeta=zeta,
        beta=beta,
        group_ptr=group_ptr,
        route=route,
        token_to_case=token_to_case,
        selected=selected,
    )
    return y.to(x.dtype).view(*x.shape[:-1], values.shape[1])


def extra_neurons_(y: Tensor, x: Tensor, keys: Tensor, key_bias: Tensor | None, values: Tensor, **options: Any) -> None:
    """y += extra_neurons(x, ...), rounded once, in place; rows of y where no neuron acts are not touched at all."""
    acts, more = _addition(x.reshape(-1, x.shape[-1]), keys, key_bias, values, **options)
    acts, more = acts.view(*y.shape[:-1], 1), more.view(y.shape)
    y.copy_(torch.where(acts, (y + more).to(y.dtype), y))


def _addition(
    x: Tensor,
    keys: Tensor,
    key_bias: Tensor | None,
    values: Tensor,
    *,
    act: str,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
    zeta: Tensor | None = None,
    beta: float = 0.0,
    group_ptr: Tensor | None = None,
    route: Tensor | None = None,
    token_to_case: Tensor | None = None,
    selected: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For x [T, d]: which tokens any neuron acts on, bool [T], and the addition, [T, d_out], not yet rounded."""
    if group_ptr is None:
        group_ptr = torch.tensor([0, keys.shape[0]], device=x.device)
    size = group_ptr.diff()
    weight = None
    groups = size.nonzero()[:, 0]
    if route is not None or selected is not None:
        groups, weight = _active(size, route, token_to_case, selected)

    # Only the neurons of active groups are read. `group_of`: the group of each.
    starts, sizes = group_ptr[groups].tolist(), size[groups].tolist()
    if weight is None:
        neurons: Any = slice(0, int(group_ptr[-1]))
    else:
        neurons = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, sizes, strict=True)] or [groups.cpu()]).to(
            x.device
        )
    keys, key_bias, values, up, up_bias = (
        None if t is None else t[neurons] for t in (keys, key_bias, values, up, up_bias)
    )
    x, keys, key_bias, values, up, up_bias, weight = _wide(x, keys, key_bias, values, up, up_bias, weight)
    if zeta is not None and beta != 0:
        group_of = groups.repeat_interleave(size[groups])
        values = values + beta * (zeta if zeta.dim() == 1 else zeta[group_of]).to(values.dtype)

    if weight is None:  # every group acts on every token: one product, as if all were one group
        y = _hidden(x, keys, key_bias, act, up, up_bias) @ values
        return torch.full((len(x),), len(keys) > 0, device=x.device), y

    # Every (group, token) that acts, sorted by group: one product per group over its own tokens.
    group, token = weight.detach().t().nonzero(as_tuple=True)
    counts = group.bincount(minlength=len(groups)).tolist()
    y = x.new_zeros(len(x), values.shape[1])
    acts = torch.zeros(len(x), dtype=torch.bool, device=x.device).index_fill(0, token, True)
    if len(token) == 0:
        return acts, y
    tensors = (keys, key_bias, values, up, up_bias)
    if len(set(counts)) == len(set(sizes)) == 1:  # as when a batch trains one edit per case: one batched product
        n = len(groups)
        k, b, v, u, c = (None if t is None else t.unflatten(0, (n, -1)) for t in tensors)
        parts = (_hidden(x[token].unflatten(0, (n, -1)), k, b, act, u, c) @ v).flatten(0, 1)
    else:
        split = [[None] * len(groups) if t is None else t.split(sizes) for t in tensors]
        parts = torch.cat(
            [
                _hidden(x_g, k, b, act, u, c) @ v
                for x_g, k, b, v, u, c in zip(x[token].split(counts), *split, strict=True)
            ]
        )
    return acts, y.index_add(0, token, weight[token, group][:, None] * parts)


def _active(
    size: Tensor, route: Tensor | None, token_to_case: Tensor | None, selected: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The ids [A] of the groups that act anywhere, and their weights r [T, A]. size [G]: neurons of each group."""
    if selected is not None:
        chosen = torch.zeros(len(selected), len(size), dtype=torch.bool, device=size.device)
        case, slot = (selected >= 0).nonzero(as_tuple=True)
        chosen[case, selected[case, slot]] = True
        route = chosen.to(torch.float32) if route is None else torch.where(chosen, route, 0)
    assert route is not None
    groups = ((route != 0).any(0) & (size > 0)).nonzero()[:, 0]
    weight = route[:, groups]
    return groups, weight if token_to_case is None else _rows(weight, token_to_case)


def augmented_ffn(
    x: Tensor,
    w_k: Tensor,
    b_k: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    keys: Tensor,
    key_bias: Tensor | None,
    values: Tensor,
    *,
    act: str,
    w_up: Tensor | None = None,
    b_up: Tensor | None = None,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
    zeta: Tensor | None = None,
    beta: float = 0.0,
) -> Tensor:
    """FFN_edit(q) = FFN(q) + o_x (W_Vx + beta zeta'), rounded once. Equations 3 (beta = 0) and 6.

    Shapes as in `ffn` and `extra_neurons`; zeta [d]. Returns [..., d].
    """
    dtype = x.dtype
    x, w_k, b_k, w_v, b_v, w_up, b_up = _wide(x, w_k, b_k, w_v, b_v, w_up, b_up)
    y = ffn(x, w_k, b_k, w_v, b_v, act=act, w_up=w_up, b_up=b_up)
    more = extra_neurons(x, keys, key_bias, values, act=act, up=up, up_bias=up_bias, zeta=zeta, beta=beta)
    return (y + more).to(dtype)


# ------------------------------------------------------------------------------------------------ external knowledge


def cosine_topk(
    q: Tensor, keys: Tensor, k: int, *, key_norm: Tensor | None = None, ranges: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k rows of largest cos(q, key) = q . key / (|q| |key|), largest first; among equal scores the lowest index.

    q [..., d]; keys [N, d]; key_norm [N]: the |key| to divide by (None: computed here; ones: rows are unit vectors).
    ranges [T, 2] int64: query t sees keys ranges[t, 0] to ranges[t, 1] only. Returns scores, indices int64: [..., k],
    padded with -inf and -1 where fewer than k rows can be had. A zero vector has cosine 0; a query that is not finite
    retrieves nothing, a key that is not finite is never retrieved.
    """
    lead, n = q.shape[:-1], keys.shape[0]
    q, keys, key_norm = _wide(q.reshape(-1, q.shape[-1]), keys, key_norm)
    if key_norm is None:
        key_norm = torch.linalg.vector_norm(keys, dim=-1)
    scores = _over_norm(_unit(q) @ keys.mT, key_norm) + 0.0  # -0.0 + 0.0 = 0.0: the two zeros are one score
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
    q: Tensor,
    item_keys: Tensor,
    item_values: Tensor,
    indices: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    token_to_case: Tensor | None = None,
) -> Tensor:
    """softmax(scaling q . k_i) v_i over the retrieved items i: equations 2 and 8, before the output projection.

    `projected`: q [T, H, hd], item_keys [N, Hkv, hd], item_values [N, Hkv, hv], H a multiple of Hkv -> [T, H, hv].
    `raw`: q [T, d], item_keys = item_values = h_pos [N, d] -> [T, d]. indices [T, K], or [C, K] with token_to_case [T]
    (-1: a token of no case); index -1 is skipped, and a token without any item gives zeros. scaling: 1 / sqrt(hd).
    """
    if q.dim() == 2:
        options: Any = {"scaling": scaling, "softcap": softcap, "token_to_case": token_to_case}
        return knowledge_attention(q[:, None], item_keys[:, None], item_values[:, None], indices, **options)[:, 0]
    attend = partial(_attend, item_keys=item_keys, item_values=item_values, scaling=scaling, softcap=softcap)
    out = q.new_zeros(*q.shape[:2], item_values.shape[-1])
    if len(item_keys) == 0 or len(q) == 0:
        return out
    if token_to_case is None:
        return attend(q[:, None], indices=indices)[:, 0]

    # Tokens of one case share its items: gather those once per case, in one batch if all cases are equally long.
    order = token_to_case.argsort(stable=True)[int((token_to_case < 0).sum()) :]
    counts = token_to_case[order].bincount(minlength=len(indices))
    cases = counts.nonzero()[:, 0]
    lengths = counts[cases].tolist()
    if len(set(lengths)) == 1:
        parts = attend(q[order].unflatten(0, (len(cases), -1)), indices=indices[cases]).flatten(0, 1)
    elif lengths:
        parts = torch.cat(
            [attend(x[None], indices=i[None])[0] for x, i in zip(q[order].split(lengths), indices[cases], strict=True)]
        )
    else:
        return out
    return out.index_copy(0, order, parts)


def _attend(
    q: Tensor, indices: Tensor, item_keys: Tensor, item_values: Tensor, scaling: float | None, softcap: float | None
) -> Tensor:
    """q [B, L, H, hd] attends to items indices [B, K] -> [B, L, H, hv]; the L queries of a row share its items."""
    dtype, heads = q.dtype, item_keys.shape[1]
    missing = indices < 0
    keys, values = item_keys[indices.clamp(min=0)], item_values[indices.clamp(min=0)]
    q, keys, values = _wide(q, keys, values)
    # Zeros where there is no item, so that nothing of the row read in its place (a NaN, say) gets through.
    keys, values = (t.masked_fill(missing[..., None, None], 0) for t in (keys, values))
    s = torch.einsum("blgrh,bkgh->blgrk", q.unflatten(2, (heads, -1)), keys)
    s = s * (1 / math.sqrt(q.shape[-1]) if scaling is None else scaling)
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    p = s.masked_fill(missing[:, None, None, None], torch.finfo(s.dtype).min).softmax(-1)
    return torch.einsum("blgrk,bkgh->blgrh", p, values).flatten(2, 3).to(dtype)


def softmax_share(
    q: Tensor,
    item_keys: Tensor,
    input_keys: Tensor,
    indices: Tensor,
    *,
    q_input: Tensor | None = None,
    visible: Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """sum_know exp(s) / (sum_know exp(s) + sum_input exp(s)) per token and head: the knowledge's share. Equation 9.

    q [T, H, hd] (not rotated: a memory has no position), q_input [T, H, hd] (rotated; None: q), item_keys [N, Hkv, hd],
    input_keys [L, Hkv, hd], indices [T, K]; visible [T, L] bool (None: causal, the T tokens being the last of the L).
    share * attention(items) + (1 - share) * attention(input) is attention over [items, input]. Returns [T, H].
    """
    tokens, length = len(q), len(input_keys)
    if visible is None:
        visible = torch.ones(tokens, length, dtype=torch.bool, device=q.device).tril(length - tokens)
    items = (
        item_keys[indices.clamp(min=0)] if len(item_keys) else item_keys.new_zeros(*indices.shape, *item_keys.shape[1:])
    )
    q, q_input, items, input_keys = _wide(q, q if q_input is None else q_input, items, input_keys)

    def log_mass(query: Tensor, keys: Tensor, kept: Tensor) -> Tensor:
        s = torch.einsum("tgrh,tkgh->tgrk", query.unflatten(1, (keys.shape[-2], -1)), keys).flatten(1, 2)
        s = s * (1 / math.sqrt(query.shape[-1]) if scaling is None else scaling)
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
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
    dtype = h_know.dtype
    h_know, h_input = _wide(h_know, h_input)
    return (_unit(h_know) * torch.linalg.vector_norm(h_input, dim=-1, keepdim=True)).to(dtype)


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


_alpha, _rescale = alpha, rescale  # the next function has arguments of these names


def knowledge_shift(
    h_input: Tensor,
    q: Tensor,
    item_keys: Tensor,
    item_values: Tensor,
    indices: Tensor,
    *,
    alpha: Tensor | float | None = None,
    encoder: Sequence[Layer] | None = None,
    encoder_act: str = "identity",
    orientation: str = "knowledge",
    clamp: bool = True,
    token_to_case: Tensor | None = None,
    case_tokens: Tensor | None = None,
    out_proj: Layer | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    rescale: bool = True,
) -> tuple[Tensor, Tensor]:
    """Retrieved knowledge attended to, projected, weighed and mixed in: equations 8 (or 2) and 7 in one.

    h_input [T, d]; q, item_keys, item_values, indices, token_to_case as in `knowledge_attention`; out_proj: weight
    [d, H hv] and bias (None: the heads are already in the space of h_input); encoder as in `encode`. alpha: None
    (equation 7: per token, or with case_tokens [C] per case, taken at that row of h_input; -1: such a case is left
    alone), a number, or a tensor [T] or, with token_to_case, [C] (which wins if T = C). rescale: of the `raw` form.
    Returns h [T, d] and the alpha used, [C] if it is per case, else [T]. A row without an item keeps h_input bit for
    bit, with alpha 0 (orientation "input": 1).
    """
    dtype, raw, untouched = h_input.dtype, q.dim() == 2, 0.0 if orientation == "knowledge" else 1.0
    h_input, q = _wide(h_input, q)
    found = (indices >= 0).any(-1) & (len(item_keys) > 0)
    acts = found if token_to_case is None else _rows(found, token_to_case)  # [T]

    # h_know, zeros where nothing acts: those rows cost nothing.
    rows = acts.nonzero()[:, 0]
    owner = None if token_to_case is None else token_to_case[rows]
    attended = knowledge_attention(
        q[rows],
        item_keys,
        item_values,
        indices[rows] if owner is None else indices,
        scaling=scaling,
        softcap=softcap,
        token_to_case=owner,
    ).flatten(1)
    if out_proj is not None:
        attended = encode(attended, [out_proj])
    h_know = torch.zeros_like(h_input).index_copy(0, rows, attended.to(h_input.dtype))

    per_case = token_to_case is not None and (
        case_tokens is not None if alpha is None else isinstance(alpha, Tensor) and len(alpha) == len(indices)
    )
    if alpha is None:
        at = (h_know, h_input)
        if per_case:
            assert case_tokens is not None
            at, found = (_rows(h_know, case_tokens), _rows(h_input, case_tokens)), found & (case_tokens >= 0)
        a = _alpha(*at, encoder=encoder, act=encoder_act, clamp=clamp)
    else:
        a = alpha.to(h_input.dtype) if isinstance(alpha, Tensor) else h_input.new_full((len(h_input),), alpha)
    a = torch.where(found if per_case else acts, a, untouched)
    per_row = a
    if per_case:
        assert token_to_case is not None
        per_row = torch.where(acts, _rows(a, token_to_case), untouched)

    if raw and rescale:
        h_know = _rescale(h_know, h_input)
    return shift(h_input, h_know, per_row, orientation=orientation).to(dtype), a


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
    towards_p = _similarities(p, p, temperature).logsumexp(-1) - _similarities(p, pool, temperature).logsumexp(-1)
    towards_n = _similarities(n, n, temperature).logsumexp(-1) - _similarities(n, pool, temperature).logsumexp(-1)
    return -(towards_p + towards_n).mean()


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
    dtype = enc_pos.dtype
    p, n = _wide(enc_pos, enc_neg)
    return (p.mean(0) - n.mean(0)).to(dtype)
