"""extra_neurons: what an FFN gains from the neurons of edits (equations 3 and 6)."""

import math

import torch
from torch import Tensor

from ._checks import Check, check_shape, require, require_act, require_tensors, shape


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
    backend: str = "auto",
) -> Tensor:
    """sum over groups g of r[t, g] act(x K_g^T + b_g) (V_g + beta zeta_g); with `up`, act(...) * (x U_g^T + c_g).

    Equivalent to `act(x @ keys.T + key_bias) @ values` with one group that is always on and beta 0.

    x: [..., d] float, T tokens in all. keys: [n, d]; key_bias: [n] or None; values: [n, d_out].
    act: relu, gelu, gelu_tanh, silu or identity.
    up: [n, d], the second key rows of a gated FFN; up_bias: [n].
    zeta: [d_out] for all groups, or [G, d_out]; added to every value row, times beta.
    group_ptr: [G + 1] int64, starts at 0. Group g owns neurons group_ptr[g] to group_ptr[g + 1]; neurons past
        group_ptr[G] are spare capacity and never act. None: one group of all neurons.
    route: weights, [T, G]; with token_to_case, [C, G]. None: 1.
    token_to_case: [T] int64, the case of each token; -1: none, and no group that is routed or selected acts on it.
    selected: [C, S] int64, the groups that act on each case, -1 padded; [T, S] without token_to_case. With a route, the
        selected groups act with their weights. Naming a group twice changes nothing.
    backend: "auto" (triton for CUDA tensors, native code for few tokens on the CPU, the reference elsewhere and for
        float64), or one of them by name.
    Returns [..., d_out], dtype of x, accumulated in float32 (float64 if an input is).

    On the CPU a group id or case out of range is an IndexError; kernels of other devices do not look.
    A group of weight 0 or not selected is skipped: nothing of it is read, it gets no gradient and, if of weight 0,
    neither does its weight. Differentiable once, in x, keys, key_bias, values, up, up_bias, zeta and route.
    """
    args = (x, keys, key_bias, values, up, up_bias, zeta, route, group_ptr, token_to_case, selected)
    _require(args, act)
    return torch.ops.unike.extra_neurons(*args, act, float(beta), backend)


def extra_neurons_(
    y: Tensor,
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
    backend: str = "auto",
) -> Tensor:
    """`y += extra_neurons(x, ...)` in place, rounded once; for inference. Returns y.

    y: [..., d_out], the leading dimensions of x. Rows of y on which no group acts keep every bit.
    Refuses tensors that require grad, unless gradients are switched off.
    """
    args = (x, keys, key_bias, values, up, up_bias, zeta, route, group_ptr, token_to_case, selected)
    _require(args, act)
    require_tensors(("x", "y"), {"x": x, "y": y})
    check_shape(require, "y", y, (*x.shape[:-1], values.shape[1]), x=x, values=values)
    if torch.is_grad_enabled():
        for name, tensor in zip(("y", *NAMES), (y, *args), strict=True):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"extra_neurons_ works in place and has no gradient, but {name} requires grad")
    torch.ops.unike.extra_neurons_(y, *args, act, float(beta), backend)
    return y


NAMES = ("x", "keys", "key_bias", "values", "up", "up_bias", "zeta", "route", "group_ptr", "token_to_case", "selected")


def _require(args: tuple[Tensor | None, ...], act: str) -> None:
    require_act(act)
    named = list(zip(NAMES, args, strict=True))
    require_tensors(("x", "keys", "values"), dict(named[:8]), dict(named[8:]))
    check_arguments(require, *args)


def check_arguments(
    check: Check,
    x: Tensor,
    keys: Tensor,
    key_bias: Tensor | None,
    values: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    zeta: Tensor | None,
    route: Tensor | None = None,
    group_ptr: Tensor | None = None,
    token_to_case: Tensor | None = None,
    selected: Tensor | None = None,
) -> None:
    """The shapes of all arguments agree."""
    check(
        x.dim() >= 1 and keys.dim() == 2, lambda: f"x must be [..., d], keys [n, d], but got {shape(x)}, {shape(keys)}"
    )
    check(x.shape[-1] == keys.shape[1], lambda: f"x has {x.shape[-1]} features, keys have {keys.shape[1]}")
    (n, d), tokens = keys.shape, math.prod(x.shape[:-1])  # .numel() would fix a symbolic size
    check_shape(check, "values", values, (n, None), keys=keys)
    check_shape(check, "key_bias", key_bias, (n,), keys=keys)
    check_shape(check, "up", up, (n, d), keys=keys)
    check_shape(check, "up_bias", up_bias, (n,), keys=keys)
    check(up is not None or up_bias is None, lambda: f"up_bias is {shape(up_bias)}, but up is None")
    check(
        group_ptr is None or (group_ptr.dim() == 1 and group_ptr.shape[0] >= 1),
        lambda: f"group_ptr must be [G + 1], but got {shape(group_ptr)}",
    )
    groups = 1 if group_ptr is None else group_ptr.shape[0] - 1
    if zeta is not None:
        lead = (groups,) if zeta.dim() == 2 else ()
        check_shape(check, "zeta", zeta, (*lead, values.shape[1]), group_ptr=group_ptr, values=values)
    check_shape(check, "token_to_case", token_to_case, (tokens,), x=x)
    # One row of route and of selected per token, or per case.
    rows = tokens
    if token_to_case is not None:
        rows = route.shape[0] if route is not None else selected.shape[0] if selected is not None else 0
    check_shape(check, "route", route, (rows, groups), x=x, token_to_case=token_to_case, group_ptr=group_ptr)
    check_shape(check, "selected", selected, (rows, None), x=x, token_to_case=token_to_case, route=route)
