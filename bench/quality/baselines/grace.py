"""GRACE: a codebook at one layer whose values replace that layer's output where a prompt is near a key.

Hartvigsen et al., "Aging with GRACE", NeurIPS 2023 (not in the paper's tables). As published: a key is what enters
the chosen module at the last prompt token, compared by Euclidean distance; within a key's radius the output is
replaced by the key's value, at that token, at the whole prompt or at all tokens (the published code has all three);
the value is trained on the edit's NLL by Adam at 1.0 for 100 steps from a random start; a new edit near a key of
another answer halves both radii to their distance, one of the same answer widens the key's.
What differs: the module is a whole FFN (published: one map in it), so the key is its input. Radii are given as a share
of the median distance between training-split keys, since a fixed 1.0 means nothing at another width; the rate, the
radius, the layer and the replaced tokens are searched.
Why Rel stays below 90: one vector cannot spell a new name, which has four tokens and more here. It gets the first token
right and less than half of the later ones, wherever it stands and in each of the four layers; more steps and other
rates do not help. A large language model goes on with a name that its own first token begins; this small one does so
only with names that it has seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from unike_kernels.editing.inputs import Batch, Sample
from unike_kernels.editing.prefix import recorded
from unike_kernels.evaluation.methods import Edited
from unike_kernels.evaluation.records import Record

from .base import Baseline, asking, descend


@dataclass(frozen=True)
class GraceConfig:
    """layer: which of the last four; radius: a key's first one, as a share of the keys' median distance.

    replace: where the value stands: at the "last" token of the prompt, at the whole "prompt", or at "all" tokens.
    """

    layer: int = 0
    radius: float = 0.5
    replace: Literal["last", "prompt", "all"] = "all"
    lr: float = 0.1
    steps: int = 100
    enough: float = 1e-2
    seed: int = 0


@dataclass
class Codebook:
    """keys [n, d], radii [n], values [n, d], and each key's answer and edit."""

    keys: Tensor
    radii: Tensor
    values: Tensor
    answers: list[str]
    edits: list[int]


class Reading(Edited):
    """The model with a codebook, and which keys acted in the pass just run."""

    chosen: list[list[int]] | None = None

    def running(self, batch: Batch):
        """Names the batch, whose prompts' last tokens decide."""
        return asking(batch)

    def acting(self) -> list[list[int]] | None:
        """The edit of the key that acted on each row."""
        return self.chosen


class Grace(Baseline):
    """A codebook with deferral radii."""

    name = "GRACE"
    source = "Hartvigsen et al., NeurIPS 2023"

    unit: float | None = None  # the median distance of training-split keys

    @classmethod
    def trials(cls) -> tuple[GraceConfig, ...]:
        """The published places of the value; at the last one also a higher layer at the published rate."""
        last = GraceConfig(replace="last")
        return GraceConfig(), last, replace(last, layer=2, lr=1.0), GraceConfig(replace="prompt")

    @property
    def layer(self) -> int:
        """The decoder layer whose FFN is replaced."""
        return self.host.layers[min(self.config.layer, len(self.host.layers) - 1)]

    def fit(self, records: Sequence[Record], *, seed: int = 0, cache: Path | None = None) -> None:
        """Measures the distances between the keys of training-split edits."""
        samples = [r.request for r in records][:256]
        keys = torch.cat([self._keys(b) for b in self.host.collator.batches(samples, 64)])
        self.unit = float(torch.pdist(keys).median())

    @torch.no_grad()
    def _keys(self, batch: Batch) -> Tensor:
        """[B, d] what enters the FFN at each row's last prompt token, on the base."""
        site = self.host.linear(self.host.decoder.layers[self.layer].ffn_input)
        prefix = self.host.prefix(batch, self.layer)
        with recorded({0: site}, "input") as kept:
            self.host.tail(prefix)
        return kept[0].reshape(-1, kept[0].shape[-1])[batch.case_rows()].float()

    def edit(self, samples: Sequence[Sample]) -> Codebook:
        """The codebook after all edits. Keys lie below every replaced output, so they are those of the base."""
        if self.unit is None:
            raise ValueError("GRACE does not know the keys' distances yet: call fit(records) first")
        d = self.host.width
        book = Codebook(torch.zeros(0, d), torch.zeros(0), torch.zeros(0, d), [], [])
        first = self.config.radius * self.unit
        for n, sample in enumerate(samples):
            batch = self.host.collator.batch([sample], [0])
            key, answer = self._keys(batch)[0].cpu(), sample.target.strip()
            radius = first
            if len(book.keys):
                distance, near = (float(v) for v in (book.keys - key).norm(dim=-1).min(dim=0))
                near = int(near)
                if distance <= float(book.radii[near]) + first:
                    if book.answers[near] == answer:
                        book.radii[near] = max(float(book.radii[near]), distance)
                        continue
                    if distance == 0.0:  # the same question with another answer: the later one counts
                        book = without(book, near)
                    else:
                        book.radii[near] = min(float(book.radii[near]), distance / 2)
                        radius = distance / 2
            value = self._value(batch, key)
            book = Codebook(
                torch.cat([book.keys, key[None]]),
                torch.cat([book.radii, torch.tensor([radius])]),
                torch.cat([book.values, value[None]]),
                [*book.answers, answer],
                [*book.edits, n],
            )
        return book

    def _value(self, batch: Batch, key: Tensor) -> Tensor:
        """[d] the output that gives the edit's answer."""
        c, host = self.config, self.host
        generator = torch.Generator().manual_seed(c.seed)
        value = torch.rand(len(key), generator=generator).to(host.collator.device).requires_grad_()
        prefix = host.prefix(batch, self.layer)

        def losses() -> tuple[Tensor, Tensor]:
            book = Codebook(key[None], torch.ones(1), value[None], [""], [0])
            with self.active(book) as edited, edited.running(batch):
                own = host.loss(batch, host.tail(prefix))[0]
            return own, own

        descend(losses, [value], lr=c.lr, steps=c.steps, enough=c.enough)
        return value.detach().cpu()

    @contextmanager
    def active(self, state: Codebook) -> Iterator[Reading]:
        """The layer's FFN with its codebook. Where a prompt ends decides; a KV cache goes on with what was decided."""
        sites, edited, where = self.host.decoder.layers[self.layer], Reading(), self.config.replace
        with self.host.passes() as now:
            seen: list[Tensor] = []

            def look(module: nn.Module, args: tuple) -> None:
                seen[:] = [args[0]]

            found: list[tuple[Tensor, Tensor]] = []  # of the prompts' pass: [B] hit, [B, d] values

            def put(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
                (b, s), position = now().shape, now().case_position
                if not len(state.keys):
                    return output
                token = torch.arange(s, device=output.device)
                if position is None:
                    if where != "all" or not found:
                        return output
                    (hit, chosen), here = found[-1], token >= 0
                else:
                    keys, radii, values = (t.to(output.device) for t in (state.keys, state.radii, state.values))
                    query = seen[0].reshape(b * s, -1)[torch.arange(b, device=output.device) * s + position].float()
                    distance, near = torch.cdist(query, keys, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
                    hit, chosen = distance <= radii[near], values[near]
                    found[:] = [(hit, chosen)]
                    edited.chosen = [
                        [state.edits[i]] if h else [] for i, h in zip(near.tolist(), hit.tolist(), strict=True)
                    ]
                    at = position[:, None]
                    here = {"last": token == at, "prompt": token <= at, "all": token >= 0}[where]
                flat = output.reshape(b, s, -1)
                return torch.where((hit[:, None] & here)[..., None], chosen[:, None].to(flat), flat).reshape(
                    output.shape
                )

            hooks = [
                self.host.linear(sites.ffn_input).register_forward_pre_hook(look),
                self.host.linear(sites.ffn_output).register_forward_hook(put),
            ]
            try:
                yield edited
            finally:
                for hook in hooks:
                    hook.remove()


def without(book: Codebook, index: int) -> Codebook:
    """The codebook less one key."""
    keep = [i for i in range(len(book.keys)) if i != index]
    parts = (book.keys[keep], book.radii[keep], book.values[keep])
    return Codebook(*parts, [book.answers[i] for i in keep], [book.edits[i] for i in keep])
