"""The second model's experiments: `python -m bench.quality.smollm.run`; what is finished is kept, and printed again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from bench.quality import ablation, cells, claims, tables
from bench.quality.baselines import METHODS
from bench.quality.report import RESULTS, environment, taken
from bench.quality.rows import FIGURES, ROWS
from bench.quality.world import record, triplets
from unike_kernels.config import NeuronConfig, UnikeConfig

from . import baselines, facts, latent, model, world

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEQUENTIAL = (10, 20)
PAGE = RESULTS / "smollm.md"
TITLES = {
    "pictures": "names of things that were never named from a picture",
    "text": "counterfactual capitals and languages of countries, text only",
}
app = typer.Typer(add_completion=False)


def where(name: str) -> Path:
    """The file of one experiment's results."""
    return RESULTS / f"smollm-{name}.json"


def check_saved(path: Path, **asked: Any) -> None:
    """Refuses to go on with results of other settings, naming both."""
    found = json.loads(path.read_text()) if path.exists() else {}
    differing = [f"{k} {found[k]!r}, but {v!r} is asked for" for k, v in asked.items() if found.get(k, v) != v]
    if differing:
        raise typer.BadParameter(f"{path} holds {'; '.join(differing)}: ask for the same, or move the file away")


def run_latent(task: world.Task, n: int, dtype: str) -> None:
    """What a memory item carries, without neurons."""
    path = where(f"latent-{task}")
    check_saved(path, edits=n, dtype=dtype)
    items = world.items(task, n)
    net, processor = model.load(trained=task == "pictures")
    net.llama_model.to(DTYPES[dtype])
    fillers = triplets(90)[:1] if task == "pictures" else facts.triplets()[:1]
    experiment = latent.Experiment(net, processor, items, [f | {"prediction": "wrong"} for f in fillers], path)
    experiment.results |= {"edits": n, "dtype": dtype, "environment": environment()}
    experiment.run(latent.points())


def run_ablation(task: world.Task, n: int, dtype: str, controls: bool, rate: float | None) -> None:
    """One-step rows with their controls, routed stacks, and edits one after another."""
    path = where(f"ablation-{task}" if rate is None else f"ablation-{task}-rate-{rate:g}")
    check_saved(path, edits=n, dtype=dtype)
    items = world.items(task, n)
    neurons = NeuronConfig() if rate is None else NeuronConfig(lr_keys=rate, lr_values=rate)
    made = world.SmolWorld(task, items, UnikeConfig(neurons=neurons), dtype=DTYPES[dtype])
    if not path.exists():
        about = {"task": task, "dtype": dtype, "environment": environment(), "seed": 0, "edits": n, "seconds": 0.0}
        about |= {} if rate is None else {"rate": rate}
        fits = {str(i): ablation.fit_report(f) for i, f in made.editor.fits.items()}
        ablation.write(path, about | {"rows": {"base": made.score_base()}, "fit": fits})
    figures = [row for name in FIGURES for row in FIGURES[name]] if controls else []
    result = ablation.run(0, items, quick=False, controls=controls, keep=path, world=made, more=figures)
    rows = {row.name: row for row in ROWS}
    sequential = result.setdefault("sequential", {})
    for size in SEQUENTIAL:
        for name in ("intrinsic only", "UniKE"):
            if f"{name}, K = {size}" not in sequential and len(items) >= size:
                sequential[f"{name}, K = {size}"] = made.sequential(rows[name], size)
                ablation.write(path, result)
        name = f"UniKE, routed, K = {size}"
        if name not in sequential and len(items) >= size:
            row = rows["UniKE, routed"]
            sequential[name] = made.stacked(row, *made.make(row), size)
            ablation.write(path, result)


def run_baselines(task: world.Task, n: int, dtype: str, methods: Sequence[str], search: bool) -> None:
    """The baselines on the ablation's edits, or (search) their settings on development edits."""
    path = where(f"baselines-{task}")
    check_saved(path, edits=n, dtype=dtype)
    result = read(path) or {"task": task, "edits": n, "dtype": dtype, "rows": {}, "search": {}}
    result["environment"] = environment()
    bench = baselines.Bench(task, DTYPES[dtype])
    if search:
        baselines.search(bench, methods, result["search"], lambda: ablation.write(path, result))
        return
    searches = [read(where(f"baselines-{t}")).get("search", {}) for t in world.TASKS]
    configs = {name: baselines.chosen(name, searches) for name in methods}
    asked = [record(item) for item in world.items(task, n)]
    baselines.run(bench, asked, configs, result["rows"], lambda: ablation.write(path, result))


def read(path: Path) -> dict[str, Any]:
    """A saved result, or nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


def baselines_section(task: world.Task) -> list[str]:
    """One task's baselines and claims."""
    parts, found = read(where(f"ablation-{task}")), read(where(f"baselines-{task}"))
    if not parts or not found.get("rows"):
        return []
    told = [f"{name}: n/a, {row['na']}." for name, row in found["rows"].items() if "na" in row]
    told += [
        f"{name}: of the tokens of training-split edits {row['follows']:.1f} % are right with the answer in the "
        f"prompt, {row['without']:.1f} without."
        for name, row in found["rows"].items()
        if "follows" in row
    ]
    return [
        f"## Baselines: {TITLES[task]}",
        f"The {found['edits']} edits of the ablation, language model in {found['dtype']}; sequences in its order. "
        f"{taken(found['environment'])}",
        baselines.table(task, parts, found),
        *told,
        *(["Settings, on development edits:", baselines.searched(found)] if found["search"] else []),
        f"## The paper's claims: {TITLES[task]}",
        claims.table(claims.of_rows(baselines.rows_of(task, parts, found))),
    ]


def ablation_section(result: dict[str, Any]) -> str:
    """One task's tables."""
    rate = f", always on at a rate of {result['rate']:g}" if "rate" in result else ""
    parts = [
        f"## Edits: {TITLES[result['task']]}{rate}",
        f"{result['edits']} edits, language model in {result['dtype']}; in percent, standard errors clustered by "
        "concept, controls in italics, locality A unless B is named.",
        tables.five_metrics(result),
        "Locality A by part; alpha averaged over layers; how often an edit acted on a probe, in percent.",
        tables.localities(result),
    ]
    if result.get("sequential"):
        head = ["many edits on one model", *(tables.HEADS[k] for k in tables.KINDS)]
        rows = [
            [name, *(tables.number(row["metrics"][k], row["errors"][k]) for k in tables.KINDS)]
            for name, row in result["sequential"].items()
        ]
        parts += ["All edits of a chunk applied, then all tested.", tables.markdown(head, rows)]
    return "\n\n".join(parts)


def knowledge_section(result: dict[str, Any]) -> str:
    """What the model knows, as a table."""
    parts = [(dtype, result[name]) for name, dtype in result["dtype"].items()]
    rows = [[label, tables.number(v), dtype] for dtype, part in parts for label, v in part.items()]
    return "\n\n".join(["## What it knows", tables.markdown(["asked", "right, %", "language model in"], rows)])


def write_page() -> Path:
    """results/smollm.md from everything that is saved, and results/smollm-notes.md, which is written by hand."""
    parts = [
        "# The second model: SmolLM2-135M-Instruct behind a MiniGPT-4 layout",
        "Made by `python -m bench.quality.smollm.run`.",
    ]
    notes = RESULTS / "smollm-notes.md"
    if notes.exists():
        parts.append(notes.read_text(encoding="utf-8").rstrip())
    known = model.weights_file().with_suffix(".json")
    if known.exists():
        parts.append(knowledge_section(json.loads(known.read_text())))
    for task in world.TASKS:
        path = where(f"latent-{task}")
        if path.exists():
            found = json.loads(path.read_text())
            items = world.items(task, found["edits"])
            parts += [
                f"## Does the memory carry knowledge? ({task})",
                f"{found['edits']} edits, no neurons, K = 1, language model in {found['dtype']}; gains in mean "
                "log-likelihood of a target token, paired, with standard errors.",
            ]
            for kind in ("rel", "t_gen", "m_gen"):
                if kind in found["base"]:
                    parts += [f"{tables.HEADS[kind]}:", latent.table(found, items, kind)]
    for task in world.TASKS:
        for path in sorted(RESULTS.glob(where(f"ablation-{task}*").name), key=lambda path: len(path.name)):
            parts.append(ablation_section(json.loads(path.read_text())))
    for task in world.TASKS:
        parts += baselines_section(task)
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return PAGE


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
