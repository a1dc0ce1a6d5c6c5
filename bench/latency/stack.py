"""End to end: one decoding step and one prefill of a whole decoder, unpatched against patched, in turns.

Weights, edits and memory are random: what a step costs does not depend on what a model knows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

import unike_kernels as uk
from bench.latency.shapes import SHAPES, Shape
from bench.latency.timing import Timing, compare
from unike_kernels.config import RoutingConfig, ShiftConfig, UnikeConfig
from unike_kernels.edits import BaseFingerprint, Calibration, EditEntry, Edits, LayerEdits, LayerShared
from unike_kernels.models import find_decoder
from unike_kernels.planning import fingerprint

PROMPT = 32  # tokens before the step that is timed
VOCABULARY = 4096


@dataclass(frozen=True)
class Stack:
    """One model with its edits: `rows` sequences decode at once."""

    shape: str
    rows: int
    items: int
    edits: int
    routed: bool

    @property
    def name(self) -> str:
        routing = "routed" if self.routed else "always on"
        return f"{self.shape} bs={self.rows} N={self.items} edits={self.edits} {routing}"


def stacks(device: torch.device, quick: bool = False) -> Iterator[Stack]:
    """What is worth timing on this kind of device."""
    if device.type == "cpu":
        for shape in ("tiny-blip2",) if quick else ("tiny-blip2", "llama-100m"):
            yield Stack(shape, 1, 1_000 if quick else 10_000, 100, True)
            if not quick:
                yield Stack(shape, 1, 10_000, 1, False)
        return
    for shape in ("opt-2.7b", "vicuna-7b"):
        for rows in (1, 16, 64):
            yield from (Stack(shape, rows, items, 100, True) for items in (1_000, 10_000, 100_000))
        yield from (Stack(shape, 1, 10_000, edits, True) for edits in (1, 1_000, 10_000))
        yield Stack(shape, 1, 10_000, 1, False)


def make_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The language model alone, randomly initialised on the device in `dtype`."""
    import transformers

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": shape.d,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": 2048,
    }
    if shape.gated:
        more = {"intermediate_size": shape.ffn, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim}
        kind, config = transformers.LlamaForCausalLM, transformers.LlamaConfig(**common, **more)
    else:
        config = transformers.OPTConfig(**common, ffn_dim=shape.ffn, word_embed_proj_dim=shape.d)
        kind = transformers.OPTForCausalLM
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def make_edits(model: nn.Module, stack: Stack, generator: torch.Generator) -> Edits:
    """Random edits of the model's last four layers; a tenth of the states' size, so that no answer blows up."""
    decoder = find_decoder(model)
    layers = range(len(decoder.layers) - 4, len(decoder.layers))
    like = next(model.parameters())
    base: BaseFingerprint = fingerprint(model, decoder, list(layers))
    d, n = base.hidden_size, 10 * stack.edits

    def rand(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator) * scale).to(like)

    def own() -> LayerEdits:
        return LayerEdits(
            keys=rand(n, d, scale=d**-0.5),
            key_bias=rand(n),
            values=rand(n, d, scale=0.01),
            group_ptr=torch.arange(stack.edits + 1) * 10,
            zeta=rand(stack.edits, d, scale=0.01),
            up=rand(n, d, scale=d**-0.5) if base.gated else None,
            up_bias=rand(n) if base.gated else None,
            h_sem=rand(stack.edits, d),
            h_pos=rand(stack.edits, d),
        )

    def shared() -> LayerShared:
        maps = tuple((rand(d, d, scale=d**-0.5), rand(d)) for _ in range(2))
        return LayerShared(h_sem=rand(stack.items, d), h_pos=rand(stack.items, d), encoder=maps)

    routing = replace(RoutingConfig(), mode="routed" if stack.routed else "always")
    config = replace(UnikeConfig(), layers=tuple(layers), routing=routing, shift=ShiftConfig())
    sizes = dict.fromkeys(layers, 10)
    made = {"target": "answer", "image": None, "neurons": sizes, "loss": 0.0, "success": True, "steps": 0}
    entries = [EditEntry(id=f"e{i}", prompt=f"question {i}", **made) for i in range(stack.edits)]
    return Edits(
        config,
        base,
        entries,
        {layer: own() for layer in layers},
        {layer: shared() for layer in layers},
        Calibration(layer=layers[0], center=rand(d, scale=0.0), cases=rand(64, d)),
    )


class Step:
    """One decoding step after a prefilled prompt: the same token at the same place, again and again.

    The cache is cut back after each run, so that every run sees the same length.
    """

    def __init__(self, model: nn.Module, prompt: torch.Tensor) -> None:
        self.model = model
        self.token = prompt[:, -1:].clone()
        with torch.inference_mode():
            out = model(input_ids=prompt, use_cache=True)
        # transformers 5.24 renamed it, for the argument and for the output.
        self.name = "cache" if "cache" in out else "past_key_values"
        self.cache = out[self.name]

    def __call__(self) -> torch.Tensor:
        with torch.inference_mode():
            logits = self.model(input_ids=self.token, use_cache=True, **{self.name: self.cache}).logits
            self.cache.crop(-1)
        return logits


def time_stack(stack: Stack, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Timing]:
    """Decoding steps of the unpatched and of the patched model."""
    generator = torch.Generator().manual_seed(0)
    shape = SHAPES[stack.shape]
    model = make_model(shape, dtype, device)
    prompt = torch.randint(4, VOCABULARY, (stack.rows, PROMPT), generator=generator).to(device)
    base = Step(model, prompt)
    edits = make_edits(model, stack, generator)
    expected = base()
    with uk.patch(model, edits) as handle:
        # Random prompts would be routed to no edit, and cost nothing: every row gets one by name.
        chosen = [edits.ids[row % stack.edits] for row in range(stack.rows)]
        with handle.choosing(chosen) if stack.routed else nullcontext():
            patched = Step(model, prompt)

        def unpatched() -> torch.Tensor:
            with handle.disabled():
                return base()

        if not torch.equal(unpatched(), expected):
            raise AssertionError("the switched-off patch changed the model")
        if torch.equal(patched(), expected):
            raise AssertionError("the patch changed nothing, so its step is not the one to time")
        return compare({"unpatched": [unpatched], "patched": [patched]}, device, seconds=seconds, capturable=set())
