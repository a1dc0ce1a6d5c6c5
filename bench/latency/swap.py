"""How long a model with edits has to stop for other edits: `python -m bench.latency.swap --help`."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import unike_kernels as uk
from bench.latency.shapes import SHAPES
from bench.latency.stack import Stack, make_edits, make_model
from bench.latency.timing import environment

TIMES = 3
app = typer.Typer(add_completion=False)


def best(before: Callable[[], object], act: Callable[[], object], device: torch.device) -> float:
    """The least of TIMES durations of `act`, in milliseconds, each after `before`."""
    found = []
    for _ in range(TIMES):
        before()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(1e3 * (time.perf_counter() - start))
    return min(found)


@app.command()
def main(
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama-100m",
    edits: Annotated[int, typer.Option(min=2, help="Edits on the model.")] = 1_000,
    items: Annotated[int, typer.Option(help="Items of the memory.")] = 10_000,
    device: Annotated[str, typer.Option(help="Where the model is; edits come from the CPU.")] = "cpu",
) -> None:
    """Times `handle.swap` by how much is new, and beside it a patch made anew, which needs as much room twice.

    Random weights and edits, routed, in the last four layers.

    Example: python -m bench.latency.swap --shape tiny-blip2 --edits 100
    """
    if shape not in SHAPES:
        raise typer.BadParameter(f"--shape must be one of {', '.join(SHAPES)}, but is {shape!r}")
    where = torch.device(device)
    model = make_model(SHAPES[shape], torch.bfloat16 if where.type == "cuda" else torch.float32, where)
    generator = torch.Generator(device=where).manual_seed(0)
    stack = Stack(shape, 1, items, edits + 1, True)
    whole, other = (make_edits(model, stack, generator).to("cpu") for _ in range(2))
    others = replace(whole, layers=other.layers)  # of the same memory, as edits of one editor are
    some = whole.select(whole.ids[:edits])
    room = {"max_groups": edits + 1, "max_neurons": max(len(e.keys) for e in whole.layers.values())}
    room["max_items"] = items + edits + 1
    handle = uk.patch(model, some, **room)

    def swapped(to: uk.Edits) -> Callable[[], object]:
        return lambda: handle.swap(to)

    table = Table("change", "ms")
    for name, before, after in (
        ("nothing", some, some),
        ("one edit more", some, whole),
        ("one edit less, of the middle", whole, whole.remove(whole.ids[edits // 2])),
        ("all edits", whole, others),
    ):
        table.add_row(name, f"{best(swapped(before), swapped(after), where):.0f}")
    handle.remove()
    table.add_row(
        "a patch anew", f"{best(lambda: uk.unpatch(model), lambda: uk.patch(model, whole, **room), where):.0f}"
    )
    console = Console()
    console.print(table)
    console.print(f"{stack.name}; {', '.join(f'{key} {value}' for key, value in environment(where).items())}")


if __name__ == "__main__":
    app()
