"""The int8 search on a GPU: codes made by torch, once for each table; the rest in CUDA C++, csrc/int8_search.cu."""

import math

import torch
from torch import Tensor

from .. import native
from ..triton_kernels import launching as allocating
from .cosine_topk import MOST_ITEMS, MOST_KEYS
from .launching import address, launch, name_of, on, wait_for_device, wait_for_stream

MOST_QUERIES = 16  # as csrc/int8_search.cuh has it
CHUNK = 4096  # rows that are encoded at a time: 64 MB of float32 at d = 4096
KERNELS = ("prepare", "scan", "bound", "rerank")


def most_queries(d: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many queries of d elements a search of a copy takes on this device; 0: it has no room for any."""
    padded = -(-d // 64) * 64
    index = (*[8] * 5, padded, 1 << (padded.bit_length() - 1), 8, 8, name_of(dtype), 1, d, d, 8)  # 8: some address
    with on(device):
        for most in (MOST_QUERIES, 8, 4):  # as csrc/int8_search.cu has kernels
            try:
                native.cuda().int8_search_workspace(index, most, 1)
                return most
            except (RuntimeError, ValueError):
                continue
    return 0


class CudaInt8Index:
    """An int8 copy of the keys of a search: half of the bytes of bf16, and the exact result all the same.

    As `native.Int8Index`, for CUDA tensors: the copy only decides which keys are scored; those that could be among the
    K best, by a bound that always holds, are scored in fp32 from the keys themselves, each read once for all queries.
    Keys that lie closer together than int8 can tell are all scored; after a search that scored more than a third of
    them, the next 2, 4, ... 64 leave the copy alone, so that they cost one read of the keys and no more. `reranked`
    tells how many were scored. No value is read from the device, so a search can be captured in a graph.

    keys: [N, d] float32, bfloat16 or float16, N to 2**31 - 2**20, read by every search. After a change of theirs call
    `encode`, which changes the copy in place: a captured search stays right. key_norm: [N], what to divide the rows by;
    None: their norms. ValueError where d is too large for the device; `most_queries`: of one search.
    """

    @torch.inference_mode(False)  # or `encode` could not change the copy outside of that mode
    def __init__(self, keys: Tensor, key_norm: Tensor | None = None) -> None:
        if (reason := native.no_cuda(keys.device)) is not None:
            raise RuntimeError(reason)
        if keys.dim() != 2 or keys.dtype not in native.INDEXED or keys.shape[1] == 0 or keys.shape[0] > MOST_KEYS:
            raise ValueError(
                f"keys must be [N, d] in half or single precision, but got {list(keys.shape)}, {keys.dtype}"
            )
        if keys.device.type != ("cpu" if native.emulated() else "cuda"):
            raise ValueError(f"keys must be on a CUDA device, but are on {keys.device}")
        norm = torch.linalg.vector_norm(keys.float(), dim=1) if key_norm is None else key_norm
        if norm.shape != keys.shape[:1] or norm.device != keys.device:
            raise ValueError(
                f"key_norm must be [{len(keys)}] on {keys.device}, but got {list(norm.shape)}, {norm.device}"
            )
        n, d = keys.shape
        self.most_queries = most_queries(d, keys.dtype, keys.device)
        if self.most_queries == 0:
            raise ValueError(f"a key has {d} elements, and codes of them have no room in {keys.device}'s shared memory")
        self._given = keys.detach(), None if key_norm is None else key_norm.detach()
        self.keys = keys.detach() if keys.stride(1) == 1 else keys.detach().contiguous()
        self.key_norm = norm.detach().to(torch.float32).contiguous()
        self.padded = -(-d // 64) * 64
        self.window = 1 << (self.padded.bit_length() - 1)  # of a Hadamard transform: the largest power of two in a row
        # As csrc/cpu/int8_search.cpp: a dot product, two rotations and the sums around them; doubled for the norms.
        self.slack = 2 * (d / 32 + 64) / 2**24
        device = keys.device
        draw = torch.Generator("cpu").manual_seed(0)  # any: the result does not depend on it
        signs = torch.randint(0, 2, (2, self.padded), generator=draw, device="cpu")
        self.signs = (2 * signs - 1).to(device, torch.float32)
        self.codes = torch.zeros(n, self.padded, dtype=torch.int8, device=device)
        self.scale, self.residual = torch.zeros(2, n, dtype=torch.float32, device=device)
        self.center = torch.zeros(self.padded, dtype=torch.float32, device=device)
        self.habit = torch.zeros(3, dtype=torch.long, device=device)  # as csrc/int8_search.cuh has it
        self.reranked = torch.zeros(0, dtype=torch.int32, device=device)
        self.encode()

    @torch.no_grad()
    def encode(self) -> None:
        """Makes the copy of the keys as they are now, where the last one was.

        Waits for searches on all streams before, and for the copy to be there after: others do not know this stream.
        """
        wait_for_device(self.keys.device)
        keys, norm = self._given
        if self.keys.data_ptr() != keys.data_ptr():
            self.keys.copy_(keys)
        if norm is None:
            torch.linalg.vector_norm(keys.float(), dim=1, out=self.key_norm)
        elif norm.data_ptr() != self.key_norm.data_ptr():
            self.key_norm.copy_(norm)
        self.center[: keys.shape[1]] = self._mean()
        for start in range(0, len(keys), CHUNK):
            self._encode(slice(start, start + CHUNK))
        self.habit.zero_()
        wait_for_stream(self.keys.device)

    @property
    def bytes(self) -> int:
        """Memory that the copy takes."""
        parts = (self.codes, self.scale, self.residual, self.center, self.signs)
        return sum(part.numel() * part.element_size() for part in parts)

    def search(self, q: Tensor, k: int, ranges: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(scores fp32, indices int64) [T, k] for q [T, d], k to 128, as `reference.cosine_topk`.

        T to `most_queries`, 16 where shared memory has room. ranges [T, 2] int64. `reranked` [T] int32, on the device,
        then tells how many keys were scored exactly for each query, beside the k that gave the bound. Five launches.
        """
        n, d = self.keys.shape
        most = self.most_queries
        if q.dim() != 2 or q.shape[1] != d or q.shape[0] > most or q.dtype not in native.INDEXED:
            raise ValueError(f"q must be [T, {d}], T to {most}, but got {list(q.shape)}, {q.dtype}")
        if not 0 <= k <= MOST_ITEMS:
            raise ValueError(f"k must be 0 to {MOST_ITEMS}, but is {k}")
        if ranges is not None and (ranges.shape != (len(q), 2) or ranges.dtype != torch.long):
            raise ValueError(f"ranges must be [{len(q)}, 2] int64, but got {list(ranges.shape)}, {ranges.dtype}")
        if q.device != self.keys.device or (ranges is not None and ranges.device != q.device):
            raise ValueError(f"keys are on {self.keys.device}: q and ranges must be too, but q is on {q.device}")
        device, tokens = q.device, len(q)
        scores = allocating.new((tokens, k), torch.float32, device)
        indices = allocating.new((tokens, k), torch.int64, device)
        # Kept here, not by `self`, until all is launched: another thread's search would free it.
        reranked = allocating.new((tokens,), torch.int32, device)
        if tokens == 0 or k == 0:
            self.reranked = reranked.zero_()
            return scores, indices
        q = q.detach().float().contiguous()
        ranges = None if ranges is None else ranges.contiguous()
        places = [self.codes, self.scale, self.residual, self.center, self.signs]
        index = (
            *(address(part) for part in places),
            *(self.padded, self.window, address(self.keys), address(self.key_norm), name_of(self.keys.dtype)),
            *(n, self.keys.stride(0), d, address(self.habit)),
        )
        with on(device):
            needed = native.cuda().int8_search_workspace(index, tokens, k)
        workspace = allocating.new((needed,), torch.uint8, device)
        kernels = tuple(f"int8_search_{name}" for name in (KERNELS if n else KERNELS[:1]))
        launch(
            "int8_search",
            device,
            (*kernels, "cosine_topk_select"),
            *(index, address(q), address(ranges), tokens, k, address(workspace), needed),
            *(address(scores), address(indices), address(reranked)),
        )
        self.reranked = reranked
        return scores, indices

    def _normalised(self, rows: slice) -> Tensor:
        """u = key / key_norm of some rows, zeros where the norm is 0: [m, d] float32."""
        norm = self.key_norm[rows]
        inverse = torch.where(norm == 0, torch.zeros_like(norm), 1 / norm)
        return self.keys[rows].float() * inverse[:, None]

    def _mean(self) -> Tensor:
        """The mean of the rows that can be found: no zero row (room for more items), none that is not finite."""
        total = torch.zeros(self.keys.shape[1], dtype=torch.float64, device=self.keys.device)
        count = torch.zeros((), dtype=torch.float64, device=self.keys.device)
        for start in range(0, len(self.keys), CHUNK):
            rows = slice(start, start + CHUNK)
            u = self._normalised(rows)
            usable = (self.key_norm[rows] != 0) & u.isfinite().all(dim=1)
            total += torch.where(usable[:, None], u, 0.0).sum(dim=0, dtype=torch.float64)
            count += usable.sum()
        return (total / count.clamp(min=1)).float().nan_to_num(0.0, 0.0, 0.0)

    def _rotate(self, x: Tensor) -> Tensor:
        """Random signs and a Hadamard transform of the first `window` elements; of the last, if that is not all."""
        x = x * self.signs[0]
        x[:, : self.window] = _hadamard(x[:, : self.window])
        if self.window < self.padded:
            x = x * self.signs[1]
            x[:, -self.window :] = _hadamard(x[:, -self.window :])
        return x

    def _encode(self, rows: slice) -> None:
        """Codes, scales and residuals of some rows; what int8 cannot hold has no code and an infinite residual."""
        u = torch.nn.functional.pad(self._normalised(rows), (0, self.padded - self.keys.shape[1]))
        length = u.double().square().sum(dim=1).sqrt()
        v = self._rotate(u - self.center)
        scale = v.abs().amax(dim=1) / 127
        over = torch.where(scale > 0, 1 / scale, 0.0)
        usable = length.isfinite() & over.isfinite()
        codes = torch.where(usable[:, None], (v * over[:, None]).round().clamp(-127, 127), 0.0)
        left = (v.double() - scale.double()[:, None] * codes.double()).square().sum(dim=1).sqrt()
        bound = (left + self.slack * (length + self.center.double().norm())).float()
        bound = torch.nextafter(bound, torch.full_like(bound, math.inf))
        self.codes[rows] = codes.to(torch.int8)
        self.scale[rows] = torch.where(usable, scale, 0.0)
        self.residual[rows] = torch.where(usable & bound.isfinite(), bound, math.inf)


def _hadamard(x: Tensor) -> Tensor:
    """The transform of rows whose length is a power of two, divided by its root: orthogonal."""
    n, half = x.shape[1], 1
    while half < n:
        pairs = x.reshape(len(x), n // (2 * half), 2, half)
        x = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2).reshape(len(x), n)
        half *= 2
    return x / math.sqrt(n)
