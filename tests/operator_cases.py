"""Arguments of the Triton operators at any size, and how their results and gradients are held to the reference."""

from functools import partial

import torch
from kernel_tools import DEVICE, launches, poisoned
from tolerance import assert_close_to_reference

from unike_kernels import ops, reference

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
FORMS = ["always", "route", "selected", "cases"]
NEURONS = ["x", "keys", "key_bias", "values", "up", "up_bias", "zeta"]
PARTS = ["h_input", "q", "item_keys", "item_values"]


def rand(*shape, dtype=torch.float32, fan=1):
    return (torch.randn(shape) / max(1, fan) ** 0.5).to(DEVICE, dtype)


def ints(values):
    return torch.as_tensor(values, dtype=torch.int64, device=DEVICE)


def pointers(sizes):
    return ints([0, *sizes]).cumsum(0)


def run(name, arguments, backend="triton"):
    """The operator on poisoned memory; always a tuple."""
    with poisoned():
        result = getattr(ops, name)(**arguments, backend=backend)
    return result if isinstance(result, tuple) else (result,)


def cast(value, dtype):
    if isinstance(value, (list, tuple)):
        return type(value)(cast(v, dtype) for v in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(name, arguments):
    """The kernels are as exact as rounding allows."""
    exact = getattr(reference, name)(**{k: cast(v, torch.float64) for k, v in arguments.items()})
    same = getattr(reference, name)(**arguments)
    with launches() as counted:
        found = run(name, arguments)
    assert counted
    for f, e, s in zip(found, *(r if isinstance(r, tuple) else (r,) for r in (exact, same)), strict=True):
        assert_close_to_reference(f, e, s, 2)
    return found


def gradients(name, arguments, wanted, grad, backend):
    leaves = {key: arguments[key].detach().clone().requires_grad_() for key in wanted}
    operator = getattr(reference, name) if backend is None else partial(getattr(ops, name), backend=backend)
    out = operator(**{**arguments, **leaves})
    out = out[0] if isinstance(out, tuple) else out
    return torch.autograd.grad(out, list(leaves.values()), grad.to(out.dtype), materialize_grads=True)


def check_gradients(name, arguments, wanted):
    grad = rand(*(arguments["x"] if "x" in arguments else arguments["h_input"]).shape)
    wide = {k: cast(v, torch.float64) for k, v in arguments.items()}
    with poisoned():
        found = gradients(name, arguments, wanted, grad, "triton")
    exact, same = gradients(name, wide, wanted, grad, None), gradients(name, arguments, wanted, grad, None)
    for key, f, e, s in zip(wanted, found, exact, same, strict=True):
        try:
            assert_close_to_reference(f, e, s, 3)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from None


def neurons(sizes, tokens=5, form="selected", *, d=20, dtype=torch.float32, gated=True):
    """Arguments of extra_neurons; `cases` with more than 64 tokens takes the kernel of tiles."""
    n, groups = sum(sizes), len(sizes)
    r = partial(rand, dtype=dtype)
    arguments = {"x": r(tokens, d), "keys": r(n, d, fan=d), "key_bias": r(n), "values": r(n, d, fan=n), "act": "silu"}
    arguments |= {"zeta": r(groups, d, fan=n), "beta": 0.5, "group_ptr": pointers(sizes)}
    if gated:
        arguments |= {"up": r(n, d, fan=d), "up_bias": r(n)}
    rows = 3 if form == "cases" else tokens
    if form == "route":
        arguments["route"] = (rand(rows, groups) * torch.randint(0, 2, (rows, groups)).to(DEVICE)).to(dtype)
    elif form != "always":
        arguments["selected"] = torch.randint(-1, groups, (rows, 2)).to(DEVICE)
    if form == "cases":
        arguments["token_to_case"] = torch.randint(-1, rows, (tokens,)).to(DEVICE)
    return arguments


def tokens_of(form):
    """More for a route: each of its gradients is a sum that cancels, and a few say nothing of the usual error."""
    return {"cases": 66, "route": 20}.get(form, 5)


def ffn(tokens=5, n=21, *, d=24, width=40, dtype=torch.float32, gated=True):
    r = partial(rand, dtype=dtype)
    arguments = {"x": r(tokens, d), "w_k": r(width, d, fan=d), "b_k": r(width), "w_v": r(d, width, fan=width)}
    arguments |= {"b_v": r(d), "keys": r(n, d, fan=d), "key_bias": r(n), "values": r(n, d, fan=n), "act": "gelu"}
    arguments |= {"zeta": r(d, fan=n), "beta": 0.5}
    if gated:
        arguments |= {"w_up": r(width, d, fan=d), "b_up": r(width), "up": r(n, d, fan=d), "up_bias": r(n)}
    return arguments


def shift(tokens=5, *, heads=4, kv_heads=2, hd=8, items=9, k=4, d=None, dtype=torch.float32, cases=None, raw=False):
    r = partial(rand, dtype=dtype)
    width = d or heads * hd
    if raw:
        arguments = {"h_input": r(tokens, width), "q": r(tokens, width), "item_keys": r(items, width)}
        arguments["item_values"] = r(items, width)
    else:
        arguments = {"h_input": r(tokens, width), "q": r(tokens, heads, hd), "item_keys": r(items, kv_heads, hd)}
        arguments["item_values"] = r(items, kv_heads, hd)
        if d:
            arguments["out_proj"] = (r(d, heads * hd, fan=heads * hd), r(d))
    # What is known and the input have something in common: the relative error of a cosine near 0 is chance.
    common = r(width)
    arguments["h_input"] += common
    if raw:
        arguments["item_keys"] += common
        arguments["item_values"] += common
    elif d:
        arguments["out_proj"] = (arguments["out_proj"][0], arguments["out_proj"][1] + common)
    rows = cases or tokens
    arguments["indices"] = torch.stack([torch.randperm(items)[:k] for _ in range(rows)]).to(DEVICE)
    if cases:
        arguments["token_to_case"] = torch.randint(-1, cases, (tokens,)).to(DEVICE)
    return arguments
