"""CaseTracker: finds the cases of every forward pass of one decoder, and keeps what was decided with their KV cache.

A decision (edits routed to the case, items retrieved, alpha) is kept *on the KV cache*, so two sequences that decode in
turn never see each other's; packed batches name their cases explicitly. One pass runs at a time.
"""

import inspect
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from . import cpu_kernels
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
from .following import CACHE_ATTRIBUTE, STORAGE_ATTRIBUTE, follow_rows

CACHE_NAMES = ("cache", "past_key_values")  # what models call their KV cache: transformers from 5.24, and before
CPU = torch.device("cpu")
TRACES_FOLLOWERS = torch.__version__ >= (2, 13)  # whether torch's compiler can make them: 2.13 and 2.15 can, 2.6 cannot
CONTINUATIONS = ("refuse", "keep", "new")
FREE = -2  # in the place of a case token: the slot's decisions are forgotten


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
        self.legacy = WeakIdKeyDictionary()  # first key tensor of a tuple cache (transformers < 4.36) -> CaseState
        self.step: Cases | None = None  # of the last decoding step that native code may serve
        self._moves = 0  # of modules, as it began: what it keeps of their tensors holds until the next
        self._growth: tuple[Any, tuple[int, int], int] = (None, (0, 0), 0)  # see _watch_growth
        self._warned = False

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
            "_growth": (None, (0, 0), 0),
        }
        return {**self.__dict__, **of_this_process, "legacy": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, version=state["version"].twin())
        self.legacy = WeakIdKeyDictionary()

    def renew(self) -> None:
        """Forgets everything decided so far: after a swap, kept indices would point at other edits and items."""
        self.version.live = False
        self.version, self.current = Version(), None

    # ------------------------------------------------------------------------------------------------- one pass

    def begin(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Before the decoder: finds the cases of this pass. True where it only goes on, and `end` has nothing to do."""
        if (
            self.step is not None
            and not args
            and not torch.compiler.is_compiling()
            and self._goes_on(self.step, kwargs)
        ):
            self.labels, self.current = None, self.step
            return True
        given = self._given(args, kwargs)
        labels, self.labels, self.current = self.labels, None, None
        inputs = given.get("inputs_embeds")
        shape = None if inputs is None else inputs.shape[:-1]
        if inputs is None:
            inputs = given.get("input_ids")
            shape = None if inputs is None else inputs.shape
        if inputs is None or shape is None:
            return False  # the decoder says what is missing
        picture = given.get("query_embeds")
        if picture is not None:  # LAVIS's OPT puts these before its tokens inside the decoder
            shape = torch.Size((shape[0], picture.shape[1] + shape[1]))
        if self.explicit is not None:
            self.current = self._named(shape, inputs.device)
        else:
            self.current = self._found(given, shape, inputs.device, labels)
        if not self.current.decided:
            self._choose(self.current, inputs.device)
        return False

    def skip(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the decoder of a patch that is switched off: what this pass puts into an empty cache is not ours."""
        self.labels = self.current = None
        self._forget(_cache(self._given(args, kwargs)))

    def end(self, output: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """After the decoder: leaves the decisions on the KV cache, its arguments' where the output has none."""
        if self.current is None:
            return
        state = self.current.state
        if self.explicit is not None:
            now = self.current.case_tokens >= 0
            state.known = now if state.known is None else now | state.known.to(now.device)
            self.slots = self._settled(self.slots)
            return
        # Only the name that it has: transformers' newer outputs warn where they are asked for the older one.
        cache = getattr(output, CACHE_NAMES[0 if hasattr(output, CACHE_NAMES[0]) else 1], None)
        if isinstance(output, tuple):
            cache = output[1] if len(output) > 1 else None
        if cache is None:
            given = _cache(self._given(args, kwargs))
            cache = None if isinstance(given, tuple) else given  # with use_cache=False it is filled all the same
        if isinstance(cache, tuple):
            if cache and isinstance(cache[0], tuple):
                self.legacy[cache[0][0]] = state
        elif cache is not None and not isinstance(cache, Tensor):
            if self.current.native and self.kept(cache) is state:
                return  # left there by the step before
            if getattr(cache, "is_compileable", False) and not torch.compiler.is_compiling():
                storages = getattr(cache, STORAGE_ATTRIBUTE, {})
                setattr(cache, STORAGE_ATTRIBUTE, {**storages, self.name: self._settled(storages.get(self.name))})
            if not self.current.decided and (TRACES_FOLLOWERS or not torch.compiler.is_compiling()):
                follow_rows(cache)
            setattr(cache, CACHE_ATTRIBUTE, {**getattr(cache, CACHE_ATTRIBUTE, {}), self.name: state})

    def _settled(self, storage: CaseState | None) -> CaseState | None:
        """The state of this pass, with what it decided moved into `storage`, if that is of as many cases."""
        assert self.current is not None
        state = self.current.state
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or not may_ask():
            return storage  # a graph that is being captured replays nothing but what runs now
        if storage is not None and storage is not state and storage.size == state.size and not self.current.decided:
            state.move_into(storage)
        return state

    def _given(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
        # Cut to one length by hand: torch 2.6's compiler takes any `strict` for True, and has no `|` for dicts.
        n = min(len(self.parameters), len(args))
        return {**dict(zip(self.parameters[:n], args[:n], strict=True)), **kwargs}

    def _found(self, given: dict[str, Any], shape: torch.Size, device: torch.device, labels: Tensor | None) -> Cases:
        """One case per row of a padded batch."""
        if len(shape) != 2:
            raise ValueError(
                f"the decoder got tokens of shape {tuple(shape)}, not [batch, length], so they are packed: "
                "name their cases with handle.set_cases"
            )
        batch, length = shape
        mask, cache = given.get("attention_mask"), _cache(given)
        past = self._past(cache)
        if past:
            state = self._continued(cache, batch, length)
            if state is not None:
                return self._decided(mask, batch, length, device, state, past)
        else:
            self._forget(cache)
        token_to_case = padded_cases(mask, batch, length, device, past)
        if length > 1:
            refuse_packed(given.get("position_ids"), mask, length, past)
        last = last_attended(mask, batch, length, device, past)
        if self.positions is not None:
            last = self._named_positions(batch, length).to(device)
        elif labels is not None:
            if tuple(labels.shape) != (batch, length):
                raise ValueError(
                    f"labels are {tuple(labels.shape)}, but the decoder sees {(batch, length)} tokens; "
                    "name the cases with handle.set_cases"
                )
            last = case_tokens_from_labels(labels.to(device), last, token_to_case.view(batch, length) >= 0)
        elif cache is None and (given.get("use_cache") is False or not self.several_logits):
            self._watch_growth(given.get("input_ids"), (batch, length), given.get("use_cache") is False)
        elif self.several_logits and not past:
            self._watch_guesses()
        rows = torch.arange(batch, device=device) * length + last
        if past and self.positions is None:
            seen, before = attended(mask, length, past), self.kept(cache)
            if seen is not None and before is not None:
                # Prompts that ended in an earlier chunk have nothing but their padding here. Compiled code cannot ask
                # whether there are any, so it takes each for one that might be.
                some, alike = seen.any(dim=1), before.size == batch and before.chosen == (self.chosen is not None)
                if not bool(some.all()) if may_ask() else alike and not self._stale(before):
                    state = replace(self._checked(before, batch), layers=dict(before.layers))
                    return Cases(token_to_case, torch.where(some.to(device), rows, -1), state)
        return Cases(token_to_case, rows, CaseState(self.version, batch), fresh=True)

    def _goes_on(self, step: Cases, given: dict[str, Any]) -> bool:
        """Whether this pass is one more of the same steps, one token a row: then nothing is to be found anew."""
        if self._moves != ChoosesBackend.moves:
            return False
        tokens = given.get("inputs_embeds")
        if tokens is None:
            tokens = given.get("input_ids")
        cache = _cache(given)
        if tokens is None or cache is None or self.explicit is not None or given.get("query_embeds") is not None:
            return False
        kept = getattr(cache, CACHE_ATTRIBUTE, None)
        if kept is None or kept.get(self.name) is not step.state or step.state.version is not self.version:
            return False
        rows = step.state.size
        if tokens.shape[:2] != (rows, 1) or not tokens.is_cpu or not cpu_kernels.unwatched():
            return False
        past, mask = self._past(cache), given.get("attention_mask")
        if not past:
            return False
        if not isinstance(mask, Tensor) or mask.dim() == 4:
            return True
        if mask.dim() != 2 or len(mask) != rows or not mask.is_cpu or not may_ask():
            return False
        return bool((mask[:, min(past, mask.size(1) - 1)] != 0).all())

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

    def _named(self, shape: torch.Size, device: torch.device) -> Cases:
        """The cases that were named by hand, for a pass of exactly as many tokens."""
        assert self.explicit is not None
        named, tokens = self.explicit, self.explicit.token_to_case.numel()
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

    def _named_positions(self, batch: int, length: int) -> Tensor:
        assert self.positions is not None
        at = self.positions
        if len(at) != batch:
            raise ValueError(
                f"case positions were named for {len(at)} rows, but this pass has {batch}; of beams, or several "
                "answers to a prompt, name every row's: case_positions.repeat_interleave(beams)"
            )
        if may_ask() and int(at.max()) >= length:
            raise ValueError(f"case positions reach {int(at.max())}, but this pass has {length} tokens a row")
        return at

    def _watch_growth(self, ids: Any, shape: tuple[int, int], asked: bool) -> None:
        """Warns when passes without a KV cache grow token by token: each one's last token is taken for a prompt's.

        asked: use_cache=False says that they are such passes; otherwise the tokens `ids` [B, length], if at hand, do.
        """
        if self._warned or torch.compiler.is_compiling():
            return
        before, (batch, length), grown = self._growth
        grows = shape == (batch, length + 1)
        if grows and not asked:
            known = isinstance(ids, Tensor) and isinstance(before, Tensor) and ids.device == before.device
            grows = known and may_ask() and torch.equal(ids[:, :-1], before)
        self._growth = (ids, shape, grown + 1 if grows else 0)
        if self._growth[2] == 2:
            self._warned = True
            warnings.warn(
                "this looks like generation without a KV cache: every pass is a new case, whose case token is the "
                "newest token. Name the prompts' ends with handle.set_cases(case_positions=...), or use a KV cache",
                stacklevel=2,
            )

    def _watch_guesses(self) -> None:
        """Warns where a first pass may hold more than its prompt: nothing tells a guessed token from a prompt's."""
        if not torch.compiler.is_compiling() and not self._warned:
            self._warned = True
            warnings.warn(
                "the logits of several tokens of a first pass are asked for, but its last token is taken for the "
                "prompt's end. Where it already holds guesses (assisted generation, prompt lookup) or an answer, "
                "name the prompts' ends with handle.set_cases(case_positions=...)",
                stacklevel=2,
            )

    # ------------------------------------------------------------------------------------------------ KV caches

    def kept(self, cache: Any) -> CaseState | None:
        """The state that an earlier pass left on this KV cache."""
        if isinstance(cache, tuple):
            return self.legacy.get(cache[0][0]) if cache else None
        return getattr(cache, CACHE_ATTRIBUTE, {}).get(self.name)

    def _continued(self, cache: Any, batch: int, length: int) -> CaseState | None:
        """The decisions that a pass on a used KV cache goes on with; None where it brings a prompt of its own."""
        state = self.kept(cache)
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

    def _past(self, cache: Any) -> int:
        """Tokens that a KV cache holds; -1 stands for a number on the device that may not be read now."""
        if cache is None:
            return 0
        if isinstance(cache, tuple):
            return cache[0][0].shape[-2] if cache else 0
        if not hasattr(cache, "get_seq_length"):
            raise ValueError(
                f"a {type(cache).__name__} does not say how many tokens it holds, so nothing tells a prompt from an "
                "answer that goes on (continuous batching, generate_batch, brings such a cache): use model.generate, "
                "or name the cases of every pass with handle.set_cases"
            )
        length = cache.get_seq_length()
        if isinstance(length, Tensor) and not may_ask():
            return -1 if self.kept(cache) is not None else 0
        return int(length)

    def _forget(self, cache: Any) -> None:
        """Takes the decisions of an earlier sequence off an empty cache: generate() resets and reuses static caches."""
        if not isinstance(cache, tuple) and self.kept(cache) is not None and not self._past(cache):
            setattr(
                cache, CACHE_ATTRIBUTE, {n: s for n, s in getattr(cache, CACHE_ATTRIBUTE).items() if n != self.name}
            )

    # -------------------------------------------------------------------------------------------------- by hand

    def name_cases(self, token_to_case: Tensor | None, case_tokens: Tensor | None) -> None:
        """Cases by hand, for every pass until named again; (None, None) returns to finding them automatically.

        token_to_case: [T] int64, -1 for tokens of no case; case_tokens: [C] int64 rows into the T tokens, -1 for a
        case that an earlier pass decided (its slot's decisions are kept), -2 for a slot that is free.
        """
        if token_to_case is None or case_tokens is None:
            if token_to_case is not None or case_tokens is not None:
                raise ValueError("set_cases takes both token_to_case and case_tokens, or None for both")
            self.explicit = None
            return
        token_to_case, case_tokens = token_to_case.long().reshape(-1), case_tokens.long().reshape(-1)
        tokens, size = token_to_case.numel(), case_tokens.numel()
        _check_range("token_to_case", token_to_case, size, f"{size} case tokens")
        _check_range("case_tokens", case_tokens, tokens, f"{tokens} tokens", lowest=FREE)
        new, kept = case_tokens >= 0, case_tokens != FREE
        if not bool(kept.all()):
            case_tokens = case_tokens.clamp(min=-1)  # else the caller's own tensor, which an engine may overwrite
        owner = token_to_case[case_tokens[new]]
        if not torch.equal(owner, new.nonzero().flatten().to(owner)):
            raise ValueError(
                f"case tokens {case_tokens[new].tolist()} of cases {new.nonzero().flatten().tolist()} belong to "
                f"cases {owner.tolist()}"
            )
        before = None if self.explicit is None else self.explicit.state
        stale = before is not None and before.version != self.version
        if before is not None and (stale or before.known is None):
            before = None
        if before is not None and before.size != size:
            before = before.resized(size)
        known = torch.zeros_like(new) if before is None or before.known is None else before.known.to(new.device) & kept
        used = torch.zeros_like(new).index_fill(0, token_to_case[token_to_case >= 0], True)
        if bool((used & ~new & ~known).any()):
            missing = (used & ~new & ~known).nonzero().flatten().tolist()
            raise ValueError(
                f"cases {missing} have no case token in this pass and "
                + (
                    "were decided before the edits changed: prefill them again"
                    if stale
                    else "were never decided: a new "
                    "slot, one that was freed, or what was decided was forgotten by set_cases()"
                )
            )
        if before is None or bool(new.all()):
            self.explicit = Cases(token_to_case, case_tokens, CaseState(self.version, size), fresh=True)
        else:
            state = replace(before, layers=dict(before.layers), known=known)
            self.explicit = Cases(token_to_case, case_tokens, state, decided=not bool(new.any()))


def _cache(given: dict[str, Any]) -> Any:
    """The KV cache among a decoder's arguments."""
    newer = given.get(CACHE_NAMES[0])
    return given.get(CACHE_NAMES[1]) if newer is None else newer


def _check_range(name: str, index: Tensor, size: int, what: str, lowest: int = -1) -> None:
    if index.numel() and not lowest <= int(index.min()) <= int(index.max()) < size:
        raise ValueError(
            f"{name} must be in [{lowest}, {size}) for {what}, but spans [{int(index.min())}, {int(index.max())}]"
        )
