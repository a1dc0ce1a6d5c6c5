"""The operators: checked, differentiable, registered with torch as `torch.ops.unike.*`, and safe to compile."""

from . import _library  # noqa: F401 registers the operators that the functions below call
from .augmented_ffn import augmented_ffn
from .cosine_topk import cosine_topk
from .extra_neurons import extra_neurons, extra_neurons_
from .knowledge_shift import knowledge_shift
from .retrieve_and_shift import retrieve_and_shift

__all__ = [
    "augmented_ffn",
    "cosine_topk",
    "extra_neurons",
    "extra_neurons_",
    "knowledge_shift",
    "retrieve_and_shift",
]
