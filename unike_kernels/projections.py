"""A self-attention's own projections, as the shift and the memory use them: called as modules, never read."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .forwards import HookedForward
from .models import LayerSites


class OwnHook:
    """Base of the hooks that a patch itself puts on a projection: they are no reason to call rather than read it."""


def replacement(module: nn.Module) -> Any:
    """What stands in for a module's own forward, below the hooks of patches; None: nothing does."""
    there = module.__dict__.get("forward")
    return there.inner if isinstance(there, HookedForward) else there


def hooks_on_all() -> bool:
    """Whether torch calls hooks around every module."""
    shared = torch.nn.modules.module
    return bool(shared._global_forward_hooks or shared._global_forward_pre_hooks)


class Projections:
    """The projections of one layer's self-attention.

    Calling them keeps what others put into them: quantisation, adapters, offloading. Names are relative to the
    attention module, which is given with every call, so that copies and pickles of a model use their own.
    """

    def __init__(self, sites: LayerSites) -> None:
        self.sites = sites
        self.below = len(sites.attention) + 1
        self.q_proj, self.out_proj = sites.q_proj[self.below :], sites.out_proj[self.below :]

    def _get(self, attention: nn.Module, name: str) -> nn.Module:
        return self._child(attention, name[self.below :])

    def _child(self, attention: nn.Module, name: str) -> nn.Module:
        found = attention._modules.get(name)  # ten times as fast as get_submodule, and asked in every layer and token
        return attention.get_submodule(name) if found is None else found

    def query(self, attention: nn.Module, tap: Tensor, projected: Tensor | None = None) -> Tensor:
        """q [T, heads, head_dim] of the tap [T, d], not rotated: a memory has no position.

        projected: what q_proj made of the tap [T, heads * head_dim], where the layer's own call was seen.
        """
        q = self._get(attention, self.sites.q_proj)(tap) if projected is None else projected
        return self._heads(attention, q, self.sites.heads, self.sites.q_norm)

    def is_query(self, attention: nn.Module, module: nn.Module) -> bool:
        """Whether `module` is what the layer calls for q now: an adapter may have come around it since."""
        return (attention._modules.get(self.q_proj) or self._child(attention, self.q_proj)) is module

    def is_output(self, attention: nn.Module, module: nn.Module) -> bool:
        """Whether `module` is what the layer calls for its output projection now."""
        return (attention._modules.get(self.out_proj) or self._child(attention, self.out_proj)) is module

    def item(self, attention: nn.Module, h_pos: Tensor) -> tuple[Tensor, Tensor]:
        """(k, v), each [N, kv_heads, head_dim], of items' h_pos [N, d].

        In evaluation mode, whatever the model is in: an adapter's dropout would be kept with the items.
        """
        with _evaluating(self._get(attention, name) for name in (self.sites.k_proj, self.sites.v_proj)):
            k, v = (self._get(attention, name)(h_pos) for name in (self.sites.k_proj, self.sites.v_proj))
        kv_heads = self.sites.kv_heads
        return self._heads(attention, k, kv_heads, self.sites.k_norm), self._heads(attention, v, kv_heads, None)

    def item_tensors(self, attention: nn.Module) -> list[Tensor]:
        """The parameters and buffers that `item` computes with."""
        names = (self.sites.k_proj, self.sites.v_proj, self.sites.k_norm)
        used = [self._get(attention, name) for name in names if name is not None]
        return [t for module in used for tensors in (module.parameters(), module.buffers()) for t in tensors]

    def _heads(self, attention: nn.Module, y: Tensor, heads: int, norm_name: str | None) -> Tensor:
        """[N, heads, head_dim] of y [N, heads * head_dim], normed as the layer does: each head, or all as one row."""
        shape = (heads, self.sites.head_dim)
        if norm_name is None:
            return y.unflatten(-1, shape)
        norm: Any = self._get(attention, norm_name)
        weight = getattr(norm, "weight", None)
        if weight is not None and weight.shape[-1] != self.sites.head_dim:  # OLMo 2
            return norm(y).unflatten(-1, shape)
        return norm(y.unflatten(-1, shape))

    def output(self, attention: nn.Module, heads: Tensor) -> Tensor:
        """[T, d] of the concatenated heads [T, heads * head_dim]."""
        return self._get(attention, self.sites.out_proj)(heads)

    def plain_output(self, attention: nn.Module) -> tuple[Tensor, Tensor | None] | None:
        """(weight, bias) of the output projection when calling it is exactly F.linear of tensors at hand, else None."""
        out: Any = self._get(attention, self.sites.out_proj)
        if type(out) is not nn.Linear or out._forward_hooks or hasattr(out, "_hf_hook"):
            return None
        if any(not isinstance(hook, OwnHook) for hook in out._forward_pre_hooks.values()):
            return None
        if replacement(out) is not None or hooks_on_all():
            return None
        weight = out.weight
        if type(weight) not in (Tensor, nn.Parameter) or weight.device.type == "meta" or weight.dtype.itemsize < 2:
            return None  # a quantised tensor inside a plain nn.Linear
        return weight, out.bias


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the modules are in evaluation mode; afterwards each part is in the mode that it was in."""
    training = [part for module in modules for part in module.modules() if part.training]
    try:
        for part in training:
            part.training = False
        yield
    finally:
        for part in training:
            part.training = True


def empty_like_site(model: nn.Module, name: str) -> Tensor:
    """An empty tensor of the dtype and on the device in which the site `name` computes.

    Quantised weights say nothing of it, so the nearest floating parameter around them does; offloaded ones rest on the
    meta device, so accelerate's hooks tell where they will run. ValueError where nothing does.
    """
    path = name.split(".")
    around = [model.get_submodule(".".join(path[:i])) for i in range(len(path), -1, -1)]
    dtype = next((p.dtype for module in around for p in module.parameters() if _computes(p)), torch.get_default_dtype())
    site = around[0]
    device = next((d for module in site.modules() if (d := _execution_device(module)) is not None), None)
    if device is None:
        tensors = (t for module in around for tensors in (module.parameters(), module.buffers()) for t in tensors)
        device = next((t.device for t in tensors), torch.device("cpu"))
        if device.type == "meta":
            raise ValueError(f"{name} is on the meta device: load the model's weights (or dispatch it) before patching")
    return torch.empty(0, dtype=dtype, device=device)


def _computes(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.dtype.itemsize >= 2


def _execution_device(module: nn.Module) -> Any:
    """Where accelerate's hook on this module, alone or in a sequence of hooks, moves its inputs and weights."""
    hook = getattr(module, "_hf_hook", None)
    for part in (hook, *getattr(hook, "hooks", ())):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return device
    return None
