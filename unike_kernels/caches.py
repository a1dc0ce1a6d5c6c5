"""KV caches: which one a pass fills, how much it holds, and the decisions that patches keep on it.

Caches are objects; or, in transformers before 4.36, tuples of layers of tensors, a new one after every pass; or None.
Decisions follow a cache's rows where these are reordered, dropped or repeated.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .cases import Cases, CaseState, may_ask

CACHE_NAMES = ("cache", "past_key_values")  # what models call their KV cache: transformers from 5.24, and before
DECISIONS = "_unike_cases"  # {patch name: CaseState} on a KV cache object
STORAGE = "_unike_storage"  # the same on a static cache, kept over a reset: the tensors to decide into
METHODS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")  # how transformers' caches choose rows
TRACES_FOLLOWERS = torch.__version__ >= (2, 13)  # whether torch's compiler can make them: 2.13 and 2.15 can, 2.6 cannot

_of_tuples = WeakIdKeyDictionary()  # first key tensor of a tuple cache -> {patch name: CaseState}


def cache_in(given: dict[str, Any]) -> Any:
    """The KV cache among a decoder's arguments."""
    newer = given.get(CACHE_NAMES[0])
    return given.get(CACHE_NAMES[1]) if newer is None else newer


def cache_of(output: Any, given: dict[str, Any]) -> Any:
    """The KV cache that a pass filled: its output's, or where that has none, its arguments'; None if there is none."""
    if isinstance(output, tuple):
        cache = output[1] if len(output) > 1 else None
    else:
        # Only the name that it has: transformers' newer outputs warn where they are asked for the older one.
        cache = getattr(output, CACHE_NAMES[0 if hasattr(output, CACHE_NAMES[0]) else 1], None)
    if cache is None:
        cache = cache_in(given)  # with use_cache=False it is filled all the same, but for a tuple
        cache = None if isinstance(cache, tuple) else cache
    return None if isinstance(cache, Tensor) else cache


def tokens_in(cache: Any, name: str) -> int:
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
        return -1 if decisions_on(cache, name) is not None else 0
    return int(length)


# ------------------------------------------------------------------------------------------------------ decisions


def decisions_on(cache: Any, name: str) -> CaseState | None:
    """What an earlier pass left on this KV cache for the patch of this name."""
    if isinstance(cache, tuple):
        return _of_tuples.get(cache[0][0], {}).get(name) if cache else None
    return getattr(cache, DECISIONS, {}).get(name)


def leave_on(cache: Any, name: str, cases: Cases) -> None:
    """Leaves the decisions of a pass on the KV cache that it filled, for the passes that go on with it."""
    if isinstance(cache, tuple):
        if cache and isinstance(cache[0], tuple):
            _of_tuples[cache[0][0]] = {**_of_tuples.get(cache[0][0], {}), name: cases.state}
        return
    if cases.native and decisions_on(cache, name) is cases.state:
        return  # left there by the step before
    compiling = torch.compiler.is_compiling()
    if getattr(cache, "is_compileable", False) and not compiling:
        storages = getattr(cache, STORAGE, {})
        setattr(cache, STORAGE, {**storages, name: cases.settled(storages.get(name))})
    if not cases.decided and (TRACES_FOLLOWERS or not compiling):
        follow_rows(cache)
    setattr(cache, DECISIONS, {**getattr(cache, DECISIONS, {}), name: cases.state})


def forget(cache: Any, name: str) -> None:
    """Takes the decisions of an earlier sequence off an empty cache: generate() resets and reuses static caches."""
    if not isinstance(cache, tuple) and decisions_on(cache, name) is not None and not tokens_in(cache, name):
        setattr(cache, DECISIONS, {n: state for n, state in getattr(cache, DECISIONS).items() if n != name})


# ----------------------------------------------------------------------------------------------------------- rows


class FollowedRows:
    """Stands in for one of a KV cache's METHODS, on that cache alone: decisions follow, each patch's."""

    def __init__(self, cache: Any, method: str) -> None:
        # Weak: a cache that held itself would keep its memory until the next collection of garbage.
        self.cache, self.method = weakref.ref(cache), method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache()
        if cache is None:
            raise ReferenceError(f"{self.method}: this is a shallow copy of a KV cache that is gone; use copy.deepcopy")
        rows: Tensor | int = (*args, *kwargs.values())[0]
        if not isinstance(rows, int):
            rows = torch.as_tensor(rows)  # transformers' caches take lists too
        done = getattr(type(cache), self.method)(cache, *args, **kwargs)
        storages, states = getattr(cache, STORAGE, {}), {}
        for name, before in getattr(cache, DECISIONS, {}).items():
            states[name] = state = before.at(rows)
            storage = storages.get(name)
            if storage is not None and state is not before and storage.size == state.size:
                state.move_into(storage)  # where a captured graph reads
        setattr(cache, DECISIONS, states)
        return done

    def __reduce__(self) -> tuple:
        return FollowedRows, (self.cache(), self.method)  # of the copy, in a copy


def follow_rows(cache: Any) -> None:
    """Has the decisions on `cache` follow its rows from now on."""
    for method in METHODS:
        if method not in vars(cache) and hasattr(type(cache), method):
            vars(cache)[method] = FollowedRows(cache, method)


class LegacyReorder:
    """Stands in for `_reorder_cache` of a language model with tuple caches: decisions follow the new tuple.

    Beams of one case share their prompt and so their decisions, and a beam search reorders within a case only.
    """

    def __init__(self, reorder: Any) -> None:
        self.reorder = reorder
        self.trackers: list[object] = []  # of the patches that need it: it goes with the last

    def __call__(self, past: tuple, beam_idx: Tensor) -> tuple:
        new = self.reorder(past, beam_idx)
        if past and past[0][0] in _of_tuples:
            _of_tuples[new[0][0]] = _of_tuples[past[0][0]]
        return new
