"""Launches of `knowledge_shift` at the sizes of real models, for the compile gate: nothing runs, tensors are meta."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from unike_kernels.reference import alpha_is_per_case
from unike_kernels.triton_kernels import launcher

# Query heads, key heads, head size: OPT-2.7B, Vicuna-7B, Qwen2.5-VL-7B, the raw form of d = 4096.
MODELS = {"opt": (32, 32, 80), "vicuna": (32, 32, 128), "qwen": (28, 4, 128), "raw": (1, 1, 4096)}
SMALL = {"one": (1, 1, 1), "odd": (6, 3, 5)}  # sizes of 1 are constants to the compiler
HALF = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
Case = Callable[[], None]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def arguments(
    model: str,
    tokens: int,
    k: int,
    dtype: torch.dtype,
    form: str,
    *,
    projected: bool,
    act: str | None,
    known: bool = False,
) -> tuple[Any, ...]:
    """The operator's arguments. form: "token" (items and alpha per token, alpha given), "case" (both per case, alpha
    given), "cosine" (alpha computed, items per token), "case cosine" (items per case, alpha at the case token). known:
    the encoder's rows or folded weights, in place of the encoder."""
    heads, kv_heads, hd = (MODELS | SMALL)[model]
    d, cases = heads * hd, tokens if tokens <= 64 else 4
    on_cases = form.startswith("case")
    rows = cases if on_cases else tokens
    shape = (tokens, hd) if heads == 1 else (tokens, heads, hd)
    item = (10_000, hd) if heads == 1 else (10_000, kv_heads, hd)
    ints = partial(empty, dtype=torch.int64)
    alpha = None if "cosine" in form else empty(rows, dtype=torch.float32)
    folded = known and heads > 1
    known_of = (
        empty(10_000, d, dtype=dtype) if known and heads == 1 else None,
        empty(d, d, dtype=dtype) if folded else None,
        empty(d, dtype=dtype) if folded else None,
    )
    encoder = [] if act is None else [empty(d, d, dtype=dtype), empty(d, dtype=dtype)] * 2
    return (
        empty(tokens, d, dtype=dtype), empty(*shape, dtype=dtype), empty(*item, dtype=dtype), empty(*item, dtype=dtype),
        ints(rows, k), alpha, ints(tokens) if on_cases else None, ints(cases) if form == "case cosine" else None,
        empty(d, d, dtype=dtype) if projected else None, empty(d, dtype=dtype) if projected else None, encoder,
        act or "identity", "knowledge", True, None, None, True, *known_of,
    )  # fmt: skip


def forward(*args: Any, **options: Any) -> None:
    """Starts the kernels of the forward."""
    launcher("knowledge_shift")(*arguments(*args, **options))


def backward(*args: Any, **options: Any) -> None:
    """Starts the kernels of the backward, every gradient wanted."""
    rest = arguments(*args, **options)
    leaves = [*rest[:10], *rest[10], *rest[11:]]
    needs = [isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves]
    h_input, indices, alpha, token_to_case, case_tokens = rest[0], *rest[4:8]
    per_case = alpha_is_per_case(alpha, indices, token_to_case, case_tokens)
    count = len(indices) if per_case else len(h_input)
    grads = [torch.empty_like(h_input), empty(count, dtype=torch.float32)]
    launcher("knowledge_shift_backward")(grads, *rest, needs)


def _cases() -> dict[str, Case]:
    cases: dict[str, Case] = {}

    def add(
        model: str, tokens: int, k: int, dtype: str, form: str, *, projected: bool = False, act: str | None = None,
        known: bool = False, run: Callable[..., None] = forward,
    ) -> None:  # fmt: skip
        name = f"{model} T={tokens} K={k} {dtype} {form}{' projected' if projected else ''}{f' {act}' if act else ''}"
        cases[f"{name}{' known' if known else ''} {run.__name__}"] = partial(
            run, model, tokens, k, HALF[dtype], form, projected=projected, act=act, known=known
        )

    for model in MODELS:
        add(model, 1, 40, "bf16", "token")
        add(model, 16, 40, "bf16", "case")
        add(model, 2048, 40, "bf16", "case")
    for model in ("vicuna", "raw"):  # where registers are at stake
        add(model, 64, 128, "bf16", "token")
        add(model, 2048, 128, "bf16", "case")
    add("raw", 1, 40, "bf16", "cosine")
    add("raw", 2048, 128, "bf16", "cosine")
    for dtype in ("fp16", "fp32"):
        for tokens in (1, 2048):
            add("vicuna", tokens, 40, dtype, "case")
            add("vicuna", tokens, 40, dtype, "case cosine", projected=True, act="silu")
    for model in ("opt", "qwen"):
        for tokens in (1, 64, 2048):
            add(model, tokens, 40, "bf16", "case cosine", projected=True, act="identity")
    add("raw", 64, 40, "bf16", "cosine", act="silu")
    for model in ("vicuna", "opt", "qwen"):
        add(model, 1, 40, "bf16", "cosine", projected=True, known=True)
        add(model, 64, 40, "bf16", "cosine", projected=True, known=True)
    for dtype in ("fp16", "fp32"):
        for tokens in (1, 64):
            add("vicuna", tokens, 40, dtype, "cosine", projected=True, known=True)
    for dtype in ("bf16", "fp16", "fp32"):
        add("vicuna", 2048, 128, dtype, "case", projected=True)
        add("vicuna", 2048, 40, dtype, "case cosine", projected=True, known=True)
        add("raw", 1, 40, dtype, "cosine", known=True)
    for model in ("opt", "qwen"):
        add(model, 64, 40, "bf16", "case", projected=True)
        add(model, 64, 40, "bf16", "case cosine", projected=True, known=True)
    add("raw", 2048, 128, "bf16", "cosine", known=True)
    for dtype in ("bf16", "fp16", "fp32"):
        add("raw", 16, 40, dtype, "case cosine")
        add("raw", 2048, 128, dtype, "case cosine", known=True)
    for model in ("one", "odd"):
        add(model, 3, 5, "bf16", "cosine", projected=True, known=True)
        add(model, 66, 5, "fp16", "case cosine", projected=True, known=True)
    for model in ("vicuna", "raw"):
        add(model, 256, 40, "bf16", "case cosine", projected=True, act="silu", run=backward)
        add(model, 256, 128, "bf16", "token", run=backward)
    add("qwen", 256, 40, "bf16", "case", run=backward)
    add("opt", 256, 40, "fp16", "case cosine", projected=True, act="silu", run=backward)
    add("vicuna", 256, 40, "fp32", "case cosine", projected=True, act="silu", run=backward)
    for run in (forward, backward):
        add("one", 1, 1, "fp32", "cosine", run=run)
        add("one", 1, 1, "fp32", "token", run=run)
        add("one", 1, 1, "fp32", "case cosine", projected=True, act="gelu", run=run)
        add("odd", 66, 5, "bf16", "case cosine", projected=True, act="gelu", run=run)
        add("odd", 3, 0, "fp16", "token", run=run)
    return cases


CASES = _cases()
