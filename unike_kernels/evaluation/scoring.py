"""Teacher-forced scoring of many probes under many edits: the layers below the first edited one run once per probe."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import Cases, CaseState
from ..editing.inputs import Batch, Collator, Sample
from ..editing.prefix import Prefix, head, recorded, run_prefix, run_tail
from ..models import Decoder, get_module
from ..patching import PatchHandle
from . import metrics


@dataclass(frozen=True)
class Score:
    """One probe under one edit: token accuracy on its target, and both localities against the base."""

    accuracy: float
    locality_a: float
    locality_b: float


class Scorer:
    """Scores probes (question, target) on the base and under any patch of the same layers.

    Holds, per batch, the states that enter the first edited layer and what the base predicts.
    """

    def __init__(
        self, collator: Collator, decoder: Decoder, first: int, samples: Sequence[Sample], *, batch_size: int = 64
    ) -> None:
        """first: the lowest edited layer. samples: all with a target. The model must carry no active edit now."""
        self.collator, self.decoder, self.first = collator, decoder, first
        self.samples = list(samples)
        self.head = head(collator.model, decoder)
        attention = get_module(collator.model, decoder.layers[first].attention)
        order = sorted(range(len(samples)), key=lambda i: len(samples[i].prompt) + len(samples[i].target or ""))
        self.batches: list[tuple[Batch, Prefix]] = []
        self.base_target: list[Tensor] = [torch.empty(0)] * len(samples)  # tf_ids of the base, by sample
        self.base_top: list[Tensor] = []  # top ids at all positions, by batch
        self.wanted: list[Tensor] = [torch.empty(0)] * len(samples)
        self.case_tap = torch.zeros(len(samples), decoder.layers[first].hidden_size)  # [n, d] at the first edited layer
        sorted_samples = [self.samples[i] for i in order]
        for batch in collator.batches(sorted_samples, batch_size, eos=False):
            batch.rows = [order[r] for r in batch.rows]
            prefix = run_prefix(collator.model, decoder, batch, first)
            self.batches.append((batch, prefix))
            with torch.no_grad(), recorded({"tap": attention}, "input") as kept:
                logits = self._logits(prefix)
            taps = kept["tap"].reshape(-1, kept["tap"].shape[-1])[batch.case_rows()]
            self.base_top.append(metrics.top_ids(logits, self._k(batch)))
            for row, ids, wanted, tap in zip(
                batch.rows, metrics.target_ids(logits, batch.target_mask), self._targets(batch), taps, strict=True
            ):
                self.base_target[row], self.wanted[row], self.case_tap[row] = ids, wanted, tap

    def base_accuracy(self) -> list[float]:
        """Token accuracy of the unedited model on every probe's target: the measured value before any edit."""
        return [metrics.token_accuracy(p, w) for p, w in zip(self.base_target, self.wanted, strict=True)]

    @torch.no_grad()
    def score(self, handle: PatchHandle, chosen: Sequence[int | None] | None = None) -> list[Score]:
        """Scores of all probes, in order, under `handle`'s edits.

        chosen: for each probe the index of the one edit that acts on it, None for none; without it the patch's own
        routing decides (or all edits act).
        """
        out: list[Score | None] = [None] * len(self.samples)
        for (batch, prefix), base_top in zip(self.batches, self.base_top, strict=True):
            self._name(handle, batch, prefix, chosen)
            logits = self._logits(prefix)
            top = metrics.top_ids(logits, self._k(batch))
            for r, ids in enumerate(metrics.target_ids(logits, batch.target_mask)):
                row, real = batch.rows[r], batch.inputs["attention_mask"][r] != 0
                out[row] = Score(
                    metrics.token_accuracy(ids, self.wanted[row]),
                    metrics.locality_a(self.base_target[row], ids),
                    metrics.locality_b(base_top[r][real], top[r][real]),
                )
        return [s for s in out if s is not None]

    @torch.no_grad()
    def alphas(self, handle: PatchHandle, chosen: Sequence[int | None] | None = None) -> list[float]:
        """The mean alpha of every probe's case over the edited layers, in order; arguments as in `score`."""
        out = [float("nan")] * len(self.samples)
        for batch, prefix in self.batches:
            self._name(handle, batch, prefix, chosen)
            self._logits(prefix)
            cases = handle.record.runtime.tracker.current
            if cases is None or not cases.state.layers:
                continue
            alpha = torch.stack([d.alpha.float() for d in cases.state.layers.values()]).mean(dim=0)
            for row, value in zip(batch.rows, alpha.tolist(), strict=True):
                out[row] = value
        return out

    @torch.no_grad()
    def logits(self, handle: PatchHandle | None = None) -> list[Tensor]:
        """[B, S, V] by batch: of the base as the model stands, or with `handle`'s patch and its own routing."""
        out = []
        for batch, prefix in self.batches:
            if handle is not None:
                self._name(handle, batch, prefix, None)
            out.append(self._logits(prefix))
        return out

    @staticmethod
    def _name(handle: PatchHandle, batch: Batch, prefix: Prefix, chosen: Sequence[int | None] | None) -> None:
        selected = None
        if chosen is not None:
            picks = [chosen[r] for r in batch.rows]
            selected = torch.tensor([-1 if p is None else p for p in picks], device=prefix.hidden.device)[:, None]
        name_cases(handle, batch, selected)

    def _logits(self, prefix: Prefix) -> Tensor:
        return self.head(run_tail(self.collator.model, self.decoder, prefix))

    def _k(self, batch: Batch) -> int:
        return 10 if self.samples[batch.rows[0]].image is not None else 1

    @staticmethod
    def _targets(batch: Batch) -> list[Tensor]:
        return [ids[mask] for ids, mask in zip(batch.inputs["input_ids"], batch.target_mask, strict=True)]


def name_cases(handle: PatchHandle, batch: Batch, selected: Tensor | None) -> None:
    """Tells a patch the cases of a teacher-forced batch whose layers are about to run without their decoder.

    selected [B, m]: the groups that act on each case, None to leave it to the patch.
    """
    tracker = handle.record.runtime.tracker
    state = CaseState(tracker.version, batch.shape[0], selected=selected, chosen=selected is not None)
    tracker.current = Cases(batch.token_to_case(), batch.case_rows(), state, fresh=True)
