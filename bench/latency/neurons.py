"""The cases of extra_neurons and augmented_ffn."""

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.latency.case import NEURONS, OURS, Case, Inputs
from bench.latency.rivals import compiled, loop_over_requests, padded_bmm, vllm_adapters, vllm_lora
from bench.latency.shapes import Shape, hidden, weights
from unike_kernels import ops, reference


def routed_neurons(shape: Shape, tokens: int, edits: int) -> Case:
    """Decoding with `edits` resident edits of which one acts on each token."""
    n = edits * NEURONS

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        new = partial(weights, generator, dtype=dtype, device=device)
        gate = {"up": new(n, shape.d), "up_bias": new(1, n)[0]} if shape.gated else {}
        return {
            "x": hidden(generator, tokens, shape.d, dtype=dtype, device=device),
            "keys": new(n, shape.d),
            "key_bias": new(1, n)[0],
            "values": new(n, shape.d),
            **gate,
            "group_ptr": torch.arange(edits + 1, device=device) * NEURONS,
            "token_to_case": torch.arange(tokens, device=device),
            "selected": torch.randint(edits, (tokens, 1), generator=generator, device=generator.device).to(device),
            "act": shape.act,
        }

    def gather_bmm(x: Tensor, keys: Tensor, key_bias: Tensor, values: Tensor, **rest: Any) -> Tensor:
        """What a user would write for groups of one size: gather the groups' rows, two batched products."""
        group = rest["selected"][rest["token_to_case"], 0]
        key, bias, value = (t.unflatten(0, (edits, NEURONS))[group] for t in (keys, key_bias, values))
        o = reference.activation(rest["act"])(torch.einsum("td,tnd->tn", x, key) + bias)
        if "up" in rest:
            up, up_bias = (rest[name].unflatten(0, (edits, NEURONS))[group] for name in ("up", "up_bias"))
            o = o * (torch.einsum("td,tnd->tn", x, up) + up_bias)
        return torch.einsum("tn,tnd->td", o, value)

    rows = min(tokens, edits) * NEURONS * (3 if shape.gated else 2)
    return Case(
        "extra_neurons",
        shape.name,
        {"T": tokens, "edits": edits},
        make,
        reference.extra_neurons,
        {
            OURS: ops.extra_neurons,
            "gather + bmm": gather_bmm,
            **({"gather + bmm, compiled": compiled(gather_bmm)} if (tokens, edits) == (1, 100) else {}),
            "reference": reference.extra_neurons,
        },
        moved=rows * shape.d + 2 * tokens * shape.d,
        flops=2 * tokens * NEURONS * shape.d * (3 if shape.gated else 2),
        capturable={OURS, "gather + bmm", "gather + bmm, compiled"},
        eager="gather + bmm",
    )


def sizes_of_tenants(tokens: int, most: int = 64) -> list[int]:
    """Neurons of each of `tokens` edit sets: 1 to `most`, the same in every run."""
    return torch.randint(1, most + 1, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()


def tenants(shape: Shape, tokens: int) -> Case:
    """One token each of `tokens` requests, every one with an edit set of its own, of 1 to 64 neurons."""
    sizes = sizes_of_tenants(tokens)
    n, most = sum(sizes), max(sizes)

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        new = partial(weights, generator, dtype=dtype, device=device)
        gate = {"up": new(n, shape.d), "up_bias": new(1, n)[0]} if shape.gated else {}
        starts = torch.tensor([0, *sizes], device=device).cumsum(0)
        place = torch.arange(most, device=device)
        rows = (starts[:-1, None] + place).clamp(max=n - 1)
        made: Inputs = {
            "x": hidden(generator, tokens, shape.d, dtype=dtype, device=device),
            "keys": new(n, shape.d),
            "key_bias": new(1, n)[0],
            "values": new(n, shape.d),
            **gate,
            "group_ptr": starts,
            "selected": torch.arange(tokens, device=device)[:, None],
            "act": shape.act,
        }
        there = place < torch.tensor(sizes, device=device)[:, None]
        for_rivals: Inputs = {"sizes": sizes, "padded": (rows, there)}
        if device.type == "cuda" and find_spec("vllm"):
            halves = [made[name][rows] for name in ("keys", "up") if name in made]
            for_rivals |= vllm_adapters(halves, made["values"][rows])
        return {**made, "for_rivals": for_rivals}

    def rival(run: Any) -> Any:
        return lambda for_rivals, **inputs: run(**inputs, **for_rivals)

    def ours(for_rivals: Any, **inputs: Any) -> Tensor:
        return ops.extra_neurons(**inputs)

    def specification(for_rivals: Any, **inputs: Any) -> Tensor:
        return reference.extra_neurons(**inputs)

    providers = {
        OURS: ours,
        "gather + bmm, padded": rival(padded_bmm),
        "loop over requests": rival(loop_over_requests),
    }
    if find_spec("vllm"):
        providers["vLLM LoRA"] = rival(vllm_lora)
    planes = 3 if shape.gated else 2
    return Case(
        "extra_neurons",
        shape.name,
        {"T": tokens, "sets": tokens},
        make,
        specification,
        providers,
        moved=n * planes * shape.d + 2 * tokens * shape.d,
        flops=2 * n * planes * shape.d,
        capturable=set(providers),
        eager="loop over requests",
    )


def augmented_ffn(shape: Shape, tokens: int, extra: int) -> Case:
    """The whole FFN of one layer with `extra` neurons that are always on."""

    def make(generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Inputs:
        new = partial(weights, generator, dtype=dtype, device=device)
        bias = {} if shape.gated else {"b_k": new(1, shape.ffn)[0], "b_v": new(1, shape.d)[0]}
        gate = {"w_up": new(shape.ffn, shape.d), "up": new(extra, shape.d)} if shape.gated else {}
        return {
            "x": hidden(generator, tokens, shape.d, dtype=dtype, device=device),
            "w_k": new(shape.ffn, shape.d),
            "b_k": None,
            "w_v": new(shape.d, shape.ffn),
            "b_v": None,
            "keys": new(extra, shape.d),
            "key_bias": new(1, extra)[0],
            "values": new(extra, shape.d),
            "zeta": new(1, shape.d)[0],
            "beta": 0.1,
            "act": shape.act,
            **bias,
            **gate,
        }

    rows = (shape.ffn + extra) * (3 if shape.gated else 2)
    rivals = ("base FFN alone", "base FFN + extra, eager", "base FFN + extra, compiled", "clone + concatenate")
    return Case(
        "augmented_ffn",
        shape.name,
        {"T": tokens, "extra": extra},
        make,
        reference.augmented_ffn,
        {
            OURS: ops.augmented_ffn,
            "base FFN alone": base_ffn,
            "base FFN + extra, eager": base_and_extra,
            **({"base FFN + extra, compiled": compiled(base_and_extra)} if (tokens, extra) == (1, 20) else {}),
            "clone + concatenate": clone_and_concatenate,
        },
        moved=rows * shape.d + 2 * tokens * shape.d,
        flops=2 * tokens * rows * shape.d,
        capturable={OURS, *rivals},
        floor="base FFN alone",
    )


def base_ffn(x: Tensor, w_k: Tensor, b_k: Any, w_v: Tensor, b_v: Any, *_: Any, act: str, **rest: Any) -> Tensor:
    """The unedited FFN: the floor, and no rival, since it computes less."""
    o = reference.activation(act)(F.linear(x, w_k, b_k))
    return F.linear(o * F.linear(x, rest["w_up"], rest.get("b_up")) if "w_up" in rest else o, w_v, b_v)


def base_and_extra(
    x: Tensor, w_k: Tensor, b_k: Any, w_v: Tensor, b_v: Any, keys: Tensor, key_bias: Any, values: Tensor, **rest: Any
) -> Tensor:
    """Two FFNs and a sum, beta zeta' folded into the values beforehand, as a user would."""
    o = reference.activation(rest["act"])(F.linear(x, keys, key_bias))
    o = o * F.linear(x, rest["up"], rest.get("up_bias")) if "up" in rest else o
    return base_ffn(x, w_k, b_k, w_v, b_v, **rest) + o @ (values + rest["beta"] * rest["zeta"])


def clone_and_concatenate(
    x: Tensor, w_k: Tensor, b_k: Any, w_v: Tensor, b_v: Any, keys: Tensor, key_bias: Any, values: Tensor, **rest: Any
) -> Tensor:
    """The published formulation: clone the weights and concatenate the neurons to them at every forward."""
    bias = torch.cat([w_k.new_zeros(len(w_k)) if b_k is None else b_k.clone(), key_bias])
    o = reference.activation(rest["act"])(F.linear(x, torch.cat([w_k.clone(), keys]), bias))
    if "up" in rest:
        o = o * F.linear(x, torch.cat([rest["w_up"].clone(), rest["up"]]))
    extended = torch.cat([w_v.clone(), (values + rest["beta"] * rest["zeta"]).T], dim=1)
    return F.linear(o, extended, b_v)
