"""Edits of the training split with their probes: what KE, MEND and SERAC learn from, and what the others measure on.

Only the 90 concepts of the memory's triplets and the 130 known ones that calibrate routing occur, in pictures,
questions and answers; no reported or development edit, and no locality question of one, shows any of them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from bench.quality.emoji import data, records
from bench.quality.emoji.data import Concept
from bench.quality.world import probes, sample
from unike_kernels.evaluation.records import Probe, Record

# of the training edits; "other name": a triplet concept gets a name that is not its own, so that nothing is learned by
# heart about which picture has which name
SHARES = {"name": 0.4, "rename": 0.3, "other name": 0.15, "caption": 0.15}


def members() -> tuple[Concept, ...]:
    """The concepts of the training split."""
    return data.splits()["triplets"] + records.known_roles()["calibration"]


def training_records(n: int, seed: int = 0, tasks: Sequence[str] = tuple(SHARES)) -> list[Record]:
    """`n` training-split edits, of the tasks in their shares, each with a probe of every kind and part."""
    rng = random.Random(f"training {seed}")
    triplets, known = data.splits()["triplets"], records.known_roles()["calibration"]
    names = sorted(concept.name for concept in members())
    out = []
    for i in range(n):
        task = rng.choices(tasks, [SHARES[t] for t in tasks])[0]
        concept = rng.choice(known if task == "rename" else triplets)
        target = concept.caption if task == "caption" else concept.name
        if task in ("rename", "other name"):
            target = rng.choice([name for name in names if name != concept.name])
        out.append(_record(f"training-{seed}-{i:05d}", task, concept, target, rng))
    return out


def _record(name: str, task: str, concept: Concept, target: str, rng: random.Random) -> Record:
    prompts = list(data.CAPTION) if task == "caption" else data.name_prompts()
    src, *rephrases = rng.sample(prompts, len(prompts))
    artist, *others = rng.sample(concept.artists, len(concept.artists))
    image = concept.image(artist)
    request = sample(src, target, image)
    probes = [Probe("rel", request)]
    probes += [Probe("t_gen", sample(p, target, image)) for p in rephrases]
    probes += [Probe("m_gen", sample(src, target, concept.image(other))) for other in others]
    rest = [c for c in members() if c != concept]
    kin = [c for c in rest if c.kind == concept.kind] or [c for c in rest if c.group == concept.group]
    for part, population in (("other_concept", rest), ("same_subgroup", kin)):
        other = rng.choice(population)
        question = rng.choice(data.name_prompts())
        probes.append(Probe("m_loc", sample(question, other.name, other.image(rng.choice(other.artists))), part))
    probes.append(Probe("m_loc", sample(*rng.choice(data.sorting_questions(concept)), image), "same_picture"))
    other = rng.choice(rest)
    question, answer = rng.choice(data.sorting_questions(other))
    probes.append(Probe("m_loc", sample(question, answer, other.image(rng.choice(other.artists))), "other_question"))
    for part, about in (("random", rng.choice(rest)), ("own", concept)):
        probes.append(Probe("t_loc", sample(*rng.choice(data.facts(about))), part))
    return Record(name, request, tuple(probes), task, concept.id)


def benchmark_records(split: str, task: str, n: int) -> list[Record]:
    """`n` edits of the benchmark with all their probes; split: "development" or "reported"."""
    items = records.records(split, task, n)
    found: list[list[Probe]] = [[] for _ in items]
    for p in probes(items):
        found[p.edit].append(Probe(p.kind, p.sample, p.part))
    return [Record(r["id"], ps[0].sample, tuple(ps), task, r["concept"]) for r, ps in zip(items, found, strict=True)]
