"""Which implementation of the operators is usable here, why another is not, and which one an operator takes.

"auto" is, for CUDA tensors, triton, or a CUDA C++ kernel for the operators and sizes where a GPU has measured that it
is the faster; on the CPU native code where it was measured faster than the reference; and the reference elsewhere, and
for float64. "cuda" is the CUDA C++ kernels for all operators and sizes that have one, and triton for the rest. A
backend that is named has to run.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import cpu_kernels, cuda_kernels, native, triton_kernels

NAMES = ("auto", "triton", "cuda", "cpu", "reference")
AUTO = {"cuda": "triton", "cpu": "cpu"}  # what "auto" means on a device; elsewhere the reference
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_TAKEN = frozenset((*KERNEL_DTYPES, torch.int64))


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators; `reason` says why it cannot run, None when it can."""

    name: str
    reason: str | None


def available() -> list[Backend]:
    """Every backend that this version has, the preferred one first."""
    usable_on_cpu = _no_triton("cpu") is None
    return [
        Backend("triton", None if usable_on_cpu else _no_triton("cuda")),
        Backend("cuda", _no_cuda(torch.device("cpu" if native.emulated() else "cuda"))),
        Backend("cpu", native.no_cpu()),
        Backend("reference", None),
    ]


def resolve(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that `backend` ("auto" or a name) means for tensors of this device and dtype.

    ValueError when it is unknown or cannot run, with the reason.
    """
    if backend not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(repr(name) for name in NAMES)}, but got {backend!r}")
    if backend == "reference" or (backend == "auto" and (device.type not in AUTO or dtype not in KERNEL_DTYPES)):
        return "reference"
    chosen = AUTO[device.type] if backend == "auto" else backend
    why_not: dict[str, Callable[[str], str | None]] = {"cpu": _no_cpu, "triton": _no_triton}
    reason = _no_cuda(device) if chosen == "cuda" else why_not[chosen](device.type)
    if reason is None and dtype not in KERNEL_DTYPES:
        reason = f"it takes {', '.join(str(d).removeprefix('torch.') for d in KERNEL_DTYPES)}, not {dtype}"
    if reason is None:
        return chosen
    if backend == "auto":
        return "reference"
    raise ValueError(f"backend {backend!r} cannot run here: {reason}")


def implementation(
    operator: str, backend: str, tensors: Sequence[Tensor], args: Sequence[Any]
) -> Callable[..., Any] | None:
    """The kernel that `backend` means for an operator's arguments, their tensors on one device; None: the reference.

    "auto" is the reference also where the kernel has no room for such arguments.
    """
    first = tensors[0]
    if backend == "reference":
        return None
    if first.device.type == "cpu" and backend in ("auto", "cpu"):
        return _on_cpu(operator, backend, tensors, args)
    if backend == "auto" and not first.is_cuda:
        return None
    wide = next((t.dtype for t in tensors if t.dtype == torch.float64), first.dtype)
    resolved = resolve(backend, first.device, wide)
    if resolved == "reference":
        return None
    if resolved == "cuda" and cuda_kernels.refusal(operator, args) is None:
        return cuda_kernels.launcher(operator)
    if backend == "auto" and cuda_kernels.faster(operator, args) and _no_cuda(first.device) is None:
        return cuda_kernels.launcher(operator)
    refused = triton_kernels.refusal(operator, args)
    if refused is None:
        return triton_kernels.launcher(operator)
    if backend == "auto":
        return None
    raise ValueError(f"backend {backend!r} cannot run {operator}: {refused}")


def _on_cpu(operator: str, backend: str, tensors: Sequence[Tensor], args: Sequence[Any]) -> Callable[..., Any] | None:
    """The native code for CPU tensors; None: the reference. With "auto" only for inference."""
    if backend == "cpu":
        wide = next((t.dtype for t in tensors if t.dtype == torch.float64), tensors[0].dtype)
        resolve(backend, tensors[0].device, wide)
    elif native.cpu() is None:
        return None
    chosen = cpu_kernels.launcher(operator, args, always=backend == "cpu")
    if chosen is None:
        return None
    for t in tensors:  # a subclass may have no data of its own, as a fake or a quantised tensor
        if type(t) not in (Tensor, Parameter) or t.layout != torch.strided:
            return None
        if backend == "auto" and (t.requires_grad or t.dtype not in _TAKEN):
            return None
    return chosen


def _no_cpu(device_type: str) -> str | None:
    """Why the native code cannot run on such a device; None when it can."""
    return native.no_cpu() if device_type == "cpu" else f"it runs on the CPU, not on {device_type}"


@lru_cache
def _no_triton(device_type: str) -> str | None:
    """Why triton cannot run on such a device; None when it can."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install triton; CUDA builds of torch bring it)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device (TRITON_INTERPRET=1 in the environment runs the kernels on a CPU, very slowly)"
    if device_type != "cuda":
        return f"it runs on CUDA devices, not on {device_type}"
    if min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())) < (8, 0):
        return "it needs compute capability 8.0 or newer"
    return None


def _no_cuda(device: torch.device) -> str | None:
    """Why the CUDA C++ kernels, and triton for what they lack, cannot run on such a device; None when they can."""
    reason = native.no_cuda(device if device.type == "cuda" else None)
    if reason is None and device.type != "cuda" and not native.emulated():
        reason = f"it runs on CUDA devices, not on {device.type}"
    if reason is None and (without := _no_triton(device.type)) is not None:
        reason = f"triton runs what has no CUDA kernel, but {without}"
    return reason
