"""End to end: one decoding step, or one prefill, of a whole decoder, unpatched against patched, in turns.

Weights, edits and memory are random: what a step costs does not depend on what a model knows. The unpatched decoder is
one of its own that shares its weights with the patched one: a patch that is switched off still has its hooks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

import unike_kernels as uk
from bench.latency.case import NEURONS
from bench.latency.shapes import SHAPES, Shape
from bench.latency.timing import Timing, compare
from unike_kernels.config import RoutingConfig, ShiftConfig, UnikeConfig
from unike_kernels.edits import BaseFingerprint, Calibration, EditEntry, Edits, LayerEdits, LayerShared
from unike_kernels.indexing import KeptIndex
from unike_kernels.models import find_decoder
from unike_kernels.planning import fingerprint

PROMPT = 32  # tokens before the step that is timed
VOCABULARY = 4096
SHARED = 50_000  # from so many items on, the four layers are given one and the same table
# Retrieval per token: q is what q_proj made anyway, and one output projection serves both. Per case a step that decodes
# knows its alpha, whatever it is; the cosines of random states are mostly below 0, and alpha 0 would cost nothing.
ALPHA = 0.3


@dataclass(frozen=True)
class Stack:
    """One model with its edits: `rows` sequences decode at once, or prompts of `prefill` tokens are read."""

    shape: str
    rows: int
    items: int
    edits: int
    routed: bool
    per: str = "case"  # retrieval once per case, or for every token in every edited layer
    prefill: int = 0

    @property
    def name(self) -> str:
        what = [self.shape, f"bs={self.rows}", f"N={self.items}", f"edits={self.edits}"]
        what += ["routed" if self.routed else "always on"]
        what += ["per token"] if self.per == "token" else []
        what += [f"prefill {self.prefill}"] if self.prefill else []
        return " ".join(what)

    def bytes(self, dtype: torch.dtype) -> int:
        """What model, edits and patch take, about."""
        shape = SHAPES[self.shape]
        model = shape.layers * shape.d * (shape.ffn * (3 if shape.gated else 2) + 2 * shape.d + 2 * shape.d)
        tables = 2 * self.items * shape.d * (1 if self.items >= SHARED else 4)
        memory = 4 * self.items * (shape.d + 2 * shape.kv_heads * shape.head_dim)
        neurons = 2 * 4 * self.edits * NEURONS * shape.d * (3 if shape.gated else 2)
        return (model + tables + memory + neurons) * dtype.itemsize


def stacks(device: torch.device, quick: bool = False) -> Iterator[Stack]:
    """What is worth timing on this kind of device, most telling first."""
    if quick:
        yield Stack("tiny-blip2", 1, 1_000, 100, True)
    elif device.type == "cpu":
        for shape in ("tiny-blip2", "llama-100m"):
            yield Stack(shape, 1, 10_000, 1, False)
            yield from (Stack(shape, 1, 10_000, edits, True) for edits in (100, 1_000))
            yield Stack(shape, 8, 10_000, 100, True)
            yield Stack(shape, 1, 10_000, 100, True, "token")
            yield Stack(shape, 1, 10_000, 100, True, prefill=64)
        yield Stack("tiny-blip2", 1, 10_000, 10_000, True)
        yield Stack("tiny-blip2", 1, 100_000, 100, True, "token")
    else:
        for shape in ("vicuna-7b", "opt-2.7b"):
            yield Stack(shape, 1, 10_000, 1, False)
            yield from (Stack(shape, 1, 10_000, edits, True) for edits in (1, 100, 1_000, 10_000))
            yield from (Stack(shape, rows, 10_000, 100, True, "token") for rows in (1, 16, 64))
            yield from (Stack(shape, rows, 10_000, 100, True) for rows in (16, 64))
            yield from (Stack(shape, 1, items, 100, True) for items in (1_000, 100_000))
            yield Stack(shape, 1, 10_000, 100, True, prefill=1024)
        yield Stack("opt-2.7b", 1, 1_000_000, 100, True)


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
    d, n = base.hidden_size, NEURONS * stack.edits

    def rand(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=generator, device=generator.device) * scale).to(like)

    def own() -> LayerEdits:
        return LayerEdits(
            keys=rand(n, d, scale=d**-0.5),
            key_bias=rand(n),
            values=rand(n, d, scale=0.01),
            group_ptr=torch.arange(stack.edits + 1) * NEURONS,
            zeta=rand(stack.edits, d, scale=0.01),
            up=rand(n, d, scale=d**-0.5) if base.gated else None,
            up_bias=rand(n) if base.gated else None,
            h_sem=rand(stack.edits, d),
            h_pos=rand(stack.edits, d),
        )

    table = (rand(stack.items, d), rand(stack.items, d)) if stack.items >= SHARED else None

    def shared() -> LayerShared:
        maps = tuple((rand(d, d, scale=d**-0.5), rand(d)) for _ in range(2))
        sem, pos = table or (rand(stack.items, d), rand(stack.items, d))
        return LayerShared(h_sem=sem, h_pos=pos, encoder=maps)

    routing = replace(RoutingConfig(), mode="routed" if stack.routed else "always")
    shift = ShiftConfig(per=stack.per, alpha=None if stack.prefill and stack.per == "case" else ALPHA)
    config = replace(UnikeConfig(), layers=tuple(layers), routing=routing, shift=shift)
    sizes = dict.fromkeys(layers, NEURONS)
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

    `reset` takes the token out of the cache again, so that every run sees the same length. static: a cache of fixed
    size, so that the step can be captured in a CUDA graph.
    """

    def __init__(self, model: nn.Module, prompt: torch.Tensor, static: bool = False) -> None:
        from transformers import StaticCache

        self.model = model
        self.token = prompt[:, -1:].clone()
        self.length = prompt.shape[1]
        # transformers 5.24 renamed it, for the argument and for the output.
        self.name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        given = {self.name: StaticCache(config=model.config, max_cache_len=prompt.shape[1] + 8)} if static else {}
        with torch.inference_mode():
            out = model(input_ids=prompt, use_cache=True, **given)
        self.cache: Any = getattr(out, self.name)

    def __call__(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(input_ids=self.token, use_cache=True, **{self.name: self.cache}).logits

    def reset(self) -> None:
        """The cache as the prompt left it."""
        lengths = [getattr(layer, "cumulative_length", None) for layer in self.cache.layers]
        if not all(isinstance(length, torch.Tensor) for length in lengths):
            more = self.cache.get_seq_length() - self.length
            if more > 0:
                self.cache.crop(-more)
            return
        with torch.inference_mode():
            for length in lengths:
                length.fill_(self.length)


class Prefill:
    """The prompt read into an empty cache."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor) -> None:
        self.model, self.prompt = model, prompt

    def __call__(self) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(input_ids=self.prompt, use_cache=True).logits[:, -1:]


class Models:
    """The model that was asked for last: many stacks of one shape come one after the other."""

    def __init__(self) -> None:
        self.shape: str | None = None
        self.model: Any = None

    def get(self, shape: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """The decoder of this shape; the one before is dropped."""
        if self.shape != shape:
            self.shape, self.model = None, None
            self.model = make_model(SHAPES[shape], dtype, device)
            self.shape = shape
        return self.model


class Named:
    """A run while edits are chosen by name: random prompts would be routed to none, and cost nothing."""

    def __init__(self, run: Any, handle: Any, chosen: list[str] | None) -> None:
        self.run, self.handle, self.chosen = run, handle, chosen
        self.reset = getattr(run, "reset", lambda: None)

    def __call__(self) -> torch.Tensor:
        with nullcontext() if self.chosen is None else self.handle.choosing(self.chosen):
            return self.run()


def time_stack(
    stack: Stack, device: torch.device, dtype: torch.dtype, seconds: float, models: Models | None = None
) -> dict[str, Any]:
    """The sizes, and the timings of the unpatched and of the patched model; or why it is left out."""
    sizes = asdict(stack)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if stack.bytes(dtype) > 0.9 * (free + torch.cuda.memory_allocated(device)):
            return {
                "sizes": sizes,
                "left_out": f"needs about {stack.bytes(dtype) / 1e9:.0f} GB, {free / 1e9:.0f} are free",
            }
    generator = torch.Generator(device).manual_seed(0)
    model = (models or Models()).get(stack.shape, dtype, device)
    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    length = stack.prefill or PROMPT
    prompt = torch.randint(4, VOCABULARY, (stack.rows, length), generator=generator, device=device)
    kind: Any = Prefill if stack.prefill else Step
    static = {} if stack.prefill else {"static": device.type == "cuda"}
    edits = make_edits(model, stack, generator)
    with uk.patch(model, edits) as handle:
        chosen = [edits.ids[row % stack.edits] for row in range(stack.rows)] if stack.routed else None
        with nullcontext() if chosen is None else handle.choosing(chosen):
            patched = kind(model, prompt, **static)
        base = kind(twin, prompt, **static)
        if stack.prefill:  # every run decides anew
            patched = Named(patched, handle, chosen)
        runs = {"unpatched": [base], "patched": [patched]}
        expected, found = base(), patched()
        for run in (base, patched):
            getattr(run, "reset", lambda: None)()
        if torch.equal(found, expected):
            raise AssertionError("the patch changed nothing, so its step is not the one to time")
        with handle.disabled():
            alone = kind(model, prompt, **static)
            if not torch.equal(alone(), expected):
                raise AssertionError("the switched-off patch changed the model")
        for _ in range(KeptIndex.WAIT if stack.per == "token" and device.type == "cpu" else 0):
            patched()  # until a memory has made its int8 copy: what a long answer costs
            patched.reset()
        capturable = set() if stack.prefill else set(runs)
        timings: dict[str, Timing] = compare(runs, device, seconds=seconds, capturable=capturable)
    return {"sizes": sizes, "timings": {name: timing.to_dict() for name, timing in timings.items()}}
