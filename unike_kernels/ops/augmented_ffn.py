"""augmented_ffn: an FFN and its extra neurons in one, as if their weights were concatenated (equations 1, 3, 6)."""

import torch
from torch import Tensor

from ._checks import Check, check_shape, require, require_act, require_tensors, shape
from .extra_neurons import check_arguments as check_neurons

NAMES = ("x", "w_k", "b_k", "w_v", "b_v", "w_up", "b_up", "keys", "key_bias", "values", "up", "up_bias", "zeta")


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
    backend: str = "auto",
) -> Tensor:
    """act(x w_k^T + b_k) w_v^T + b_v + act(x keys^T + key_bias) (values + beta zeta), rounded once.

    Gated (w_up and up given): each act(...) times its own x w_up^T + b_up or x up^T + up_bias.

    x: [..., d] float. w_k: [d', d]; b_k: [d'] or None; w_v: [d, d']; b_v: [d] or None, as nn.Linear keeps them.
    keys: [n, d]; key_bias: [n] or None; values: [n, d]. act: relu, gelu, gelu_tanh, silu or identity.
    w_up: [d', d]; b_up: [d'] or None; up: [n, d]; up_bias: [n] or None.
    zeta: [d], added to every extra value row, times beta.
    backend: "auto" (triton for CUDA tensors, the reference elsewhere and for float64), or one of them by name.
    Returns [..., d], dtype of x, accumulated in float32 (float64 if an input is). Differentiable once, in all tensors.
    """
    args = (x, w_k, b_k, w_v, b_v, w_up, b_up, keys, key_bias, values, up, up_bias, zeta)
    require_act(act)
    require_tensors(("x", "w_k", "w_v", "keys", "values"), dict(zip(NAMES, args, strict=True)))
    check_arguments(require, *args)
    return torch.ops.unike.augmented_ffn(*args, act, float(beta), backend)


def check_arguments(
    check: Check,
    x: Tensor,
    w_k: Tensor,
    b_k: Tensor | None,
    w_v: Tensor,
    b_v: Tensor | None,
    w_up: Tensor | None,
    b_up: Tensor | None,
    keys: Tensor,
    key_bias: Tensor | None,
    values: Tensor,
    up: Tensor | None,
    up_bias: Tensor | None,
    zeta: Tensor | None,
) -> None:
    """The shapes of all arguments agree."""
    check_neurons(check, x, keys, key_bias, values, up, up_bias, zeta)
    d = x.shape[-1]
    check_shape(check, "w_k", w_k, (None, d), x=x)
    check_shape(check, "w_v", w_v, (values.shape[1], w_k.shape[0]), w_k=w_k, values=values)
    check_shape(check, "w_up", w_up, (w_k.shape[0], d), w_k=w_k)
    check_shape(check, "b_k", b_k, (w_k.shape[0],), w_k=w_k)
    check_shape(check, "b_up", b_up, (w_k.shape[0],), w_k=w_k)
    check_shape(check, "b_v", b_v, (w_v.shape[0],), w_v=w_v)
    check(w_up is not None or b_up is None, lambda: f"b_up is {shape(b_up)}, but w_up is None")
    check(
        (w_up is None) == (up is None),
        lambda: f"base and extra neurons must both be gated or neither: w_up is {shape(w_up)}, up is {shape(up)}",
    )
