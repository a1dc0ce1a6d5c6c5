"""Edits, the memory's triplets and calibration prompts of the emoji world, in MMEdit's record format.

Every `src`, `rephrase`, `loc` and `m_loc_q` is the full prompt that the model sees, template applied; targets carry no
leading space. Images are paths relative to `data.DRAWINGS`. `pred`, the base model's own answer, is left empty: the
caller asks the model. No locality input shows a concept that another record of the same task and split edits, and none
shows a concept that calibrates routing or lies in the memory.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from . import data
from .data import Concept

TASKS = ("name", "caption", "rename")
KNOWN_ROLES = {"calibration": 130, "locality": 50, "renamed development": 30, "renamed reported": 120}
PER_PART = 2  # locality inputs of each part in a record


@cache
def known_roles() -> dict[str, tuple[Concept, ...]]:
    """The known concepts by what they are used for, disjoint."""
    members = list(data.splits()["known"])
    random.Random(data.SPLIT_SEED + 1).shuffle(members)
    roles, start = {}, 0
    for role, size in KNOWN_ROLES.items():
        roles[role] = tuple(members[start : start + size])
        start += size
    return roles


def edited(split: str, task: str) -> tuple[Concept, ...]:
    """The concepts that `task` edits: held-out ones, or for "rename" known ones set aside for `split`."""
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, not one of {TASKS}")
    return known_roles()[f"renamed {split}"] if task == "rename" else data.splits()[split]


def records(split: str = "reported", task: str = "name", n: int = 300, seed: int = 0) -> list[dict[str, Any]]:
    """`n` edits, balanced over the concepts of `split`, each with a drawn artist and phrasing.

    "name" teaches the name of a concept that was never named, "caption" the same through a caption, and "rename" gives
    a known concept the name of another one. Beside MMEdit's keys: `id`, `concept`, `rephrases` (all other phrasings),
    `image_rephrases` (all other artists), `t_loc` (prompt, target, part "random" or "own") and `m_loc_parts` (image,
    prompt, target, part "other_concept", "same_subgroup", "same_picture" or "other_question").

    With more edits than concepts a concept is edited again, with the same target, in another phrasing, then by another
    artist; no edit asks what another one's rephrasings ask, or shows a drawing of its `image_rephrases`. ValueError
    where that is not possible for `n` edits.
    """
    rng = random.Random(f"{split} {task} {seed}")
    members = edited(split, task)
    # Concepts whose answers an edit must leave alone: not calibrating, not in the memory, not edited beside this one.
    banned = {*members, *known_roles()["calibration"], *data.splits()["triplets"]}
    free = [concept for concept in data.concepts() if concept not in banned]
    order: list[Concept] = []
    times = 0  # each concept with room for more is edited so often by now
    while len(order) < n:
        left = [concept for concept in members if len(_cells(task, concept)) > times]
        times += 1
        if not left:
            raise ValueError(f"{len(order)} edits ({task}, {split}) do not meet in a rephrasing, but {n} are asked for")
        order += rng.sample(left, len(left))
    order = order[:n]
    drawn: dict[Concept, Drawn] = {}
    found = []
    for i, concept in enumerate(order):
        if concept not in drawn:
            drawn[concept] = _draw(task, concept, order.count(concept), rng)
        found.append(_record(f"{task}-{split}-{i:04d}", concept, drawn[concept], free, rng))
    return found


def _prompts(task: str) -> list[str]:
    return list(data.CAPTION) if task == "caption" else data.name_prompts()


def _cells(task: str, concept: Concept) -> list[tuple[int, int]]:
    """(artist, phrasing) that may be edited, in order: one artist and one phrasing of each drawing stay for probes."""
    return [(a, p) for a in range(len(concept.artists) - 1) for p in range(len(_prompts(task)) - 1)]


@dataclass
class Drawn:
    """A concept's artists and phrasings in a drawn order, what its edits teach, and which of them are still to come."""

    artists: list[str]
    prompts: list[str]
    target: str
    cells: list[tuple[int, int]]  # of all its edits
    next: int = 0


def _draw(task: str, concept: Concept, edits: int, rng: random.Random) -> Drawn:
    prompts = _prompts(task)
    prompts = rng.sample(prompts, len(prompts))
    artists = rng.sample(concept.artists, len(concept.artists))
    target = concept.caption if task == "caption" else concept.name
    if task == "rename":
        target = rng.choice([other.name for other in known_roles()["locality"] if other.kind != concept.kind])
    return Drawn(artists, prompts, target, _cells(task, concept)[:edits])


def _record(name: str, concept: Concept, drawn: Drawn, free: Sequence[Concept], rng: random.Random) -> dict[str, Any]:
    a, p = drawn.cells[drawn.next]
    drawn.next += 1
    artist, src = drawn.artists[a], drawn.prompts[p]
    rephrases = [text for i, text in enumerate(drawn.prompts) if (a, i) not in drawn.cells]
    shown = {artist for artist, _ in drawn.cells}
    others = [concept.image(other) for i, other in enumerate(drawn.artists) if i not in shown]
    m_loc_parts, t_loc = _m_loc(concept, artist, free, rng), _t_loc(concept, rng)
    return {
        "src": src,
        "pred": "",
        "rephrase": rephrases[0],
        "alt": drawn.target,
        "image": concept.image(artist),
        "image_rephrase": others[0],
        "loc": t_loc[0]["prompt"],
        "loc_ans": t_loc[0]["target"],
        "m_loc": m_loc_parts[0]["image"],
        "m_loc_q": m_loc_parts[0]["prompt"],
        "m_loc_a": m_loc_parts[0]["target"],
        "id": name,
        "concept": concept.id,
        "rephrases": rephrases,
        "image_rephrases": others,
        "t_loc": t_loc,
        "m_loc_parts": m_loc_parts,
    }


def _t_loc(concept: Concept, rng: random.Random) -> list[dict[str, str]]:
    other = rng.sample([c for c in data.concepts() if c != concept], 2 * PER_PART)
    found = [(*rng.choice(data.facts(c)), "random") for c in other]
    found += [(*pair, "own") for pair in rng.sample(data.facts(concept), PER_PART)]
    return [{"prompt": prompt, "target": target, "part": part} for prompt, target, part in found]


def _m_loc(concept: Concept, artist: str, free: Sequence[Concept], rng: random.Random) -> list[dict[str, str]]:
    known = [c for c in free if data.split_of()[c.id] == "known" and c.kind != concept.kind]
    kin = [c for c in free if c.kind == concept.kind]
    if len(kin) < PER_PART:  # a kind of one or two members: its group stands in
        kin += [c for c in free if c.group == concept.group and c.kind != concept.kind]
    found: list[tuple[str, str, str, str]] = []
    for part, population in (("other_concept", known), ("same_subgroup", kin)):
        for other in rng.sample(population, PER_PART):
            found.append((other.image(rng.choice(other.artists)), rng.choice(data.name_prompts()), other.name, part))
    for pair in rng.sample(data.sorting_questions(concept), PER_PART):
        found.append((concept.image(artist), *pair, "same_picture"))
    for other in rng.sample(known, PER_PART):
        question = rng.choice(data.sorting_questions(other))
        found.append((other.image(rng.choice(other.artists)), *question, "other_question"))
    return [{"image": i, "prompt": p, "target": t, "part": part} for i, p, t, part in found]


def triplets(phrasings: int = 4, task: str = "name") -> list[dict[str, str]]:
    """Image, prompt and target of the memory's questions: 90 concepts, every artist, the first phrasings."""
    prompts = list(data.CAPTION) if task == "caption" else data.name_prompts()
    return [
        {
            "image": concept.image(artist),
            "prompt": prompt,
            "target": concept.caption if task == "caption" else concept.name,
            "concept": concept.id,
        }
        for concept, artist in data.drawings(data.splits()["triplets"])
        for prompt in prompts[:phrasings]
    ]


def calibration_prompts(n: int | None = 4000, seed: int = 0) -> list[tuple[str | None, str]]:
    """`n` (image or None, prompt) that calibrate routing: pictures with any question, and facts.

    They show the 90 triplet concepts and the 130 known ones that no record edits or compares. None returns all.
    """
    members = data.splits()["triplets"] + known_roles()["calibration"]
    cases: list[tuple[str | None, str]] = []
    for concept, artist in data.drawings(members):
        prompts = data.name_prompts() + list(data.CAPTION) + [p for p, _ in data.sorting_questions(concept)]
        cases += [(concept.image(artist), prompt) for prompt in prompts]
    cases += [(None, prompt) for concept in members for prompt, _ in data.facts(concept)]
    random.Random(seed).shuffle(cases)
    return cases[:n]
