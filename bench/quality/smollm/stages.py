"""The projector's two stages: first towards the language model's own words, then through the language model.

Known concepts are named, in the drawings that are not held out; groups and kinds are taught for all, and all are told
apart by identity, without a word, as the emoji world's own vision stage does (what EVA-CLIP brings to BLIP-2).
"""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.quality.emoji import data
from unike_kernels.caches import CACHE_NAMES
from unike_kernels.minigpt4 import MiniGPT4

from .features import held_out_drawings
from .model import BEFORE, QFORMER, QUERY_TOKENS, TRAINED, see

NAME_TOKENS = 4  # image tokens that start as a name's tokens, then the end of sequence; the others as its kind's first
SCALE = 16.0  # of cosines, as logits
Pair = tuple[list[int], list[int]]  # token ids of (prompt, target with the end of sequence)


class Identity(nn.Module):
    """Prototypes that tell all concepts apart from the mean of the Q-Former's outputs; thrown away afterwards."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.prototypes = nn.Parameter(torch.randn(len(data.concepts()), QFORMER, generator=generator))

    def loss(self, states: Tensor, concepts: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy, share right) of states [B, Q, QFORMER] against concept indices [B]."""
        cosine = F.normalize(states.mean(1).float(), dim=-1) @ F.normalize(self.prototypes, dim=-1).T
        loss = F.cross_entropy(SCALE * cosine, concepts, label_smoothing=0.05)
        return loss, (cosine.argmax(-1) == concepts).float().mean()


class _Stage:
    """What both stages share: the projector's parts, the patches and who is drawn where."""

    name = ""

    def __init__(self, net: MiniGPT4, patches: Tensor, heads: Identity) -> None:
        self.net, self.patches, self.heads = net, patches, heads
        self.device = net.query_tokens.device
        parts = {name: getattr(net, name) for name in TRAINED if name != "query_tokens"}
        self.module = nn.ModuleDict({**parts, "heads": heads})
        self.parameters = [*self.module.parameters(), net.query_tokens]
        index = {concept.id: i for i, concept in enumerate(data.concepts())}
        out = held_out_drawings()
        drawn = data.drawings()
        self.shown = torch.tensor([i for i, (c, artist) in enumerate(drawn) if (c.id, artist) not in out])
        self.concept = torch.tensor([index[c.id] for c, _ in drawn])
        self.known = torch.tensor([data.split_of()[c.id] == "known" for c, _ in drawn])

    def states(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """[B, Q, QFORMER] of drawings, each in a random view."""
        view = torch.randint(len(self.patches), (len(rows),), generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return see(self.net, self.patches[view, rows].float())


class AlignStage(_Stage):
    """Image tokens learn to be the embeddings of a name's first tokens and of its kind's, no language model run."""

    name = "align"

    def __init__(self, net: MiniGPT4, tokenizer: Any, patches: Tensor, seed: int, batch: int = 128) -> None:
        super().__init__(net, patches, Identity(seed))
        self.batch = batch

        def tokens(text: str, count: int) -> list[int]:
            ids = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            return [*ids, *[tokenizer.eos_token_id] * count][:count]

        kinds = QUERY_TOKENS - NAME_TOKENS
        wanted = torch.tensor([tokens(c.name, NAME_TOKENS) + tokens(c.kind, kinds) for c in data.concepts()])
        known = torch.tensor([data.split_of()[c.id] == "known" for c in data.concepts()])
        # no held-out name is among the words to choose from
        words = torch.cat([wanted[known, :NAME_TOKENS].flatten(), wanted[:, NAME_TOKENS:].flatten()]).unique()
        self.embeddings = net.llama_model.get_input_embeddings().weight.detach()[words].float()
        self.wanted = torch.searchsorted(words, wanted.clamp(max=int(words[-1])))  # right where it is asked

    def step(self, generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one random batch, and what to show beside it; `progress` is not used."""
        rows = self.shown[torch.randint(len(self.shown), (self.batch,), generator=generator)]
        states = self.states(rows, generator)
        image = self.net.llama_proj(states.float())  # [B, Q, d]
        logits = SCALE * F.normalize(image, dim=-1) @ F.normalize(self.embeddings, dim=-1).T
        wanted, known = self.wanted[self.concept[rows]], self.known[rows]
        named = known[:, None] & (torch.arange(QUERY_TOKENS) < NAME_TOKENS)
        asked = named | (torch.arange(QUERY_TOKENS) >= NAME_TOKENS)
        loss = F.cross_entropy(logits[asked], wanted[asked], label_smoothing=0.05)
        # the right word being the nearest is not enough: at a cosine of 0.55 with it the language model read nothing
        target = self.embeddings[wanted[asked]]
        loss = loss + 4 * ((image[asked] - target).square().sum(-1) / target.square().sum(-1)).mean()
        identity, right = self.heads.loss(states, self.concept[rows])
        name = (logits[named].argmax(-1) == wanted[named]).float().mean()
        near = F.cosine_similarity(image[asked], target, dim=-1).mean()
        return loss + 0.5 * identity, {"name": name, "cosine": near.detach(), "identity": right}


class SpeakStage(_Stage):
    """The frozen language model must answer questions about pictures; only the answers' tokens count."""

    name = "speak"

    def __init__(
        self,
        net: MiniGPT4,
        tokenizer: Any,
        patches: Tensor,
        heads: Identity,
        *,
        batch: int = 24,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """dtype: of the frozen language model's copy; bfloat16 made a forward on an AVX-512 CPU five times as fast."""
        super().__init__(net, patches, heads)
        self.batch, self.seen = batch, torch.zeros(())
        self.language = copy.deepcopy(net.llama_model).to(dtype).requires_grad_(False)
        named = inspect.signature(self.language.model.forward).parameters
        self.cache_name = next(name for name in CACHE_NAMES if name in named)
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.ids = cache(lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
        name_questions: list[tuple[int, list[Pair]]] = []  # (drawing, what can be asked about it)
        captions: list[tuple[int, list[Pair]]] = []
        sorting: list[tuple[int, list[Pair]]] = []
        for row in self.shown.tolist():
            concept = data.drawings()[row][0]
            sorting.append((row, self._encode(data.sorting_questions(concept))))
            if bool(self.known[row]):
                pairs = self._encode(data.picture_questions(concept))
                name_questions.append((row, pairs[: len(data.NAME)]))
                captions.append((row, pairs[-len(data.CAPTION) :]))
        self.kinds = ((0.55, name_questions), (0.15, captions), (0.30, sorting))  # share of the steps

    def _encode(self, pairs: list[tuple[str, str]]) -> list[Pair]:
        return [([*self.ids(f"\n{prompt}")], [*self.ids(f" {target}"), self.eos]) for prompt, target in pairs]

    def _draw(self, generator: torch.Generator) -> tuple[int, Tensor, list[Pair]]:
        """(kind, drawings [batch], pairs): all of one kind, so that little is padded."""
        u, kind = float(torch.rand((), generator=generator)), 0
        while kind < 2 and u >= self.kinds[kind][0]:
            u, kind = u - self.kinds[kind][0], kind + 1
        population = self.kinds[kind][1]
        chosen = [population[i] for i in torch.randint(len(population), (self.batch,), generator=generator).tolist()]
        pairs = [pairs[int(torch.randint(len(pairs), (1,), generator=generator))] for _, pairs in chosen]
        return kind, torch.tensor([row for row, _ in chosen]), pairs

    @torch.no_grad()
    def _before(self, batch: int) -> Any:
        """Keys and values of what comes before every picture, computed once."""
        from transformers import DynamicCache

        if not self.kept:
            before = torch.tensor([[self.bos, *self.ids(BEFORE)]])
            cached = self.language.model(input_ids=before, use_cache=True)[self.cache_name]
            self.kept = [(layer.keys, layer.values) for layer in cached.layers]
        out = DynamicCache()
        for i, (keys, values) in enumerate(self.kept):
            out.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), i)
        return out

    def _answer(self, states: Tensor, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        """(negative log-likelihood [B], whether every token is the first choice [B])."""
        head = QUERY_TOKENS
        length = max(len(prompt) + len(target) for prompt, target in pairs)
        ids = torch.zeros(len(pairs), length, dtype=torch.long)
        at, sequence, wanted = [], [], []
        for i, (prompt, target) in enumerate(pairs):
            ids[i, : len(prompt) + len(target)] = torch.tensor(prompt + target)
            start = i * (head + length) + head + len(prompt) - 1  # the position that predicts the first target token
            at += range(start, start + len(target))
            sequence += [i] * len(target)
            wanted += target
        text = self.language.get_input_embeddings()(ids)
        image = self.net.llama_proj(states.float()).to(text)
        # right-padded and causal: no mask is needed
        hidden = self.language.model(
            inputs_embeds=torch.cat([image, text], 1), use_cache=True, **{self.cache_name: self._before(len(pairs))}
        ).last_hidden_state
        logits = self.language.lm_head(hidden.flatten(0, 1)[at].contiguous()).float()
        target, owner = torch.tensor(wanted), torch.tensor(sequence)
        none = logits.new_zeros(len(pairs))
        total = none.index_add(0, owner, F.cross_entropy(logits, target, reduction="none"))
        wrong = none.index_add(0, owner, (logits.argmax(-1) != target).float())
        return total, wrong == 0

    def step(self, generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one random batch, and what to show beside it; `progress` is not used."""
        kind, rows, pairs = self._draw(generator)
        states = self.states(rows, generator)
        loss, right = self._answer(states, pairs)
        identity, told = self.heads.loss(states, self.concept[rows])
        if kind == 0:
            self.seen = right.float().mean()
        return loss.mean() + 0.2 * identity, {"name": self.seen, "identity": told}
