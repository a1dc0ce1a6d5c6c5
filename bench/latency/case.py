"""One case: an operator at one size, who computes it, and what it has to move."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Inputs = dict[str, Any]
OURS = "unike"
# What "auto" chooses between, timed beside it where a GPU has both.
CUDA, TRITON = "unike, backend cuda", "unike, backend triton"
INDEXED = "unike, int8 index"
NEURONS = 10  # of one edit at one layer, as the editor makes them
K = 40  # items retrieved


@dataclass(frozen=True)
class Case:
    """One operator at one size. `make` gives its inputs; moved and flops are what cannot be avoided.

    The providers compute the same thing from the same inputs: OURS this package, the others what a user could put
    together. `specification`, the reference, decides whether a provider is right.
    """

    operator: str
    shape: str
    sizes: dict[str, int]
    make: Callable[[torch.Generator, torch.dtype, torch.device], Inputs]
    specification: Callable[..., Any]
    providers: dict[str, Callable[..., Any]]
    moved: int  # elements
    flops: int
    capturable: set[str] = field(default_factory=lambda: {OURS})  # providers that never read a device value on the host
    floor: str | None = None  # the provider that computes less than asked: what nobody can beat, and no rival
    eager: str | None = None  # the rival that a GPU times once more without a graph, as Python calls it
    dtype: torch.dtype | None = None  # other than the run's

    @property
    def name(self) -> str:
        kind = [] if self.dtype is None else [str(self.dtype).removeprefix("torch.")]
        return " ".join([self.operator, self.shape, *kind, *(f"{key}={value}" for key, value in self.sizes.items())])
