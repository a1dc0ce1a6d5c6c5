"""What the tests of every kernel use: where kernels run, poisoned memory with guards around it, launch counts."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from unike_kernels import native
from unike_kernels.triton_kernels import launching

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")  # conftest sets the interpreter where there is no GPU
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GUARD = 256  # bytes before and after every allocation
PATTERN = 0xA5


def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA kernels run for the rest of the test: on the GPU, or in the emulator where there is none."""
    if DEVICE.type == "cuda":
        if (reason := native.no_cuda()) is not None:
            pytest.skip(reason)
        return
    import emulator  # tests of the benchmarks use this file too, from another folder

    monkeypatch.setattr(native, "cuda", emulator.module)
    emulator.seed(0)
    emulator.device()


@contextmanager
def poisoned(module: Any = launching) -> Iterator[None]:
    """Inside, all that launchers allocate is full of NaN (integers: of huge values), with guards that must survive.

    module: where they find the function `new`.

    Raises AssertionError at the end where a kernel wrote outside of an allocation.
    """
    before, blocks = module.new, []

    def new(shape: Sequence[int], dtype: torch.dtype, where: Any) -> Tensor:
        device = where.device if isinstance(where, Tensor) else where
        count = torch.Size(shape).numel()
        size = count * dtype.itemsize
        block = torch.full((size + 2 * GUARD,), PATTERN, dtype=torch.uint8, device=device)
        inner = block[GUARD : GUARD + size].view(dtype)
        inner.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max // 3)
        blocks.append((block, size, tuple(shape), dtype))
        return inner.view(shape)

    module.new = new
    try:
        yield
    finally:
        module.new = before
    for block, size, shape, dtype in blocks:
        guards = torch.cat([block[:GUARD], block[GUARD + size :]])
        if not bool((guards == PATTERN).all()):
            raise AssertionError(f"a kernel wrote outside of its {list(shape)} {dtype}")


@contextmanager
def launches() -> Iterator[Counter[str]]:
    """Counts the kernels started inside, by name; filled when the block ends."""
    before, counted = launching.LAUNCHES.copy(), Counter()
    yield counted
    counted.update(launching.LAUNCHES - before)


def shifted(tensor: Tensor, by: int = 1) -> Tensor:
    """The same values `by` elements into a larger buffer, so that its start is misaligned; NaN around them."""
    flat = tensor.new_full((tensor.numel() + 2 * by,), float("nan") if tensor.is_floating_point() else 0)
    view = flat[by : by + tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def strided(tensor: Tensor, gap: int = 3) -> Tensor:
    """The same values as a view whose rows lie `gap` elements further apart; NaN between them."""
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + gap), float("nan"))
    wide[..., : tensor.shape[-1]] = tensor
    return wide[..., : tensor.shape[-1]]
