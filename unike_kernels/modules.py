"""KnowledgeShift: the memory of one self-attention, and how its output is shifted towards what is found there.

A drop-in module, as `ExtraNeurons` and `Router` are: a child of the site's own module, called by the hooks of `hooks`.
None of them sees a batch dimension: tokens are flattened, and `Cases` says which token belongs to which case.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import cpu_kernels, folding, ops, reference
from .cases import Cases, LayerDecision, all_missing, may_ask
from .choosing import ChoosesBackend
from .config import ShiftConfig
from .edits import LayerShared
from .keeping import to_keep
from .memory import ExternalMemory, Items
from .models import LayerSites
from .projections import Projections
from .triton_kernels import FEW_TOKENS, MAX_K
from .unchanged import Table, Written

PRECOMPUTED = ("encoder_rows", "folded_weight", "folded_bias")
PRECOMPUTE = ("triton", "cuda")  # backends for which an affine encoder is applied to all items, or folded, beforehand


class Found(NamedTuple):
    """What was retrieved, and how strongly it acts: R rows, of every case or of every token by itself."""

    scores: Tensor  # [R, K], -inf padded
    indices: Tensor  # [R, K] int64, -1 padded
    alpha: Tensor | float | None = None  # [R], or of all; None: what the shift makes of it
    token_to_case: Tensor | None = None  # [T] int64, the row of each token, -1: none; None: its own


@dataclass(slots=True)  # read in every layer of a step: 15 ns a field less than a NamedTuple's
class PreparedShift:
    """How native code shifts by one decision, in every step of an answer."""

    decision: LayerDecision
    step: cpu_kernels.Step | None = None  # step(out, heads, q); None: no case has knowledge to mix in
    out: Tensor | None = None  # for all steps, where only a product sees it


def _linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
    return nn.functional.linear(x[rows], weight, bias)


class KnowledgeShift(ChoosesBackend):
    """The shift of one self-attention output towards the memory's knowledge (equations 2, 7 and 8).

    encoder_weight_i [d, d], encoder_bias_i [d]: Enc_sem's layers. Where these are affine, and kernels run that use it
    (PRECOMPUTE), also encoder_rows [capacity, d], Enc_sem of every item (`raw`), or folded_weight [d, H hv] and
    folded_bias [d], Enc_sem and the output projection in one (`projected`, where that is plain): for inference.
    """

    encoder_rows: Tensor | None
    folded_weight: Tensor | None
    folded_bias: Tensor | None

    def __init__(
        self,
        config: ShiftConfig,
        layer: int,
        sites: LayerSites,
        memory: ExternalMemory,
        encoder: tuple[tuple[Tensor, Tensor], ...],
        encoder_act: str,
        like: Tensor,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.config, self.layer, self.encoder_act = config, layer, encoder_act
        self.scaling, self.softcap = sites.scaling, sites.softcap
        self.memory = memory
        self.written = Written()
        self.depth = len(encoder)
        for i, (weight, bias) in enumerate(encoder):
            self.register_buffer(f"encoder_weight_{i}", weight.to(like), persistent=False)
            self.register_buffer(f"encoder_bias_{i}", bias.to(like), persistent=False)
        for name in PRECOMPUTED:
            self.register_buffer(name, None, persistent=False)
        self.choose(backend)

    @property
    def encoder(self) -> list[tuple[Tensor, Tensor]]:
        """Enc_sem's layers as (weight, bias) pairs."""
        return [(getattr(self, f"encoder_weight_{i}"), getattr(self, f"encoder_bias_{i}")) for i in range(self.depth)]

    # ---------------------------------------------------------------------------------------------- what the hooks call

    def shift(
        self, tap: Tensor, h_att: Tensor, projected: Tensor | None, attention: nn.Module, projections: Projections,
        cases: Cases,
    ) -> Tensor:  # fmt: skip
        """h [T, d] for the tap [T, d] and the attention output h_att [T, d] of the layer's `attention` module.

        projected: q_proj's output [T, H hd] where the layer's own call was seen.

        Not `forward`: accelerate's hooks would move its arguments to a device, the offloaded `attention` among them.
        """
        if self.config.k == 0 or self.memory.capacity == 0:
            return h_att
        if self._at_once(len(tap), cases) and (known := self._of_tokens(attention, projections)) is not None:
            q = self._query(tap, projected, attention, projections)
            return self._retrieve_and_shift(h_att, q, tap, cases, **known)
        found, used = self._items_and_alpha(tap, h_att.__getitem__, projected, attention, projections, cases), None
        if not all_missing(found.indices):
            q = self._query(tap, projected, attention, projections)
            h_att, used = self._shift(h_att, q, found, attention, projections)
        self._note(found, used, cases)
        return h_att

    def mix(
        self, heads: Tensor, tap: Tensor, projected: Tensor | None, attention: nn.Module, projections: Projections,
        cases: Cases,
    ) -> Tensor | None:  # fmt: skip
        """The heads [T, H hv] that enter the output projection, with the knowledge mixed in; None where it is too soon.

        (1 - a)(W x + b) + a (W y + b) = W((1 - a) x + a y) + b, so where alpha is known before the layer's output is
        (fixed; decided before, as while decoding; or by W x + b of the case tokens alone, where W and b are at hand),
        the layer's own projection serves both. Not for `raw`, whose knowledge lies behind the projection.
        """
        config, sites = self.config, projections.sites
        if config.k == 0 or self.memory.capacity == 0:
            return heads
        if config.attention == "raw" or heads.shape != (len(tap), sites.heads * self.memory.values.shape[-1]):
            return None
        outputs = None
        if config.alpha is None and not (config.per == "case" and cases.decided and self.layer in cases.state.layers):
            plain = None if config.per == "token" or torch.is_grad_enabled() else projections.plain_output(attention)
            if plain is None:
                return None
            outputs = partial(_linear_rows, heads, *plain)
        if self._at_once(len(tap), cases):
            return self._retrieve_and_shift(heads, projections.query(attention, tap, projected), tap, cases)
        found, used = self._items_and_alpha(tap, outputs, projected, attention, projections, cases), None
        if not all_missing(found.indices):
            q = projections.query(attention, tap, projected)
            heads, used = self._attend(heads, q, found, alpha=found.alpha, orientation=config.orientation)
        self._note(found, used, cases)
        return heads

    # -------------------------------------------------------------------------------------------------- items and alpha

    def _items_and_alpha(
        self, tap: Tensor, outputs: Callable[[Tensor], Tensor] | None, projected: Tensor | None, attention: nn.Module,
        projections: Projections, cases: Cases,
    ) -> Found:  # fmt: skip
        """What every token of the tap [T, d] is shifted by: what its case has decided, or what it finds by itself.

        outputs: gives rows of the attention's output; only a fixed or decided alpha does without.
        """
        if self.config.per == "token":
            return self._items_of_tokens(tap, cases)
        of = self._decide(tap, outputs, projected, attention, projections, cases)
        return Found(of.scores, of.indices, of.alpha, cases.rows(self.config.positions))

    def _decide(
        self, tap: Tensor, outputs: Callable[[Tensor], Tensor] | None, projected: Tensor | None, attention: nn.Module,
        projections: Projections, cases: Cases,
    ) -> LayerDecision:  # fmt: skip
        """Items and alpha of every case: computed where the case token is in this pass, kept where it is not."""
        before = cases.state.layers.get(self.layer)
        if cases.decided and before is not None:
            return LayerDecision(*(t.to(tap.device) for t in (before.indices, before.scores, before.alpha)))
        at, selected = cases.case_tokens.clamp(min=0), cases.selected  # [C]
        scores, indices = self._search(tap[at], selected)
        if self.config.alpha is not None or all_missing(indices):
            fixed = self._nothing if self.config.alpha is None else self.config.alpha
            alpha = torch.full_like(scores[:, 0], fixed)
        else:
            assert outputs is not None
            q = tap[at]
            if self.config.attention == "projected":
                q = projections.query(attention, q, None if projected is None else projected[at])
            _, alpha = self._shift(outputs(at), q, Found(scores, indices), attention, projections)
        alpha = torch.where((indices >= 0).any(dim=1), alpha, self._nothing)
        if before is not None:
            scores = cases.keep_decided(scores, before.scores, -torch.inf)
            indices = cases.keep_decided(indices, before.indices, -1)
            alpha = cases.keep_decided(alpha, before.alpha, 0.0)
        decision = cases.state.layers[self.layer] = LayerDecision(indices, scores, alpha)
        return decision

    def _items_of_tokens(self, tap: Tensor, cases: Cases) -> Found:
        """What every token finds by itself; nothing for tokens of no case, or of an unrouted one.

        While always-on edits decode, a launch costs more than to search for such tokens too: then token_to_case says
        which tokens act.
        """
        config, selected = self.config, cases.selected
        if selected is None and cases.decided and len(tap) <= FEW_TOKENS:
            scores, indices = self._search(tap, None)
            alpha = None if config.alpha is None else cases.filled(config.alpha, scores)
            return Found(scores, indices, alpha, cases.own(config.positions))
        of_token = None if selected is None else selected[cases.token_to_case.clamp(min=0)]
        scores, indices = self._search(tap, of_token)
        idle = (cases.rows(config.positions) < 0)[:, None]
        return Found(scores.masked_fill(idle, -torch.inf), indices.masked_fill(idle, -1), config.alpha)

    def _search(self, q: Tensor, selected: Tensor | None) -> tuple[Tensor, Tensor]:
        """(scores, indices) [T, K] for q [T, d]; nothing where edits are routed but none is: selected [T, m] all -1."""
        k = self.config.k
        if selected is not None and all_missing(selected):
            scores = q.new_full((len(q), k), -torch.inf, dtype=reference.compute_dtype(q, self.memory.sem))
            return scores, torch.full_like(scores, -1, dtype=torch.long)
        scores, indices = self.memory.search(q.detach(), k, selected)
        if selected is None:
            return scores, indices
        idle = ~(selected >= 0).any(dim=1, keepdim=True)
        return scores.masked_fill(idle, -torch.inf), indices.masked_fill(idle, -1)

    def _note(self, found: Found, alpha: Tensor | None, cases: Cases) -> None:
        """Keeps what case tokens found by themselves, for `explain` alone: with per="token" it is not used again.

        alpha: [T], None where no token found anything.
        """
        if self.config.per == "token" and not cases.decided:
            at = cases.case_tokens.clamp(min=0)
            alpha = torch.full_like(found.scores[:, 0], self._nothing) if alpha is None else alpha
            cases.state.layers[self.layer] = LayerDecision(found.indices[at], found.scores[at], alpha[at])

    @property
    def _nothing(self) -> float:
        """The alpha of a case without any knowledge."""
        return 0.0 if self.config.orientation == "knowledge" else 1.0

    # ----------------------------------------------------------------------------------------------- the shift by these

    def _shift(
        self, h_input: Tensor, q: Tensor, found: Found, attention: nn.Module, projections: Projections
    ) -> tuple[Tensor, Tensor]:
        """(h [T, d], alpha [R]) of equation 7, with h_know of equation 8, or 2 (`raw`); q as `_query` gives it.

        One operator where the output projection is a plain linear map, otherwise around it.
        """
        config, alpha = self.config, found.alpha
        weights = None if config.attention == "raw" else projections.plain_output(attention)
        if config.attention == "raw" or weights is not None:
            known = {} if alpha is not None else self._encoder(attention, projections)
            options = {"orientation": config.orientation, "clamp": config.clamp, **known}
            return self._attend(h_input, q, found, alpha=alpha, out_proj=weights, **options)
        # A quantised, adapted or offloaded projection is called, never read: attention over the items first (alpha 1
        # gives h_know itself), the projection, then the mix.
        heads, _ = self._attend(h_input.new_zeros(q.flatten(1).shape), q, found, alpha=1.0)
        h_know = projections.output(attention, heads)
        if alpha is None:
            alpha = reference.alpha(
                h_know, h_input, encoder=self.encoder or None, act=self.encoder_act, clamp=config.clamp
            )
        elif not isinstance(alpha, Tensor):
            alpha = h_input.new_full((len(found.indices),), alpha, dtype=reference.compute_dtype(h_input))
        per_case = per_token = torch.where((found.indices >= 0).any(dim=1), alpha, self._nothing)
        if (row := found.token_to_case) is not None:
            per_token = torch.where(row >= 0, per_case[row.clamp(min=0)], self._nothing)
        return reference.shift(h_input, h_know, per_token, orientation=config.orientation), per_case

    def _attend(self, h_input: Tensor, q: Tensor, found: Found, **options: Any) -> tuple[Tensor, Tensor]:
        """`ops.knowledge_shift` by the memory's items: attention over them, and the mix."""
        keys, values, rows = self.memory.keys, self.memory.values, found.token_to_case
        options = {"token_to_case": rows, "backend": self.kernels, **self._scores, **options}
        return ops.knowledge_shift(h_input, q, keys, values, found.indices, **options)

    def _query(self, tap: Tensor, projected: Tensor | None, attention: nn.Module, projections: Projections) -> Tensor:
        """What the items' keys are compared with: q [T, H, hd], or the tap [T, d] as it is (`raw`)."""
        return tap if self.config.attention == "raw" else projections.query(attention, tap, projected)

    @property
    def _scores(self) -> dict[str, Any]:
        """How scores become softmax weights: as in the layer, or 1 / sqrt(d)."""
        raw = self.config.attention == "raw"
        return {"scaling": None if raw else self.scaling, "softcap": None if raw else self.softcap}

    # ------------------------------------------------------------------------------------------- quicker while decoding

    def _at_once(self, tokens: int, cases: Cases) -> bool:
        """Whether one operator finds items for each of so many tokens, and shifts by them."""
        if self.config.per == "case" or self.backend != "triton" or torch.is_grad_enabled():
            return False
        edits = 0 if cases.state.selected is None else cases.state.selected.shape[1]
        return tokens <= FEW_TOKENS and max(self.config.k, edits) <= MAX_K

    def _of_tokens(self, attention: nn.Module, projections: Projections) -> dict[str, Any] | None:
        """What `ops.retrieve_and_shift` needs besides for the layer's output; None: it cannot be had that way."""
        raw, fixed = self.config.attention == "raw", self.config.alpha is not None
        if raw and (fixed or self.depth == 0):
            return {}
        encoder = self._encoder(attention, projections)
        if raw:
            return encoder if "encoder_rows" in encoder else None
        plain = None if fixed else projections.plain_output(attention)
        if plain is None or (self.depth and "folded" not in encoder):
            return None
        return {"out_proj": plain, "folded": encoder.get("folded", plain)}

    def _retrieve_and_shift(self, h_input: Tensor, q: Tensor, tap: Tensor, cases: Cases, **known: Any) -> Tensor:
        memory, config = self.memory, self.config
        fixed = None if config.alpha is None else cases.filled(config.alpha, memory.sem_norm)
        h, alpha, scores, indices = ops.retrieve_and_shift(
            h_input, q, memory.keys, memory.values, tap, memory.sem, config.k, spans=memory.spans,
            sem_norm=memory.sem_norm, token_to_case=cases.rows(config.positions), selected=cases.selected, alpha=fixed,
            orientation=config.orientation, clamp=config.clamp, backend=self.backend, **self._scores, **known,
        )  # fmt: skip
        self._note(Found(scores, indices), alpha, cases)
        return h

    def mix_natively(self, heads: Tensor, q: Tensor, cases: Cases, alone: bool) -> Tensor | None:
        """`mix` of heads [..., H hv] past torch's dispatcher, where that is `Cases.native`; None: not here.

        q [..., H hd], as `Projections.query`. alone: only a product sees the result: one tensor for all steps.
        The heads themselves where no case's alpha mixes anything in.
        """
        decision = cases.state.layers.get(self.layer)
        prepared: PreparedShift | None = cases.steps.get(self)
        if prepared is not None and prepared.decision is decision:
            if prepared.step is None:
                return heads
            out = prepared.out if alone else torch.empty_like(heads)
            done = prepared.step(out, heads, q)
            if done is not None:
                return out if done else None
        config = self.config
        here = config.per == "case" and config.attention == "projected" and self.backend in cpu_kernels.BACKENDS
        if decision is None or not here:
            return None
        if may_ask() and not bool((decision.alpha != self._nothing).any()):
            cases.steps[self] = PreparedShift(decision)
            return heads
        with torch.inference_mode(False):  # for steps with and without
            own = torch.empty(heads.shape, dtype=heads.dtype)
        tables = (self.memory._buffers, decision.indices, decision.alpha, cases.token_to_case)
        scores = (self.scaling, self.softcap, config.orientation == "input")
        step = cpu_kernels.shift_step(heads, q, *tables, *scores, own)
        if step is None:
            return None
        cases.steps[self] = PreparedShift(decision, step, own)
        out = own if alone else torch.empty_like(heads)
        return out if step(out, heads, q) else None

    # ------------------------------------------------------------------------------------------------ items and encoder

    def load(self, items: Items, attention: nn.Module, projections: Projections) -> None:
        """Replaces the memory's items, as `ExternalMemory.load`, and what is precomputed of them and the projection."""
        self.memory.load(items.sem, items.keys, items.values, items.shared, items.start)
        self.follow(items, attention, projections)

    def follow(self, items: Items, attention: nn.Module, projections: Projections) -> None:
        """After the memory was filled with these items: precomputes, and remembers what they were made of."""
        self.precompute(attention, projections)
        self.written.note(self._hangs_on(attention, projections), items.made_of)

    def alike(self, made_of: list[Table], attention: nn.Module, projections: Projections) -> int:
        """How many of the memory's first items are what would be made of these tables now."""
        return self.written.in_a_row(self._hangs_on(attention, projections), made_of)

    def _hangs_on(self, attention: nn.Module, projections: Projections) -> list[Tensor]:
        memory = [self.memory.sem, self.memory.keys, self.memory.values]
        return memory + (projections.item_tensors(attention) if self.config.attention == "projected" else [])

    @to_keep()
    def precompute(self, attention: nn.Module, projections: Projections) -> None:
        """Applies an affine encoder to all items, or folds it with a plain output projection, in place where it can."""
        config, found = self.config, dict[str, Tensor | None]()
        affine = self.encoder_act == "identity" or self.depth <= 1
        if self.backend in PRECOMPUTE and affine and self.depth and config.enabled and config.alpha is None:
            if config.attention == "raw":
                found["encoder_rows"] = folding.encoded_rows(self.memory.values, self.encoder)
            elif (plain := projections.plain_output(attention)) is not None:
                found["folded_weight"], found["folded_bias"] = folding.folded(*plain, self.encoder)
        for name in PRECOMPUTED:
            old, new = getattr(self, name), found.get(name)
            if old is not None and new is not None and (old.shape, old.dtype) == (new.shape, new.dtype):
                old.copy_(new)  # captured graphs follow
            else:
                setattr(self, name, new)

    def _encoder(self, attention: nn.Module, projections: Projections) -> dict[str, Any]:
        """The encoder as `ops.knowledge_shift` takes it: as is, or what is known of it, where no gradient is wanted."""
        if not torch.is_grad_enabled() and self.backend in PRECOMPUTE:
            if self.encoder_rows is None and self.folded_weight is None and may_ask():
                self.precompute(attention, projections)  # it came to this device by .to()
            if self.encoder_rows is not None:
                return {"encoder_rows": self.encoder_rows}
            if self.folded_weight is not None:
                return {"folded": (self.folded_weight, self.folded_bias)}
        return {"encoder": self.encoder or None, "encoder_act": self.encoder_act}

    def check_encoder(self, shared: LayerShared, before: LayerShared) -> None:
        """Raises ValueError unless the encoder in `shared` is that of the edits before: it is built into the patch."""
        if (maps := len(shared.encoder)) != self.depth:
            raise ValueError(f"layer {self.layer} has an encoder of {self.depth} maps, but got one of {maps}")
        for (like, _), old, new in zip(self.encoder, before.encoder, shared.encoder, strict=True):
            if not all(torch.equal(a.to(like), b.to(like)) for a, b in zip(old, new, strict=True)):
                raise ValueError(f"layer {self.layer} has another encoder than these edits; patch again instead")

    def extra_repr(self) -> str:
        return f"layer={self.layer}, k={self.config.k}, attention={self.config.attention}, alpha={self.config.alpha}"
