"""What the compile gate builds of augmented_ffn: launches at the shapes of real models, on meta tensors."""

from collections.abc import Callable

import torch

from unike_kernels.triton_kernels.augmented_ffn import augmented_ffn

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def case(
    tokens: int,
    d: int,
    width: int,
    n: int,
    *,
    gated: bool,
    act: str,
    dtype: torch.dtype = BF16,
    extra: torch.dtype | None = None,
    weights: torch.dtype | None = None,
    biases: bool = False,
    zeta: bool = False,
) -> Callable[[], None]:
    """A call with x of `dtype`, the base of `weights` and the extra rows of `extra` (both: dtype)."""

    def call() -> None:
        def new(of: torch.dtype | None, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=of or dtype, device="meta")

        augmented_ffn(
            new(dtype, tokens, d),
            new(weights, width, d),
            new(weights, width) if biases else None,
            new(weights, d, width),
            new(weights, d) if biases else None,
            new(weights, width, d) if gated else None,
            new(weights, width) if gated and biases else None,
            new(extra, n, d),
            new(extra, n),
            new(extra, n, d),
            new(extra, n, d) if gated else None,
            new(extra, n) if gated else None,
            new(extra, d) if zeta else None,
            act,
            0.5,
        )

    return call


OPT = {"d": 2560, "width": 10240, "gated": False, "act": "relu", "biases": True}
VICUNA = {"d": 4096, "width": 11008, "gated": True, "act": "silu"}
QWEN = {"d": 3584, "width": 18944, "gated": True, "act": "silu"}

CASES: dict[str, Callable[[], None]] = {
    "opt-bf16-t1": case(1, n=20, **OPT),
    "opt-bf16-t64": case(64, n=20, **OPT),
    "opt-fp16-t17": case(17, n=1000, dtype=FP16, **OPT),
    "opt-fp32-t16": case(16, n=20, dtype=FP32, **OPT),
    "vicuna-bf16-t1": case(1, n=20, **VICUNA),
    "vicuna-bf16-t64": case(64, n=20, **VICUNA),
    "vicuna-bf16-t32-zeta": case(32, n=20000, zeta=True, **VICUNA),
    "vicuna-fp32-t64": case(64, n=20, dtype=FP32, **VICUNA),
    "vicuna-bf16-t16-fp32-edits": case(16, n=20, extra=FP32, zeta=True, **VICUNA),
    "vicuna-fp32-t1-bf16-base": case(1, n=20, dtype=FP32, weights=BF16, extra=BF16, **VICUNA),
    "vicuna-bf16-t8-no-edits": case(8, n=0, **VICUNA),
    "qwen-bf16-t1": case(1, n=256, **QWEN),
    "qwen-fp16-t64": case(64, n=256, dtype=FP16, **QWEN),
    "odd-bf16-t5-gelu": case(5, 1000, 3001, 37, gated=False, act="gelu", biases=True),
    "odd-fp16-t33-gelu-tanh": case(33, 999, 3001, 37, gated=True, act="gelu_tanh", dtype=FP16, biases=True),
    "ones": case(1, 1, 1, 1, gated=True, act="silu", dtype=FP32, biases=True, zeta=True),  # constants to the compiler
    "wide-bf16-t64-identity": case(64, 16384, 16, 1, gated=False, act="identity"),  # one split: nothing to add up
}
