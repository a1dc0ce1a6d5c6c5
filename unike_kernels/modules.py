"""KnowledgeShift: the memory of one self-attention, and how its output is shifted towards what is found there.

A drop-in module, as `ExtraNeurons` and `Router` are: a child of the site's own module, called by the hooks of `hooks`.
None of them sees a batch dimension: tokens are flattened, and `Cases` says which token belongs to which case.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

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
        token_to_case: Tensor | None = cases.rows(config.positions)
        alpha: Tensor | float | None = config.alpha
        if config.per == "token":
            if config.alpha is None:
                return None
            if self._at_once(len(tap), cases.selected):
                alpha = cases.filled(config.alpha, self.memory.sem_norm)
                query = projections.query(attention, tap, projected)
                return self._retrieve_and_shift(heads, query, tap, token_to_case, cases, alpha=alpha)
            scores, indices, token_to_case = self._items_of_tokens(tap, token_to_case, cases)
            if token_to_case is not None:
                alpha = cases.filled(config.alpha, scores)
        else:
            outputs = None
            if alpha is None and not (cases.decided and self.layer in cases.state.layers):
                if torch.is_grad_enabled() or (plain := projections.plain_output(attention)) is None:
                    return None
                outputs = partial(_linear_rows, heads, *plain)
            decision = self._decide(tap, outputs, projected, attention, projections, cases)
            indices, alpha = decision.indices, decision.alpha
        used = None
        if not all_missing(indices):
            heads, used = ops.knowledge_shift(
                heads,
                projections.query(attention, tap, projected),
                **self._items(indices, token_to_case),
                alpha=alpha,
                orientation=config.orientation,
            )
        if config.per == "token":
            self._note(scores, indices, used, cases)
        return heads

    def mix_natively(self, heads: Tensor, q: Tensor, cases: Cases, alone: bool) -> Tensor | None:
        """`mix` of heads [..., H hv] past torch's dispatcher, where that is `Cases.native`; None: not here.

        q [..., H hd], as `Projections.query`. alone: only a product sees the result: one tensor for all steps.
        The heads themselves where no case's alpha mixes anything in.
        """
        before = cases.state.layers.get(self.layer)
        step, of, kept = cases.steps.get(self, (None, None, None))
        if kept is False and of is before:
            return heads
        out = kept if alone and of is before else torch.empty_like(heads)
        if step is not None and of is before:
            done = step(out, heads, q)
            if done is not None:
                return out if done else None
        config = self.config
        here = config.per == "case" and config.attention == "projected" and self.backend in cpu_kernels.BACKENDS
        if before is None or not here:
            return None
        if may_ask() and not bool((before.alpha != self._nothing).any()):
            cases.steps[self] = None, before, False
            return heads
        with torch.inference_mode(False):  # for steps with and without
            kept = torch.empty(heads.shape, dtype=heads.dtype)
        tables = (self.memory._buffers, before.indices, before.alpha, cases.token_to_case, self.scaling, self.softcap)
        step = cpu_kernels.shift_step(heads, q, *tables, config.orientation == "input", kept)
        cases.steps[self] = step, before, kept
        return out if step is not None and step(out, heads, q) else None

    def shift(
        self,
        tap: Tensor,
        h_att: Tensor,
        projected: Tensor | None,
        attention: nn.Module,
        projections: Projections,
        cases: Cases,
    ) -> Tensor:
        """h [T, d] for the tap [T, d] and the attention output h_att [T, d] of the layer's `attention` module.

        projected: q_proj's output [T, H hd] where the layer's own call was seen.

        Not `forward`: accelerate's hooks would move its arguments to a device, the offloaded `attention` among them.
        """
        if self.config.k == 0 or self.memory.capacity == 0:
            return h_att
        token_to_case: Tensor | None = cases.rows(self.config.positions)
        alpha: Tensor | float | None
        if self.config.per == "token":
            known = self._of_tokens(attention, projections) if self._at_once(len(tap), cases.selected) else None
            if known is not None:
                raw = self.config.attention == "raw"
                query = tap if raw else projections.query(attention, tap, projected)
                if self.config.alpha is not None:
                    known["alpha"] = cases.filled(self.config.alpha, self.memory.sem_norm)
                return self._retrieve_and_shift(h_att, query, tap, token_to_case, cases, **known)
            scores, indices, token_to_case = self._items_of_tokens(tap, token_to_case, cases)
            alpha = fixed = self.config.alpha
            if fixed is not None and token_to_case is not None:
                alpha = cases.filled(fixed, scores)
        else:
            decision = self._decide(tap, h_att.__getitem__, projected, attention, projections, cases)
            indices, alpha = decision.indices, decision.alpha
        h, used = h_att, None
        if not all_missing(indices):
            q = projections.query(attention, tap, projected) if self.config.attention == "projected" else tap
            h, used = self._shift(h_att, q, indices, attention, projections, alpha=alpha, token_to_case=token_to_case)
        if self.config.per == "token":
            self._note(scores, indices, used, cases)
        return h

    def check_encoder(self, shared: LayerShared, before: LayerShared) -> None:
        """Raises ValueError unless the encoder in `shared` is that of the edits before: it is built into the patch."""
        if (maps := len(shared.encoder)) != self.depth:
            raise ValueError(f"layer {self.layer} has an encoder of {self.depth} maps, but got one of {maps}")
        for (like, _), old, new in zip(self.encoder, before.encoder, shared.encoder, strict=True):
            if not all(torch.equal(a.to(like), b.to(like)) for a, b in zip(old, new, strict=True)):
                raise ValueError(f"layer {self.layer} has another encoder than these edits; patch again instead")

    @property
    def _nothing(self) -> float:
        """The alpha of a case without any knowledge."""
        return 0.0 if self.config.orientation == "knowledge" else 1.0

    def _decide(
        self, tap: Tensor, outputs: Callable[[Tensor], Tensor] | None, projected: Tensor | None, attention: nn.Module,
        projections: Projections, cases: Cases,
    ) -> LayerDecision:  # fmt: skip
        """Items and alpha of every case: computed where the case token is in this pass, kept where it is not.

        outputs: gives rows of the attention's output; only a fixed alpha does without.
        """
        before = cases.state.layers.get(self.layer)
        if cases.decided and before is not None:
            return LayerDecision(*(t.to(tap.device) for t in (before.indices, before.scores, before.alpha)))
        at, selected = cases.case_tokens.clamp(min=0), cases.selected  # [C]
        scores, indices = self._search(tap[at], selected)
        found = (indices >= 0).any(dim=1)
        if self.config.alpha is not None or all_missing(indices):
            fixed = self._nothing if self.config.alpha is None else self.config.alpha
            alpha = torch.full_like(scores[:, 0], fixed)
        else:
            assert outputs is not None
            q = tap[at]
            if self.config.attention == "projected":
                q = projections.query(attention, q, None if projected is None else projected[at])
            _, alpha = self._shift(outputs(at), q, indices, attention, projections)
        alpha = torch.where(found, alpha, self._nothing)
        if before is not None:
            scores = cases.keep_decided(scores, before.scores, -torch.inf)
            indices = cases.keep_decided(indices, before.indices, -1)
            alpha = cases.keep_decided(alpha, before.alpha, 0.0)
        decision = LayerDecision(indices, scores, alpha)
        cases.state.layers[self.layer] = decision
        return decision

    def _items_of_tokens(self, tap: Tensor, rows: Tensor, cases: Cases) -> tuple[Tensor, Tensor, Tensor | None]:
        """(scores, indices) [T, K] of every token by itself; nothing for tokens of no case, or of an unrouted one.

        While always-on edits decode, a launch costs more than to search for such tokens too: then also, as
        knowledge_shift's token_to_case, which tokens act.
        """
        selected = cases.selected
        if selected is None and cases.decided and len(tap) <= FEW_TOKENS:
            return (*self._search(tap, None), cases.own(self.config.positions))
        of_token = None if selected is None else selected[cases.token_to_case.clamp(min=0)]
        scores, indices = self._search(tap, of_token)
        idle = (rows < 0)[:, None]
        return scores.masked_fill(idle, -torch.inf), indices.masked_fill(idle, -1), None

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

    def _at_once(self, tokens: int, selected: Tensor | None) -> bool:
        """Whether one operator finds items for so many tokens, of cases with the edits [C, m], and shifts by them."""
        few = tokens <= FEW_TOKENS and self.config.k <= MAX_K and (selected is None or selected.shape[1] <= MAX_K)
        return few and self.backend == "triton" and not torch.is_grad_enabled()

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

    def _retrieve_and_shift(
        self, h_input: Tensor, q: Tensor, tap: Tensor, rows: Tensor, cases: Cases, **known: Any
    ) -> Tensor:
        memory, config = self.memory, self.config
        h, alpha, scores, indices = ops.retrieve_and_shift(
            h_input, q, memory.keys, memory.values, tap, memory.sem, config.k, spans=memory.spans,
            sem_norm=memory.sem_norm, token_to_case=rows, selected=cases.selected, orientation=config.orientation,
            clamp=config.clamp, backend=self.backend, **self._scores, **known,
        )  # fmt: skip
        self._note(scores, indices, alpha, cases)
        return h

    def _note(self, scores: Tensor, indices: Tensor, alpha: Tensor | None, cases: Cases) -> None:
        """Keeps what the case tokens found, for `explain` alone: with per="token" nothing of it is used again.

        alpha: [T], None where no token found anything.
        """
        if not cases.decided:
            at = cases.case_tokens.clamp(min=0)
            alpha = torch.full_like(scores[:, 0], self._nothing) if alpha is None else alpha
            cases.state.layers[self.layer] = LayerDecision(indices[at], scores[at], alpha[at])

    def _items(self, indices: Tensor, token_to_case: Tensor | None) -> dict[str, Any]:
        items = {"item_keys": self.memory.keys, "item_values": self.memory.values, "indices": indices}
        return {**items, "token_to_case": token_to_case, **self._scores, "backend": self.kernels}

    @property
    def _scores(self) -> dict[str, Any]:
        """How scores become softmax weights: as in the layer, or 1 / sqrt(d)."""
        raw = self.config.attention == "raw"
        return {"scaling": None if raw else self.scaling, "softcap": None if raw else self.softcap}

    def _shift(
        self,
        h_input: Tensor,
        q: Tensor,
        indices: Tensor,
        attention: nn.Module,
        projections: Projections,
        alpha: Tensor | float | None = None,
        token_to_case: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(h, alpha): one operator call where the output projection is a plain linear map, otherwise around it."""
        raw = self.config.attention == "raw"
        weights = None if raw else projections.plain_output(attention)
        items = self._items(indices, token_to_case)
        if raw or weights is not None:
            return ops.knowledge_shift(
                h_input,
                q,
                **items,
                alpha=alpha,
                out_proj=weights,
                **({} if alpha is not None else self._encoder(attention, projections)),
                orientation=self.config.orientation,
                clamp=self.config.clamp,
            )
        # A quantised, adapted or offloaded projection is called, never read: attention over the items first (alpha 1
        # gives h_know itself), the projection, then the mix.
        heads, _ = ops.knowledge_shift(h_input.new_zeros(q.flatten(1).shape), q, **items, alpha=1.0)
        h_know = projections.output(attention, heads)
        if alpha is None:
            alpha = reference.alpha(
                h_know, h_input, encoder=self.encoder or None, act=self.encoder_act, clamp=self.config.clamp
            )
        elif not isinstance(alpha, Tensor):
            alpha = torch.full(indices.shape[:1], alpha, dtype=reference.compute_dtype(h_input), device=h_input.device)
        per_case = per_token = torch.where((indices >= 0).any(dim=1), alpha, self._nothing)
        if token_to_case is not None:
            per_token = torch.where(token_to_case >= 0, per_case[token_to_case.clamp(min=0)], self._nothing)
        return reference.shift(h_input, h_know, per_token, orientation=self.config.orientation), per_case

    def extra_repr(self) -> str:
        return f"layer={self.layer}, k={self.config.k}, attention={self.config.attention}, alpha={self.config.alpha}"
