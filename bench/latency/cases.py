"""What is timed: every operator at the sizes of real models, most telling first. The tests import it too."""

from collections.abc import Iterator

import torch

from bench.latency.case import Case
from bench.latency.neurons import augmented_ffn, routed_neurons, tenants
from bench.latency.searches import external, ragged, search
from bench.latency.shapes import SHAPES
from bench.latency.shifts import raw_shift, shift


def cases(device: torch.device, quick: bool = False) -> Iterator[Case]:
    """What is worth timing on this kind of device; `quick`: one small case of every kind."""
    if quick:
        yield from _quick(device)
    elif device.type == "cpu":
        yield from _on_cpu()
    else:
        yield from _on_gpu()


def _quick(device: torch.device) -> Iterator[Case]:
    small, on_cpu = SHAPES["llama-100m"], device.type == "cpu"
    yield routed_neurons(small, 1, 100)
    yield tenants(small, 4)
    yield augmented_ffn(small, 1, 20)
    yield search(small, 1, 1_000, on_cpu)
    yield ragged(small, 4, 100, on_cpu)
    yield external(small, 1_000, on_cpu)
    yield shift(small, 1, on_cpu=on_cpu)
    yield raw_shift(small, 1, on_cpu)


def _on_cpu() -> Iterator[Case]:
    for shape in (SHAPES["llama-100m"], SHAPES["opt-2.7b"]):
        for tokens in (1, 8):
            yield from (routed_neurons(shape, tokens, edits) for edits in (100, 1_000))
            yield from (augmented_ffn(shape, tokens, extra) for extra in (20, 1_000))
            yield from (search(shape, tokens, items, True) for items in (1_000, 10_000))
            yield shift(shape, tokens, on_cpu=True)
        yield raw_shift(shape, 1, True)
        yield tenants(shape, 16)
        yield ragged(shape, 8, 1_000, True)
        yield external(shape, 10_000, True)
    small = SHAPES["llama-100m"]
    yield from (routed_neurons(small, 1, edits) for edits in (1, 10_000))
    yield from (augmented_ffn(small, 1, extra) for extra in (100, 4_000))
    yield from (shift(small, tokens, on_cpu=True) for tokens in (2, 4, 16))
    yield from (search(small, queries, 10_000, True) for queries in (2, 4, 16))
    yield from (search(small, queries, 100_000, True) for queries in (1, 8))
    yield from (search(small, queries, 10_000, True, torch.bfloat16) for queries in (1, 8))


def _on_gpu() -> Iterator[Case]:
    opt, vicuna, qwen = (SHAPES[name] for name in ("opt-2.7b", "vicuna-7b", "qwen2.5-vl-7b"))
    for items in (1_000, 4_000, 10_000, 100_000, 1_000_000):
        yield from (search(vicuna, queries, items) for queries in (1, 4, 16, 64))
    yield from (search(shape, 1, 10_000) for shape in (opt, qwen))
    yield from (external(vicuna, items) for items in (1_000, 10_000))
    yield from (external(shape, 10_000) for shape in (opt, qwen))
    yield ragged(vicuna, 64, 1_000)
    for tokens in (1, 16, 64):
        yield from (shift(vicuna, tokens, k) for k in ((40, 80) if tokens != 16 else (40,)))
        yield raw_shift(vicuna, tokens)
    yield from (shift(shape, 1) for shape in (opt, qwen))
    yield from (tenants(vicuna, tokens) for tokens in (16, 64))
    yield tenants(opt, 64)
    yield from (routed_neurons(vicuna, tokens, 100) for tokens in (1, 16, 64))
    yield from (routed_neurons(vicuna, 1, edits) for edits in (1, 1_000, 10_000))
    yield routed_neurons(opt, 1, 100)
    yield from (augmented_ffn(vicuna, tokens, 20) for tokens in (1, 64))
    yield from (augmented_ffn(vicuna, 1, extra) for extra in (256, 1_000))
    yield augmented_ffn(opt, 1, 20)
