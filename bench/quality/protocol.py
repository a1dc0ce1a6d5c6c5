"""Any method of the benchmark through the library's protocols: `python -m bench.quality.protocol --help`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

import unike_kernels
from bench.commit import code
from bench.quality import world
from bench.quality.baselines import METHODS
from bench.quality.baselines.learned import TRAINING, fitted
from bench.quality.rows import CONTROLS, ROWS, Row, RowEditor, default_config
from unike_kernels.editing.editor import Editor
from unike_kernels.edits import Edits
from unike_kernels.evaluation import protocols
from unike_kernels.evaluation.examiner import Examiner
from unike_kernels.evaluation.methods import Method
from unike_kernels.evaluation.records import Record
from unike_kernels.evaluation.runs import Run
from unike_kernels.evaluation.summary import Summary, retention, table
from unike_kernels.evaluation.unike import Unike
from unike_kernels.patching import PatchHandle

app = typer.Typer(add_completion=False)


class RowMethod(Unike):
    """A row of the ablation as a method: the row's settings, and its control on every patch."""

    def __init__(self, row: Row, like: Editor, **options: Any) -> None:
        """like: the prepared editor of the base model."""
        if row.alpha == "mean":
            raise ValueError(f"{row.name!r} needs the mean alpha of another row: run the ablation")
        fresh = RowEditor(like.model, like.collator.processor, like.config)
        self.row = row
        super().__init__(
            fresh.prepare(row, like), routing="routed" if row.routed else "always", name=row.name, **options
        )

    def settings(self) -> dict[str, Any]:
        """The row's, and how large the memory and the calibration are."""
        states, cases = self.editor.states, self.editor.cases
        sizes = {"memory": len(states.kept) if states else 0, "cases": 0 if cases is None else len(cases)}
        return super().settings() | {"row": asdict(self.row)} | sizes

    def patched(self, edits: Edits) -> PatchHandle:
        """The edits on the model, with the row's control."""
        assert isinstance(self.editor, RowEditor)
        return self.editor.controlled(super().patched(edits))


def names() -> list[str]:
    """Every method that can be asked for."""
    return [*(r.name for r in (*ROWS, *CONTROLS) if r.alpha != "mean"), *METHODS]


def method(name: str, editor: Editor, seed: int, training: int = TRAINING) -> Method:
    """The method of this name on the editor's base model `seed`; trained ones learn, or load what they learned."""
    for row in (*ROWS, *CONTROLS):
        if row.name == name:
            return RowMethod(row, editor, cache=world.CACHE / "sequences", progress=True)
    if name not in METHODS:
        raise ValueError(f"the method must be one of {', '.join(names())}, but is {name!r}")
    return fitted(name, editor.model, editor.collator.processor, seed, training=training)


def measured(
    method: Method, examiner: Examiner, plan: protocols.Plan, about: dict[str, Any], *, progress: bool = True
) -> list[protocols.Result]:
    """The plan's results, one by one on disk below `world.CACHE`; a stopped run goes on, a finished one is read.

    Both only with the code that began it. about: what else makes a run another one: base model and seed of the order.
    """
    asked = [(r.id, r.request.prompt, r.request.target, len(r.probes)) for r in plan.records]
    records = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]
    settings = about | {"protocol": plan.name, "k": plan.k, "records": records}
    settings |= {"code": code(Path(unike_kernels.__file__).parent, Path(__file__).parent)}
    settings |= {"method": {"name": method.name, **method.settings()}}
    folder = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    run = Run(world.CACHE / "runs" / folder, settings)
    left = len(plan.records) - len(run.done)
    bar = tqdm(total=len(plan.records), initial=len(run.done), desc=method.name, unit="edit", disable=not progress)
    with bar:
        for result in protocols.run(plan, method, examiner, done=run.done) if left else ():
            run.append(result)
            bar.update()
    return run.results


def tasks_of(protocol: str, task: str, edits: int, seed: int) -> list[Sequence[Record]]:
    """Reported edits of the task; in cross-task, of names and of captions, so many of each."""
    chosen = ("name", "caption") if protocol == "cross-task" else (task,)
    return [world.edits("reported", t, edits, seed) for t in chosen]


@app.command()
def main(
    methods: Annotated[list[str] | None, typer.Option("--method", help="May be given again; all rows if not.")] = None,
    protocol: Annotated[str, typer.Option(help="one-step, sequential or cross-task.")] = "one-step",
    k: Annotated[int, typer.Option("-k", help="Edits on the model together.")] = 1,
    task: Annotated[str, typer.Option(help="name, caption or rename.")] = "name",
    edits: Annotated[int, typer.Option(help="Of each task.")] = 200,
    base: Annotated[int, typer.Option(help="Base model, by training seed.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the edits and of their order.")] = 0,
    rate: Annotated[float | None, typer.Option(help="false_accept_rate of routed rows, if another.")] = None,
    quick: Annotated[bool, typer.Option(help="A smaller memory, and 200 training edits.")] = False,
) -> None:
    """Runs methods through a protocol on the emoji world and prints what comes out; stopped, it goes on.

    Example: python -m bench.quality.protocol --method "UniKE, routed" --protocol sequential -k 100
    """
    config = default_config()
    if rate is not None:
        config = replace(config, routing=replace(config.routing, false_accept_rate=rate))
    editor = world.prepared(base, config, quick=quick)
    examiner = Examiner(editor.collator, batch_size=64)
    plan = protocols.plan(protocol, tasks_of(protocol, task, edits, seed), k=k, seed=seed)
    for name in methods or names():
        found = measured(
            method(name, editor, base, 200 if quick else TRAINING), examiner, plan, {"base": base, "seed": seed}
        )
        typer.echo(f"\n{name}, {protocol}, K = {k}\n{Summary.of(found)}")
        if k > 1:
            typer.echo(f"\n{table(retention(found, k), 'edits made since')}")


if __name__ == "__main__":
    app()
