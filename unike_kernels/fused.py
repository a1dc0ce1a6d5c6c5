"""`mode="fuse"`: one operator reads an FFN's weights and its extra neurons as if they were concatenated.

A hook cannot keep a base FFN from running, so this puts a `forward` on the instances of its modules, above the hooks of
`mode="attach"`, which stay and do the work wherever this does not: with gradients, for more than 64 rows, for routed
edits (a routed group is no part of one concatenation) and where a module has changed since. Weights stay where they
are; nothing is copied, and no key of the state_dict changes.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from . import ops, reference
from .forwards import HookedForward
from .hooks import FfnInputHook, FfnOutputHook, Runtime
from .models import LayerSites, get_module
from .neurons import ExtraNeurons
from .projections import hooks_on_all, replacement

# Up to here an FFN is bound by reading its weights, and one pass over all of them pays. A choice by speed alone:
# `augmented_ffn` takes any number, and its kernels have a limit of their own.
FEW_ROWS = 64
GATED = ("gate_proj", "up_proj", "down_proj")


def linear_names(sites: LayerSites) -> tuple[str, ...]:
    """The FFN's linear maps: gate, up and down, or the two of an FFN without a gate."""
    return tuple(f"{sites.ffn_input}.{name}" for name in GATED) if sites.gated else (sites.ffn_input, sites.ffn_output)


def refuse_unless_plain(holder: nn.Module, sites: LayerSites, index: int) -> None:
    """Raises ValueError that names the layer, the module and the reason where an FFN cannot be fused."""

    def refuse(name: str, why: str) -> None:
        raise ValueError(f"mode='fuse' cannot take layer {index}: {name} {why}; mode='attach' takes every layer")

    names = linear_names(sites)
    for name in names:
        try:
            module = holder.get_submodule(name)
        except AttributeError:
            refuse(name, "is not there")
        why = why_not_plain(module) or _replaced(module)
        if why is not None:
            refuse(name, why)
    parent = get_module(holder, names[-1].rpartition(".")[0])
    name, activation = activation_of(parent, sites.gated)
    why = why_watched(activation)
    if why is not None:
        refuse(f"{names[-1].rpartition('.')[0]}.{name}", why)
    if sites.gated:
        why = _replaced(parent)
        if why is not None:
            refuse(sites.ffn_input, why)
        if not _is_gated_ffn(parent, [holder.get_submodule(name) for name in names], sites.act):
            refuse(sites.ffn_input, f"computes something else than down({sites.act}(gate(x)) * up(x))")


def why_not_plain(module: nn.Module) -> str | None:
    """Why a module's output is not exactly F.linear of weights at hand; None where it is."""
    if type(module) is not nn.Linear:  # an adapter has a weight too, and fusing would drop the adapter in silence
        return f"is a {type(module).__name__}, not an nn.Linear"
    if hasattr(module, "_hf_hook"):
        return "is offloaded or dispatched by accelerate"
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(not isinstance(hook, FfnInputHook | FfnOutputHook) for hook in hooks):
        return "has forward hooks"
    weight = module.weight
    if (
        type(weight) not in (Tensor, nn.Parameter)
        or not weight.is_floating_point()
        or weight.device.type == "meta"
        or weight.dtype.itemsize < 2
    ):
        return f"has weights that cannot be read ({type(weight).__name__}, {weight.dtype}, {weight.device})"
    return None


def activation_of(parent: nn.Module, gated: bool) -> tuple[str, Any]:
    """Name and activation of the FFN whose linear maps `parent` owns."""
    name = "act_fn" if gated else "activation_fn"
    return name, getattr(parent, name, None)


def why_watched(activation: Any) -> str | None:
    """Why somebody would notice that the activation does not see the hidden values; None where nobody does."""
    if getattr(activation, "_forward_hooks", None) or getattr(activation, "_forward_pre_hooks", None):
        return "has forward hooks"
    return _replaced(activation) if isinstance(activation, nn.Module) else None


def _replaced(module: nn.Module) -> str | None:
    if replacement(module) is None:
        return None
    return "already has a forward of its own (another fused patch, or a wrapper)"


@torch.no_grad()
def _is_gated_ffn(parent: nn.Module, linears: list[nn.Module], act: str) -> bool:
    """Whether the parent computes what the operator would, tried on two rows."""
    gate, up, down = linears
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(2, gate.in_features, generator=generator, device="cpu").to(gate.weight)
    expected = reference.ffn(x, gate.weight, gate.bias, down.weight, down.bias, act=act, w_up=up.weight, b_up=up.bias)
    found = type(parent).forward(parent, x)
    # Three roundings cost bfloat16 about 0.5 % of the norm; 64 eps of it would be half of the result.
    off = min(64 * torch.finfo(x.dtype).eps, 0.02) * expected.double().norm()
    return found.shape == expected.shape and bool((found.double() - expected.double()).norm() <= off)


class FusedFfn:
    """The fused FFN of one layer and patch: `forward` objects on its modules, as long as the patch is on the model."""

    def __init__(self, holder: nn.Module, sites: LayerSites, runtime: Runtime, neurons: ExtraNeurons) -> None:
        self.runtime, self.neurons, self.act = runtime, neurons, sites.act
        self.linears = [holder.get_submodule(name) for name in linear_names(sites)]
        # Where the linears hang: what stands there now is what the model calls.
        self.places = [(holder.get_submodule(name.rpartition(".")[0]), name) for name in linear_names(sites)]
        self.gated = sites.gated
        self.x: Tensor | None = None  # an FFN's input on its way from its first to its last module
        self.done = False  # the output that the hook is about to see holds the neurons' part already
        if sites.gated:
            self.forwards: list[tuple[nn.Module, Any]] = [(get_module(holder, sites.ffn_input), GatedForward(self))]
        else:
            self.forwards = [(self.linears[0], InputForward(self)), (self.linears[1], OutputForward(self))]

    def enter(self) -> None:
        """Puts the forwards on their modules."""
        for module, forward in self.forwards:
            there = vars(module).get("forward")
            if isinstance(there, HookedForward):
                there.inner = forward
            else:
                vars(module)["forward"] = forward

    def leave(self) -> None:
        """Takes them off again."""
        for module, forward in self.forwards:
            for name, value in list(vars(module).items()):
                if isinstance(value, HookedForward) and value.inner is forward:
                    value.inner = None
                elif value is forward and name == "forward":
                    del vars(module)[name]
                elif value is forward:  # accelerate keeps what it has put its own forward around
                    vars(module)[name] = MethodType(type(module).forward, module)

    def takes(self, x: Tensor) -> bool:
        """Whether this pass of the FFN is one for the operator; everything else is left to the hooks."""
        self.done, self.x = False, None
        if not self.runtime.enabled or torch.is_grad_enabled() or self.neurons.zeta is not None:
            return False
        if x.numel() > FEW_ROWS * x.shape[-1] or self.runtime.cases(x).selected is not None:
            return False
        if torch.is_autocast_enabled(x.device.type) or hooks_on_all():
            return False
        here = (parent._modules.get(name.rpartition(".")[2]) for parent, name in self.places)
        same = all(a is b for a, b in zip(here, self.linears, strict=True))
        if not same or any(why_not_plain(linear) is not None for linear in self.linears):
            return False
        own = [None] * 3 if self.gated else [forward for _, forward in self.forwards]
        if any(replacement(linear) is not f for linear, f in zip(self.linears, own, strict=True)):
            return False
        if why_watched(activation_of(self.places[-1][0], self.gated)[1]) is not None:
            return False
        return all(linear.weight.dtype == x.dtype for linear in self.linears)

    def __call__(self, x: Tensor) -> Tensor:
        """[..., d] the FFN of x [..., d], neurons included."""
        first, last = self.linears[0], self.linears[-1]
        up = self.linears[1] if self.gated else None
        self.done = True
        return ops.augmented_ffn(
            x,
            first.weight,
            first.bias,
            last.weight,
            last.bias,
            self.neurons.keys,  # spare rows are zero, and so is what they add
            self.neurons.key_bias,
            self.neurons.values,
            act=self.act,
            w_up=None if up is None else up.weight,
            b_up=None if up is None else up.bias,
            up=self.neurons.up,
            up_bias=self.neurons.up_bias,
            backend=self.neurons.backend,
        )

    def take_done(self) -> bool:
        """Whether the output at hand was fused; asked once for each output."""
        done, self.done = self.done, False
        return done

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "x": None, "done": False}


class GatedForward:
    """`forward` of a gated FFN's module."""

    def __init__(self, ffn: FusedFfn) -> None:
        self.ffn = ffn

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        module = self.ffn.forwards[0][0]
        if len(args) + len(kwargs) == 1:
            (x,) = (*args, *kwargs.values())
            if self.ffn.takes(x):
                return self.ffn(x)
        return type(module).forward(module, *args, **kwargs)


class InputForward:
    """`forward` of the first linear map of an FFN without a gate: keeps its input, where the last one will fuse.

    The activation between them then sees no numbers: it launches nothing, and one in place does not write to the input.
    """

    def __init__(self, ffn: FusedFfn) -> None:
        self.ffn = ffn

    def __call__(self, input: Tensor) -> Tensor:
        if self.ffn.takes(input):
            self.ffn.x = input
            return input.new_empty((*input.shape[:-1], 0))
        return nn.Linear.forward(self.ffn.linears[0], input)


class OutputForward:
    """`forward` of the last linear map of an FFN without a gate."""

    def __init__(self, ffn: FusedFfn) -> None:
        self.ffn = ffn

    def __call__(self, input: Tensor) -> Tensor:
        x, self.ffn.x = self.ffn.x, None
        return nn.Linear.forward(self.ffn.linears[1], input) if x is None else self.ffn(x)
