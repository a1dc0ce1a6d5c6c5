"""Putting a planned patch on a model, and taking it off: child modules, forward hooks, and what `fused` adds."""

import inspect
import warnings
from typing import Any

from torch import nn

from .caches import LegacyReorder
from .forwards import HookHandle, hook_after, hook_before, hooks_before
from .fused import FusedFfn
from .hooks import (
    AttentionHook,
    AttentionInputHook,
    AttentionSite,
    BeginHook,
    EndHook,
    FfnInputHook,
    FfnOutputHook,
    HeadsHook,
    QueryHook,
)
from .labels import LabelsDoneHook, LabelsHook
from .models import Decoder, base_layer, get_module
from .projections import Projections
from .records import CONTAINER, RECORDS, LayerPatch, PatchRecord

# Dynamo does not look whether a module without hooks has got some since, but it does guard on which attributes a
# decoder layer has by itself. These, of the same value as in the class, make it compile a model anew that was compiled
# before its patch: the first where `__call__` of a layer asks for checkpointing (transformers 5.17), the second where
# `forward` does (5.23).
MARKS = {"_compiled_call_impl": None, "gradient_checkpointing": False}


class SaveWarning:
    """State-dict pre-hook on the decoder: says once that the base alone is what gets saved."""

    def __init__(self, record: PatchRecord) -> None:
        self.record = record

    def __call__(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not self.record.warned:
            self.record.warned = True
            warnings.warn(
                f"this model carries edits (patch {self.record.name!r}); its state_dict is the base model alone. "
                "Save the edits with edits.save_pretrained(path)",
                stacklevel=3,
            )


def attach(model: nn.Module, decoder: Decoder, record: PatchRecord) -> None:
    """Attaches children and hooks; where anything fails, all that was done is undone. decoder: as `model` names it."""
    holder = get_module(model, decoder.name)
    try:
        for layer in record.layers:
            _attach_layer(holder, record, layer)
            marked = get_module(holder, record.decoder.layer_name(layer.index))
            for name, value in MARKS.items():
                if getattr(type(marked), name, ...) is value:
                    marked.__dict__.setdefault(name, value)
        path = decoder.name.split(".") if decoder.name else []
        for i in range(len(path)):
            _hook_around(get_module(model, ".".join(path[:i])), record)
        keep = record.hooks.append  # one by one: what is registered must be known if the next one fails
        keep(hook_before(holder, BeginHook(record.runtime), watched=True))
        keep(hook_after(holder, EndHook(record.runtime), watched=True))
        own = {id(hook.forward): hook.forward for hook in record.hooks if isinstance(hook, HookHandle)}
        record.runtime.forwards = list(own.values())
        keep(holder.register_state_dict_pre_hook(SaveWarning(record)))
        holder.__dict__.setdefault(RECORDS, {})[record.name] = record
    except BaseException:
        detach(model, holder, record)
        raise


def detach(model: nn.Module, holder: nn.Module, record: PatchRecord) -> None:
    """Takes the patch off again. model: what the decoder `holder` is in, or the decoder itself."""
    for hook in record.hooks:
        hook.remove()
    record.hooks.clear()
    record.runtime.forwards.clear()
    record.runtime.hooked.clear()
    for fused in record.fused:
        fused.leave()
    record.fused.clear()
    for left in record.runtime.sites:
        left.leave()
    record.runtime.sites.clear()
    record.runtime.tracker.renew()  # compiled code asks no more of a KV cache than whether its decisions are live
    for site in list(holder.modules()):  # not by name: an adapter may have wrapped a site since
        container = site._modules.get(CONTAINER)
        if isinstance(container, nn.ModuleDict) and record.name in container:
            del container[record.name]
            if len(container) == 0:
                del site._modules[CONTAINER]
    for module in model.modules():
        reorder = module.__dict__.get("_reorder_cache")
        if isinstance(reorder, LegacyReorder):
            reorder.trackers = [t for t in reorder.trackers if t is not record.runtime.tracker]
            if not reorder.trackers:
                del module.__dict__["_reorder_cache"]
    kept = holder.__dict__.get(RECORDS, {})
    if kept.get(record.name) is record:
        del kept[record.name]
    if not kept:
        holder.__dict__.pop(RECORDS, None)
        for module in holder.modules():
            for name, value in MARKS.items():
                if module.__dict__.get(name, ...) is value and getattr(type(module), name, ...) is value:
                    del module.__dict__[name]


def _attach_layer(holder: nn.Module, record: PatchRecord, layer: LayerPatch) -> None:
    runtime, sites = record.runtime, layer.sites
    if layer.router is not None or layer.shift is not None:
        attention = get_module(holder, sites.attention)
        runtime.hooked.append((sites.attention, attention))
        _add(attention, record.name, {"router": layer.router, "shift": layer.shift})
        site = AttentionSite(runtime, layer.router, layer.shift, Projections(sites))
        there = [hook for hook in hooks_before(attention) if isinstance(hook, AttentionInputHook)]
        if there:
            site.join(there[0].site.queue)
        runtime.sites.append(site)
        record.hooks.append(hook_before(attention, AttentionInputHook(site), watched=True))
        if layer.shift is not None and layer.shift.config.attention == "projected":
            q_proj, out_proj = get_module(holder, sites.q_proj), get_module(holder, sites.out_proj)
            record.hooks.append(hook_after(q_proj, QueryHook(site)))
            record.hooks.append(hook_before(out_proj, HeadsHook(site)))
        record.hooks.append(hook_after(attention, AttentionHook(site), watched=True))
    if layer.neurons is not None:
        # Below an adapter that wraps the module: it calls its base layer, and may leave without notice.
        first, last = (base_layer(get_module(holder, name)) for name in (sites.ffn_input, sites.ffn_output))
        runtime.hooked += [(sites.ffn_input, first), (sites.ffn_output, last)]
        _add(last, record.name, {"neurons": layer.neurons})
        source, fuse = None, record.mode == "fuse"
        if first is not last:
            source = FfnInputHook(runtime)
            record.hooks.append(hook_before(first, source, torchs=fuse))
        out = FfnOutputHook(runtime, layer.neurons, source, record.config.shift.positions)
        if fuse:
            out.fused = FusedFfn(holder, sites, runtime, layer.neurons)
            record.fused.append(out.fused)
            out.fused.enter()
        record.hooks.append(hook_after(last, out, torchs=fuse))


def _add(site: nn.Module, name: str, children: dict[str, Any]) -> None:
    group = nn.ModuleDict({kind: module for kind, module in children.items() if module is not None})
    group.train(site.training)
    if CONTAINER not in site._modules:
        site.add_module(CONTAINER, nn.ModuleDict().train(site.training))
    container: Any = site._modules[CONTAINER]
    container[name] = group


def _hook_around(module: nn.Module, record: PatchRecord) -> None:
    """On a module around the decoder: its labels tell where the prompts end."""
    tracker = record.runtime.tracker
    labels = LabelsHook(tracker, module)
    record.hooks.append(hook_before(module, labels, watched=True))
    record.hooks.append(hook_after(module, LabelsDoneHook(labels), watched=True))
    if "_reorder_cache" not in module.__dict__:  # tuple caches, transformers < 4.48
        reorder = inspect.getattr_static(type(module), "_reorder_cache", None)
        if not isinstance(reorder, staticmethod):
            return
        module.__dict__["_reorder_cache"] = LegacyReorder(reorder.__func__)
    legacy = module.__dict__["_reorder_cache"]
    if isinstance(legacy, LegacyReorder):
        legacy.trackers.append(tracker)
