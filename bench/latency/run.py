"""Time the operators and whole decoders: `python -m bench.latency.run`, on the GPU if there is one, else on the CPU.

Every provider passes a correctness gate first. Results go to bench/latency/results/<device>.json, finished cases are
kept, and `--show` prints them again.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from bench.latency import stack as stacks
from bench.latency.cases import OURS, Case, Inputs, cases
from bench.latency.gate import verdict
from bench.latency.goals import goals
from bench.latency.timing import compare, copy_bandwidth, environment, matrix_rate

RESULTS = Path(__file__).parent / "results"
SETS = 4  # input sets in rotation
CACHE = 3 * 60e6  # bytes that the sets have to exceed together: three times an H200's L2
MOST = 2**31  # bytes of inputs in all


def time_case(case: Case, device: torch.device, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """The verdict and the timing of every provider of one case."""
    generator = torch.Generator(device).manual_seed(0)  # a million items take a CPU longer than all the rest
    sets: list[Inputs] = [case.make(generator, dtype, device)]
    size = sum(t.nbytes for t in sets[0].values() if isinstance(t, torch.Tensor))
    wanted = SETS if size * SETS >= CACHE else int(-(-CACHE // max(size, 1)))
    for _ in range(max(1, min(wanted, 16, int(MOST // max(size, 1)))) - 1):
        sets.append(case.make(generator, dtype, device))
    with torch.inference_mode():
        verdicts = {name: verdict(case, name, sets[0]) for name in case.providers}
        if verdicts[OURS] != "exact":
            raise AssertionError(f"{case.name}: {OURS} is not timed, it is wrong: {verdicts[OURS]}")
        fit = [name for name, word in verdicts.items() if word in ("exact", "rounds more", "floor")]
        rivals = {
            name: [lambda inputs=inputs, run=case.providers[name]: run(**inputs) for inputs in sets] for name in fit
        }
        timings = compare(rivals, device, seconds=seconds, capturable=case.capturable)
    return {
        "operator": case.operator,
        "shape": case.shape,
        "sizes": case.sizes,
        "dtype": str(dtype).removeprefix("torch."),
        "moved_bytes": case.moved * dtype.itemsize,
        "flops": case.flops,
        "sets": len(sets),
        "verdicts": verdicts,
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
    }


def run(device: torch.device, file: Path, *, quick: bool, only: str | None, seconds: float) -> dict[str, Any]:
    """Times everything that `file` does not hold yet, and writes it after every case."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    here = {**environment(device), "commit": commit()}
    if results.get("environment") != here:  # figures of another machine or another state are no company for new ones
        results = {"environment": here, "cases": {}, "stacks": {}}
        results["date"] = datetime.date.today().isoformat()
        results["copy_bandwidth"], results["matrix_rate"] = copy_bandwidth(device), matrix_rate(device, dtype)
    todo: list[Any] = [*cases(device, quick), *stacks.stacks(device, quick)]
    todo = [item for item in todo if only is None or only in item.name]
    for item in tqdm(todo, desc=device.type, disable=not sys.stderr.isatty()):
        kind = "cases" if isinstance(item, Case) else "stacks"
        if item.name in results[kind]:
            continue
        if isinstance(item, Case):
            results[kind][item.name] = time_case(item, device, dtype, seconds)
        else:
            timings = stacks.time_stack(item, device, dtype, 4 * seconds)
            results[kind][item.name] = {name: timing.to_dict() for name, timing in timings.items()}
        write(file, results)
        torch._dynamo.reset()  # compiled rivals of one case are of no use to the next
    return results


def commit() -> str:
    """The commit that is measured, "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or "unknown"


def write(file: Path, results: dict[str, Any]) -> None:
    """Replaces the file at once, so that a stopped run leaves the old or the new."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


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
    table = Table(title="one decoding step of a whole decoder, microseconds (median)")
    for head in ("decoder", "unpatched", "patched", "ratio"):
        table.add_column(head, justify="left" if head == "decoder" else "right")
    for name, timings in results["stacks"].items():
        base, patched = (timings[kind]["median"] for kind in ("unpatched", "patched"))
        table.add_row(name, f"{base:.0f}", f"{patched:.0f}", f"{patched / base:.3f}")
    if results["stacks"]:
        console.print(table)
    for line in goals(results):
        console.print(line)


def _cell(case: dict[str, Any], provider: str, ours: float) -> str:
    if provider not in case["timings"]:
        return "wrong" if provider in case["verdicts"] else ""
    time = case["timings"][provider]["fastest"]
    mark = "*" if case["verdicts"][provider] == "rounds more" else ""
    return f"{time:.1f}{mark}" if provider == OURS else f"{time:.1f}{mark} ({time / ours:.2f}x)"


def main() -> None:
    """Parse the command line, time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="one small case of every operator, one decoder")
    parser.add_argument("--only", help="cases and decoders whose name contains this, such as 'cosine_topk opt'")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measurement for each case")
    parser.add_argument("--show", action="store_true", help="print what was measured before")
    parser.add_argument("--out", type=Path, help="the results file")
    args = parser.parse_args()
    device = torch.device(args.device)
    file = args.out or RESULTS / f"{args.device}{'-quick' if args.quick else ''}.json"
    if device.type == "cpu":
        torch.set_num_threads(1)  # two threads on two shared cores give times in steps of the scheduler's
    if not args.show:
        run(device, file, quick=args.quick, only=args.only, seconds=args.seconds)
    elif not file.exists():
        sys.exit(f"there are no results yet: {file}")
    show(json.loads(file.read_text(encoding="utf-8")), Console(width=200 if not sys.stdout.isatty() else None))


if __name__ == "__main__":
    main()
