"""What is timed: for every operator its inputs at the sizes of real models, who computes it, and what it has to move.

The providers of one case compute the same thing from the same inputs. "unike" is this package; the others are what a
user could put together. `specification` is the reference, which decides whether a provider is right.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.latency.shapes import SHAPES, Shape, hidden, weights
from unike_kernels import native, ops, reference

Inputs = dict[str, Any]
OURS = "unike"
INDEXED = "unike, int8 index"
CUDA = "unike, backend cuda"  # timed beside "auto" until it is known which is faster
NEURONS = 10  # of one edit at one layer, as the editor makes them
K = 40  # items retrieved


@dataclass(frozen=True)
class Case:
    """One operator at one size. `make` gives its inputs; moved and flops are what cannot be avoided."""

    operator: str
    shape: str
    sizes: dict[str, int]
    make: Callable[[torch.Generator, torch.dtype, torch.device], Inputs]
    specification: Callable[..., Any]
    providers: dict[str, Callable[..., Any]]
    moved: int  # elements
    flops: int
    capturable: set[str] = field(default_factory=lambda: {OURS})  # providers that never read a device value on the host
    floor: str | None = None  # the provider that computes less than asked: what nobody can beat, and no rival

    @property
    def name(self) -> str:
        return " ".join([self.operator, self.shape, *(f"{key}={value}" for key, value in self.sizes.items())])


# ---------------------------------------------------------------------------------------------------- extra neurons


def routed_neurons(shape: Shape, tokens: int, edits: int) -> Case:
    """Decoding with `edits` resident edits of which one acts on each token."""
    n = edits * NEURONS

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        new = partial(weights, generator, dtype=dtype, device=device)
        gate = {"up": new(n, shape.d), "up_bias": new(1, n)[0]} if shape.gated else {}
        return {
            "x": hidden(generator, tokens, shape.d, dtype=dtype, device=device),
            "keys": new(n, shape.d),
            "key_bias": new(1, n)[0],
            "values": new(n, shape.d),
            **gate,
            "group_ptr": torch.arange(edits + 1, device=device) * NEURONS,
            "token_to_case": torch.arange(tokens, device=device),
            "selected": torch.randint(edits, (tokens, 1), generator=generator, device=generator.device).to(device),
            "act": shape.act,
        }

    def gather_bmm(x: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, **rest: Any) -> Tensor:
        """What a user would write for groups of one size: gather the groups' rows, two batched products."""
        group = rest["selected"][rest["token_to_case"], 0]
        key, bias, value = (t.unflatten(0, (edits, NEURONS))[group] for t in (keys, key_bias, values))
        o = reference.activation(rest["act"])(torch.einsum("td,tnd->tn", x, key) + bias)
        if "up" in rest:
            up, up_bias = (rest[name].unflatten(0, (edits, NEURONS))[group] for name in ("up", "up_bias"))
            o = o * (torch.einsum("td,tnd->tn", x, up) + up_bias)
        return torch.einsum("tn,tnd->td", o, value)

    rows = min(tokens, edits) * NEURONS * (3 if shape.gated else 2)
    return Case(
        "extra_neurons",
        shape.name,
        {"T": tokens, "edits": edits},
        make,
        reference.extra_neurons,
        {
            OURS: ops.extra_neurons,
            "gather + bmm": gather_bmm,
            "gather + bmm, compiled": compiled(gather_bmm),
            "reference": reference.extra_neurons,
        },
        moved=rows * shape.d + 2 * tokens * shape.d,
        flops=2 * tokens * NEURONS * shape.d * (3 if shape.gated else 2),
        capturable={OURS, "gather + bmm", "gather + bmm, compiled"},
    )


def augmented_ffn(shape: Shape, tokens: int, extra: int) -> Case:
    """The whole FFN of one layer with `extra` neurons that are always on."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        new = partial(weights, generator, dtype=dtype, device=device)
        bias = {} if shape.gated else {"b_k": new(1, shape.ffn)[0], "b_v": new(1, shape.d)[0]}
        gate = {"w_up": new(shape.ffn, shape.d), "up": new(extra, shape.d)} if shape.gated else {}
        return {
            "x": hidden(generator, tokens, shape.d, dtype=dtype, device=device),
            "w_k": new(shape.ffn, shape.d),
            "b_k": None,
            "w_v": new(shape.d, shape.ffn),
            "b_v": None,
            "keys": new(extra, shape.d),
            "key_bias": new(1, extra)[0],
            "values": new(extra, shape.d),
            "zeta": new(1, shape.d)[0],
            "beta": 0.1,
            "act": shape.act,
            **bias,
            **gate,
        }

    rows = (shape.ffn + extra) * (3 if shape.gated else 2)
    return Case(
        "augmented_ffn",
        shape.name,
        {"T": tokens, "extra": extra},
        make,
        reference.augmented_ffn,
        {
            OURS: ops.augmented_ffn,
            "base FFN alone": base_ffn,
            "base FFN + extra, eager": base_and_extra,
            "base FFN + extra, compiled": compiled(base_and_extra),
            "clone + concatenate": clone_and_concatenate,
        },
        moved=rows * shape.d + 2 * tokens * shape.d,
        flops=2 * tokens * rows * shape.d,
        capturable={
            OURS,
            "base FFN alone",
            "base FFN + extra, eager",
            "base FFN + extra, compiled",
            "clone + concatenate",
        },
        floor="base FFN alone",
    )


def base_ffn(x: Tensor, w_k: Tensor, b_k: Any, w_v: Tensor, b_v: Any, *_: Any, act: str, **rest: Any) -> Tensor:
    """The unedited FFN: the floor, and no rival, since it computes less."""
    o = reference.activation(act)(F.linear(x, w_k, b_k))
    return F.linear(o * F.linear(x, rest["w_up"], rest.get("b_up")) if "w_up" in rest else o, w_v, b_v)


def base_and_extra(
    x: Tensor, w_k: Tensor, b_k: Any, w_v: Tensor, b_v: Any, keys: Tensor, key_bias: Any, values: Tensor, **rest: Any
) -> Tensor:
    """Two FFNs and a sum, beta zeta' folded into the values beforehand, as a user would."""
    o = reference.activation(rest["act"])(F.linear(x, keys, key_bias))
    o = o * F.linear(x, rest["up"], rest.get("up_bias")) if "up" in rest else o
    return base_ffn(x, w_k, b_k, w_v, b_v, **rest) + o @ (values + rest["beta"] * rest["zeta"])


def clone_and_concatenate(
    x: Tensor, w_k: Tensor, b_k: Any, w_v: Tensor, b_v: Any, keys: Tensor, key_bias: Any, values: Tensor, **rest: Any
) -> Tensor:
    """The published formulation: clone the weights and concatenate the neurons to them at every forward."""
    bias = torch.cat([w_k.new_zeros(len(w_k)) if b_k is None else b_k.clone(), key_bias])
    o = reference.activation(rest["act"])(F.linear(x, torch.cat([w_k.clone(), keys]), bias))
    if "up" in rest:
        o = o * F.linear(x, torch.cat([rest["w_up"].clone(), rest["up"]]))
    extended = torch.cat([w_v.clone(), (values + rest["beta"] * rest["zeta"]).T], dim=1)
    return F.linear(o, extended, b_v)


# ---------------------------------------------------------------------------------------------------------- search


def search(shape: Shape, queries: int, items: int, on_cpu: bool = False) -> Case:
    """Exact top-40 by cosine in a memory of `items`."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        keys = hidden(generator, items, shape.d, dtype=dtype, device=device)
        return {
            "q": hidden(generator, queries, shape.d, dtype=dtype, device=device),
            "keys": keys,
            "k": min(K, items),
            "key_norm": torch.linalg.vector_norm(keys.float(), dim=1),
            "unit": F.normalize(keys.float(), dim=1).to(dtype),
            "index": native.Int8Index(keys) if device.type == "cpu" and native.cpu() is not None else None,
        }

    def ours(unit: Tensor, index: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
        return ops.cosine_topk(**inputs)

    def indexed(q: Tensor, k: int, index: Any, **rest: Any) -> tuple[Tensor, Tensor]:
        """What a memory on the CPU takes from its fiftieth search on."""
        return index.search(q, k)

    def faiss_knn(q: Tensor, unit: Tensor, k: int, **rest: Any) -> tuple[Tensor, Tensor]:
        import faiss

        queries = F.normalize(q, dim=1).numpy()
        scores, indices = faiss.knn(queries, unit.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(scores), torch.from_numpy(indices)

    def usearch_exact(q: Tensor, unit: Tensor, k: int, **rest: Any) -> tuple[Tensor, Tensor]:
        from usearch.index import MetricKind, search

        found = search(unit.numpy(), F.normalize(q, dim=1).numpy(), k, MetricKind.IP, exact=True)
        shape = (len(q), k)  # one query comes back without its dimension
        scores, indices = 1 - found.distances.reshape(shape), found.keys.reshape(shape).astype("int64")
        return torch.from_numpy(scores), torch.from_numpy(indices)

    def mm_topk(q: Tensor, unit: Tensor, k: int, **rest: Any) -> tuple[Tensor, Tensor]:
        """The usual way: keys normalised beforehand, one product, torch's top-K."""
        scores, indices = (F.normalize(q.float(), dim=1).to(q.dtype) @ unit.T).topk(k)
        return scores.float(), indices

    def cosine_similarity(q: Tensor, keys: Tensor, k: int, **rest: Any) -> tuple[Tensor, Tensor]:
        scores, indices = F.cosine_similarity(q[:, None], keys[None], dim=-1).topk(k)
        return scores.float(), indices

    def specification(unit: Tensor, index: Any, **inputs: Any) -> tuple[Tensor, Tensor]:
        return reference.cosine_topk(**inputs)

    providers: dict[str, Callable[..., Any]] = {OURS: ours}
    rivals = {"faiss": ("faiss", faiss_knn), "usearch": ("usearch", usearch_exact)}
    if on_cpu and native.cpu() is not None:
        providers[INDEXED] = indexed
    if on_cpu:  # where they are installed
        providers |= {name: run for name, (package, run) in rivals.items() if find_spec(package)}
    providers |= {"mm + topk": mm_topk, "mm + topk, compiled": compiled(mm_topk)}
    if items * queries <= 40_000:  # it materialises [queries, items, d]
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
    )


# ----------------------------------------------------------------------------------------------------------- shift


def shift(shape: Shape, tokens: int, device: torch.device) -> Case:
    """One decoding step's shift: attention over 40 items of each token, mixed before the output projection."""
    items = 10_000
    width = shape.heads * shape.head_dim

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        rows = partial(hidden, generator, dtype=dtype, device=device)
        permuted = partial(torch.randperm, generator=generator, device=generator.device)
        return {
            "h_input": rows(tokens, width),
            "q": rows(tokens, shape.heads, shape.head_dim),
            "item_keys": rows(items, shape.kv_heads, shape.head_dim),
            "item_values": rows(items, shape.kv_heads, shape.head_dim),
            "indices": torch.stack([permuted(items)[:K] for _ in range(tokens)]).to(device),
            "alpha": torch.rand(tokens, generator=generator, device=generator.device).to(device),
        }

    def gather_sdpa(
        h_input: Tensor, q: Tensor, item_keys: Tensor, item_values: Tensor, indices: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a user would write: gather, torch's attention, a weighted sum."""
        k, v = item_keys[indices].transpose(1, 2), item_values[indices].transpose(1, 2)  # [T, Hkv, K, hd]
        h = F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=shape.kv_heads != shape.heads)
        return torch.lerp(h_input, h.flatten(1), alpha[:, None].to(h.dtype)), alpha

    return Case(
        "knowledge_shift",
        shape.name,
        {"T": tokens, "K": K},
        make,
        reference.knowledge_shift,
        _shifts(gather_sdpa, "gather + sdpa", device),
        moved=tokens * (2 * K * shape.kv_heads * shape.head_dim + 3 * width),
        flops=4 * tokens * K * width,
        capturable={OURS, CUDA, "gather + sdpa", "gather + sdpa, compiled"},
    )


def raw_shift(shape: Shape, tokens: int, device: torch.device) -> Case:
    """The shift of the published code: one head as wide as the hidden state, alpha computed for each token."""
    items = 10_000

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        rows = partial(hidden, generator, dtype=dtype, device=device)
        permuted = partial(torch.randperm, generator=generator, device=generator.device)
        states = rows(items, shape.d)
        indices = torch.stack([permuted(items)[:K] for _ in range(tokens)]).to(device)
        known = states[indices].mean(1)  # as hidden states do, those of a prompt resemble what is stored about it
        return {
            "h_input": known + rows(tokens, shape.d),
            "q": known,
            "item_keys": states,
            "item_values": states,
            "indices": indices,
        }

    def gather_softmax(
        h_input: Tensor, q: Tensor, item_keys: Tensor, item_values: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a user would write: gather, two batched products, torch's cosine, a weighted sum."""
        scores = torch.einsum("td,tkd->tk", q, item_keys[indices]).float() * shape.d**-0.5
        known = torch.einsum("tk,tkd->td", scores.softmax(-1), item_values[indices].float())
        h = h_input.float()
        alpha = F.cosine_similarity(known, h).clamp(0, 1)
        known = known * (h.norm(dim=1, keepdim=True) / known.norm(dim=1, keepdim=True))
        return torch.lerp(h, known, alpha[:, None]).to(h_input.dtype), alpha

    return Case(
        "knowledge_shift, raw",
        shape.name,
        {"T": tokens, "K": K},
        make,
        reference.knowledge_shift,
        _shifts(gather_softmax, "gather + softmax", device),
        moved=tokens * (2 * K + 3) * shape.d,
        flops=4 * tokens * K * shape.d,
        capturable={OURS, CUDA, "gather + softmax", "gather + softmax, compiled"},
    )


def _shifts(rival: Callable[..., Any], name: str, device: torch.device) -> dict[str, Callable[..., Any]]:
    """Who computes a shift on this device."""
    native_too = device.type == "cuda" and native.no_cuda() is None
    return {
        OURS: ops.knowledge_shift,
        **({CUDA: partial(ops.knowledge_shift, backend="cuda")} if native_too else {}),
        name: rival,
        f"{name}, compiled": compiled(rival),
        "reference": reference.knowledge_shift,
    }


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile, compiled at its first call for the shapes it sees."""
    return torch.compile(function, dynamic=False, fullgraph=True)


# ----------------------------------------------------------------------------------------------------------- lists


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    """What is worth timing on this kind of device; `quick`: one small case of every operator."""
    if quick:
        names, tokens, items, edits = ["llama-100m"], (1,), (1_000,), (100,)
    elif device.type == "cpu":
        names, tokens, items, edits = ["llama-100m", "opt-2.7b"], (1, 8), (1_000, 10_000), (100, 1_000)
    else:
        names, tokens = ["opt-2.7b", "vicuna-7b", "qwen2.5-vl-7b"], (1, 16, 64)
        items, edits = (1_000, 10_000, 100_000, 1_000_000), (1, 100, 10_000)
    for shape in (SHAPES[name] for name in names):
        for count in tokens:
            yield from (routed_neurons(shape, count, number) for number in edits)
            yield from (augmented_ffn(shape, count, extra) for extra in ((20,) if quick else (20, 1_000)))
            yield from (search(shape, count, number, device.type == "cpu") for number in items)
            yield shift(shape, count, device)
            yield raw_shift(shape, count, device)
