"""A few small calls of every operator, forward and backward, held to the reference: what a sanitizer runs.

Sizes that hit tails: tokens, neurons, items and columns that are no multiples of any block.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.tolerance import assert_close_to_reference
from unike_kernels import native, ops, reference
from unike_kernels.cuda_kernels.int8_search import CudaInt8Index
from unike_kernels.triton_kernels import tuning

DTYPES = ("float32", "bfloat16", "float16")


def check(device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    """Every operator once; AssertionError where it is off."""
    generator = torch.Generator().manual_seed(tokens)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def hold(name: str, leaves: dict[str, Tensor], **options: object) -> None:
        """The kernel's outputs and gradients against those of the reference."""

        def run(m: object, cast: torch.dtype, **more: object) -> list[Tensor]:
            inputs = {key: leaf.detach().to(cast).requires_grad_() for key, leaf in leaves.items()}
            out = getattr(m, name)(**inputs, **options, **more)
            first = out if isinstance(out, Tensor) else out[0]
            weight = torch.linspace(-1, 1, first.numel(), dtype=torch.float64).view(first.shape)
            grads = torch.autograd.grad(first, list(inputs.values()), weight.to(first))
            return [first.detach(), *grads]

        found = run(ops, dtype, backend="triton")
        same, truth = run(reference, dtype), run(reference, torch.float64)
        for i, (mine, right, rounded) in enumerate(zip(found, truth, same, strict=True)):
            assert_close_to_reference(mine, right, rounded, 3 if i else 2)

    d, n = 72, 23
    neurons = {"keys": rand(n, d), "key_bias": rand(n), "values": rand(n, d)}
    groups = torch.tensor([0, 10, 10, 20], device=device)
    cases = torch.arange(tokens, device=device) % 3
    chosen = torch.tensor([[2], [-1], [0]], device=device)
    hold("extra_neurons", {"x": rand(tokens, d), **neurons}, act="silu", group_ptr=groups)
    routed = {"group_ptr": groups, "token_to_case": cases, "selected": chosen}
    hold("extra_neurons", {"x": rand(tokens, d), **neurons}, act="gelu", **routed)
    base = {"w_k": rand(50, d), "b_k": rand(50), "w_v": rand(d, 50), "b_v": rand(d)}
    hold("augmented_ffn", {"x": rand(tokens, d), **base, **neurons}, act="relu")

    keys = rand(130, d)
    q = rand(tokens, d)
    scores, indices = ops.cosine_topk(q, keys, 9, backend="triton")
    truth, _ = reference.cosine_topk(q.double(), keys.double(), 9)
    assert_close_to_reference(scores, truth, reference.cosine_topk(q, keys, 9)[0], 2)

    items = {"item_keys": rand(130, 2, 40), "item_values": rand(130, 2, 40)}
    heads = {"h_input": rand(tokens, 160), "q": rand(tokens, 4, 40), **items}
    hold("knowledge_shift", heads, indices=indices, alpha=torch.linspace(0, 1, tokens, device=device))
    hold("knowledge_shift", heads, indices=indices, clamp=False)
    if tokens <= 64:
        with torch.no_grad():
            check_known(rand, indices, tokens)


def check_known(rand: Callable[..., Tensor], indices: Tensor, tokens: int) -> None:
    """What is known of an affine encoder, given the items and searching for them: the kernels without gradients."""

    def hold(parts: list[Tensor], known: dict[str, Any]) -> None:
        wide = {name: [t.double() for t in v] if isinstance(v, list) else v.double() for name, v in known.items()}
        exact = reference.knowledge_shift(*(t.double() for t in parts), indices, clamp=False, **wide)
        same = reference.knowledge_shift(*parts, indices, clamp=False, **known)
        tap, sem = rand(tokens, 72), rand(130, 72)
        spans = torch.tensor([[0, 100], [0, 130]], device=tap.device)
        cases = torch.arange(tokens, device=tap.device) % 3 - 1
        options = {"spans": spans, "token_to_case": cases, "selected": torch.tensor([[3], [-1]], device=tap.device)}
        found = ops.knowledge_shift(*parts, indices, clamp=False, backend="triton", **known)
        at_once = ops.retrieve_and_shift(*parts, tap, sem, 9, **options, clamp=False, backend="triton", **known)
        apart = ops.knowledge_shift(*parts, at_once[3], clamp=False, backend="triton", **known)
        expected = ops.retrieve_and_shift(*parts, tap, sem, 9, **options, clamp=False, backend="reference", **known)
        for mine, right, rounded, scale in zip(found, exact, same, (None, 1.0), strict=True):
            assert_close_to_reference(mine, right, rounded, 2, scale)
        if not (torch.equal(at_once[0], apart[0]) and torch.equal(at_once[1], apart[1])):
            raise AssertionError("retrieve_and_shift differs from its two parts")
        torch.testing.assert_close(at_once[2], expected[2], rtol=0, atol=1e-5)

    raw = [rand(tokens, 90), rand(tokens, 90), rand(130, 90), rand(130, 90)]
    hold(raw, {"encoder_rows": rand(130, 90)})
    heads = [rand(tokens, 170), rand(tokens, 4, 40), rand(130, 2, 40), rand(130, 2, 40)]
    hold(heads, {"out_proj": [rand(170, 160), rand(170)], "folded": [rand(170, 160), rand(170)]})


def check_cuda(device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    """The CUDA C++ kernel of the shift, at most 16 tokens: one block per head, clusters of 8, items of cases."""
    generator = torch.Generator().manual_seed(tokens)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def hold(leaves: dict[str, Tensor], **options: object) -> None:
        found = ops.knowledge_shift(**leaves, **options, backend="cuda")
        same = reference.knowledge_shift(**leaves, **options)
        wide = {key: leaf.double() for key, leaf in leaves.items()}
        right = reference.knowledge_shift(**wide, **options)
        assert_close_to_reference(found[0], right[0], same[0], 2)
        # A cosine near 0 is a sum of terms that cancel: its rounding is that of the terms, 1 in all, not of their sum.
        torch.testing.assert_close(found[1].double(), right[1], rtol=0, atol=4 * torch.finfo(torch.float32).eps)

    indices = torch.stack([torch.randperm(130, generator=generator)[:40] for _ in range(tokens)]).to(device)
    indices[:, 3] = -1
    heads = {"h_input": rand(tokens, 1120), "q": rand(tokens, 14, 80)}
    heads |= {"item_keys": rand(130, 2, 80), "item_values": rand(130, 2, 80)}
    hold(heads, indices=indices, alpha=torch.linspace(0, 1, tokens, device=device))
    cases, last = torch.arange(tokens, device=device) % 2, torch.tensor([tokens - 2 + tokens % 2, -1], device=device)
    hold(heads, indices=indices[:1].expand(2, -1), token_to_case=cases, alpha=torch.tensor([0.4, 0.8], device=device))
    raw = {"h_input": rand(tokens, 1030), "q": rand(tokens, 1030)}
    raw |= {"item_keys": rand(130, 1030), "item_values": rand(130, 1030)}
    hold(raw, indices=indices, clamp=False)
    hold(raw, indices=indices[:1].expand(2, -1), token_to_case=cases, case_tokens=last, orientation="input")


def check_searches(device: torch.device, dtype: torch.dtype, tokens: int) -> None:
    """The CUDA C++ searches, at most 16 queries: several units of rows for a block, lists that are pruned, ranges; in
    one launch and in two, with keys that threads copy and that the copy engine brings, and captured in a graph.
    """
    generator = torch.Generator().manual_seed(tokens)

    d, n = 512 if dtype.itemsize == 2 else 72, 3000
    q, keys = (torch.randn(rows, d, generator=generator).to(device, dtype) for rows in (tokens, n))
    starts = torch.arange(tokens, device=device) * 37
    for k, ranges in ((9, torch.stack([starts, starts + 500], dim=1)), (128, None)):
        truth, _ = reference.cosine_topk(q.double(), keys.double(), k, ranges=ranges)
        search = partial(ops.cosine_topk, keys=keys, k=k, ranges=ranges, backend="cuda")
        # Where every tensor is an allocation of its own (for memcheck), nothing can be captured.
        capturing = not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")
        for choice in ({"launches": 1}, {"launches": 2}, {"launches": 1, "copies": 2}):
            with tuning.trying(lambda row, choice=choice: choice):
                scores, indices = search(q)
                assert_close_to_reference(scores, truth, reference.cosine_topk(q, keys, k, ranges=ranges)[0], 2)
                if not capturing:
                    continue
                graph, captured = torch.cuda.CUDAGraph(), torch.zeros_like(q)
                with torch.cuda.graph(graph):
                    found = search(captured)
                captured.copy_(q)
                for _ in range(3):  # each leaves behind what the next one needs, searches beside it or not
                    graph.replay()
                    assert torch.equal(search(q)[1], indices)
                    assert torch.equal(found[0], scores) and torch.equal(found[1], indices)
        scores, _ = CudaInt8Index(keys).search(q, k, ranges)
        torch.testing.assert_close(scores.double(), truth, rtol=0, atol=(d + 8) * 2**-24)


def main() -> None:
    """Parse the command line; every dtype with few and many tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtypes", nargs="*", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument("--cuda", action="store_true", help="the CUDA C++ kernels alone")
    args = parser.parse_args()
    device = torch.device("cuda")
    without = native.no_cuda()
    print("CUDA C++ kernels: " + (without or "checked too"))
    for dtype in (getattr(torch, name) for name in args.dtypes):
        for tokens in (1, 16) if without is None else ():
            check_cuda(device, dtype, tokens)
            check_searches(device, dtype, tokens)
            torch.cuda.synchronize()
            print(f"{dtype}, {tokens} tokens, backend cuda: right")
        for tokens in () if args.cuda else (1, 17, 70):
            check(device, dtype, tokens)
            torch.cuda.synchronize()
            print(f"{dtype}, {tokens} tokens: right")


if __name__ == "__main__":
    main()
