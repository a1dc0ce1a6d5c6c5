"""The operators on the CPU in native code (csrc/cpu): one call where the reference takes thirty.

A launcher takes an operator's positional arguments, as those of triton_kernels do. Neurons and shift are for few
tokens. The search is one pass over the keys for up to MOST_SCANNED_QUERIES queries; for more, the product is torch's
and this keeps the best. What has no native code here (other operators, all gradients, an encoder, an output projection)
is the reference's: those are matrix products, which torch does well.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import native, reference

_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_functorch, _trace = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_profiles = torch.autograd._profiler_enabled  # looked up once: `unwatched` is asked in every step
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/dtype.h counts them
ACTS = {name: i for i, name in enumerate(("relu", "gelu", "gelu_tanh", "silu", "identity"))}
BACKENDS = ("auto", "cpu")
MOST_TOKENS = 16
MOST_PRODUCTS = 4096  # tokens times always-on neurons: beyond, a matrix product and what is around it are the quicker
EMPTY_ADDRESS = 8  # of an empty tensor, whose own is null: given all the same, and never read
TILE = 8192  # keys that are multiplied at a time: as many as the reference widens at once
MOST_SCANNED_QUERIES = 64  # up to here a pass over the keys is quicker than torch's product
MOST_GATHERED_BYTES = 2**20  # of items that a step copies
PORTABLE = False  # without AVX2: for tests
LEVEL = "best"  # of instructions, one of native.LEVELS: less is for tests

Array = tuple[int, int]  # address and dtype, as csrc/cpu/operators.h has them
NO_ARRAY: Array = (0, 0)


class NeuronCall(NamedTuple):
    """What extra_neurons takes: the fields of its struct (csrc/cpu/operators.h) in order, then `portable`."""

    y: int = 0
    y_dtype: int = 0
    add: bool = False
    x: Array = NO_ARRAY
    keys: Array = NO_ARRAY
    key_bias: Array = NO_ARRAY
    values: Array = NO_ARRAY
    up: Array = NO_ARRAY
    up_bias: Array = NO_ARRAY
    zeta: Array = NO_ARRAY
    route: Array = NO_ARRAY
    zeta_of_group: bool = False
    group_ptr: int = 0
    token_to_case: int = 0
    selected: int = 0
    tokens: int = 0
    d: int = 0
    n: int = 0
    d_out: int = 0
    groups: int = 0
    rows: int = 0
    slots: int = 0
    beta: float = 0.0
    act: int = 0
    portable: bool = False


class ShiftCall(NamedTuple):
    """What knowledge_shift takes: the fields of its struct (csrc/cpu/operators.h) in order, then `portable`."""

    out: int = 0
    used: int = 0
    h_input: Array = NO_ARRAY
    q: Array = NO_ARRAY
    keys: Array = NO_ARRAY
    values: Array = NO_ARRAY
    alpha: Array = NO_ARRAY
    indices: int = 0
    token_to_case: int = 0
    tokens: int = 0
    cases: int = 0
    items: int = 0
    heads: int = 0
    kv_heads: int = 0
    hd: int = 0
    hv: int = 0
    slots: int = 0
    scaling: float = 0.0
    softcap: float = 0.0
    alpha_of_case: bool = False
    alpha_of_input: bool = False
    rescale: bool = False
    clamp: bool = False
    portable: bool = False


def new(shape: Sequence[int], dtype: torch.dtype, like: Tensor) -> Tensor:
    """An output, not initialised: the native code writes every element. Tests poison it."""
    if like.dtype == dtype and like.shape == shape:  # half the time
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return torch.empty(shape, dtype=dtype)


def unwatched() -> bool:
    """Whether calling native code past torch's dispatcher makes no difference.

    Nobody wants a gradient or a tangent, and nobody traces, transforms, profiles or watches operators.
    """
    return (
        not is_compiling()
        and not is_grad_enabled()
        and forward_ad._current_level < 0
        and _dispatch_modes() == 0
        and _function_modes() == 0
        and _functorch() is None
        and _trace() is None
        and not _profiles()
    )


def launcher(operator: str, args: Sequence[Any], *, always: bool) -> Callable[..., Any] | None:
    """The native code of an operator for these arguments, plain tensors on the CPU; None: the reference.

    always: wherever it can run, not only where it was measured to be faster than the reference.
    """
    if operator == "cosine_topk":
        return cosine_topk
    if operator == "knowledge_shift":
        h_input, alpha, case_tokens, out_weight, encoder, rows, folded = (args[i] for i in (0, 5, 7, 8, 10, 17, 18))
        if alpha is None and (case_tokens is not None or encoder or rows is not None or folded is not None):
            return None
        if out_weight is not None or not (always or len(h_input) <= MOST_TOKENS):
            return None
        return knowledge_shift
    if operator not in ("extra_neurons", "extra_neurons_"):
        return None
    y, args = (args[0], args[1:]) if operator == "extra_neurons_" else (None, args)
    x, keys, route, selected = args[0], args[1], args[7], args[10]
    tokens = x.numel() // max(1, x.shape[-1])
    few = route is not None or selected is not None or tokens * len(keys) <= MOST_PRODUCTS
    if not (always or (few and tokens <= MOST_TOKENS)):
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
    kept: list[Tensor] = []
    slots = 0
    if selected is not None:
        rows, slots = selected.shape
    call = NeuronCall(
        y=y.data_ptr(),
        y_dtype=DTYPES[y.dtype],
        add=add,
        x=_array(x, kept),
        keys=_array(keys, kept),
        key_bias=_array(key_bias, kept),
        values=_array(values, kept),
        up=_array(up, kept),
        up_bias=_array(up_bias, kept),
        zeta=_array(zeta, kept),
        route=_array(route, kept),
        zeta_of_group=zeta is not None and zeta.dim() == 2,
        group_ptr=_address(group_ptr, kept),
        token_to_case=_address(token_to_case, kept),
        selected=_address(selected, kept),
        tokens=tokens,
        d=d,
        n=n,
        d_out=values.shape[1],
        groups=1 if group_ptr is None else group_ptr.shape[0] - 1,
        rows=rows,
        slots=slots,
        beta=beta,
        act=ACTS[act],
        portable=PORTABLE,
    )
    native.cpu().extra_neurons(*call)


def knowledge_shift(
    h_input: Tensor,
    q: Tensor,
    item_keys: Tensor,
    item_values: Tensor,
    indices: Tensor,
    alpha: Tensor | None,
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
    """h [T, d] and the alpha used, where nothing is projected or encoded: attention, cosine and mix in one call."""
    (tokens, _), (cases, slots), of_q, of_keys = h_input.shape, indices.shape, q.shape, item_keys.shape
    raw = len(of_q) == 2
    hd, hv = of_q[-1], item_values.shape[-1]
    of_case = alpha is not None and token_to_case is not None and alpha.shape[0] == cases
    out = new(h_input.shape, h_input.dtype, h_input)
    used = new((cases if of_case else tokens,), torch.float32, h_input if alpha is None else alpha)
    kept: list[Tensor] = []
    call = ShiftCall(
        out=out.data_ptr(),
        used=used.data_ptr(),
        h_input=_array(h_input, kept),
        q=_array(q, kept),
        keys=_array(item_keys, kept),
        values=_array(item_values, kept),
        alpha=_array(alpha, kept),
        indices=_address(indices, kept),
        token_to_case=_address(token_to_case, kept),
        tokens=tokens,
        cases=cases,
        items=of_keys[0],
        heads=1 if raw else of_q[1],
        kv_heads=1 if raw else of_keys[1],
        hd=hd,
        hv=hv,
        slots=slots,
        scaling=hd**-0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        alpha_of_case=of_case,
        alpha_of_input=orientation == "input",
        rescale=raw and rescale,
        clamp=clamp,
        portable=PORTABLE,
    )
    native.cpu().knowledge_shift(*call)
    return out, used


def cosine_topk(
    q: Tensor, keys: Tensor, k: int, key_norm: Tensor | None, ranges: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scores and indices [..., k], as the operator of that name.

    For few queries in one pass over the keys, each of which is widened in a register; otherwise torch's product in
    float32, tile by tile, of which no more than [T, TILE] products are kept.
    """
    queries, (n, d) = q.shape[:-1].numel(), keys.shape
    unit = reference._unit(q.reshape(queries, q.shape[-1]).float())
    shape, kept = (*q.shape[:-1], k), list[Tensor]()
    module, level = native.cpu(), native.LEVELS.index(LEVEL)
    if 0 < queries <= MOST_SCANNED_QUERIES and d > 0 and n > 0 and module.can_scan(level):
        if keys.stride(1) != 1 or keys.stride(0) < d:
            keys = keys.contiguous()
        norm = torch.linalg.vector_norm(keys.float(), dim=-1) if key_norm is None else key_norm.float()
        norm, unit = norm.contiguous(), unit.contiguous()
        halves = q.contiguous() if q.dtype == keys.dtype == torch.bfloat16 else None
        scores, indices = new(shape, torch.float32, q), new(shape, torch.int64, q)
        found = new((queries,), torch.int64, q)
        module.scan(
            *(
                unit.data_ptr(),
                0 if halves is None else halves.data_ptr(),
                keys.data_ptr(),
                DTYPES[keys.dtype],
                n,
                d,
                keys.stride(0),
                norm.data_ptr(),
            ),
            *(_address(t, kept) for t in (ranges, scores, indices, found)),
            *(queries, k, torch.get_num_threads(), level),
        )
        return scores, indices
    scores, indices = new(shape, torch.float32, q).fill_(-torch.inf), new(shape, torch.int64, q).fill_(-1)
    found = torch.zeros(queries, dtype=torch.int64)
    if queries > 0 and k > 0:
        for first in range(0, n, TILE):
            rows = keys[first : first + TILE].float()
            norm = (
                torch.linalg.vector_norm(rows, dim=-1) if key_norm is None else key_norm[first : first + TILE].float()
            )
            norm, products = norm.contiguous(), (unit @ rows.mT).contiguous()
            module.keep_best(
                *(products.data_ptr(), norm.data_ptr(), _address(ranges, kept)),
                *(scores.data_ptr(), indices.data_ptr(), found.data_ptr(), queries, len(rows), first, k),
            )
    return scores, indices


def _array(t: Tensor | None, kept: list[Tensor]) -> Array:
    return NO_ARRAY if t is None else (_address(t, kept), DTYPES[t.dtype])


def _address(t: Tensor | None, kept: list[Tensor]) -> int:
    """Of all its elements in a row; a copy made for that goes to `kept`, where it lives until the call is over."""
    if t is None:
        return 0
    if not t.is_contiguous():
        kept.append(t := t.contiguous())
    return t.data_ptr() or EMPTY_ADDRESS


# ------------------------------------------------------------------------------------------------------- while decoding


# For one token the native code runs for a microsecond or two, and the operators' checks and torch's dispatcher for
# twenty. So modules that know what they pass prepare a step (csrc/cpu/bindings_steps.h) and call it past both, while
# `unwatched`: it says no where a given tensor does not suit, and None where a table is no longer what it was. What is
# checked here, once, are sizes, dtypes, devices and layouts.

Step = Callable[..., bool | None]


class Stays(NamedTuple):
    """A tensor that a step finds anew, owner[name], and reads as a field. Where it is another, the step is over."""

    field: str | None
    owner: dict[str, Any] | None
    name: str | None
    tensor: Tensor

    @classmethod
    def ours(cls, field: str, tensor: Tensor) -> "Stays":
        """It belongs to nobody else: there is no place to look for another."""
        return cls(field, None, None, tensor)

    @classmethod
    def copied(cls, owner: dict[str, Any], name: str) -> "Stays":
        """The step reads a copy, so long as nobody writes to the tensor."""
        return cls(None, owner, name, owner[name])


def neurons_step(
    x: Tensor, buffers: dict[str, Any], token_to_case: Tensor | None, selected: Tensor | None, act: str
) -> Step | None:
    """`extra_neurons_(y, x, ...)` of an ExtraNeurons module's buffers as a step(y, x), if it can be had here."""
    module, keys, values = native.cpu(), buffers.get("keys"), buffers.get("values")
    if module is None or keys is None or values is None or not _dense(buffers.values(), keys.dtype):
        return None
    if not _dense((token_to_case, selected), torch.int64) or (selected is not None and token_to_case is None):
        return None
    (n, d), count = keys.shape, x.numel()
    tokens = count // d
    rows, slots = (0, 0) if selected is None else selected.shape
    few = tokens * n <= MOST_PRODUCTS if token_to_case is None or selected is None else token_to_case.numel() == tokens
    if x.shape[-1] != d or tokens > MOST_TOKENS or not few:
        return None
    code = DTYPES[keys.dtype]
    later = (0, code)  # its address is put in when the step knows it
    call = NeuronCall(
        y_dtype=code,
        add=True,
        x=later,
        keys=later,
        key_bias=later,
        values=later,
        up=later,
        up_bias=later,
        tokens=tokens,
        d=d,
        n=n,
        d_out=d,
        groups=buffers["group_ptr"].shape[0] - 1,
        rows=rows,
        slots=slots,
        act=ACTS[act],
        portable=PORTABLE,
    )
    stay = [Stays(name, buffers, name, t) for name, t in buffers.items() if t is not None]
    if selected is not None and token_to_case is not None:
        stay += [Stays.ours("token_to_case", token_to_case), Stays.ours("selected", selected)]
    return module.neurons_step(call, (("y", count), ("x", count)), tuple(stay), Tensor, keys.dtype, None)


def shift_step(
    heads: Tensor,
    q: Tensor,
    buffers: dict[str, Any],
    indices: Tensor,
    alpha: Tensor,
    token_to_case: Tensor,
    scaling: float | None,
    softcap: float | None,
    of_input: bool,
    own: Tensor | None = None,
) -> Step | None:
    """`knowledge_shift` with the alpha of each case as a step(out, heads, q), if it can be had here.

    heads, out [..., H hv]; q [..., H hd]; of `buffers`, those of a memory, keys [N, Hkv, hd] and values [N, Hkv, hv];
    indices [C, K]; alpha [C]; token_to_case [T]. own: an `out` that suits. Few and short items are copied side by side,
    until the tables change: there each lies on a page of its own, whose address is looked up anew in every step.
    """
    module, keys, values = native.cpu(), buffers["keys"], buffers["values"]
    if module is None or keys.dim() != 3 or not _dense((keys, values), keys.dtype):
        return None
    if not _dense((indices, token_to_case), torch.int64) or not _dense((alpha,), torch.float32):
        return None
    (items, kv_heads, hd), hv, (cases, slots), tokens = keys.shape, values.shape[2], indices.shape, len(token_to_case)
    width = heads.shape[-1]
    count = width // hv
    if items == 0 or tokens > MOST_TOKENS or count * hv != width or count % kv_heads:
        return None
    tables = [Stays("keys", buffers, "keys", keys), Stays("values", buffers, "values", values)]
    if cases * slots * (keys[0].numel() + values[0].numel()) * keys.itemsize <= MOST_GATHERED_BYTES:
        if not (keys.is_inference() or values.is_inference()):  # of those nobody counts the changes
            tables = [Stays.copied(buffers, "keys"), Stays.copied(buffers, "values")]
            with torch.inference_mode(False), torch.no_grad():
                rows, items = indices.flatten().clamp(min=0), cases * slots
                tables += [Stays.ours("keys", keys[rows]), Stays.ours("values", values[rows])]
                indices = torch.arange(items).view(cases, slots).masked_fill(indices < 0, -1)
    later = (0, DTYPES[keys.dtype])  # its address is put in when the step knows it
    call = ShiftCall(
        h_input=later,
        q=later,
        keys=later,
        values=later,
        alpha=(0, DTYPES[alpha.dtype]),
        tokens=tokens,
        cases=cases,
        items=items,
        heads=count,
        kv_heads=kv_heads,
        hd=hd,
        hv=hv,
        slots=slots,
        scaling=hd**-0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        alpha_of_case=True,
        alpha_of_input=of_input,
        portable=PORTABLE,
    )
    ours = {"indices": indices, "alpha": alpha, "token_to_case": token_to_case}
    stay = (*tables, *(Stays.ours(field, t) for field, t in ours.items()))
    given = (("out", tokens * width), ("h_input", tokens * width), ("q", tokens * count * hd))
    return module.shift_step(call, given, stay, Tensor, keys.dtype, own)


def _dense(tensors: Iterable[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether native code can read all of these: indices, and numbers of one dtype that it knows."""
    for t in tensors:
        if t is not None and not (t.is_cpu and t.is_contiguous() and t.dtype in (dtype, torch.int64)):
            return False
    return dtype in DTYPES or dtype == torch.int64
