"""From (picture, prompt, target) to padded model inputs, with the case token and the target positions of every row."""

import hashlib
import inspect
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

TILED = ("image_sizes", "pixel_attention_mask")  # features of processors that cut pictures: LLaVA-NeXT's, Idefics'
# A model may ship a generation config with beams or penalties: its answers were then not the likeliest token each.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "return_dict_in_generate": False,
}


@dataclass(frozen=True)
class Sample:
    """One question, with its answer when teacher-forced.

    image: what the processor takes, or a picture's file (opened whenever it is needed); None for text alone.
    """

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

    def narrowed(self, keep: Tensor) -> "Batch":
        """The samples `keep` [b] alone, as long as before; of their inputs only the text, so that no model takes it."""
        text = {name: self.inputs[name][keep] for name in ("input_ids", "attention_mask")}
        targets = (self.case_position[keep], self.target_mask[keep], self.last_position[keep])
        return Batch(self.model, text, *targets, [self.rows[i] for i in keep.tolist()])

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
        self.eos = self.tokenizer.eos_token_id
        self.pad = next(i for i in (self.tokenizer.pad_token_id, self.eos, 0) if i is not None)
        self._decoded: set[Path] = set()  # pictures' files that `check` need not decode again

    @property
    def device(self) -> torch.device:
        """Where the model's inputs go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the model takes pictures in: its first float parameter's dtype (integers hold quantised weights)."""
        return next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.get_default_dtype())

    def text_model(self) -> nn.Module:
        """What answers text without a picture: a BLIP-2's language model, otherwise the model itself."""
        if hasattr(self.model, "qformer") and hasattr(self.model, "language_model"):
            return self.model.language_model
        return self.model

    def target_ids(self, prompt: str, target: str) -> list[int]:
        """The target's tokens as they follow the prompt, after one space unless the prompt ends in white space.

        ValueError where the target is empty or the tokenizer has no token for a part of it (or for nothing of it).
        """
        target = target.strip()
        if not target:
            raise ValueError(f"the target of prompt {prompt!r} is empty")
        text = target if prompt[-1:].isspace() else f" {target}"
        ids = self._ids(text)
        # After the prompt, so that a tokenizer adds no start of text of its own; after a new line where the prompt's
        # last token would swallow the target's first letters ("Answer: " and "cat" give one token " cat").
        for before in (prompt, "\n"):
            start, whole = self._ids(before), self._ids(before + text)
            if whole[: len(start)] == start and len(whole) > len(start):
                ids = whole[len(start) :]
                break
        if not ids or self.tokenizer.unk_token_id in ids:
            raise ValueError(f"the tokenizer has no token for {'a part of ' if ids else ''}the target {target!r}")
        return ids

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def longest_target(self, samples: Sequence[Sample]) -> int:
        """Tokens of the longest target, without end of sequence; 0 without any."""
        return max((len(self.target_ids(s.prompt, s.target)) for s in samples if s.target is not None), default=0)

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
        """One batch of samples[rows]; ValueError unless all have a picture or none has."""
        if len({samples[i].image is None for i in rows}) != 1:
            raise ValueError("one batch takes samples that all have a picture, or samples that all have none")
        model = self.text_model() if samples[rows[0]].image is None else self.model
        encoded = [self._encode(samples[i], model) for i in rows]
        prompts = [features["input_ids"][0].tolist() for features in encoded]
        targets = [self._target(samples[i]) for i in rows]
        ends = [[self.eos] if target and eos and self.eos is not None else [] for target in targets]
        ids = [prompt + target + end for prompt, target, end in zip(prompts, targets, ends, strict=True)]
        length = max(map(len, ids))
        shift = [length - len(row) if side == "left" else 0 for row in ids]
        input_ids = torch.full((len(ids), length), self.pad)
        mask = torch.zeros(len(ids), length, dtype=torch.long)
        target_mask = torch.zeros(len(ids), length, dtype=torch.bool)
        for r, row in enumerate(ids):
            here = slice(shift[r], shift[r] + len(row))
            input_ids[r, here] = torch.tensor(row)
            mask[r, here] = 1
            target_mask[r, shift[r] + len(prompts[r]) : here.stop] = True
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        for name in encoded[0]:
            if name not in inputs:
                # what the tiles of a picture are, these features say: the model takes no other ones
                tiled = encoded[0][name].dim() >= 4 and not encoded[0].keys().isdisjoint(TILED)
                inputs[name] = _stack(name, [e[name] for e in encoded], prompts, shift, length, tiled=tiled)
        if "token_type_ids" in inputs and _config(model, "model_type") == "paligemma":
            # Its type 0 is a prefix, in which every token sees every other: the answer would be read, not said.
            inputs["token_type_ids"][target_mask] = 1
        case = torch.tensor(shift) + torch.tensor([len(prompt) - 1 for prompt in prompts])
        last = case + torch.tensor([len(target) for target in targets])
        device = self.device
        return Batch(
            model,
            {name: tensor.to(device) for name, tensor in inputs.items()},
            case.to(device),
            target_mask.to(device),
            last.to(device),
            list(rows),
        )

    def fingerprint(self) -> str:
        """A digest of all that the processor does to pictures and text: what states taken with it depend on."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        words = json.loads(fast.to_str()) if fast is not None else dict(self.tokenizer.get_vocab())
        if fast is not None:
            words |= {"truncation": None, "padding": None}  # the last call's
        pictures: Any = getattr(self.processor, "image_processor", None)
        plain = {k: v for k, v in vars(self.processor).items() if v is None or isinstance(v, str | int | float)}
        told = [
            type(self.processor).__name__,
            plain,
            words,
            getattr(self.tokenizer, "special_tokens_map", None),
            pictures.to_dict() if hasattr(pictures, "to_dict") else repr(type(pictures)),
        ]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def check(self, sample: Sample) -> None:
        """ValueError or OSError where a sample's picture cannot be read, or its prompt has no place for it, or more."""
        self._check_places(sample)
        for picture in sample.image if isinstance(sample.image, list | tuple) else [sample.image]:
            file = _file(picture)
            if file is not None and file not in self._decoded:
                self._opened(file)
                self._decoded.add(file)
            elif hasattr(picture, "getbands"):  # PIL's, which may have been opened, but not yet read
                try:
                    picture.load()
                except Exception as error:  # as of a file's: PIL's readers raise almost anything
                    raise OSError(f"the picture cannot be read: {error}") from None

    def _check_places(self, sample: Sample) -> None:
        """ValueError where more of the prompt's tokens stand for pictures than there are; a BLIP-2 prompt has none.

        Told where it is sure: pictures may come in arrays and nested lists, and prompts with all their tokens.
        """
        several = isinstance(sample.image, list | tuple)
        pictures = list(sample.image) if several else [sample.image]
        token = str(getattr(self.processor, "image_token", None) or "")
        found = sample.prompt.count(token) if token else 0
        if found and sample.image is None:
            raise ValueError(f"the prompt holds {token!r}, but there is no picture: {sample.prompt!r}")
        if found and self._places_pictures:
            kind = type(self.processor).__name__
            raise ValueError(f"the prompt holds {token!r}, which the {kind} puts in itself: {sample.prompt!r}")
        counted = all(isinstance(p, str | Path) or hasattr(p, "getbands") for p in pictures)
        if found > len(pictures) and counted and getattr(self.processor, "image_token_id", None) is not None:
            few = "one picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
            raise ValueError(f"the prompt holds {token!r} {found} times, but there is {few}: {sample.prompt!r}")

    def uniform(self, sample: Sample) -> bool:
        """Whether a sample's picture, a file or in PIL's form, takes as many tokens as that of any other such sample.

        Not so where the prompt lacks its token: then only the processor can say what becomes of the picture.
        """
        token = str(getattr(self.processor, "image_token", None) or "")
        placed = self._places_pictures or not token or token in sample.prompt
        return placed and (_file(sample.image) is not None or hasattr(sample.image, "getbands"))

    def prompt_length(self, sample: Sample) -> int:
        """Tokens of the prompt, those of its picture included."""
        return int(self._encode(sample, self.text_model() if sample.image is None else self.model)["input_ids"].numel())

    def text_length(self, prompt: str) -> int:
        """Tokens of the prompt's text, start token included."""
        return len(self.tokenizer(prompt, **self._special(prompt))["input_ids"])

    def _special(self, prompt: str) -> dict[str, bool]:
        """No start token for a prompt that brings its own, as that of many chat templates does: it would get two."""
        start = getattr(self.tokenizer, "bos_token", None)
        return {"add_special_tokens": False} if start and prompt.startswith(str(start)) else {}

    @property
    def _places_pictures(self) -> bool:
        """Whether the processor puts the picture's tokens into the prompt, as that of a BLIP-2 does."""
        return getattr(self.processor, "num_query_tokens", None) is not None

    def _opened(self, image: Any) -> Any:
        """A picture's file as the picture that the processor would be given; anything else as it is.

        Its colours are left to a processor that converts them: some put transparent parts on white, some on black.
        OSError, naming the file, where it cannot be read.
        """
        file = _file(image)
        if file is None:
            return image
        from PIL import Image

        pictures = getattr(self.processor, "image_processor", None)
        try:
            with Image.open(file) as picture:
                return picture.copy() if getattr(pictures, "do_convert_rgb", False) else picture.convert("RGB")
        except Exception as error:  # PIL's readers raise almost anything for a damaged file, or one too large for them
            raise OSError(f"{file} cannot be read as a picture: {error}") from None

    def _target(self, sample: Sample) -> list[int]:
        return [] if sample.target is None else self.target_ids(sample.prompt, sample.target)

    def _encode(self, sample: Sample, model: nn.Module) -> dict[str, Tensor]:
        """The features [1, ...] of one prompt, image tokens included."""
        self._check_places(sample)
        if sample.image is None:
            features = dict(self.tokenizer(sample.prompt, return_tensors="pt", **self._special(sample.prompt)))
        else:
            features = self._with_picture(sample)
        if features["input_ids"].numel() == 0:
            raise ValueError(f"prompt {sample.prompt!r} has no token, so it has no case token")
        if not _takes(model, "token_type_ids"):  # most tokenizers give them, few decoders know them
            features.pop("token_type_ids", None)
        return {k: v.to(self.dtype) if v.is_floating_point() else v for k, v in features.items()}

    def _with_picture(self, sample: Sample) -> dict[str, Tensor]:
        """What the processor makes of a picture and its prompt; ValueError or OSError for whatever it does not take."""
        picture, kind = self._opened(sample.image), type(self.processor).__name__
        try:
            options = {"return_tensors": "pt", **self._special(sample.prompt)}
            features = dict(self.processor(images=picture, text=sample.prompt, **options))
        except Exception as error:  # of the processor, of PIL, of whatever fetches an address
            if isinstance(picture, str | Path):  # an address, an encoded picture, or a file that is not there
                text = str(picture) if len(str(picture)) <= 100 else f"{str(picture)[:97]}..."
                cause = f": {error}".replace(str(picture), text) if "://" in text or text.endswith("...") else ""
                raise OSError(f"there is no picture {text!r}{cause}") from None
            raise ValueError(f"the {kind} does not take the picture with prompt {sample.prompt!r}: {error}") from error
        number = getattr(self.processor, "image_token_id", None)
        token = None if self._places_pictures or number is None else getattr(self.processor, "image_token", None)
        if token and not bool((features["input_ids"] == number).any()):
            raise ValueError(f"the prompt has a picture, but not its token {str(token)!r}: {sample.prompt!r}")
        return features

    @torch.no_grad()
    def generate(
        self, samples: Sequence[Sample], batch_size: int = 32, max_new_tokens: int = 24, **kw: Any
    ) -> list[str]:
        """Greedy answers to the prompts, stripped, in order; `kw` goes to the model's generate."""
        out = [""] * len(samples)
        asked = [Sample(s.prompt, None, s.image) for s in samples]
        for batch in self.batches(asked, batch_size, side="left"):
            new = self.generate_ids(batch, max_new_tokens, **kw)
            for row, answer in zip(batch.rows, self.answers(new), strict=True):
                out[row] = answer
        return out

    def answers(self, new: Any) -> list[str]:
        """Generated token ids, row by row, as answers, stripped.

        A model with an `end_sym` (MiniGPT4) ends its answers there, not only at EOS.
        """
        end = getattr(self.model, "end_sym", "")
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [(text.partition(end)[0] if end else text).strip() for text in texts]

    @torch.no_grad()
    def generate_ids(self, batch: Batch, max_new_tokens: int = 24, **kw: Any) -> Tensor:
        """[B, new] greedily generated token ids of a left-padded batch, without the prompt.

        Whatever the model's generation config asks for beside that (beams, penalties) is left aside; `kw` is not.
        """
        options = GREEDY | {"max_new_tokens": max_new_tokens, "pad_token_id": self.pad} | kw
        ids = batch.model.generate(**batch.inputs, **options)
        prompt = batch.inputs["input_ids"]
        width = prompt.shape[1]
        # Models that generate from embeddings give the new tokens alone, the others the prompt before them.
        echoed = ids.shape[1] >= width and torch.equal(ids[:, :width].to(prompt), prompt)
        return ids[:, width:] if echoed else ids


def _file(image: Any) -> Path | None:
    """The picture's file, where `image` names one (an encoded picture is a text, too, and too long for a name)."""
    if not isinstance(image, str | Path):
        return None
    try:
        return Path(image) if Path(image).is_file() else None
    except OSError:
        return None


def image_digest(image: Any) -> str | None:
    """A short digest of a picture, None for none: of its pixels, of a file's bytes, of any other text itself.

    So a file and what it opens as are two pictures: their bytes are read here for every sample, their pixels are not.
    """
    if image is None:
        return None
    if isinstance(image, str | Path):
        file = _file(image)
        return hashlib.sha256(str(image).encode() if file is None else file.read_bytes()).hexdigest()[:16]
    if getattr(image, "mode", None) in ("P", "PA"):  # its bytes say which colours, its palette what they are
        image = image.convert("RGBA")
    if isinstance(image, list | tuple):
        return hashlib.sha256(repr([image_digest(part) for part in image]).encode()).hexdigest()[:16]
    if isinstance(image, Tensor):
        image = image.detach().cpu().float().numpy()
    form = (getattr(image, "mode", None), getattr(image, "size", None), getattr(image, "shape", None))
    return hashlib.sha256(repr(form).encode() + image.tobytes()).hexdigest()[:16]


def _takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has an argument of this name (an adapter's wrapper passes everything on)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(base.forward).parameters


def _config(model: nn.Module, name: str) -> Any:
    """An entry of the model's config; None without it."""
    return getattr(getattr(model, "config", None), name, None)


def _tiled(parts: list[Tensor]) -> list[Tensor]:
    """Pictures [1, tiles, ...] with tiles of zeros up to the most there are, as LLaVA-NeXT's processor pads them."""
    most = max(p.shape[1] for p in parts)
    return [torch.cat([p, p.new_zeros(1, most - p.shape[1], *p.shape[2:])], dim=1) for p in parts]


def _stack(
    name: str, parts: list[Tensor], prompts: list[list[int]], shift: list[int], length: int, *, tiled: bool = False
) -> Tensor:
    """Features [1, ...] of several samples as one batch; those with one entry per token are padded with zeros.

    tiled: whether this is a picture cut into tiles, more or fewer by its shape.
    """
    if not all(p.shape == (1, len(prompt)) for p, prompt in zip(parts, prompts, strict=True)):
        try:
            return torch.cat(_tiled(parts) if tiled else parts)
        except RuntimeError:
            shapes = sorted({tuple(p.shape) for p in parts})
            raise ValueError(f"the pictures of one batch give {name} of different shapes: {shapes}") from None
    out = parts[0].new_zeros(len(parts), length)
    for r, part in enumerate(parts):
        out[r, shift[r] : shift[r] + part.shape[1]] = part[0]
    return out
