"""PatchHandle: one patch on one model."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .attaching import detach
from .edits import Edits
from .edits_schema import listed, short
from .explain import CaseReport, report
from .keeping import to_keep
from .models import get_module
from .naming import cases_from_ptr
from .planning import Items, items_of, plan_swap
from .projections import Projections
from .records import PatchRecord, records
from .tracker import CONTINUATIONS


class PatchHandle:
    """One patch on one model: switch it off, swap its edits, name cases, ask why, remove it.

    CUDA graphs: a decode step reads no value from the device, so it can be captured, with a static KV cache or with
    cases that are named. A graph replays kernels and no Python, on the tensors that it saw: what was decided for the
    cases (edits, items, alpha) therefore lies in storage of the static cache, or of the named slots, into which every
    later prefill of that cache after `cache.reset()`, or of as many slots, writes in place, without gradients and
    outside of any capture. After `swap` prefill again, then replay. Named cases: capture with the very token_to_case
    tensor (int64, on the device) that later steps overwrite. A graph does not follow another batch size,
    `choosing` with more edits per case than before, `disabled()`, or attaching and removing a patch: capture again.

    Launches: with retrieval per case a decode step adds two operators to an edited layer, extra_neurons_ (at most two
    launches) and knowledge_shift (one). Retrieval per token has retrieve_and_shift instead of that, for up to 64 tokens
    on triton: two launches, own items of routed edits included. An encoder with an activation, or a projection that is
    not plain, goes step by step: the search (two), attention, the projection, each map of the encoder and the mix, and
    for routed edits some twenty small operators of torch. Norms on q, where a layer has them, run once more, as does
    q_proj where the layer does not call it as a module.
    """

    def __init__(self, model: nn.Module, record: PatchRecord) -> None:
        self.model = model
        self.record = record

    @classmethod
    def of(cls, model: nn.Module, name: str = "default") -> "PatchHandle":
        """The handle of a patch that is already on `model`: on a copy, or after a pickle."""
        found = [record for _, record in records(model)]
        for record in found:
            if record.name == name:
                return cls(model, record)
        raise ValueError(
            f"no patch named {name!r} on this model; there are: {', '.join(r.name for r in found) or 'none'}"
        )

    @property
    def edits(self) -> Edits:
        """The edits on the model now."""
        return self.record.edits

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        there = "on" if self.record.hooks else "no longer on"
        return f"<patch {self.record.name!r} of {len(self.edits)} edits, {there} {type(self.model).__name__}>"

    def remove(self) -> None:
        """Takes this patch off the model; a second call does nothing."""
        for holder, record in records(self.model):
            if record is self.record:
                detach(self.model, holder, record)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside, the model is the base, bit for bit. Does not reach a CUDA graph that was captured before."""
        runtime = self.record.runtime
        runtime.after_backward()  # if one failed before
        before, runtime.enabled = runtime.enabled, False
        try:
            yield
        finally:
            runtime.after_backward()
            runtime.enabled = before

    # ------------------------------------------------------------------------------------------------- its edits

    def swap(self, edits: Edits) -> None:
        """Replaces the edits inside the same storage, so compiled and captured graphs stay valid.

        Rows up to the first that differs from the edits of before are left as they are: edits added at the end cost
        little more than themselves. So are these rows' projected keys and values, if k_proj and v_proj have the tensors
        that they had, unchanged as far as torch counts it; otherwise see `refresh`.

        ValueError, and nothing changed, when they do not fit the capacities given to `patch`, or when their encoders,
        config, layers or base differ, and inside `choosing`. KV caches of before are refused at their next use. On a
        GPU the new rows are written on the current stream: passes on others must be over before, and wait after.
        """
        holder, record = self._holder(), self.record
        if record.runtime.tracker.chosen is not None:
            raise ValueError("swap inside `choosing`, whose edits were chosen among those of before: leave it first")
        with to_keep():
            items = plan_swap(holder, record, edits)
            try:
                self._load(edits, items)
            except BaseException:  # out of memory, or interrupted: some layers may hold the new edits
                self._load(record.edits, plan_swap(holder, record, record.edits))
                raise
        record.edits = edits
        record.runtime.tracker.renew()

    def _load(self, edits: Edits, items: dict[int, Items]) -> None:
        for layer in self.record.layers:
            if layer.neurons is not None:
                layer.neurons.load(edits.layers[layer.index])
            if layer.shift is not None:
                attention = get_module(self._holder(), layer.sites.attention)
                layer.shift.load(items[layer.index], attention, Projections(layer.sites))
            if layer.router is not None and edits.calibration is not None:
                layer.router.load(edits.layers[layer.index].h_sem, edits.calibration)

    def refresh(self) -> None:
        """Computes again what is kept of the base: after an adapter was merged, switched or loaded.

        The memory's projected keys and values, and the output projection as it is folded with the encoder.
        """
        holder, record = self._holder(), self.record
        for layer in record.layers:
            if layer.shift is not None:
                with to_keep():
                    items = items_of(holder, layer.sites, self.edits, layer.index, record.config)
                    attention = get_module(holder, layer.sites.attention)
                    layer.shift.load(items, attention, Projections(layer.sites))
        record.runtime.tracker.renew()

    # ------------------------------------------------------------------------------------------------- its cases

    def set_cases(
        self,
        token_to_case: Tensor | None = None,
        case_tokens: Tensor | None = None,
        *,
        case_ptr: Tensor | None = None,
        case_positions: Tensor | None = None,
    ) -> None:
        """Names the cases of the next passes, until named again; without arguments they are found by themselves.

        Of packed inputs, for passes of exactly T tokens: token_to_case [T] int64, the case of each flattened token, -1
        for padding; case_tokens [C] int64, the row of each case's case token, -1 for a case (a slot) that an earlier
        pass decided and that goes on. Or, for packed cases that end at their case token, the CSR form case_ptr [C + 1].
        Of padded batches: case_positions [B] int64, the position of each row's case token, where it is not the last
        attended one: sequences that already hold their answer, grow in generate(use_cache=False), or start with
        guessed tokens (assisted generation, prompt lookup: together with `continuing("keep")`). B: the rows of the
        pass, every beam's.

        Slots: a case keeps its number, and what was decided for it, from one set_cases to the next; more slots are new
        ones, fewer drop the last. A slot that goes to another request is decided anew where a case token is named for
        it; -2 in the place of -1 says until then that it is free, so that its tokens are refused rather than answered
        with the last request's edits. Of a prompt in chunks name every chunk's last token: the last one's decision
        stays. `swap` ends what was decided, and so do set_cases() and naming cases in another way.
        """
        self._check_there()
        tracker = self.record.runtime.tracker
        given = [n for n, t in (("token_to_case", token_to_case), ("case_ptr", case_ptr)) if t is not None]
        given += ["case_positions"] * (case_positions is not None)
        if len(given) > 1:
            raise ValueError(f"cases are named in one way at a time, but got {' and '.join(given)}")
        if case_ptr is not None and case_tokens is not None:
            raise ValueError("case_ptr says where the case tokens are, so case_tokens must be left out")
        tensors = {"token_to_case": token_to_case, "case_tokens": case_tokens, "case_ptr": case_ptr}
        for name, t in {**tensors, "case_positions": case_positions}.items():
            if t is not None and (not isinstance(t, Tensor) or t.is_floating_point() or t.dtype == torch.bool):
                kind = f"a tensor of {t.dtype}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
                raise ValueError(f"{name} must be a tensor of integers, but is {kind}")
        if case_positions is not None and (case_positions.dim() != 1 or not bool((case_positions >= 0).all())):
            raise ValueError(f"case_positions must be [B] and 0 or more, but got {case_positions.tolist()}")
        if case_ptr is not None:
            token_to_case, case_tokens = cases_from_ptr(case_ptr)
        tracker.name_cases(token_to_case, case_tokens)
        tracker.positions = None if case_positions is None else case_positions.long()

    @contextlib.contextmanager
    def choosing(self, edit_ids: Sequence[str | None | Sequence[str]], *, repeat: int = 1) -> Iterator[None]:
        """Inside, the cases of every prompt are served with the edits named here, whatever the routing would say.

        edit_ids: one entry per prompt: an id, several ids, or None for the base model's answer, bit for bit.
        repeat: rows of each prompt, one after the other: `num_beams`, or `num_return_sequences`, of generate.
        A pass of another number of rows raises ValueError.
        """
        self._check_there()
        wrong = not isinstance(edit_ids, Sequence) or isinstance(edit_ids, str) or not edit_ids
        if wrong or not all(e is None or isinstance(e, Sequence) for e in edit_ids):
            raise ValueError(
                "choosing takes a list with an entry for each prompt, an id, several ids, or None for the base, but "
                f"got {short(edit_ids)}"
            )
        if not isinstance(repeat, int) or repeat < 1:
            raise ValueError(f"repeat must be a whole number from 1, but is {repeat!r}")
        rows = [[] if e is None else [e] if isinstance(e, str) else list(dict.fromkeys(e)) for e in edit_ids]
        known = {name: i for i, name in enumerate(self.edits.ids)}
        unknown = dict.fromkeys(e for row in rows for e in row if e not in known)
        if unknown:
            raise ValueError(f"no edit has the id {listed(unknown)}; there are {len(known)}: {listed(known)}")
        rows = [row for row in rows for _ in range(repeat)]
        width = max([1, *map(len, rows)])
        chosen = torch.tensor([[known[e] for e in row] + [-1] * (width - len(row)) for row in rows])
        tracker = self.record.runtime.tracker
        before, tracker.chosen = tracker.chosen, chosen.reshape(len(rows), width)
        try:
            yield
        finally:
            tracker.chosen = before

    @contextlib.contextmanager
    def continuing(self, how: str) -> Iterator[None]:
        """Inside, says what several tokens on a KV cache that already holds some are; outside, they are refused.

        "keep": the decided case goes on (speculative decoding; where the first pass already holds guesses behind the
        prompt, as in transformers' assisted generation, `set_cases(case_positions=...)` has to name the prompt's end).
        "new": they end a prompt, whose case is decided at its last token: the next turn of a chat, the last chunk of a
        prompt, a prompt after a shared prefix. Edits reach only tokens that run now. A row of nothing but padding
        keeps what was decided for it. A pass of one token always decodes, nothing tells it from a prompt's last token:
        take a chunk size (`prefill_chunk_size`) that leaves the last chunk two or more.
        """
        if how not in CONTINUATIONS:
            raise ValueError(f"how must be one of {', '.join(map(repr, CONTINUATIONS))}, but got {how!r}")
        tracker = self.record.runtime.tracker
        before, tracker.continuation = tracker.continuation, how
        try:
            yield
        finally:
            tracker.continuation = before

    def explain(self, **inputs: object) -> list[CaseReport]:
        """Per case: the edits that act, and per layer the items retrieved with their cosines, and alpha.

        inputs: what the model's forward takes (a prompt, not a prompt with its answer, unless cases are named).
        """
        self._check_there()
        tracker = self.record.runtime.tracker
        tracker.current = None  # an earlier pass's are no answer
        with torch.no_grad():
            self.model(**inputs)
        cases = tracker.current
        if cases is None:
            raise RuntimeError("there is nothing to explain: the patch is disabled, or the model's decoder did not run")
        return report(cases, self.edits)

    def _holder(self) -> nn.Module:
        self._check_there()
        return next(holder for holder, record in records(self.model) if record is self.record)

    def _check_there(self) -> None:
        """Raises ValueError once the patch was removed; without a walk over the model, which 600 modules make long."""
        if not self.record.hooks:
            raise ValueError(f"patch {self.record.name!r} is no longer on the model")
