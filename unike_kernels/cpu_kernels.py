"""The operators for few tokens on the CPU, in native code (csrc/cpu): one call where the reference takes thirty.

A launcher takes an operator's positional arguments, as those of triton_kernels do. What has none here (other
operators, all gradients, an alpha that is still to be found, an output projection) is the reference's: those are
matrix products, which torch does well.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import native

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/cpu/int8_search.h counts them
ACTS = {name: i for i, name in enumerate(("relu", "gelu", "gelu_tanh", "silu", "identity"))}
FEW = 16  # tokens
NEURONS = 4096  # always on: what one thread goes through as fast as a matrix product with its surroundings
NOTHING = 8  # the address of an empty tensor, whose own is null: given all the same, and never read
PORTABLE = False  # without AVX2: for tests


def new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An output, not initialised: the native code writes every element. Tests poison it."""
    return torch.empty(shape, dtype=dtype)


def launcher(operator: str, args: Sequence[Any], *, always: bool) -> Callable[..., Any] | None:
    """The native code of an operator for these arguments, plain tensors on the CPU; None: the reference.

    always: wherever it can run, not only where it was measured to be faster than the reference.
    """
    if operator == "knowledge_shift":
        h_input, alpha, out_weight = args[0], args[5], args[8]
        if alpha is None or out_weight is not None or not (always or len(h_input) <= FEW):
            return None
        return knowledge_shift
    if operator not in ("extra_neurons", "extra_neurons_"):
        return None
    y, args = (args[0], args[1:]) if operator == "extra_neurons_" else (None, args)
    x, keys, route, selected = args[0], args[1], args[7], args[10]
    few = x.numel() <= FEW * x.shape[-1] and (route is not None or selected is not None or len(keys) <= NEURONS)
    if not (always or few):
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
    out = new((*x.shape[:-1], values.shape[1]), dtype=x.dtype)
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
        1 if group_ptr is None else len(group_ptr) - 1,
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
) -> tuple[Tensor, Tensor]:
    """h [T, d] and the alpha used, where alpha is given and nothing is projected: attention and mix in one call."""
    tokens, cases = len(h_input), len(indices)
    raw = q.dim() == 2
    hd, hv = q.shape[-1], item_values.shape[-1]
    of_case = token_to_case is not None and len(alpha) == cases
    out = new(h_input.shape, dtype=h_input.dtype)
    used = new((cases if of_case else tokens,), dtype=torch.float32)
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
        len(item_keys),
        1 if raw else q.shape[1],
        1 if raw else item_keys.shape[1],
        hd,
        hv,
        indices.shape[1],
        hd**-0.5 if scaling is None else scaling,
        0.0 if softcap is None else softcap,
        of_case,
        orientation == "input",
        raw and rescale,
        PORTABLE,
    )
    return out, used


def _address(index: Tensor | None, kept: list[Tensor]) -> int:
    if index is None:
        return 0
    if not index.is_contiguous():
        kept.append(index := index.contiguous())
    return index.data_ptr() or NOTHING
