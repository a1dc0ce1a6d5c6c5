"""The gradients of augmented_ffn: matrix products of cuBLAS around elementwise work in float32, in chunks of tokens.

Nothing but large products is in it, which cuBLAS does best, and training goes through `extra_neurons` on a base FFN
that runs by itself; so there is no kernel here. Products of one half precision accumulate in float32 and stay there
(`out_dtype`); what enters the next product is rounded once to that precision, but not for the gradient of a float32
leaf. Every sum over tokens, and the sum of the four parts of x's gradient, is kept in float32; each gradient is
rounded once, at the end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import launching
from .augmented_ffn import no_autocast

CHUNK = 2048  # tokens at a time: the float32 hidden values of 18944 neurons are 155 MB
NAMES = ("x", "w_k", "b_k", "w_v", "b_v", "w_up", "b_up", "keys", "key_bias", "values", "up", "up_bias", "zeta")
KEEPS_FLOAT32 = "dtype" in torch.ops.aten.mm.overloads()  # out_dtype came with torch 2.8; without it: float32 copies
_ROOT = 0.7978845608028654  # sqrt(2 / pi)


class _Part(NamedTuple):
    """The base neurons or the extra ones, under one set of names; `of`: the names of their gradients."""

    keys: Tensor  # [n, d]
    key_bias: Tensor | None
    up: Tensor | None
    up_bias: Tensor | None
    values: Tensor  # [n, d], for the base a transposed view
    of: tuple[str, str, str, str, str]
    transposed: bool


def augmented_ffn_backward(
    grads: Sequence[Tensor],
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
    act: str,
    beta: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The wanted gradients in the order of the arguments, each of its leaf's shape and dtype."""
    leaves = (x, w_k, b_k, w_v, b_v, w_up, b_up, keys, key_bias, values, up, up_bias, zeta)
    wanted = {name: leaf for name, leaf, need in zip(NAMES, leaves, needs, strict=False) if need and leaf is not None}
    base = _Part(w_k, b_k, w_up, b_up, w_v.mT, ("w_k", "b_k", "w_up", "b_up", "w_v"), True)
    extra = _Part(keys, key_bias, up, up_bias, values, ("keys", "key_bias", "up", "up_bias", "values"), False)
    sums = {
        name: launching.new(leaf.shape, torch.float32, leaf.device).zero_()
        for name, leaf in wanted.items()
        if name != "x"
    }
    out = {name: launching.new(leaf.shape, leaf.dtype, leaf.device) for name, leaf in wanted.items()}
    d = x.shape[-1]
    tokens = x.shape[:-1].numel()
    flat, grad = x.reshape(tokens, d), grads[0].reshape(tokens, d)
    with no_autocast(x.device):
        for start in range(0, tokens, CHUNK):
            q, g = flat[start : start + CHUNK], grad[start : start + CHUNK]
            dx = torch.zeros(q.shape, dtype=torch.float32, device=x.device) if "x" in wanted else None
            if "b_v" in sums:
                sums["b_v"] += g.float().sum(0)
            for part in (base, extra):
                if dx is not None or any(name in sums for name in part.of) or (part is extra and "zeta" in sums):
                    _add(sums, dx, q, g, part, act, zeta if part is extra and beta != 0 else None, beta)
            if dx is not None:
                out["x"].view(tokens, d)[start : start + CHUNK].copy_(dx)
    for name, total in sums.items():
        out[name].copy_(total)
    if "x" in out and tokens == 0:
        out["x"].zero_()
    return list(out.values())


def _add(
    sums: dict[str, Tensor],
    dx: Tensor | None,
    x: Tensor,
    g: Tensor,
    part: _Part,
    act: str,
    zeta: Tensor | None,
    beta: float,
) -> None:
    """Adds what one part's neurons owe to each gradient: `sums`, and dx [T, d], float32."""
    if len(part.keys) == 0:
        return
    of_keys, of_key_bias, of_up, of_up_bias, of_values = part.of
    z = _mm(x, part.keys.mT)  # [T, n], as all that follows
    if part.key_bias is not None:
        z += part.key_bias.float()
    a = reference.activation(act)(z)
    gate = None
    if part.up is not None:
        gate = _mm(x, part.up.mT)
        if part.up_bias is not None:
            gate += part.up_bias.float()
    hidden = a if gate is None else a * gate
    if of_values in sums:
        pair = (g.mT, hidden) if part.transposed else (hidden.mT, g)
        sums[of_values] += _mm(*pair, like=g if part.values.dtype == g.dtype else None)
    if zeta is not None and "zeta" in sums:
        sums["zeta"] += beta * (g.float().mT @ hidden.sum(1))
    inner = (of_keys, of_key_bias, of_up, of_up_bias)
    if dx is None and not any(name in sums for name in inner):
        return
    do = _mm(g, part.values.mT)
    if zeta is not None:
        do += beta * (g.float() @ zeta.float())[:, None]
    dz = (do if gate is None else do * gate) * _slope(z, act)
    found = [(dz, part.keys, of_keys, of_key_bias)]
    if part.up is not None:
        found.append((do * a, part.up, of_up, of_up_bias))
    for inner_grad, weight, of_weight, of_bias in found:
        if dx is not None:
            dx += _mm(inner_grad, weight, like=x)
        if of_weight in sums:
            sums[of_weight] += _mm(inner_grad.mT, x, like=x if weight.dtype == x.dtype else None)
        if of_bias in sums:
            sums[of_bias] += inner_grad.sum(0)


def _mm(a: Tensor, b: Tensor, like: Tensor | None = None) -> Tensor:
    """a b in float32. Operands that are float32 intermediates are first rounded to `like`'s dtype if the other has it.

    Half precision stays so on a GPU, on its tensor cores; elsewhere, and for several dtypes, both become float32.
    """
    if like is not None and like.dtype != torch.float32 and like.dtype in (a.dtype, b.dtype):
        a, b = a.to(like.dtype), b.to(like.dtype)
    if a.dtype == b.dtype and a.dtype != torch.float32 and a.is_cuda and KEEPS_FLOAT32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _slope(z: Tensor, act: str) -> Tensor:
    """act'(z), float32; at 0 as torch has it."""
    if act == "relu":
        return (z > 0).float()
    if act == "silu":
        s = z.sigmoid()
        return s * (1 + z * (1 - s))
    if act == "gelu":
        return 0.5 * (1 + torch.erf(z * 0.5**0.5)) + z * (torch.exp(-0.5 * z * z) * (_ROOT / 2))
    if act == "gelu_tanh":
        t = torch.tanh(_ROOT * (z + 0.044715 * z**3))
        return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * _ROOT * (1 + 0.134145 * z * z)
    return torch.ones_like(z)
