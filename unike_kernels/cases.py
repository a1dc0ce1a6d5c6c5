"""Which token belongs to which case, where each case's case token is, and what was decided for a case.

A case is one sequence; its case token is the last token of its prompt (spec, section 1). What is decided there
(edits routed to the case, items retrieved, alpha) is kept while that sequence decodes. It is kept *on the KV cache*,
so two sequences that decode in turn never see each other's decisions; packed batches name their cases explicitly.
"""

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

CACHE_ATTRIBUTE = "_unike_cases"  # {patch name: CaseState} on a KV cache object


@dataclass
class LayerDecision:
    """What one layer decided for its cases: items retrieved and the strength of the shift."""

    indices: Tensor  # [C, K] int64, -1 padded
    scores: Tensor  # [C, K] float32, -inf padded
    alpha: Tensor  # [C] float


@dataclass
class CaseState:
    """All that was decided for C cases, by layer; `version` is the patch's storage at that time."""

    version: object
    size: int
    selected: Tensor | None = None  # [C, m] int64 group ids of the routed edits, -1 padded
    route_scores: Tensor | None = None  # [C, m]
    chosen: bool = False  # selected by hand, not by the router
    layers: dict[int, LayerDecision] = field(default_factory=dict)


@dataclass
class Cases:
    """The cases of one forward pass of T tokens (all leading dimensions flattened, row-major)."""

    token_to_case: Tensor  # [T] int64, -1: belongs to no case (padding)
    case_tokens: Tensor  # [C] int64 row of the case token, -1: not in this pass (the case was decided before)
    state: CaseState
    decided: bool = False  # True: every case was decided before, nothing to retrieve
    fresh: bool = False  # True: every case is decided in this pass, nothing to keep

    def rows(self, positions: str) -> Tensor:
        """[T] int64: token_to_case, with -1 also before the case token where positions is "from_case_token"."""
        if positions == "all":
            return self.token_to_case
        case = self.token_to_case.clamp(min=0)
        row = torch.arange(case.shape[0], device=case.device)
        return torch.where(row >= self.case_tokens[case], self.token_to_case, -1)

    def to(self, device: torch.device) -> "Cases":
        """The same cases with their maps on `device` (layers of one model may sit on several)."""
        if self.token_to_case.device == device:
            return self
        return Cases(self.token_to_case.to(device), self.case_tokens.to(device), self.state, self.decided, self.fresh)


def cases_from_ptr(case_ptr: Tensor) -> tuple[Tensor, Tensor]:
    """(token_to_case [T], case_tokens [C]) of a packed batch in CSR form: case c is tokens case_ptr[c]:case_ptr[c+1].

    case_ptr: [C + 1] int64, starting at 0, not falling; every case token is its case's last token. An empty case has
    case token -1.
    """
    if case_ptr.dim() != 1 or case_ptr.numel() == 0 or case_ptr.is_floating_point():
        raise ValueError(f"case_ptr must be [C + 1] integers, but got {tuple(case_ptr.shape)} {case_ptr.dtype}")
    lengths = case_ptr[1:] - case_ptr[:-1]
    if int(case_ptr[0]) != 0 or bool((lengths < 0).any()):
        raise ValueError(f"case_ptr must start at 0 and never fall, but got {case_ptr.tolist()}")
    case = torch.arange(lengths.numel(), device=case_ptr.device)
    return torch.repeat_interleave(case, lengths), torch.where(lengths > 0, case_ptr[1:] - 1, -1)


def case_tokens_from_labels(labels: Tensor, fallback: Tensor) -> Tensor:
    """[B] position of the token before the first label that is not -100; `fallback` [B] where a row has no label.

    Raises ValueError where the first label stands at position 0: nothing before it could be the case token.
    """
    wanted = labels != -100
    first = wanted.int().argmax(dim=1)
    some = wanted.any(dim=1)
    if not torch.compiler.is_compiling() and bool((some & (first == 0)).any()):
        rows = (some & (first == 0)).nonzero().flatten().tolist()
        raise ValueError(
            f"labels of rows {rows} start at position 0, so no token before them can be the case token; "
            "set the prompt's labels to -100, or name the cases with handle.set_cases"
        )
    return torch.where(some, first - 1, fallback)


def last_attended(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """[B] position, among the last `length` tokens, of each row's last attended token.

    mask: [B, S >= length] (1 attended), or [B, 1, length, S] as attention layers take it (bool, or additive), or None.
    """
    if isinstance(mask, Tensor) and mask.dim() == 4:
        row = mask[:, 0, -1, :]  # the last query sees every key that is no padding
        mask = row if row.dtype == torch.bool else row == 0
        position = torch.arange(mask.shape[1], device=mask.device)
        return (mask * position).amax(dim=1).expand(batch).clamp(max=length - 1)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return torch.full((batch,), length - 1, dtype=torch.long, device=device)
    here = mask[:, -length:] != 0
    position = torch.arange(here.shape[1], device=here.device)
    return (here * position).amax(dim=1)


def padded_cases(mask: Tensor | None, batch: int, length: int, device: torch.device) -> Tensor:
    """[B * S] int64: the row of each token of a padded batch as its case, -1 for padding."""
    case = torch.arange(batch, device=device)[:, None].expand(batch, length)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= length:
        case = torch.where(mask[:, -length:].to(device) != 0, case, -1)
    return case.reshape(-1)


class CaseTracker:
    """Finds the cases of every forward pass of one decoder; `current` is what the sites of that patch read."""

    def __init__(self, name: str, decoder: nn.Module) -> None:
        self.name = name
        self.current: Cases | None = None
        self.explicit: Cases | None = None
        self.labels: Tensor | None = None
        self.chosen: Tensor | None = None  # [C, m] edits chosen by hand for the cases of the next passes
        self.version: object = object()
        self.parameters = tuple(inspect.signature(decoder.forward).parameters)
        self.legacy = WeakIdKeyDictionary()  # first key tensor of a tuple cache (transformers < 4.36) -> CaseState

    def __getstate__(self) -> dict:
        return {
            **self.__dict__,
            "current": None,
            "explicit": None,
            "labels": None,
            "legacy": None,
            "version": None,
            "chosen": None,
        }

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.legacy, self.version = WeakIdKeyDictionary(), object()

    def renew(self) -> None:
        """Forgets everything decided so far: after a swap, kept indices would point into other items."""
        self.version, self.current = object(), None

    def begin(self, args: tuple, kwargs: dict) -> None:
        """Before the decoder: finds the cases of this pass."""
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        labels, self.labels = self.labels, None
        inputs = given.get("inputs_embeds")
        inputs = given.get("input_ids") if inputs is None else inputs
        batch, length = inputs.shape[0], inputs.shape[1]
        picture = given.get("query_embeds")
        if picture is not None:  # LAVIS's OPT puts these before its tokens inside the decoder
            length += picture.shape[1]
        if self.explicit is not None:
            tokens = self.explicit.token_to_case.numel()
            if tokens != batch * length:
                raise ValueError(
                    f"set_cases named the cases of {tokens} tokens, but this pass has {batch} x {length} = "
                    f"{batch * length}; call set_cases(None, None) to find cases automatically again"
                )
            self.current = self.explicit.to(inputs.device)
            self.choose(self.current.state, inputs.device)
            return
        mask = given.get("attention_mask")
        token_to_case = padded_cases(mask, batch, length, inputs.device)
        state = self.kept(given.get("past_key_values"))
        if state is not None:
            if state.size != batch:
                raise ValueError(f"the KV cache was prefilled with {state.size} cases, but this pass has {batch} rows")
            if state.version is not self.version:
                raise ValueError(
                    "the KV cache was prefilled before the edits of this patch changed; prefill it again after a swap"
                )
            nowhere = torch.full((batch,), -1, dtype=torch.long, device=inputs.device)
            self.current = Cases(token_to_case, nowhere, state, decided=True)
            return
        last = last_attended(mask, batch, length, inputs.device).to(inputs.device)
        if labels is not None:
            if tuple(labels.shape) != (batch, length):
                raise ValueError(
                    f"labels are {tuple(labels.shape)}, but the decoder sees {(batch, length)} tokens; "
                    "name the cases with handle.set_cases"
                )
            last = case_tokens_from_labels(labels.to(inputs.device), last)
        rows = torch.arange(batch, device=inputs.device) * length + last
        self.current = Cases(token_to_case, rows, CaseState(self.version, batch), fresh=True)
        self.choose(self.current.state, inputs.device)

    def choose(self, state: CaseState, device: torch.device) -> None:
        """Puts the edits chosen by hand, if any, in the place of a router's decision."""
        if self.chosen is None:
            return
        beams, rest = divmod(state.size, max(1, len(self.chosen)))
        if rest or not beams:
            raise ValueError(f"edits were chosen for {len(self.chosen)} cases, but this pass has {state.size}")
        state.selected = self.chosen.to(device).repeat_interleave(beams, dim=0)  # a beam search repeats every prompt
        state.chosen = True

    def kept(self, cache: object) -> CaseState | None:
        """The state that an earlier pass left on this KV cache, None for an empty, reset or foreign one."""
        if cache is None:
            return None
        if isinstance(cache, tuple):
            return self.legacy.get(cache[0][0]) if cache else None
        state = getattr(cache, CACHE_ATTRIBUTE, {}).get(self.name)
        if state is None or torch.compiler.is_compiling():
            return state
        return state if int(cache.get_seq_length()) > 0 else None  # generate() resets and reuses static caches

    def end(self, output: object) -> None:
        """After the decoder: leaves the decisions on the KV cache."""
        if self.explicit is not None or self.current is None:
            return
        cache = getattr(output, "past_key_values", None)
        if isinstance(output, tuple):
            cache = output[1] if len(output) > 1 else None
        if isinstance(cache, tuple):
            if cache:
                self.legacy[cache[0][0]] = self.current.state
        elif cache is not None:
            kept = {**getattr(cache, CACHE_ATTRIBUTE, {}), self.name: self.current.state}
            setattr(cache, CACHE_ATTRIBUTE, kept)

    def name_cases(self, token_to_case: Tensor | None, case_tokens: Tensor | None) -> None:
        """Cases by hand, for every pass until named again; (None, None) returns to finding them automatically.

        token_to_case: [T] int64, -1 for tokens of no case; case_tokens: [C] int64 rows into the T tokens, -1 for a
        case that an earlier pass decided (its slot's decisions are kept).
        """
        if token_to_case is None or case_tokens is None:
            if token_to_case is not None or case_tokens is not None:
                raise ValueError("set_cases takes both token_to_case and case_tokens, or None for both")
            self.explicit = None
            return
        token_to_case, case_tokens = token_to_case.long().reshape(-1), case_tokens.long().reshape(-1)
        tokens, size = token_to_case.numel(), case_tokens.numel()
        if tokens and not -1 <= int(token_to_case.min()) <= int(token_to_case.max()) < size:
            low, high = int(token_to_case.min()), int(token_to_case.max())
            raise ValueError(f"token_to_case must be in [-1, {size}) for {size} case tokens, but spans [{low}, {high}]")
        if size and not -1 <= int(case_tokens.min()) <= int(case_tokens.max()) < tokens:
            low, high = int(case_tokens.min()), int(case_tokens.max())
            raise ValueError(f"case_tokens must be in [-1, {tokens}) for {tokens} tokens, but spans [{low}, {high}]")
        waiting = case_tokens < 0
        before = self.explicit.state if self.explicit is not None else None
        keep = before is not None and before.size == size and before.version is self.version and before.layers
        used = torch.zeros(size, dtype=torch.bool, device=token_to_case.device)
        used[token_to_case[token_to_case >= 0]] = True
        if not keep and bool((waiting & used).any()):
            missing = (waiting & used).nonzero().flatten().tolist()
            raise ValueError(f"cases {missing} have no case token in this pass and were never decided before")
        state = before if keep and before is not None else CaseState(self.version, size)
        self.explicit = Cases(
            token_to_case,
            case_tokens,
            state,
            decided=bool(waiting.all()) and size > 0,
            fresh=not bool(waiting.any()),
        )


class LabelsHook:
    """Forward pre-hook on every module around the decoder: remembers `labels` for the decoder's pass."""

    def __init__(self, tracker: CaseTracker, module: nn.Module) -> None:
        self.tracker = tracker
        names = tuple(inspect.signature(module.forward).parameters)
        self.position = names.index("labels") if "labels" in names else None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        labels = kwargs.get("labels")
        if labels is None and self.position is not None and self.position < len(args):
            labels = args[self.position]
        if labels is not None:
            self.tracker.labels = labels


class BeginHook:
    """Forward pre-hook on the decoder."""

    def __init__(self, tracker: CaseTracker) -> None:
        self.tracker = tracker

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.tracker.begin(args, kwargs)


class EndHook:
    """Forward hook on the decoder."""

    def __init__(self, tracker: CaseTracker) -> None:
        self.tracker = tracker

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        self.tracker.end(output)


class LegacyReorder:
    """Stands in for `_reorder_cache` of a language model with tuple caches: the decisions follow the new tuple.

    Beams of one case share their prompt and so their decisions, and a beam search reorders within a case only.
    """

    def __init__(self, reorder: object, tracker: CaseTracker) -> None:
        self.reorder, self.tracker = reorder, tracker

    def __call__(self, past: tuple, beam_idx: Tensor) -> tuple:
        new = self.reorder(past, beam_idx)  # type: ignore[operator]  # the class's own function
        state = self.tracker.kept(past)
        if state is not None:
            self.tracker.legacy[new[0][0]] = state
        return new
