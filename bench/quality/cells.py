"""What the paper's tables and figures are made of: a cell is one method in one protocol, measured once and saved."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.quality import protocol, world
from bench.quality.ablation import compact, write
from bench.quality.baselines import METHODS
from bench.quality.baselines.ike import Ike
from bench.quality.baselines.learned import TRAINING, fitted
from bench.quality.errors import error_of
from bench.quality.rows import FIGURES, ROWS, Row, default_config
from unike_kernels.evaluation import protocols
from unike_kernels.evaluation.examiner import Examiner
from unike_kernels.evaluation.methods import Method
from unike_kernels.evaluation.metrics import clustered_error, mean_of_five
from unike_kernels.evaluation.protocols import Result
from unike_kernels.evaluation.records import KINDS
from unike_kernels.evaluation.summary import Summary, per_record, score_after

UNIKE = ("UniKE", "UniKE, routed")
# in the order in which they are measured: those that learn nothing beforehand first
TABLE_1 = (*UNIKE, *sorted(METHODS, key=lambda name: METHODS[name].trained))
PROMPTED = ("IKE",)  # acts by the prompt, one edit at a time: not in Tables 2 and 3, as in the paper
STACKED = tuple(name for name in TABLE_1 if name not in PROMPTED)
OF_ROWS: dict[str, Row] = {row.name: row for rows in (ROWS, *FIGURES.values()) for row in rows}


@dataclass(frozen=True)
class Scale:
    """How much is measured; brief: trained baselines learn for this part of their steps (1 / brief)."""

    bases: tuple[int, ...] = (0, 1)
    draws: tuple[int, ...] = (0, 1, 2)  # of the edits and of their order
    edits: int = 200  # one-step, of each task
    stacked: int = 100  # in Tables 2 and 3, of each task
    figure: int = 100
    sequential: tuple[str, ...] = ("name", "caption")
    large: tuple[int, ...] = (100, 1000)  # K of UniKE beside 10 and 20
    brief: int = 1
    quick: bool = False  # a smaller memory
    device: str = "cpu"  # that everything runs on: what is found differs by rounding alone


QUICK = Scale((0,), (0,), edits=8, stacked=20, figure=8, sequential=("name",), large=(40,), brief=40, quick=True)


@dataclass(frozen=True)
class Cell:
    """One method in one protocol on one base model; task "both" is names and captions mixed."""

    base: int
    protocol: str
    k: int
    task: str
    draw: int
    edits: int
    method: str

    @property
    def where(self) -> tuple[str, int, str]:
        """What a table's part is about."""
        return self.protocol, self.k, self.task

    @property
    def drawn(self) -> str:
        """Which edits these are."""
        return f"{self.task} {self.draw} {self.edits}"

    @property
    def key(self) -> str:
        """Its name in a saved file, which is one base model's."""
        return f"{self.protocol}, K = {self.k}, {self.task}, draw {self.draw}, {self.edits} edits: {self.method}"


def needed(tables: Sequence[int], figures: Sequence[str], scale: Scale) -> list[Cell]:
    """The cells of these tables and figures; Table 1's of all draws, one after the other, all else of the first."""
    out = []
    for draw in scale.draws:
        for base in scale.bases:
            at = partial(_cell, base, draw)
            out += [at("one-step", 1, t, scale.edits, m) for t in ("name", "caption") for m in TABLE_1 if 1 in tables]
            if draw == scale.draws[0]:
                if 3 in tables:
                    out += [at("cross-task", 10, "both", scale.stacked, m) for m in STACKED]
                if 2 in tables:
                    out += [
                        at("sequential", k, task, scale.stacked, m)
                        for task in scale.sequential
                        for k in (10, 20)
                        for m in STACKED
                    ]
                rows = [row for name in figures if name in FIGURES for row in FIGURES[name]]
                out += [at("one-step", 1, "name", scale.figure, row.name) for row in rows]
                if 2 in tables:
                    out += [at("sequential", k, "name", max(k, scale.stacked), m) for k in scale.large for m in UNIKE]
    return list(dict.fromkeys(out))


def _cell(base: int, draw: int, protocol: str, k: int, task: str, edits: int, method: str) -> Cell:
    return Cell(base, protocol, k, task, draw, edits, method)


@dataclass(frozen=True)
class Found:
    """A saved row, or several draws of one: percent by kind, the five metrics and "mean", clustered by concept.

    values: by kind, of every edit; labels: which draw and concept each is, so that two rows can be compared edit by
    edit. Both are empty where only means were saved. reason: why there is nothing else. sequences: which draw and
    sequence each edit was in, where edits were on the model together: then an error is the larger of those by concept
    and by sequence, as what one sequence suffers, all in it do.
    """

    edits: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    exact: dict[str, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    values: dict[str, list[float]] = field(default_factory=dict)
    labels: tuple[tuple[str, str], ...] = ()
    sequences: tuple[tuple[str, str], ...] = ()
    reason: str = ""
    draws: int = 1


def saved(results: Sequence[Result], ids: Sequence[str] | None = None) -> dict[str, Any]:
    """What is kept of a cell: means, clustered errors, and every edit's values in tenths of a percent.

    ids: the edits' order, sorted if None. What was not asked of any edit, as pictures of a fact, has a mean of nan.
    """
    summary = Summary.of(results)
    order = sorted(results, key=lambda r: r.id if ids is None else ids.index(r.id))
    clusters, sequences = [r.cluster for r in order], [r.sequence for r in order]
    found = {kind: per_record(order, kind, score_after) for kind in KINDS}
    values = {kind: [found[kind][r.id] for r in order] if found[kind] else [] for kind in KINDS}
    values["mean"] = means_of(values)
    return {
        "edits": len(order),
        "metrics": {kind: sum(v) / len(v) if v else math.nan for kind, v in values.items()},
        "errors": {kind: clustered_error(v, clusters) if v else math.nan for kind, v in values.items()},
        "before": summary.before,
        "exact": summary.exact,
        "own": summary.own,
        "others": summary.others,
        "locality_b": summary.locality_b,
        **compact({kind: values[kind] for kind in KINDS}, clusters),
        **({"sequences": " ".join(map(str, sequences))} if len(set(sequences)) < len(sequences) else {}),
    }


def found_of(rows: Sequence[tuple[str, dict[str, Any]]]) -> Found:
    """One Found of the saved cells of several draws: (the draw's name, what was saved)."""
    reasons = [row["na"] for _, row in rows if "na" in row]
    if reasons:
        return Found(reason=reasons[0])
    values, labels = each(rows)
    sizes = [row["edits"] for _, row in rows]

    def pooled(name: str) -> dict[str, float]:
        kinds = [k for k in rows[0][1][name] if all(k in row[name] for _, row in rows)]
        return {k: sum(n * row[name][k] for n, (_, row) in zip(sizes, rows, strict=True)) / sum(sizes) for k in kinds}

    sequences = sequences_of(rows)
    errors = {kind: error_of(v, labels, sequences) for kind, v in values.items()}
    shares = (pooled(name) for name in ("before", "exact", "own", "others"))
    return Found(sum(sizes), pooled("metrics"), errors, *shares, values, labels, sequences, draws=len(rows))


def sequences_of(rows: Sequence[tuple[str, dict[str, Any]]]) -> tuple[tuple[str, str], ...]:
    """Each edit's (draw, sequence of edits that were on the model together); its concept where it was alone there.

    Empty where all were alone.
    """
    if not any("sequences" in row for _, row in rows):
        return ()
    out: list[tuple[str, str]] = []
    for draw, row in rows:
        out += (
            [(draw, s) for s in row["sequences"].split()] if "sequences" in row else [("", c) for c in _concepts(row)]
        )
    return tuple(out)


def _concepts(row: dict[str, Any]) -> list[str]:
    return row.get("clusters", "").split()


def each(rows: Sequence[tuple[str, dict[str, Any]]]) -> tuple[dict[str, list[float]], tuple[tuple[str, str], ...]]:
    """Every edit's values by kind, "mean" among them, and its (draw, concept); empty where only means were saved."""
    values: dict[str, list[float]] = {kind: [] for kind in KINDS}
    labels: list[tuple[str, str]] = []
    for draw, row in rows:
        if "values" not in row:
            return {}, ()
        for kind in KINDS:
            values[kind] += [int(v) / 10 for v in row["values"][kind].split()]
        labels += [(draw, c) for c in _concepts(row)]
    values["mean"] = means_of(values)
    return values, tuple(labels)


def means_of(values: dict[str, list[float]]) -> list[float]:
    """Every edit's mean of the five metrics; empty where one of them was not asked."""
    if not all(values[kind] for kind in KINDS):
        return []
    return [mean_of_five(*five) for five in zip(*(values[kind] for kind in KINDS), strict=True)]


class Store:
    """Saved cells in a folder, one file a base model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.read: dict[int, tuple[int, dict[str, Any]]] = {}  # by base model: the file's time, and its rows

    def rows(self, base: int) -> dict[str, Any]:
        """Saved cells by key."""
        path = self.folder / f"protocols-seed{base}.json"
        if not path.exists():
            return {}
        time = path.stat().st_mtime_ns
        if base not in self.read or self.read[base][0] != time:
            self.read[base] = time, json.loads(path.read_text())["rows"]
        return self.read[base][1]

    def bases(self) -> list[int]:
        """The base models that anything is saved of."""
        names = sorted(p.stem for p in self.folder.glob("protocols-seed*.json"))
        return [int(name.removeprefix("protocols-seed")) for name in names]

    def add(self, base: int, cell: Cell, row: dict[str, Any]) -> None:
        """Saves a cell, whole or not at all; the file is read anew, as another process may have added to it."""
        rows = self.rows(base) | {cell.key: row | {"cell": asdict(cell)}}
        write(self.folder / f"protocols-seed{base}.json", {"rows": rows})

    def found(
        self, base: int, protocol: str, k: int, task: str, method: str, like: Found | None = None
    ) -> Found | None:
        """All draws of the largest number of edits, or those of `like`; None where nothing is saved."""
        same = {}
        for row in self.rows(base).values():
            cell = Cell(**row["cell"])
            if (*cell.where, cell.method) == (protocol, k, task, method):
                same[cell] = row
        if like is not None:
            drawn = {draw for draw, _ in like.labels}
            same = {cell: row for cell, row in same.items() if cell.drawn in drawn}
        most = max((cell.edits for cell in same), default=0)
        chosen = sorted((cell for cell in same if cell.edits == most), key=lambda cell: cell.draw)
        return found_of([(cell.drawn, same[cell]) for cell in chosen]) if chosen else None


class Bench:
    """One base model, on which any cell can be measured; what a method learns beforehand it learns once."""

    def __init__(self, base: int, scale: Scale) -> None:
        self.base, self.scale = base, scale
        self.editor = world.prepared(base, default_config(), quick=scale.quick, device=scale.device)
        self.examiner = Examiner(self.editor.collator, batch_size=64)
        self.made: dict[str, Method] = {}
        self.training = TRAINING // (8 if scale.quick else 1)

    def method(self, name: str) -> Method:
        """The method of this name, fitted."""
        if name not in self.made:
            self.made[name] = self._make(name)
        return self.made[name]

    def _make(self, name: str) -> Method:
        if name in OF_ROWS:
            return protocol.RowMethod(OF_ROWS[name], self.editor, cache=world.CACHE / "sequences", progress=True)
        config, processor = baseline_config(name, self.scale.brief), self.editor.collator.processor
        return fitted(name, self.editor.model, processor, self.base, config=config, training=self.training)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The cell's row as `saved` has it, or {"na": why} where the method does not apply to this model."""
        method = self.method(cell.method)
        if isinstance(method, Ike) and not method.followed:
            return {"na": method.unfollowed()}
        tasks = protocol.tasks_of(cell.protocol, cell.task, cell.edits, cell.draw)
        plan = protocols.plan(cell.protocol, tasks, k=cell.k, seed=cell.draw)
        about = {"base": self.base, "seed": cell.draw, "training": self.training}
        return saved(protocol.measured(method, self.examiner, plan, about))


def baseline_config(name: str, brief: int) -> Any:
    """The chosen settings; brief above 1: a part of the training steps, for trained methods."""
    config = METHODS[name].trials()[0]
    if brief == 1 or not METHODS[name].trained:
        return config
    steps = {n: max(1, v // brief) for n, v in asdict(config).items() if n in ("steps", "answer_steps")}
    return replace(config, **steps)


def settings(cell: Cell, scale: Scale) -> str:
    """A digest of all that makes the cell another one beside its key: a cell saved with other settings is stale."""
    told: dict[str, Any] = {"brief": scale.brief, "quick": scale.quick}
    if cell.method in OF_ROWS:
        row, base = OF_ROWS[cell.method], default_config()
        config = asdict(replace(base, neurons=row.config(base, None).neurons))
        if not row.routed:  # always on: nothing is routed
            del config["routing"]
        told |= {"row": asdict(row), "config": config}
    else:
        told |= {"config": asdict(baseline_config(cell.method, scale.brief)), "training": TRAINING}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def fill(
    cells: Sequence[Cell],
    store: Store,
    scale: Scale,
    environment: dict[str, str],
    bench: Callable[[int, Scale], Any] = Bench,
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Measures and saves the cells that are not saved yet, one by one; a stop loses the cell it falls into at most.

    What a stop leaves of that cell, edit by edit, is kept apart and read again.
    """
    todo = []
    for cell in cells:
        there = store.rows(cell.base).get(cell.key)
        if there is None or there["settings"] != settings(cell, scale):
            todo.append(cell)
    benches: dict[int, Any] = {}
    for cell in tqdm(todo, desc="rows", unit="row", initial=len(cells) - len(todo), total=len(cells)):
        if cell.base not in benches:
            benches[cell.base] = bench(cell.base, scale)
        row = benches[cell.base].measure(cell)
        row |= {"settings": settings(cell, scale), "taken": environment}
        store.add(cell.base, cell, row)
        yield cell, row
