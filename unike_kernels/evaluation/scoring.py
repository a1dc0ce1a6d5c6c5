"""Teacher-forced scoring of many probes under many edits: the layers below the first edited one run once per probe."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import Cases
from ..editing.inputs import Batch, Collator, Sample
from ..editing.prefix import Prefix, cases_named, logits_step, recorded, run_prefix, run_tail
from ..models import Decoder, get_module
from ..patching import PatchHandle
from ..statuses import active
from . import metrics


@dataclass(frozen=True)
class Score:
    """One probe under one edit: token accuracy on its target, both localities against the base, and the strength.

    alpha is the mean over the edited layers of the case's alpha, nan without one per case.
    """

    accuracy: float
    locality_a: float
    locality_b: float
    alpha: float = float("nan")


@dataclass(frozen=True)
class Base:
    """What the unedited model says to one probe, teacher-forced.

    wanted, target [n] int64: the target's tokens and the model's top-1 in their places; top [S, k] int64: its k best
    ids at all S positions, k = 10 with a picture and 1 without.
    """

    wanted: Tensor
    target: Tensor
    top: Tensor

    def score(self, target: Tensor, top: Tensor, alpha: float = float("nan")) -> Score:
        """The probe's score where the edited model says `target` [n] and `top` [S', k].

        A prompt that the method made longer or shorter is compared at its last positions.
        """
        shared = min(len(self.top), len(top))
        return Score(
            metrics.token_accuracy(target, self.wanted),
            metrics.locality_a(self.target, target),
            metrics.locality_b(self.top[-shared:], top[-shared:]),
            alpha,
        )


def ranks(sample: Sample) -> int:
    """How many best ids locality B compares at a position: 10 with a picture, 1 without."""
    return 1 if sample.image is None else 10


def said(batch: Batch, logits: Tensor, k: int) -> list[tuple[Tensor, Tensor]]:
    """By row of a right-padded batch with logits [B, S, V].

    (top-1 in the target's places [n], the k best ids at all its positions [S, k]).
    """
    top, real = metrics.top_ids(logits, k), batch.inputs["attention_mask"] != 0
    return [(ids, t[r]) for ids, t, r in zip(metrics.target_ids(logits, batch.target_mask), top, real, strict=True)]


def bases(batch: Batch, logits: Tensor, k: int) -> list[Base]:
    """By row of a right-padded batch with the unedited model's logits [B, S, V]."""
    wanted = [ids[mask] for ids, mask in zip(batch.inputs["input_ids"], batch.target_mask, strict=True)]
    return [Base(w, ids, top) for w, (ids, top) in zip(wanted, said(batch, logits, k), strict=True)]


def by_length(samples: Sequence[Sample]) -> list[int]:
    """Indices of the samples, shortest first: like lengths share a batch, and little padding."""
    return sorted(range(len(samples)), key=lambda i: len(samples[i].prompt) + len(samples[i].target or ""))


class Scorer:
    """Scores probes (question, target) on the base and under any patch of the same layers.

    Holds, per batch, the states that enter the first edited layer and what the base predicts.
    case_tap [n, d]: the tap at every probe's case token, at the first edited layer: what a router decides by.
    """

    def __init__(
        self, collator: Collator, decoder: Decoder, first: int, samples: Sequence[Sample], *, batch_size: int = 64
    ) -> None:
        """first: the lowest edited layer. samples: all with a target. ValueError while the model carries edits."""
        if on := active(collator.model):
            raise ValueError(f"the model carries edits ({', '.join(on)}): make the Scorer on the base")
        self.collator, self.decoder, self.first = collator, decoder, first
        self.samples = list(samples)
        self.logits_step = logits_step(collator.model, decoder)
        attention = get_module(collator.model, decoder.layers[first].attention)
        none = torch.empty(0, dtype=torch.long)
        self.batches: list[tuple[Batch, Prefix]] = []
        self.base = [Base(none, none, none)] * len(samples)
        self.case_tap = torch.zeros(len(samples), decoder.layers[first].hidden_size, dtype=torch.float32, device="cpu")
        order = by_length(samples)
        for batch in collator.batches([self.samples[i] for i in order], batch_size, eos=False):
            batch.rows = [order[r] for r in batch.rows]
            prefix = run_prefix(collator.model, decoder, batch, first)
            self.batches.append((batch, prefix))
            with torch.no_grad(), recorded({first: attention}, "input") as kept:
                logits = self._logits(prefix)
            taps = kept[first].reshape(-1, kept[first].shape[-1])[batch.case_rows()]
            for row, base, tap in zip(batch.rows, bases(batch, logits, self._ranks(batch)), taps, strict=True):
                self.base[row], self.case_tap[row] = base, tap

    def base_accuracy(self) -> list[float]:
        """Token accuracy of the unedited model on every probe's target: the measured value before any edit."""
        return [metrics.token_accuracy(base.target, base.wanted) for base in self.base]

    @torch.no_grad()
    def score(self, handle: PatchHandle, chosen: Sequence[int | None] | None = None) -> list[Score]:
        """Scores of all probes, in order, under `handle`'s edits.

        chosen: for each probe the index of the one edit that acts on it, None for none; without it the patch's own
        routing decides (or all edits act).
        """
        out = [Score(float("nan"), float("nan"), float("nan"))] * len(self.samples)
        for batch, cases, logits in self._passes(handle, chosen):
            alpha = torch.full((len(batch.rows),), float("nan"))
            if cases.state.layers:
                alpha = torch.stack([d.alpha.float() for d in cases.state.layers.values()]).mean(dim=0)
            found = said(batch, logits, self._ranks(batch))
            for row, strength, (target, top) in zip(batch.rows, alpha.tolist(), found, strict=True):
                out[row] = self.base[row].score(target, top, strength)
        return out

    @torch.no_grad()
    def logits(self, handle: PatchHandle | None = None) -> list[Tensor]:
        """[B, S, V] by batch: of the base as the model stands, or with `handle`'s patch and its own routing."""
        if handle is None:
            return [self._logits(prefix) for _, prefix in self.batches]
        return [logits for _, _, logits in self._passes(handle, None)]

    def _passes(
        self, handle: PatchHandle, chosen: Sequence[int | None] | None
    ) -> Iterator[tuple[Batch, Cases, Tensor]]:
        """Every batch through the edited layers, with its cases and logits [B, S, V]."""
        lowest = min(layer.index for layer in handle.record.layers)
        if lowest < self.first:
            raise ValueError(f"the patch edits layer {lowest}, but this Scorer holds the states below {self.first}")
        if chosen is not None and len(chosen) != len(self.samples):
            raise ValueError(f"{len(self.samples)} probes, but edits are chosen for {len(chosen)}")
        for batch, prefix in self.batches:
            selected = None
            if chosen is not None:
                picks = [-1 if (pick := chosen[r]) is None else pick for r in batch.rows]
                selected = torch.tensor(picks, device=prefix.hidden.device)[:, None]
            with cases_named(handle, batch, selected) as cases:
                logits = self._logits(prefix)
            yield batch, cases, logits

    def _logits(self, prefix: Prefix) -> Tensor:
        return self.logits_step(run_tail(self.collator.model, self.decoder, prefix))

    def _ranks(self, batch: Batch) -> int:
        return ranks(self.samples[batch.rows[0]])
