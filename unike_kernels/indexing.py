"""The int8 copy of a table of keys: made when it pays, and never of other keys than those that are searched."""

from typing import Any

import torch
from torch import Tensor

from . import native
from .cuda_kernels.cosine_topk import MOST_ITEMS
from .cuda_kernels.int8_search import CudaInt8Index, most_queries
from .cuda_kernels.zeros import captured

Index = native.Int8Index | CudaInt8Index


class KeptIndex:
    """The int8 copy of one table of keys that may change in place.

    Making one costs about 50 searches, so it waits for the 50th search of unchanged keys. On a CPU with "auto", it is
    thrown away when the keys change; on a GPU with "cuda", it is made anew in place, by `follow` or by the next search,
    so that a captured graph that searches it goes on being right. None is made while a graph is captured: what is
    captured before the 50th search stays a search of the keys themselves. A change through `.data`, which torch does
    not count, is not seen; on a GPU, a captured graph sees no change without `follow`.
    """

    WAIT = 50

    def __init__(self) -> None:
        self._tables: tuple[Tensor | None, Tensor | None] = (None, None)
        self._of: tuple[int, ...] = ()
        self._searches = 0
        self.index: Index | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(KeptIndex())  # a copy has keys of its own

    def of(self, q: Tensor, keys: Tensor, key_norm: Tensor, k: int, asked: str) -> Index | None:
        """The copy of keys [N, d] for k items of queries q [T, d]; None where the operator is quicker, or none can be.

        asked: the backend as the user named it.
        """
        if torch.compiler.is_compiling():
            return None
        for tensor in (q, keys, key_norm):  # plain tensors only: a fake one, as of torch.export, has no data
            if type(tensor) is not Tensor or tensor.device != keys.device or tensor.dtype not in native.INDEXED:
                return None
        kind = _kind(len(q), keys, k, asked)
        if kind is None or keys.is_inference() or key_norm.is_inference():  # whose changes are not counted
            return None
        fixed = captured(keys.device)
        if self._tables[0] is not keys or self._tables[1] is not key_norm:
            self._tables, self._of, self._searches, self.index = (keys, key_norm), (), 0, None
        if self._of != _state(keys, key_norm):
            if isinstance(self.index, CudaInt8Index):
                if fixed:
                    return None
                self.follow()
            else:
                self._of, self._searches, self.index = _state(keys, key_norm), 0, None
        self._searches += 1
        if self.index is None and self._searches >= self.WAIT and not fixed:
            if kind is CudaInt8Index and most_queries(keys.shape[1], keys.dtype, keys.device) < len(q):
                return None
            self.index = kind(keys, key_norm)
        if isinstance(self.index, CudaInt8Index) and len(q) > self.index.most_queries:
            return None
        return self.index

    def follow(self) -> None:
        """After a change of the keys or norms in place: the copy on a GPU changes in place too."""
        keys, key_norm = self._tables
        if isinstance(self.index, CudaInt8Index) and keys is not None and key_norm is not None:
            self.index.encode()
            self._of = _state(keys, key_norm)


def _state(keys: Tensor, key_norm: Tensor) -> tuple[int, ...]:
    return keys.data_ptr(), keys._version, key_norm.data_ptr(), key_norm._version


def _kind(queries: int, keys: Tensor, k: int, asked: str) -> type[Index] | None:
    """The index that is quicker than the operator, if there is one here."""
    n, d = keys.shape
    if asked == "auto" and keys.device.type == "cpu":
        return native.Int8Index if native.cpu() is not None and pays(queries, n, keys.dtype) else None
    if asked != "cuda" or not (keys.is_cuda or native.emulated()) or native.cuda() is None:
        return None
    return CudaInt8Index if k <= MOST_ITEMS and pays_in_cuda(queries, n, d) else None


def pays(queries: int, n: int, dtype: torch.dtype) -> bool:
    """Whether the int8 search is quicker than the one of keys [n, d] of this dtype: measured at d = 768 and 2560.

    At n = 10,000, on one thread of an AVX-512 machine: fp32 3.1 to 3.6 times at one query and 1.4 to 1.6 at 8; half
    precision, of which half the bytes are read, 1.7 to 2.2 at one, 0.9 to 1.2 at 4, 0.7 to 1.0 at 8. By AVX2, which
    takes twice as long to widen it, bfloat16 2.4 to 2.9 at 4 and 8. At n = 1,000 in fp32 1.8 at one query, 0.98 at 8.
    """
    module = native.cpu()
    most = 2 if dtype.itemsize == 2 and module is not None and module.avx512 else 8
    return 0 < queries <= most and n >= 1000 * queries


def pays_in_cuda(queries: int, n: int, d: int) -> bool:
    """Whether it is on a GPU. H100, bf16, d = 4096, one query: 287 against 335 us among 100,000 keys, 1,885 against
    2,926 among a million, but 125 against 57 among 10,000; so they are level at 56,000.

    Where the keys lie too close together for int8, up to 8 queries lose a tenth, and 16 would lose a lot (computed).
    """
    return 0 < queries <= 8 and n * d >= 2**28
