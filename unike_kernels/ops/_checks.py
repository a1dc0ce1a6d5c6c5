"""What the operators' argument checks share. Each message names both values that disagree."""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from ..reference import activation

# How a shape check reports: `require` in the functions that users call, torch._check in the fake kernels.
Check = Callable[[bool, Callable[[], str]], None]


def require(holds: bool, message: Callable[[], str]) -> None:
    if not holds:
        raise ValueError(message())


def require_act(act: str) -> None:
    activation(act)


def shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def require_tensors(
    required: Collection[str],
    floats: Mapping[str, Tensor | None],
    integers: Mapping[str, Tensor | None] | None = None,
) -> None:
    """The tensors are float, the indices int64, on the device of the first; only the required ones may not be None."""
    first, device = next(iter(floats)), None
    for kind, tensors in (("float", floats), ("int64", integers or {})):
        for name, tensor in tensors.items():
            if tensor is None and name not in required:
                continue
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor of {kind}, but got {type(tensor).__name__}")
            if not (tensor.is_floating_point() if kind == "float" else tensor.dtype == torch.int64):
                raise TypeError(f"{name} must be a tensor of {kind}, but got {tensor.dtype}")
            there = tensor.device
            if device is None:
                device = there
            elif there != device:
                raise ValueError(f"{first} is on {device}, {name} is on {there}")


def check_shape(
    check: Check, name: str, tensor: Tensor | None, wanted: tuple[int | None, ...], **because: Tensor | None
) -> None:
    """A tensor, if there is one, has the wanted shape (None: any size), which follows from these other tensors."""
    if tensor is not None:
        sizes = tensor.shape
        fits = len(sizes) == len(wanted)
        if fits:
            for size, other in zip(sizes, wanted, strict=True):
                fits = fits and (other is None or size == other)
        check(
            fits,
            lambda: (
                f"{name} must be [{', '.join('*' if size is None else str(size) for size in wanted)}] "
                f"({', '.join(f'{other} {shape(t)}' for other, t in because.items())}), but got {shape(tensor)}"
            ),
        )
