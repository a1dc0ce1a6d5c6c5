"""Text-only facts that a language model brings along: countries, with counterfactual edits in MMEdit's record format.

A prompt is the beginning of a sentence; `" " + target` ends it. Splits are by country: "memory" for the triplets and
the calibration of routing, "development", and "reported" for the edits. What edits should leave alone is asked of
countries that are in none of them.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from bench.quality.emoji import data
from bench.quality.emoji.records import known_roles

RELATIONS = {
    "capital": ("The capital of {} is", "The capital city of {} is called", "The government of {} sits in the city of"),
    "language": ("The official language of {} is", "The language spoken in {} is", "Most people in {} speak"),
    "continent": ("{} is a country on the continent of", "{} is a country in", "The continent that {} lies on is"),
}
EDITED = ("capital", "language")
SPLITS = {"memory": 18, "development": 6, "reported": 36}
SEED = 2024


@dataclass(frozen=True)
class Country:
    """A country and what is true of it."""

    name: str
    capital: str
    language: str
    continent: str

    def fact(self, relation: str, phrasing: int = 0) -> tuple[str, str]:
        """(prompt, target) of one true fact."""
        return RELATIONS[relation][phrasing].format(self.name), getattr(self, relation)


def _read(name: str) -> tuple[Country, ...]:
    """The countries of a file, in its order."""
    return tuple(Country(*row) for row in json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8")))


@cache
def countries() -> tuple[Country, ...]:
    """The countries of the splits."""
    return _read("countries.json")


@cache
def unedited() -> tuple[Country, ...]:
    """Countries of no split: nothing is learned from them and nothing claimed of them."""
    return _read("countries_unedited.json")


@cache
def splits() -> dict[str, tuple[Country, ...]]:
    """The three splits, disjoint."""
    order = list(countries())
    random.Random(SEED).shuffle(order)
    result, start = {}, 0
    for split, size in SPLITS.items():
        result[split] = tuple(order[start : start + size])
        start += size
    if start != len(order):
        raise ValueError(f"the splits ask for {start} countries, there are {len(order)}")
    return result


def wrong(country: Country, relation: str, rng: random.Random) -> str:
    """What an edit claims instead of the truth: the same relation's value of another country."""
    true = getattr(country, relation)
    return rng.choice(sorted({getattr(c, relation) for c in countries()} - {true}))


def claims(split: str, seed: int = 0) -> list[tuple[Country, str, str]]:
    """(country, relation, what is claimed) of every counterfactual of a split, capitals and languages in turn."""
    rng = random.Random(f"{split} {seed}")
    return [(c, relation, wrong(c, relation, rng)) for c in splits()[split] for relation in EDITED]


def records(split: str = "reported", n: int | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Counterfactual edits: `src`, `alt`, `rephrases`, `t_loc`, `m_loc_parts` as in the emoji world's records.

    t_loc: "same_relation" of other countries, "own" facts of the edited one, "random" others; m_loc: known drawings.
    The others are countries of no split: what a router or a baseline learned from is not what its locality is measured
    on. Those of "memory", which methods learn from, are about its own countries alone.
    """
    rng = random.Random(f"records {split} {seed}")
    known = known_roles()["locality"]
    out = []
    for i, (country, relation, claim) in enumerate(claims(split, seed)):
        src, *rephrases = rng.sample(RELATIONS[relation], len(RELATIONS[relation]))
        rest = [r for r in RELATIONS if r not in EDITED]
        others = [c for c in splits()[split] if c != country] if split == "memory" else list(unedited())
        t_loc = [(*c.fact(relation, rng.randrange(3)), "same_relation") for c in rng.sample(others, 2)]
        t_loc += [(*country.fact(r, k), "own") for r in rest for k in rng.sample(range(3), 2)]
        t_loc += [(*c.fact(rng.choice(rest), rng.randrange(3)), "random") for c in rng.sample(others, 2)]
        shown = [
            (c.image(rng.choice(c.artists)), rng.choice(data.name_prompts()), c.name) for c in rng.sample(known, 2)
        ]
        out.append(
            {
                "id": f"{relation}-{split}-{i:03d}",
                "concept": country.name,
                "src": src.format(country.name),
                "alt": claim,
                "image": None,
                "rephrases": [r.format(country.name) for r in rephrases],
                "image_rephrases": [],
                "t_loc": [{"prompt": p, "target": t, "part": part} for p, t, part in t_loc],
                "m_loc_parts": [{"image": i, "prompt": p, "target": t, "part": "other_concept"} for i, p, t in shown],
            }
        )
    return out[:n]


def triplets() -> list[dict[str, Any]]:
    """The memory's questions: every claim about the memory's countries in every phrasing."""
    return [
        {"prompt": phrasing.format(c.name), "target": claim, "image": None, "question": f"{relation} of {c.name}"}
        for c, relation, claim in claims("memory")
        for phrasing in RELATIONS[relation]
    ]


def calibration() -> list[dict[str, Any]]:
    """True facts of the memory's countries, which no edit should claim."""
    return [
        {"prompt": c.fact(relation, i)[0], "image": None, "question": f"{relation} of {c.name}"}
        for c in splits()["memory"]
        for relation in RELATIONS
        for i in range(len(RELATIONS[relation]))
    ]


def invented(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """(country, capital) that do not exist, from syllables: what a model can know from its context alone."""
    rng = random.Random(f"invented {seed}")
    starts = ("Zor", "Kel", "Mab", "Tru", "Vel", "Dro", "Quin", "Sar", "Hol", "Pel", "Gor", "Lun")
    middles, ends = ("a", "e", "i", "o", "an", "or"), ("ria", "land", "stan", "via", "nia")
    cities = ("mar", "dun", "vik", "bor", "lis", "ten", "rak")
    made = set()
    while len(made) < n:
        made.add((rng.choice(starts) + rng.choice(middles) + rng.choice(ends), rng.choice(starts) + rng.choice(cities)))
    return sorted(made)
