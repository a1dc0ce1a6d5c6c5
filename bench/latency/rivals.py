"""What a user could put together instead, where several cases use it."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.latency.case import Inputs
from unike_kernels import reference


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, compiled at its first call for the shapes it sees."""
    return torch.compile(function, dynamic=False, fullgraph=True)


# ---------------------------------------------------------------------------------------------------------- search


def mm_topk(q: Tensor, unit: Tensor, k: int, **rest: Any) -> tuple[Tensor, Tensor]:
    """The usual way: keys normalised beforehand, one product, torch's top-K."""
    scores, indices = (F.normalize(q.float(), dim=1).to(q.dtype) @ unit.T).topk(k)
    return scores.float(), indices


def exact_topk(q: Tensor, keys: Tensor, key_norm: Tensor, k: int) -> Tensor:
    """The items of `mm_topk` with scores that stay float32: in half precision its rounding takes the wrong ones."""
    wide = {"out_dtype": torch.float32} if q.is_cuda and q.dtype != torch.float32 else {}
    return (torch.mm(q, keys.T, **wide) / key_norm).topk(k).indices


def cosine_similarity(q: Tensor, keys: Tensor, k: int, **rest: Any) -> tuple[Tensor, Tensor]:
    """torch's own function for it, which lays out [T, N, d]."""
    scores, indices = F.cosine_similarity(q[:, None], keys[None], dim=-1).topk(k)
    return scores.float(), indices


def faiss_knn(q: Tensor, unit: Tensor, k: int, **rest: Any) -> tuple[Tensor, Tensor]:
    """faiss-cpu's brute force."""
    import faiss

    queries = F.normalize(q, dim=1).numpy()
    scores, indices = faiss.knn(queries, unit.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(scores), torch.from_numpy(indices)


def usearch_exact(q: Tensor, unit: Tensor, k: int, **rest: Any) -> tuple[Tensor, Tensor]:
    """usearch's brute force."""
    from usearch.index import MetricKind, search

    found = search(unit.numpy(), F.normalize(q, dim=1).numpy(), k, MetricKind.IP, exact=True)
    shape = (len(q), k)  # one query comes back without its dimension
    scores, indices = 1 - found.distances.reshape(shape), found.keys.reshape(shape).astype("int64")
    return torch.from_numpy(scores), torch.from_numpy(indices)


def flashinfer_topk(q: Tensor, unit: Tensor, k: int, deterministic: bool, **rest: Any) -> tuple[Tensor, Tensor]:
    """One product, FlashInfer's selection; deterministic: its own sort, not torch's, puts the K in order."""
    import flashinfer

    scores = (F.normalize(q.float(), dim=1).to(q.dtype) @ unit.T).float()
    return flashinfer.top_k(scores, k, sorted=True, deterministic=deterministic)


def beside(on_cpu: bool) -> dict[str, Callable[..., Any]]:
    """The search libraries that are installed here."""
    known: dict[str, tuple[str, Callable[..., Any]]]
    known = {"faiss": ("faiss", faiss_knn), "usearch": ("usearch", usearch_exact)}
    if not on_cpu:
        known = {
            "mm + flashinfer top_k": ("flashinfer", partial(flashinfer_topk, deterministic=False)),
            "mm + flashinfer top_k, deterministic": ("flashinfer", partial(flashinfer_topk, deterministic=True)),
        }
    return {name: run for name, (package, run) in known.items() if find_spec(package)}


# --------------------------------------------------------------------------------------------------------- neurons


def loop_over_requests(x: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, **rest: Any) -> Tensor:
    """One request after the other, its own neurons alone. `sizes`: of the groups, on the host."""
    act, out, start = reference.activation(rest["act"]), [], 0
    for row, size in enumerate(rest["sizes"]):
        of = slice(start, start + size)
        o = act(F.linear(x[row], keys[of], key_bias[of]))
        if "up" in rest:
            o = o * F.linear(x[row], rest["up"][of], rest["up_bias"][of])
        out.append(o @ values[of])
        start += size
    return torch.stack(out)


def padded_bmm(x: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, **rest: Any) -> Tensor:
    """Every request's neurons gathered and padded to the most that one has; batched products."""
    rows, there = rest["padded"]  # [T, most] row ids, and which of them are no padding
    o = reference.activation(rest["act"])(torch.einsum("td,tnd->tn", x, keys[rows]) + key_bias[rows])
    if "up" in rest:
        o = o * (torch.einsum("td,tnd->tn", x, rest["up"][rows]) + rest["up_bias"][rows])
    return torch.einsum("tn,tnd->td", o * there, values[rows])


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM serves


def vllm_adapters(halves: Sequence[Tensor], values: Tensor) -> Inputs:
    """What vLLM has made before a forward: for every request an adapter, its first product `halves` [T, n, d] (two for
    a gated FFN), its second `values` [T, n, d], padded to a rank that it serves; and where each token finds its own.
    """
    sdp = torch.backends.cuda.cudnn_sdp_enabled()
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, utils

    torch.backends.cuda.enable_cudnn_sdp(sdp)  # importing vLLM switches it off for everybody
    # It knows weights by their address alone, also those of a case that is over and had another rank.
    utils._LORA_A_PTR_DICT.clear(), utils._LORA_B_PTR_DICT.clear()
    tokens, most = values.shape[:2]
    rank = next(rank for rank in VLLM_RANKS if rank >= most)
    *halves, values = (F.pad(t, (0, 0, 0, rank - most)) for t in (*halves, values))
    meta = LoRAKernelMeta.make(max_loras=tokens, max_num_tokens=tokens, device=values.device)
    meta.prepare_tensors(torch.arange(tokens, device=values.device))
    return {
        "lora_a": [half[:, None] for half in halves],  # [T, 1, rank, d]
        "lora_b": [values.transpose(1, 2)[:, None].contiguous()],
        "meta": meta.meta_args(tokens, True),
        "rank": rank,
    }


def vllm_lora(x: Tensor, key_bias: Tensor, **rest: Any) -> Tensor:
    """vLLM's kernels for many LoRAs: an edit is an adapter with an activation in its middle."""
    from vllm.lora.ops.triton_ops import lora_expand, lora_shrink

    rows, there = rest["padded"]
    tokens, most = rows.shape
    shrunk = torch.empty(len(rest["lora_a"]), tokens, rest["rank"], device=x.device)
    lora_shrink(x, rest["lora_a"], shrunk, *rest["meta"], 1.0)
    o = reference.activation(rest["act"])(shrunk[0, :, :most] + key_bias[rows])
    if "up" in rest:
        o = o * (shrunk[1, :, :most] + rest["up_bias"][rows])
    middle = F.pad(o * there, (0, rest["rank"] - most)).to(x.dtype)
    out = torch.empty_like(x)
    lora_expand(middle[None], rest["lora_b"], out, *rest["meta"], add_inputs=False)
    return out
