"""What was decided for the rows of a KV cache follows them where they are reordered, dropped or repeated."""

import weakref
from typing import Any

import torch
from torch import Tensor

CACHE_ATTRIBUTE = "_unike_cases"  # {patch name: CaseState} on a KV cache object
STORAGE_ATTRIBUTE = "_unike_storage"  # the same on a static cache, kept over a reset: the tensors to decide into
METHODS = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave")  # how transformers' caches choose rows


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
        storages, states = getattr(cache, STORAGE_ATTRIBUTE, {}), {}
        for name, before in getattr(cache, CACHE_ATTRIBUTE, {}).items():
            states[name] = state = before.at(rows)
            storage = storages.get(name)
            if storage is not None and state is not before and storage.size == state.size:
                state.move_into(storage)  # where a captured graph reads
        setattr(cache, CACHE_ATTRIBUTE, states)
        return done

    def __reduce__(self) -> tuple:
        return FollowedRows, (self.cache(), self.method)  # of the copy, in a copy


def follow_rows(cache: Any) -> None:
    """Has the decisions on `cache` follow its rows from now on."""
    for method in METHODS:
        if method not in vars(cache) and hasattr(type(cache), method):
            vars(cache)[method] = FollowedRows(cache, method)
