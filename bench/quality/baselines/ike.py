"""IKE: the new fact and demonstrations of how to use facts, in the prompt; no weight changes.

Zheng et al., "Can We Edit Factual Knowledge by In-Context Learning?", EMNLP 2023; in MMEdit (Cheng et al., EMNLP
2023) as here: demonstrations are training-split edits, nearest in text first, each as "New Fact: question answer" and
a "Prompt:" that copies it, asks it in other words, or asks something else and keeps its answer; text only, no
pictures; every question is asked behind them, the locality questions too.
What differs: sentences are compared by tf-idf (published: all-MiniLM-L6-v2), and there are as many demonstrations as
the context holds, 32 at most. Of several edits the one nearest to the question in text is the new fact.
IKE needs a model that follows demonstrations. Its row says n/a for one that does not: whose answers to training-split
edits are not right for at least half of the tokens although the answer stands in the prompt (`follows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from unike_kernels.editing.editor import base_only
from unike_kernels.editing.inputs import Batch, Sample
from unike_kernels.evaluation import metrics
from unike_kernels.evaluation.methods import Edited, Method
from unike_kernels.evaluation.records import Record

from .base import Baseline, asking

FOLLOWS = 0.5  # share of answer tokens that a model must get right with the answer before it
KINDS = ("rel", "t_gen", "t_loc")  # of a record's demonstrations, in turn: copy, update, retain


@dataclass(frozen=True)
class IkeConfig:
    """demonstrations: at most this many; kinds: which are shown (copy, update, retain)."""

    demonstrations: int = 32
    kinds: tuple[str, ...] = KINDS


class Prompted(Edited):
    """The base model, asked behind demonstrations and the nearest edit."""

    def __init__(self, method: Ike, requests: Sequence[Sample]) -> None:
        self.method, self.requests = method, list(requests)
        self.questions = method.vectors([r.prompt for r in requests])

    def prompt(self, sample: Sample) -> Sample:
        """The question behind the new fact and the demonstrations."""
        near = int((self.questions @ self.method.vectors([sample.prompt]).T).toarray()[:, 0].argmax())
        return self.method.asked(self.requests[near], sample)

    def running(self, batch: Batch):
        """Names the batch."""
        return asking(batch)


class Ike(Baseline):
    """Demonstrations in the prompt."""

    name = "IKE"
    source = "Zheng et al., EMNLP 2023"

    demonstrations: list[str]  # in the order of their records and kinds
    follows: float  # share of answer tokens right with the answer and others' demonstrations in the prompt
    without: float  # the same without anything in the prompt

    @property
    def followed(self) -> bool:
        """Whether the base follows demonstrations, so that the row says something."""
        return self.follows >= FOLLOWS and self.follows > self.without

    def unfollowed(self) -> str:
        """Why there is no row, of a base that does not follow demonstrations."""
        told = f"with the answer in the prompt {100 * self.follows:.1f} % of its tokens are right"
        return f"the base model does not follow demonstrations: {told}, without {100 * self.without:.1f}"

    @classmethod
    def trials(cls) -> tuple[IkeConfig, ...]:
        """Which demonstrations, and how many."""
        return IkeConfig(), IkeConfig(kinds=("rel",)), IkeConfig(kinds=("rel", "t_gen")), IkeConfig(demonstrations=8)

    def fit(self, records: Sequence[Record], *, seed: int = 0, cache: Path | None = None) -> None:
        """Writes the demonstrations, and measures whether the base follows them, on training-split edits."""
        self.demonstrations, about = [], []
        for n, record in enumerate(records):
            kind = self.config.kinds[n % len(self.config.kinds)]
            probe = (record.of(kind) or record.of("rel"))[0].sample
            self.demonstrations.append(f"{_fact(record.request, self._plain)}\nPrompt: {self._told(probe)}\n\n")
            about.append(self._plain(record.request.prompt))
        self.vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit(about)
        self.facts = self.vectorizer.transform(about)
        some = [r.request for r in records[:50]]
        with base_only(self.host.model):
            self.follows = self.accuracy([self.asked(s, s, but=n) for n, s in enumerate(some)])
            self.without = self.accuracy(some)

    @torch.no_grad()
    def accuracy(self, samples: Sequence[Sample]) -> float:
        """The base's mean token accuracy on the targets."""
        found = []
        for batch in self.host.collator.batches(samples, 32, eos=False):
            best = metrics.target_ids(batch.model(**batch.inputs).logits, batch.target_mask)
            wanted = [ids[mask] for ids, mask in zip(batch.inputs["input_ids"], batch.target_mask, strict=True)]
            found += [metrics.token_accuracy(b, w) for b, w in zip(best, wanted, strict=True)]
        return sum(found) / len(found)

    def vectors(self, texts: Sequence[str]):
        """tf-idf rows of unit length."""
        return self.vectorizer.transform([self._plain(t) for t in texts])

    def asked(self, request: Sample, sample: Sample, *, but: int | None = None) -> Sample:
        """`sample` behind the fact of `request` and the demonstrations that the context has room for.

        but: one of them that is left out, as it is of the very fact.
        """
        before, question = self._split(sample.prompt)
        text = f"{_fact(request, self._plain)}\nPrompt: {question}"
        limit = self._room()
        room = (
            limit
            - self._length(before + text)
            - len(self.host.collator.target_ids(sample.prompt, sample.target or "x"))
        )
        likeness = (self.facts @ self.vectors([sample.prompt]).T).toarray()[:, 0]
        shown: list[str] = []
        others = (i for i in range(len(likeness)) if i != but)
        for i in sorted(others, key=lambda i: -likeness[i])[: self.config.demonstrations]:
            cost = self._length(self.demonstrations[i])
            if cost > room:
                break
            room -= cost
            shown.insert(0, self.demonstrations[i])  # the nearest stands next to the question
        return replace(sample, prompt=f"{before}{''.join(shown)}{text}")

    def _room(self) -> int:
        """Tokens that the context holds beside pictures and the end of sequence."""
        text = self.host.model.config.get_text_config() if hasattr(self.host.model, "config") else None
        longest = getattr(text, "max_position_embeddings", None) or 2048
        images = getattr(self.host.collator.processor, "num_query_tokens", None) or 0
        return int(longest) - images - 2

    def _length(self, text: str) -> int:
        return len(self.host.collator.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _split(self, prompt: str) -> tuple[str, str]:
        """(what must stay first: everything up to the picture's place, the question)."""
        token = getattr(self.host.collator.processor, "image_token", None)
        token = getattr(token, "content", token)
        if not token or token not in prompt:
            return "", prompt
        at = prompt.rindex(token) + len(token)
        return prompt[:at], prompt[at:].lstrip()

    def _plain(self, prompt: str) -> str:
        return self._split(prompt)[1]

    def _told(self, sample: Sample) -> str:
        return f"{self._plain(sample.prompt)} {(sample.target or '').strip()}"

    def edit(self, samples: Sequence[Sample]) -> list[Sample]:
        """The edits themselves."""
        if not hasattr(self, "vectorizer"):
            raise ValueError("IKE has no demonstrations yet: call fit(records) first")
        return list(samples)

    @contextmanager
    def active(self, state: list[Sample]) -> Iterator[Prompted]:
        """The base model, asked in another way."""
        yield Prompted(self, state)


class Behind(Edited):
    """A model that carries another method's edits, asked behind demonstrations."""

    def __init__(self, inner: Edited, prompted: Prompted) -> None:
        self.inner, self.prompted = inner, prompted

    def prompt(self, sample: Sample) -> Sample:
        """The question behind the new fact and the demonstrations."""
        return self.prompted.prompt(self.inner.prompt(sample))

    def running(self, batch: Batch):
        """What the edits need: IKE acts by the prompt alone."""
        return self.inner.running(batch)

    def acting(self) -> list[list[int]] | None:
        """The edits' own."""
        return self.inner.acting()


class WithIke(Method):
    """Another method's edits with IKE in the prompt: the paper's "intrinsic + IKE", where the other is the neurons."""

    def __init__(self, inner: Method, ike: Ike, name: str) -> None:
        """Both on one model, ready."""
        self.inner, self.ike, self.name = inner, ike, name

    def settings(self) -> dict[str, Any]:
        """Of both."""
        return {"inner": self.inner.settings(), "ike": self.ike.settings()}

    @contextmanager
    def apply(self, requests: Sequence[Sample]) -> Iterator[Behind]:
        """The edits on the model, and all of them to be shown."""
        with self.inner.apply(requests) as edited:
            yield Behind(edited, Prompted(self.ike, self.ike.edit(requests)))

    def one_step(self, requests: Sequence[Sample]) -> Iterator[AbstractContextManager[Behind]]:
        """As the other method makes them."""
        edits = self.inner.one_step(requests)
        yield from (self._alone(edit, r) for edit, r in zip(edits, requests, strict=True))

    @contextmanager
    def _alone(self, edit: AbstractContextManager[Edited], request: Sample) -> Iterator[Behind]:
        with edit as edited:
            yield Behind(edited, Prompted(self.ike, self.ike.edit([request])))


def _fact(request: Sample, plain) -> str:
    return f"New Fact: {plain(request.prompt)} {(request.target or '').strip()}"
