"""Everything about a patch that can be refused or computed before the model changes."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from . import backends
from .config import UnikeConfig
from .edits import BaseFingerprint, Edits
from .fused import refuse_unless_plain
from .hooks import Runtime
from .memory import ExternalMemory, Items
from .models import Decoder, LayerSites, find_decoder, get_module, probe_weights, same_weights
from .modules import KnowledgeShift
from .neurons import ExtraNeurons
from .projections import Projections, empty_like_site
from .records import LayerPatch, PatchRecord, records
from .room import lack, refuse
from .routing import Router
from .tracker import CaseTracker
from .triton_kernels import MAX_K
from .unchanged import Table

AT_ONCE = 256  # items projected in one call; a swap projects those of the last, begun call again


@dataclass(frozen=True)
class Capacities:
    """Room in a patch's storage, None: what the edits need. Groups and items of the patch, neurons of each layer."""

    max_groups: int | None = None
    max_neurons: int | None = None
    max_items: int | None = None

    def check(self) -> None:
        """Raises ValueError unless every capacity is a number of rows."""
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"{f.name} must be a whole number from 0, or None, but got {value!r}")


def plan(
    model: nn.Module,
    edits: Edits,
    *,
    name: str,
    backend: str,
    mode: str,
    routing: str,
    layers: Sequence[int] | None,
    sites: Decoder | None,
    capacities: Capacities,
) -> tuple[Decoder, PatchRecord]:
    """The decoder as `model` names it, and all that `patch` will attach to it; arguments as there."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, but got {type(model).__name__}")
    if not isinstance(edits, Edits):
        raise TypeError(f"edits must be Edits (Edits.from_pretrained loads them), but got {type(edits).__name__}")
    _check_name(model, name)
    if backend not in backends.NAMES:
        raise ValueError(f"backend must be one of {', '.join(map(repr, backends.NAMES))}, but got {backend!r}")
    if mode not in ("attach", "fuse"):
        raise ValueError(f"mode must be 'attach' or 'fuse', but got {mode!r}")
    if routing not in ("edits", "always", "routed"):
        raise ValueError(f"routing must be 'edits', 'always' or 'routed', but got {routing!r}")
    capacities.check()
    decoder = find_decoder(model) if sites is None else sites
    holder, below = get_module(model, decoder.name), decoder.relative()
    check_edits(holder, below, edits)
    wanted = _wanted_layers(edits, layers)
    for index in wanted:
        for module in below.layers[index].module_names():
            get_module(holder, module)
        _refuse_compiled(get_module(holder, below.layer_name(index)), index)
    config = effective_config(edits, routing)
    if config.routing.mode == "routed":
        _check_routed(edits, wanted[0])
    chosen = [_resolve(holder, below.layers[i], backend, config) for i in wanted]
    planned = [
        _plan_layer(holder, below.layers[i], i, edits, config, i == wanted[0], capacities, backend) for i in wanted
    ]
    if mode == "fuse":
        for layer in planned:
            if layer.neurons is not None:
                refuse_unless_plain(holder, layer.sites, layer.index)
    runtime = Runtime(CaseTracker(name, holder))
    return decoder, PatchRecord(name, edits, config, routing, chosen[0], below, planned, runtime, mode=mode)


def plan_swap(holder: nn.Module, record: PatchRecord, edits: Edits) -> dict[int, Items]:
    """The items of the new edits by layer, once it is sure that all of them fit into the patch's storage."""
    check_edits(holder, record.decoder, edits)
    if set(edits.layers) != set(record.edits.layers):
        raise ValueError(f"the patch has edits of layers {sorted(record.edits.layers)}, not of {sorted(edits.layers)}")
    _check_same_config(record, effective_config(edits, record.routing))
    if record.config.routing.mode == "routed":
        _check_routed(edits, record.layers[0].index)
    _check_room(record, edits)
    items = {}
    for layer in record.layers:
        if layer.shift is not None:
            layer.shift.check_encoder(edits.shared[layer.index], record.edits.shared[layer.index])
            items[layer.index] = items_of(holder, layer.sites, edits, layer.index, record.config, layer.shift)
    return items


def _check_room(record: PatchRecord, edits: Edits) -> None:
    """Raises ValueError with everything that is too small, so that one patch anew is enough."""
    lacks = list[str]()
    for layer in record.layers:
        own, shared = edits.layers[layer.index], edits.shared[layer.index]
        if layer.neurons is not None:
            lacks += layer.neurons.lacks(own)
        else:
            lacks += lack(0, len(own.keys), "neurons (max_neurons at patch time)")
        if layer.router is not None and edits.calibration is not None:
            lacks += layer.router.lacks(len(edits), edits.calibration)
        if layer.shift is not None:
            items = len(shared.h_sem) + (len(own.h_sem) if record.config.shift.own_item else 0)
            lacks += layer.shift.memory.lacks(items)
    refuse(lacks)


def fingerprint(model: nn.Module, decoder: Decoder, layers: Sequence[int]) -> BaseFingerprint:
    """What edits remember of the base that they were made on: sizes from the modules, and a sampled probe."""
    at = decoder.layers[layers[0]]
    return BaseFingerprint(
        family=decoder.family,
        hidden_size=at.hidden_size,
        ffn_size=at.ffn_size,
        num_layers=len(decoder.layers),
        gated=at.gated,
        act=at.act,
        heads=at.heads,
        kv_heads=at.kv_heads,
        head_dim=at.head_dim,
        name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        probe=probe_weights(model, decoder, layers),
    )


def effective_config(edits: Edits, routing: str) -> UnikeConfig:
    """The edits' config with the routing that `patch` was asked for."""
    if routing == "edits":
        return edits.config
    return replace(edits.config, routing=replace(edits.config.routing, mode=routing))  # type: ignore[arg-type]  # checked


def check_edits(holder: nn.Module, decoder: Decoder, edits: Edits) -> None:
    """Refuses edits of another architecture; warns where the sampled weights differ."""
    edits.validate()
    if len(decoder.layers) != edits.base.num_layers:  # before any of them is looked up
        raise ValueError(
            "these edits were made on another architecture (edits, model): "
            f"num_layers: {edits.base.num_layers} and {len(decoder.layers)}"
        )
    ours = fingerprint(holder, decoder, sorted(edits.layers))
    wrong = edits.base.mismatches(ours)
    if wrong:
        raise ValueError(f"these edits were made on another architecture (edits, model): {'; '.join(wrong)}")
    if not same_weights(edits.base.probe, ours.probe):
        warnings.warn(
            "these edits were made on other weights of the same architecture (a sampled probe differs): expected for a "
            "quantised, merged or fine-tuned base, otherwise check that this is the right checkpoint",
            stacklevel=4,
        )


@torch.no_grad()
def items_of(
    holder: nn.Module,
    sites: LayerSites,
    edits: Edits,
    index: int,
    config: UnikeConfig,
    before: KnowledgeShift | None = None,
) -> Items:
    """One layer's memory in the site's dtype and on its device; its keys and values by calling the projections.

    before: has the first items already, as far as these edits and the projections are those it was loaded with.
    """
    attention, projections = get_module(holder, sites.attention), Projections(sites)
    like = empty_like_site(holder, sites.attention)
    shared, own = edits.shared[index], edits.layers[index]
    parts = (shared, own) if config.shift.own_item else (shared,)
    made_of: list[Table] = [(p.h_sem, p.h_pos) for p in parts]
    start = 0 if before is None else before.alike(made_of, attention, projections)
    start -= start % AT_ONCE  # a product of other rows beside a row may round it otherwise: as if all were made anew
    first = (start, max(0, start - len(shared.h_sem)))  # in each part
    sem, pos = (
        torch.cat([rows[at:].to(like) for at, rows in zip(first, table, strict=False)])
        for table in zip(*made_of, strict=True)
    )
    if config.shift.attention == "raw":
        return Items(sem, pos, pos, len(shared.h_sem), start, made_of)
    keys = values = pos.new_zeros(0, sites.kv_heads, sites.head_dim)
    if len(pos):
        chunks = [projections.item(attention, chunk) for chunk in pos.split(AT_ONCE)]
        keys, values = torch.cat([k for k, _ in chunks]), torch.cat([v for _, v in chunks])
    return Items(sem, keys, values, len(shared.h_sem), start, made_of)


def _check_name(model: nn.Module, name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier() or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"name must be usable as a module's name (an identifier, not 'keys'), but got {name!r}")
    taken = [record.name for _, record in records(model)]
    if name in taken:
        raise ValueError(f"a patch named {name!r} is already on this model (patches: {', '.join(taken)})")


def _wanted_layers(edits: Edits, layers: Sequence[int] | None) -> list[int]:
    if layers is None:
        return sorted(edits.layers)
    wanted = sorted(set(layers))
    missing = [i for i in wanted if i not in edits.layers]
    if missing or not wanted:
        raise ValueError(f"layers must be some of the edits' layers {sorted(edits.layers)}, but got {list(layers)}")
    return wanted


def _refuse_compiled(layer: nn.Module, index: int) -> None:
    """Raises where a part of the layer was compiled by itself: what it runs now would not know the patch."""
    for name, module in layer.named_modules():
        if module.__dict__.get("_compiled_call_impl") is not None:
            what = f"{name} of layer {index}" if name else f"layer {index}"
            raise ValueError(f"{what} was compiled in place by .compile(): patch first, then compile")


def _check_routed(edits: Edits, first: int) -> None:
    if edits.calibration is None:
        raise ValueError(
            "routing='routed' needs calibrated edits (Editor.fit calibrates), but these have no calibration"
        )
    if edits.calibration.layer != first:
        raise ValueError(
            f"routing was calibrated at layer {edits.calibration.layer}, but the first edited layer here is {first}"
        )


def _check_same_config(record: PatchRecord, new: UnikeConfig) -> None:
    """Raises ValueError where a setting that is built into the patch differs."""
    wrong = record.config.differences(new)
    if wrong:
        raise ValueError(f"swap takes edits of the same config (patch, edits): {'; '.join(wrong)}; patch again instead")


def _resolve(holder: nn.Module, sites: LayerSites, backend: str, config: UnikeConfig) -> str:
    """The backend that `backend` means at these sites; ValueError when it cannot run there."""
    like = empty_like_site(holder, sites.attention)
    chosen = backends.resolve(backend, like.device, like.dtype)
    if backend in ("triton", "cuda") and config.shift.enabled and config.shift.k > MAX_K:
        raise ValueError(
            f"backend {backend!r} retrieves at most {MAX_K} items, but these edits ask for {config.shift.k}"
        )
    return chosen


def _plan_layer(
    holder: nn.Module,
    sites: LayerSites,
    index: int,
    edits: Edits,
    config: UnikeConfig,
    first: bool,
    capacities: Capacities,
    backend: str,
) -> LayerPatch:
    layer = edits.layers[index]
    groups = len(edits) if capacities.max_groups is None else capacities.max_groups
    rows = len(layer.keys) if capacities.max_neurons is None else capacities.max_neurons
    at_ffn, at_attention = empty_like_site(holder, sites.ffn_input), empty_like_site(holder, sites.attention)
    neurons = shift = router = None
    if len(layer.keys) or rows:
        sizes = {"max_groups": groups, "max_neurons": rows}
        neurons = ExtraNeurons(layer, sites.act, config.neurons.beta, like=at_ffn, **sizes, backend=backend)
    if config.shift.enabled:
        items = items_of(holder, sites, edits, index, config)
        stored = (items.sem, items.keys, items.values)
        memory = ExternalMemory(*stored, items.shared, capacity=capacities.max_items, backend=backend)
        encoder = edits.shared[index].encoder
        act = config.encoders.activation
        shift = KnowledgeShift(config.shift, index, sites, memory, encoder, act, at_attention, backend)
        shift.follow(items, get_module(holder, sites.attention), Projections(sites))
    if first and config.routing.mode == "routed" and edits.calibration is not None:
        at = layer.h_sem.to(at_attention.device)
        router = Router.fitting(edits.calibration, config.routing, groups, at, backend)
        router.load(layer.h_sem, edits.calibration)
    return LayerPatch(index, sites, neurons, shift, router)
