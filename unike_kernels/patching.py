"""patch, unpatch, status: edits on a model, in place, by child modules and forward hooks; plan, check, then commit."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import backends
from .cases import BeginHook, CaseTracker, EndHook, LabelsHook, LegacyReorder, cases_from_ptr
from .config import UnikeConfig
from .edits import BaseFingerprint, Edits
from .explain import CaseReport, report
from .hooks import AttentionHook, FfnInputHook, FfnOutputHook, Runtime
from .memory import ExternalMemory
from .models import Decoder, LayerSites, find_decoder, get_module, probe_weights
from .modules import ExtraNeurons, KnowledgeShift, Projections, Router

RECORDS = "_unike_patches"  # {name: PatchRecord} on a patched model


@dataclass
class LayerPatch:
    """What one patch put at one decoder layer."""

    index: int
    sites: LayerSites
    neurons: ExtraNeurons | None
    shift: KnowledgeShift | None
    router: Router | None


@dataclass
class PatchRecord:
    """All that one patch put on a model, kept on the model itself (without a reference to it)."""

    name: str
    edits: Edits
    config: UnikeConfig
    backend: str
    decoder: Decoder
    layers: list[LayerPatch]
    runtime: Runtime
    hooks: list[RemovableHandle] = field(default_factory=list)
    warned: bool = False


@dataclass(frozen=True)
class SiteStatus:
    """One site of one patch: sizes in rows, tensors in bytes."""

    name: str
    module: str
    kind: str
    enabled: bool
    edits: int
    rows: int
    dtype: str
    device: str
    bytes: int
    backend: str


class Status(list[SiteStatus]):
    """What sits where on a model; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no edits on this model"
        head = ("name", "module", "kind", "on", "edits", "rows", "dtype", "device", "bytes")
        rows = [
            (s.name, s.module, s.kind, "yes" if s.enabled else "no", s.edits, s.rows, s.dtype, s.device, s.bytes)
            for s in self
        ]
        cells = [tuple(map(str, r)) for r in (head, *rows)]
        widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in cells)


def patch(
    model: nn.Module,
    edits: Edits,
    *,
    name: str = "default",
    backend: str = "auto",
    mode: str = "attach",
    routing: str = "edits",
    layers: Sequence[int] | None = None,
    sites: Decoder | None = None,
    max_groups: int | None = None,
    max_neurons: int | None = None,
    max_items: int | None = None,
) -> "PatchHandle":
    """Puts `edits` on `model`, in place, on this instance only; the model answers with the edits from the next call on.

    model: any module that holds a known decoder (`models.find_decoder`), or one described by `sites`.
    name: of this patch; patches of different names stack, in the order in which they were made.
    backend: "auto" or one of `backends.available()`. mode: "attach" (child modules and forward hooks).
    routing: "edits" (what the edits say), "always" (neurons act on every token: the paper) or "routed".
    layers: decoder layers to edit, a subset of the edits' own (default: all of those).
    max_groups, max_neurons (per layer), max_items: capacities, so that `handle.swap` can take larger edits later.

    Returns a PatchHandle; `with patch(model, edits):` undoes it at the end, also on an exception. Every check comes
    before the first change: ValueError (names, sizes, layers, another architecture), UnsupportedModelError.
    """
    plan = _plan(model, edits, name, backend, mode, routing, layers, sites, (max_groups, max_neurons, max_items))
    _commit(model, plan)
    return PatchHandle(model, plan)


def unpatch(model: nn.Module) -> None:
    """Removes every patch from `model`, which is then bit for bit the base; does nothing on a clean model."""
    for holder, record in list(_records(model)):
        _remove(holder, record)


def status(model: nn.Module) -> Status:
    """What sits where on `model`: one SiteStatus per site and patch; empty for a clean model."""
    out = Status()
    for _, record in _records(model):
        for layer in record.layers:
            for kind, module, where, rows in (
                ("shift", layer.shift, layer.sites.attention, "sem"),
                ("router", layer.router, layer.sites.attention, "keys"),
                ("neurons", layer.neurons, layer.sites.ffn_output, "keys"),
            ):
                if module is None:
                    continue
                tensors = list(module.buffers())
                main = module.memory.sem if kind == "shift" else getattr(module, rows)
                out.append(
                    SiteStatus(
                        record.name,
                        where,
                        kind,
                        record.runtime.enabled,
                        len(record.edits),
                        len(main),
                        str(main.dtype).removeprefix("torch."),
                        str(main.device),
                        sum(t.numel() * t.element_size() for t in tensors),
                        record.backend,
                    )
                )
    return out


class PatchHandle:
    """One patch on one model: switch it off, swap its edits, name cases, ask why, remove it."""

    def __init__(self, model: nn.Module, record: PatchRecord) -> None:
        self.model = model
        self.record = record

    @property
    def edits(self) -> Edits:
        """The edits on the model now."""
        return self.record.edits

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes this patch off the model; a second call does nothing."""
        for holder, record in list(_records(self.model)):
            if record is self.record:
                _remove(holder, record)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base, bit for bit. Does not reach a CUDA graph that was captured before."""
        before = self.record.runtime.enabled
        self.record.runtime.enabled = False
        try:
            yield
        finally:
            self.record.runtime.enabled = before

    def swap(self, edits: Edits) -> None:
        """Replaces the edits inside the same storage, so compiled and captured graphs stay valid.

        ValueError, and nothing changed, when they do not fit the capacities given to `patch`, or when their encoders,
        config or base differ. KV caches of before are refused at their next use.
        """
        record = self.record
        model = self._holder()
        _check_edits(model, record.decoder, edits)
        if edits.config.shift != record.edits.config.shift or edits.config.neurons.beta != record.config.neurons.beta:
            raise ValueError("swap takes edits of the same shift and beta; remove this patch and patch again instead")
        if record.config.routing.mode == "routed":
            _check_routed(edits, record.layers[0].index)
        items = {layer.index: _items(model, layer.sites, edits, layer.index, record.config) for layer in record.layers}
        for layer in record.layers:
            if layer.index not in edits.layers:
                raise ValueError(
                    f"the patch edits layer {layer.index}, but these edits have layers {list(edits.layers)}"
                )
            if layer.neurons is not None:
                layer.neurons.check(edits.layers[layer.index])
            if layer.shift is not None:
                layer.shift.memory.check(len(items[layer.index][0]))
                for (w, b), (new_w, new_b) in zip(layer.shift.encoder, edits.shared[layer.index].encoder, strict=True):
                    if not (torch.equal(w, new_w.to(w)) and torch.equal(b, new_b.to(b))):
                        raise ValueError(f"swap takes edits with the same encoders, but layer {layer.index} differs")
            if layer.router is not None and len(edits) > len(layer.router.keys):
                raise ValueError(f"room for {len(layer.router.keys)} edits (max_groups), but got {len(edits)}")
        for layer in record.layers:
            if layer.neurons is not None:
                layer.neurons.load(edits.layers[layer.index])
            if layer.shift is not None:
                layer.shift.memory.load(*items[layer.index])
            if layer.router is not None and edits.calibration is not None:
                layer.router.load(edits.layers[layer.index].h_sem, edits.calibration)
        record.edits = edits
        record.runtime.tracker.renew()

    def refresh(self) -> None:
        """Computes the memory's projected keys and values again: after an adapter was merged, switched or loaded."""
        model = self._holder()
        for layer in self.record.layers:
            if layer.shift is not None:
                layer.shift.memory.load(*_items(model, layer.sites, self.edits, layer.index, self.record.config))
        self.record.runtime.tracker.renew()

    def set_cases(
        self,
        token_to_case: Tensor | None = None,
        case_tokens: Tensor | None = None,
        *,
        case_ptr: Tensor | None = None,
    ) -> None:
        """Names the cases of packed or teacher-forced inputs, until named again; without arguments they are found.

        token_to_case: [T] int64 for the T flattened tokens of a pass, -1 for padding; case_tokens: [C] int64, the row
        of each case's case token, -1 for a case decided in an earlier pass. Or, for packed cases that end at their
        case token, the CSR form case_ptr [C + 1].
        """
        if case_ptr is not None:
            if token_to_case is not None or case_tokens is not None:
                raise ValueError("give case_ptr, or token_to_case and case_tokens, not both")
            token_to_case, case_tokens = cases_from_ptr(case_ptr)
        self.record.runtime.tracker.name_cases(token_to_case, case_tokens)

    @contextlib.contextmanager
    def choosing(self, edit_ids: Sequence[str | None | Sequence[str]]) -> Iterator[None]:
        """Inside, the cases of every prompt are served with the edits named here, whatever the routing would say.

        edit_ids: one entry per case: an id, several ids, or None for the base model's answer, bit for bit.
        """
        rows = [[] if e is None else [e] if isinstance(e, str) else list(e) for e in edit_ids]
        known = {name: i for i, name in enumerate(self.edits.ids)}
        unknown = sorted({e for row in rows for e in row if e not in known})
        if unknown:
            raise ValueError(f"no edits {', '.join(unknown)} on this model; there are: {', '.join(known) or 'none'}")
        width = max([1, *map(len, rows)])
        chosen = torch.tensor([[known[e] for e in row] + [-1] * (width - len(row)) for row in rows])
        tracker = self.record.runtime.tracker
        before, tracker.chosen = tracker.chosen, chosen.reshape(len(rows), width)
        try:
            yield
        finally:
            tracker.chosen = before

    def explain(self, **inputs: object) -> list[CaseReport]:
        """Per case: the edits that act, and per layer the items retrieved with their cosines, and alpha.

        inputs: what the model's forward takes (a prompt, not a prompt with its answer, unless cases are named).
        """
        with torch.no_grad():
            self.model(**inputs)
        cases = self.record.runtime.tracker.current
        if cases is None:
            raise RuntimeError("the model's decoder did not run")
        return report(cases, self.edits)

    def _holder(self) -> nn.Module:
        for holder, record in _records(self.model):
            if record is self.record:
                return holder
        raise ValueError(f"patch {self.record.name!r} is no longer on the model")


class _SaveWarning:
    """State-dict pre-hook: says once that the base is what gets saved."""

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


def fingerprint(model: nn.Module, decoder: Decoder, layers: Sequence[int]) -> BaseFingerprint:
    """What edits remember of the base that they were made on: sizes from the modules, and a sampled probe."""
    at = decoder.layers[layers[0]]
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return BaseFingerprint(
        decoder.family,
        at.hidden_size,
        at.ffn_size,
        len(decoder.layers),
        at.gated,
        at.act,
        at.heads,
        at.kv_heads,
        at.head_dim,
        name,
        probe_weights(model, decoder, layers),
    )


def _records(model: nn.Module) -> Iterator[tuple[nn.Module, PatchRecord]]:
    for module in model.modules():
        for record in module.__dict__.get(RECORDS, {}).values():
            yield module, record


def _plan(
    model: nn.Module,
    edits: Edits,
    name: str,
    backend: str,
    mode: str,
    routing: str,
    layers: Sequence[int] | None,
    sites: Decoder | None,
    capacities: tuple[int | None, int | None, int | None],
) -> PatchRecord:
    """Everything that can be refused or computed before the model changes."""
    if not name.isidentifier():
        raise ValueError(f"name must be an identifier (it becomes a module's name), but got {name!r}")
    taken = [record.name for _, record in _records(model)]
    if name in taken:
        raise ValueError(f"a patch named {name!r} is already on this model (patches: {', '.join(taken)})")
    if mode != "attach":
        raise ValueError(f"mode must be 'attach', but got {mode!r}")
    if routing not in ("edits", "always", "routed"):
        raise ValueError(f"routing must be 'edits', 'always' or 'routed', but got {routing!r}")
    chosen = backends.resolve(backend)
    decoder = find_decoder(model) if sites is None else sites
    _check_edits(model, decoder, edits)
    config = edits.config
    if routing != "edits":
        config = replace(config, routing=replace(config.routing, mode=routing))
    wanted = sorted(edits.layers) if layers is None else sorted(set(layers))
    missing = [i for i in wanted if i not in edits.layers]
    if missing or not wanted:
        raise ValueError(
            f"layers {missing or list(layers or ())} are not among the edits' layers {sorted(edits.layers)}"
        )
    routed = config.routing.mode == "routed"
    if routed:
        _check_routed(edits, wanted[0])
    runtime = Runtime(CaseTracker(name, get_module(model, decoder.name)))
    planned = [
        _plan_layer(model, decoder.layers[i], i, edits, config, routed and i == wanted[0], capacities) for i in wanted
    ]
    return PatchRecord(name, edits, config, chosen, decoder, planned, runtime)


def _check_edits(model: nn.Module, decoder: Decoder, edits: Edits) -> None:
    """Refuses edits of another architecture; warns where the sampled weights differ."""
    edits.validate()
    ours = fingerprint(model, decoder, sorted(edits.layers))
    wrong = edits.base.mismatches(ours)
    if wrong:
        raise ValueError(f"these edits were made on another architecture (edits, model): {'; '.join(wrong)}")
    if ours.probe and not edits.base.same_probe(ours):
        warnings.warn(
            "these edits were made on other weights of the same architecture (a sampled probe differs): expected for a "
            "quantised, merged or fine-tuned base, otherwise check that this is the right checkpoint",
            stacklevel=4,
        )


def _check_routed(edits: Edits, first: int) -> None:
    if edits.calibration is None:
        raise ValueError(
            "routing='routed' needs calibrated edits (Editor.fit calibrates), but these have no calibration"
        )
    if edits.calibration.layer != first:
        raise ValueError(
            f"routing was calibrated at layer {edits.calibration.layer}, but the first edited layer here is {first}"
        )


def _like(module: nn.Module) -> Tensor:
    """A zero-size tensor of the dtype and device that a site computes in."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
    offload = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if offload is None:
        for child in module.modules():
            offload = getattr(getattr(child, "_hf_hook", None), "execution_device", None)
            if offload is not None:
                break
    device = offload if offload is not None else next(module.parameters()).device
    return torch.empty(0, dtype=dtype, device=device)


def _plan_layer(
    model: nn.Module,
    sites: LayerSites,
    index: int,
    edits: Edits,
    config: UnikeConfig,
    routes: bool,
    capacities: tuple[int | None, int | None, int | None],
) -> LayerPatch:
    max_groups, max_neurons, max_items = capacities
    layer = edits.layers[index]
    groups = len(edits) if max_groups is None else max_groups
    ffn_like = _like(get_module(model, sites.ffn_input))
    att_like = _like(get_module(model, sites.attention))
    neurons = shift = router = None
    if len(layer.keys) or max_neurons:
        neurons = ExtraNeurons(
            layer,
            sites.act,
            config.neurons.beta,
            like=ffn_like,
            max_groups=groups,
            max_neurons=len(layer.keys) if max_neurons is None else max_neurons,
        )
    if config.shift.enabled:
        items = _items(model, sites, edits, index, config)
        memory = ExternalMemory(*items, capacity=max_items)
        encoder = edits.shared[index].encoder
        shift = KnowledgeShift(config.shift, index, sites, memory, encoder, config.encoders.activation, att_like)
    if routes and edits.calibration is not None:
        router = Router(config.routing, groups, layer.h_sem.to(att_like.device))
        if len(edits) > groups:
            raise ValueError(f"room for {groups} edits (max_groups at patch time), but got {len(edits)}")
        router.load(layer.h_sem, edits.calibration)
    return LayerPatch(index, sites, neurons, shift, router)


@torch.no_grad()
def _items(
    model: nn.Module, sites: LayerSites, edits: Edits, index: int, config: UnikeConfig
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(h_sem, keys, values, number shared) of one layer's memory, in the site's dtype and on its device."""
    attention = get_module(model, sites.attention)
    like = _like(attention)
    shared, layer = edits.shared[index], edits.layers[index]
    own = config.shift.own_item
    sem = torch.cat([shared.h_sem, layer.h_sem]) if own else shared.h_sem
    pos = torch.cat([shared.h_pos, layer.h_pos]) if own else shared.h_pos
    sem, pos = sem.to(like), pos.to(like)
    if config.shift.attention == "raw":
        return sem, pos, pos, len(shared.h_sem)
    projections = Projections(sites)
    parts = [projections.item(attention, part) for part in pos.split(4096)] if len(pos) else []
    empty = pos.new_zeros(0, sites.kv_heads, sites.head_dim)
    keys = torch.cat([empty, *(k for k, _ in parts)])
    values = torch.cat([empty, *(v for _, v in parts)])
    return sem, keys, values, len(shared.h_sem)


def _commit(model: nn.Module, record: PatchRecord) -> None:
    """Attaches children and hooks; anything that fails undoes what was done."""
    try:
        for layer in record.layers:
            for site, children in (
                (layer.sites.attention, {"router": layer.router, "shift": layer.shift}),
                (layer.sites.ffn_output, {"neurons": layer.neurons}),
            ):
                _attach(get_module(model, site), record.name, {k: m for k, m in children.items() if m is not None})
            _hook_layer(model, record, layer)
        _hook_decoder(model, record)
        record.hooks.append(model.register_state_dict_pre_hook(_SaveWarning(record)))
        model.__dict__.setdefault(RECORDS, {})[record.name] = record
    except BaseException:
        _remove(model, record)
        raise


def _attach(site: nn.Module, name: str, children: dict[str, nn.Module]) -> None:
    if not children:
        return
    if not hasattr(site, "unike"):
        site.add_module("unike", nn.ModuleDict())
    group = nn.ModuleDict(children)
    group.train(site.training)
    site.unike[name] = group


def _hook_layer(model: nn.Module, record: PatchRecord, layer: LayerPatch) -> None:
    runtime, sites = record.runtime, layer.sites
    if layer.router is not None or layer.shift is not None:
        hook = AttentionHook(runtime, layer.router, layer.shift, Projections(sites))
        record.hooks.append(get_module(model, sites.attention).register_forward_hook(hook, with_kwargs=True))
    if layer.neurons is not None:
        source = None
        if sites.ffn_input != sites.ffn_output:
            source = FfnInputHook(runtime)
            record.hooks.append(get_module(model, sites.ffn_input).register_forward_pre_hook(source, with_kwargs=True))
        out = FfnOutputHook(runtime, layer.neurons, source, record.config.shift.positions)
        record.hooks.append(get_module(model, sites.ffn_output).register_forward_hook(out, with_kwargs=True))


def _hook_decoder(model: nn.Module, record: PatchRecord) -> None:
    tracker, parts = record.runtime.tracker, record.decoder.name.split(".")
    around = [model] + [get_module(model, ".".join(parts[:i])) for i in range(1, len(parts))]
    for module in around:
        record.hooks.append(module.register_forward_pre_hook(LabelsHook(tracker, module), with_kwargs=True))
        reorder = inspect.getattr_static(type(module), "_reorder_cache", None)
        if isinstance(reorder, staticmethod):  # tuple caches, transformers < 4.48
            module.__dict__["_reorder_cache"] = LegacyReorder(reorder.__func__, tracker)
    decoder = get_module(model, record.decoder.name)
    record.hooks.append(decoder.register_forward_pre_hook(BeginHook(tracker), with_kwargs=True))
    record.hooks.append(decoder.register_forward_hook(EndHook(tracker)))


def _remove(model: nn.Module, record: PatchRecord) -> None:
    for hook in record.hooks:
        hook.remove()
    record.hooks.clear()
    for layer in record.layers:
        for site in {layer.sites.attention, layer.sites.ffn_output}:
            module = get_module(model, site)
            container = getattr(module, "unike", None)
            if container is not None and record.name in container:
                del container[record.name]
                if len(container) == 0:
                    del module.unike
    for module in model.modules():
        reorder = module.__dict__.get("_reorder_cache")
        if isinstance(reorder, LegacyReorder) and reorder.tracker is record.runtime.tracker:
            del module.__dict__["_reorder_cache"]
    records = model.__dict__.get(RECORDS, {})
    records.pop(record.name, None)
    if not records:
        model.__dict__.pop(RECORDS, None)
