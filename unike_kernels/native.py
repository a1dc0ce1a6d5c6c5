"""The compiled modules of csrc/: loads them where they are, remembers why not, and gives them tensors.

Nothing is loaded before it is asked for, and no driver is touched by asking for the CPU module.
"""

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from . import reference

CPU_INTERFACE = 10  # of csrc/cpu/bindings.cpp: a build of other sources is not called
LEVELS = ("portable", "avx2", "best")  # as csrc/cpu/int8_search.h counts them: less than the best is for tests
INDEXED = (torch.float32, torch.bfloat16, torch.float16)
_images: dict[int, int | str] = {}  # CUDA device -> what `_image` has found out


@lru_cache
def _load(name: str) -> tuple[Any, str | None]:
    """(the module or None, why not or None)."""
    try:
        module = import_module(f".{name}", __package__)
        if name == "_cpu" and getattr(module, "interface", 1) != CPU_INTERFACE:
            return None, f"{__package__}._cpu was built from other sources than these: install the package again"
        return module, None
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


def no_cuda(device: torch.device | None = None) -> str | None:
    """Why the CUDA module cannot be used on a CUDA device, by default the current one; None when it can."""
    module, reason = cuda(), _load("_cuda")[1]
    if module is None:
        return reason
    if emulated():
        return None
    try:
        if module.device_count() == 0:
            return "there is no CUDA device"
    except RuntimeError as error:
        return str(error)
    if not torch.cuda.is_available():
        return "this torch has no CUDA"
    image = _image(torch.device("cuda") if device is None else device)
    return image if isinstance(image, str) else None


def emulated() -> bool:
    """Whether the CUDA module is one that runs its kernels on the CPU, as tests have it."""
    module = cuda()
    return module is not None and module.architectures == "emulator"


def built_for(device: torch.device) -> int | None:
    """The architecture of the CUDA module's code on a device, 80, 90, ...: from PTX, less than the device's."""
    if device.type != "cuda" or cuda() is None:
        return None
    image = _image(device)
    return image if isinstance(image, int) else None


def _image(device: torch.device) -> int | str:
    """The architecture of the CUDA module's code on a device, or why there is none: its smallest kernel tells.

    Its end is waited for, which would spoil a graph that is being captured: then it is for a later call to find out.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _images:
        with torch.cuda.device(index):
            if torch.cuda.is_current_stream_capturing():
                return f"none of its kernels has run on device {index}, and a graph is captured: call one before"
            try:
                _images[index] = _probe()
            except NoImageError as error:
                _images[index] = f"{error}; it was built for {cuda().architectures} (UNIKE_CUDA_ARCHS)"
    return _images[index]


class NoImageError(RuntimeError):
    """The CUDA module's kernels do not start on a device."""


def _probe() -> int:
    out = torch.zeros(1, dtype=torch.int32, device="cuda")  # a full GPU is no reason to do without the module for good
    try:
        cuda().probe(out.data_ptr(), torch.cuda.current_stream().cuda_stream)
    except RuntimeError as error:
        raise NoImageError(str(error)) from error
    return int(out)


class Int8Index:
    """An int8 copy of the keys of a search: a quarter of the bytes of fp32, and the exact result all the same.

    The copy only decides which keys are scored; those that could be among the K best, by a bound that always holds, are
    scored in fp32 from the keys themselves. So `search` is `reference.cosine_topk`, ties, NaN and ranges included, but
    for keys whose scores differ by less than the rounding of fp32. The sum of a score runs in one order whatever the
    row, so equal keys have equal scores and the lowest index comes first.

    keys: [N, d] float32, bfloat16 or float16 on the CPU, read again by every search: not to change while this is used.
    key_norm: [N] float32, what to divide the rows by; None: their norms. level: of instructions, one of LEVELS.
    """

    def __init__(self, keys: Tensor, key_norm: Tensor | None = None, *, level: str = "best") -> None:
        module = cpu()
        if module is None:
            raise RuntimeError(str(no_cpu()))
        if keys.dim() != 2 or keys.dtype not in INDEXED or keys.device.type != "cpu":
            raise ValueError(f"keys must be [N, d] on the CPU in half or single precision, but got {keys.dtype}")
        if key_norm is None:
            key_norm = torch.linalg.vector_norm(keys.float(), dim=1)
        if key_norm.shape != keys.shape[:1]:
            raise ValueError(f"key_norm must be [{len(keys)}], but got {list(key_norm.shape)}")
        # Kept: the index reads them by address.
        self.keys = keys.detach() if keys.stride(1) == 1 and keys.stride(0) >= keys.shape[1] else keys.contiguous()
        self.key_norm = key_norm.detach().to("cpu", torch.float32).contiguous()
        n, d = keys.shape
        dtype = str(keys.dtype).removeprefix("torch.")
        stride, norm = self.keys.stride(0), self.key_norm.data_ptr()
        self._index = module.Int8Index(
            self.keys.data_ptr(), dtype, n, d, max(stride, d), norm, LEVELS.index(level), torch.get_num_threads()
        )
        self.reranked = torch.zeros(0, dtype=torch.long)

    @property
    def bytes(self) -> int:
        """Memory that the copy takes."""
        return int(self._index.bytes)

    def search(self, q: Tensor, k: int, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scores fp32, indices int64) [T, k] for q [T, d], as `reference.cosine_topk`; ranges [T, 2] int64.

        `reranked` [T] then tells how many keys were scored exactly for each query.
        """
        if q.dim() != 2 or q.shape[1] != self.keys.shape[1] or q.dtype not in INDEXED or q.device.type != "cpu":
            raise ValueError(f"q must be [T, {self.keys.shape[1]}] on the CPU, but got {list(q.shape)}, {q.dtype}")
        if ranges is not None and (ranges.shape != (len(q), 2) or ranges.dtype != torch.long):
            raise ValueError(f"ranges must be [{len(q)}, 2] int64, but got {list(ranges.shape)}, {ranges.dtype}")
        unit = reference._unit(q.detach().float()).contiguous()
        ranges = None if ranges is None else ranges.contiguous()
        # Said, and not left to the default device and dtype: C++ writes to these addresses.
        scores = torch.empty(len(q), k, dtype=torch.float32, device="cpu")
        indices = torch.empty(len(q), k, dtype=torch.long, device="cpu")
        # Kept here, not by `self`, while C++ writes: another thread's search would free it.
        reranked = torch.empty(len(q), dtype=torch.long, device="cpu")
        self._index.search(
            *(unit.data_ptr(), len(q), k, 0 if ranges is None else ranges.data_ptr()),
            *(scores.data_ptr(), indices.data_ptr(), reranked.data_ptr(), torch.get_num_threads()),
        )
        self.reranked = reranked
        return scores, indices
