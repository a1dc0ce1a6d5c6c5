"""The baselines on the second model, on the very edits of its ablation, and the paper's claims with them beside it."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from tqdm import tqdm

from bench.quality import claims
from bench.quality.baselines import METHODS
from bench.quality.baselines.base import Baseline
from bench.quality.baselines.ike import Ike, WithIke
from bench.quality.baselines.learned import TRAINING
from bench.quality.baselines.training_split import training_records
from bench.quality.cells import PROMPTED, UNIKE, Found, saved
from bench.quality.paper_tables import ablation_row
from bench.quality.protocol import RowMethod
from bench.quality.rows import ROWS
from bench.quality.tables import HEADS, KINDS, markdown, number
from bench.quality.world import record
from unike_kernels.config import UnikeConfig
from unike_kernels.editing.inputs import Collator
from unike_kernels.evaluation import protocols
from unike_kernels.evaluation.examiner import Examiner
from unike_kernels.evaluation.methods import Method
from unike_kernels.evaluation.records import Record

from . import facts, model, world

SEEN = 20  # other training-split edits that Rel is also measured on
DEVELOPMENT = 12  # edits that settings are searched on: all that the development countries give
SEQUENTIAL = (10, 20)
INTRINSIC = "intrinsic + IKE"
KINDS_OF: dict[world.Task, tuple[str, ...]] = {"pictures": KINDS, "text": ("rel", "t_gen", "t_loc")}


def training(task: world.Task, n: int, seed: int = 0) -> list[Record]:
    """`n` training-split edits: of the emoji world's concepts, or counterfactuals about the memory's countries."""
    if task == "pictures":
        return training_records(n, seed)
    return list(itertools.islice(_claimed(seed), n))


def _claimed(seed: int) -> Iterator[Record]:
    """Round after round of what the memory's countries might be claimed to have, each round with other claims."""
    for n in itertools.count():
        for item in facts.records("memory", seed=1000 * seed + n):
            yield replace(record(item | {"m_loc_parts": []}), id=f"{item['id']}-{n}")


class Bench:
    """The second model with a task's edits, and every method on it."""

    def __init__(self, task: world.Task, dtype: torch.dtype, *, of: Any = None) -> None:
        """dtype: of the language model. of: (model, processor), if they are not to be loaded."""
        self.task = task
        self.net, self.processor = model.load(trained=task == "pictures") if of is None else of
        self.net.llama_model.to(dtype)
        self.examiner = Examiner(Collator(self.net, self.processor))
        self.last: Baseline | None = None

    def fitted(self, name: str, config: Any) -> Baseline:
        """The method with these settings; a network is trained once, and what suits all settings is kept."""
        if self.last is not None and self.last.name == name and self.last.fits_any:
            method = copy.copy(self.last)
            method.config = config
            return method
        method = self.last = METHODS[name](self.net, self.processor, config)
        records = training(self.task, TRAINING * method.share)
        method.fit(records, seed=0, cache=world.FOLDER / "baselines")
        return method

    def measured(self, method: Method, records: Sequence[Record], k: int = 1, **options: Any) -> dict[str, Any]:
        """A row: edits one by one, or in sequences of K in their order."""
        chunks = [tuple(records[at : at + k]) for at in range(0, len(records) - k + 1, k)]
        plan = protocols.Plan("one-step" if k == 1 else "sequential", tuple(chunks), len(records) % k, k)
        found = protocols.run(plan, method, self.examiner, **options)
        bar = tqdm(found, total=len(plan.records), desc=f"{method.name}, K = {k}", unit="edit", mininterval=5)
        return saved(list(bar), [r.id for r in plan.records])


def with_ike(task: world.Task, dtype: torch.dtype, config: Any) -> tuple[Bench, WithIke]:
    """The paper's "intrinsic + IKE": the neurons alone, asked behind demonstrations; config: IKE's."""
    editor = world.prepared(task, UnikeConfig(), dtype=dtype)
    bench = Bench(task, dtype, of=(editor.model, editor.collator.processor))
    row = next(row for row in ROWS if row.name == "intrinsic only")
    ike = bench.fitted("IKE", config)
    assert isinstance(ike, Ike)
    return bench, WithIke(RowMethod(row, editor), ike, INTRINSIC)


def search(bench: Bench, names: Sequence[str], found: dict[str, Any], keep: Callable[[], None]) -> None:
    """The four settings of every method that learns nothing beforehand, on development edits; what is `found` stays."""
    records = [record(item) for item in world.items(bench.task, DEVELOPMENT, "development")]
    for name in names:
        if METHODS[name].trained or name in PROMPTED:
            continue
        for config in METHODS[name].trials():
            rows, text = found.setdefault(name, {}), settings(config)
            if text not in rows:
                row = bench.measured(bench.fitted(name, config), records, generate=False)
                rows[text] = {kind: row["metrics"][kind] for kind in KINDS_OF[bench.task]}
                keep()


def settings(config: Any) -> str:
    """A method's settings as text."""
    return json.dumps(asdict(config), sort_keys=True)


def chosen(name: str, searches: Sequence[dict[str, Any]]) -> Any:
    """The settings with the best mean of all metrics, over the tasks that were searched; the emoji models' if none was.

    searches: what `search` found on each task, by method. ValueError for one that was stopped in the middle.
    """
    trials, found = METHODS[name].trials(), [rows[name] for rows in searches if name in rows]
    if stopped := [len(rows) for rows in found if len(rows) < len(trials)]:
        raise ValueError(f"{name} has {len(trials)} settings, but its search has {stopped[0]}: --part search goes on")

    def mean(config: Any) -> float:
        return sum(sum(rows[settings(config)].values()) / len(rows[settings(config)]) for rows in found)

    return max(trials, key=mean) if found else trials[0]


def run(
    bench: Bench,
    asked: Sequence[Record],
    configs: dict[str, Any],
    rows: dict[str, Any],
    keep: Callable[[], None],
) -> None:
    """One-step rows of every method, then K = 10 and 20; those in `rows` stay. keep: saves them.

    configs: settings by method. What acts by the prompt has no sequences, as in the paper.
    """
    seen = [replace(r, probes=r.probes[:1]) for r in training(bench.task, SEEN, seed=1)]
    ready: dict[str, Baseline] = {}
    for k, name in itertools.product((1, *SEQUENTIAL), configs):
        if label(name, k) in rows or k > len(asked) or (k > 1 and name in PROMPTED):
            continue
        method = ready[name] = ready.get(name) or bench.fitted(name, configs[name])
        if isinstance(method, Ike) and not method.followed:
            rows[name] = {"na": method.unfollowed()}
            keep()
            continue
        row = bench.measured(method, asked, k) | {"config": asdict(configs[name])}
        if k == 1:
            row["training_rel"] = bench.measured(method, seen, generate=False)["metrics"]["rel"]
        if isinstance(method, Ike):
            row |= {"follows": 100 * method.follows, "without": 100 * method.without}
        rows[label(name, k)] = row
        keep()


def label(name: str, k: int) -> str:
    """A row's name."""
    return name if k == 1 else f"{name}, K = {k}"


def rows_of(task: world.Task, ablation: dict[str, Any], baselines: dict[str, Any]) -> claims.Rows:
    """Where the claims find their rows: the ablation's, its edits in sequence, and the baselines'."""
    stacks = ablation | {"rows": ablation.get("sequential", {})}

    def part(name: str) -> Found | None:
        return ablation_row(ablation, name)

    def cell(name: str, protocol: str = "one-step", k: int = 1, like: Found | None = None) -> Found | None:
        if k > 1:
            return ablation_row(stacks, label(name, k))
        return ablation_row(ablation, name) or ablation_row(baselines, name)

    return claims.Rows(part, cell, KINDS_OF[task])


def table(task: world.Task, ablation: dict[str, Any], baselines: dict[str, Any]) -> str:
    """Every method's row beside UniKE's, as markdown: one-step, then in sequence."""
    kinds = KINDS_OF[task]
    count = claims.COUNTS[len(kinds)]
    head = ["row", "Rel, training split", *(HEADS[k] for k in kinds), f"mean of {count}", "exact Rel", "exact T-Gen"]
    lines = []
    for k in (1, *SEQUENTIAL):
        ours = ablation["rows" if k == 1 else "sequential"]
        for name in (*METHODS, INTRINSIC, "intrinsic + latent-IKE", *UNIKE):
            row = baselines["rows"].get(label(name, k)) or ours.get(label(name, k))
            if row is None:
                continue
            if "na" in row:
                lines.append([name, *["n/a"] * (len(head) - 1)])
                continue
            found = ablation_row({"edits": 0, "rows": {name: row}}, name)
            assert found is not None
            mean = sum(row["metrics"][kind] for kind in kinds) / len(kinds)
            lines.append(
                [
                    label(name, k),
                    number(row.get("training_rel")),
                    *(number(row["metrics"][kind], found.errors[kind]) for kind in kinds),
                    number(mean),
                    *(number(row.get("exact", {}).get(kind)) for kind in ("rel", "t_gen")),
                ]
            )
    return markdown(head, lines)


def searched(task: world.Task, baselines: dict[str, Any]) -> str:
    """What every setting gave on development edits, as markdown."""
    lines, kinds = [], KINDS_OF[task]
    for name, rows in baselines.get("search", {}).items():
        first = asdict(METHODS[name].trials()[0])
        for text, found in rows.items():
            changed = [f"{k} {v}" for k, v in json.loads(text).items() if v != first[k]]
            mean = sum(found.values()) / len(found)
            means = [*(number(found[k]) for k in kinds), number(mean)]
            lines.append([name, ", ".join(changed) or "the emoji models'", *means])
    return markdown(["method", "settings", *(HEADS[k] for k in kinds), "mean"], lines, left=2)
