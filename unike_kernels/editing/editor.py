"""Editor: from triplets and requests to Edits, on any supported model; the base model is never written."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..config import UnikeConfig
from ..edits import Calibration, EditEntry, Edits, LayerEdits, LayerShared
from ..models import find_decoder, get_module
from ..modules import Projections
from ..patching import PatchHandle, fingerprint, patch, status
from .disentangle import LayerFit, fit_layer
from .extract import Extraction, TripletStates, image_digest, last_rows, tap_rows
from .inputs import Collator, Sample
from .prefix import run_prefix
from .train import GroupTrainer, TrainedGroups

EDITOR_PATCH = "unike_editor"  # the patch that carries edits while they train


@dataclass
class Request:
    """One edit asked for."""

    id: str
    prompt: str
    target: str
    image: Any


class Editor:
    """Makes edits of one model: `build_memory`, `fit`, then `edit` as often as wanted.

    model: a transformers multimodal or language model (or `MiniGPT4`); processor: its processor (or tokenizer);
    prompts are what the model would be asked, template included. The base model stays as it is, whatever happens.
    """

    def __init__(self, model: nn.Module, processor: Any, config: UnikeConfig | None = None) -> None:
        self.model = model
        self.config = config or UnikeConfig()
        self.decoder = find_decoder(model)
        layers = self.config.layers or self.decoder.default_layers()
        beyond = [i for i in layers if not 0 <= i < len(self.decoder.layers)]
        if beyond or not layers:
            raise ValueError(f"layers {list(layers)} must be in [0, {len(self.decoder.layers)})")
        self.layers = tuple(sorted(layers))
        self.collator = Collator(model, processor)
        self.triplets: list[dict[str, Any]] = []
        self.states: TripletStates | None = None
        self.fits: dict[int, LayerFit] = {}
        self.cases: Tensor | None = None  # [M, d] case tokens that calibrate routing

    def build_memory(
        self,
        triplets: Sequence[dict[str, Any]],
        *,
        cache: str | Path | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> TripletStates:
        """Runs the base model over triplets (dicts: prompt, target, image: optional, prediction: optional).

        Predictions that are not given are generated; triplets that the model already answers right are left out of
        the memory (they still calibrate routing). cache: a folder where a stopped run goes on.
        Raises ValueError when nothing is left: the memory holds what the model does not know.
        """
        _check_samples(triplets, "triplet")
        with self._clean():
            extraction = Extraction(
                self.collator, self.decoder, self.layers, batch_size=batch_size, cache=cache, progress=progress
            )
            states = extraction.run(triplets)
        if not states.kept:
            raise ValueError(
                f"the model answers all {len(triplets)} triplets right; a memory needs some that it does not"
            )
        self.triplets, self.states, self.fits = list(triplets), states, {}
        self.cases = states.cases
        return states

    def fit(self) -> dict[int, LayerFit]:
        """Fits Enc_sem, Enc_tru, zeta and W_zeta of every edited layer on the memory's triplets; reports by layer.

        With `projected` attention Enc_sem's inputs are what a single item would inject, out_proj(v_proj(h_pos)); with
        `raw`, h_pos itself (spec, section 2).
        """
        states = self._need_states()
        groups = [" ".join(self.triplets[i]["target"].lower().split()) for i in states.kept]
        for i in self.layers:
            s = states.layers[i]
            anchors = s.h_att if self.config.encoders.anchor == "h_att" else s.h_sem
            pos, neg = self._injected(i, s.h_pos), self._injected(i, s.h_neg)
            self.fits[i] = fit_layer(anchors, pos, neg, s.h_pos, s.h_neg, groups, self.config.encoders)
        if self.config.encoders.w_zeta == "trained":
            self._train_maps(states)
        return self.fits

    def _train_maps(self, states: TripletStates) -> None:
        """W_zeta learned over training-split edits: shared by all of them, frozen afterwards (spec, section 2)."""
        step = max(1, len(states.kept) // self.config.encoders.w_zeta_edits)
        chosen = [self.triplets[i] for i in states.kept[::step]][: self.config.encoders.w_zeta_edits]
        requests = self._requests([{k: t.get(k) for k in ("prompt", "target", "image")} for t in chosen], None)
        d = states.cases.shape[1]
        maps = {i: torch.zeros(d, d, device=self.collator.device).requires_grad_() for i in self.layers}
        empty = self._empty(None)
        with self._clean():
            for chunk in self._chunks(requests, self.config.neurons.batch_size):
                self._train(empty, chunk, True, maps)
        for i, w in maps.items():
            w_zeta = w.detach().cpu()
            self.fits[i] = replace(self.fits[i], w_zeta=w_zeta, zeta_prime=w_zeta @ self.fits[i].zeta)

    def calibrate(self, cases: Sequence[dict[str, Any]], *, batch_size: int = 64) -> None:
        """Adds cases (dicts: prompt, image: optional) of the training split that no edit should claim, for routing."""
        states = self._need_states()
        samples = [Sample(c["prompt"], None, c.get("image")) for c in cases]
        found = torch.zeros(len(samples), states.cases.shape[1])
        with self._clean():
            for batch in self.collator.batches(samples, batch_size):
                (case,) = tap_rows(self.model, self.decoder, self.layers[:1], batch, [batch.case_rows()])
                found[batch.rows] = case["tap"][self.layers[0]].float().cpu()
        self.cases = torch.cat([states.cases, found])

    def edit(
        self,
        requests: Sequence[dict[str, Any]],
        *,
        onto: Edits | None = None,
        independent: bool | None = None,
        progress: bool = True,
    ) -> Edits:
        """Edits for `requests` (dicts: prompt, target, image: optional, id: optional), one group of neurons each.

        onto: edits of this editor to add to. independent: train every request from the base alone, in batches (the
        default when routed); otherwise one after another, all earlier groups active (the paper's sequential editing).
        Of two requests with the same image and prompt the newer replaces the older. A request whose target is not
        reached is kept, flagged (`success`) and warned about. The model is the base again afterwards.
        """
        _check_samples(requests, "request")
        wanted = self._requests(requests, onto)
        independent = self.config.routing.mode == "routed" if independent is None else independent
        edits = self._empty(onto)
        with self._clean():
            size = self.config.neurons.batch_size if independent else 1
            bar = tqdm(total=len(wanted), desc="edits", unit="edit", disable=not progress)
            for chunk in self._chunks(wanted, size):
                edits = self._append(edits, chunk, independent)
                bar.update(len(chunk))
            bar.close()
        missed = [e.id for e in edits.entries if not e.success]
        if missed and self.config.neurons.enabled:
            warnings.warn(
                f"{len(missed)} of {len(edits)} edits miss their target: {', '.join(missed[:10])}", stacklevel=2
            )
        order = {r.id: i for i, r in enumerate(wanted)}
        kept = [] if onto is None else [i for i in edits.ids if i not in order]
        return edits.select(kept + [r.id for r in wanted])

    def check(self, edits: Edits, probes: Sequence[dict[str, Any]], *, routing: str = "edits") -> Any:
        """The five metrics on the user's own probes, all `edits` active: see `evaluation.protocols.check`.

        probes: dicts with kind ("rel", "t_gen", "m_gen", "t_loc" or "m_loc"), prompt, target, image: optional.
        """
        from ..evaluation.protocols import check

        with self._clean():
            return check(self.collator, self.decoder, self.model, edits, probes, routing=routing)

    @staticmethod
    def _chunks(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
        """Requests in batches of at most `size`; one batch has pictures, or none, so that it can share its inputs."""
        for at in range(0, len(requests), size):
            part = requests[at : at + size]
            for has_image in (True, False):
                chunk = [r for r in part if (r.image is not None) is has_image]
                if chunk:
                    yield chunk

    def _append(self, edits: Edits, requests: list[Request], independent: bool) -> Edits:
        """`edits` with one more group per request, trained where neurons are wanted."""
        grown, trained = self._train(edits, requests, independent)
        return grown if trained is None else with_neurons(grown, edits, trained, requests)

    def _train(
        self, edits: Edits, requests: list[Request], independent: bool, maps: dict[int, Tensor] | None = None
    ) -> tuple[Edits, TrainedGroups | None]:
        """States of the requests' own items, then their neurons trained on a patch; `maps`: W_zeta to learn along."""
        samples = [Sample(r.prompt, r.target, r.image) for r in requests]
        batch = self.collator.batch(samples, list(range(len(samples))))
        own = self.own_items(samples)
        grown = extend(edits, requests, own, self.layers, self.config, self.decoder.layers[0].gated)
        if not self.config.neurons.enabled:
            return grown, None
        fits, states = self.fits, self._need_states()
        zeta = {i: fits[i].zeta_prime if i in fits else torch.zeros_like(states.ffn_mean[i]) for i in self.layers}
        if maps is not None:
            zeta = {i: fits[i].zeta for i in self.layers}
        capacity = max(len(grown.layers[i].keys) for i in self.layers) + self.config.neurons.per_layer * len(requests)
        with self.training_patch(grown, capacity) as handle:
            for layer in handle.record.layers:
                assert layer.neurons is not None
                layer.neurons.group_ptr.copy_(
                    pointers(edits.layers[layer.index], len(requests), self.config.neurons.per_layer)
                )
            prefix = run_prefix(self.model, self.decoder, batch, self.layers[0])
            trainer = GroupTrainer(
                self.model,
                self.decoder,
                handle,
                self.config.neurons,
                states.ffn_mean,
                zeta,
                independent=independent,
                maps=maps,
                lr_maps=self.config.encoders.lr_w_zeta,
            )
            return grown, trainer.train(batch, prefix, edits.layers)

    def own_items(self, samples: Sequence[Sample]) -> dict[int, tuple[Tensor, Tensor]]:
        """(h_sem [E, d], h_pos [E, d]) by layer: the memory items that E edits store of themselves; may be overridden."""
        batch = self.collator.batch(samples, list(range(len(samples))), eos=False)
        case, last = tap_rows(self.model, self.decoder, self.layers, batch, [batch.case_rows(), last_rows(batch)])
        return {i: (case["tap"][i].float().cpu(), last["tap"][i].float().cpu()) for i in self.layers}

    def training_patch(self, edits: Edits, max_neurons: int) -> PatchHandle:
        """The patch that carries `edits` while its newest groups train, room for `max_neurons` a layer; may be overridden."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the base is this very model
            return patch(self.model, edits, name=EDITOR_PATCH, routing="always", max_neurons=max_neurons)

    @torch.no_grad()
    def _injected(self, layer: int, h_pos: Tensor) -> Tensor:
        """[N, d] what a memory of the one item h_pos would inject at this layer: Enc_sem's inputs."""
        if self.config.shift.attention == "raw":
            return h_pos
        sites = self.decoder.layers[layer]
        attention, projections = get_module(self.model, sites.attention), Projections(sites)
        parameter = next(attention.parameters())
        out = []
        for part in h_pos.split(1024):
            _, v = projections.item(attention, part.to(parameter))
            heads = v.repeat_interleave(sites.heads // sites.kv_heads, dim=1)  # grouped-query heads as the layer does
            out.append(projections.output(attention, heads.flatten(1)).float().cpu())
        return torch.cat(out)

    def _requests(self, requests: Sequence[dict[str, Any]], onto: Edits | None) -> list[Request]:
        """Requests with ids; of several with one image and prompt the last one, said in a warning."""
        latest: dict[tuple[str | None, str], Request] = {}
        for r in requests:
            image = r.get("image")
            key = (image_digest(image), r["prompt"])
            made = f"{image_digest(torch.tensor(list(repr((key, r['target'])).encode()), dtype=torch.uint8))}"[:12]
            new = Request(str(r.get("id") or made), r["prompt"], r["target"], image)
            if key in latest:
                warnings.warn(f"request {new.id!r} replaces {latest[key].id!r}: same image and prompt", stacklevel=3)
                del latest[key]
            latest[key] = new
        ids = [r.id for r in latest.values()]
        twice = sorted({i for i in ids if ids.count(i) > 1})
        taken = [] if onto is None else sorted(set(ids) & set(onto.ids))
        if twice or taken:
            raise ValueError(f"edit ids must be unique, but {twice or taken} appear twice")
        return list(latest.values())

    def _empty(self, onto: Edits | None) -> Edits:
        """Edits without a group, or `onto`, with this editor's memory, encoders and calibration."""
        states = self._need_states()
        shared = {
            i: LayerShared(
                states.layers[i].h_sem, states.layers[i].h_pos, self.fits[i].enc_sem if i in self.fits else ()
            )
            for i in self.layers
        }
        center = states.layers[self.layers[0]].h_sem.mean(dim=0)
        cases = self.cases if self.cases is not None else states.cases
        calibration = Calibration(self.layers[0], center, cases)
        if onto is not None:
            return replace(onto, shared=shared, calibration=calibration, config=self.config)
        d, gated = states.cases.shape[1], self.decoder.layers[0].gated
        layers = {i: empty_layer(d, gated) for i in self.layers}
        base = fingerprint(self.model, self.decoder, self.layers)
        return Edits(self.config, base, [], layers, shared, calibration)

    def _need_states(self) -> TripletStates:
        if self.states is None:
            raise ValueError("there is no memory yet: call build_memory(triplets) first")
        return self.states

    def _clean(self) -> "_BaseOnly":
        return _BaseOnly(self.model)


class _BaseOnly:
    """While it is entered the model is the base in evaluation mode without gradients of its own; then as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        sitting = sorted({s.name for s in status(self.model) if s.enabled})
        if sitting:
            raise ValueError(
                f"the model carries edits ({', '.join(sitting)}); states and new edits come from the base: "
                "unpatch it, or work inside handle.disabled()"
            )
        self.training = [m for m in self.model.modules() if m.training]
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        for p in self.trainable:
            p.requires_grad_(False)

    def __exit__(self, *exc: object) -> None:
        for m in self.training:
            m.training = True
        for p in self.trainable:
            p.requires_grad_(True)


def empty_layer(d: int, gated: bool) -> LayerEdits:
    """A layer's edits without an edit."""
    none = torch.zeros(0, d)
    return LayerEdits(
        keys=none,
        key_bias=torch.zeros(0),
        values=none.clone(),
        group_ptr=torch.zeros(1, dtype=torch.long),
        zeta=none.clone(),
        up=none.clone() if gated else None,
        up_bias=torch.zeros(0) if gated else None,
        h_sem=none.clone(),
        h_pos=none.clone(),
    )


def pointers(old: LayerEdits, groups: int, size: int) -> Tensor:
    """group_ptr [G + groups + 1] with `groups` more groups of `size` neurons."""
    end = int(old.group_ptr[-1])
    return torch.cat([old.group_ptr, end + size * torch.arange(1, groups + 1)])


def extend(
    edits: Edits,
    requests: Sequence[Request],
    own: dict[int, tuple[Tensor, Tensor]],
    layers: Sequence[int],
    config: UnikeConfig,
    gated: bool,
) -> Edits:
    """`edits` with an entry and an own item per request, their groups still empty."""
    grown = {}
    for i in layers:
        layer, (h_sem, h_pos) = edits.layers[i], own[i]
        end = layer.group_ptr[-1:].expand(len(requests))
        grown[i] = replace(
            layer,
            group_ptr=torch.cat([layer.group_ptr, end]),
            zeta=torch.cat([layer.zeta, torch.zeros(len(requests), h_sem.shape[1])]),
            h_sem=torch.cat([layer.h_sem, h_sem]),
            h_pos=torch.cat([layer.h_pos, h_pos]),
        )
    entries = [
        EditEntry(r.id, r.prompt, r.target, image_digest(r.image), dict.fromkeys(layers, 0), None, False, 0)
        for r in requests
    ]
    return replace(edits, config=config, entries=edits.entries + entries, layers=grown)


def with_neurons(grown: Edits, old: Edits, trained: TrainedGroups, requests: Sequence[Request]) -> Edits:
    """`grown` with the trained neurons of its newest edits in place of their empty groups."""
    layers = {}
    for i, layer in grown.layers.items():
        new = {name: t.float().cpu() for name, t in trained.neurons[i].items()}
        size = len(new["keys"]) // len(requests)
        rows = {name: torch.cat([getattr(layer, name), t]) for name, t in new.items()}
        zeta = torch.cat([layer.zeta[: len(old)], trained.zeta[i].float().cpu()])
        layers[i] = replace(layer, group_ptr=pointers(old.layers[i], len(requests), size), zeta=zeta, **rows)
    entries = list(old.entries)
    for entry, loss, success, steps in zip(
        grown.entries[len(old) :], trained.loss, trained.success, trained.steps, strict=True
    ):
        sizes = {i: int(layers[i].group_ptr[-1] - layers[i].group_ptr[-2]) for i in layers}
        entries.append(replace(entry, neurons=sizes, loss=loss, success=success, steps=steps))
    return replace(grown, entries=entries, layers=layers)


def _check_samples(samples: Sequence[dict[str, Any]], what: str) -> None:
    if not samples:
        raise ValueError(f"no {what}s given")
    for n, s in enumerate(samples):
        for key in ("prompt", "target"):
            if not isinstance(s.get(key), str) or not s[key].strip():
                raise ValueError(f"{what} {n} needs a non-empty string {key!r}, but has {s.get(key)!r}")
