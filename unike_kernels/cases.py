"""Which token belongs to which case, where each case's case token is, and what was decided for a case.

A case is one sequence; its case token is the last token of its prompt (spec, section 1). The map from token to case is
an explicit tensor, so that padded batches, packed rows and inputs without any batch dimension are all one thing.
"""

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Version:
    """One state of a patch's storage: decisions made under another one point at other edits and items.

    Compared by `token`, which survives copies and pickles; `live` falls when the storage changes, for compiled code
    (which would be compiled again for every new token). The copy of a KV cache therefore holds the same object; that
    of a model has a twin, since its storage changes apart.
    """

    def __init__(self, token: str | None = None, live: bool = True) -> None:
        self.token = token or secrets.token_hex(8)
        self.live = live
        if token is None:
            _versions[self.token] = self

    def twin(self) -> "Version":
        """The version of a copied model, whose KV caches may have been copied, or pickled, along with it.

        Until an eager pass used such a cache, compiled code takes it for one of the first model.
        """
        twin = Version(self.token, self.live)
        _versions.setdefault(self.token, twin)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "Version":
        return self

    def __reduce__(self) -> tuple:
        return _version, (self.token, self.live)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Version) and self.token == other.token

    def __hash__(self) -> int:
        return hash(self.token)


_versions: WeakValueDictionary[str, Version] = WeakValueDictionary()  # of this process, by token


def _version(token: str, live: bool) -> Version:
    """What a pickle holds: this process's own version, where it has it."""
    found = _versions.get(token)
    return Version(token, live) if found is None else found


@dataclass
class LayerDecision:
    """What one layer decided for its cases: items retrieved and the strength of the shift."""

    indices: Tensor  # [C, K] int64, -1 padded
    scores: Tensor  # [C, K] float32, -inf padded
    alpha: Tensor  # [C] float32 (float64 in a float64 model)


@dataclass
class CaseState:
    """All that was decided for C cases, by layer."""

    version: Version
    size: int
    selected: Tensor | None = None  # [C, m] int64 group ids of the routed edits, -1 padded; None: all edits act
    route_scores: Tensor | None = None  # [C, m]; None where edits were chosen by hand
    chosen: bool = False  # selected by hand, not by the router
    layers: dict[int, LayerDecision] = field(default_factory=dict)
    known: Tensor | None = None  # [C] bool: had a case token so far; kept for cases that are named by hand
    alike: list[int] | None = field(default=None, init=False, repr=False)  # equal numbers: decided alike

    def at(self, rows: "Tensor | int") -> "CaseState":
        """The state of the cases `rows` ([R] int64, or [C] bool), or of every case `rows` times; itself if all stay.

        A beam search chooses rows anew for every token, but within a case, whose beams were decided alike.
        """
        if isinstance(rows, int):
            picked = torch.arange(self.size).repeat_interleave(rows)
        else:
            picked = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        if len(picked) == self.size and may_ask():
            if self.alike is None:
                self.alike = self._alike()
            if all(self.alike[i] == self.alike[row] for i, row in enumerate(picked.tolist())):
                return self

        def taken(t: Tensor) -> Tensor:
            return t[picked.to(t.device)]

        layers = {i: LayerDecision(taken(d.indices), taken(d.scores), taken(d.alpha)) for i, d in self.layers.items()}
        selected, scores = (None if t is None else taken(t) for t in (self.selected, self.route_scores))
        return CaseState(self.version, len(picked), selected, scores, self.chosen, layers)

    def resized(self, size: int) -> "CaseState":
        """The state of the first `size` cases; further ones are not decided. Its tensors are new ones."""

        def taken(t: Tensor, fill: float) -> Tensor:
            kept = t[:size]
            return torch.cat([kept, kept.new_full((size - len(kept), *t.shape[1:]), fill)])

        layers = {
            i: LayerDecision(taken(d.indices, -1), taken(d.scores, -torch.inf), taken(d.alpha, 0.0))
            for i, d in self.layers.items()
        }
        selected = None if self.selected is None else taken(self.selected, -1)
        scores = None if self.route_scores is None else taken(self.route_scores, -torch.inf)
        known = None if self.known is None else taken(self.known, False)
        return CaseState(self.version, size, selected, scores, self.chosen, layers, known)

    def _alike(self) -> list[int]:
        """[C] a number for each case, the same for those of which all decisions are equal."""
        parts = [t for d in self.layers.values() for t in (d.indices, d.scores, d.alpha[:, None])]
        parts += [t for t in (self.selected, self.route_scores) if t is not None]
        if not parts:
            return [0] * self.size
        rows = torch.cat([t.to("cpu", torch.float64) for t in parts], dim=1)
        return torch.unique(rows, dim=0, return_inverse=True)[1].tolist()

    @torch.no_grad()
    def move_into(self, storage: "CaseState") -> None:
        """Copies what was decided into the tensors of an earlier state, and keeps those instead of the own ones.

        A captured graph reads the tensors that it saw, so it follows. Where `storage` has none of the shape, dtype and
        device, the own one stays.
        """
        self.selected = _moved(self.selected, storage.selected)
        self.route_scores = _moved(self.route_scores, storage.route_scores)
        for layer, new in self.layers.items():
            old = storage.layers.get(layer)
            if old is not None and old is not new:
                fields = ((new.indices, old.indices), (new.scores, old.scores), (new.alpha, old.alpha))
                self.layers[layer] = LayerDecision(*(_kept(_moved(a, b), a) for a, b in fields))


@dataclass
class Cases:
    """The cases of one forward pass of T tokens (all leading dimensions flattened, row-major)."""

    token_to_case: Tensor  # [T] int64, -1: belongs to no case (padding)
    case_tokens: Tensor  # [C] int64 row of the case token, -1: not in this pass (the case was decided before)
    state: CaseState
    decided: bool = False  # True: every case was decided before, nothing to retrieve
    fresh: bool = False  # True: every case is decided in this pass, nothing to keep
    known: Tensor | None = None  # [C] bool: had a case token when this pass is over; of cases that are named by hand
    native: bool = False  # few tokens of decided cases on the CPU, which native code may serve past the dispatcher
    once: dict[Any, Tensor] = field(default_factory=dict)  # what is the same for all layers of the pass
    steps: dict[Any, Any] = field(default_factory=dict, repr=False)  # by module: its prepared native call, or None

    @property
    def selected(self) -> Tensor | None:
        """The state's routed edits [C, m], on this pass's device."""
        selected = self.state.selected
        return selected if selected is None or self.native else selected.to(self.token_to_case.device)

    def rows(self, positions: str) -> Tensor:
        """[T] int64: token_to_case, with -1 also before the case token where positions is "from_case_token"."""
        if positions == "all" or self.decided or self.case_tokens.shape[0] == 0:
            return self.token_to_case  # where every case was decided before, all tokens come after its case token
        case = self.token_to_case.clamp(min=0)
        row = torch.arange(case.shape[0], device=case.device)
        return torch.where(row >= self.case_tokens[case], self.token_to_case, -1)

    def own(self, positions: str) -> Tensor:
        """[T] int64: every acting token as a case of its own, its number; -1 for those of which `rows` says so."""

        def found() -> Tensor:
            rows = self.rows(positions)
            return torch.where(rows >= 0, torch.arange(len(rows), device=rows.device), -1)

        return self._once(positions, found)

    def filled(self, value: float, like: Tensor) -> Tensor:
        """[T] of one number, in the dtype and on the device of `like`."""
        return self._once((value, like.dtype), lambda: like.new_full(self.token_to_case.shape, value))

    def _once(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """make(), by the first layer of a pass that asks; a compiler finds by itself what is computed twice."""
        if torch.compiler.is_compiling():
            return make()
        if key not in self.once:
            self.once[key] = make()
        return self.once[key]

    def keep_decided(self, new: Tensor, old: Tensor, fill: float) -> Tensor:
        """`new` for the cases of this pass, `old` for those decided before: both [C, ...], columns padded with fill."""
        if self.fresh:
            return new
        old = old.to(new)
        if new.dim() == 2:
            width = max(new.shape[1], old.shape[1])
            new, old = (torch.nn.functional.pad(t, (0, width - t.shape[1]), value=fill) for t in (new, old))
        here = (self.case_tokens >= 0).view(-1, *[1] * (new.dim() - 1))
        return torch.where(here, new, old)

    def settled(self, storage: CaseState | None) -> CaseState | None:
        """The state, with what this pass decided moved into the tensors of `storage`, if that is of as many cases.

        `storage` itself where gradients are wanted, or a graph is captured: it replays nothing but what runs now.
        """
        if torch.is_grad_enabled() or not may_ask():
            return storage
        state = self.state
        if storage is not None and storage is not state and storage.size == state.size and not self.decided:
            state.move_into(storage)
        return state

    def to(self, device: torch.device) -> "Cases":
        """The same cases with their maps on `device` (layers of one model may sit on several)."""
        if self.token_to_case.device == device:
            return self
        return Cases(self.token_to_case.to(device), self.case_tokens.to(device), self.state, self.decided, self.fresh)


_capturing = False


@contextmanager
def as_if_capturing() -> Iterator[None]:
    """Inside, no tensor's value is read, as while a CUDA graph is captured: for recorders of other kinds, and tests."""
    global _capturing
    before, _capturing = _capturing, True
    try:
        yield
    finally:
        _capturing = before


def may_ask() -> bool:
    """Whether a value may be read from the device now: not while code is traced or a CUDA graph captured."""
    if _capturing or torch.compiler.is_compiling():
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def all_missing(indices: Tensor) -> bool:
    """Whether all indices are -1, so that work can be skipped; only asked where asking costs no wait, otherwise no."""
    return indices.device.type == "cpu" and may_ask() and not bool((indices >= 0).any())


def _moved(new: Tensor | None, old: Tensor | None) -> Tensor | None:
    if new is None or old is None or new is old:
        return new
    if (new.shape, new.dtype, new.device) != (old.shape, old.dtype, old.device):
        return new
    # What was made in inference mode is written in it, by a pass without it too.
    with torch.inference_mode(old.is_inference() or torch.is_inference_mode_enabled()):
        return old.copy_(new)


def _kept(moved: Tensor | None, own: Tensor) -> Tensor:
    return own if moved is None else moved


def case_tokens_from_labels(labels: Tensor, fallback: Tensor, seen: Tensor | None = None) -> Tensor:
    """[B] position of the token before the first label that is not -100; `fallback` [B] where a row has no label.

    seen: [B, length] bool, False for padding. Raises ValueError where the first label stands at position 0, or behind
    padding: nothing before it could be the case token.
    """
    wanted = labels != -100
    first = wanted.int().argmax(dim=1)
    some = wanted.any(dim=1)
    alone = first == 0
    if seen is not None:
        alone = alone | ~seen.gather(1, (first - 1).clamp(min=0)[:, None])[:, 0]
    if may_ask() and bool((some & alone).any()):
        rows = (some & alone).nonzero().flatten().tolist()
        raise ValueError(
            f"labels of rows {rows} start at position 0 or behind padding, so no token can be the case token; "
            "set the prompt's labels to -100, or name the cases with handle.set_cases"
        )
    return torch.where(some, first - 1, fallback)


def attended(mask: object, length: int, past: int = 0) -> Tensor | None:
    """[B, length] bool, True for the tokens of this pass that are no padding; None where the mask does not say.

    mask: [B, S]; or [B, 1, Q, S] as attention layers take it (bool, or additive); or a dict of those by layer type,
    where "full_attention" is preferred: a sliding window hides early tokens too. Its columns start with `past` earlier
    tokens (-1: how many is not known) and may reach into the empty part of a cache.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    dims = mask.dim() if isinstance(mask, Tensor) else 0
    if not isinstance(mask, Tensor) or dims not in (2, 4):
        return None
    start = min(past, mask.size(-1) - length)  # a mask may have no columns for what a sliding window has dropped
    if start < 0:
        return None
    if dims == 2:
        return mask[:, start : start + length] != 0
    row = mask[:, 0, -1, start : start + length]  # the last query sees every key that is no padding
    return row if row.dtype == torch.bool else row == 0


def last_attended(mask: object, batch: int, length: int, device: torch.device, past: int = 0) -> Tensor:
    """[B] position, among this pass's tokens, of each row's last attended one. Arguments as in `attended`."""
    seen = attended(mask, length, past)
    if seen is None:
        return torch.full((batch,), length - 1, dtype=torch.long, device=device)
    seen = seen.to(device)
    return (seen * torch.arange(seen.shape[1], device=device)).amax(dim=1).expand(batch)


def padded_cases(mask: object, batch: int, length: int, device: torch.device, past: int = 0) -> Tensor:
    """[B * S] int64: the row of each token of a padded batch as its case, -1 for what a [B, S] mask calls padding."""
    case = torch.arange(batch, device=device)[:, None].expand(batch, length)
    seen = attended(mask, length, past) if isinstance(mask, Tensor) and mask.dim() == 2 else None
    if seen is not None:
        case = torch.where(seen.to(device), case, -1)
    return case.reshape(-1)


def refuse_packed(position_ids: object, mask: object, length: int, past: int) -> None:
    """Raises where positions start again inside a row: that row holds several sequences, whose cases must be named."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or not may_ask():
        return
    real = attended(mask, length, past)
    real = torch.ones_like(position_ids, dtype=torch.bool) if real is None else real.to(position_ids.device)
    at, real = torch.broadcast_tensors(position_ids, real)
    flat = isinstance(mask, Tensor) and mask.dim() == 2
    if flat:
        # What such a mask hides is padding, at whatever position, and may lie within a row: BLIP-2's processor puts
        # the picture before text that is padded on its left. The other tokens are compared, moved together.
        order = torch.argsort((~real).int(), dim=1, stable=True)
        at, real = at.gather(1, order), real.gather(1, order)
    before, after, seen = at[:, :-1], at[:, 1:], real[:, :-1]
    falls = after < before
    again = seen & real[:, 1:] & (falls | ((after == before) & (after == 0)))  # a sequence of one token stays at 0
    if not flat:
        # What a block-diagonal mask hides from the last query looks like padding, but padding stays at one position,
        # and falls at most from 1 to the 0 of the first token.
        again |= ~seen & falls & (before > 1)
    if bool(again.any()):
        raise ValueError(
            f"position_ids start again inside rows {again.any(dim=1).nonzero().flatten().tolist()}, so these rows "
            "hold several sequences: name their cases with handle.set_cases"
        )
