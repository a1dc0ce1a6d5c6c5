"""extra_neurons and extra_neurons_: which kernels run, and on what.

- `selected` with few tokens, or with a list per token: `selected_rows`, one launch.
- `selected` per case with more tokens: `selected_tiles`, one launch.
- all groups, or dense route weights: `hidden`, then `weighted_rows`, over chunks of tokens whose activations fit into
  WORKSPACE bytes; before them `neuron_groups` where a route or zeta belongs to single groups.
"""

from typing import Any, TypeAlias

import torch
import triton.language as tl
from torch import Tensor

from . import launching, tuning
from .extra_neurons_kernels import hidden, neuron_groups, selected_rows, selected_tiles, weighted_rows
from .launching import contiguous_rows

Maybe: TypeAlias = Tensor | None
FEW_TOKENS = 64  # up to here a decode step, where tokens seldom share a case; this operator's own choice of kernel
WORKSPACE = 128 << 20  # bytes of activations at a time
MOST_TOKENS = 1 << 19  # at a time: a grid's second dimension ends at 65535 tiles of 16

_CPU = tuning.INTERPRETER
tuning.ROWS += [
    # About 132 programs at every T, where d_out allows; no more columns than 16 rows of them leave registers for. H100,
    # d = 4096, us: T = 1 BD 128 9.5, 256 10.3; T = 16 12.2 (BD 128 33); T = 64 15.6 (8 warps 20.9, BK 512 16.5).
    tuning.Row("selected_rows", _CPU, {}, {"BN": 16, "BK": 64, "BD": 64, "num_warps": 1}),
    tuning.Row("selected_rows", 0, {"slow": 0, "tokens": 2}, {"BN": 16, "BK": 1024, "BD": 128, "num_warps": 8}),
    tuning.Row("selected_rows", 0, {"slow": 0, "tokens": 8}, {"BN": 16, "BK": 1024, "BD": 256, "num_warps": 8}),
    tuning.Row("selected_rows", 0, {"slow": 0, "tokens": 16}, {"BN": 16, "BK": 1024, "BD": 512, "num_warps": 8}),
    tuning.Row("selected_rows", 0, {"slow": 0}, {"BN": 16, "BK": 1024, "BD": 1024, "num_warps": 4}),
    tuning.Row("selected_rows", 0, {}, {"BN": 16, "BK": 256, "BD": 256, "num_warps": 8}),
    tuning.Row("selected_tiles", _CPU, {}, {"BT": 16, "BN": 16, "BK": 64, "BD": 64, "num_warps": 1}),
    tuning.Row(
        "selected_tiles", 0, {"slow": 0}, {"BT": 32, "BN": 16, "BK": 128, "BD": 256, "num_warps": 8, "num_stages": 3}
    ),
    tuning.Row("selected_tiles", 0, {}, {"BT": 16, "BN": 16, "BK": 32, "BD": 128, "num_warps": 4, "num_stages": 2}),
    tuning.Row("neuron_groups", 0, {}, {"BN": 256, "num_warps": 4}),
    tuning.Row("hidden", _CPU, {}, {"BT": 32, "BN": 32, "BK": 64, "num_warps": 1}),
    tuning.Row(
        "hidden", 0, {"slow": 0, "tokens": 16}, {"BT": 16, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4}
    ),
    tuning.Row("hidden", 0, {"slow": 0, "tokens": 64}, {"BT": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 4}),
    tuning.Row("hidden", 0, {"slow": 0}, {"BT": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3}),
    tuning.Row("hidden", 0, {}, {"BT": 16, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2}),
    tuning.Row("weighted_rows", _CPU, {}, {"BT": 32, "BN": 32, "BD": 64, "num_warps": 1}),
    # 32 columns a program: 128 programs at d_out = 4096, so that one token fills the GPU without a third launch.
    tuning.Row(
        "weighted_rows", 0, {"slow": 0, "tokens": 16}, {"BT": 16, "BN": 128, "BD": 32, "num_warps": 4, "num_stages": 4}
    ),
    tuning.Row(
        "weighted_rows", 0, {"slow": 0, "tokens": 64}, {"BT": 64, "BN": 64, "BD": 64, "num_warps": 4, "num_stages": 4}
    ),
    tuning.Row("weighted_rows", 0, {"slow": 0}, {"BT": 128, "BN": 64, "BD": 128, "num_warps": 8, "num_stages": 3}),
    tuning.Row("weighted_rows", 0, {}, {"BT": 16, "BN": 32, "BD": 32, "num_warps": 4, "num_stages": 2}),
]


def extra_neurons(x: Tensor, keys: Tensor, key_bias: Maybe, values: Tensor, *rest: Any) -> Tensor:
    """[..., d_out] in x's dtype; arguments as in `ops.extra_neurons`, in the operator's order."""
    y = launching.new((*x.shape[:-1], values.shape[1]), x.dtype, x.device)
    _run(y.view(-1, values.shape[1]), False, x, keys, key_bias, values, *rest)
    return y


def extra_neurons_(y: Tensor, x: Tensor, *rest: Any) -> None:
    """y += extra_neurons(x, ...), rounded once."""
    d_out = y.shape[-1]
    if x.numel() and x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr():
        x = launching.new(x.shape, x.dtype, x.device).copy_(x)  # programs read all of x while others write y
    flat = contiguous_rows(y.reshape(-1, d_out))
    _run(flat, True, x, *rest)
    if flat.data_ptr() != y.data_ptr():  # strides that no [T, d_out] view has
        y.copy_(flat.view(y.shape))


def flat_rows(tensor: Tensor) -> Tensor:
    """[..., d] as [T, d], its last dimension contiguous."""
    return contiguous_rows(tensor.reshape(tensor.shape[:-1].numel(), tensor.shape[-1]))


def dot_dtype(*tensors: Maybe) -> torch.dtype:
    """What dots take: the one half precision dtype of all tensors, or float32."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def slow(dot: torch.dtype, *sizes: int) -> int:
    """1 for float32 dots and for rows that are no multiple of 16 bytes: both want small tiles, or registers spill."""
    return int(dot == torch.float32 or any(size % 8 for size in sizes))


TRITON = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


def stride(tensor: Maybe) -> int:
    """Elements from row to row; 0 where there is one row, or none."""
    return tensor.stride(0) if tensor is not None and tensor.dim() == 2 else 0


def groups_of(keys: Tensor, group_ptr: Tensor) -> Tensor:
    """[n] int32, the group of each neuron, -1: spare."""
    n, groups = keys.shape[0], group_ptr.shape[0] - 1
    group_of = launching.new((n,), torch.int32, keys.device)
    choice = tuning.choose("neuron_groups", keys.device, n=n)
    grid = (-(-n // choice["BN"]),)
    launching.launch(neuron_groups, grid, group_of, group_ptr, groups, n, STEPS=groups.bit_length(), **choice)
    return group_of


def _run(
    y: Tensor, in_place: bool, x: Tensor, keys: Tensor, key_bias: Maybe, values: Tensor, up: Maybe, up_bias: Maybe,
    zeta: Maybe, route: Maybe, group_ptr: Maybe, token_to_case: Maybe, selected: Maybe, act: str, beta: float,
) -> None:  # fmt: skip
    x = flat_rows(x)
    zeta = None if beta == 0 else zeta
    keys, values = contiguous_rows(keys), contiguous_rows(values)
    key_bias, up, up_bias, zeta, route, group_ptr, token_to_case, selected = (
        None if t is None else contiguous_rows(t)
        for t in (key_bias, up, up_bias, zeta, route, group_ptr, token_to_case, selected)
    )
    if selected is None:
        if route is None:
            token_to_case = None
        args = (keys, key_bias, values, up, up_bias, zeta, route, group_ptr, token_to_case)
        return _dense(y, in_place, x, *args, act, beta)
    (tokens, d), (n, d_out) = x.shape, values.shape
    dot = dot_dtype(x, keys, up, values)
    tensors = (keys, key_bias, values, up, up_bias, zeta, route, group_ptr, token_to_case, selected)
    strides = [stride(t) for t in (y, x, keys, values, up, zeta, route, selected)]
    sizes = (n, d, d_out, selected.shape[1], beta, *strides)
    if token_to_case is None or tokens <= FEW_TOKENS:
        choice = tuning.choose("selected_rows", x.device, tokens=tokens, d_out=d_out, slow=slow(dot, d, d_out))
        grid = (tokens, -(-d_out // choice["BD"]))
        launching.launch(selected_rows, grid, y, x, *tensors, *sizes, ACT=act, IN_PLACE=in_place, **choice)
    else:
        choice = tuning.choose("selected_tiles", x.device, tokens=tokens, d_out=d_out, slow=slow(dot, d, d_out))
        grid = (-(-tokens // choice["BT"]), -(-d_out // choice["BD"]))
        constants = {"ACT": act, "IN_PLACE": in_place, "DOT": TRITON[dot], **choice}
        launching.launch(selected_tiles, grid, y, x, *tensors, tokens, *sizes, **constants)


def _dense(
    y: Tensor, in_place: bool, x: Tensor, keys: Tensor, key_bias: Maybe, values: Tensor, up: Maybe, up_bias: Maybe,
    zeta: Maybe, route: Maybe, group_ptr: Maybe, token_to_case: Maybe, act: str, beta: float,
) -> None:  # fmt: skip
    (tokens, d), (n, d_out) = x.shape, values.shape
    groups = 1 if group_ptr is None else group_ptr.shape[0] - 1
    dot = dot_dtype(x, keys, up, values)
    per_group = zeta is not None and zeta.dim() == 2
    group_of = groups_of(keys, group_ptr) if group_ptr is not None and (route is not None or per_group) else None
    if zeta is not None and group_of is None:
        zeta = zeta.reshape(-1)[:d_out]  # of the one group
    few = min(MOST_TOKENS, max(128, WORKSPACE // max(1, n * dot.itemsize) // 128 * 128))
    for first in range(0, tokens, few):
        part = slice(first, min(first + few, tokens))
        count = part.stop - first
        o = launching.new((count, n), dot, x.device)
        x_part, y_part = x[part], y[part]
        cases = None if token_to_case is None else token_to_case[part]
        weight = route[part] if route is not None and cases is None else route
        choice = tuning.choose("hidden", x.device, tokens=count, n=n, slow=slow(dot, d, d_out))
        grid = (-(-n // choice["BN"]), -(-count // choice["BT"]))
        constants = {"ACT": act, "DOT": TRITON[dot], **choice}
        sizes = (count, n, groups, d, *(stride(t) for t in (o, x, keys, up, route)))
        tensors = (o, x_part, keys, key_bias, up, up_bias, weight, group_of, group_ptr, cases)
        launching.launch(hidden, grid, *tensors, *sizes, **constants)
        zeta_of = group_of if per_group else None
        weighted(y_part, o, values, count, zeta, zeta_of, group_ptr, beta, in_place, route is not None, dot)


def weighted(
    y: Tensor, o: Tensor, values: Tensor, tokens: int, zeta: Maybe, group_of: Maybe, group_ptr: Maybe, beta: float,
    in_place: bool, routed: bool, dot: torch.dtype, first_row: int = 0,
) -> None:  # fmt: skip
    """y[T, d_out] (+)= o[T, n] times the rows of `values` from first_row on: see `weighted_rows`."""
    n, d_out = o.shape[1], values.shape[1]
    groups = 1 if group_ptr is None else group_ptr.shape[0] - 1
    choice = tuning.choose("weighted_rows", y.device, tokens=tokens, d_out=d_out, slow=slow(dot, n, d_out))
    grid = (-(-tokens // choice["BT"]), -(-d_out // choice["BD"]))
    sizes = (tokens, n, groups, d_out, beta, first_row, *(stride(t) for t in (y, o, values, zeta)))
    constants = {"IN_PLACE": in_place, "DOT": TRITON[dot], "ROUTED": routed, **choice}
    launching.launch(weighted_rows, grid, y, o, values, zeta, group_of, group_ptr, *sizes, **constants)
