"""Editor: from triplets and requests to Edits, on any supported model; the base model is never written."""

import math
import warnings
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import backends
from ..config import UnikeConfig
from ..edits import BaseFingerprint, Calibration, Edits, LayerShared
from ..evaluation.checking import CheckReport, check
from ..models import find_decoder, get_module
from ..patching import PatchHandle, fingerprint, patch
from ..projections import Projections, empty_like_site
from ..statuses import active
from .agreement import check_agreement
from .asking import asking
from .checks import check_inputs, check_triplets
from .disentangle import Fits, LayerFit, fit_layer
from .extract import Extraction, TripletStates, last_rows, tap_rows
from .inputs import Collator, Sample, image_digest
from .prefix import head
from .requests import (
    Request,
    appended,
    asked,
    check_dicts,
    check_questions,
    check_samples,
    new_layer,
    read_requests,
)
from .saved import Learned, read, write
from .train import GroupTrainer
from .wording import wording

EDITOR_PATCH = "unike_editor"  # the patch that carries edits while they train


class Editor:
    """Makes edits of one model: `build_memory`, `fit`, then `edit` as often as wanted.

    model: a transformers multimodal or language model (or `MiniGPT4`); processor: its processor (or tokenizer);
    prompts are what the model would be asked, template included. Dicts hold the keys that are named and no others, and
    what the model cannot take (a picture, a prompt too long) is told by entry before anything is computed. The base
    model stays as it is, whatever happens.
    backend: of the operators, in training and in `check`, as `patch` takes it.
    """

    trainer: type[GroupTrainer] = GroupTrainer  # what trains the neurons of new edits; may be overridden

    def __init__(
        self, model: nn.Module, processor: Any, config: UnikeConfig | None = None, *, backend: str = "auto"
    ) -> None:
        if backend not in backends.NAMES:
            raise ValueError(f"backend must be one of {', '.join(map(repr, backends.NAMES))}, but got {backend!r}")
        self.model = model
        self.backend = backend
        self.config = config or UnikeConfig()
        self.decoder = find_decoder(model)
        layers = self.decoder.default_layers() if self.config.layers is None else self.config.layers
        beyond = [i for i in layers if not 0 <= i < len(self.decoder.layers)]
        if beyond or not layers:
            raise ValueError(f"layers {list(layers)} must be some of 0 to {len(self.decoder.layers) - 1}")
        self.layers = tuple(sorted(set(layers)))
        self.collator = Collator(model, processor)
        head(model, self.decoder)  # told here where there is none, and not after the memory was built
        self._agreed: set[bool] = set()  # with and without a picture: whether the model was asked for its own logits
        self.triplets: list[dict[str, Any]] = []
        self.states: TripletStates | None = None
        self.fits: dict[int, LayerFit] = {}
        self.cases: Tensor | None = None  # [M, d] case tokens that calibrate routing
        self.prompts: list[str] = []  # of the M cases
        self.questions: list[str | None] = []  # M times what is asked, where a triplet or case names it
        self._seen: tuple[Tensor, Tensor | None, Tensor | None] | None = None  # cases, their wording, what they ask
        self.remembered: set[tuple[str | None, str]] = set()  # what the memory's items ask: (picture's digest, prompt)

    def __repr__(self) -> str:
        items = "no memory yet" if self.states is None else f"{len(self.states.kept)} memory items"
        fitted = "encoders fitted" if self.fits else "no encoders yet"
        return f"Editor({type(self.model).__name__}, layers {list(self.layers)}, {items}, {fitted})"

    @property
    def base(self) -> BaseFingerprint:
        """What edits of this editor remember of the model."""
        return fingerprint(self.model, self.decoder, self.layers)

    def build_memory(
        self,
        triplets: Sequence[dict[str, Any]],
        *,
        exclude: Sequence[dict[str, Any]] = (),
        cache: str | Path | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> TripletStates:
        """Runs the base model over triplets (dicts: prompt, target, and optional: image, prediction, question).

        Predictions that are not given are generated; triplets that the model already answers right (or with nothing)
        are left out of the memory; they still calibrate routing. question: any text that triplets (and cases of
        `calibrate`) share which ask the same thing in other words: routing then looks past the wording. Where several
        ask the same in other words, by that or by their picture and target, routing also tells questions apart
        (`editing.asking`). exclude: requests or probes (dicts: prompt, image: optional); a triplet with the picture and
        prompt of one of them is dropped. cache: a folder where a stopped run goes on. Raises ValueError when nothing is
        left (the memory holds what the model does not know) and where the model's own logits are not those it would be
        edited by (`editing.agreement`); RuntimeError inside `torch.inference_mode`.
        """
        _need_gradients("build_memory")
        check_samples(triplets, "triplet")
        check_questions(triplets, "triplet")
        check_dicts(exclude, "sample to exclude", ["prompt"])
        check_triplets(self.collator, self.decoder, triplets, progress=progress)
        never = {asked(e) for e in exclude}
        triplets = [t for t in triplets if not never or asked(t) not in never]
        if not triplets:
            raise ValueError("every triplet is excluded: the memory must not hold what is edited or evaluated")
        with base_only(self.model):
            self._check_agreement([Sample(t["prompt"], t["target"], t.get("image")) for t in triplets])
            extraction = Extraction(
                self.collator, self.decoder, self.layers, batch_size=batch_size, cache=cache, progress=progress
            )
            states = extraction.run(triplets)
        if not states.kept:
            raise ValueError(
                f"the model answers all {len(triplets)} triplets right (or with nothing); a memory needs wrong answers"
            )
        self.triplets, self.states, self.fits = list(triplets), states, {}
        self.cases, self.prompts = states.cases, [t["prompt"] for t in triplets]
        self.questions = [t.get("question") for t in triplets]
        self.remembered = {asked(triplets[i]) for i in states.kept}
        return states

    def fit(self, *, progress: bool = True) -> Fits:
        """Fits Enc_sem, Enc_tru, zeta and W_zeta of every edited layer on the memory's triplets; prints as a table.

        With `projected` attention Enc_sem's inputs are what a single item would inject, out_proj(v_proj(h_pos)); with
        `raw`, h_pos itself (spec, section 2). RuntimeError inside `torch.inference_mode`.
        """
        _need_gradients("fit")
        states = self._need_states()
        answers = [" ".join(self.triplets[i]["target"].lower().split()) for i in states.kept]
        groups = answers if self.config.encoders.held_out_by == "answer" else [str(i) for i in states.kept]
        fits = Fits()
        for i in tqdm(self.layers, desc="encoders", unit="layer", disable=not progress):
            s = states.layers[i]
            anchors = s.h_att if self.config.encoders.anchor == "h_att" else s.h_sem
            pos, neg = self.injected(i, s.h_pos), self.injected(i, s.h_neg)
            fits[i] = fit_layer(
                anchors, pos, neg, s.h_pos, s.h_neg, groups, self.config.encoders, device=self.collator.device
            )
        before, self.fits = self.fits, fits
        if self.config.encoders.w_zeta == "trained":
            try:
                self._train_maps()
            except BaseException:
                self.fits = before
                raise
        return fits

    def calibrate(self, cases: Sequence[dict[str, Any]], *, batch_size: int = 64, progress: bool = True) -> None:
        """Adds cases (dicts: prompt, and optional: image, question) of the training split, for routing.

        No edit should claim them. question: as in `build_memory`.
        """
        states = self._need_states()
        check_dicts(cases, "calibration case", ["prompt"])
        check_questions(cases, "calibration case")
        samples = [Sample(c["prompt"], None, c.get("image")) for c in cases]
        check_inputs(self.collator, self.decoder, samples, lambda n: f"calibration case {n}", progress=progress)
        found = states.cases.new_zeros(len(samples), states.cases.shape[1])
        bar = tqdm(total=len(samples), desc="calibration", unit="case", disable=not progress)
        with base_only(self.model), bar:
            for batch in self.collator.batches(samples, batch_size):
                (case,) = tap_rows(self.model, self.decoder, self.layers[:1], batch, [batch.case_rows()])
                found[batch.rows] = case["tap"][self.layers[0]].float().cpu()
                bar.update(len(batch.rows))
        self.cases = torch.cat([states.cases if self.cases is None else self.cases, found])
        self.prompts = [*self.prompts, *(c["prompt"] for c in cases)]
        self.questions = [*self.questions, *(c.get("question") for c in cases)]

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
        reached is kept, flagged (`success`) and warned about. The model is the base again afterwards. ValueError and
        RuntimeError as `build_memory`, before anything is made.
        """
        _need_gradients("edit")
        wanted, onto = read_requests(requests, onto)
        self._warn_of_leaks(wanted)
        edits = self._empty() if onto is None else self.continued(onto)
        samples = [r.sample() for r in wanted]
        check_inputs(self.collator, self.decoder, samples, lambda n: f"request {wanted[n].id!r}", eos=True)
        independent = self.config.routing.mode == "routed" if independent is None else independent
        with base_only(self.model), tqdm(total=len(wanted), desc="edits", unit="edit", disable=not progress) as bar:
            self._check_agreement(samples)
            for chunk in self._batches(wanted, independent):
                edits = self._append(edits, chunk, independent)
                bar.update(len(chunk))
        new = {r.id for r in wanted}
        missed = [e.id for e in edits.entries if e.id in new and not e.success]
        if missed and self.config.neurons.enabled:
            shown = ", ".join(missed[:10]) + (", ..." if len(missed) > 10 else "")
            warnings.warn(f"{len(missed)} of {len(new)} edits miss their target: {shown}", stacklevel=2)
        before = [] if onto is None else onto.ids
        return edits.select(before + [r.id for r in wanted])

    def check(self, edits: Edits, probes: Sequence[dict[str, Any]], *, routing: str = "edits") -> CheckReport:
        """The five metrics on the user's own probes, all `edits` active: see `evaluation.checking.check`.

        probes: dicts with kind ("rel", "t_gen", "m_gen", "t_loc" or "m_loc"), prompt, target, image: optional.
        """
        with base_only(self.model):
            options = {"routing": routing, "backend": self.backend}
            return check(self.collator, self.decoder, self.model, edits, probes, **options)

    def save(self, path: str | Path) -> None:
        """Saves memory, encoders and calibration into one safetensors file; pictures are not part of it."""
        states = self._need_states()
        cases = states.cases if self.cases is None else self.cases
        triplets = [{"prompt": t["prompt"], "target": t["target"], "digest": _digest(t)} for t in self.triplets]
        learned = Learned(states, triplets, cases, self.prompts, self.questions, self.fits)
        write(Path(path), learned, {"config": self.config.to_json(), "base": self.base.to_json()})

    def load(self, path: str | Path) -> None:
        """Takes over what `save` saved, in the place of `build_memory`, `fit` and `calibrate`.

        ValueError, and nothing changed, where the base model, the layers or a setting of the fit is another one.
        """
        header, learned = read(Path(path))
        ours = self.base
        theirs, config = BaseFingerprint.from_json(header["base"]), UnikeConfig.from_json(header["config"])
        wrong = theirs.mismatches(ours) or ([] if theirs.same_probe(ours) else ["other weights (a sampled probe)"])
        if tuple(learned.states.layers) != self.layers:
            wrong.append(f"layers: {list(learned.states.layers)} and {list(self.layers)}")
        elif learned.fits and config.encoders != self.config.encoders:
            wrong.append(f"encoders: {config.encoders} and {self.config.encoders}")
        elif learned.fits and config.shift.attention != self.config.shift.attention:
            wrong.append(f"shift.attention: {config.shift.attention} and {self.config.shift.attention}")
        elif learned.fits and config.encoders.w_zeta == "trained":  # with neurons, under the shift
            for name in ("neurons", "shift"):
                if (theirs_of := getattr(config, name)) != (ours_of := getattr(self.config, name)):
                    wrong.append(f"{name}: {theirs_of} and {ours_of}")
        if wrong:
            raise ValueError(f"{path} was saved by another editor (saved, this one): {'; '.join(wrong)}")
        self.states, self.triplets = learned.states, learned.triplets
        self.cases, self.prompts, self.questions = learned.cases, learned.prompts, learned.questions
        self.remembered = {(_digest(t), t["prompt"]) for t in (learned.triplets[i] for i in learned.states.kept)}
        self.fits = Fits(learned.fits)

    def own_items(self, samples: Sequence[Sample]) -> dict[int, tuple[Tensor, Tensor]]:
        """(h_sem [E, d], h_pos [E, d]) by layer: the memory items that E edits store of themselves.

        May be overridden; the model is the base here, and the samples all have a picture or all have none.
        """
        batch = self.collator.batch(samples, list(range(len(samples))), eos=False)
        case, last = tap_rows(self.model, self.decoder, self.layers, batch, [batch.case_rows(), last_rows(batch)])
        return {i: (case["tap"][i].float().cpu(), last["tap"][i].float().cpu()) for i in self.layers}

    def training_patch(self, edits: Edits, max_neurons: int) -> PatchHandle:
        """The patch that carries `edits` while the newest of them train, with room for `max_neurons` a layer.

        May be overridden.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the base is this very model
            options: dict[str, Any] = {"max_neurons": max_neurons, "backend": self.backend}
            return patch(self.model, edits, name=EDITOR_PATCH, routing="always", **options)

    def continued(self, onto: Edits) -> Edits:
        """`onto` with this editor's config and calibration.

        ValueError where layers, memory, encoders or a setting that acts on the model differ: edits that were trained
        under one would be put under another.
        """
        wrong = onto.config.differences(self.config)
        if wrong:
            raise ValueError(f"`onto` was made with other settings (its own, this editor's): {'; '.join(wrong)}")
        empty, onto = self._empty(), onto.to("cpu", torch.float32)
        ours, theirs = ({n: t for n, t in e.named_tensors().items() if n.startswith("shared.")} for e in (empty, onto))
        same = ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())
        if not same or onto.base.mismatches(empty.base):
            raise ValueError("`onto` was made with other layers, another memory or other encoders than this editor's")
        return replace(empty, entries=onto.entries, layers=onto.layers)

    def _batches(self, requests: Sequence[Request], independent: bool) -> Iterator[list[Request]]:
        """What is trained together: one by one in order, or batches that all have a picture or all have none."""
        size = self.config.neurons.batch_size if independent else 1
        parts = [[r for r in requests if (r.image is not None) is has] for has in (True, False)]
        for part in parts if independent else [requests]:
            for at in range(0, len(part), size):
                yield list(part[at : at + size])

    def _train_maps(self) -> None:
        """W_zeta learned over training-split edits: shared by all of them, frozen afterwards (spec, section 2)."""
        states, most = self._need_states(), self.config.encoders.w_zeta_edits
        if any(t.get("digest") for t in self.triplets):
            raise ValueError("a loaded editor has no pictures to train W_zeta on: call build_memory(triplets) again")
        chosen = [self.triplets[i] for i in states.kept[:: max(1, len(states.kept) // most)]][:most]
        requests = [Request(str(n), t["prompt"], t["target"], t.get("image"), None) for n, t in enumerate(chosen)]
        d, device = states.cases.shape[1], self.collator.device
        maps = {i: torch.zeros(d, d, device=device, dtype=torch.float32).requires_grad_() for i in self.layers}
        empty = self._empty()
        with base_only(self.model):
            for chunk in self._batches(requests, True):
                self._append(empty, chunk, True, maps)
        for i, w in maps.items():
            w_zeta = w.detach().cpu()
            self.fits[i] = replace(self.fits[i], w_zeta=w_zeta, zeta_prime=w_zeta @ self.fits[i].zeta)

    def _append(
        self, edits: Edits, requests: list[Request], independent: bool, maps: dict[int, Tensor] | None = None
    ) -> Edits:
        """`edits` with one more group per request: states of the own items, then neurons trained on a patch.

        maps: W_zeta [d, d] by layer to learn along, in place; otherwise zeta' is what `fit` found.
        """
        samples = [r.sample() for r in requests]
        gated, neurons = self.decoder.layers[self.layers[0]].gated, self.config.neurons
        own = self.own_items(samples)
        entries = [r.entry(self.layers) for r in requests]
        grown = appended(edits, entries, {i: new_layer(own[i], gated) for i in self.layers})
        if not neurons.enabled:
            return grown
        mean = self._need_states().ffn_mean
        zeta = {i: torch.zeros_like(m) for i, m in mean.items()}
        zeta |= {i: fit.zeta_prime if maps is None else fit.zeta for i, fit in self.fits.items()}
        room = max(len(layer.keys) for layer in edits.layers.values()) + neurons.per_layer * len(requests)
        with self.training_patch(grown, room) as handle:
            trainer = self.trainer(
                self.collator,
                self.decoder,
                handle,
                neurons,
                mean,
                zeta,
                independent=independent,
                maps=maps,
                lr_maps=self.config.encoders.lr_w_zeta,
            )
            trained = trainer.train(samples)
        ends = zip(entries, trained.loss, trained.success, trained.steps, strict=True)
        sizes = dict.fromkeys(self.layers, neurons.per_layer)
        entries = [
            replace(e, neurons=sizes, loss=loss if math.isfinite(loss) else None, success=ok, steps=n)
            for e, loss, ok, n in ends
        ]
        layers = {i: new_layer(own[i], gated, trained.neurons[i], trained.zeta[i]) for i in self.layers}
        return appended(edits, entries, layers)

    @torch.no_grad()
    def injected(self, layer: int, h_pos: Tensor) -> Tensor:
        """[N, d] what a memory of the one item h_pos would inject at this layer: Enc_sem's inputs."""
        if self.config.shift.attention == "raw":
            return h_pos
        sites = self.decoder.layers[layer]
        attention, projections = get_module(self.model, sites.attention), Projections(sites)
        like = empty_like_site(self.model, sites.attention)
        out = []
        for part in h_pos.split(1024):
            _, v = projections.item(attention, part.to(like))
            heads = v.repeat_interleave(sites.heads // sites.kv_heads, dim=1)  # grouped-query heads as the layer does
            out.append(projections.output(attention, heads.flatten(1)).float().cpu())
        return torch.cat(out)

    def _check_agreement(self, samples: Sequence[Sample]) -> None:
        """Once with a picture and once without: ValueError where the model is not asked as it would answer."""
        for has_image in {s.image is not None for s in samples} - self._agreed:
            sample = next(s for s in samples if (s.image is not None) is has_image)
            check_agreement(self.collator, self.decoder, self.layers[0], sample)
            self._agreed.add(has_image)

    def _warn_of_leaks(self, requests: Sequence[Request]) -> None:
        leaked = [r.id for r in requests if (r.digest, r.prompt) in self.remembered]
        if leaked:
            warnings.warn(
                f"the memory already holds picture and prompt of {len(leaked)} requests ({', '.join(leaked[:10])}), so "
                "their scores would be flattered; leave such items out: build_memory(triplets, exclude=requests)",
                stacklevel=3,
            )

    def _shared(self) -> dict[int, LayerShared]:
        """Memory and Enc_sem by layer."""
        states, shift, neurons = self._need_states(), self.config.shift, self.config.neurons
        if not self.fits and ((shift.enabled and shift.alpha is None) or (neurons.enabled and neurons.beta != 0)):
            raise ValueError("the encoders are not fitted yet: call fit() first")
        encoders = {i: fit.enc_sem for i, fit in self.fits.items()}
        return {i: LayerShared(s.h_sem, s.h_pos, encoders.get(i, ())) for i, s in states.layers.items()}

    def _empty(self) -> Edits:
        """Edits without a group, with this editor's memory, encoders and calibration."""
        states = self._need_states()
        d, gated = states.cases.shape[1], self.decoder.layers[self.layers[0]].gated
        none = states.cases.new_zeros(0, d)
        layers = {i: new_layer((none, none), gated) for i in self.layers}
        return Edits(self.config, self.base, [], layers, self._shared(), self._calibrated(states))

    def _calibrated(self, states: TripletStates) -> Calibration:
        """What routing is calibrated on; what can be learned of the cases is learned once."""
        cases = states.cases if self.cases is None else self.cases
        if self._seen is None or self._seen[0] is not cases:
            way = wording(cases, self.questions) if any(self.questions) else None
            plain = cases if way is None else cases - (cases @ way.T) @ way
            same: list[Hashable] = [*self.questions]
            for i, t in enumerate(self.triplets):  # one picture with one answer is one question, if nothing is said
                if same[i] is None and (digest := _digest(t)) is not None:
                    same[i] = digest, t["target"]
            self._seen = cases, way, asking(plain, self.prompts, same)
        return Calibration(self.layers[0], states.layers[self.layers[0]].h_sem.mean(dim=0), *self._seen)

    def _need_states(self) -> TripletStates:
        if self.states is None:
            raise ValueError("there is no memory yet: call build_memory(triplets) first")
        return self.states


def _digest(triplet: dict[str, Any]) -> str | None:
    """Of a triplet's picture; a loaded one has the digest alone."""
    return triplet["digest"] if "digest" in triplet else image_digest(triplet.get("image"))


def _need_gradients(what: str) -> None:
    """RuntimeError inside `torch.inference_mode`, whose tensors can never be trained on."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{what} was called inside torch.inference_mode(), whose tensors cannot be trained on: use torch.no_grad()"
        )


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the base in evaluation mode without gradients of its own; afterwards it is as it was.

    ValueError when it carries edits that are switched on.
    """
    if on := active(model):
        raise ValueError(
            f"the model carries edits ({', '.join(on)}); states and new edits come from the base: "
            "unpatch it, or work inside handle.disabled()"
        )
    training = [m for m in model.modules() if m.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        model.eval()
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for m in training:
            m.training = True
        for p in trainable:
            p.requires_grad_(True)
