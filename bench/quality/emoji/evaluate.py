"""What the tiny model knows, and how its states lie: accuracies, controls, and the geometry that routing needs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import data, records, vision
from . import model as tiny

Case = tuple[str | None, str, str]  # (image path below `data.DRAWINGS` or none, prompt, target)
TAP_LAYER = 2  # the first of the last four decoder layers


def read_pixels(images: Sequence[str], processor: Any) -> Tensor:
    """The processor's pixels [B, 3, IMAGE_SIZE, IMAGE_SIZE] of drawings."""
    pictures = []
    for image in images:
        with Image.open(data.DRAWINGS / image) as picture:
            pictures.append(picture.convert("RGB"))
    return processor.image_processor(pictures, return_tensors="pt")["pixel_values"]


def _inputs(processor: Any, texts: list[str], with_image: bool, side: str) -> dict[str, Tensor]:
    tokens = tiny.QUERY_TOKENS * "<image>" if with_image else ""
    batch = processor.tokenizer([tokens + t for t in texts], return_tensors="pt", padding=True, padding_side=side)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


@torch.no_grad()
def exact(model: Any, processor: Any, cases: Sequence[Case], pixels: Tensor | None = None, batch: int = 128) -> Tensor:
    """[N] bool: is every target token and the ending </s> the model's first choice (as greedy decoding gives)?

    All cases have a picture or none has; `pixels` [N, 3, H, W] replaces the pictures.
    """
    right = []
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        shown = pixels[start : start + batch] if pixels is not None else None
        if shown is None and part[0][0] is not None:
            shown = read_pixels([image for image, _, _ in part if image is not None], processor)
        texts = [f"{prompt} {target}</s>" for _, prompt, target in part]
        inputs = _inputs(processor, texts, shown is not None, "right")
        output = model.language_model(**inputs) if shown is None else model(pixel_values=shown, **inputs)
        guess = output.logits.argmax(-1)
        for i, (_, _, target) in enumerate(part):
            end = int(inputs["attention_mask"][i].sum())
            count = len(processor.tokenizer(f" {target}").input_ids) + 1
            right.append(torch.equal(guess[i, end - count - 1 : end - 1], inputs["input_ids"][i, end - count : end]))
    return torch.tensor(right)


@torch.no_grad()
def taps(model: Any, processor: Any, cases: Sequence[tuple[str | None, str]], layer: int = TAP_LAYER) -> Tensor:
    """What enters self_attn of one decoder layer at each prompt's last token [N, HIDDEN]."""
    found: list[Tensor] = []
    attention = model.language_model.model.decoder.layers[layer].self_attn

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        found.append(hidden[:, -1])

    hook = attention.register_forward_pre_hook(keep, with_kwargs=True)
    rows = torch.empty(len(cases), tiny.HIDDEN)
    try:
        for with_image in (True, False):
            chosen = [i for i, (image, _) in enumerate(cases) if (image is not None) == with_image]
            for start in range(0, len(chosen), 256):
                part = chosen[start : start + 256]
                inputs = _inputs(processor, [cases[i][1] for i in part], with_image, "left")
                if with_image:
                    model(pixel_values=read_pixels([str(cases[i][0]) for i in part], processor), **inputs)
                else:
                    model.language_model(**inputs)
                rows[part] = found.pop()
    finally:
        hook.remove()
    return rows


def naming(split: str) -> list[Case]:
    """The naming question in every phrasing on every drawing of a split."""
    drawn = data.drawings(data.splits()[split])
    return [(c.image(a), prompt, c.name) for c, a in drawn for prompt in data.name_prompts()]


def _percent(right: Tensor) -> float:
    return round(100 * right.float().mean().item(), 2)


def accuracies(model: Any, processor: Any) -> dict[str, float]:
    """Exact-match percentages, and the controls with unseen augmentations, blank and shuffled pictures.

    Known names and facts are asked in every phrasing, the rest in one drawn phrasing for each drawing.
    """
    rng, generator = random.Random(0), torch.Generator().manual_seed(99)
    known = naming("known")
    right = exact(model, processor, known)
    result = {"naming, known": _percent(right)}
    for artist in data.ARTISTS:
        chosen = torch.tensor([str(image).startswith(artist) for image, _, _ in known])
        result[f"naming, known, {artist}"] = _percent(right[chosen])
    for prompt in data.name_prompts():
        chosen = torch.tensor([asked == prompt for _, asked, _ in known])
        result[f"naming, known, '{prompt}'"] = _percent(right[chosen])
    for split in ("triplets", "development", "reported"):
        cases = naming(split)[:: len(data.NAME) + 1]  # steps through drawings and phrasings alike
        result[f"naming, {split} (never taught)"] = _percent(exact(model, processor, cases))
    drawn = data.drawings(data.splits()["known"])
    cases = [(c.image(a), rng.choice(data.name_prompts()), c.name) for c, a in drawn]
    index = {pair: i for i, pair in enumerate(data.drawings())}
    pictures = vision.read_drawings()[[index[pair] for pair in drawn]]
    pixels = vision.normalise(pictures)
    shown = {
        "unseen augmentations": torch.cat([vision.augment(part, generator) for part in pictures.split(256)]),
        "blank picture": torch.ones_like(pixels),
        "shuffled pictures": pixels[torch.randperm(len(pixels), generator=generator)],
    }
    for label, replaced in shown.items():
        result[f"naming, known, {label}"] = _percent(exact(model, processor, cases, replaced))
    result["naming, chance"] = round(100 / len(data.splits()["known"]), 2)
    for label, members in (("known", data.splits()["known"]), ("reported", data.splits()["reported"])):
        sorting = [(c.image(a), *rng.choice(data.sorting_questions(c))) for c, a in data.drawings(members)]
        result[f"group and kind, {label}"] = _percent(exact(model, processor, sorting))
    captions = [(c.image(a), rng.choice(data.CAPTION), c.caption) for c, a in drawn]
    result["caption, known"] = _percent(exact(model, processor, captions))
    facts: list[Case] = [(None, *pair) for concept in data.concepts() for pair in data.facts(concept)]
    result["facts"] = _percent(exact(model, processor, facts))
    return result


def geometry(model: Any, processor: Any, split: str = "development", layer: int = TAP_LAYER) -> dict[str, float]:
    """Mean cosines at the tap, centred on the memory's questions, and how well another artist is told apart."""
    rng = random.Random(0)
    members = data.splits()[split]
    drawn = data.drawings(members)
    prompt, other, sort = data.ask(data.NAME[0]), data.ask(data.NAME[3]), data.ask(data.KIND[0])
    calibration: list[tuple[str | None, str]] = []
    for concept, artist in data.drawings(data.splits()["known"] + data.splits()["triplets"]):
        calibration.append((concept.image(artist), data.ask(rng.choice(data.NAME))))
        calibration.append((concept.image(artist), rng.choice(data.sorting_questions(concept))[0]))
        calibration.append((None, rng.choice(data.facts(concept))[0]))
    rows = taps(model, processor, calibration, layer)
    memory = [(row["image"], row["prompt"]) for row in records.triplets()]
    center = taps(model, processor, memory, layer).mean(0)

    def unit(cases: list[tuple[str | None, str]]) -> Tensor:
        return torch.nn.functional.normalize(taps(model, processor, cases, layer) - center, dim=-1)

    base = unit([(c.image(a), prompt) for c, a in drawn])
    cosine = base @ base.T
    same = torch.tensor([[c == d for d, _ in drawn] for c, _ in drawn])
    kind = torch.tensor([[c.kind == d.kind for d, _ in drawn] for c, _ in drawn])
    artists, kin = cosine[same & ~torch.eye(len(drawn), dtype=torch.bool)], cosine[kind & ~same]
    false = torch.nn.functional.normalize(rows - center, dim=-1) @ base.T  # [calibration, edits]
    one, many = torch.quantile(false.flatten(), 0.99), torch.quantile(false[:, ::3].max(1).values, 0.99)
    figures = {
        "cosine, other phrasing": (base * unit([(c.image(a), other) for c, a in drawn])).sum(-1).mean(),
        "cosine, other artist": artists.mean(),
        "cosine, same kind": kin.mean(),
        "cosine, other concept": cosine[~kind].mean(),
        "cosine, same picture, kind question": (base * unit([(c.image(a), sort) for c, a in drawn])).sum(-1).mean(),
        "cosine, text-only fact": false[2::3].mean(),
        "AUC, other artist against same kind": (artists[:, None] > kin[None]).float().mean(),
        "recall of other artists at 1 % false accepts, one edit": (artists > one).float().mean(),
        f"recall of other artists at 1 % false accepts, {len(drawn) // 3} edits": (artists > many).float().mean(),
    }
    return {key: round(value.item(), 3) for key, value in figures.items()}


def report(model: Any, processor: Any) -> dict[str, Any]:
    """All figures of one base model."""
    return {**accuracies(model, processor), **geometry(model, processor)}
