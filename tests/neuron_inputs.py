"""Arguments of extra_neurons, as the tests of all its kernels use them."""

import torch
from kernel_tools import DEVICE

ROUTINGS = ["", "s", "sc", "r", "rc", "sr", "src"]


def make(tokens, routing="", *, d=40, d_out=56, sizes=(3, 0, 17, 1, 5), dtype=torch.float32, gated=True, zeta=2,
         act="silu", spare=2, cases=3, bias=True):  # fmt: skip
    """Arguments and options. routing: s selected, r route, c per case. zeta: 0 none, 1 shared, 2 per group."""
    pointers = torch.tensor([0, *sizes]).cumsum(0)
    groups, n = len(sizes), int(pointers[-1]) + spare

    def rand(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).to(DEVICE, dtype)

    args = {"x": rand(tokens, d), "keys": rand(n, d, scale=d**-0.5), "key_bias": rand(n) if bias else None}
    args["values"] = rand(n, d_out)
    if gated:
        args |= {"up": rand(n, d, scale=d**-0.5), "up_bias": rand(n) if bias else None}
    for tensor in args.values() if spare else ():
        if tensor is not None and len(tensor) == n and tensor is not args["x"]:
            tensor[n - spare :] = float("nan")  # spare capacity is never read
    rows = cases if "c" in routing else tokens
    if zeta:
        args |= {"zeta": rand(*((groups,) if zeta == 2 else ()), d_out)}
    if "r" in routing:
        args["route"] = torch.randn(rows, groups).relu().to(DEVICE, dtype)
    options = {"act": act, "beta": 0.7 if zeta else 0.0, "group_ptr": pointers.to(DEVICE)}
    if "c" in routing:
        options["token_to_case"] = torch.randint(-1, cases, (tokens,)).sort().values.to(DEVICE)
    if "s" in routing:
        options["selected"] = torch.randint(-1, groups, (rows, 3)).to(DEVICE)
    return args, options


def to64(tree):
    return {k: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for k, t in tree.items()}
