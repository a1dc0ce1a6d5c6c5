"""The quality benchmark: `python -m bench.quality.run --help`."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from tqdm import tqdm

import unike_kernels
from bench.commit import code
from bench.quality import ablation, cells, encoders, figures, measure, paper_tables, report, speed, tables, tsne
from bench.quality.cells import Scale, Store
from bench.quality.emoji import records
from bench.quality.report import QUICK, RESULTS, TABLES, environment, save, write_report
from bench.quality.rows import default_config
from bench.quality.tables import KINDS
from bench.quality.world import CACHE, with_memory

app = typer.Typer(add_completion=False)


def kept(seed: int, items: list[dict[str, Any]]) -> Path:
    """Where a stopped run of these edits, with these defaults and this code, keeps its finished rows."""
    digest = code(Path(unike_kernels.__file__).parent, Path(__file__).parent)
    told = json.dumps([seed, items, default_config().to_json(), digest], sort_keys=True)
    return CACHE / f"ablation-{hashlib.sha256(told.encode()).hexdigest()[:12]}.json"


def finished(keep: Path | None) -> None:
    """A whole run goes on nowhere: the next one measures anew."""
    if keep is not None:
        keep.unlink(missing_ok=True)


def chosen(named: str, known: Sequence[str], what: str) -> list[str]:
    """Of "1,3" or "all", those known; BadParameter for others."""
    names = list(known) if named == "all" else [n.strip() for n in named.split(",") if n.strip()]
    unknown = [n for n in names if n not in known]
    if unknown:
        raise typer.BadParameter(f"{what} must be some of {', '.join(known)} or all, but got {', '.join(unknown)}")
    return names


def of_paper(wanted: list[str], drawn: list[str], methods: list[str], scale: Scale, console: Console) -> None:
    """Measures what these tables and figures lack, saves it row by row, draws, and writes the report."""
    folder = QUICK if scale.quick else RESULTS
    store = Store(folder)
    needed = [c for c in cells.needed([int(n) for n in wanted], drawn, scale) if not methods or c.method in methods]
    for cell, row in cells.fill(needed, store, scale, environment(scale.device)):
        told = row.get("na") or " / ".join(f"{row['metrics'][k]:.1f}" for k in (*KINDS, "mean"))
        tqdm.write(f"base model {cell.base}: {cell.key}\n  {told}")  # above the progress bars
    if "4" in wanted:
        parts_of_the_method(folder, scale, console)
    for seed in scale.bases:
        if "5a" in drawn and not (folder / f"tsne-seed{seed}.json").exists():
            editor = with_memory(seed, default_config(), quick=scale.quick, device=scale.device)
            save(f"tsne-seed{seed}", tsne.run(editor, seed) | {"environment": environment(scale.device)}, folder)
    redraw(folder)
    told = [text for n, (_, table) in TABLES.items() if str(n) in wanted and (text := table(store))]
    told += [paper_tables.table_4(folder)] if "4" in wanted else []
    console.print("\n\n".join(told), soft_wrap=True)
    console.print(f"report: {write_report(folder)}")


def redraw(folder: Path) -> None:
    """Every figure that something is saved for."""
    for name in figures.NAMES:
        figures.draw(name, folder)


def parts_of_the_method(folder: Path, scale: Scale, console: Console) -> None:
    """Table 4 is made of the ablation's saved results; what is not saved yet is measured as the ablation does it."""
    for task in ("name", "caption"):
        for seed in scale.bases:
            name = f"ablation{'' if task == 'name' else '-caption'}-seed{seed}"
            if not (folder / f"{name}.json").exists():
                items = records.records("reported", task, scale.edits)
                keep = None if scale.quick else kept(seed, items)
                result = ablation.run(seed, items, quick=scale.quick, controls=not scale.quick, keep=keep)
                save(name, result | {"environment": environment(), "split": "reported", "task": task}, folder)
                finished(keep)
                console.print(f"saved: {folder / name}.json")


@app.command()
def main(
    table: Annotated[str, typer.Option(help="The paper's tables: 1, 2, 3 and 4, by comma, or all.")] = "",
    figure: Annotated[str, typer.Option(help="Its figures: 4a, 4b, 4c and 5a, by comma, or all.")] = "",
    speed_: Annotated[bool, typer.Option("--speed", help="Edits per second, against the field's loop.")] = False,
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Of tables, figures and --speed.")] = "cpu",
    methods: Annotated[str, typer.Option(help="These rows of tables only, by semicolon: 'UniKE;UniKE, routed'.")] = "",
    rows: Annotated[
        Literal["ablation", "measure", "encoders"] | None,
        typer.Option(help="measure: 50 development edits; encoders: fitted with other triplets held out."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Base models, by training seed: 0,1 (with --quick 0).")] = None,
    draws: Annotated[str | None, typer.Option(help="Draws of the edits in tables: 0,1,2 (with --quick 0).")] = None,
    edits: Annotated[int | None, typer.Option(help="Edits: a row's, a table's one-step ones per draw.")] = None,
    split: Annotated[Literal["reported", "development"], typer.Option(help="Of rows.")] = "reported",
    task: Annotated[Literal["name", "caption", "rename"], typer.Option(help="Of rows.")] = "name",
    quick: Annotated[bool, typer.Option(help="Few edits and a smaller memory; tables go to results/quick.")] = False,
    controls: Annotated[bool, typer.Option(help="Also the rows that say what a gain comes from.")] = True,
    points: Annotated[str | None, typer.Option(help="With measure: these points only, by comma.")] = None,
    show: Annotated[bool, typer.Option(help="Print the saved results, run nothing.")] = False,
) -> None:
    """Runs a part of the quality benchmark and prints its tables. A stopped run goes on where it was.

    Whole tables take hours: two runs, with --seeds 0 and with --seeds 1, may work side by side.

    Examples:

    python -m bench.quality.run --table all --figure all --quick

    python -m bench.quality.run --table 1

    python -m bench.quality.run --rows ablation --seeds 0
    """
    console = Console()
    wanted, drawn = chosen(table, ("1", "2", "3", "4"), "--table"), chosen(figure, figures.NAMES, "--figure")
    bases = tuple(int(s) for s in (seeds or ("0" if quick and rows is None else "0,1")).split(","))
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(f"--device is cuda, but there is no CUDA device (torch {torch.__version__})")
    if show:
        folder = QUICK if quick else RESULTS
        redraw(folder)
        console.print(Markdown(write_report(folder).read_text(encoding="utf-8")))
        return
    if wanted or drawn:
        scale = replace(cells.QUICK if quick else Scale(), bases=bases, device=device)
        if draws is not None:
            scale = replace(scale, draws=tuple(int(d) for d in draws.split(",")))
        if edits is not None:
            scale = replace(scale, edits=edits, figure=min(edits, scale.figure))
        named = [name.strip() for name in methods.split(";") if name.strip()]
        known = [*cells.OF_ROWS, *cells.METHODS]
        if unknown := [name for name in named if name not in known]:
            raise typer.BadParameter(f"--methods must be some of {'; '.join(known)}, but got {'; '.join(unknown)}")
        of_paper(wanted, drawn, named, scale, console)
    if speed_:
        folder, failed = QUICK if quick else RESULTS, False
        for seed in bases:
            slow = None if device == "cpu" else speed.SLOW
            many = edits or (16 if quick else 128)
            result = speed.run(seed, many, 1 if quick else 3, quick=quick, device=device, slow=slow)
            result |= {"environment": environment(device)}
            save(f"speed{'' if result['device'] == 'cpu' else '-gpu'}-seed{seed}", result, folder)
            console.print(f"{speed.table(result)}\n\n{report.taken(result['environment'])}", soft_wrap=True)
            failed = failed or bool(result["differ"])
        console.print(f"report: {write_report(folder)}")
        if failed:
            raise typer.Exit(1)
    if rows is not None or not (wanted or drawn or speed_):
        of_rows(rows or "ablation", bases, edits or Scale().edits, split, task, quick, controls, points, console)


def of_rows(
    rows: str,
    bases: Sequence[int],
    edits: int,
    split: str,
    task: str,
    quick: bool,
    controls: bool,
    points: str | None,
    console: Console,
) -> None:
    """The ablation, the alternatives that were measured, or the encoders."""
    for seed in bases:
        if rows == "measure":
            some = None if points is None else points.split(",")
            found = measure.run(seed, records.records("development", task, 4 if quick else 50), some)
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
        finished(keep)
    if rows != "measure" and not quick and split == "reported":
        console.print(f"report: {write_report()}")


if __name__ == "__main__":
    app()
