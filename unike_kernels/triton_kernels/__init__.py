"""The Triton kernels: each operator's launcher in a file of its name; long kernels, or those of several, apart.

Importing any of these files loads triton.

A launcher takes the operator's positional arguments, allocates through `launching.new`, starts its kernels through
`launching.launch`, and never reads a tensor's values: it runs on meta tensors too, which is how the compile gate
builds every kernel exactly as a launcher would start it.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

MOST_ITEMS = 1024  # of one token, for knowledge_shift: all its scores lie in one tile
FEW_TOKENS = 64  # that retrieve_and_shift takes at once: a decode step
MAX_K = 128  # items that cosine_topk keeps for a query: more would not stay in registers

# Operator -> file of this folder; the launcher in it has the operator's name.
LAUNCHERS = {
    "extra_neurons": "extra_neurons",
    "extra_neurons_": "extra_neurons",
    "extra_neurons_backward": "extra_neurons_backward",
    "augmented_ffn": "augmented_ffn",
    "augmented_ffn_backward": "augmented_ffn_backward",
    "cosine_topk": "cosine_topk",
    "knowledge_shift": "knowledge_shift",
    "knowledge_shift_backward": "knowledge_shift_backward",
    "retrieve_and_shift": "retrieve_and_shift",
}


def refusal(name: str, args: Sequence[Any]) -> str | None:
    """Why the launcher of the operator `name` cannot take these arguments; None: it can."""
    if name == "cosine_topk":
        _, keys, k, *_ = args
        if k > MAX_K:
            return f"k is {k}, and it finds at most {MAX_K} items"
        if keys.shape[0] >= 2**31:
            return f"there are {keys.shape[0]} keys, and it takes fewer than {2**31}"
    if name == "retrieve_and_shift":
        tokens, k, selected = args[0].shape[0], args[6], args[10]
        if tokens > FEW_TOKENS:
            return f"there are {tokens} tokens, and it takes at most {FEW_TOKENS}"
        if k > MAX_K or (selected is not None and selected.shape[1] > MAX_K):
            edits = 0 if selected is None else selected.shape[1]
            return f"k is {k} and a case has {edits} edits, and it finds at most {MAX_K} of each"
        if args[5].shape[0] >= 2**31:
            return f"there are {args[5].shape[0]} items, and it takes fewer than {2**31}"
    if name.startswith("knowledge_shift"):
        after = int(name.endswith("_backward"))  # the gradients come first
        item_keys, indices = args[2 + after], args[4 + after]
        if item_keys.shape[0] and indices.shape[1] > MOST_ITEMS:
            return f"a token has {indices.shape[1]} items, and it takes up to {MOST_ITEMS} items"
        if after and any(t is not None for t in args[18:20]):
            return "it has no gradients through encoder_rows or folded weights: give it the encoder itself"
    return None


def launcher(name: str) -> Callable[..., Any]:
    """The launcher of the operator `name`."""
    return getattr(import_module(f".{LAUNCHERS[name]}", __package__), name)
