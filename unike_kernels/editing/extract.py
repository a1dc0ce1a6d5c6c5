"""From triplets (question, right answer, the model's own wrong answer) to the states that memory and encoders need.

All states are read on the base model, no edit active, at the tap of every edited layer: h_sem at the case token of the
question, h_pos and h_neg at the last token of the question with the right and the wrong answer (spec, section 2).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..models import Decoder, get_module
from .inputs import Batch, Collator, Sample
from .prefix import recorded


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

    cases: [M, d] taps at the case tokens of *all* triplets at the first edited layer, right or wrong, for routing.
    ffn_mean: [d] by layer, the mean FFN input at the case tokens.
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
    with (
        torch.no_grad(),
        recorded(attention, "input") as tap,
        recorded(attention, "output") as att,
        recorded(ffn, "input") as ffn_in,
    ):
        batch.model(**batch.inputs, use_cache=False)
    return [
        {
            kind: {i: kept[i].reshape(-1, kept[i].shape[-1])[row] for i in layers}
            for kind, kept in (("tap", tap), ("att", att), ("ffn", ffn_in))
        }
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
        parts = []
        bar = tqdm(total=len(triplets), desc="memory", unit="triplet", disable=not self.progress)
        for at in range(0, len(triplets), self.batch_size):
            chunk = list(triplets[at : at + self.batch_size])
            parts.append(self._cached(at, chunk))
            bar.update(len(chunk))
        bar.close()
        return self._join(parts)

    def _cached(self, at: int, chunk: list[dict[str, Any]]) -> dict[str, Any]:
        if self.cache is None:
            return self._chunk(at, chunk)
        path = self.cache / f"triplets-{at}-{self._key(chunk)}.pt"
        if path.exists():
            return torch.load(path, weights_only=True)
        part = self._chunk(at, chunk)
        self.cache.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(".tmp")
        torch.save(part, half)
        half.replace(path)  # a stop leaves whole chunks only
        return part

    def _key(self, chunk: list[dict[str, Any]]) -> str:
        digest = hashlib.sha256(repr(self.layers).encode())
        weight = next(self.collator.model.parameters()).detach().reshape(-1)[:64].float().cpu()
        digest.update(weight.numpy().tobytes())
        for t in chunk:
            digest.update(repr((t["prompt"], t["target"], t.get("prediction"), image_digest(t.get("image")))).encode())
        return digest.hexdigest()[:16]

    def _chunk(self, at: int, chunk: list[dict[str, Any]]) -> dict[str, Any]:
        """Predictions where none are given, then one teacher-forced forward each for Q + A_pos and Q + A_neg."""
        unknown = [i for i, t in enumerate(chunk) if not t.get("prediction")]
        predictions = [str(t.get("prediction") or "") for t in chunk]
        asked = [Sample(chunk[i]["prompt"], None, chunk[i].get("image")) for i in unknown]
        for i, answer in zip(unknown, self.collator.generate(asked, self.batch_size), strict=True):
            predictions[i] = answer
        right = [Sample(t["prompt"], t["target"], t.get("image")) for t in chunk]
        wrong = [Sample(t["prompt"], p or None, t.get("image")) for t, p in zip(chunk, predictions, strict=True)]
        out: dict[str, Any] = {"predictions": predictions, "at": at}
        out["kept"] = [
            at + i
            for i, (t, p) in enumerate(zip(chunk, predictions, strict=True))
            if p and not answers_match(p, t["target"])
        ]
        for name, samples in (("pos", right), ("neg", wrong)):
            for key, states in self._states(samples).items():
                out[f"{name}.{key}"] = states
        return out

    def _states(self, samples: list[Sample]) -> dict[str, Tensor]:
        """{"case.tap.layer", "case.att.layer", "case.ffn.layer", "last.tap.layer": [len(samples), d]}, on the CPU."""
        out: dict[str, Tensor] = {}
        for batch in self.collator.batches(samples, self.batch_size, eos=False):
            case, last = tap_rows(
                self.collator.model, self.decoder, self.layers, batch, [batch.case_rows(), last_rows(batch)]
            )
            for i in self.layers:
                found = {
                    "case.tap": case["tap"],
                    "case.att": case["att"],
                    "case.ffn": case["ffn"],
                    "last.tap": last["tap"],
                }
                for key, states in found.items():
                    rows = states[i].float().cpu()
                    whole = out.setdefault(f"{key}.{i}", rows.new_zeros(len(samples), rows.shape[1]))
                    whole[batch.rows] = rows
        return out

    def _join(self, parts: list[dict[str, Any]]) -> TripletStates:
        kept = [i for p in parts for i in p["kept"]]
        predictions = [a for p in parts for a in p["predictions"]]
        index = torch.tensor(kept, dtype=torch.long)

        def all_of(key: str) -> Tensor:
            return torch.cat([p[key] for p in parts]) if parts else torch.zeros(0, self.decoder.layers[0].hidden_size)

        layers = {
            i: LayerStates(
                h_sem=all_of(f"pos.case.tap.{i}")[index],
                h_pos=all_of(f"pos.last.tap.{i}")[index],
                h_neg=all_of(f"neg.last.tap.{i}")[index],
                h_att=all_of(f"pos.case.att.{i}")[index],
            )
            for i in self.layers
        }
        means = {i: all_of(f"pos.case.ffn.{i}").mean(dim=0) for i in self.layers}
        return TripletStates(kept, predictions, layers, all_of(f"pos.case.tap.{self.layers[0]}"), means)


def image_digest(image: Any) -> str | None:
    """A short digest of a picture's pixels (a path's own text), None for no picture: to tell requests apart."""
    if image is None:
        return None
    if isinstance(image, str | Path):
        return hashlib.sha256(str(image).encode()).hexdigest()[:16]
    data = image.tobytes() if hasattr(image, "tobytes") else image.numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def concat(states: Sequence[LayerStates]) -> LayerStates:
    """Rows of several LayerStates, one after another."""
    return LayerStates(*(torch.cat([getattr(s, f.name) for s in states]) for f in fields(LayerStates)))
