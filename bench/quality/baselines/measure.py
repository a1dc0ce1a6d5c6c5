"""One-step edits of a method, measured: the five metrics, exact match is left to the protocols."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from unike_kernels.editing.inputs import Batch, Collator, Sample
from unike_kernels.evaluation import metrics
from unike_kernels.evaluation.methods import Edited, Method
from unike_kernels.evaluation.records import KINDS, LOCAL, Record


@dataclass
class Asked:
    """The probes of one record as batches, and the base's top ids at their target positions."""

    record: Record
    batches: list[Batch]
    before: list[list[Tensor]]


class Panel:
    """Records whose probes are collated, and answered by the base, once; then any method is measured on them."""

    def __init__(self, collator: Collator, records: Sequence[Record], kinds: Sequence[str] = KINDS) -> None:
        self.collator, self.kinds = collator, tuple(kinds)
        self.asked = []
        for record in records:
            batches = list(collator.batches([p.sample for p in record.of(*kinds)], 64, eos=False))
            self.asked.append(Asked(record, batches, [predictions(b) for b in batches]))

    def measure(self, method: Method, *, progress: bool = True) -> dict[str, float]:
        """Percent by metric (one value per edit and kind, as MMEdit counts), their mean, and seconds per edit."""
        scores: dict[str, list[float]] = {}
        bar = tqdm(self.asked, desc=method.name, unit="edit", mininterval=5, disable=not progress)
        edits = method.one_step([a.record.request for a in self.asked])
        seconds = 0.0
        for asked in bar:
            started = time.perf_counter()
            with next(edits) as edited:
                seconds += time.perf_counter() - started
                for kind, found in self.answered(asked, edited).items():
                    scores.setdefault(kind, []).append(100.0 * sum(found) / len(found))
        out = {kind: sum(v) / len(v) for kind, v in scores.items()}
        if len(out) == len(KINDS):
            out["mean"] = metrics.mean_of_five(*(out[k] for k in KINDS))
        return out | {"seconds": seconds / len(self.asked)}

    def answered(self, asked: Asked, edited: Edited) -> dict[str, list[float]]:
        """The scores of one record's probes by kind."""
        probes = asked.record.of(*self.kinds)
        found: dict[str, list[float]] = {}
        for batch, before in zip(asked.batches, asked.before, strict=True):
            now = ask(self.collator, batch, [probes[r].sample for r in batch.rows], edited)
            wanted = batch.inputs["input_ids"]
            for r, row in enumerate(batch.rows):
                kind = probes[row].kind
                if kind in LOCAL:
                    value = metrics.locality_a(before[r], now[r])
                else:
                    value = metrics.token_accuracy(now[r], wanted[r][batch.target_mask[r]])
                found.setdefault(kind, []).append(value)
        return found


def ask(collator: Collator, batch: Batch, samples: Sequence[Sample], edited: Edited) -> list[Tensor]:
    """What the edited model answers at each row's target positions, asked as the method asks."""
    told = [edited.prompt(s) for s in samples]
    if any(a is not b and a != b for a, b in zip(told, samples, strict=True)):
        batch = collator.batch(told, list(range(len(told))), eos=False)
    with edited.running(batch):
        return predictions(batch)


@torch.no_grad()
def predictions(batch: Batch) -> list[Tensor]:
    """The teacher-forced answers at the target positions, by row."""
    return metrics.target_ids(batch.model(**batch.inputs).logits, batch.target_mask)
