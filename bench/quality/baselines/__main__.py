"""Trains every baseline and measures it on development edits: `python -m bench.quality.baselines`."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from tqdm import tqdm

from bench.quality.ablation import write
from bench.quality.baselines import METHODS
from bench.quality.baselines.ike import Ike
from bench.quality.baselines.learned import TRAINING, fitted
from bench.quality.baselines.training_split import benchmark_records, training_records
from bench.quality.cells import UNIKE
from bench.quality.emoji import model
from bench.quality.protocol import RowMethod
from bench.quality.rows import ROWS, default_config
from bench.quality.run import RESULTS, environment
from bench.quality.tables import HEADS, markdown, number
from bench.quality.world import prepared
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.evaluation import protocols
from unike_kernels.evaluation.examiner import Examiner
from unike_kernels.evaluation.methods import Edited, Method
from unike_kernels.evaluation.records import KINDS, Record
from unike_kernels.evaluation.summary import Summary

TASKS = ("name", "caption")  # that settings are searched on
app = typer.Typer(add_completion=False)


class Timed(Method):
    """A method with a clock on the making of its edits; the questions do not count."""

    def __init__(self, method: Method) -> None:
        self.method, self.name, self.seconds = method, method.name, 0.0

    def apply(self, requests: Sequence[Sample]) -> AbstractContextManager[Edited]:
        """The method's, timed."""
        return self._timed(self.method.apply(requests))

    def one_step(self, requests: Sequence[Sample]) -> Iterator[AbstractContextManager[Edited]]:
        """The method's, timed."""
        edits = self.method.one_step(requests)
        while True:
            started = time.perf_counter()
            edit = next(edits, None)
            self.seconds += time.perf_counter() - started
            if edit is None:
                return
            yield self._timed(edit)

    @contextmanager
    def _timed(self, edit: AbstractContextManager[Edited]) -> Iterator[Edited]:
        started = time.perf_counter()
        with edit as edited:
            self.seconds += time.perf_counter() - started
            yield edited


def one_step(method: Method, records: Sequence[Record], examiner: Examiner, *, generate: bool = True) -> dict[str, Any]:
    """Every record on its own: what `table` shows, and seconds per edit."""
    timed = Timed(method)
    plan = protocols.plan("one-step", [records])
    found = protocols.run(plan, timed, examiner, generate=generate)
    results = list(tqdm(found, total=len(records), desc=method.name, unit="edit", mininterval=5))
    summary = Summary.of(results)
    return {
        "after": {k: i.mean for k, i in summary.after.items()},
        "before": summary.before,
        "locality_b": summary.locality_b,
        "exact": summary.exact,
        "acts": summary.own,
        "seconds": timed.seconds / len(records),
    }


def only_rel(records: Sequence[Record]) -> list[Record]:
    """The records with the edit itself as their only probe."""
    return [replace(r, probes=r.probes[:1]) for r in records]


class Bench:
    """One base model with what is learned from and what is measured."""

    def __init__(self, seed: int, edits: int, training: int) -> None:
        self.seed = seed
        self.model, self.processor = model.load(seed)
        self.training = training
        # other draws of the training concepts than those that are learned from
        self.seen = only_rel(training_records(edits, seed=1, tasks=("name",)))
        self.development = benchmark_records("development", "name", edits)
        self.examiner = Examiner(Collator(self.model, self.processor))

    def of(self, task: str) -> Bench:
        """The same with development edits of another task."""
        other = copy.copy(self)
        other.development = benchmark_records("development", task, len(self.development))
        return other

    def settings(self, method: Method) -> dict[str, Any]:
        """What a kept result depends on."""
        counts = {"edits": len(self.development), "training": self.training}
        return json.loads(json.dumps({"base": self.seed, "settings": method.settings(), **counts}))

    def measured(self, name: str, config: Any = None, *, whole: bool = True) -> dict[str, Any]:
        """A baseline's row; whole: with the training split and exact match."""
        started = time.perf_counter()
        method = fitted(name, self.model, self.processor, self.seed, config=config, training=self.training)
        out: dict[str, Any] = {"fit_seconds": time.perf_counter() - started}
        if isinstance(method, Ike):
            out |= {"in_context": method.follows, "without": method.without, "shown": method.followed}
            if not method.followed:
                return out
        return out | self.asked(method, self.examiner, whole=whole)

    def asked(self, method: Method, examiner: Examiner, *, whole: bool = True) -> dict[str, Any]:
        """The row of a method that is ready, on the model that `examiner` asks."""
        out = {}
        if whole:
            out["training_rel"] = one_step(method, self.seen, examiner, generate=False)["after"]["rel"]
        return out | one_step(method, self.development, examiner, generate=whole)


def table(rows: dict[str, Any]) -> str:
    """Saved rows as markdown."""
    head = [
        "method",
        "Rel, training split",
        *(HEADS[k] for k in KINDS),
        "mean",
        "T-Loc B",
        "M-Loc B",
        "exact",
        "s / edit",
    ]
    lines = []
    for name, row in rows.items():
        if "after" not in row:
            told = f"{name} (in-context accuracy {100 * row['in_context']:.1f}, without {100 * row['without']:.1f})"
            lines.append([told, *["n/a"] * (len(head) - 1)])
            continue
        lines.append(
            [
                name,
                number(row.get("training_rel")),
                *(number(row["after"][k]) for k in (*KINDS, "mean")),
                *(number(row["locality_b"][k]) for k in ("t_loc", "m_loc")),
                number(row["exact"].get("rel")),
                f"{row['seconds']:.2f}",
            ]
        )
    return markdown(head, lines)


def kept(path: Path) -> dict[str, Any]:
    """A saved file's rows, or none."""
    return json.loads(path.read_text()) if path.exists() else {"rows": {}}


def save(path: Path, name: str, row: dict[str, Any]) -> None:
    """Adds a row to a saved file, or replaces it; a file is one base model's, so that two may be measured at a time.

    A row without an environment of its own was taken in the file's.
    """
    found = kept(path)
    found["rows"][name] = row | {"environment": environment()}
    write(path, found)


def trials_of(seed: int) -> Path:
    """Where the measured settings of one base model are saved."""
    return RESULTS / f"baselines-search-seed{seed}.json"


def search(bench: Bench, names: Sequence[str]) -> None:
    """Measures every method's four settings on development edits of names and of captions; what is saved stays."""
    path = trials_of(bench.seed)
    for name in names:
        for config in METHODS[name].trials():
            for task in TASKS:
                label = trial(name, task, config)
                of = bench.settings(METHODS[name](bench.model, bench.processor, config))
                if kept(path)["rows"].get(label, {}).get("of") != of:
                    save(path, label, bench.of(task).measured(name, config, whole=False) | {"of": of})


def trial(name: str, task: str, config: Any) -> str:
    """What a measured setting is saved under."""
    return f"{name}, {task}: {json.dumps(asdict(config), sort_keys=True)}"


def searched(rows: dict[int, dict[str, Any]], names: Sequence[str], edits: int) -> str:
    """The settings that were measured, as markdown: what each changes of the chosen one, and the means that decide.

    rows: saved ones, by base model; those of another number of edits are left out.
    """
    rows = {s: {name: row for name, row in found.items() if row["of"]["edits"] == edits} for s, found in rows.items()}
    lines = []
    for name in names:
        chosen = asdict(METHODS[name].trials()[0])
        for config in METHODS[name].trials():
            changed = [f"{k} {v}" for k, v in asdict(config).items() if v != chosen[k]]
            after = [found.get(trial(name, task, config), {}).get("after") for found in rows.values() for task in TASKS]
            means = [found["mean"] if found else None for found in after]
            whole = None if None in means else sum(means) / len(means)
            lines.append([name, ", ".join(changed) or "chosen", *map(number, means), number(whole)])
    return markdown(["method", "changed", *(f"{task}s, {seed}" for seed in rows for task in TASKS), "mean"], lines)


def compare(seed: int, bench: Bench, names: Sequence[str], console: Console) -> None:
    """Every method as chosen, beside UniKE always on and routed; finished rows are kept."""
    path = RESULTS / f"baselines-development-seed{seed}.json"
    for name in names:
        if name not in METHODS:
            continue
        of = bench.settings(METHODS[name](bench.model, bench.processor))
        if kept(path)["rows"].get(name, {}).get("of") != of:
            save(path, name, bench.measured(name) | {"of": of})
    if "UniKE" in names:
        editor = prepared(seed, default_config())
        examiner = Examiner(editor.collator)
        for method in (RowMethod(row, editor) for row in ROWS if row.name in UNIKE):
            of = bench.settings(method)
            if kept(path)["rows"].get(method.name, {}).get("of") != of:
                save(path, method.name, bench.asked(method, examiner) | {"of": of})
    rows = kept(path)["rows"]
    order = [*METHODS, "UniKE", "UniKE, routed"]
    console.print(Markdown(table({name: rows[name] for name in order if name in rows})))


@app.command()
def main(
    seeds: Annotated[str, typer.Option(help="Base models, by training seed.")] = "0,1",
    methods: Annotated[str, typer.Option(help="Some of them, divided by a semicolon.")] = ";".join([*METHODS, "UniKE"]),
    edits: Annotated[int | None, typer.Option(help="Development edits: 50, with --search 25.")] = None,
    training: Annotated[int, typer.Option(help="Training-split edits to learn from.")] = TRAINING,
    trials: Annotated[bool, typer.Option("--search", help="Measure every method's four settings instead.")] = False,
) -> None:
    """Trains every baseline and measures one-step edits; what was trained or measured before is kept.

    Example: python -m bench.quality.baselines --seeds 0 --methods "FT;MEND"
    """
    torch.set_num_threads(1)
    console = Console()
    names = [name.strip() for name in methods.split(";")]
    unknown = [name for name in names if name not in (*METHODS, "UniKE")]
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: not among {'; '.join([*METHODS, 'UniKE'])}")
    bases = [int(s) for s in seeds.split(",")]
    edits = (25 if trials else 50) if edits is None else edits
    for seed in bases:
        bench = Bench(seed, edits, training)
        if trials:
            search(bench, [name for name in names if name in METHODS])
        else:
            console.rule(f"base model {seed}: {edits} development edits, one-step, percent")
            compare(seed, bench, names, console)
    if trials:
        found = {seed: kept(trials_of(seed))["rows"] for seed in bases}
        console.print(Markdown(searched(found, [name for name in names if name in METHODS], edits)))


if __name__ == "__main__":
    app()
