"""How many kernels a patch adds to each edited layer of a decoding step: at most three with retrieval per case.

With retrieval per token at most four; the goal allows five.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import unike_kernels as uk
from bench.latency.shapes import SHAPES, Shape
from bench.latency.stack import PROMPT, VOCABULARY, Stack, Step, make_edits, make_model

# What of a patch -> (its routing, changes of its shift, kernels for each edited layer at most)
FORMS: dict[str, tuple[bool, dict[str, Any], int]] = {
    "per case, always on": (False, {}, 3),
    "per case, routed": (True, {}, 3),
    "per token, fixed alpha": (False, {"per": "token", "alpha": 0.3}, 4),
    "per token": (False, {"per": "token"}, 4),
    "per token, raw": (False, {"per": "token", "attention": "raw"}, 4),
    "per token, routed": (True, {"per": "token"}, 3),
}


def count(step: Step) -> int:
    """Kernels that one decoding step starts on the GPU, copies and fills included."""
    for _ in range(3):
        step()
        step.reset()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def added(shape: Shape, form: str) -> float:
    """Kernels added to each edited layer of a decoder of this shape: four edited layers against two of them.

    What a patch does once in a pass, and copies of its cases, cancel.
    """
    routed, changes, _ = FORMS[form]
    device, generator = torch.device("cuda"), torch.Generator().manual_seed(0)
    model = make_model(shape, torch.bfloat16, device)
    edits = make_edits(model, Stack(shape.name, 1, 1000, 6, routed), generator)
    edits.config = replace(edits.config, shift=replace(edits.config.shift, **changes))
    prompt = torch.randint(4, VOCABULARY, (1, PROMPT), generator=generator).to(device)
    counts = []
    for layers in (sorted(edits.layers), sorted(edits.layers)[:2]):
        with uk.patch(model, edits, backend="triton", layers=layers) as handle:
            with handle.choosing([edits.ids[0]]) if routed else nullcontext():
                step = Step(model, prompt)
            counts.append(count(step))
    return (counts[0] - counts[1]) / 2


def main() -> None:
    """Counts for OPT and LLaMA layers; fails where one is above what its form allows."""
    found, wrong = {}, []
    for name in ("opt-2.7b", "vicuna-7b"):
        for form, (_, _, most) in FORMS.items():
            count = found[f"{name} {form}"] = added(replace(SHAPES[name], layers=4), form)
            if count > most:
                wrong.append(f"{name} {form}: {count:g} kernels for each edited layer, {most} are allowed")
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(found)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
