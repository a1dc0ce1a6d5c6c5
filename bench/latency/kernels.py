"""Device time of each kernel under several launch choices, by CUPTI: `python -m bench.latency.kernels [FILE]`.

What the latencies do not tell: which launch of an operator takes how long, without the start of a graph, and what
another choice of the launch table would do. Between the calls 256 MB are written, so that nothing is found in the L2,
as in a decoding step; what that write leaves to be done makes times of a few microseconds upper bounds.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import unike_kernels as uk
from bench.commit import commit
from bench.latency import neurons, searches, shifts, stack
from bench.latency.run import write
from bench.latency.shapes import SHAPES
from bench.latency.timing import environment
from unike_kernels import ops
from unike_kernels.triton_kernels import tuning

CALLS = 6
SHAPE = SHAPES["vicuna-7b"]
Run = Callable[[], Any]


def choosing(kernel: str, choice: dict[str, int], run: Run) -> Run:
    """`run` with these entries of the kernel's launch choice."""

    def of_row(row: tuning.Row) -> dict[str, int]:
        return {**row.choice, **choice} if row.kernel == kernel else dict(row.choice)

    def chosen() -> Any:
        with tuning.trying(of_row):
            return run()

    return chosen


def runs(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Run]]:
    """(what, call) of everything that is worth telling apart, of a Vicuna-7B's sizes."""

    def made(case: Any) -> dict[str, Any]:
        return case.make(torch.Generator(device).manual_seed(0), dtype, device)

    for n in (1_000, 10_000, 100_000):
        inputs = made(searches.search(SHAPE, 1, n))
        search = partial(ops.cosine_topk, **{name: inputs[name] for name in ("q", "keys", "k", "key_norm")})
        yield f"search N={n}, triton", partial(search, backend="triton")
        for choice in ({"launches": launches, "copies": copies} for launches in (1, 2) for copies in (1, 2)):
            run = choosing("cosine_topk_stream", choice, partial(search, backend="cuda"))
            yield f"search N={n}, cuda {choice}", run
        if inputs["index"] is not None:
            yield f"search N={n}, int8", partial(inputs["index"].search, inputs["q"], inputs["k"])
    for tokens in (1, 16, 64):
        run = partial(ops.extra_neurons, **made(neurons.routed_neurons(SHAPE, tokens, 100)))
        for choice in ({"BK": 512}, {"BK": 1024}, {"BK": 1024, "num_warps": 4}, {"BK": 1024, "BD": 128}):
            yield f"routed neurons T={tokens}, {choice}", choosing("selected_rows", choice, run)
    of_tenants = made(neurons.tenants(SHAPE, 64))
    del of_tenants["for_rivals"]
    for choice in ({"num_warps": 4}, {"num_warps": 8}, {"BN": 32, "BK": 512, "num_warps": 8}):
        run = choosing("selected_rows", choice, partial(ops.extra_neurons, **of_tenants))
        yield f"64 edit sets, {choice}", run
    for tokens in (1, 16):
        for name, case in (("shift", shifts.shift), ("shift, raw", shifts.raw_shift)):
            shift = partial(ops.knowledge_shift, **made(case(SHAPE, tokens)))
            for backend in ("triton", "cuda"):
                yield f"{name} T={tokens}, {backend}", partial(shift, backend=backend)
            for split in (1, 2) if name == "shift" else (4, 8):
                run = choosing("knowledge_shift_cluster", {"SPLIT": split}, partial(shift, backend="cuda"))
                yield f"{name} T={tokens}, cuda, {split} blocks a head", run


def prefills(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[str, Run]]:
    """A prompt of 1,024 tokens through six layers, four of them edited: without the patch, and with it."""
    sizes = stack.Stack("vicuna-7b", 1, 1_000, 100, True, prefill=1024)
    model = stack.make_model(replace(SHAPE, layers=6), dtype, device)
    prompt = torch.randint(4, stack.VOCABULARY, (1, sizes.prefill), device=device)
    read = stack.Prefill(model, prompt)
    yield "prefill of 1,024 tokens, unpatched", read
    edits = stack.make_edits(model, sizes, torch.Generator(device).manual_seed(0))
    with uk.patch(model, edits) as handle:
        yield "prefill of 1,024 tokens, patched", stack.Named(read, handle, [edits.ids[0]])


def kernel_times(run: Run, flush: torch.Tensor) -> dict[str, list[float]]:
    """{kernel: [microseconds a call, launches a call]}, the longest first, without what runs between the calls."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for calls, times in ((0, -1.0), (CALLS, 1.0)):  # first what is between the calls alone
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for i in range(CALLS):
                flush.zero_()
                if i < calls:
                    run()
            torch.cuda.synchronize()
        for event in seen.key_averages():
            if event.device_type == DeviceType.CUDA:
                of = found.setdefault(event.key, [0.0, 0.0])
                of[0] += times * event.self_device_time_total / CALLS
                of[1] += times * event.count / CALLS
    left = {name: [round(us, 1), round(count, 2)] for name, (us, count) in found.items() if count > 0.01}
    return dict(sorted(left.items(), key=lambda item: -item[1][0]))


def main() -> None:
    """Prints a line for each call, and writes all of them to the file that is named."""
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here, so there are no kernel times")
    device = torch.device("cuda")
    flush = torch.empty(2**26, device=device)
    about = {**environment(device), "commit": commit(Path(__file__).parent)}
    results: dict[str, Any] = {"environment": about, "kernels": {}}
    with torch.inference_mode():
        for source in (prefills, runs):
            for what, run in source(device):
                times = results["kernels"][what] = kernel_times(run, flush)
                total = sum(us for us, _ in times.values())
                told = "; ".join(f"{name.split('(')[0][-50:]} {us}" for name, (us, _) in list(times.items())[:5])
                print(f"{what}: {total:.1f} us | {told}", flush=True)
                if len(sys.argv) > 1:
                    write(Path(sys.argv[1]), results)


if __name__ == "__main__":
    main()
