"""From triplets (question, right answer, the model's own wrong answer) to the states that memory and encoders need.

All states are read on the base model, no edit active, at the tap of every edited layer: h_sem at the case token of the
question, h_pos and h_neg at the last token of the question with the right and the wrong answer (spec, section 2).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from ..files import replacing
from ..models import Decoder, get_module
from .inputs import Batch, Collator, Sample, image_digest
from .prefix import recorded, run_until

ANSWER_TOKENS = 24  # a generated answer may be this long, or as long as the longest right answer


@dataclass
class LayerStates:
    """States of N triplets at one layer, each [N, d]; h_att is the self-attention's output at the case token."""

    h_sem: Tensor
    h_pos: Tensor
    h_neg: Tensor
    h_att: Tensor


@dataclass
class TripletStates:
    """What `build_memory` finds: the triplets kept (the model was wrong on them) and their states, by layer.

    kept: indices of the N triplets kept, in order; predictions: the model's answers to all M triplets.
    cases: [M, d] taps at the case tokens of *all* triplets at the first edited layer, right or wrong, for routing.
    ffn_mean: [d] by layer, the mean FFN input at the case tokens of *all* triplets.
    """

    kept: list[int]
    predictions: list[str]
    layers: dict[int, LayerStates]
    cases: Tensor
    ffn_mean: dict[int, Tensor]


def tap_rows(
    model: nn.Module, decoder: Decoder, layers: Sequence[int], batch: Batch, rows: Sequence[Tensor]
) -> list[dict[str, dict[int, Tensor]]]:
    """One forward; for each row index [B] (into the B * S tokens): {"tap" | "att" | "ffn": {layer: [B, d]}}."""
    attention = {i: get_module(model, decoder.layers[i].attention) for i in layers}
    ffn = {i: get_module(model, decoder.layers[i].ffn_input) for i in layers}
    with ExitStack() as stack:
        found = {
            "tap": stack.enter_context(recorded(attention, "input")),
            "att": stack.enter_context(recorded(attention, "output")),
            "ffn": stack.enter_context(recorded(ffn, "input")),
        }
        run_until(batch, get_module(model, decoder.layers[max(layers)].ffn_output))
    return [
        {kind: {i: x.reshape(-1, x.shape[-1])[row] for i, x in kept.items()} for kind, kept in found.items()}
        for row in rows
    ]


def last_rows(batch: Batch) -> Tensor:
    """[B] row of each sample's last target token (of its prompt, where it has no target)."""
    b, s = batch.shape
    return torch.arange(b, device=batch.last_position.device) * s + batch.last_position


def answers_match(prediction: str, target: str) -> bool:
    """Whether two answers are the same apart from case, spaces and a final full stop."""
    return _plain(prediction) == _plain(target)


def _plain(answer: str) -> str:
    return " ".join(answer.lower().split()).rstrip(".").strip()


@dataclass
class _Chunk:
    """What one batch of triplets gives: the answers, and states by name, those of h_neg for the kept rows only."""

    predictions: list[str]
    kept: list[int]
    states: dict[str, Tensor]


class Extraction:
    """Runs the base model over triplets in batches; with `cache` (a folder) it goes on where it was stopped."""

    def __init__(
        self,
        collator: Collator,
        decoder: Decoder,
        layers: Sequence[int],
        *,
        batch_size: int = 32,
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        self.collator, self.decoder, self.layers = collator, decoder, tuple(layers)
        self.batch_size, self.progress = batch_size, progress
        self.cache = Path(cache) if cache is not None else None

    def run(self, triplets: Sequence[dict[str, Any]]) -> TripletStates:
        """States of all triplets (dicts: prompt, target, image or None, prediction: optional, computed)."""
        right = [Sample(t["prompt"], t["target"], t.get("image")) for t in triplets]
        longest = max(ANSWER_TOKENS, self.collator.longest_target(right))
        base = self._base_key(longest) if self.cache is not None else ""
        chunks = []
        with tqdm(total=len(triplets), desc="memory", unit="triplet", disable=not self.progress) as bar:
            for at in range(0, len(triplets), self.batch_size):
                samples = right[at : at + self.batch_size]
                given = [str(t.get("prediction") or "").strip() for t in triplets[at : at + self.batch_size]]
                chunks.append(self._cached(base, samples, given, longest))
                bar.update(len(samples))
        return self._join(chunks)

    def _cached(self, base: str, samples: list[Sample], given: list[str], longest: int) -> _Chunk:
        if self.cache is None:
            return self._chunk(samples, given, longest)
        digest = hashlib.sha256(base.encode())
        for s, answer in zip(samples, given, strict=True):
            digest.update(repr((s.prompt, s.target, answer, image_digest(s.image))).encode())
        path = self.cache / f"triplets-{digest.hexdigest()[:24]}.safetensors"
        chunk = _read(path, self._names(), len(samples))
        if chunk is None:
            chunk = self._chunk(samples, given, longest)
            _write(path, chunk)
        return chunk

    def _base_key(self, longest: int) -> str:
        """Tells one base from another: a few numbers of every weight, their types, the processor, the edited layers."""
        told = (self.layers, longest, type(self.collator.model).__name__, self.collator.fingerprint())
        digest = hashlib.sha256(repr(told).encode())
        for name, p in self.collator.model.named_parameters():
            digest.update(repr((name, tuple(p.shape), p.dtype)).encode())
            if p.device.type != "meta" and p.numel():
                at = torch.linspace(0, p.numel() - 1, 16, dtype=torch.float64).long().to(p.device)
                digest.update(repr(p.detach().reshape(-1)[at].tolist()).encode())
        return digest.hexdigest()

    def _names(self) -> list[str]:
        kinds = ("h_sem", "h_pos", "h_neg", "h_att", "ffn")
        return [f"{kind}.{i}" for kind in kinds for i in self.layers]

    def _chunk(self, samples: list[Sample], given: list[str], longest: int) -> _Chunk:
        """Predictions where none are given, then one teacher-forced forward each for Q + A_pos and Q + A_neg."""
        unknown = [i for i, answer in enumerate(given) if not answer]
        predictions = list(given)
        answers = self.collator.generate([samples[i] for i in unknown], self.batch_size, max_new_tokens=longest)
        for i, answer in zip(unknown, answers, strict=True):
            predictions[i] = answer
        kept = [
            i
            for i, (s, answer) in enumerate(zip(samples, predictions, strict=True))
            if answer and not answers_match(answer, s.target or "")  # an empty answer has no last token
        ]
        d = self.decoder.layers[0].hidden_size
        states = {name: torch.zeros(len(samples), d, dtype=torch.float32, device="cpu") for name in self._names()}
        for batch in self.collator.batches(samples, self.batch_size, eos=False):
            case, last = self._taps(batch, [batch.case_rows(), last_rows(batch)])
            for i in self.layers:
                found = {"h_sem": case["tap"], "h_att": case["att"], "ffn": case["ffn"], "h_pos": last["tap"]}
                for kind, rows in found.items():
                    states[f"{kind}.{i}"][batch.rows] = rows[i].float().cpu()
        wrong = [Sample(samples[i].prompt, predictions[i], samples[i].image) for i in kept]
        for batch in self.collator.batches(wrong, self.batch_size, eos=False):
            (last,) = self._taps(batch, [last_rows(batch)])
            for i in self.layers:
                states[f"h_neg.{i}"][[kept[r] for r in batch.rows]] = last["tap"][i].float().cpu()
        return _Chunk(predictions, kept, states)

    def _taps(self, batch: Batch, rows: list[Tensor]) -> list[dict[str, dict[int, Tensor]]]:
        return tap_rows(self.collator.model, self.decoder, self.layers, batch, rows)

    def _join(self, chunks: list[_Chunk]) -> TripletStates:
        starts = list(_starts(len(c.predictions) for c in chunks))
        kept = [at + i for at, c in zip(starts, chunks, strict=True) for i in c.kept]
        whole = {name: torch.cat([c.states[name] for c in chunks]) for name in self._names()}

        def layer(i: int) -> LayerStates:
            return LayerStates(*(whole[f"{kind}.{i}"][kept] for kind in ("h_sem", "h_pos", "h_neg", "h_att")))

        return TripletStates(
            kept,
            [answer for c in chunks for answer in c.predictions],
            {i: layer(i) for i in self.layers},
            whole[f"h_sem.{self.layers[0]}"],
            {i: whole[f"ffn.{i}"].mean(dim=0) for i in self.layers},
        )


def _starts(sizes: Iterator[int]) -> Iterator[int]:
    at = 0
    for size in sizes:
        yield at
        at += size


def _write(path: Path, chunk: _Chunk) -> None:
    """Whole or not at all: a stop while writing leaves no file of this name."""
    with replacing(path) as half:
        save_file(chunk.states, half, {"triplets": json.dumps({"predictions": chunk.predictions, "kept": chunk.kept})})


def _read(path: Path, names: Sequence[str], rows: int) -> _Chunk | None:
    """The chunk, None where there is none or its file is damaged: then it is computed again."""
    try:
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["triplets"])
            states = {name: file.get_tensor(name) for name in names}
        chunk = _Chunk(said["predictions"], said["kept"], states)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return chunk if len(chunk.predictions) == rows and all(len(t) == rows for t in states.values()) else None
