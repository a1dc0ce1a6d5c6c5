"""The world of the emoji benchmark: concepts, their split, the ways to ask, and what the tiny model is trained on.

A prompt is always the full text that the model sees (template applied, no space at its end). A target carries no
leading space: `" " + target` is what follows the prompt, ended by `</s>`.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent
DRAWINGS = HERE / "drawings"
ARTISTS = ("noto", "twemoji", "fluent")
SPLITS = {"known": 330, "triplets": 90, "development": 50, "reported": 340}  # concepts; they add up to 810
SPLIT_SEED = 2024

QUESTION = "Question: {} Answer:"
NAME = (
    "what is this?",
    "what does the picture show?",
    "what is the name of this thing?",
    "which thing is drawn here?",
    "what do you see?",
    "can you name this?",
)
GROUP = ("which group does this belong to?", "what group is this in?", "in which group would you put this?")
KIND = ("what kind of thing is this?", "what type of thing is shown?", "which kind of thing do you see?")
FACT_GROUP = ("which group does the {name} belong to?", "what group is the {name} in?")
FACT_KIND = ("what kind of thing is the {name}?", "what type of thing is the {name}?")
CAPTION = ("a picture of", "a drawing of", "this shows")


@dataclass(frozen=True)
class Concept:
    """One thing of the world: its code point, unambiguous name, group (of 5), kind (of 46) and artists (2 or 3)."""

    id: str
    name: str
    group: str
    kind: str
    artists: tuple[str, ...]

    def image(self, artist: str) -> str:
        """The path of one artist's drawing, relative to `DRAWINGS`."""
        return f"{artist}/{self.id}.png"

    @property
    def caption(self) -> str:
        """What a caption says; no word of it depends on the artist, so another drawing has the same caption."""
        return f"{self.name} from {self.group}"


def _words(text: str) -> str:
    return text.lower().replace(" & ", " and ").replace("-", " ").replace("’", "'")


@cache
def concepts() -> tuple[Concept, ...]:
    """All concepts with at least two artists, in the file's order."""
    rows = json.loads((HERE / "concepts.json").read_text(encoding="utf-8"))
    found = []
    for row in rows:
        artists = tuple(artist for artist in ARTISTS if artist in row["vendors"])
        if len(artists) >= 2:
            kind, group = _words(row["subcategory"]), _words(row["category"])
            found.append(Concept(row["id"], _words(row["name"]), group, kind, artists))
    if len({concept.name for concept in found}) != len(found):
        raise ValueError("concepts.json holds two concepts of one name: a name must say which concept is meant")
    return tuple(found)


@cache
def splits() -> dict[str, tuple[Concept, ...]]:
    """The four splits by concept, disjoint, each with its share of every kind."""
    rng = random.Random(SPLIT_SEED)
    by_kind: dict[str, list[Concept]] = defaultdict(list)
    for concept in concepts():
        by_kind[concept.kind].append(concept)
    order = []  # evenly spaced positions in [0, 1) within a kind, so any slice of the sorted order is stratified
    for kind in sorted(by_kind):
        members = by_kind[kind]
        rng.shuffle(members)
        order += [((i + rng.random()) / len(members), concept) for i, concept in enumerate(members)]
    ordered = [concept for _, concept in sorted(order, key=lambda pair: pair[0])]
    result, start = {}, 0
    for split, size in SPLITS.items():
        result[split] = tuple(sorted(ordered[start : start + size], key=lambda concept: concept.id))
        start += size
    if start != len(ordered):
        raise ValueError(f"the splits ask for {start} concepts, there are {len(ordered)}")
    return result


@cache
def split_of() -> dict[str, str]:
    """The split of every concept id."""
    return {concept.id: split for split, members in splits().items() for concept in members}


def drawings(members: tuple[Concept, ...] | None = None) -> list[tuple[Concept, str]]:
    """(concept, artist) of every drawing of `members`, all concepts by default."""
    return [(concept, artist) for concept in members or concepts() for artist in concept.artists]


def ask(question: str) -> str:
    """The full prompt of a question."""
    return QUESTION.format(question)


def name_prompts() -> list[str]:
    """The naming prompts, one for each phrasing."""
    return [ask(question) for question in NAME]


def sorting_questions(concept: Concept) -> list[tuple[str, str]]:
    """(prompt, target) of every question about a picture's group and kind."""
    return [(ask(q), concept.group) for q in GROUP] + [(ask(q), concept.kind) for q in KIND]


def facts(concept: Concept) -> list[tuple[str, str]]:
    """(prompt, target) of every text-only fact of a concept."""
    group = [(ask(q.format(name=concept.name)), concept.group) for q in FACT_GROUP]
    return group + [(ask(q.format(name=concept.name)), concept.kind) for q in FACT_KIND]


def picture_questions(concept: Concept) -> list[tuple[str, str]]:
    """(prompt, target) of what is taught about a concept's pictures; the name only if the concept is known."""
    pairs = sorting_questions(concept)
    if split_of()[concept.id] == "known":
        pairs = [(prompt, concept.name) for prompt in name_prompts()] + pairs
        pairs += [(prompt, concept.caption) for prompt in CAPTION]
    return pairs


def corpus() -> Iterator[str]:
    """Every text of the world, for the tokenizer."""
    for concept in concepts():
        for prompt, target in picture_questions(concept) + facts(concept):
            yield f"{prompt} {target}"
        yield f" {concept.name}"
