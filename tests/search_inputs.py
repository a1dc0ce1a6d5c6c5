"""Keys that make an int8 copy easy, hard or useless."""

import torch

KINDS = ("spread", "outliers", "near-identical", "identical", "odd", "zero")


def make_keys(kind: str, n: int, d: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    keys = torch.randn(n, d, generator=generator)
    if kind == "outliers":  # a few channels carry most of the norm, as in trained models
        keys[:, :: max(1, d // 3)] *= 300
    if kind == "near-identical":  # closer together than int8 can tell
        keys = keys[:1] + 1e-4 * keys
    if kind == "identical":
        keys = keys[torch.randint(0, 3, (n,), generator=generator).clamp(max=n - 1)]
    if kind == "odd" and n > 4:
        keys[::7] = 0
        keys[1, 0], keys[2, -1], keys[3] = float("nan"), float("inf"), -float("inf")
        keys[4] *= 1e-30 if dtype == torch.float32 else 1e-3
    if kind == "zero":
        keys.zero_()
    return keys.to(dtype)
