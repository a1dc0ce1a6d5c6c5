"""How many kernels a patch adds to a decoding step: at most three for each edited layer with retrieval per case."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import unike_kernels as uk
from bench.latency.shapes import SHAPES, Shape
from bench.latency.stack import PROMPT, VOCABULARY, Stack, Step, make_edits, make_model

MOST = 3


def count(step: Step) -> int:
    """Kernels that one decoding step starts on the GPU, copies and fills included."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def added(shape: Shape, routed: bool) -> float:
    """Kernels added to each edited layer of a decoder of this shape: four edited layers against two of them.

    What a patch does once in a pass, and copies of its cases, cancel.
    """
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    model = make_model(shape, torch.bfloat16, device)
    edits = make_edits(model, Stack(shape.name, 1, 1000, 6, routed), generator)
    prompt = torch.randint(4, VOCABULARY, (1, PROMPT), generator=generator).to(device)
    counts = []
    for layers in (sorted(edits.layers), sorted(edits.layers)[:2]):
        with uk.patch(model, edits, backend="triton", layers=layers) as handle:
            with handle.choosing([edits.ids[0]]) if routed else nullcontext():
                step = Step(model, prompt)
            counts.append(count(step))
    return (counts[0] - counts[1]) / 2


def main() -> None:
    """Counts for OPT and LLaMA layers, always on and routed; fails above MOST."""
    found = {}
    for name in ("opt-2.7b", "vicuna-7b"):
        for routed in (False, True):
            found[f"{name} {'routed' if routed else 'always on'}"] = added(replace(SHAPES[name], layers=4), routed)
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(found)
    if max(found.values()) > MOST:
        sys.exit(f"more than {MOST} kernels for each edited layer")


if __name__ == "__main__":
    main()
