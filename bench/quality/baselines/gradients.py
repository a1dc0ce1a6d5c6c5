"""What MEND and KE share: an edit's gradient at the edited maps, training edits to learn its change on, and the method
around a network that makes the change.

Only the edited layers depend on what is learned, so everything below them runs once and stays in memory.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unike_kernels.editing.editor import base_only
from unike_kernels.editing.inputs import Batch, Sample
from unike_kernels.editing.prefix import Prefix
from unike_kernels.evaluation.records import Record

from . import base, training
from .base import Change, ChangesMaps, Host, changed

LAYERS = 3  # edited, counted from the last: the published choice of MEND, and KE's beside it
Factors = dict[
    str, tuple[Tensor, Tensor]
]  # of a map: its inputs [E, S, in] and the gradients at its outputs [E, S, out]


@dataclass
class Told:
    """What a network is told of E edits: their gradients, themselves, and the model's own answer at their targets."""

    factors: Factors
    batch: Batch
    samples: Sequence[Sample]
    predicted: list[Tensor]  # E times [T] token ids


def tell(
    host: Host, batch: Batch, samples: Sequence[Sample], prefix: Prefix, names: Sequence[str], before: Change
) -> Told:
    """The gradient of every row's loss at the named maps, as factors: dL/dW = sum over tokens of gradient x input.

    before: what the model already carries, the same for all rows.
    """
    seen: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}
    hooks = []
    for name in names:

        def look(module: nn.Module, args: tuple, output: Tensor, name: str = name) -> Tensor:
            seen[name] = args[0].detach()
            probes[name] = torch.zeros_like(output, requires_grad=True)
            return output + probes[name]

        hooks.append(host.linear(name).register_forward_hook(look))
    try:
        with torch.enable_grad(), changed(host, before):
            hidden = host.tail(prefix)
            found = torch.autograd.grad(host.loss(batch, hidden).sum(), [probes[name] for name in names])
    finally:
        for hook in hooks:
            hook.remove()
    b, s = batch.shape
    with torch.no_grad():
        logits, _, row = host.target_logits(batch, hidden)
    best = logits.argmax(dim=-1)
    return Told(
        {name: (seen[name].reshape(b, s, -1), g.reshape(b, s, -1)) for name, g in zip(names, found, strict=True)},
        batch,
        samples,
        [best[row == e] for e in range(b)],
    )


@dataclass
class Part:
    """Probes of one episode batch that all have a picture or all have none, the E edits' shares in order.

    keep: True for the target tokens of locality probes; base: [T, d] the base's decoder output that predicts each
    target token.
    """

    batch: Batch
    prefix: Prefix
    keep: Tensor
    base: Tensor


@dataclass
class Episodes:
    """E training edits, the inputs of their gradients, and the probes that judge the change made of them."""

    edit: Batch
    prefix: Prefix
    samples: list[Sample]
    parts: list[Part]


@torch.no_grad()
def episodes(host: Host, records: Sequence[Record], first: int, generator: torch.Generator) -> Episodes:
    """A batch of training edits: of each a rephrasing, another picture, two m_loc and one t_loc probes.

    ValueError unless all records have pictures (or none has) in the same places.
    """
    rows: list[list[tuple[Sample, bool]]] = []
    for record in records:
        chosen: list[tuple[Sample, bool]] = []
        for kind, count in (("t_gen", 1), ("m_gen", 1), ("m_loc", 2), ("t_loc", 1)):
            found = record.of(kind) or (record.of("rel") if not kind.endswith("loc") else [])
            order = torch.randperm(len(found), generator=generator).tolist()
            chosen += [(found[order[i % len(order)]].sample, kind.endswith("loc")) for i in range(count) if order]
        rows.append(chosen)
    if len({tuple(s.image is None for s, _ in row) for row in rows}) != 1:
        raise ValueError("training edits of one batch need pictures in the same places")
    samples = [r.request for r in records]
    edit = host.collator.batch(samples, list(range(len(samples))))
    parts = []
    for has_image in (True, False):
        asked = [(s, local) for row in rows for s, local in row if (s.image is not None) is has_image]
        if not asked:
            continue
        batch = host.collator.batch([s for s, _ in asked], list(range(len(asked))))
        prefix = host.prefix(batch, first)
        at = batch.target_mask[:, 1:]
        local = torch.tensor([local for _, local in asked], device=at.device)
        keep = local[at.nonzero()[:, 0]]
        base = host.tail(prefix)[:, :-1][at]
        parts.append(Part(batch, prefix, keep, base))
    return Episodes(edit, host.prefix(edit, first), samples, parts)


class Pool:
    """All training edits as batches of episodes, in the order of the records, their lower layers run once."""

    def __init__(self, host: Host, records: Sequence[Record], first: int, size: int, seed: int, progress: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        starts = tqdm(range(0, len(records) - size + 1, size), desc="states", mininterval=5, disable=not progress)
        self.batches = [episodes(host, records[i : i + size], first, generator) for i in starts]
        if not self.batches:
            raise ValueError(f"{len(records)} training records do not fill one batch of {size}")

    def draw(self, generator: torch.Generator) -> Episodes:
        """One of the batches."""
        return self.batches[int(torch.randint(len(self.batches), (1,), generator=generator))]


def judged(host: Host, found: Episodes, change: Change) -> tuple[Tensor, Tensor, Tensor]:
    """(mean NLL of the targets on rephrasings and other pictures, mean KL to the base on locality probes, accuracy)."""
    nll, kl, right = [], [], []
    for part in found.parts:
        with changed(host, change):
            hidden = host.tail(part.prefix)
        logits, wanted, _ = host.target_logits(part.batch, hidden)
        edited, kept = logits[~part.keep], logits[part.keep]
        nll.append(nn.functional.cross_entropy(edited, wanted[~part.keep], reduction="none"))
        right.append((edited.argmax(dim=-1) == wanted[~part.keep]).float())
        with torch.no_grad():
            before = host.head(part.base[part.keep]).float().log_softmax(dim=-1)
        after = kept.log_softmax(dim=-1)
        kl.append((before.exp() * (before - after)).sum(dim=-1))
    return torch.cat(nll).mean(), torch.cat(kl).mean(), torch.cat(right).mean()


class GradientEditor(ChangesMaps):
    """A method whose network, trained on the training split, turns what it is told of an edit into a change."""

    trained = True
    together = 32  # gradients of so many are taken in one pass
    # base model 1's MEND, development edits: a mean of 80.5 with 800 edits (--training 200), 85.0 with 3200; no more
    # with twice as many
    share = 4
    network: nn.Module | None = None
    history: Sequence[dict[str, float]] = ()  # what the training showed, every 50 steps

    @abstractmethod
    def make(self) -> nn.Module:
        """A fresh network: Told -> Change; `measure(list of Told)` takes the statistics that it wants."""

    @abstractmethod
    def objective(self, network: nn.Module, nll: Tensor, kl: Tensor, accuracy: Tensor) -> Tensor:
        """The loss of one batch of training edits."""

    @property
    def first(self) -> int:
        """The lowest edited layer."""
        return max(0, len(self.host.decoder.layers) - LAYERS)

    @property
    def names(self) -> list[str]:
        """The edited maps."""
        return self.host.ffn_maps(range(self.first, len(self.host.decoder.layers)))

    def fit(
        self, records: Sequence[Record], *, seed: int = 0, cache: Path | None = None, progress: bool = True
    ) -> None:
        """Trains the network on training-split edits."""
        c, host = self.config, self.host
        code = (base, training, sys.modules[GradientEditor.__module__], sys.modules[type(self).__module__])
        told = {"method": self.name, "seed": seed, **asdict(c)}
        file = None
        if cache is not None:
            file = cache / f"{self.name.lower()}-{training.key(host.model, records, told, code)}.safetensors"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.make().to(host.collator.device)
        with base_only(host.model):
            pool = None
            if file is None or not file.exists():
                pool = Pool(host, records, self.first, c.batch, seed, progress)
                some = pool.batches[:: max(1, len(pool.batches) // 16)]
                network.measure([tell(host, e.edit, e.samples, e.prefix, self.names, {}) for e in some])

            def step(n: int, generator: torch.Generator) -> dict[str, Tensor]:
                found = pool.draw(generator)
                change = network(tell(host, found.edit, found.samples, found.prefix, self.names, {}))
                nll, kl, accuracy = judged(host, found, change)
                return {"loss": self.objective(network, nll, kl, accuracy), "nll": nll, "kl": kl, "acc": accuracy}

            self.history = training.train(
                network, step, c.steps, lr=c.lr, seed=seed, name=self.name, file=file, progress=progress
            )
        self.network = network.eval().requires_grad_(False)

    def change(self, samples: Sequence[Sample], before: Change) -> Change:
        """The changes [E, out, in] of E edits, each made on its own of the model that carries `before`."""
        if self.network is None:
            raise ValueError(f"{self.name} is not trained yet: call fit(records) first")
        batch = self.host.collator.batch(samples, list(range(len(samples))))
        told = tell(self.host, batch, samples, self.host.prefix(batch, self.first), self.names, before)
        with torch.no_grad():
            return self.network(told)
