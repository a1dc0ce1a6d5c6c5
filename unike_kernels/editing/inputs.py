"""From (picture, prompt, target) to padded model inputs, with the case token and the target positions of every row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sample:
    """One question, with its answer when teacher-forced; `image` is what the processor takes, None for text alone."""

    prompt: str
    target: str | None = None
    image: Any = None


@dataclass
class Batch:
    """Padded inputs of B samples, all with a picture or all without.

    model: what to call with `inputs`; length S; case_position [B]: the case token; target_mask [B, S]: True at the
    target tokens (end-of-sequence token included where `eos`); last_position [B]: the last target token before it.
    """

    model: nn.Module
    inputs: dict[str, Tensor]
    case_position: Tensor
    target_mask: Tensor
    last_position: Tensor
    rows: list[int]  # which of the given samples these are

    @property
    def shape(self) -> tuple[int, int]:
        """(B, S)."""
        b, s = self.inputs["input_ids"].shape
        return b, s

    def case_rows(self) -> Tensor:
        """[B] row of each case token among the B * S flattened tokens."""
        b, s = self.shape
        return torch.arange(b, device=self.case_position.device) * s + self.case_position

    def token_to_case(self) -> Tensor:
        """[B * S] int64, -1 for padding."""
        b, s = self.shape
        case = torch.arange(b, device=self.case_position.device)[:, None].expand(b, s)
        return torch.where(self.inputs["attention_mask"] != 0, case, -1).reshape(-1)

    def labels(self) -> Tensor:
        """[B, S] input ids at the target tokens, -100 elsewhere."""
        return torch.where(self.target_mask, self.inputs["input_ids"], -100)


class Collator:
    """Makes batches with a transformers processor (or a tokenizer, for a language model alone)."""

    def __init__(self, model: nn.Module, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        pad = self.tokenizer.pad_token_id
        self.pad = self.tokenizer.eos_token_id if pad is None else pad
        self.eos = self.tokenizer.eos_token_id

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(self.model.parameters()).device

    def text_model(self) -> nn.Module:
        """What answers text without a picture: a BLIP-2's language model, otherwise the model itself."""
        if hasattr(self.model, "qformer") and hasattr(self.model, "language_model"):
            return self.model.language_model
        return self.model

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """The target's tokens as they follow the prompt: after one space, never as one unknown token."""
        target = target.strip()
        if not target:
            raise ValueError(f"the target of prompt {prompt!r} is empty")
        before = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        whole = self.tokenizer(f"{prompt} {target}", add_special_tokens=False)["input_ids"]
        if whole[: len(before)] == before and len(whole) > len(before):
            return whole[len(before) :]
        return self.tokenizer(f" {target}", add_special_tokens=False)["input_ids"]

    def batches(
        self, samples: Sequence[Sample], batch_size: int, *, eos: bool = True, side: str = "right"
    ) -> Iterator[Batch]:
        """Batches of at most `batch_size`, samples with and without a picture apart, otherwise in order.

        eos: whether a target ends with the end-of-sequence token. side: where the padding goes.
        """
        for has_image in (True, False):
            rows = [i for i, s in enumerate(samples) if (s.image is not None) is has_image]
            for at in range(0, len(rows), batch_size):
                yield self.batch(samples, rows[at : at + batch_size], eos=eos, side=side)

    def batch(self, samples: Sequence[Sample], rows: list[int], *, eos: bool = True, side: str = "right") -> Batch:
        """One batch of samples[rows], which must all have a picture or all have none."""
        encoded = [self._encode(samples[i]) for i in rows]
        ids, cases, ends, starts = [], [], [], []
        for i, features in zip(rows, encoded, strict=True):
            prompt = features["input_ids"][0].tolist()
            sample = samples[i]
            target = [] if sample.target is None else self.target_ids(sample.prompt, sample.target)
            cases.append(len(prompt) - 1)
            starts.append(len(prompt))
            ends.append(len(prompt) + len(target) - 1)
            ids.append(prompt + target + ([self.eos] if target and eos else []))
        length = max(map(len, ids))
        shift = [length - len(row) if side == "left" else 0 for row in ids]
        input_ids = torch.full((len(ids), length), self.pad)
        mask = torch.zeros(len(ids), length, dtype=torch.long)
        target_mask = torch.zeros(len(ids), length, dtype=torch.bool)
        for r, row in enumerate(ids):
            input_ids[r, shift[r] : shift[r] + len(row)] = torch.tensor(row)
            mask[r, shift[r] : shift[r] + len(row)] = 1
            target_mask[r, shift[r] + starts[r] : shift[r] + len(row)] = True
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        for name in encoded[0]:
            if name not in inputs:
                inputs[name] = self._stack([e[name] for e in encoded], encoded, shift, length)
        moved = torch.tensor(shift)
        has_image = samples[rows[0]].image is not None
        device = self.device
        return Batch(
            self.model if has_image else self.text_model(),
            {name: tensor.to(device) for name, tensor in inputs.items()},
            (torch.tensor(cases) + moved).to(device),
            target_mask.to(device),
            (torch.tensor(ends) + moved).to(device),
            list(rows),
        )

    def _encode(self, sample: Sample) -> dict[str, Tensor]:
        if sample.image is None:
            return dict(self.tokenizer(sample.prompt, return_tensors="pt"))
        features = dict(self.processor(images=sample.image, text=sample.prompt, return_tensors="pt"))
        dtype = next(self.model.parameters()).dtype
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in features.items()}

    def _stack(self, parts: list[Tensor], encoded: list[dict], shift: list[int], length: int) -> Tensor:
        """Per-sample features as one batch; those with one entry per token (token types) are padded with zeros."""
        per_token = all(p.dim() == 2 and p.shape == e["input_ids"].shape for p, e in zip(parts, encoded, strict=True))
        if not per_token:
            return torch.cat(parts)
        out = parts[0].new_zeros(len(parts), length)
        for r, part in enumerate(parts):
            out[r, shift[r] : shift[r] + part.shape[1]] = part[0]
        return out

    @torch.no_grad()
    def generate(
        self, samples: Sequence[Sample], batch_size: int = 32, max_new_tokens: int = 24, **kw: Any
    ) -> list[str]:
        """Greedy answers to the prompts, stripped, in order; `kw` goes to the model's generate."""
        out = [""] * len(samples)
        asked = [Sample(s.prompt, None, s.image) for s in samples]
        for batch in self.batches(asked, batch_size, side="left"):
            new = self.generate_ids(batch, max_new_tokens, **kw)
            for row, text in zip(batch.rows, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                out[row] = text.strip()
        return out

    @torch.no_grad()
    def generate_ids(self, batch: Batch, max_new_tokens: int = 24, **kw: Any) -> Tensor:
        """[B, new] greedily generated token ids of a left-padded batch, without the prompt."""
        options = {"do_sample": False, "max_new_tokens": max_new_tokens, "pad_token_id": self.pad} | kw
        ids = batch.model.generate(**batch.inputs, **options)  # type: ignore[operator]  # a generating model's method
        prompt = batch.inputs["input_ids"]
        width = prompt.shape[1]
        echoed = ids.shape[1] >= width and torch.equal(ids[:, :width].to(prompt), prompt)
        return ids[:, width:] if echoed else ids
