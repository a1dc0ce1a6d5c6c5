"""extra_neurons at the shapes of real models, for the compile gate: each case calls the launcher on meta tensors."""

from collections.abc import Callable
from functools import partial

import torch

from unike_kernels.triton_kernels import extra_neurons as launcher
from unike_kernels.triton_kernels.extra_neurons_backward import extra_neurons_backward

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def arguments(tokens, d, n, dtype, gated, routing, groups, zeta):
    """The operator's positional arguments, all on the meta device; d_out = d."""

    def empty(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    def ids(*shape):
        return empty(*shape, dtype=torch.int64)

    rows = tokens if "t" in routing else 16
    return (
        empty(tokens, d),
        empty(n, d),
        empty(n),
        empty(n, d),
        empty(n, d) if gated else None,
        empty(n) if gated else None,
        {"none": None, "shared": empty(d), "group": empty(groups, d)}[zeta],
        empty(rows, groups or 1) if "r" in routing else None,
        ids(groups + 1) if groups else None,
        ids(tokens) if "c" in routing else None,
        ids(rows, 2) if "s" in routing else None,
        "silu" if gated else "relu",
        0.0 if zeta == "none" else 1.0,
    )


def forward(tokens, d, n, dtype, gated, routing="", groups=10_000, zeta="none"):
    """routing: s selected, r route; c per case, t per token."""
    launcher.extra_neurons(*arguments(tokens, d, n, dtype, gated, routing, groups, zeta))


def in_place(tokens, d, n, dtype, gated, routing="", groups=10_000, zeta="none"):
    y = torch.empty((tokens, d), dtype=dtype, device="meta")
    launcher.extra_neurons_(y, *arguments(tokens, d, n, dtype, gated, routing, groups, zeta))


def backward(tokens, d, n, dtype, gated, routing="", groups=100, zeta="group"):
    args = arguments(tokens, d, n, dtype, gated, routing, groups, zeta)
    dy = torch.empty((tokens, d), dtype=dtype, device="meta")
    needs = [isinstance(arg, torch.Tensor) and arg.is_floating_point() for arg in args]
    extra_neurons_backward([dy], *args, needs)


MODELS = {"opt": (2560, False), "vicuna": (4096, True), "qwen": (3584, True)}
CASES: dict[str, Callable[[], None]] = {}
for _model, (_d, _gated) in MODELS.items():
    for _tokens in (1, 16, 64, 2048):
        CASES[f"{_model}-selected-{_tokens}"] = partial(forward, _tokens, _d, 100_000, BF16, _gated, "sc")
        CASES[f"{_model}-always-{_tokens}"] = partial(forward, _tokens, _d, 20_000, BF16, _gated)
CASES |= {
    "odd-selected-1": partial(forward, 1, 1001, 100_000, BF16, True, "sc", zeta="group"),
    "odd-always-300": partial(forward, 300, 1001, 1003, FP16, True, zeta="shared"),
    "opt-fp16-selected-2048": partial(in_place, 2048, 2560, 100_000, FP16, False, "src", zeta="group"),
    "opt-fp32-selected-2048": partial(forward, 2048, 2560, 100_000, FP32, False, "sc", zeta="shared"),
    "opt-fp32-always-512": partial(forward, 512, 2560, 20_000, FP32, False, zeta="group"),
    "vicuna-in-place-selected-1": partial(in_place, 1, 4096, 100_000, BF16, True, "st", zeta="group"),
    "vicuna-in-place-always-64": partial(in_place, 64, 4096, 20_000, BF16, True, zeta="shared"),
    "vicuna-route-case-2048": partial(forward, 2048, 4096, 2000, BF16, True, "rc", 100, "group"),
    "vicuna-route-token-16": partial(forward, 16, 4096, 2000, FP32, True, "rt", 100, "group"),
    "opt-backward-selected-512": partial(backward, 512, 2560, 1000, BF16, False, "sc", zeta="shared"),
    "opt-fp16-backward-route-512": partial(backward, 512, 2560, 1000, FP16, False, "rt"),
    "vicuna-backward-route-2048": partial(backward, 2048, 4096, 1000, BF16, True, "rc"),
    "vicuna-backward-always-512": partial(backward, 512, 4096, 4000, BF16, True, zeta="none"),
    "odd-backward-src-100": partial(backward, 100, 1001, 1003, FP32, True, "src"),
}
# Sizes of 1 are constants to the compiler, and no group_ptr is one group of all: what small tests run on a GPU.
for _routing in ("", "rc", "src"):
    CASES[f"one-{_routing}-forward"] = partial(forward, 1, 1, 1, FP32, True, _routing, 1, "group")
    CASES[f"one-{_routing}-backward"] = partial(backward, 1, 1, 1, FP32, True, _routing, 1, "group")
    CASES[f"no-groups-{_routing}-forward"] = partial(in_place, 70, 24, 17, FP16, False, _routing, 0, "shared")
    CASES[f"no-groups-{_routing}-backward"] = partial(backward, 70, 24, 17, BF16, True, _routing, 0, "shared")
