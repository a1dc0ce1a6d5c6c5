"""LoRA per edit: a low-rank change of the attention's query and value maps, trained on the edit alone.

Hu et al., ICLR 2022 (not in the paper's tables). As published: W + (alpha / r) B A on q and v, A random, B zero, r =
8. EasyEdit's settings for editing are r = 8, alpha = 32, lr 5e-3, 70 steps. What differs: the last four layers
instead of all (where UniKE acts), stopped at a loss of 0.01, the rate is searched, and an edit may take 280 steps: with
70 some of base model 0 stop short (mean of five on development edits 92.7 instead of 93.5; 93.9 and 93.6 on the other).
Measured (base model 0, 70 steps): Rel 99.3 on training-split edits; at 0.001 / 0.002 / 0.005 / 0.01 the mean of five
on 25 development edits is 88.7 / 92.4 / 88.7 / 78.9.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from unike_kernels.editing.inputs import Sample

from .base import Baseline, Change, changed, descend, summed


@dataclass(frozen=True)
class LoraConfig:
    """rank and alpha of the change, lr of Adam, steps at most, enough: the loss to stop at."""

    rank: int = 8
    alpha: float = 32.0
    lr: float = 2e-3
    steps: int = 280
    enough: float = 1e-2
    seed: int = 0


class Lora(Baseline):
    """One low-rank adapter per edit."""

    name = "LoRA"
    source = "Hu et al., ICLR 2022; one adapter an edit"

    @classmethod
    def trials(cls) -> tuple[LoraConfig, ...]:
        """Four rates."""
        return tuple(LoraConfig(lr=lr) for lr in (2e-3, 1e-3, 5e-3, 1e-2))

    def edit(self, samples: Sequence[Sample]) -> Change:
        """The sum of the adapters' products, [1, out, in] each: merging them is what LoRA does after training."""
        host, c = self.host, self.config
        names = [n for i in host.layers for n in (host.decoder.layers[i].q_proj, host.decoder.layers[i].v_proj)]
        total: Change = {}
        generator = torch.Generator().manual_seed(c.seed)
        for sample in samples:
            batch = host.collator.batch([sample], [0])
            prefix = host.prefix(batch, host.layers[0])
            factors = {}
            for n in names:
                weight = host.linear(n).weight
                a = torch.randn(c.rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
                factors[n] = (a.to(weight).requires_grad_(), weight.new_zeros(weight.shape[0], c.rank).requires_grad_())

            def product(factors=factors) -> Change:
                return {n: (c.alpha / c.rank * b @ a)[None] for n, (a, b) in factors.items()}

            def loss(
                total: Change = total, batch=batch, prefix=prefix, product=product
            ) -> tuple[torch.Tensor, torch.Tensor]:
                with changed(host, summed(total, product())):
                    own = host.loss(batch, host.tail(prefix))[0]
                return own, own

            leaves = [t for pair in factors.values() for t in pair]
            descend(loss, leaves, lr=c.lr, steps=c.steps, enough=c.enough)
            total = summed(total, {n: d.detach() for n, d in product().items()})
        return total

    def active(self, state: Change) -> AbstractContextManager[None]:
        """The changed maps."""
        return changed(self.host, state)
