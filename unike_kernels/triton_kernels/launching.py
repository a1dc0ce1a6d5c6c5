"""How launchers allocate and start kernels: in one place, so that tests can count, poison and record."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

LAUNCHES: Counter[str] = Counter()  # kernel name -> how often it was started, in this process
MOST_PROGRAMS = 2**16 - 1  # along the second and third axis of a grid, on every GPU
_recorder: Callable[..., None] | None = None


def new(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An output or a workspace, not initialised: the kernels write every element that is read. Tests poison it."""
    return torch.empty(shape, dtype=dtype, device=device)


def contiguous_rows(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy if its last dimension is not contiguous."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return new(tensor.shape, tensor.dtype, tensor.device).copy_(tensor)


def launch(kernel: Any, grid: Sequence[int], *args: Any, **constants: Any) -> None:
    """kernel[grid](*args, **constants) on the device of the first tensor. Nothing is started for an empty grid.

    ValueError where the grid is larger than a GPU takes.
    """
    if 0 in grid:
        return
    if max(grid[1:], default=0) > MOST_PROGRAMS:
        size = " x ".join(map(str, grid))
        raise ValueError(
            f"{kernel.__name__} needs {size} programs, and a GPU takes {MOST_PROGRAMS} along all axes but the first: "
            "pass fewer tokens at a time"
        )
    first = next(arg for arg in args if isinstance(arg, Tensor))
    LAUNCHES[kernel.__name__] += 1
    # Said, and not left to the default: Triton 3.9 warns that 3.10 will no longer fuse products and sums by itself.
    constants["enable_fp_fusion"] = True
    if _recorder is not None:
        _recorder(kernel, tuple(grid), args, constants)
        return
    # Triton starts kernels on the current device, wherever the tensors are.
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[tuple(grid)](*args, **constants)


@contextmanager
def recording(record: Callable[..., None]) -> Iterator[None]:
    """Inside, `record(kernel, grid, args, constants)` is called instead of every start; tensors may be meta tensors."""
    global _recorder
    before, _recorder = _recorder, record
    try:
        yield
    finally:
        _recorder = before
