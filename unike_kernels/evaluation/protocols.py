"""Protocols: which edits are on the model together, and which questions are asked then. Any `Method` runs through them.

one-step: every edit alone. sequential: K edits one after another, then all K are tested ("after the K-th edit").
cross-task: as sequential, the K edits mixed from several tasks. The order is a seed's; every record is in one sequence.
"""

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .examiner import Before, Examiner, Outcome
from .methods import Edited, Method
from .records import Record

NAMES = ("one-step", "sequential", "cross-task")
AT_ONCE = 64  # records asked about before their results are handed on: what a stop loses, beside the edits


@dataclass(frozen=True)
class Asked:
    """One probe's result. own: whether the record's own edit acted on it; others: how many others did; None unknown."""

    kind: str
    part: str
    prompt: str
    target: str
    outcome: Outcome
    own: bool | None = None
    others: int | None = None


@dataclass(frozen=True)
class Result:
    """One record's results. sequence: which K edits it was tested with; age: how many edits were made after it."""

    id: str
    task: str
    cluster: str
    sequence: int
    age: int
    probes: tuple[Asked, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        out = asdict(self)
        out["probes"] = [asdict(p) | asdict(p.outcome) for p in self.probes]
        for p in out["probes"]:
            del p["outcome"]
        return out

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Result":
        """From `to_json`'s values; KeyError or TypeError for other ones."""
        outcomes = Outcome.__dataclass_fields__
        probes = tuple(
            Asked(**{k: v for k, v in p.items() if k not in outcomes}, outcome=Outcome(**{k: p[k] for k in outcomes}))
            for p in data["probes"]
        )
        return cls(**{k: v for k, v in data.items() if k != "probes"}, probes=probes)


@dataclass(frozen=True)
class Plan:
    """Which records are tested together, in order: sequences of K; left_out: too few for another sequence."""

    name: str
    sequences: tuple[tuple[Record, ...], ...]
    left_out: int = 0
    k: int = field(default=1)

    @property
    def records(self) -> list[Record]:
        """All records that are tested, in order."""
        return [r for sequence in self.sequences for r in sequence]


def plan(name: str, tasks: Sequence[Sequence[Record]], *, k: int = 1, seed: int = 0, limit: int | None = None) -> Plan:
    """The sequences of a protocol.

    tasks: the records of each task: several for "cross-task", where every sequence has the same share of each (the
    first ones one more, where K does not divide), otherwise one. seed: of the order. limit: at most this many records,
    the first in that order. ValueError for an unknown protocol, and where not even one sequence is full.
    """
    if name not in NAMES:
        raise ValueError(f"the protocol must be one of {', '.join(NAMES)}, but is {name!r}")
    if k < 1 or (name == "one-step" and k != 1):
        raise ValueError(f"a {name} protocol cannot have K = {k}")
    if (name == "cross-task") != (len(tasks) > 1):
        raise ValueError(f"{name} takes {'several tasks' if name == 'cross-task' else 'one task'}, not {len(tasks)}")
    ids = [r.id for task in tasks for r in task]
    if len(set(ids)) != len(ids):
        raise ValueError(f"record ids must be unique, but there are {len(ids) - len(set(ids))} repeated ones")
    shuffled = [random.Random(f"{seed} {i}").sample(list(task), len(task)) for i, task in enumerate(tasks)]
    shares = [k // len(tasks) + (i < k % len(tasks)) for i in range(len(tasks))]
    full = min(len(task) // share for task, share in zip(shuffled, shares, strict=True) if share)
    if limit is not None:
        full = min(full, limit // k)
    if full < 1:
        sizes = " + ".join(str(len(task)) for task in tasks) + ("" if limit is None else f" (limit {limit})")
        raise ValueError(f"{name} with K = {k} needs at least {k} records, but there are {sizes}")
    sequences = []
    for s in range(full):
        sequence = [r for task, n in zip(shuffled, shares, strict=True) for r in task[s * n : (s + 1) * n]]
        sequences.append(tuple(random.Random(f"{seed} {s} order").sample(sequence, k) if len(tasks) > 1 else sequence))
    left = (len(ids) if limit is None else min(limit, len(ids))) - full * k
    return Plan(name, tuple(sequences), left, k)


def run(
    plan: Plan, method: Method, examiner: Examiner, *, done: Collection[str] = (), generate: bool = True
) -> Iterator[Result]:
    """Results, record by record, in the plan's order; records whose ids are in `done` are left out.

    While results of a sequence of several are handed on, the model carries its edits; after the last, and whenever the
    iterator is closed, it is the base. A sequence of which some records are done is edited again whole, since methods
    are deterministic. generate: the first probe of every kind is also answered freely, for exact match.
    """
    todo = [(s, sequence) for s, sequence in enumerate(plan.sequences) if any(r.id not in done for r in sequence)]
    if plan.k == 1:
        at = 0
        while at < len(todo):  # in blocks, so that what `before` keeps stays small
            block = todo[at : at + AT_ONCE]
            records = [sequence[0] for _, sequence in block]
            before = [_before(examiner, [record], generate) for record in records]
            edits = method.one_step([r.request for r in records])
            for (s, _), record, was, edit in zip(block, records, before, edits, strict=True):
                with edit as edited:
                    (result,) = _after(examiner, [record], was, edited, s, [(0, 0)])
                yield result
            at += len(block)
        return
    for s, sequence in todo:
        wanted = [i for i, r in enumerate(sequence) if r.id not in done]
        parts = [wanted[at : at + AT_ONCE] for at in range(0, len(wanted), AT_ONCE)]
        before = [_before(examiner, [sequence[i] for i in part], generate) for part in parts]
        with method.apply([r.request for r in sequence]) as edited:
            for part, was in zip(parts, before, strict=True):
                places = [(i, len(sequence) - 1 - i) for i in part]
                yield from _after(examiner, [sequence[i] for i in part], was, edited, s, places)


def _before(examiner: Examiner, records: Sequence[Record], generate: bool) -> list[list[Before]]:
    """On the unedited model, by record; of the very records that `_after` is asked about together.

    In half precision an answer may hang on what shares its batch: asked in other company, GRACE on SmolLM2-135M in
    bfloat16, which changes none of these answers, had a T-Loc of 97.3 (at 39ee88e).
    """
    probes = [p for r in records for p in r.probes]
    free = [generate and first for r in records for first in _firsts(r)]
    found = iter(examiner.before(probes, free))
    return [[next(found) for _ in r.probes] for r in records]


def _firsts(record: Record) -> list[bool]:
    """Which probes are the first of their kind."""
    kinds = [p.kind for p in record.probes]
    return [kind not in kinds[:i] for i, kind in enumerate(kinds)]


def _after(
    examiner: Examiner,
    records: Sequence[Record],
    before: Sequence[Sequence[Before]],
    edited: Edited,
    sequence: int,
    places: Sequence[tuple[int, int]],
) -> list[Result]:
    """places: of each record, (index among the requests, age)."""
    probes = [p for r in records for p in r.probes]
    outcomes = iter(examiner.after(probes, [b for bs in before for b in bs], edited))
    out = []
    for record, (index, age) in zip(records, places, strict=True):
        asked = []
        for p in record.probes:
            outcome = next(outcomes)
            acted = outcome.acted
            own = None if acted is None else index in acted
            others = None if acted is None else len(set(acted) - {index})
            asked.append(Asked(p.kind, p.part, p.sample.prompt, p.sample.target or "", outcome, own, others))
        out.append(Result(record.id, record.task, record.cluster or record.id, sequence, age, tuple(asked)))
    return out
