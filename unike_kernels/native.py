"""The compiled modules of csrc/: loads them where they are, remembers why not, and gives them tensors.

Nothing is loaded before it is asked for, and no driver is touched by asking for the CPU module.
"""

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch


@lru_cache
def _load(name: str) -> tuple[Any, str | None]:
    """(the module or None, why not or None)."""
    try:
        return import_module(f".{name}", __package__), None
    except ModuleNotFoundError:
        return None, f"this installation was built without {__package__}.{name}: pip install -v says why"
    except ImportError as error:  # built for another Python, or a library it needs is missing
        return None, f"{__package__}.{name} does not load: {error}"


def cpu() -> Any:
    """The module _cpu, or None."""
    return _load("_cpu")[0]


def cuda() -> Any:
    """The module _cuda, or None. It may be there where no driver is: see `no_cuda`."""
    return _load("_cuda")[0]


def no_cpu() -> str | None:
    """Why the CPU module cannot be used; None when it can."""
    return _load("_cpu")[1]


def no_cuda() -> str | None:
    """Why the CUDA module cannot be used on the current device; None when it can."""
    module, reason = _load("_cuda")
    if module is None:
        return reason
    try:
        if module.device_count() == 0:
            return "there is no CUDA device"
    except RuntimeError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "this torch has no CUDA"
    return _no_image(torch.cuda.current_device())


@lru_cache
def _no_image(device: int) -> str | None:
    """Why the module has no code for a device: found out by running the smallest kernel of it."""
    out = torch.zeros(1, dtype=torch.int32, device=f"cuda:{device}")
    try:
        cuda().probe(out.data_ptr(), torch.cuda.current_stream(device).cuda_stream)
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return f"{error}; it was built for {cuda().architectures} (UNIKE_CUDA_ARCHS)"
    return None
