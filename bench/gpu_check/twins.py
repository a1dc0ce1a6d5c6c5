"""Patched models with the kernels and with the reference backend: the same logits within rounding, the same tokens.

A tiny BLIP-2, and OPT-2.7B and Vicuna-7B at full width with four layers, random weights, in bf16; the truth is the
same model with the reference in float32 (for a float32 one, in float64).
"""

import copy
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import unike_kernels as uk
from bench.latency.shapes import SHAPES, Shape
from bench.latency.stack import VOCABULARY, Stack, make_edits, make_model
from bench.tolerance import assert_close_to_reference, error
from tests import models_tiny

SIZES = [replace(SHAPES["opt-2.7b"], layers=4), replace(SHAPES["vicuna-7b"], layers=4)]
HALF_AND_SINGLE = (torch.bfloat16, torch.float32)


@dataclass
class Twin:
    """A model, its edits and a prompt; chosen: the edit of each row, where random prompts would be routed to none."""

    name: str
    model: nn.Module
    edits: uk.Edits
    inputs: dict[str, Any]
    chosen: list[str] | None


def wide(shape: Shape, routed: bool, device: torch.device, dtype: torch.dtype, items: int = 1000) -> Twin:
    """A decoder of this shape, with random edits: one of its own for every row, where they are routed."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = make_model(shape, dtype, device)
    edits = make_edits(model, Stack(shape.name, 2, items, 6, routed), generator)
    prompt = torch.randint(4, VOCABULARY, (2, 9), generator=generator).to(device)
    inputs = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    return Twin(shape.name, model, edits, inputs, [edits.ids[0], edits.ids[3]] if routed else None)


def tiny_blip2(routed: bool, device: torch.device, dtype: torch.dtype) -> Twin:
    """A tiny random BLIP-2, whose own routing finds the edits of its prompts."""
    model = models_tiny.make_model("blip2")
    inputs = models_tiny.inputs_for(model, (6, 6, 6))
    prompts = {name: value[:2] for name, value in inputs.items()}
    edits = models_tiny.edits_for(model, models_tiny.ROUTED if routed else models_tiny.ALWAYS, prompts=prompts)
    inputs = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
    return Twin("tiny BLIP-2", model.to(device, dtype), edits, inputs, None)


def compare(twin: Twin, new: int = 8, backend: str = "triton") -> dict[str, Any]:
    """Errors of `backend` and of the reference; AssertionError where the backend's is more than twice the reference's,
    plus 2 eps, where it prefers another token though the reference's lead is clear, or where the edits change nothing.
    """
    dtype = next(twin.model.parameters()).dtype
    judge_dtype = torch.float64 if dtype == torch.float32 else torch.float32
    same, same_tokens = answer(twin, "reference", new)
    mine, tokens = answer(twin, backend, new)
    with torch.no_grad():
        base = twin.model(**twin.inputs).logits
    pictures = {k: v.to(judge_dtype) for k, v in twin.inputs.items() if v.is_floating_point()}
    judge = replace(twin, model=copy.deepcopy(twin.model).to(judge_dtype), inputs={**twin.inputs, **pictures})
    right = answer(judge, "reference", 0)[0].double()
    assert_close_to_reference(mine, right, same, 2)
    allowed = 2 * error(same, right) + 2 * torch.finfo(same.dtype).eps * right.abs().max().item()
    if not error(base, right) > 2 * allowed:
        raise AssertionError(f"{twin.name}: the edits move the logits by less than the {allowed:.3g} that are allowed")
    chosen, preferred = mine.argmax(-1, keepdim=True), same.argmax(-1, keepdim=True)
    lead = (same.gather(-1, preferred) - same.gather(-1, chosen)).max().item()
    if lead > 2 * allowed:  # each of the two logits may be off by as much
        raise AssertionError(f"{twin.name}: another token than the reference's, which leads by {lead:.3g}")
    return {
        "name": twin.name,
        "backend": backend,
        "routed": twin.edits.config.routing.mode,
        "dtype": str(dtype),
        "error, kernels": error(mine, right),
        "error, reference": error(same, right),
        "largest logit": right.abs().max().item(),
        "edits move the logits by": error(base, right),
        "same tokens generated": bool(torch.equal(tokens, same_tokens)),  # after a near tie they may part
    }


@torch.no_grad()
def answer(twin: Twin, backend: str, new: int) -> tuple[Tensor, Tensor]:
    """The prompt's logits and the greedy tokens of the patched model."""
    with (
        uk.patch(twin.model, twin.edits, backend=backend) as handle,
        nullcontext() if twin.chosen is None else handle.choosing(twin.chosen),
    ):
        logits = twin.model(**twin.inputs).logits
        if not new:
            return logits, logits.new_zeros(0)
        made = twin.model.generate(**twin.inputs, max_new_tokens=new, do_sample=False, pad_token_id=1)
    return logits, made[:, -new:]


def main() -> None:
    """Compares all of them and writes the figures to the file named; fails at the end if one failed."""
    device, found, failed = torch.device("cuda"), [], 0
    for routed in (False, True):
        made: list[Callable[[], Twin]] = [partial(tiny_blip2, routed, device, dtype) for dtype in HALF_AND_SINGLE]
        made += [partial(wide, shape, routed, device, torch.bfloat16) for shape in SIZES]
        for make in made:
            for backend in ("triton", "auto"):  # "auto" has CUDA C++ in half precision, where it was built
                try:
                    found.append(compare(make(), backend=backend))
                except AssertionError as wrong:  # one that fails must not hide the others
                    failed += 1
                    found.append({"failed": str(wrong), "backend": backend})
                print(found[-1], flush=True)
                Path(sys.argv[1]).write_text(json.dumps(found, indent=1), encoding="utf-8")
    if failed:
        sys.exit(f"{failed} of {len(found)} failed")


if __name__ == "__main__":
    main()
