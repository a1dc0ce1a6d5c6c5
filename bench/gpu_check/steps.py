"""The steps: commands with a time limit each, side by side where nothing is timed; results are on disk after each."""

import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from bench.commit import commit
from bench.gpu_check.small import DTYPES
from bench.latency.run import write

ROOT = Path(__file__).resolve().parents[2]
TAIL = 3000  # characters kept of what a step printed
GRACE = 15.0  # seconds in which a step that is interrupted may tell what it had found


@dataclass(frozen=True)
class Step:
    """One command. missing: why it cannot run here, which counts as failed; report: a JSON file that it writes.

    beside: it may share the GPU with its neighbours in the list, since it times nothing.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    beside: bool = False
    missing: str | None = None
    report: Path | None = None
    environment: tuple[tuple[str, str], ...] = ()


def steps() -> list[Step]:
    """Everything that only a GPU can tell: after the build, which the CUDA kernels need, the most telling first."""
    python, cores = sys.executable, os.cpu_count() or 1
    # Each process compiles its variants, and leaves them in a cache that all of them share.
    xdist = find_spec("xdist") is not None
    on_all, on_some = (("-n", str(max(1, cores // share))) if xdist else () for share in (1, 4))
    pytest = (python, "-m", "pytest", "-v", "--tb=short", "--durations=15", "-p", "no:cacheprovider")
    files = tuple(
        sorted(str(path.relative_to(ROOT)) for of in ("triton", "cuda") for path in ROOT.glob(f"tests/test_{of}_*.py"))
    )
    ignored = tuple(f"--ignore={file}" for file in files)
    interpreted = (("TRITON_INTERPRET", "1"), ("CUDA_VISIBLE_DEVICES", ""))
    sanitizer = shutil.which("compute-sanitizer")
    without = None if sanitizer else "compute-sanitizer is not on the PATH"
    sanitize = (sanitizer or "compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all")
    small = (python, "-m", "bench.gpu_check.small")
    watched = DTYPES[:2]  # by the sanitizer, which runs the same cases: without it they run alone
    alone = [dtype for dtype in DTYPES if sanitizer is None or dtype not in watched]
    most = 260  # seconds: of what runs side by side, all may take as long as the longest
    # Without torch's pool every tensor is an allocation of its own, so that writing past its end is seen.
    apart = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    folder = Path(tempfile.mkdtemp())
    latency, twins, launches, times = (folder / f"{name}.json" for name in ("latency", "twins", "launches", "kernels"))
    time_it = (python, "-m", "bench.latency.run", "--device", "cuda", "--seconds", "0.2", "--minutes", "1.2")
    some = ("--only", "vicuna-7b T=1 ", "--only", "vicuna-7b bs=1 N=10000 edits=100 routed")
    speed = (python, "-m", "bench.quality.run", "--speed")  # an editor on the GPU; without --quick it takes minutes
    # One architecture: this machine's.
    arch = "{}{}".format(*torch.cuda.get_device_capability()) if torch.cuda.is_available() else ""
    archs = (("UNIKE_CUDA_ARCHS", arch + "a" * (arch == "90")),) if arch else ()
    return [
        Step("native build", (python, "setup.py", "build_ext", "--inplace"), 90, environment=archs),
        *(Step(f"small cases, {dtype}", (*small, dtype), most, beside=True) for dtype in alone),
        Step("kernel tests", (*pytest, *on_all, *files), most, beside=True),
        Step("tests marked gpu", (*pytest, *on_some, "-m", "gpu", *ignored, "tests"), most, beside=True),
        Step("twins", (python, "-m", "bench.gpu_check.twins", str(twins)), most, beside=True, report=twins),
        Step("launches", (python, "-m", "bench.gpu_check.launches", str(launches)), most, beside=True, report=launches),
        *(
            Step(
                f"{tool}, {dtype}",
                (*sanitize, "--tool", tool, *small, dtype, *only),
                most,
                beside=True,
                missing=without,
                environment=apart,
            )
            # Triton's compiler lets warps write the same value to the same place where it changes a layout, which
            # racecheck counts (34 places in float32, each a write with itself): it judges our own CUDA C++ alone.
            for tool, only in (("memcheck", ()), ("racecheck", ("--cuda",)))
            for dtype in watched
        ),
        Step("latency", (*time_it, *some, "--out", str(latency)), 120, report=latency),
        Step("kernel times", (python, "-m", "bench.latency.kernels", str(times)), 120, report=times),
        Step("edits per second", (*speed, "--quick", "--seeds", "0", "--device", "cuda"), 150),
        # As on a machine without a GPU: models on the CPU, kernels in the interpreter.
        Step(
            "all other tests",
            (*pytest, *on_all, "-m", "not gpu", *ignored, "tests"),
            240,
            environment=interpreted,
        ),
    ]


def run_all(
    wanted: Sequence[Step], about: dict[str, Any], file: Path, seconds: float, logs: Path | None = None
) -> dict[str, Any]:
    """Runs every step, whatever became of those before it, within `seconds` in all; `file` has what is done so far.

    logs: a folder for the whole output of each step.
    """
    results: dict[str, Any] = {**about, "steps": []}
    end = time.monotonic() + seconds
    folder = Path(tempfile.mkdtemp()) if logs is None else logs
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(len(wanted)) as pool:
        for beside, some in groupby(wanted, lambda step: step.beside):
            for group in [list(some)] if beside else [[step] for step in some]:
                left = end - time.monotonic()
                running = [pool.submit(run, step, min(step.seconds, left), folder) for step in group]
                for future in running:
                    results["steps"].append(future.result())
                    write(file, results)
    return results


def run(step: Step, seconds: float, logs: Path) -> dict[str, Any]:
    """One step's result; a step that runs out of time is stopped with all its processes."""
    done: dict[str, Any] = {"name": step.name, "command": " ".join(step.command), "passed": False, "seconds": 0.0}
    if step.missing is not None or seconds <= 0:
        return {**done, "said": step.missing or "no time was left for it"}
    start, late, log = time.monotonic(), "", logs / f"{step.name.replace(',', '').replace(' ', '-')}.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            step.command,
            cwd=ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **dict(step.environment)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            late = f"\nstopped after {seconds:.0f} s"
            process.send_signal(signal.SIGINT)  # pytest then tells what has failed so far
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=min(GRACE, seconds))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    said = (log.read_text(encoding="utf-8", errors="replace") + late)[-TAIL:]
    passed = process.returncode == 0 and not late
    done |= {"passed": passed, "seconds": round(time.monotonic() - start, 1), "said": said}
    if step.report is not None and step.report.exists():
        done["report"] = json.loads(step.report.read_text(encoding="utf-8"))
    return done


def versions() -> dict[str, Any]:
    """What the results belong to."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which("nvidia-smi") else ""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(ROOT),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for package in ("triton", "transformers"):
        if find_spec(package):
            found[package] = __import__(package).__version__
    return found


def table(results: dict[str, Any]) -> str:
    """One line for every step, and the last words of those that failed."""
    lines = [", ".join(f"{key} {value}" for key, value in results.items() if key != "steps")]
    for step in results["steps"]:
        lines.append(f"{'passed' if step['passed'] else 'FAILED'}  {step['seconds']:6.1f} s  {step['name']}")
        if not step["passed"]:
            lines += [f"        {line}" for line in step["said"].strip().splitlines()[-15:]]
    return "\n".join(lines)
