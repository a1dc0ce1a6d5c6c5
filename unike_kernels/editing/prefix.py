"""Only the edited layers depend on an edit: run the layers below once, the edited layers alone many times."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cases import Cases, CaseState
from ..hooks import hidden_states_of
from ..models import Decoder, get_module
from ..patching import PatchHandle
from .inputs import Batch


class _Reached(Exception):
    """The module to stop at was called; nothing after it needs to run."""


@dataclass
class Prefix:
    """What enters layer `first`, hidden states [B, S, d], and the other arguments of every layer from there on."""

    hidden: Tensor
    calls: dict[int, tuple[tuple, dict[str, Any]]]  # by layer, since masks and rotations may differ between layers
    first: int


@torch.no_grad()
def run_until(batch: Batch, module: nn.Module) -> None:
    """Runs the batch's model until `module` is about to run; nothing from there on runs."""

    def stop(module: nn.Module, args: tuple) -> None:
        raise _Reached

    hook = module.register_forward_pre_hook(stop)
    try:
        batch.model(**batch.inputs, use_cache=False)
    except _Reached:
        return
    finally:
        hook.remove()
    raise RuntimeError(f"{type(batch.model).__name__} did not run its {type(module).__name__}")


def run_prefix(model: nn.Module, decoder: Decoder, batch: Batch, first: int) -> Prefix:
    """Runs the batch's model below decoder layer `first`; `model` is what `decoder`'s names start from."""
    indices = range(first, len(decoder.layers))
    layers = {i: get_module(model, decoder.layer_name(i)) for i in indices}
    calls: dict[int, tuple[tuple, dict[str, Any]]] = {}
    hooks = []
    with recorded({first: layers[first]}, "input") as hidden:
        for i, layer in layers.items():

            def keep(module: nn.Module, args: tuple, kwargs: dict, i: int = i) -> None:
                dropped = ("hidden_states", "cache", "past_key_values", "past_key_value", "use_cache")
                calls[i] = (args[1:], {k: v for k, v in kwargs.items() if k not in dropped})

            hooks.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
        try:
            run_until(batch, layers[indices[-1]])  # each layer's arguments are known only when it is called
        finally:
            for hook in hooks:
                hook.remove()
    return Prefix(hidden[first], calls, first)


def run_tail(
    model: nn.Module,
    decoder: Decoder,
    prefix: Prefix,
    around: Callable[[int], AbstractContextManager[None]] = lambda index: nullcontext(),
) -> Tensor:
    """[B, S, d] the decoder's output (after its final norm) from the prefix on, through the edited layers' hooks.

    around: what is entered while the layer of this index runs.
    """
    hidden = prefix.hidden
    for i, (args, kwargs) in sorted(prefix.calls.items()):
        with around(i):
            out = get_module(model, decoder.layer_name(i))(hidden, *args, **kwargs)
        hidden = out[0] if isinstance(out, tuple) else out
    owner = get_module(model, decoder.name)
    for name in ("final_layer_norm", "layer_norm", "norm", "project_out"):  # OPT; XGLM; LLaMA; OPT-350m
        module = getattr(owner, name, None)
        if isinstance(module, nn.Module):
            hidden = module(hidden)
    return hidden


def head(model: nn.Module, decoder: Decoder) -> nn.Module:
    """The language-model head: `lm_head` of the nearest module around the decoder that has one."""
    return _with_head(model, decoder).lm_head


def _with_head(model: nn.Module, decoder: Decoder) -> nn.Module:
    parts = decoder.name.split(".") if decoder.name else []
    for i in range(len(parts), -1, -1):
        module = get_module(model, ".".join(parts[:i]))
        if isinstance(getattr(module, "lm_head", None), nn.Module):
            return module
    raise ValueError(f"no lm_head around {decoder.name!r} in {type(model).__name__}")


def logits_step(model: nn.Module, decoder: Decoder) -> Callable[[Tensor], Tensor]:
    """What the model makes of the decoder's output [..., d]: the head's logits [..., V], scaled as the model's own are.

    Granite divides them, Cohere multiplies them, Gemma 2 caps them softly: its loss and margins are of what comes out.
    """
    owner = _with_head(model, decoder)
    config: Any = getattr(owner, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def step(hidden: Tensor) -> Tensor:
        logits = owner.lm_head(hidden)
        logits = logits if scale == 1.0 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return step


@contextmanager
def cases_named(handle: PatchHandle, batch: Batch, selected: Tensor | None = None) -> Iterator[Cases]:
    """Inside, a patch knows the cases of a teacher-forced batch whose layers run without their decoder.

    selected [B, m]: the groups that act on each case, -1 padded; None leaves it to the patch. Every entry is a new
    pass: nothing that was decided before is kept. Padding counts as its row's case: no token looks at it, and cases of
    one length are attended to in one batch.
    """
    tracker, (b, s) = handle.record.runtime.tracker, batch.shape
    state = CaseState(tracker.version, b, selected=selected, chosen=selected is not None)
    rows = torch.arange(b, device=batch.case_position.device).repeat_interleave(s)
    tracker.current = Cases(rows, batch.case_rows(), state, fresh=True)
    try:
        yield tracker.current
    finally:
        tracker.current = None


@contextmanager
def recorded(modules: dict[Any, nn.Module], kind: str) -> Iterator[dict[Any, Tensor]]:
    """Inside, keeps each module's newest input ("input") or output ("output") hidden states under its key, detached."""
    kept: dict[Any, Tensor] = {}
    hooks = []
    for key, module in modules.items():

        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Any = None, key: Any = key) -> None:
            if kind == "input":
                value = hidden_states_of(args, kwargs)
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
