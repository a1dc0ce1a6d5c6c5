"""The operators on the CPU in native code (csrc/cpu): one call where the reference takes thirty.

A launcher takes an operator's positional arguments, as those of triton_kernels do. Neurons and shift are for few
tokens; the search leaves the product to torch and keeps the best. What has no native code here (other operators, all
gradients, an alpha that is still to be found, an output projection) is the reference's: those are matrix products,
which torch does well.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native, reference

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cpu/int8_search.h counts them
ACTS = {name: i for i, name in enumerate(("relu", "gelu", "gelu_tanh", "silu", "identity"))}
BACKENDS = ("auto", "cpu")
FEW = 16  # tokens
NEURONS = 4096  # tokens times always-on neurons: beyond, a matrix product and what is around it are the quicker
NOTHING = 8  # the address of an empty tensor, whose own is null: given all the same, and never read
TILE = 8192  # keys that are multiplied at a time: as many as the reference widens at once
PORTABLE = False  # without AVX2: for tests


def new(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """An output, not initialised: the native code writes every element. Tests poison it."""
    if like.dtype == dtype and like.shape == shape:  # half the time
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.empty(shape, dtype=dtype)


def unwatched() -> bool:
    """Whether calling native code past torch's dispatcher makes no difference.

    Nobody wants a gradient, and nobody traces, transforms, profiles or watches operators.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


def launcher(operator: str, args: Sequence[Any], *, always: bool) -> Callable[..., Any] | None:
    """The native code of an operator for these arguments, plain tensors on the CPU; None: the reference.

    always: wherever it can run, not only where it was measured to be faster than the reference.
    """
    if operator == "cosine_topk":
        return cosine_topk
    if operator == "knowledge_shift":
        h_input, alpha, out_weight = args[0], args[5], args[8]
        if alpha is None or out_weight is not None or not (always or len(h_input) <= FEW):
            return None
        return knowledge_shift
    if operator not in ("extra_neurons", "extra_neurons_"):
        return None
    y, args = (args[0], args[1:]) if operator == "extra_neurons_" else (None, args)
    x, keys, route, selected = args[0], args[1], args[7], args[10]
    tokens = x.numel() // max(1, x.shape[-1])
    few = route is not None or selected is not None or tokens * len(keys) <= NEURONS
    if not (always or (few and tokens <= FEW)):
        return None
    return extra_neurons if y is None else extra_neurons_


def extra_neurons_(y: Tensor, x: Tensor, *rest: Any) -> None:
    """`y += extra_neurons(x, ...)`: as the operator of that name, in fp32, rounded once. y may be any view."""
    out = y.contiguous()
    _run_neurons(out, True, x, *rest)
    if out is not y:
        y.copy_(out)


def extra_neurons(x: Tensor, keys: Tensor, key_bias: Tensor | None, values: Tensor, *rest: Any) -> Tensor:
    """[..., d_out] what the neurons add, dtype of x."""
    out = new((*x.shape[:-1], values.shape[1]), x.dtype, x)
    _run_neurons(out, False, x, keys, key_bias, values, *rest)
    return out


def _run_neurons(
    y: Tensor,
    add: bool,
    x: Tensor,
    keys: Tensor,
    key_bias: Tensor | None,
    values: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    zeta: Tensor | None,
    route: Tensor | None,
    group_ptr: Tensor | None,
    token_to_case: Tensor | None,
    selected: Tensor | None,
    act: str,
    beta: float,
) -> None:
    n, d = keys.shape
    tokens = x.numel() // d if d else y.numel() // max(1, values.shape[1])
    rows = tokens if token_to_case is None else len(route) if route is not None else 0
    kept: list[Tensor] = []  # copies that have to live until the call is over
    arrays: list[int] = []
    for t in (x, keys, key_bias, values, up, up_bias, zeta, route):
        if t is None:
            arrays += (0, 0)
            continue
        if not t.is_contiguous():
            kept.append(t := t.contiguous())
        arrays += (t.data_ptr() or NOTHING, DTYPES[t.dtype])
    slots = 0
    if selected is not None:
        rows, slots = selected.shape
    native.cpu().extra_neurons(
        y.data_ptr(),
        DTYPES[y.dtype],
        add,
        *arrays,
        zeta is not None and zeta.dim() == 2,
        _address(group_ptr, kept),
        _address(token_to_case, kept),
        _address(selected, kept),
        tokens,
        d,
        n,
        values.shape[1],
        1 if group_ptr is None else group_ptr.shape[0] - 1,
        rows,
        slots,
        beta,
        ACTS[act],
        PORTABLE,
    )


def knowledge_shift(
    h_input: Tensor,
    q: Tensor,
    item_keys: Tensor,
    item_values: Tensor,
    indices: Tensor,
    alpha: Tensor,
    token_to_case: Tensor | None,
    case_tokens: Tensor | None,
    out_weight: None,
    out_bias: None,
    encoder: Sequence[Tensor],
    encoder_act: str,
    orientation: str,
    clamp: bool,
    scaling: float | None,
    softcap: float | None,
    rescale: bool,
    encoder_rows: Tensor | None,
    folded_weight: Tensor | None,
    folded_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """h [T, d] and the alpha used, where alpha is given and nothing is projected: attention and mix in one call."""
    (tokens, _), (cases, slots) = h_input.shape, indices.shape
    raw = q.dim() == 2
    hd, hv = q.shape[-1], item_values.shape[-1]
    of_case = token_to_case is not None and alpha.shape[0] == cases
    out = new(h_input.shape, h_input.dtype, h_input)
    used = new((cases if of_case else tokens,), torch.float32, alpha)
    kept: list[Tensor] = []
    arrays: list[int] = []
    for t in (h_input, q, item_keys, item_values, alpha):
        if not t.is_contiguous():
            kept.append(t := t.contiguous())
        arrays += (t.data_ptr() or NOTHING, DTYPES[t.dtype])
    native.cpu().knowledge_shift(
        out.data_ptr(),
        used.data_ptr(),
        *arrays,
        _address(indices, kept),
        _address(token_to_case, kept),
        tokens,
        cases,
        item_keys.shape[0],
        1 if raw else q.shape[1],
        1 if raw else item_keys.shape[1],
        hd,
        hv,
        slots,
        hd**-0.5 if scaling is None else scaling,
        0.0 if softcap is None else softcap,
        of_case,
        orientation == "input",
        raw and rescale,
        PORTABLE,
    )
    return out, used


def cosine_topk(
    q: Tensor, keys: Tensor, k: int, key_norm: Tensor | None, ranges: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and indices [..., k], as the operator of that name: torch's product in float32, tile by tile.

    The selection reads each product once, and no more than [T, TILE] products are kept.
    """
    queries, n = q.shape[:-1].numel(), len(keys)
    unit = reference._unit(q.reshape(queries, q.shape[-1]).float())
    shape = (*q.shape[:-1], k)
    scores, indices = new(shape, torch.float32, q).fill_(-torch.inf), new(shape, torch.int64, q).fill_(-1)
    found, kept = torch.zeros(queries, dtype=torch.int64), list[Tensor]()
    if queries > 0 and k > 0:
        for first in range(0, n, TILE):
            rows = keys[first : first + TILE].float()
            norm = (
                torch.linalg.vector_norm(rows, dim=-1) if key_norm is None else key_norm[first : first + TILE].float()
            )
            norm, products = norm.contiguous(), (unit @ rows.mT).contiguous()
            native.cpu().keep_best(
                *(products.data_ptr(), norm.data_ptr(), _address(ranges, kept)),
                *(scores.data_ptr(), indices.data_ptr(), found.data_ptr(), queries, len(rows), first, k),
            )
    return scores, indices


def _address(index: Tensor | None, kept: list[Tensor]) -> int:
    if index is None:
        return 0
    if not index.is_contiguous():
        kept.append(index := index.contiguous())
    return index.data_ptr() or NOTHING


# ------------------------------------------------------------------------------------------------------- while decoding


# For one token the native code runs for a microsecond or two, and the operators' checks and torch's dispatcher for
# twenty. The two functions below are called past both, by modules that know what they pass, while `unwatched`. They
# look at what a user can change (dtypes, devices, shapes, layouts), and say no wherever something does not suit.


def add_neurons(
    y: Tensor,
    x: Tensor,
    buffers: dict[str, Tensor | None],
    token_to_case: Tensor | None,
    selected: Tensor | None,
    act: str,
) -> bool:
    """`extra_neurons_` of the buffers of an ExtraNeurons module, if it can be had here."""
    keys, key_bias, values = buffers.get("keys"), buffers.get("key_bias"), buffers.get("values")
    group_ptr, up, up_bias = buffers.get("group_ptr"), buffers.get("up"), buffers.get("up_bias")
    dtype, code = x.dtype, DTYPES.get(x.dtype)
    module = native.cpu()
    if module is None or code is None or keys is None or key_bias is None or values is None or group_ptr is None:
        return False
    n, d = keys.shape
    rows, slots = (0, 0) if selected is None else selected.shape
    count = x.numel()
    if y.shape != x.shape or x.shape[-1] != d or count > FEW * d or (selected is None and count * n > NEURONS * d):
        return False
    if selected is not None and (token_to_case is None or token_to_case.shape[0] * d != count):
        return False
    for t in (x, y, keys, key_bias, values, *(() if up is None or up_bias is None else (up, up_bias))):
        if not (t.dtype is dtype and t.is_cpu and t.is_contiguous()):
            return False
    if type(x) is not Tensor or type(y) is not Tensor:
        return False
    gate, gate_bias = (0, 0) if up is None or up_bias is None else (up.data_ptr(), up_bias.data_ptr())
    module.extra_neurons(
        *(y.data_ptr(), code, True, x.data_ptr(), code, keys.data_ptr(), code, key_bias.data_ptr(), code),
        *(values.data_ptr(), code, gate, code, gate_bias, code, 0, 0, 0, 0, False, group_ptr.data_ptr()),
        0 if selected is None or token_to_case is None else token_to_case.data_ptr(),
        0 if selected is None else selected.data_ptr() or NOTHING,
        *(count // d, d, n, d, group_ptr.shape[0] - 1, rows, slots, 0.0, ACTS[act], PORTABLE),
    )
    return True


def mix_items(
    heads: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    indices: Tensor,
    alpha: Tensor,
    token_to_case: Tensor,
    scaling: float | None,
    softcap: float | None,
    of_input: bool,
) -> Tensor | None:
    """`knowledge_shift` with the alpha of each case: heads [..., H hv] mixed with knowledge, if it can be had here.

    q [..., H hd], keys [N, Hkv, hd], values [N, Hkv, hv], indices [C, K], alpha [C] float32, token_to_case [T].
    """
    dtype, code = heads.dtype, DTYPES.get(heads.dtype)
    module = native.cpu()
    if module is None or code is None or keys.dim() != 3 or type(heads) is not Tensor or type(q) is not Tensor:
        return None
    (items, kv_heads, hd), hv, (cases, slots), tokens = keys.shape, values.shape[2], indices.shape, len(token_to_case)
    width, count = heads.shape[-1], q.numel()
    query_heads = width // hv
    if items == 0 or tokens > FEW or heads.numel() != tokens * width or count != tokens * query_heads * hd:
        return None
    if query_heads * hv != width or query_heads % kv_heads or alpha.dtype is not torch.float32:
        return None
    for t in (heads, q, keys, values):
        if not (t.dtype is dtype and t.is_cpu and t.is_contiguous()):
            return None
    if not (indices.is_contiguous() and alpha.is_contiguous() and alpha.is_cpu):
        return None
    out = torch.empty_like(heads)
    module.knowledge_shift(
        *(out.data_ptr(), 0, heads.data_ptr(), code, q.data_ptr(), code, keys.data_ptr(), code),
        *(values.data_ptr(), code, alpha.data_ptr(), 0, indices.data_ptr() or NOTHING, token_to_case.data_ptr()),
        *(tokens, cases, items, query_heads, kv_heads, hd, hv, slots, hd**-0.5 if scaling is None else scaling),
        *(softcap or 0.0, True, of_input, False, PORTABLE),
    )
    return out
