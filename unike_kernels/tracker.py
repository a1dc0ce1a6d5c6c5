"""CaseTracker: finds the cases of every forward pass of one decoder, and keeps what was decided with their KV cache.

A decision (edits routed to the case, items retrieved, alpha) is kept *on the KV cache*, so two sequences that decode in
turn never see each other's; packed batches name their cases explicitly. One pass runs at a time.
"""

import inspect
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import cpu_kernels
from .caches import cache_in, cache_of, decisions_on, forget, leave_on, tokens_in
from .cases import (
    Cases,
    CaseState,
    Version,
    attended,
    case_tokens_from_labels,
    last_attended,
    may_ask,
    padded_cases,
    refuse_packed,
)
from .choosing import ChoosesBackend
from .growth import Growth
from .naming import named_cases

CPU = torch.device("cpu")
CONTINUATIONS = ("refuse", "keep", "new")


class CaseTracker:
    """`current`: the cases of the pass that runs now, which the sites of the patch read; `explicit`: named by hand."""

    def __init__(self, name: str, decoder: nn.Module) -> None:
        self.name = name
        self.current: Cases | None = None
        self.explicit: Cases | None = None
        self.positions: Tensor | None = None  # [B] position of each row's case token, where named
        self.labels: Tensor | None = None  # of the pass that the modules around the decoder are in
        self.several_logits = False  # that pass is asked for the logits of more than its last token
        self.slots: CaseState | None = None  # the last state of cases named by hand: the tensors to decide into
        self.chosen: Tensor | None = None  # [C, m] edits chosen by hand for the cases of the next passes
        self.continuation = "refuse"  # what several tokens on a used KV cache are
        self.version = Version()
        self.parameters = tuple(inspect.signature(decoder.forward).parameters)
        self.step: Cases | None = None  # of the last decoding step that native code may serve
        self._moves = 0  # of modules, as it began: what it keeps of their tensors holds until the next
        self.growth = Growth()

    def __getstate__(self) -> dict[str, Any]:
        of_this_process = {
            "current": None,
            "slots": None,
            "explicit": None,
            "positions": None,
            "labels": None,
            "several_logits": False,
            "chosen": None,
            "continuation": "refuse",
            "step": None,
        }
        return {**self.__dict__, **of_this_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, version=state["version"].twin())

    def renew(self) -> None:
        """Forgets everything decided so far: after a swap, kept indices would point at other edits and items."""
        self.version.live = False
        self.version, self.current = Version(), None

    def name_cases(self, token_to_case: Tensor | None, case_tokens: Tensor | None) -> None:
        """Cases by hand, as in `named_cases`, for every pass until named again; (None, None): found automatically."""
        before = None if self.explicit is None else self.explicit.state
        self.explicit = named_cases(token_to_case, case_tokens, before, self.version)

    # ----------------------------------------------------------------------------------------------- before the decoder

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Before the decoder: finds the cases of this pass. True where it only goes on, and `end` has nothing to do."""
        if self._goes_on(args, kwargs):
            self.labels, self.current = None, self.step
            return True
        given = self._given(args, kwargs)
        labels, self.labels, self.current = self.labels, None, None
        tokens = _tokens(given)
        if tokens is None:
            return False  # the decoder says what is missing
        shape, device = tokens
        if self.explicit is not None:
            self.current = self._named(self.explicit, shape, device)
        else:
            self.current = self._found(given, shape, device, labels)
        if not self.current.decided:
            self._choose(self.current, device)
        elif self.chosen is not None:
            self._check_chosen(self.current.state)
        return False

    def skip(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the decoder of a patch that is switched off: what this pass puts into an empty cache is not ours."""
        self.labels = self.current = None
        forget(cache_in(self._given(args, kwargs)), self.name)

    def _given(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        # Cut to one length by hand: torch 2.6's compiler takes any `strict` for True, and has no `|` for dicts.
        n = min(len(self.parameters), len(args))
        return {**dict(zip(self.parameters[:n], args[:n], strict=True)), **kwargs}

    def _goes_on(self, args: tuple, given: dict[str, Any]) -> bool:
        """Whether this pass is one more of the same steps, one token a row: then nothing is to be found anew."""
        step = self.step
        if torch.compiler.is_compiling() or step is None or args or self._moves != ChoosesBackend.moves:
            return False
        tokens = given.get("inputs_embeds")
        if tokens is None:
            tokens = given.get("input_ids")
        cache = cache_in(given)
        if tokens is None or cache is None or self.explicit is not None or given.get("query_embeds") is not None:
            return False
        if self.chosen is not None and (not step.state.chosen or len(self.chosen) != step.state.size):
            return False  # it is refused
        if isinstance(cache, tuple):  # which lasts one step: the decisions are to be left on the next
            return False
        if decisions_on(cache, self.name) is not step.state or step.state.version is not self.version:
            return False
        rows = step.state.size
        if tokens.shape[:2] != (rows, 1) or not tokens.is_cpu or not cpu_kernels.unwatched():
            return False
        past, mask = tokens_in(cache, self.name), given.get("attention_mask")
        if not past:
            return False
        if not isinstance(mask, Tensor) or mask.dim() == 4:
            return True
        if mask.dim() != 2 or len(mask) != rows or not mask.is_cpu or not may_ask():
            return False
        return bool((mask[:, min(past, mask.size(1) - 1)] != 0).all())

    def _named(self, named: Cases, shape: torch.Size, device: torch.device) -> Cases:
        """The cases that were named by hand, for a pass of exactly as many tokens."""
        tokens = named.token_to_case.numel()
        if tokens != shape.numel():
            raise ValueError(
                f"set_cases named the cases of {tokens} tokens, but this pass has {' x '.join(map(str, shape))} = "
                f"{shape.numel()}; call set_cases() to find cases automatically again"
            )
        if named.once:  # of an earlier pass, whose token_to_case may have been overwritten since
            named.once.clear()
        state = named.state
        if named.fresh:  # a state of its own for every pass: the same cases may be asked again
            named.state = CaseState(self.version, state.size)
        elif self._stale(state):
            raise ValueError(
                "cases that an earlier pass decided go on, but the edits changed since: prefill them again"
            )
        return named.to(device)

    def _choose(self, cases: Cases, device: torch.device) -> None:
        """Puts the edits chosen by hand, if any, in the place of a router's decision."""
        state = cases.state
        if not cases.fresh and state.chosen != (self.chosen is not None):
            raise ValueError(
                "some cases go on from an earlier pass and some are new: choose edits for all of them from their start "
                "(None: the base model), or for none"
            )
        if self.chosen is None:
            return
        if len(self.chosen) != state.size:
            raise ValueError(
                f"edits were chosen for {len(self.chosen)} rows, but this pass has {state.size}; of beams, or several "
                "answers to a prompt, say how many: choosing(ids, repeat=...)"
            )
        chosen = self.chosen.to(device)
        state.selected = chosen if state.selected is None else cases.keep_decided(chosen, state.selected, -1)
        state.chosen, state.route_scores = True, None

    def _check_chosen(self, state: CaseState) -> None:
        """ValueError where edits are chosen by hand for cases that were decided before, and not by them."""
        assert self.chosen is not None
        if not state.chosen:
            raise ValueError(
                "edits were chosen for a pass on a KV cache whose cases were decided before, without a choice: choose "
                "from the prompt on"
            )
        if len(self.chosen) != state.size:
            raise ValueError(
                f"edits were chosen for {len(self.chosen)} rows, but this pass goes on with {state.size} cases; of "
                "beams, or several answers to a prompt, say how many: choosing(ids, repeat=...)"
            )

    # --------------------------------------------------------------------------------------------- cases that are found

    def _found(self, given: dict[str, Any], shape: torch.Size, device: torch.device, labels: Tensor | None) -> Cases:
        """One case per row of a padded batch."""
        if len(shape) != 2:
            raise ValueError(
                f"the decoder got tokens of shape {tuple(shape)}, not [batch, length], so they are packed: "
                "name their cases with handle.set_cases"
            )
        batch, length = shape
        mask, cache = given.get("attention_mask"), cache_in(given)
        past = tokens_in(cache, self.name)
        if past:
            state = self._continued(cache, batch, length)
            if state is not None:
                return self._decided(mask, batch, length, device, state, past)
        else:
            forget(cache, self.name)
        if length > 1:
            refuse_packed(given.get("position_ids"), mask, length, past)
        token_to_case = padded_cases(mask, batch, length, device, past)
        ends = self._prompt_ends(given, labels, token_to_case.view(batch, length), past)
        rows = torch.arange(batch, device=device) * length + ends
        if past and self.positions is None:
            seen, before = attended(mask, length, past), decisions_on(cache, self.name)
            if seen is not None and before is not None:
                # Prompts that ended in an earlier chunk have nothing but their padding here. Compiled code cannot ask
                # whether there are any, so it takes each for one that might be.
                some, alike = seen.any(dim=1), before.size == batch and before.chosen == (self.chosen is not None)
                if not bool(some.all()) if may_ask() else alike and not self._stale(before):
                    state = replace(self._checked(before, batch), layers=dict(before.layers))
                    return Cases(token_to_case, torch.where(some.to(device), rows, -1), state)
        return Cases(token_to_case, rows, CaseState(self.version, batch), fresh=True)

    def _continued(self, cache: Any, batch: int, length: int) -> CaseState | None:
        """The decisions that a pass on a used KV cache goes on with; None where it brings a prompt of its own."""
        state = decisions_on(cache, self.name)
        if state is None:
            if self.continuation == "new":
                return None
            raise ValueError(
                "this KV cache holds tokens that ran without this patch, so their case was never decided: prefill it "
                "with the patch on, or, if the prompt ends in this pass, use `with handle.continuing('new')`"
            )
        if length > 1 and self.continuation == "new":
            return None
        if length > 1 and self.continuation == "refuse":
            raise ValueError(
                f"a pass of {length} tokens on a KV cache whose case was already decided is either one answer that "
                "goes on (speculative decoding) or the rest of a prompt (a prompt in chunks, the next turn of a chat): "
                "use `with handle.continuing('keep')`, and handle.set_cases(case_positions=...) where the first pass "
                "already holds guesses behind the prompt, or `with handle.continuing('new')`"
            )
        return self._checked(state, batch)

    def _checked(self, state: CaseState, batch: int) -> CaseState:
        """The state that a KV cache brought, if it is of these edits and of so many rows."""
        if self._stale(state):
            raise ValueError(
                "the KV cache was prefilled before the edits of this patch changed; prefill it again after a swap"
            )
        if state.size != batch:
            raise ValueError(f"the KV cache was prefilled with {state.size} cases, but this pass has {batch} rows")
        if not torch.compiler.is_compiling():
            state.version = self.version  # of this model, if the cache was copied along with it
        return state

    def _stale(self, state: CaseState) -> bool:
        """Whether these decisions are of edits of before. Compiled code asks no token: it would be compiled anew."""
        if torch.compiler.is_compiling():
            return not state.version.live
        return state.version is not self.version and state.version != self.version

    def _decided(self, mask: Any, batch: int, length: int, device: torch.device, state: CaseState, past: int) -> Cases:
        """The cases of a pass that goes on with what was decided before, as every step of decoding does."""
        if batch * length > cpu_kernels.MOST_TOKENS or device != CPU or not cpu_kernels.unwatched():
            nowhere = torch.full((batch,), -1, dtype=torch.long, device=device)
            return Cases(padded_cases(mask, batch, length, device, past), nowhere, state, decided=True)
        # A decision from another device would have to be moved: left to those who do.
        there = all(of.indices.is_cpu for of in state.layers.values())
        native = there and (state.selected is None or state.selected.is_cpu)
        with torch.inference_mode(False):  # kept, so not to be a tensor that autograd refuses later
            nowhere = torch.full((batch,), -1, dtype=torch.long)
            token_to_case = padded_cases(mask, batch, length, device, past)
        found = Cases(token_to_case, nowhere, state, decided=True, native=native)
        plain = not isinstance(mask, Tensor) or (may_ask() and bool((token_to_case >= 0).all()))
        if native and length == 1 and plain:
            self.step, self._moves = found, ChoosesBackend.moves  # in which every row has its token
        return found

    def _prompt_ends(self, given: dict[str, Any], labels: Tensor | None, cases: Tensor, past: int) -> Tensor:
        """[B] position of each row's case token: named by hand, or before its labels, or its last that is no padding.

        cases: [B, length] each token's case, -1 for padding.
        """
        batch, length = cases.shape
        if self.positions is not None:
            return _checked_positions(self.positions, batch, length).to(cases.device)
        last = last_attended(given.get("attention_mask"), batch, length, cases.device, past)
        if labels is not None:
            if labels.shape != cases.shape:
                raise ValueError(
                    f"labels are {tuple(labels.shape)}, but the decoder sees {(batch, length)} tokens; "
                    "name the cases with handle.set_cases"
                )
            return case_tokens_from_labels(labels.to(cases.device), last, cases >= 0)
        without = given.get("use_cache") is False
        if cache_in(given) is None and (without or not self.several_logits):
            self.growth.watch(given.get("input_ids"), (batch, length), without)
        elif self.several_logits and not past:
            self.growth.suspect()
        return last

    # ------------------------------------------------------------------------------------------------ after the decoder

    def end(self, output: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """After the decoder: leaves the decisions on the KV cache, its arguments' where the output has none."""
        if self.current is None:
            return
        if self.explicit is not None:
            self.current.state.known = self.explicit.known  # made by now: what a graph captures is not computed
            self.slots = self.current.settled(self.slots)
            return
        cache = cache_of(output, self._given(args, kwargs))
        if cache is not None:
            leave_on(cache, self.name, self.current)


def _tokens(given: dict[str, Any]) -> tuple[torch.Size, torch.device] | None:
    """Shape and device of a pass's tokens, without the width of embeddings; None where it is called without any."""
    tokens = given.get("inputs_embeds")
    if tokens is not None:
        shape = tokens.shape[:-1]
    else:
        tokens = given.get("input_ids")
        if tokens is None:
            return None
        shape = tokens.shape
    picture = given.get("query_embeds")
    if picture is not None:  # LAVIS's OPT puts these before its tokens inside the decoder
        shape = torch.Size((shape[0], picture.shape[1] + shape[1]))
    return shape, tokens.device


def _checked_positions(at: Tensor, batch: int, length: int) -> Tensor:
    """`at` [B], if it names a token of each row of this pass."""
    if len(at) != batch:
        raise ValueError(
            f"case positions were named for {len(at)} rows, but this pass has {batch}; of beams, or several "
            "answers to a prompt, name every row's: case_positions.repeat_interleave(beams)"
        )
    if may_ask() and int(at.max()) >= length:
        raise ValueError(f"case positions reach {int(at.max())}, but this pass has {length} tokens a row")
    return at
