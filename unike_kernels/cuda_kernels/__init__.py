"""The launchers of the CUDA C++ kernels: one file per operator, its kernels in csrc/<operator>.cu.

A launcher takes the operator's positional arguments and allocates through `triton_kernels.launching.new`, as those of
triton_kernels do. There are kernels only for what Triton does not do well: for everything else `refusal` says no, and
the backend "cuda" takes triton.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

# Operator -> file of this folder; the launcher in it has the operator's name.
LAUNCHERS = {
    "cosine_topk": "cosine_topk",
    "knowledge_shift": "knowledge_shift",
}


def refusal(name: str, args: Sequence[Any]) -> str | None:
    """Why there is no CUDA kernel for these arguments of the operator `name`; None: there is one."""
    if name not in LAUNCHERS:
        return f"there is no CUDA kernel of {name}"
    return import_module(f".{LAUNCHERS[name]}", __package__).refusal(args)


def faster(name: str, args: Sequence[Any]) -> bool:
    """Whether there is a CUDA kernel for these arguments, and a GPU has measured that it is faster than Triton's."""
    return refusal(name, args) is None and import_module(f".{LAUNCHERS[name]}", __package__).faster(args)


def launcher(name: str) -> Callable[..., Any]:
    """The launcher of the operator `name`."""
    return getattr(import_module(f".{LAUNCHERS[name]}", __package__), name)
