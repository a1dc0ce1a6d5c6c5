"""The sizes of real models, and inputs that look like theirs."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """One decoder: hidden size d, FFN width, heads of queries and of keys, and how its FFN works."""

    name: str
    d: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    act: str
    gated: bool


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("opt-2.7b", 2560, 10240, 32, 32, 32, 80, "relu", False),
        Shape("vicuna-7b", 4096, 11008, 32, 32, 32, 128, "silu", True),
        Shape("qwen2.5-vl-7b", 3584, 18944, 28, 28, 4, 128, "silu", True),
        Shape("llama-100m", 768, 2048, 12, 12, 12, 64, "silu", True),
        Shape("tiny-blip2", 128, 512, 6, 4, 4, 32, "relu", False),
    )
}


def hidden(generator: torch.Generator, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random states, of which one channel in a hundred is twenty times larger, as in trained models; never zeros."""
    x = torch.randn(*shape, generator=generator, device=generator.device)
    x[..., :: max(1, shape[-1] // max(1, shape[-1] // 100))] *= 20
    return x.to(device, dtype)


def weights(generator: torch.Generator, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random weights of variance 1 / last size."""
    return (torch.randn(*shape, generator=generator, device=generator.device) * shape[-1] ** -0.5).to(device, dtype)
