"""The cases of knowledge_shift."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.latency.case import CUDA, OURS, TRITON, Case, Inputs, K
from bench.latency.rivals import compiled
from bench.latency.searches import has_cuda_kernels
from bench.latency.shapes import Shape, hidden
from unike_kernels import ops, reference

ITEMS = 10_000


def shift(shape: Shape, tokens: int, k: int = K, on_cpu: bool = False) -> Case:
    """One decoding step's shift: attention over k items of each token, mixed before the output projection."""
    width = shape.heads * shape.head_dim

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        rows = partial(hidden, generator, dtype=dtype, device=device)
        return {
            "h_input": rows(tokens, width),
            "q": rows(tokens, shape.heads, shape.head_dim),
            "item_keys": rows(ITEMS, shape.kv_heads, shape.head_dim),
            "item_values": rows(ITEMS, shape.kv_heads, shape.head_dim),
            "indices": _distinct(generator, tokens, k, device),
            "alpha": torch.rand(tokens, generator=generator, device=generator.device).to(device),
        }

    def gather_sdpa(
        h_input: Tensor, q: Tensor, item_keys: Tensor, item_values: Tensor, indices: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a user would write: gather, torch's attention, a weighted sum."""
        k, v = item_keys[indices].transpose(1, 2), item_values[indices].transpose(1, 2)  # [T, Hkv, K, hd]
        h = F.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=shape.kv_heads != shape.heads)
        return torch.lerp(h_input, h.flatten(1), alpha[:, None].to(h.dtype)), alpha

    def step_by_step(
        h_input: Tensor, q: Tensor, item_keys: Tensor, item_values: Tensor, indices: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The equations as they stand, one operation each."""
        share = shape.heads // shape.kv_heads
        k, v = (t[indices].repeat_interleave(share, dim=2).float() for t in (item_keys, item_values))
        p = torch.softmax(torch.einsum("thd,tkhd->thk", q.float(), k) / shape.head_dim**0.5, dim=-1)
        h = torch.einsum("thk,tkhd->thd", p, v).flatten(1)
        a = alpha[:, None]
        return ((1 - a) * h_input + a * h).to(h_input.dtype), alpha

    return _case(
        "knowledge_shift",
        shape,
        {"T": tokens, "K": k},
        make,
        {"gather + sdpa": gather_sdpa, "step by step": step_by_step},
        moved=tokens * (2 * k * shape.kv_heads * shape.head_dim + 3 * width),
        flops=4 * tokens * k * width,
        on_cpu=on_cpu,
    )


def raw_shift(shape: Shape, tokens: int, on_cpu: bool = False) -> Case:
    """The shift of the published code: one head as wide as the hidden state, alpha computed for each token."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        rows = partial(hidden, generator, dtype=dtype, device=device)
        states, indices = rows(ITEMS, shape.d), _distinct(generator, tokens, K, device)
        known = states[indices].mean(1)  # as hidden states do, those of a prompt resemble what is stored about it
        return {
            "h_input": known + rows(tokens, shape.d),
            "q": known,
            "item_keys": states,
            "item_values": states.clone(),  # a memory keeps two tables
            "indices": indices,
        }

    def step_by_step(
        h_input: Tensor, q: Tensor, item_keys: Tensor, item_values: Tensor, indices: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a user would write: gather, two batched products, torch's cosine, a weighted sum."""
        scores = torch.einsum("td,tkd->tk", q, item_keys[indices]).float() * shape.d**-0.5
        known = torch.einsum("tk,tkd->td", scores.softmax(-1), item_values[indices].float())
        h = h_input.float()
        alpha = F.cosine_similarity(known, h).clamp(0, 1)
        known = known * (h.norm(dim=1, keepdim=True) / known.norm(dim=1, keepdim=True))
        return torch.lerp(h, known, alpha[:, None]).to(h_input.dtype), alpha

    return _case(
        "knowledge_shift, raw",
        shape,
        {"T": tokens, "K": K},
        make,
        {"step by step": step_by_step},
        moved=tokens * (2 * K + 3) * shape.d,
        flops=4 * tokens * K * shape.d,
        on_cpu=on_cpu,
    )


def _distinct(generator: torch.Generator, tokens: int, k: int, device: torch.device) -> Tensor:
    """[T, k] items, no two of a token the same."""
    draw = partial(torch.randperm, ITEMS, generator=generator, device=generator.device)
    return torch.stack([draw()[:k] for _ in range(tokens)]).to(device)


def _case(
    operator: str,
    shape: Shape,
    sizes: dict[str, int],
    make: Callable[..., Inputs],
    rivals: dict[str, Callable[..., Any]],
    moved: int,
    flops: int,
    on_cpu: bool,
) -> Case:
    """With this package, the reference and, for the sizes that the goals name, the equations compiled."""
    providers: dict[str, Callable[..., Any]] = {OURS: ops.knowledge_shift}
    if not on_cpu and has_cuda_kernels():
        for name, backend in ((CUDA, "cuda"), (TRITON, "triton")):
            providers[name] = partial(ops.knowledge_shift, backend=backend)
    providers |= rivals
    if sizes["T"] in (1, 64) and sizes["K"] == K:
        providers["step by step, compiled"] = compiled(rivals["step by step"])
    providers["reference"] = reference.knowledge_shift
    return Case(
        operator,
        shape.name,
        sizes,
        make,
        reference.knowledge_shift,
        providers,
        moved=moved,
        flops=flops,
        capturable=set(providers) - {"reference"},
        eager="step by step",
    )
