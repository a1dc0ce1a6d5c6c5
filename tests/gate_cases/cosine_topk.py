"""What the compile gate builds of cosine_topk: the sizes of real models, every dtype and every branch."""

from collections.abc import Callable

import torch

from unike_kernels.triton_kernels.cosine_topk import cosine_topk


def case(
    queries: int,
    items: int,
    d: int,
    k: int,
    dtype: torch.dtype = torch.bfloat16,
    norm: bool = True,
    ranges: bool = True,
) -> Callable[[], None]:
    def call() -> None:
        def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        key_norm = meta(items, dtype=torch.float32) if norm else None
        cosine_topk(
            meta(queries, d), meta(items, d), k, key_norm, meta(queries, 2, dtype=torch.int64) if ranges else None
        )

    return call


CASES = {
    "vicuna decode": case(1, 10_000, 4096, 40),
    "opt decode, 64 rows": case(64, 10_000, 2560, 40),
    "qwen, ten million items": case(1, 10_000_000, 3584, 40),
    "fp16, no norms, no ranges": case(16, 100_000, 4096, 40, torch.float16, norm=False, ranges=False),
    "fp32": case(1, 10_000, 2560, 40, torch.float32),
    "k = 128": case(1, 10_000, 4096, 128),
    "odd size": case(1, 10_000, 999, 16),
    "ones": case(1, 1, 1, 1, torch.float32),  # constants to the compiler
}
