"""What the compile gate builds of retrieve_and_shift: each form at the sizes of real models, with own items or not."""

from collections.abc import Callable

import torch

from unike_kernels.triton_kernels.retrieve_and_shift import retrieve_and_shift

# Query heads, key heads, head size: OPT-2.7B, Vicuna-7B, Qwen2.5-VL-7B, the raw form of d = 4096.
MODELS = {"opt": (32, 32, 80), "vicuna": (32, 32, 128), "qwen": (28, 4, 128), "raw": (1, 1, 4096)}


def case(model: str, tokens: int, dtype: torch.dtype = torch.bfloat16, *, fixed: bool = False, routed: bool = False,
         k: int = 40) -> Callable[[], None]:  # fmt: skip
    def call() -> None:
        heads, kv_heads, hd = MODELS[model]
        d, n, raw = heads * hd, 10_000, heads == 1

        def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        def ints(*shape: int) -> torch.Tensor:
            return meta(*shape, dtype=torch.int64)

        item = (n, d) if raw else (n, kv_heads, hd)
        projected = not (raw or fixed)
        retrieve_and_shift(
            meta(tokens, d), meta(tokens, d) if raw else meta(tokens, heads, hd), meta(*item), meta(*item),
            meta(tokens, d), meta(n, d), k, meta(n, dtype=torch.float32), ints(2, 2), ints(tokens),
            ints(tokens, 1) if routed else None, meta(tokens, dtype=torch.float32) if fixed else None,
            meta(d, d) if projected else None, meta(d) if projected else None,
            meta(n, d) if raw and not fixed else None, meta(d, d) if projected else None,
            meta(d) if projected else None, "knowledge", True, None, None, True,
        )  # fmt: skip

    return call


CASES = {
    "vicuna decode": case("vicuna", 1),
    "vicuna decode, routed": case("vicuna", 1, routed=True),
    "vicuna fixed, k = 128": case("vicuna", 16, fixed=True, k=128),
    "opt decode, 64 rows, routed": case("opt", 64, routed=True),
    "qwen decode": case("qwen", 1),
    "raw decode": case("raw", 1),
    "raw decode, fixed, routed": case("raw", 16, fixed=True, routed=True),
    "fp16": case("vicuna", 1, torch.float16, routed=True),
    "fp32": case("vicuna", 1, torch.float32, routed=True),
}
