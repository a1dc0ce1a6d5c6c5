"""Only the edited layers depend on an edit: run the layers below once, the edited layers alone many times."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models import Decoder, get_module
from .inputs import Batch


class _Reached(Exception):
    """The first edited layer was called; nothing above it needs to run."""


@dataclass
class Prefix:
    """What enters the first edited layer: hidden states [B, S, d] and the layer's other arguments."""

    hidden: Tensor
    kwargs: dict[str, Any]
    first: int

    def rows(self, index: Tensor) -> "Prefix":
        """The prefix of some rows [b] of the batch."""
        return Prefix(self.hidden[index], _select(self.kwargs, index, len(self.hidden)), self.first)


def _select(value: Any, index: Tensor, batch: int) -> Any:
    if isinstance(value, Tensor):
        return value[index] if value.dim() > 0 and value.shape[0] == batch and batch > 1 else value
    if isinstance(value, dict):
        return {k: _select(v, index, batch) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_select(v, index, batch) for v in value)
    return value


@torch.no_grad()
def run_prefix(model: nn.Module, decoder: Decoder, batch: Batch, first: int) -> Prefix:
    """Runs `model` on the batch up to decoder layer `first`; the layers from there on do not run."""
    caught: list[Prefix] = []
    names = ("hidden_states",)

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop(names[0])
        dropped = ("past_key_values", "past_key_value", "use_cache")
        caught.append(Prefix(hidden, {k: v for k, v in kwargs.items() if k not in dropped}, first))
        raise _Reached

    layer = get_module(model, decoder.layer_name(first))
    hook = layer.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        batch.model(**batch.inputs, use_cache=False)
    except _Reached:
        return caught[0]
    finally:
        hook.remove()
    raise RuntimeError(f"decoder layer {first} did not run")


def run_tail(model: nn.Module, decoder: Decoder, prefix: Prefix) -> Tensor:
    """[B, S, d] the decoder's output (after its final norm) from the prefix on, through the edited layers' hooks."""
    hidden = prefix.hidden
    for i in range(prefix.first, len(decoder.layers)):
        out = get_module(model, decoder.layer_name(i))(hidden, **prefix.kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
    owner = get_module(model, decoder.name)
    for name in ("final_layer_norm", "norm", "project_out"):  # OPT; LLaMA; OPT-350m
        module = getattr(owner, name, None)
        if isinstance(module, nn.Module):
            hidden = module(hidden)
    return hidden


def head(model: nn.Module, decoder: Decoder) -> nn.Module:
    """The language-model head: `lm_head` of the nearest module around the decoder that has one."""
    parts = decoder.name.split(".") if decoder.name else []
    for i in range(len(parts), -1, -1):
        module = get_module(model, ".".join(parts[:i]))
        if isinstance(getattr(module, "lm_head", None), nn.Module):
            return module.lm_head
    raise ValueError(f"no lm_head around {decoder.name!r} in {type(model).__name__}")


@contextmanager
def recorded(modules: dict[Any, nn.Module], kind: str) -> Iterator[dict[Any, Tensor]]:
    """Inside, keeps each module's newest input ("input") or output ("output") hidden states under its key, detached."""
    kept: dict[Any, Tensor] = {}
    hooks = []
    for key, module in modules.items():

        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any = None, key: Any = key) -> None:
            if kind == "input":
                value = args[0] if args else kwargs["hidden_states"]
            else:
                value = output[0] if isinstance(output, tuple) else output
            kept[key] = value.detach()

        if kind == "input":
            hooks.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        else:
            hooks.append(module.register_forward_hook(keep, with_kwargs=True))
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()
