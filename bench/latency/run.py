"""Time the operators and whole decoders: `python -m bench.latency.run`, on the GPU if there is one, else on the CPU.

Every provider passes a correctness gate first. Results go to bench/latency/results/<device>.json, finished cases are
kept, so that a run that was stopped, or whose minutes were over, goes on where it was; `--show` prints them again, and
`--plots` draws them (matplotlib). Example: python -m bench.latency.run --only "cosine_topk llama-100m"
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.commit import commit
from bench.latency import stack as stacks
from bench.latency.case import OURS, Case, Inputs
from bench.latency.cases import cases
from bench.latency.gate import verdicts
from bench.latency.goals import goals, ratio
from bench.latency.timing import compare, copy_bandwidth, environment, matrix_rate
from unike_kernels.files import replacing

RESULTS = Path(__file__).parent / "results"
SETS = 4  # input sets in rotation
CACHE = 3 * 60e6  # bytes that the sets have to exceed together: three times an H200's L2
MOST = {"cuda": 2**31, "cpu": 2**30}  # bytes of inputs in all
MINUTES = {"cuda": 8.5, "cpu": 60.0}  # after which nothing new is begun
SECONDS = {"cuda": 0.4, "cpu": 1.0}  # of measurement for each case


def time_case(case: Case, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """The verdict and the timing of every provider of one case."""
    dtype = case.dtype or dtype
    generator = torch.Generator(device).manual_seed(0)  # a million items take a CPU longer than all the rest
    sets: list[Inputs] = [case.make(generator, dtype, device)]
    size = sum(t.nbytes for t in sets[0].values() if isinstance(t, torch.Tensor))
    wanted = SETS if size * SETS >= CACHE else int(-(-CACHE // max(size, 1)))
    for _ in range(max(1, min(wanted, 16, int(MOST[device.type] // max(size, 1)))) - 1):
        sets.append(case.make(generator, dtype, device))
    with torch.inference_mode():
        words = verdicts(case, sets)
        if words[OURS] != "exact":
            raise AssertionError(f"{case.name}: {OURS} is not timed, it is wrong: {words[OURS]}")
        fit = {name: case.providers[name] for name, word in words.items() if word in ("exact", "rounds more", "floor")}
        if device.type == "cuda" and case.eager in fit:  # once more as Python calls it, without a graph
            fit[f"{case.eager}, eager"] = fit[case.eager]
            words[f"{case.eager}, eager"] = words[case.eager]
        rivals = {name: [lambda inputs=inputs, run=run: run(**inputs) for inputs in sets] for name, run in fit.items()}
        timings = compare(rivals, device, seconds=seconds, capturable=case.capturable)
    return {
        "operator": case.operator,
        "shape": case.shape,
        "sizes": case.sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "moved_bytes": case.moved * dtype.itemsize,
        "flops": case.flops,
        "sets": len(sets),
        "verdicts": words,
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
    }


def run(
    device: torch.device, file: Path, *, quick: bool, only: Sequence[str], seconds: float, minutes: float = 1e9
) -> dict[str, Any]:
    """Times everything that `file` does not hold yet, the decoders first, and writes it after every case.

    After `minutes` nothing new is begun; `results["left"]` counts what is still to come.
    """
    end = time.monotonic() + 60 * minutes
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    here = {**environment(device), "commit": commit(Path(__file__).parent)}
    if results.get("environment") != here:  # figures of another machine or another state are no company for new ones
        results = {"environment": here, "cases": {}, "stacks": {}}
        results["date"] = datetime.date.today().isoformat()
        results["copy_bandwidth"], results["matrix_rate"] = copy_bandwidth(device), matrix_rate(device, dtype)
    todo: list[Any] = [*stacks.stacks(device, quick), *cases(device, quick)]
    todo = [item for item in todo if not only or any(words in item.name for words in only)]
    todo = [item for item in todo if item.name not in results["cases" if isinstance(item, Case) else "stacks"]]
    models = stacks.Models()
    for done, item in enumerate(tqdm(todo, desc=device.type, disable=not sys.stderr.isatty())):
        results["left"] = len(todo) - done
        if time.monotonic() > end:
            break
        kind = "cases" if isinstance(item, Case) else "stacks"
        wrong = results.setdefault("wrong", {})
        wrong.pop(item.name, None)
        try:
            if isinstance(item, Case):
                models.model = models.shape = None  # makes room
                results[kind][item.name] = time_case(item, device, dtype, seconds)
            else:
                results[kind][item.name] = stacks.time_stack(item, device, dtype, 4 * seconds, models)
        except Exception as error:  # a wrong result, or a launch that fails, is no reason to time nothing else
            wrong[item.name] = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises again if the GPU itself has failed
        results["left"] = len(todo) - done - 1
        write(file, results)
        torch._dynamo.reset()  # compiled rivals of one case are of no use to the next
    return results


def write(file: Path, results: dict[str, Any]) -> None:
    """Replaces the file at once, so that a stopped run leaves the old or the new."""
    with replacing(file) as half:
        half.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------ tables


def show(results: dict[str, Any], console: Console) -> None:
    """Prints one table per operator, the decoders, and every goal as met, missed or not measured here."""
    where = results["environment"]
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    bandwidth, rate = results["copy_bandwidth"], results["matrix_rate"]
    console.print(
        f"copy {bandwidth / 1e9:.1f} GB/s, matrix product {rate / 1e12:.3f} TFLOP/s (both measured in this run)"
    )
    for operator in dict.fromkeys(case["operator"] for case in results["cases"].values()):
        table = Table(title=f"{operator}: microseconds (fastest), times that of {OURS}")
        table.add_column("shape and sizes")
        chosen = [case for case in results["cases"].values() if case["operator"] == operator]
        providers = list(dict.fromkeys(name for case in chosen for name in case["verdicts"]))
        for provider in providers:
            table.add_column(provider, justify="right")
        table.add_column("of copy", justify="right")
        table.add_column("of matrix", justify="right")
        for case in chosen:
            ours = case["timings"][OURS]["fastest"]
            cells = [_cell(case, provider, ours) for provider in providers]
            sizes = " ".join(f"{key}={value}" for key, value in case["sizes"].items())
            moved = case["moved_bytes"] / (ours * 1e-6) / bandwidth
            done = case["flops"] / (ours * 1e-6) / rate
            table.add_row(f"{case['shape']} {sizes}", *cells, f"{moved:.0%}", f"{done:.0%}")
        console.print(table)
    device = "cuda" if "cuda" in where else "cpu"
    which = "median" if device == "cuda" else "fastest"
    table = Table(title=f"one decoding step, or one prefill, of a whole decoder: microseconds ({which})")
    for head in ("decoder", "unpatched", "patched", "ratio"):
        table.add_column(head, justify="left" if head == "decoder" else "right")
    for name, stack in results["stacks"].items():
        if "left_out" in stack:
            table.add_row(name, "", "", f"left out: {stack['left_out']}")
            continue
        base, patched = (stack["timings"][kind] for kind in ("unpatched", "patched"))
        why = base.get("why") or patched.get("why")
        said = f"not captured: {why}" if why else f"{ratio(stack, device):.3f}"
        table.add_row(name, f"{base[which]:.0f}", f"{patched[which]:.0f}", said)
    if results["stacks"]:
        console.print(table)
    for line in goals(results):
        console.print(line, markup=False)
    for name, why in results.get("wrong", {}).items():
        console.print(f"WRONG: {name}: {why}", markup=False)
    if results.get("left"):
        console.print(f"{results['left']} cases are left: the same command goes on with them")


def _cell(case: dict[str, Any], provider: str, ours: float) -> str:
    if provider not in case["timings"]:
        word = case["verdicts"].get(provider, "")
        return word if not word else "does not run" if word.startswith("does not run") else "wrong"
    time = case["timings"][provider]["fastest"]
    mark = "*" if case["verdicts"][provider] == "rounds more" else ""
    return f"{time:.1f}{mark}" if provider == OURS else f"{time:.1f}{mark} ({time / ours:.2f}x)"


def main() -> None:
    """Parse the command line, time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one small case of every operator, one decoder")
    only = "cases and decoders whose name contains this, such as 'cosine_topk opt'; repeatable"
    parser.add_argument("--only", action="append", default=[], help=only)
    parser.add_argument("--seconds", type=float, help="of measurement for each case (1 on a CPU, 0.4 on a GPU)")
    parser.add_argument("--minutes", type=float, help="after which nothing new is begun (60 on a CPU, 8.5 on a GPU)")
    parser.add_argument("--plots", action="store_true", help="draw the results beside the results file, as PNG")
    parser.add_argument("--show", action="store_true", help="print what was measured before")
    parser.add_argument("--out", type=Path, help="the results file")
    args = parser.parse_args()
    device = torch.device(args.device)
    file = args.out or RESULTS / f"{args.device}{'-quick' if args.quick else ''}.json"
    if device.type == "cpu":
        torch.set_num_threads(1)  # two threads on two shared cores give times in steps of the scheduler's
    if not args.show:
        seconds = SECONDS[args.device] if args.seconds is None else args.seconds
        minutes = MINUTES[args.device] if args.minutes is None else args.minutes
        run(device, file, quick=args.quick, only=args.only, seconds=seconds, minutes=minutes)
    elif not file.exists():
        sys.exit(f"there are no results yet: {file}")
    results = json.loads(file.read_text(encoding="utf-8"))
    show(results, Console(width=200 if not sys.stdout.isatty() else None))
    if args.plots:
        from bench.latency.plots import draw

        for path in draw(results, file.with_suffix("")):
            print(path)
    if results.get("wrong"):
        sys.exit(1)


if __name__ == "__main__":
    main()
