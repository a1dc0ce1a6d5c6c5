"""The quality benchmark: `python -m bench.quality.run --rows ablation`."""

import hashlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from bench.quality import ablation, encoders, measure, tables
from bench.quality.emoji import records
from bench.quality.rows import default_config
from bench.quality.world import CACHE, with_memory

RESULTS = Path(__file__).parent / "results"
app = typer.Typer(add_completion=False)


def environment() -> dict[str, str]:
    """Where the figures were taken."""
    import transformers

    here = Path(__file__).parent
    asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return {
        "commit": asked.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Writes results/<name>.json, whole or not at all."""
    path = RESULTS / f"{name}.json"
    ablation.write(path, result)
    return path


def kept(seed: int, items: list[dict[str, Any]]) -> Path:
    """Where a stopped run of these edits, with these defaults, keeps its finished rows."""
    told = json.dumps([seed, items, default_config().to_json()], sort_keys=True)
    return CACHE / f"ablation-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json"


def saved(kind: str) -> list[dict[str, Any]]:
    """The saved results of a kind, by base model."""
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{kind}-seed*.json"))]


def taken(result: dict[str, Any]) -> str:
    """Where a result was taken, as a sentence."""
    return f"Taken with {', '.join(f'{k} {v}' for k, v in sorted(result['environment'].items()))}."


def write_report() -> Path:
    """results/README.md from all that is saved, and results/notes.md, which is written by hand."""
    parts = ["# Ablation on the emoji world", "Made by `python -m bench.quality.run --rows ablation`."]
    for result in saved("ablation"):
        parts += [tables.report(result), taken(result)]
    parts.append((RESULTS / "notes.md").read_text(encoding="utf-8").rstrip())
    for result in saved("encoders"):
        parts += [tables.encoders(result), taken(result)]
    out = RESULTS / "README.md"
    out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return out


@app.command()
def main(
    rows: Annotated[
        Literal["ablation", "measure", "encoders"],
        typer.Option(help="measure: 50 development edits; encoders: fitted with other triplets held out."),
    ] = "ablation",
    seeds: Annotated[str, typer.Option(help="Base models, by training seed.")] = "0,1",
    edits: Annotated[int, typer.Option(help="Edits of the chosen split.")] = 300,
    split: Annotated[Literal["reported", "development"], typer.Option()] = "reported",
    task: Annotated[Literal["name", "caption", "rename"], typer.Option()] = "name",
    quick: Annotated[bool, typer.Option(help="40 edits, a smaller memory, nothing saved.")] = False,
    controls: Annotated[bool, typer.Option(help="Also the rows that say what a gain comes from.")] = True,
    points: Annotated[str | None, typer.Option(help="With measure: these points only, by comma.")] = None,
    show: Annotated[bool, typer.Option(help="Print the saved results, run nothing.")] = False,
) -> None:
    """Runs a part of the quality benchmark and prints its tables; 300 edits take about half an hour a model on 2 cores.

    Example: python -m bench.quality.run --rows ablation --seeds 0 --quick
    """
    console = Console()
    if show:
        console.print(Markdown(write_report().read_text()))
        return
    for seed in (int(s) for s in seeds.split(",")):
        if rows == "measure":
            chosen = None if points is None else points.split(",")
            found = measure.run(seed, records.records("development", task, 4 if quick else 50), chosen)
            console.print(tables.variants(found), soft_wrap=True)
            continue
        if rows == "encoders":
            editor = with_memory(seed, default_config(), quick=quick)
            result = encoders.run(editor, seed) | {"environment": environment()}
            console.print(tables.encoders(result), soft_wrap=True)
            if not quick:
                console.print(f"saved: {save(f'encoders-seed{seed}', result)}")
            continue
        items = records.records(split, task, 40 if quick else edits)
        keep = None if quick else kept(seed, items)
        result = ablation.run(seed, items, quick=quick, controls=controls, keep=keep) | {"environment": environment()}
        result |= {"split": split, "task": task}
        console.print(tables.report(result), soft_wrap=True)
        if not quick and split == "reported":
            suffix = "" if task == "name" else f"-{task}"
            console.print(f"saved: {save(f'ablation{suffix}-seed{seed}', result)}")
    if rows != "measure" and not quick and split == "reported":
        console.print(f"report: {write_report()}")


if __name__ == "__main__":
    app()
