"""A second device for machines that have none: CPU tensors that say they lie elsewhere, and refuse to meet others.

Inside `second_device()`, `DEVICE` is a device to put models on. What is computed there is computed on the CPU, but a
tensor of the CPU and one of the device in the same operation are an error, as they are with CUDA, and so is reading
one through `numpy()`. As with CUDA, a CPU tensor without dimensions may be among the operands, and one of indices may
index. The device is torch's "lazy", which the autograd engine runs without a driver.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("lazy:0")
COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
INDEXED = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
CPU = torch.device("cpu")
# Packed sequences keep their lengths on the CPU, whatever their elements lie on.
PACKED = ("_pack_padded_sequence", "_pad_packed_sequence", "gru", "lstm")


class There(Tensor):
    """A tensor of the second device; `here` has its elements, on the CPU."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        """Of the same layout as `here`."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, here: Tensor) -> None:
        self.here = here

    def __repr__(self, **_: Any) -> str:
        """Where it lies, and its elements."""
        return f"There({self.here!r})"

    def tolist(self) -> Any:
        """Its elements as Python numbers."""
        return self.here.tolist()

    def numpy(self, **_: Any) -> Any:
        """TypeError, as on any device but the CPU."""
        raise TypeError(f"a tensor on {DEVICE} cannot become a numpy array: copy it to the CPU first")

    def untyped_storage(self) -> Any:
        """Of its elements: two views of one tensor share it, as they would there."""
        return self.here.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What happens outside of the mode as well, in autograd's own calls for one."""
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator, on the CPU; its results lie where its operands do, or where it was asked to put them."""
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    asked = kwargs.get("device")
    packed = func.overloadpacket.__name__ in PACKED
    if there and func not in COPIES and not packed:
        bound = tensors
        if func in INDEXED and isinstance(args[0], There):  # indices, and they alone, may be on the CPU
            bound = [x for x in (args[0], *args[2:]) if isinstance(x, Tensor)]
        strangers = [x for x in bound if not isinstance(x, There) and x.dim() > 0]
        if strangers:
            shapes = [[tuple(x.shape) for x in group] for group in (there, strangers)]
            raise RuntimeError(f"{func} got tensors on {DEVICE} and on the CPU: shapes {shapes[0]} and {shapes[1]}")
    to_there = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if func is torch.ops.aten.copy_.default:
        to_there = isinstance(args[0], There)
    if asked is not None:
        kwargs = {**kwargs, "device": CPU}
    plain, named = tree_map_only(There, lambda x: x.here, (args, kwargs))
    out = func(*plain, **named)
    if not to_there:
        return out
    if func is torch.ops.aten._pack_padded_sequence.default:
        return There(out[0]), out[1]
    known = {id(x.here): x for x in there}  # an operand that comes back changed in place stays the tensor it was
    return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else There(x), out)


class _Literals(TorchFunctionMode):
    """Tensors made of Python's numbers, which torch puts on a device below what a dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        if func is Tensor.new_tensor:
            device = kwargs.pop("device", args[0].device)
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(device)
        if func in (Tensor.__getitem__, Tensor.__setitem__):  # lists that index become tensors there, too
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part, dtype=torch.long) if type(part) is list else part for part in index)
            args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


class _Mode(TorchDispatchMode):
    """Sees the calls that no tensor of the device is part of: what is made there, and copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Inside, tensors and modules may be put on the device that this gives."""
    asked = torch.is_autocast_enabled
    # Before torch 2.12 it does not know this type of device.
    torch.is_autocast_enabled = lambda *of: asked(*("cpu" if one == DEVICE.type else one for one in of))
    try:
        with _Literals(), _Mode():
            yield DEVICE
    finally:
        torch.is_autocast_enabled = asked
