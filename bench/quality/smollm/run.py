"""The second model's experiments: `python -m bench.quality.smollm.run`; what is finished is kept, and printed again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from bench.quality import ablation, cells
from bench.quality.baselines import METHODS
from bench.quality.report import environment
from bench.quality.rows import FIGURES, ROWS
from bench.quality.world import record, triplets
from unike_kernels.config import NeuronConfig, UnikeConfig

from . import baselines, facts, latent, model, world
from .page import read, where, write_page

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
app = typer.Typer(add_completion=False)


def asked_of(task: world.Task, n: int, dtype: str) -> dict[str, Any]:
    """What a saved result is of; questions: a digest, as rows of other questions are no company for new ones."""
    asked = [world.items(task, n), world.items(task, baselines.DEVELOPMENT, "development")]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
    return {"edits": n, "dtype": dtype, "questions": digest}


def check_saved(path: Path, asked: dict[str, Any]) -> None:
    """Refuses to go on with results of other settings or questions, naming both."""
    found = read(path)
    differing = [f"{k} {found[k]!r}, but {v!r} is asked for" for k, v in asked.items() if found.get(k, v) != v]
    if differing:
        raise typer.BadParameter(f"{path} holds {'; '.join(differing)}: ask for the same, or move the file away")


def note_here(path: Path) -> dict[str, Any]:
    """Adds what is measured from now on to what a saved result says it was taken with; returns the result."""
    result = read(path)
    before = result.setdefault("taken", [result["environment"]] if "environment" in result else [])
    if (here := environment()) not in before:
        before.append(here)
        ablation.write(path, result)
    return result


def run_latent(task: world.Task, n: int, dtype: str) -> None:
    """What a memory item carries, without neurons."""
    path = where(f"latent-{task}")
    asked = asked_of(task, n, dtype)
    check_saved(path, asked)
    items = world.items(task, n)
    net, processor = model.load(trained=task == "pictures")
    net.llama_model.to(DTYPES[dtype])
    fillers = triplets(90)[:1] if task == "pictures" else facts.triplets()[:1]
    experiment = latent.Experiment(net, processor, items, [f | {"prediction": "wrong"} for f in fillers], path)
    experiment.results |= asked | {"environment": environment()}
    experiment.run(latent.points())


def run_ablation(task: world.Task, n: int, dtype: str, controls: bool, rate: float | None) -> None:
    """One-step rows with their controls, routed stacks, and edits one after another."""
    path = where(f"ablation-{task}" if rate is None else f"ablation-{task}-rate-{rate:g}")
    asked = asked_of(task, n, dtype)
    check_saved(path, asked)
    items = world.items(task, n)
    neurons = NeuronConfig() if rate is None else NeuronConfig(lr_keys=rate, lr_values=rate)
    made = world.SmolWorld(task, items, UnikeConfig(neurons=neurons), dtype=DTYPES[dtype])
    if not path.exists():
        about = {"task": task, "environment": environment(), "seed": 0, "seconds": 0.0} | asked
        about |= {} if rate is None else {"rate": rate}
        fits = {str(i): ablation.fit_report(f) for i, f in made.editor.fits.items()}
        ablation.write(path, about | {"rows": {"base": made.score_base()}, "fit": fits})
    note_here(path)
    figures = [row for name in FIGURES for row in FIGURES[name]] if controls else []
    result = ablation.run(0, items, quick=False, controls=controls, keep=path, world=made, more=figures)
    rows = {row.name: row for row in ROWS}
    sequential = result.setdefault("sequential", {})
    for size in baselines.SEQUENTIAL:
        for name in ("intrinsic only", "UniKE"):
            label = baselines.label(name, size)
            if label not in sequential and len(items) >= size:
                sequential[label] = made.sequential(rows[name], size)
                ablation.write(path, result)
        name = baselines.label("UniKE, routed", size)
        if name not in sequential and len(items) >= size:
            row = rows["UniKE, routed"]
            sequential[name] = made.stacked(row, *made.make(row), size)
            ablation.write(path, result)


def run_baselines(task: world.Task, n: int, dtype: str, methods: Sequence[str], search: bool) -> None:
    """The baselines on the ablation's edits, or (search) their settings on development edits.

    Where the model follows IKE's demonstrations, also the paper's row of the neurons with IKE.
    """
    path = where(f"baselines-{task}")
    of = asked_of(task, n, dtype)
    check_saved(path, of)
    if not path.exists():
        ablation.write(path, {"task": task, "rows": {}, "search": {}} | of)
    result = note_here(path)
    bench = baselines.Bench(task, DTYPES[dtype])
    if search:
        baselines.search(bench, methods, result["search"], lambda: ablation.write(path, result))
        return
    searches = [read(where(f"baselines-{t}")).get("search", {}) for t in world.TASKS]
    configs = {name: baselines.chosen(name, searches) for name in methods}
    asked = [record(item) for item in world.items(task, n)]
    baselines.run(bench, asked, configs, result["rows"], lambda: ablation.write(path, result))
    if "follows" in result["rows"].get("IKE", {}) and baselines.INTRINSIC not in result["rows"]:
        bench, method = baselines.with_ike(task, DTYPES[dtype], baselines.chosen("IKE", searches))
        result["rows"][baselines.INTRINSIC] = bench.measured(method, asked)
        ablation.write(path, result)


@app.command()
def main(
    part: Annotated[
        Literal["latent", "ablation", "search", "baselines", "show"],
        typer.Option(help="search: the baselines' settings; show: print what is saved."),
    ] = "show",
    task: Annotated[Literal["pictures", "text"], typer.Option(help="What is edited.")] = "text",
    edits: Annotated[int, typer.Option(help="Edits of the reported split.")] = 40,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the language model.")] = "float32",
    controls: Annotated[bool, typer.Option(help="Also the rows that say what a gain comes from.")] = True,
    rate: Annotated[float | None, typer.Option(help="Of keys and values of always-on rows, if another.")] = None,
    methods: Annotated[str, typer.Option(help="These baselines only, by semicolon: 'FT;IKE'.")] = "",
) -> None:
    """Runs one experiment on one task; a stopped run goes on with the same command.

    Example: python -m bench.quality.smollm.run --part latent --task text
    """
    torch.set_num_threads(1)
    if part == "latent":
        run_latent(task, edits, dtype)
    elif part == "ablation":
        run_ablation(task, edits, dtype, controls, rate)
    elif part in ("search", "baselines"):
        named = [name.strip() for name in methods.split(";") if name.strip()] or list(cells.TABLE_1[2:])
        if unknown := [name for name in named if name not in METHODS]:
            raise typer.BadParameter(f"--methods must be some of {'; '.join(METHODS)}, but got {'; '.join(unknown)}")
        run_baselines(task, edits, dtype, named, part == "search")
    path = write_page()
    Console().print(Markdown(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    app()
