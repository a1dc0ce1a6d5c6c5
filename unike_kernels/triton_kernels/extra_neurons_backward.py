"""extra_neurons_backward: which kernels run, and on what.

Always the dense form: lists of selected groups become a [C, G] table of weights first, and tiles in which no weight is
set are skipped. That is cheap beside the gradients themselves, which are as large as the weights. Neurons are taken in
chunks whose [T, chunk] workspaces fit into WORKSPACE bytes; dots run in bfloat16 where everything is bfloat16, else in
float32: products of float16 gradients with weights leave its range.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launching, tuning
from .extra_neurons import TRITON, WORKSPACE, Maybe, dot_dtype, flat_rows, groups_of, slow, weighted
from .extra_neurons import stride as stride_of
from .extra_neurons_grads import bias_grads, hidden_grads, route_grads, route_of_selected, rows_grads, zeta_grads
from .launching import contiguous_rows

tuning.ROWS += [
    tuning.Row("route_of_selected", 0, {}, {"BG": 256, "num_warps": 4}),
    tuning.Row("hidden_grads", tuning.INTERPRETER, {}, {"BT": 32, "BN": 32, "BK": 64, "num_warps": 1}),
    tuning.Row("hidden_grads", 0, {"slow": 0}, {"BT": 32, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}),
    tuning.Row("hidden_grads", 0, {}, {"BT": 16, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 2}),
    tuning.Row("rows_grads", tuning.INTERPRETER, {}, {"BT": 32, "BN": 32, "BD": 64, "num_warps": 1}),
    tuning.Row("rows_grads", 0, {"slow": 0}, {"BT": 64, "BN": 64, "BD": 64, "num_warps": 4, "num_stages": 3}),
    tuning.Row("rows_grads", 0, {}, {"BT": 32, "BN": 32, "BD": 32, "num_warps": 4, "num_stages": 2}),
    tuning.Row("bias_grads", 0, {}, {"BT": 64, "BN": 64, "num_warps": 4}),
    tuning.Row("zeta_grads", 0, {}, {"BT": 32, "BN": 16, "BD": 128, "num_warps": 4}),
    tuning.Row("route_grads", 0, {}, {"BT": 64, "BN": 16, "BR": 64, "num_warps": 4}),
]


def extra_neurons_backward(
    grads: Sequence[Tensor], x: Tensor, keys: Tensor, key_bias: Maybe, values: Tensor, up: Maybe, up_bias: Maybe,
    zeta: Maybe, route: Maybe, group_ptr: Maybe, token_to_case: Maybe, selected: Maybe, act: str, beta: float,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients that `needs` asks for, in the order of the arguments; each of its leaf's shape and dtype."""
    leaves = {"x": x, "keys": keys, "key_bias": key_bias, "values": values, "up": up, "up_bias": up_bias}
    leaves |= {"zeta": zeta, "route": route}
    wanted = {
        name: launching.new(leaf.shape, leaf.dtype, leaf.device)
        for (name, leaf), need in zip(leaves.items(), needs, strict=False)
        if need and leaf is not None
    }
    if 0 in (x.shape[:-1].numel(), *values.shape):
        return [grad.zero_() for grad in wanted.values()]
    if beta == 0:
        zeta = None
        if "zeta" in wanted:
            wanted["zeta"].zero_()
    if route is None and selected is None:
        token_to_case = None
    table = route = None if route is None else contiguous_rows(route)
    if selected is not None:
        table = _table(contiguous_rows(selected), route, group_ptr)
    keys, values = contiguous_rows(keys), contiguous_rows(values)
    key_bias, up, up_bias, zeta, group_ptr, token_to_case = (
        None if t is None else contiguous_rows(t) for t in (key_bias, up, up_bias, zeta, group_ptr, token_to_case)
    )
    options = (up, up_bias, zeta, table, group_ptr, token_to_case)
    _fill(wanted, flat_rows(grads[0]), flat_rows(x), keys, key_bias, values, *options, act, beta)
    return list(wanted.values())


def _table(selected: Tensor, route: Maybe, group_ptr: Maybe) -> Tensor:
    """[rows, G] float32: the weights of selected groups, 0 elsewhere."""
    (rows, slots), groups = selected.shape, 1 if group_ptr is None else group_ptr.shape[0] - 1
    table = launching.new((rows, groups), torch.float32, selected.device)
    choice = tuning.choose("route_of_selected", selected.device, groups=groups)
    grid = (rows, -(-groups // choice["BG"]))
    sizes = (groups, slots, selected.stride(0), stride_of(route))
    launching.launch(route_of_selected, grid, table, selected, route, *sizes, **choice)
    return table


def _fill(
    wanted: dict[str, Tensor], dy: Tensor, x: Tensor, keys: Tensor, key_bias: Maybe, values: Tensor, up: Maybe,
    up_bias: Maybe, zeta: Maybe, route: Maybe, group_ptr: Maybe, token_to_case: Maybe, act: str, beta: float,
) -> None:  # fmt: skip
    (tokens, d), (n, d_out), device = x.shape, values.shape, x.device
    groups = 1 if group_ptr is None else group_ptr.shape[0] - 1
    dot = dot_dtype(dy, x, keys, up, values)
    dot = dot if dot == torch.bfloat16 else torch.float32
    of_group = zeta is not None and zeta.dim() == 2
    group_of = groups_of(keys, group_ptr) if group_ptr is not None and (route is not None or of_group) else None
    wide = {
        name: launching.new(wanted[name].shape, torch.float32, device)
        for name in ("x", "zeta", "route")
        if name in wanted and (name != "zeta" or zeta is not None)
    }
    few = min(n, max(128, WORKSPACE // (16 * tokens) // 128 * 128))
    for first in range(0, n, few):
        count, add = min(few, n - first), first > 0
        rh, da = (launching.new((tokens, count), torch.float32, device) for _ in range(2))
        du = None if up is None else launching.new((tokens, count), torch.float32, device)
        he = launching.new((tokens, count), torch.float32, device) if "route" in wide else None
        tensors = (rh, da, du, he, dy, x, keys, key_bias, values, up, up_bias, zeta, route, group_of, group_ptr)
        strides = (stride_of(t) for t in (rh, dy, x, keys, values, up, zeta, route))
        sizes = (tokens, n, groups, d, d_out, beta, first, count, *strides)
        choice = tuning.choose("hidden_grads", device, tokens=tokens, n=count, slow=slow(dot, d, d_out))
        grid = (-(-count // choice["BN"]), -(-tokens // choice["BT"]))
        constants: dict[str, Any] = {"ACT": act, "DOT": TRITON[dot], **choice}
        launching.launch(hidden_grads, grid, *tensors, token_to_case, *sizes, **constants)
        for name, m, rows in (("keys", da, x), ("values", rh, dy), ("up", du, x)):
            if name in wanted and m is not None:
                _rows(wanted[name], m, rows, first, dot)
        for name, m in (("key_bias", da), ("up_bias", du)):
            if name in wanted and m is not None:
                choice = tuning.choose("bias_grads", device, tokens=tokens, n=count)
                blocks = -(-count // choice["BN"])
                launching.launch(bias_grads, (blocks,), wanted[name], m, tokens, count, first, m.stride(0), **choice)
        if "x" in wide:
            dx = wide["x"].view(tokens, d)
            weighted(dx, da, keys, tokens, None, None, group_ptr, 0.0, add, True, dot, first)
            if up is not None and du is not None:
                weighted(dx, du, up, tokens, None, None, group_ptr, 0.0, True, True, dot, first)
        if "zeta" in wide:
            choice = tuning.choose("zeta_grads", device, tokens=tokens, d_out=d_out)
            grid = (groups if of_group else 1, -(-d_out // choice["BD"]))
            sizes = (tokens, d_out, beta, first, count, rh.stride(0), dy.stride(0))
            ptr = group_ptr if of_group else None
            launching.launch(zeta_grads, grid, wide["zeta"], rh, dy, ptr, *sizes, ADD=add, **choice)
        if he is not None:
            rows = wide["route"].shape[0]
            choice = tuning.choose("route_grads", device, tokens=tokens, rows=rows)
            grid = (groups, -(-rows // choice["BR"]))
            sizes = (tokens, rows, groups, first, count, he.stride(0))
            args = (wide["route"], he, group_ptr, token_to_case)
            launching.launch(route_grads, grid, *args, *sizes, ADD=add, **choice)
    for name, sums in wide.items():
        wanted[name].copy_(sums)


def _rows(out: Tensor, m: Tensor, x: Tensor, first: int, dot: torch.dtype) -> None:
    """out[first + i] = sum over tokens of m[t, i] x[t]."""
    (tokens, count), d = m.shape, x.shape[1]
    choice = tuning.choose("rows_grads", x.device, tokens=tokens, n=count, slow=slow(dot, d))
    grid = (-(-count // choice["BN"]), -(-d // choice["BD"]))
    sizes = (tokens, count, d, first, out.stride(0), m.stride(0), x.stride(0))
    launching.launch(rows_grads, grid, out, m, x, *sizes, DOT=TRITON[dot], **choice)
