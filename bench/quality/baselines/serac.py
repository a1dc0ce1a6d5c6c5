"""SERAC: edits are stored as text; a scope classifier says which one a question falls under, and a small counterfactual
model then answers in the base's place.

Mitchell et al., "Memory-Based Model Editing at Scale", ICML 2022; multimodal by Cheng et al., EMNLP 2023 (MMEdit),
where the classifier and the counterfactual model read text alone. As published: the classifier embeds edit and
question and takes the nearest edit's likeness, a logistic function of the squared distance; the counterfactual model
reads "edit's question and answer, question" and continues; both are trained on training-split edits, with questions
in and out of scope; above one half the counterfactual model's logits replace the base's.
Two forms. "SERAC" is the published one: it sees no picture, and its training leaves out the locality of pictures. It
cannot tell one picture's question from another's that is asked in the same words, which is what its M-Loc shows.
"SERAC, image-aware" is a fair one: the classifier also sees the base's state at the question's last token, as UniKE's
router does (the tap of the first edited layer), and is trained on all locality probes.
What differs: published SERAC fine-tunes pretrained models (DistilBERT; OPT-125M or a copy of the base's language
model with its last layer trained). Nothing of that size exists beside a small base, so both are small transformers
from scratch on the base's frozen embeddings. A pretrained model can copy; ours can point at a token that it read (See
et al., ACL 2017), and also learns on made-up answers, words drawn from the vocabulary.
Measured (base model 0): Rel 100.0 on training-split edits with either scope; on development edits 98.5, and 99.4
with the scope that sees the picture.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unike_kernels.editing.editor import base_only
from unike_kernels.editing.extract import tap_rows
from unike_kernels.editing.inputs import Batch, Sample
from unike_kernels.evaluation.methods import Edited
from unike_kernels.evaluation.records import LOCAL, Record
from unike_kernels.hooks import hidden_states_of
from unike_kernels.models import get_module

from . import base, training
from .base import Baseline, Host, asking

IN_SCOPE = ("rel", "t_gen", "m_gen")
LENGTH = 192  # tokens that the small models tell apart by position


@dataclass(frozen=True)
class SeracConfig:
    """Widths and depths of both models, and their training: `steps` of the scope, `answer_steps` of the answers."""

    width: int = 128
    depth: int = 2
    heads: int = 4
    embedding: int = 64  # of the classifier
    lr: float = 1e-3
    steps: int = 400
    answer_steps: int = 1000
    batch: int = 16
    made_up: float = 0.5  # share of edits whose answer is made up while the counterfactual model learns


class Reader(nn.Module):
    """A small causal transformer over the base's frozen embeddings: token ids [B, S] -> states [B, S, width]."""

    def __init__(self, embed: nn.Module, config: SeracConfig, length: int) -> None:
        super().__init__()
        self.embed = [embed]  # in a list: not learned, not saved
        self.enter = nn.Linear(embed.weight.shape[1], config.width)
        self.position = nn.Parameter(torch.randn(length, config.width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            config.width, config.heads, 4 * config.width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, ids: Tensor) -> Tensor:
        """States of right-padded rows: causal, so padding is seen by nothing."""
        s = ids.shape[1]
        at = torch.arange(s, device=ids.device).clamp(max=len(self.position) - 1)
        x = self.enter(self.embed[0](ids).float()) + self.position[at]
        mask = nn.Transformer.generate_square_subsequent_mask(s, device=ids.device)
        return self.norm(self.layers(x, mask=mask, is_causal=True))


class Scope(nn.Module):
    """The scope classifier: an embedding of a question, of its text and, if `seen` > 0, of the base's state [seen]."""

    def __init__(self, embed: nn.Module, config: SeracConfig, length: int, seen: int) -> None:
        super().__init__()
        self.reader = Reader(embed, config, length)
        self.text = nn.Linear(config.width, config.embedding)
        self.seen = seen
        if seen:
            self.picture = nn.Sequential(
                nn.Linear(seen, 2 * config.width), nn.GELU(), nn.Linear(2 * config.width, config.embedding)
            )
            self.register_buffer("mean", torch.zeros(seen))
            self.register_buffer("std", torch.ones(()))
        self.bias = nn.Parameter(torch.tensor(2.0))
        self.log_scale = nn.Parameter(torch.tensor(0.0))

    def forward(self, ids: Tensor, lengths: Tensor, states: Tensor | None) -> Tensor:
        """[B, e] of questions: padded ids [B, S], their lengths [B], the states [B, seen]."""
        x = self.text(self.reader(ids)[torch.arange(len(ids), device=ids.device), lengths - 1])
        if self.seen:
            x = torch.cat([x, self.picture((states.float() - self.mean) / self.std)], dim=-1)
        return x

    def logit(self, a: Tensor, b: Tensor) -> Tensor:
        """Of being in scope, of embeddings [..., e]: falls with the squared distance."""
        return self.bias - self.log_scale.exp() * (a - b).square().mean(dim=-1)


class Counterfactual(nn.Module):
    """Reads "edit's question and answer, question" and continues, from the vocabulary or by pointing back."""

    def __init__(self, host: Host, config: SeracConfig, length: int = LENGTH) -> None:
        super().__init__()
        self.reader = Reader(host.embeddings(), config, length)
        self.leave = nn.Linear(config.width, host.head.weight.shape[1])
        self.query = nn.Linear(config.width, config.width)
        self.key = nn.Linear(config.width, config.width)
        self.gate = nn.Linear(config.width, 1)
        self.head = [host.head]  # the base's own, frozen

    def forward(self, ids: Tensor, at: Tensor) -> Tensor:
        """[N, V] log-probabilities of what follows each of the positions at [B, S] bool, row by row."""
        b, s = ids.shape
        states = self.reader(ids)
        row, place = at.nonzero(as_tuple=True)
        here = states[row, place]  # [N, width]
        vocabulary = self.head[0](self.leave(here).to(self.head[0].weight.dtype)).float().softmax(dim=-1)
        score = (self.query(here)[:, None] * self.key(states)[row]).sum(dim=-1) / states.shape[-1] ** 0.5  # [N, S]
        later = torch.arange(s, device=ids.device)[None] > place[:, None]
        pointer = score.masked_fill(later, -torch.inf).softmax(dim=-1)
        copied = torch.zeros_like(vocabulary).scatter_add(1, ids[row], pointer)
        share = self.gate(here).sigmoid()
        return (share * vocabulary + (1 - share) * copied).clamp(min=1e-12).log()


@dataclass
class Stored:
    """The edits in memory: their texts as token ids (question and answer), and their embeddings [K, e]."""

    texts: list[list[int]]
    embeddings: Tensor


CODE = (base, training, sys.modules[__name__])


class Serac(Baseline):
    """The published form: text alone."""

    name = "SERAC"
    source = "Mitchell et al., ICML 2022; text-only scope as in Cheng et al., EMNLP 2023"
    trained = True
    image_aware = False
    out_of_scope: tuple[str, ...] = ("t_loc",)  # what the classifier learns to leave alone: not pictures, as published

    scope: Scope | None = None
    answers: Counterfactual | None = None
    leads: tuple[list[int], ...] = ()  # what the processor says before a question, without special tokens
    history: Sequence[dict[str, float]] = ()

    @classmethod
    def trials(cls) -> tuple[SeracConfig, ...]:
        """Two depths, two rates, with and without made-up answers."""
        chosen = SeracConfig()
        return chosen, replace(chosen, depth=3), replace(chosen, lr=3e-3), replace(chosen, made_up=0.0)

    # ------------------------------------------------------------------------------------------------ texts

    def ids(self, text: str) -> list[int]:
        """Token ids of a text without special tokens; a picture's place in it is dropped."""
        tokenizer = self.host.collator.tokenizer
        token = getattr(self.host.collator.processor, "image_token", None)
        token = getattr(token, "content", token)
        return list(tokenizer(text.replace(token, "") if token else text, add_special_tokens=False)["input_ids"])

    def edit_ids(self, prompt: list[int], answer: list[int]) -> list[int]:
        """An edit as the counterfactual model reads it: question, answer, its end, new line."""
        return [*prompt, *answer, *self.end(), *self.ids("\n")]

    def end(self) -> list[int]:
        """The end of an answer; nothing where the tokenizer has none."""
        eos = self.host.collator.eos
        return [] if eos is None else [eos]

    def answer_ids(self, sample: Sample) -> list[int]:
        """The answer's ids as they follow the question."""
        return self.host.collator.target_ids(sample.prompt, sample.target or "")

    def lead(self, sample: Sample) -> list[int]:
        """What stands before the question where the model is asked it: a template's words, as MiniGPT-4's.

        ValueError where the question's own tokens are not the last ones.
        """
        batch, skip, own = self.host.collator.batch([sample], [0]), self.host.silent(), self.ids(sample.prompt)
        asked = batch.inputs["input_ids"][0, : int(batch.case_position[0]) + 1].tolist()
        said = [i for i in asked if i not in skip]
        if said[len(said) - len(own) :] != own:
            raise ValueError(f"{sample.prompt!r} is read as {said}, which does not end in its own tokens {own}")
        return said[: len(said) - len(own)]

    # --------------------------------------------------------------------------------------------- learning

    def fit(
        self, records: Sequence[Record], *, seed: int = 0, cache: Path | None = None, progress: bool = True
    ) -> None:
        """Trains the counterfactual model and the classifier on training-split edits."""
        c, host = self.config, self.host
        device = host.collator.device

        def file(part: str) -> Path | None:
            if cache is None:
                return None
            told = {"part": part, "seed": seed, **asdict(c)}
            return cache / f"serac-{part}-{training.key(host.model, records, told, CODE)}.safetensors"

        def learn(module: nn.Module, losses, steps: int, part: str) -> list[dict[str, float]]:
            def step(n: int, generator: torch.Generator) -> dict[str, Tensor]:
                return losses(module, generator)

            name, at = f"{self.name}: {part}", file(part)
            return training.train(module, step, steps, lr=c.lr, seed=seed, name=name, file=at, progress=progress)

        scope_part = "scope-image" if self.image_aware else "scope"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            answers = Counterfactual(host, c).to(device)
            scope = Scope(host.embeddings(), c, LENGTH, host.width if self.image_aware else 0).to(device)
        with base_only(host.model):
            samples = [p.sample for r in records for p in r.probes]
            some = {s.image is None: s for s in samples}  # one with a picture and one without
            self.leads = tuple(lead for s in some.values() if (lead := self.lead(s)))
            states, kept = None, file(scope_part)
            if self.image_aware and (kept is None or not kept.exists()):
                states = self.states(samples, progress)
                scope.mean.copy_(states.mean(dim=0))
                scope.std.copy_((states - states.mean(dim=0)).norm(dim=1).mean() / states.shape[1] ** 0.5)
            lessons = Lessons(self, records, states)
            self.history = [
                *learn(answers, lessons.answering, c.answer_steps, "answers"),
                *learn(scope, lessons.scoping, c.steps, scope_part),
            ]
        self.answers = answers.eval().requires_grad_(False)
        self.scope = scope.eval().requires_grad_(False)

    @torch.no_grad()
    def states(self, samples: Sequence[Sample], progress: bool = False) -> Tensor:
        """[N, d] what enters the first edited self-attention at every question's last token, on the base."""
        first, out = self.host.layers[:1], torch.zeros(len(samples), self.host.width)
        asked = [Sample(s.prompt, None, s.image) for s in samples]
        for batch in tqdm(list_of(self.host, asked), desc="states", mininterval=5, disable=not progress):
            (case,) = tap_rows(self.host.model, self.host.decoder, first, batch, [batch.case_rows()])
            out[batch.rows] = case["tap"][first[0]].float().cpu()
        return out

    # ---------------------------------------------------------------------------------------------- editing

    @torch.no_grad()
    def edit(self, samples: Sequence[Sample]) -> Stored:
        """The edits' texts and embeddings; of two that ask the same the later one counts."""
        if self.scope is None or self.answers is None:
            raise ValueError(f"{self.name} is not trained yet: call fit(records) first")
        states = self.states(samples) if self.image_aware else None
        ids, lengths = padded([self.ids(s.prompt) for s in samples], self.host.collator.device)
        states = None if states is None else states.to(ids.device)
        texts = [self.edit_ids(self.ids(s.prompt), self.answer_ids(s)) for s in samples]
        return Stored(texts, self.scope(ids, lengths, states))

    @contextmanager
    def active(self, state: Stored) -> Iterator[Edited]:
        """The base's head gives way, row by row, to the counterfactual model."""
        with Replacing(self, state).on_model() as edited:
            yield edited


class ImageAwareSerac(Serac):
    """The fair form: the classifier sees the base's state of picture and question."""

    name = "SERAC, image-aware"
    source = "Mitchell et al., ICML 2022, with a scope classifier that sees the picture"
    image_aware = True
    out_of_scope = LOCAL

    @classmethod
    def trials(cls) -> tuple[SeracConfig, ...]:
        """The same four; here the deeper one is the chosen one."""
        shallow, deep, *others = super().trials()
        return deep, shallow, *others


def list_of(host: Host, samples: Sequence[Sample]) -> list[Batch]:
    """Batches of 64."""
    return list(host.collator.batches(samples, 64))


def padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids [B, S] padded right with 0, lengths [B])."""
    out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for r, row in enumerate(rows):
        out[r, : len(row)] = torch.tensor(row)
    return out.to(device), torch.tensor([len(row) for row in rows], device=device)


class Lessons:
    """Batches of training-split edits for both models."""

    def __init__(self, method: Serac, records: Sequence[Record], states: Tensor | None) -> None:
        self.method, self.config = method, method.config
        self.records, self.states = list(records), states
        self.start = [0]
        for r in records:
            self.start.append(self.start[-1] + len(r.probes))
        cached: dict[str, list[int]] = {}

        def ids(prompt: str) -> list[int]:
            if prompt not in cached:
                cached[prompt] = method.ids(prompt)
            return cached[prompt]

        self.questions = [[ids(p.sample.prompt) for p in r.probes] for r in records]
        self.answers = [method.answer_ids(r.request) for r in records]
        special = method.host.silent()
        vocabulary = method.host.embeddings().weight.shape[0]
        self.words = torch.tensor([i for i in range(vocabulary) if i not in special])

    def answering(self, model: Counterfactual, generator: torch.Generator) -> dict[str, Tensor]:
        """NLL of the answers to questions in scope, the edit before them."""
        c, end = self.config, self.method.end()
        rows, targets = [], []
        for n in self._draw(generator):
            probes, answer = self.records[n].probes, self.answers[n]
            if float(torch.rand((), generator=generator)) < c.made_up:
                length = int(torch.randint(1, 5, (), generator=generator))
                answer = self.words[torch.randint(len(self.words), (length,), generator=generator)].tolist()
            near = [i for i, p in enumerate(probes) if p.kind in IN_SCOPE]
            for i in torch.randint(len(near), (2,), generator=generator).tolist():
                context = [*self.method.edit_ids(self.questions[n][0], answer), *self.questions[n][near[i]]]
                rows.append([*context, *answer, *end])
                targets.append((len(context) - 1, len(answer) + len(end)))
        ids, _ = padded(rows, self.method.host.collator.device)
        at = torch.zeros_like(ids, dtype=torch.bool)
        for r, (begin, count) in enumerate(targets):
            at[r, begin : begin + count] = True
        found, right = model(ids, at), ids[:, 1:][at[:, :-1]]
        nll = nn.functional.nll_loss(found, right)
        return {"loss": nll, "copied": (found.argmax(dim=-1) == right).float().mean()}

    def scoping(self, model: Scope, generator: torch.Generator) -> dict[str, Tensor]:
        """Binary cross-entropy of questions in and out of an edit's scope."""
        asked, whose, wanted = [], [], []
        picked = self._draw(generator)
        for e, n in enumerate(picked):
            probes = self.records[n].probes
            for kinds in (IN_SCOPE, self.method.out_of_scope):
                some = [i for i, p in enumerate(probes) if p.kind in kinds]
                for i in torch.randperm(len(some), generator=generator)[:3].tolist():
                    asked.append((n, some[i]))
                    whose.append(e)
                    wanted.append(float(kinds is IN_SCOPE))
        edits = self._embed(model, [(n, 0) for n in picked])
        logit = model.logit(edits[torch.tensor(whose)], self._embed(model, asked))
        label = torch.tensor(wanted, device=logit.device)
        loss = nn.functional.binary_cross_entropy_with_logits(logit, label)
        return {"loss": loss, "right": ((logit > 0) == (label > 0.5)).float().mean()}

    def _draw(self, generator: torch.Generator) -> list[int]:
        return torch.randint(len(self.records), (self.config.batch,), generator=generator).tolist()

    def _embed(self, model: Scope, asked: Sequence[tuple[int, int]]) -> Tensor:
        ids, lengths = padded([self.questions[n][i] for n, i in asked], self.method.host.collator.device)
        states = None
        if self.states is not None:
            states = self.states[[self.start[n] + i for n, i in asked]].to(ids.device)
        return model(ids, lengths, states)


class Replacing(Edited):
    """Hooks that follow what the model reads and replace its logits where a question is in scope of an edit."""

    def __init__(self, method: Serac, state: Stored) -> None:
        self.method, self.host, self.state = method, method.host, state
        self.ids: Tensor | None = None  # [B, S] what the model has read so far
        self.read: Tensor | None = None  # [B, S] what the pass that runs reads
        self.busy = False  # while the counterfactual model uses the base's embeddings and head
        self.chosen: list[int | None] = []  # the edit whose scope each row's question is in

    def running(self, batch: Batch):
        """Names the batch, whose prompts decide."""
        return asking(batch)

    def acting(self) -> list[list[int]] | None:
        """The edit in whose scope each row's question is."""
        return [[] if c is None else [c] for c in self.chosen]

    @contextmanager
    def on_model(self) -> Iterator[Replacing]:
        """Inside, the model answers with the edits."""
        host = self.host
        attention = get_module(host.model, host.decoder.layers[host.layers[0]].attention)
        with host.passes() as now:

            def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                ids = kwargs["input"] if "input" in kwargs else args[0]
                if ids.dim() == 2 and not self.busy:
                    self.read = ids.clone()

            def tap(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                position = now().case_position
                self._begin(position is not None)
                if position is None:
                    return
                hidden = hidden_states_of(args, kwargs)
                rows = torch.arange(len(position), device=hidden.device)
                self.busy = True
                try:
                    self._decide(hidden[rows, position], position)
                finally:
                    self.busy = False

            def answer(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
                if self.busy:
                    return None
                self.busy = True
                try:
                    return self._replace(output)
                finally:
                    self.busy = False

            hooks = [
                host.embeddings().register_forward_pre_hook(read, with_kwargs=True),
                attention.register_forward_pre_hook(tap, with_kwargs=True),
                host.head.register_forward_hook(answer),
            ]
            try:
                yield self
            finally:
                for hook in hooks:
                    hook.remove()

    def _begin(self, fresh: bool) -> None:
        """Takes what the pass reads: a prompt, or one more column while decoding."""
        assert self.read is not None  # the embeddings come before the layers
        self.ids = self.read if fresh or self.ids is None else torch.cat([self.ids, self.read], dim=1)

    def _places(self, seen: list[int]) -> list[int]:
        """Where the question and what follows it stand in a row: not padding, pictures and what is said before.

        An end behind the first word belongs to an answer; before it, it is padding of the same id (SmolLM2).
        """
        silent, eos = self.host.silent(), self.host.collator.eos
        begin = next((s for s, i in enumerate(seen) if i not in silent), len(seen))
        places = [s for s in range(begin, len(seen)) if seen[s] not in silent or seen[s] == eos]
        for lead in self.method.leads:
            if [seen[s] for s in places[: len(lead)]] == lead:
                return places[len(lead) :]
        return places

    @torch.no_grad()
    def _decide(self, states: Tensor, position: Tensor) -> None:
        """Which edit each row's question falls under."""
        assert self.ids is not None
        seen = [row[: p + 1] for row, p in zip(self.ids.tolist(), position.tolist(), strict=True)]
        prompts = [[row[s] for s in self._places(row)] for row in seen]
        ids, lengths = padded([p or [0] for p in prompts], states.device)
        scope = self.method.scope
        found = scope(ids, lengths, states)
        logits = scope.logit(found[:, None], self.state.embeddings[None])  # [B, K]
        best = logits.flip(1).max(dim=1)  # flipped: of equal ones the later edit counts
        index = logits.shape[1] - 1 - best.indices
        self.chosen = [int(i) if v > 0 else None for i, v in zip(index, best.values, strict=True)]

    @torch.no_grad()
    def _replace(self, output: Tensor) -> Tensor:
        """The last columns of the logits [B, S', V], in scope the counterfactual model's."""
        hit = [r for r, c in enumerate(self.chosen) if c is not None]
        if not hit or output.dim() != 3:
            return output
        width, rows, places = output.shape[1], [], []
        for r in hit:
            seen = self.ids[r].tolist()
            keep = self._places(seen)
            edit = self.state.texts[self.chosen[r]]
            rows.append([*edit, *(seen[s] for s in keep)])
            first = len(seen) - width  # a decoding step asks for the last column alone
            places.append([(s - first, len(edit) + k) for k, s in enumerate(keep) if s >= first])
        ids, _ = padded(rows, output.device)
        at = torch.zeros_like(ids, dtype=torch.bool)
        for n, pairs in enumerate(places):
            at[n, [of for _, of in pairs]] = True
        to_row = [r for r, pairs in zip(hit, places, strict=True) for _ in pairs]
        to_column = [to for pairs in places for to, _ in pairs]
        output = output.clone()
        output[to_row, to_column] = self.method.answers(ids, at).to(output)
        return output
