"""Stage 2: `language_projection` and OPT learn names, captions, groups and facts on the frozen Q-Former's outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import data, vision
from . import model as tiny

VIEWS = 24  # of every drawing: the drawing itself and 23 augmentations of it
IGNORE = -100
Pair = tuple[list[int], list[int]]  # token ids of (prompt, target with </s>)


@torch.no_grad()
def cache_features(model: Any, generator: torch.Generator, views: int = VIEWS) -> Tensor:
    """The Q-Former's outputs [views, N, QUERY_TOKENS, HIDDEN] of all drawings; view 0 is not augmented."""
    pictures = vision.read_drawings().to(model.query_tokens.device)
    rows = []
    for view in tqdm(range(views), desc="caching features", mininterval=5):
        batches = pictures.split(256)
        pixels = (vision.augment(p, generator) if view else vision.normalise(p) for p in batches)
        rows.append(torch.cat([tiny.image_states(model, p) for p in pixels]))
    return torch.stack(rows)


class LanguageStage:
    """One training step of stage 2: a batch of pictures with questions and a batch of text-only facts.

    Everything lies on the model's device; batches are put together on the CPU.
    """

    name = "language"

    def __init__(self, model: Any, processor: Any, features: Tensor, pictures: int = 96, texts: int = 64) -> None:
        self.device = model.query_tokens.device
        self.model, self.features = model, features.to(self.device)
        self.sizes = (pictures, texts)
        self.tokenizer = processor.tokenizer
        self.module = nn.ModuleDict({"projection": model.language_projection, "text": model.language_model})
        self.parameters = list(self.module.parameters())
        name, caption, sorting = [], [], []
        for row, (concept, _) in enumerate(data.drawings()):
            pairs = self._encode(data.picture_questions(concept))
            if data.split_of()[concept.id] == "known":
                name.append((row, pairs[: len(data.NAME)]))
                caption.append((row, pairs[-len(data.CAPTION) :]))
                pairs = pairs[len(data.NAME) : -len(data.CAPTION)]
            sorting.append((row, pairs))
        self.kinds = ((0.55, name), (0.15, caption), (0.30, sorting))
        self.facts = [pair for concept in data.concepts() for pair in self._encode(data.facts(concept))]

    def _encode(self, pairs: list[tuple[str, str]]) -> list[Pair]:
        end = [self.tokenizer.eos_token_id]
        return [(self.tokenizer(p).input_ids, self.tokenizer(f" {t}").input_ids + end) for p, t in pairs]

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, list[Pair]]:
        rows, pairs = [], []
        for share, population in self.kinds:
            count = round(share * self.sizes[0])
            for i in torch.randint(len(population), (count,), generator=generator).tolist():
                row, choices = population[i]
                rows.append(row)
                pairs.append(choices[int(torch.randint(len(choices), (1,), generator=generator))])
        view = torch.randint(len(self.features), (len(rows),), generator=generator)
        return self.features[self._put(view), self._put(torch.tensor(rows))], pairs

    def _put(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _loss(self, states: Tensor | None, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        """(negative log-likelihood per sequence [B], exact match per sequence [B]) of the targets."""
        images = 0 if states is None else states.shape[1]
        length = max(len(prompt) + len(target) for prompt, target in pairs)
        ids = torch.zeros(len(pairs), length, dtype=torch.long)
        labels = torch.full((len(pairs), images + length), IGNORE)
        for i, (prompt, target) in enumerate(pairs):
            ids[i, : len(prompt) + len(target)] = torch.tensor(prompt + target)
            start = images + len(prompt) - 1  # the position that predicts the first target token
            labels[i, start : start + len(target)] = torch.tensor(target)
        chosen = labels != IGNORE
        at, sequence = self._put(chosen.flatten().nonzero()[:, 0]), self._put(chosen.nonzero()[:, 0])
        wanted = self._put(labels[chosen])
        decoder = self.model.language_model.model.decoder
        embeds = decoder.embed_tokens(self._put(ids))
        if states is not None:
            embeds = torch.cat([self.model.language_projection(states), embeds], 1)
        hidden = decoder(inputs_embeds=embeds).last_hidden_state  # right-padded and causal: no mask is needed
        logits = self.model.language_model.lm_head(hidden.flatten(0, 1)[at])  # a mask would be read by the host
        losses = F.cross_entropy(logits, wanted, reduction="none")
        none = losses.new_zeros(len(pairs))
        total = none.index_add(0, sequence, losses)
        wrong = none.index_add(0, sequence, (logits.argmax(-1) != wanted).float())
        return total, wrong == 0

    def step(self, generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one random batch, and what to show beside it; `progress` is not used.

        Nothing is read back from the device.
        """
        states, pairs = self._draw(generator)
        picture_loss, picture_right = self._loss(states, pairs)
        chosen = torch.randint(len(self.facts), (self.sizes[1],), generator=generator).tolist()
        text_loss, text_right = self._loss(None, [self.facts[i] for i in chosen])
        named = round(self.kinds[0][0] * self.sizes[0])
        shown = {
            "name": picture_right[:named].float().mean(),
            "sort": picture_right[-round(self.kinds[2][0] * self.sizes[0]) :].float().mean(),
            "fact": text_right.float().mean(),
        }
        return picture_loss.mean() + 0.5 * text_loss.mean(), shown
