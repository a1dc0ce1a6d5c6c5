"""How launchers call the compiled module: its device and stream, dtypes by name, launches counted."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..triton_kernels.launching import LAUNCHES


def name_of(dtype: torch.dtype) -> str:
    """As the module names dtypes: float32, bfloat16, float16."""
    return str(dtype).removeprefix("torch.")


def address(tensor: Tensor | None) -> int:
    """Of the first element; 0 where there is no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, this is the current device: the module asks for its properties and launches on it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def stream_of(device: torch.device) -> int:
    """The device's current stream, as the module takes it."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def wait_for_stream(device: torch.device) -> None:
    """Until its current stream has done all it was given: then every stream may read what it wrote."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


def wait_for_device(device: torch.device) -> None:
    """Until no stream of it has anything left to do: then what they read may be written."""
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize(device)


def launch(function: str, device: torch.device, kernels: tuple[str, ...], *args: Any) -> None:
    """Calls a function of the module, the device's current stream as its last argument; it starts these kernels."""
    run: Callable[..., None] = getattr(native.cuda(), function)
    LAUNCHES.update(kernels)
    with on(device):
        run(*args, stream_of(device))
