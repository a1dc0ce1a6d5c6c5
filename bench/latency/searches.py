"""The cases of cosine_topk, and of a search with the shift that follows it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.latency.case import CUDA, INDEXED, OURS, TRITON, Case, Inputs, K
from bench.latency.rivals import beside, compiled, cosine_similarity, exact_topk, mm_topk
from bench.latency.shapes import Shape, hidden
from unike_kernels import backends, native, ops, reference
from unike_kernels.cuda_kernels.int8_search import MOST_QUERIES, CudaInt8Index

LARGEST = 40_000  # items times queries that cosine_similarity lays out times d


def has_cuda_kernels() -> bool:
    """Whether the CUDA C++ kernels can run here."""
    return all(backend.reason is None for backend in backends.available() if backend.name == "cuda")


def has_index(on_cpu: bool, queries: int) -> bool:
    """Whether an int8 copy can be searched, for so many queries."""
    return native.cpu() is not None if on_cpu else has_cuda_kernels() and queries <= MOST_QUERIES


def index_of(keys: Tensor, queries: int) -> native.Int8Index | CudaInt8Index | None:
    """The int8 copy of keys where there is one; None otherwise."""
    if not has_index(keys.device.type == "cpu", queries):
        return None
    return native.Int8Index(keys) if keys.device.type == "cpu" else CudaInt8Index(keys)


def search(shape: Shape, queries: int, items: int, on_cpu: bool = False, dtype: torch.dtype | None = None) -> Case:
    """Exact top-40 by cosine in a memory of `items`."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        keys = hidden(generator, items, shape.d, dtype=dtype, device=device)
        norm = torch.cat([torch.linalg.vector_norm(rows.float(), dim=1) for rows in keys.split(2**16)])
        return {
            "q": hidden(generator, queries, shape.d, dtype=dtype, device=device),
            "keys": keys,
            "k": min(K, items),
            "key_norm": norm,
            "unit": torch.cat([F.normalize(rows.float(), dim=1).to(dtype) for rows in keys.split(2**16)]),
            "index": index_of(keys, queries),
        }

    def ours(unit: Tensor, index: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
        return ops.cosine_topk(**inputs)

    def indexed(q: Tensor, k: int, index: Any, **rest: Any) -> tuple[Tensor, Tensor]:
        """What a memory takes from its fiftieth search on; on a GPU only one of the backend "cuda"."""
        return index.search(q, k)

    def specification(unit: Tensor, index: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
        return reference.cosine_topk(**inputs)

    providers: dict[str, Callable[..., Any]] = {OURS: ours}
    if has_index(on_cpu, queries):
        providers[INDEXED] = indexed
    if not on_cpu and has_cuda_kernels():
        providers |= {CUDA: partial(ours, backend="cuda"), TRITON: partial(ours, backend="triton")}
    if dtype is None:
        providers |= beside(on_cpu)
    providers["mm + topk"] = mm_topk
    if (queries, items) == (1, 10_000) and dtype is None:
        providers["mm + topk, compiled"] = compiled(mm_topk)
    if items * queries <= LARGEST and dtype is None:
        providers["cosine_similarity + topk"] = cosine_similarity
    return Case(
        "cosine_topk",
        shape.name,
        {"T": queries, "N": items},
        make,
        specification,
        providers,
        moved=items * shape.d + queries * shape.d,
        flops=2 * queries * items * shape.d,
        capturable=set(providers),
        eager="mm + topk",
        dtype=dtype,
    )


def lengths_of_banks(queries: int, mean: int) -> list[int]:
    """Items of each query's own bank: half to one and a half times the mean, the same in every run."""
    some = torch.randint(mean // 2, mean + mean // 2 + 1, (queries,), generator=torch.Generator().manual_seed(0))
    return some.tolist()


def ragged(shape: Shape, queries: int, mean: int, on_cpu: bool = False) -> Case:
    """Each query searches a bank of its own, of about `mean` items: many tenants in one pool."""
    lengths = lengths_of_banks(queries, mean)
    total = sum(lengths)

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        keys = hidden(generator, total, shape.d, dtype=dtype, device=device)
        ends = torch.tensor(lengths, device=device).cumsum(0)
        return {
            "q": hidden(generator, queries, shape.d, dtype=dtype, device=device),
            "keys": keys,
            "k": K,
            "key_norm": torch.linalg.vector_norm(keys.float(), dim=1),
            "ranges": torch.stack([ends - torch.tensor(lengths, device=device), ends], dim=1),
            "unit": F.normalize(keys.float(), dim=1).to(dtype),
        }

    def ours(unit: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        return ops.cosine_topk(**inputs)

    def loop(q: Tensor, unit: Tensor, k: int, **rest: Any) -> tuple[Tensor, Tensor]:
        """One bank after the other, its own rows alone."""
        found, start = [], 0
        for row, length in enumerate(lengths):
            scores, indices = mm_topk(q[row : row + 1], unit[start : start + length], k)
            found.append((scores, indices + start))
            start += length
        scores, indices = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(indices)

    def masked(q: Tensor, unit: Tensor, k: int, ranges: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
        """One product over the pool, what is not a query's own masked."""
        at = torch.arange(total, device=q.device)
        own = (at >= ranges[:, :1]) & (at < ranges[:, 1:])
        scores = F.normalize(q.float(), dim=1).to(q.dtype) @ unit.T
        scores, indices = scores.masked_fill(~own, -torch.inf).topk(k)
        return scores.float(), indices

    def specification(unit: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        return reference.cosine_topk(**inputs)

    providers: dict[str, Callable[..., Any]] = {OURS: ours, "loop over banks": loop, "mm over all, masked": masked}
    if not on_cpu and has_cuda_kernels():
        providers |= {CUDA: partial(ours, backend="cuda"), TRITON: partial(ours, backend="triton")}
    return Case(
        "cosine_topk",
        shape.name,
        {"T": queries, "bank": mean},
        make,
        specification,
        providers,
        moved=total * shape.d + queries * shape.d,
        flops=2 * total * shape.d,
        capturable=set(providers),
        eager="loop over banks",
    )


def external(shape: Shape, items: int, on_cpu: bool = False) -> Case:
    """The whole external path of one token in one layer: search, then attention over the 40 found and the mix.

    As in a model with `projected` attention and a fixed alpha: q is what q_proj made anyway, and what is mixed enters
    the layer's own output projection, so no product of d x d is left.
    """
    width = shape.heads * shape.head_dim

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        rows = partial(hidden, generator, dtype=dtype, device=device)
        sem = rows(items, shape.d)
        return {
            "tap": rows(1, shape.d),
            "sem": sem,
            "sem_norm": torch.linalg.vector_norm(sem.float(), dim=1),
            "heads": rows(1, width),
            "q": rows(1, shape.heads, shape.head_dim),
            "item_keys": rows(items, shape.kv_heads, shape.head_dim),
            "item_values": rows(items, shape.kv_heads, shape.head_dim),
            "alpha": torch.full((1,), 0.3, device=device),
        }

    def path(search: Callable[..., Any], shift: Callable[..., Any], **options: Any) -> Callable[..., Tensor]:
        def run(tap: Tensor, sem: Tensor, sem_norm: Tensor, heads: Tensor, **rest: Any) -> Tensor:
            _, indices = search(tap, sem, K, key_norm=sem_norm, **options)
            parts = (rest[name] for name in ("q", "item_keys", "item_values"))
            return shift(heads, *parts, indices, alpha=rest["alpha"], **options)[0]

        return run

    def torch_path(tap: Tensor, heads: Tensor, **rest: Any) -> Tensor:
        """Multiply, divide by the norms, top-K, gather, torch's attention, a weighted sum."""
        indices = exact_topk(tap, rest["sem"], rest["sem_norm"], K)
        k, v = (rest[name][indices].transpose(1, 2) for name in ("item_keys", "item_values"))
        h = F.scaled_dot_product_attention(rest["q"][:, :, None], k, v, enable_gqa=shape.kv_heads != shape.heads)
        return torch.lerp(heads, h.flatten(1), rest["alpha"][:, None].to(heads.dtype))

    providers = {OURS: path(ops.cosine_topk, ops.knowledge_shift), "torch": torch_path}
    if not on_cpu and has_cuda_kernels():
        for name, backend in ((CUDA, "cuda"), (TRITON, "triton")):
            providers[name] = path(ops.cosine_topk, ops.knowledge_shift, backend=backend)
    return Case(
        "external path",
        shape.name,
        {"T": 1, "N": items},
        make,
        path(reference.cosine_topk, reference.knowledge_shift),
        providers,
        moved=items * shape.d + 2 * K * shape.kv_heads * shape.head_dim + 3 * width,
        flops=2 * items * shape.d + 4 * K * width,
        capturable=set(providers),
        eager="torch",
    )
