"""Asks a model samples through its own forward and generate: before an edit, and after one of any method."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..editing.inputs import Collator, Sample
from .methods import Edited
from .metrics import exact_match, token_accuracy
from .records import LOCAL, Probe
from .scoring import Base, bases, by_length, ranks


@dataclass(frozen=True)
class Before:
    """What the unedited model says to one probe; answer: generated greedily, None where it was not asked for."""

    base: Base
    answer: str | None = None


@dataclass(frozen=True)
class Outcome:
    """One probe before and after an edit, as shares of 1.

    before, after: token accuracy on the target. locality_a, locality_b: what stayed as it was. exact: whether the
    generated answer is the target; of a locality probe, whether it is the answer of before. acted: the requests that
    acted, by index; None where the method does not choose, or where nothing was asked for.
    """

    before: float
    after: float
    locality_a: float
    locality_b: float
    exact: bool | None
    answer_before: str | None
    answer: str | None
    acted: list[int] | None


class Examiner:
    """Asks probes in batches: teacher-forced always, generating where asked to."""

    def __init__(self, collator: Collator, *, batch_size: int = 16) -> None:
        self.collator, self.batch_size = collator, batch_size

    def before(self, probes: Sequence[Probe], generating: Sequence[bool]) -> list[Before]:
        """On the model as it stands, which has to be the base. generating: which probes are answered freely too."""
        found, _ = self._forced([p.sample for p in probes], None)
        answers = self._generated([p.sample for p in probes], generating, None)
        return [Before(*pair) for pair in zip(found, answers, strict=True)]

    def after(self, probes: Sequence[Probe], before: Sequence[Before], edited: Edited) -> list[Outcome]:
        """On the edited model; answers freely what `before` answered freely."""
        samples = [edited.prompt(p.sample) for p in probes]
        for p, s in zip(probes, samples, strict=True):
            if s.target != p.sample.target:
                raise ValueError(f"the method changed the target {p.sample.target!r} into {s.target!r}")
        found, acted = self._forced(samples, edited)
        answers = self._generated(samples, [b.answer is not None for b in before], edited)
        out = []
        for p, b, now, answer, acting in zip(probes, before, found, answers, acted, strict=True):
            score = b.base.score(now.target, now.top)
            exact = None
            if answer is not None:
                exact = answer == b.answer if p.kind in LOCAL else exact_match(answer, p.sample.target or "")
            was = token_accuracy(b.base.target, b.base.wanted)
            local = (score.locality_a, score.locality_b)
            out.append(Outcome(was, score.accuracy, *local, exact, b.answer, answer, acting))
        return out

    @torch.no_grad()
    def _forced(self, samples: Sequence[Sample], edited: Edited | None) -> tuple[list[Base], list[list[int] | None]]:
        """What the model says teacher-forced, and which requests acted, by sample."""
        found: dict[int, Base] = {}
        acted: dict[int, list[int] | None] = {}
        order, edited = by_length(samples), edited or Edited()
        for batch in self.collator.batches([samples[i] for i in order], self.batch_size, eos=False):
            rows = [order[r] for r in batch.rows]
            with edited.running(batch):
                logits = batch.model(**batch.inputs, use_cache=False).logits
                acting = edited.acting()
            for r, base in enumerate(bases(batch, logits, ranks(samples[rows[0]]))):
                found[rows[r]] = Base(base.wanted.cpu(), base.target.cpu(), base.top.cpu())
                acted[rows[r]] = None if acting is None else acting[r]
        return [found[i] for i in range(len(samples))], [acted[i] for i in range(len(samples))]

    @torch.no_grad()
    def _generated(self, samples: Sequence[Sample], wanted: Sequence[bool], edited: Edited | None) -> list[str | None]:
        """Greedy answers to the samples wanted, each one token longer than its target, as an answer may go on."""
        out: list[str | None] = [None] * len(samples)
        wanted_rows = [i for i, want in enumerate(wanted) if want]
        order, edited = [wanted_rows[i] for i in by_length([samples[r] for r in wanted_rows])], edited or Edited()
        asked = [Sample(samples[r].prompt, None, samples[r].image) for r in order]
        for batch in self.collator.batches(asked, self.batch_size, side="left"):
            rows = [order[r] for r in batch.rows]
            lengths = [self.collator.longest_target([samples[r]]) + 1 for r in rows]
            with edited.running(batch):
                new = self.collator.generate_ids(batch, max_new_tokens=max(lengths))
            cut = [ids[:length] for ids, length in zip(new, lengths, strict=True)]  # the same in any batch
            for row, answer in zip(rows, self.collator.answers(cut), strict=True):
                out[row] = answer
        return out
