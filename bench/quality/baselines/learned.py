"""What the benchmark's baselines learn on a base model, once."""

from __future__ import annotations

from typing import Any

from torch import nn

from bench.quality.world import CACHE

from . import METHODS
from .base import Baseline
from .training_split import training_records

TRAINING = 800  # training-split edits that are learned from, `share` times


def fitted(
    name: str, model: nn.Module, processor: Any, base: int, *, config: Any = None, training: int = TRAINING
) -> Baseline:
    """The method on emoji base model `base`, fitted; a network is trained only where no file fits it.

    A file fits by its name, a hash of the weights, records, settings and code that it was trained with.
    """
    folder = CACHE / f"seed{base}" / "baselines"
    method = METHODS[name](model, processor, config)
    method.fit(training_records(training * method.share), seed=0, cache=folder)
    return method
