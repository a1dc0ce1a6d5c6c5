"""A benchmark's files and a model's name to a table: what `unike-kernels evaluate` does."""

import hashlib
import json
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ..config import UnikeConfig
from ..editing.checks import check_inputs
from ..editing.editor import Editor
from ..editing.inputs import Sample
from ..editing.loading import load
from ..edits_schema import package_version
from ..files import replacing
from . import datasets, protocols
from .examiner import Examiner
from .pictures import resolve
from .prompts import check_style, prompt_style
from .records import KINDS, LOCAL, Record, without_seen
from .runs import Run, check, claim
from .summary import NAMES, Summary, retention, table
from .unike import Unike

MEMORY = "memory"  # in the output folder: the extracted states, and the fitted editor
METRICS = (*KINDS, datasets.PORTABILITY)


@dataclass(frozen=True)
class Job:
    """Everything that was asked for; paths as given."""

    model: str
    data: Sequence[Path]
    train_data: Sequence[Path]
    images: Path
    out: Path
    protocol: str = "one-step"
    k: int | None = None  # None: 1 in one-step, otherwise 10
    routing: Literal["always", "routed"] = "always"
    prompts: str = "auto"
    metrics: Sequence[str] = METRICS
    limit: int | None = None
    seeds: Sequence[int] = (0,)
    memory: int = 2000  # training records that the memory is built from, at most
    config: UnikeConfig | None = None
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 16
    generate: bool = True
    progress: bool = True

    @property
    def together(self) -> int:
        """K: how many edits are on the model together."""
        return self.k if self.k is not None else 1 if self.protocol == "one-step" else 10


def run(job: Job, say: Callable[[str], None]) -> list[Summary]:
    """Runs the job, or the rest of it, and says what it finds; one Summary per seed.

    Everything that can be wrong with files and folders is checked before the model is loaded. Raises ValueError (and
    its kinds: DatasetError, OtherRunError) and MissingPicturesError.
    """
    unknown = [m for m in job.metrics if m not in METRICS]
    if unknown:
        raise ValueError(f"metrics must be some of {', '.join(METRICS)}, but got {', '.join(unknown)}")
    read, train = _read(job.data), _read(job.train_data)
    _report(read, train, say)
    _check_pictures(read, train, job)
    protocols.plan(job.protocol, [_blank(d) for d in read], k=job.together, limit=job.limit)
    if not train:
        raise ValueError("the memory needs training data: a file of the training split")
    check_style(job.prompts)
    asked = _asked(job)
    check(job.out, asked)

    model, processor = load(job.model, dtype=job.dtype, device=job.device)
    tasks = [_records(d, job, processor, job.metrics) for d in read]
    editor = Editor(model, processor, job.config)
    known = [r for d in train for r in _records(d, job, processor, _learned_from(job))]
    settings = asked | _found(job, editor)
    claim(job.out, settings)
    runs = {seed: Run(job.out / f"seed{seed}", settings | {"seed": seed}) for seed in job.seeds}
    method = Unike(editor, routing=job.routing, cache=job.out / "sequences", progress=job.progress)
    plans = {
        seed: protocols.plan(job.protocol, tasks, k=job.together, seed=seed, limit=job.limit) for seed in job.seeds
    }
    lacking = {r.id: r for seed, plan in plans.items() for r in plan.records if r.id not in runs[seed].done}
    if lacking:
        _check_inputs(editor, list(lacking.values()), job, free=job.generate)
        _learn(method, known, [r for t in tasks for r in t], job, say)
    examiner = Examiner(editor.collator, batch_size=job.batch_size)
    found = []
    for seed, plan in plans.items():
        if plan.left_out:
            say(f"seed {seed}: {plan.left_out} records are left out, too few for another sequence of {plan.k}")
        _fill(runs[seed], plan, method, examiner, job)
        summary = Summary.of(runs[seed].results)
        found.append(summary)
        text = tell(summary, runs[seed], plan)
        with replacing(runs[seed].folder / "summary.txt") as half:
            half.write_text(text + "\n", encoding="utf-8")
        say(f"\n{method.name}, {plan.name}, K = {plan.k}, seed {seed}\n{text}")
    if len(found) > 1:
        say(f"\n{across(found)}")
    say(f"\nresults of every sample: {', '.join(str(r.folder / 'samples.jsonl') for r in runs.values())}")
    return found


def tell(summary: Summary, run: Run, plan: protocols.Plan) -> str:
    """The tables of one run: the five metrics, of each task where there are several, and what stayed by age."""
    parts = [str(summary)]
    tasks = list(dict.fromkeys(r.task for r in run.results))
    if len(tasks) > 1:
        for task in tasks:
            parts.append(f"{task}\n{Summary.of([r for r in run.results if r.task == task])}")
    if plan.k > 1:
        parts.append(table(retention(run.results, plan.k), "edits made since"))
    return "\n\n".join(parts)


def across(found: Sequence[Summary]) -> str:
    """Mean and standard deviation over seeds of every metric after the edit."""
    kinds = [k for k in NAMES if all(k in s.after for s in found)]
    values = {k: [s.after[k].mean for s in found] for k in kinds}
    rows = [
        ("mean", {k: f"{statistics.mean(v):.1f}" for k, v in values.items()}),
        ("standard deviation", {k: f"{statistics.stdev(v):.1f}" for k, v in values.items()}),
    ]
    return table(rows, f"percent, {len(found)} seeds")


def _read(paths: Sequence[Path]) -> list[datasets.Dataset]:
    """The files' records; files of one name are numbered, so that no two records have one id."""
    stems = [p.stem for p in paths]
    return [datasets.read(p, name=p.stem if stems.count(p.stem) == 1 else f"{p.stem}.{n}") for n, p in enumerate(paths)]


def _report(read: Sequence[datasets.Dataset], train: Sequence[datasets.Dataset], say: Callable[[str], None]) -> None:
    for dataset in (*read, *train):
        say(str(dataset))
    for known in train:
        for dataset in read:
            if known.task == dataset.task:
                say(f"{dataset.name} and {known.name}: {datasets.overlap(known, dataset)}")


def _check_pictures(read: Sequence[datasets.Dataset], train: Sequence[datasets.Dataset], job: Job) -> None:
    """One error for all files together."""
    names = [n for d in read for n in d.pictures(job.metrics)]
    resolve([*names, *(n for d in train for n in d.pictures(_learned_from(job)))], job.images)


def _learned_from(job: Job) -> tuple[str, ...]:
    """Kinds of the training records' probes that are learned from: those of locality calibrate routing.

    Rephrasings, and other pictures, tell a router what it has to look past; pictures only where M-Gen needs them too.
    """
    if job.routing == "always":
        return LOCAL
    return (*LOCAL, "t_gen", "m_gen") if "m_gen" in job.metrics else (*LOCAL, "t_gen")


def _blank(dataset: datasets.Dataset) -> list[Record]:
    """Records without pictures, to see whether the protocol can be run."""
    return [Record(e.id, Sample(e.prompt), ()) for e in dataset.entries]


def _records(dataset: datasets.Dataset, job: Job, processor: Any, kinds: Sequence[str]) -> list[Record]:
    return dataset.records(prompt_style(job.prompts, dataset.task, processor), job.images, kinds)


def _asked(job: Job) -> dict[str, Any]:
    """What makes a run another one, as far as the job tells; where pictures lie and the batch size do not."""
    return {
        "version": package_version(),
        "data": [[p.name, _digest(p)] for p in job.data],
        "train_data": [[p.name, _digest(p)] for p in job.train_data],
        "protocol": job.protocol,
        "k": job.together,
        "limit": job.limit,
        "prompts": job.prompts,
        "metrics": sorted(job.metrics),
        "generate": job.generate,
        "memory": job.memory,
        "method": {"name": "UniKE", "routing": job.routing, "config": (job.config or UnikeConfig()).to_json()},
    }


def _found(job: Job, editor: Editor) -> dict[str, Any]:
    """What makes a run another one, as the loaded model tells it."""
    base = editor.base
    probe = hashlib.sha256(json.dumps(base.to_json(), sort_keys=True).encode()).hexdigest()[:12]
    return {
        "model": {"name": job.model, "class": type(editor.model).__name__, "weights": probe},
        "processor": editor.collator.fingerprint(),
        "dtype": str(editor.collator.dtype).removeprefix("torch."),
        "device": editor.collator.device.type,
    }


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _learn(method: Unike, known: list[Record], asked: Sequence[Record], job: Job, say: Callable[[str], None]) -> None:
    """Memory, encoders and calibration, from the training records that ask nothing that is evaluated."""
    saved = job.out / MEMORY / "editor.safetensors"
    if saved.exists():
        method.editor.load(saved)
        say(f"memory and encoders as saved in {saved}")
        return
    known, records, probes = without_seen(known, asked)
    if records or probes:
        say(f"left out of training, since they are evaluated: {records} records and {probes} locality questions")
    chosen = random.Random(0).sample(known, min(job.memory, len(known)))
    _check_inputs(method.editor, chosen, job, free=False)
    method.fit(chosen, cache=job.out / MEMORY)
    method.editor.save(saved)


def _check_inputs(editor: Editor, records: Sequence[Record], job: Job, *, free: bool) -> None:
    """ValueError or OSError, in the name of the record, where the model cannot take what one asks.

    free: whether its questions may be answered freely too.
    """
    collator, decoder = editor.collator, editor.decoder
    names = [f"record {r.id!r}" for r in records]
    check_inputs(collator, decoder, [r.request for r in records], names.__getitem__, eos=True, progress=job.progress)
    names = [f"the {p.kind} question of record {r.id!r}" for r in records for p in r.probes]
    samples = [p.sample for r in records for p in r.probes]
    answered = range(len(samples)) if free else ()
    check_inputs(collator, decoder, samples, names.__getitem__, answered=answered, progress=job.progress)


def _fill(run: Run, plan: protocols.Plan, method: Unike, examiner: Examiner, job: Job) -> None:
    """Computes what the run lacks, with a progress bar."""
    ids = {r.id for r in plan.records}
    with tqdm(
        total=len(ids), initial=len(ids & run.done), desc="records", unit="record", disable=not job.progress
    ) as bar:
        for result in protocols.run(plan, method, examiner, done=run.done, generate=job.generate):
            run.append(result)
            bar.update()
