"""What the second model knows and what it can take from its context: `python -m bench.quality.smollm.know`."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from bench.quality.ablation import write
from bench.quality.emoji import data
from bench.quality.emoji.data import Concept
from bench.quality.world import picture
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.evaluation.metrics import exact_match
from unike_kernels.minigpt4 import MiniGPT4, MiniGPT4Processor

from . import facts, fetch, model
from .features import held_out_drawings

TEXT = ("text", "in context, text")  # parts of the report that see no picture
Asked = tuple[str | None, str, str]  # (drawing or none, prompt, target)


def share(right: Sequence[bool]) -> float:
    """In percent."""
    return round(100 * sum(right) / len(right), 1)


def named(collator: Collator, asked: Sequence[Asked], shown: Sequence[Any] | None = None) -> list[bool]:
    """Whether greedy generation gives each target, the end of sequence included; `shown` replaces the drawings."""
    pictures = [picture(str(image)) for image, _, _ in asked] if shown is None else shown
    samples = [Sample(prompt, None, image) for (_, prompt, _), image in zip(asked, pictures, strict=True)]
    longest = collator.longest_target([Sample(prompt, target) for _, prompt, target in asked])
    answers = collator.generate(samples, 50, max_new_tokens=longest + 1)
    return [exact_match(answer, target) for answer, (_, _, target) in zip(answers, asked, strict=True)]


def begins(collator: Collator, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the greedy continuation of each text begins with its target: a sentence goes on after the answer."""
    samples = [Sample(prompt) for prompt, _ in asked]
    longest = collator.longest_target([Sample(prompt, target) for prompt, target in asked])
    answers = collator.generate(samples, 64, max_new_tokens=longest)
    return [a.lower().startswith(target.lower()) for a, (_, target) in zip(answers, asked, strict=True)]


def naming(members: Sequence[tuple[Concept, str]], n: int, rng: random.Random) -> list[Asked]:
    """`n` naming questions about drawings of `members`, all phrasings."""
    chosen = rng.sample(list(members), min(n, len(members)))
    return [(c.image(artist), rng.choice(data.name_prompts()), c.name) for c, artist in chosen]


def of_pictures(collator: Collator, n: int) -> dict[str, float]:
    """Exact match in percent on shown, held-out and never-named drawings, with controls."""
    rng, out = random.Random(0), held_out_drawings()
    known = data.drawings(data.splits()["known"])
    shown = [(c, artist) for c, artist in known if (c.id, artist) not in out]
    rest = [(c, artist) for c, artist in known if (c.id, artist) in out]
    cases = naming(shown, n, rng)
    result = {"names, shown drawings": share(named(collator, cases))}
    result["names, another artist's drawing, never shown"] = share(
        named(collator, naming(rest, n, rng) + naming(rest, n, rng))
    )
    blank = picture(str(cases[0][0])).copy()
    blank.paste((255, 255, 255), (0, 0, *blank.size))
    part = cases[: n // 2]
    result["names, blank picture"] = share(named(collator, part, [blank] * len(part)))
    turned = [picture(str(image)) for image, _, _ in part[1:] + part[:1]]
    result["names, another concept's picture"] = share(named(collator, part, turned))
    never = data.drawings(data.splits()["reported"])
    result["names never taught"] = share(named(collator, naming(never, n // 2, rng)))
    for label, members in (("known", shown), ("never named", never)):
        drawn = rng.sample(members, n // 2)
        asked = [(c.image(artist), *rng.choice(data.sorting_questions(c))) for c, artist in drawn]
        result[f"group and kind, {label}"] = share(named(collator, asked))
    captions = [(c.image(a), rng.choice(data.CAPTION), c.caption) for c, a in rng.sample(shown, n // 2)]
    result["captions, shown drawings"] = share(named(collator, captions))
    return result


def of_text(collator: Collator) -> dict[str, float]:
    """Facts that the language model answers by itself, in percent, each relation in every phrasing."""
    result = {}
    for relation, phrasings in facts.RELATIONS.items():
        asked = [c.fact(relation, i) for c in facts.countries() for i in range(len(phrasings))]
        result[f"facts, {relation}"] = share(begins(collator, asked))
    emoji = [pair for c in data.concepts()[::20] for pair in data.facts(c)[::2]]
    result["facts, groups and kinds of the emoji world"] = share(begins(collator, emoji))
    return result


def in_context_text(collator: Collator) -> dict[str, float]:
    """Facts stated before the question, and the same questions without the statement, in percent."""
    rng = random.Random(0)
    claims = [(c, r, claim) for c, r, claim in facts.claims("reported") if r == "capital"]
    phrasings = facts.RELATIONS["capital"]
    result: dict[str, float] = {}

    def asked(label: str, stated: int, others: int, about: list[tuple[str, str]]) -> None:
        cases = []
        for name, value in about:
            rest = rng.sample([pair for pair in about if pair[0] != name], others)
            lines = [f"{phrasings[0].format(n)} {v}." for n, v in [(name, value)] * stated + rest]
            rng.shuffle(lines)
            for phrasing in phrasings[:2]:
                cases.append(("\n".join([*lines, phrasing.format(name)]), value))
        same, other = (share(begins(collator, cases[i::2])) for i in (0, 1))
        result[f"{label}, same phrasing"], result[f"{label}, other phrasing"] = same, other

    about = [(c.name, claim) for c, _, claim in claims]
    asked("false capital, not stated", 0, 2, about)
    asked("false capital, stated", 1, 0, about)
    asked("false capital, stated among 5", 1, 4, about)
    new = facts.invented(40)
    asked("invented capital, not stated", 0, 2, new)
    asked("invented capital, stated", 1, 0, new)
    asked("invented capital, stated among 5", 1, 4, new)
    return result


@torch.no_grad()
def in_context_pictures(net: MiniGPT4, processor: MiniGPT4Processor, n: int) -> dict[str, float]:
    """Two demonstrations (another artist's drawing with its name), then a drawing of one of the two concepts.

    Concepts that were never named in training; without demonstrations none is. "chooses": the right name of the two is
    the likelier one, by its mean log-likelihood a token (50 is chance); "says": every token is the first choice.
    """
    rng = random.Random(0)
    tokenizer = processor.tokenizer
    members = [c for c in data.splits()["reported"] if len(c.artists) >= 2]
    prompt = data.name_prompts()[0]
    bos, ask = [tokenizer.bos_token_id], processor.wrap(prompt)[1:]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    found: dict[str, list[bool]] = {"chooses": [], "says": [], "chooses, swapped": []}
    for _ in tqdm(range(n), desc="demonstrations", mininterval=5):
        pair = rng.sample(members, 2)
        first, second = ([c.artists[i] for c in pair] for i in (0, 1))
        which = rng.randrange(2)
        shown = [*(c.image(a) for c, a in zip(pair, first, strict=True)), pair[which].image(second[which])]
        pixels = processor.image_processor([picture(path) for path in shown], return_tensors="pt")["pixel_values"]
        for swapped in (False, True):
            names = [c.name for c in (pair[::-1] if swapped else pair)]
            start = bos + [t for name in names for t in [*ask, *ids(f" {name}\n")]] + ask
            scores, first_choice = [], []
            for name in names:
                target = ids(f" {name}")
                logits = net(torch.tensor([start + target]), pixel_values=pixels).logits[0, len(start) - 1 : -1]
                scores.append(float(logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).mean()))
                first_choice.append(logits.argmax(-1).tolist() == target)
            right = scores[which] > scores[1 - which]
            if swapped:
                found["chooses, swapped"].append(right)
            else:
                found["chooses"].append(right)
                found["says"].append(first_choice[which])
    return {f"two demonstrations, {label}": share(right) for label, right in found.items()}


def report(seed: int, n: int = 300, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Everything above for one projector, written beside its weights part by part; a stopped report goes on.

    What is asked without a picture does not depend on the projector, and is kept when another one is measured.
    """
    path, weights = model.weights_file(seed).with_suffix(".json"), fetch.sha256(model.weights_file(seed))
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if known.get("projector") != weights:
        kept = {part: known[part] for part in TEXT if part in known}
        dtypes = {part: known["dtype"][part] for part in kept}
        known = {"projector": weights, "dtype": dtypes} | kept
    net, processor = model.load(seed)
    net.llama_model.to(dtype)
    collator = Collator(net, processor)
    parts = {
        "pictures": lambda: of_pictures(collator, n),
        "in context, pictures": lambda: in_context_pictures(net, processor, n // 5),
        "text": lambda: of_text(collator),
        "in context, text": lambda: in_context_text(collator),
    }
    for part, measure in parts.items():
        if part not in known:
            known[part] = measure()
            known["dtype"][part] = str(dtype).split(".")[-1]
            write(path, known)
    return known


def main() -> None:
    """Parse the command line, measure, and write the figures beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", type=int, default=300, help="naming questions; the other parts have fewer")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the language model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(report(args.seed, args.n, getattr(torch, args.dtype)), indent=1))


if __name__ == "__main__":
    main()
