"""The compile gate: every kernel, built for GPUs that are not here exactly as its launcher would start it.

Runs the cases of tests/gate_cases on meta tensors, takes down each start, compiles it as Triton's JIT would (types,
divisibility by 16, ones and None as constants, launch options), and holds registers, spills, shared memory, wide loads
and tensor-core instructions against tests/compile_gate.json. Must run without TRITON_INTERPRET, in its own process:

    python tests/compile_gate.py                       # compile everything, compare with the table
    python tests/compile_gate.py --only cosine_topk    # only what has this in its name
    python tests/compile_gate.py --write               # accept what came out
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # the package of this checkout, installed or not

from unike_kernels.triton_kernels import launching, tuning  # noqa: E402

# All variants are built for this architecture; for the others the first of each kernel, and those that the table says
# to take nearly all the shared memory there is there.
FULL = 90
SHARED = tuning.SHARED
# Instructions: loads of 16 bytes per thread, and each generation's tensor cores.
SASS = {
    "wide": r"\b(?:LDG|LDGSTS)(?:\.\w+)*\.128\b|\bUTMALDG\b",
    "wgmma": r"\bHGMMA\b|\bQGMMA\b|\bIGMMA\b|\bUTC\w*MMA\b",
    "mma": r"\bHMMA\b|\bIMMA\b|\bQMMA\b",
    "spills": r"\b(?:STL|LDL)\b",
}
GROWN = {"registers": 8, "shared": 1024, "stack": 0, "spills": 0}  # by how much each may grow before it fails
KEPT = ("wide", "wgmma", "mma")  # these may not shrink


@dataclass(frozen=True)
class Variant:
    """One binary: a kernel with the types and constants of one start."""

    name: str
    arch: int
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[Any, Any]
    attributes: Mapping[Any, Any]
    options: Any

    @property
    def identity(self) -> str:
        parts = (self.signature, self.constants, self.attributes, self.options)
        return f"{self.arch} {self.kernel.__module__}.{self.kernel.__name__} {parts!r}"


def read_cases(folder: Path) -> dict[str, Callable[[], None]]:
    """ "<file>.<case>" -> case, of every file in the folder."""
    cases = {}
    for path in sorted(folder.glob("*.py")):
        spec = spec_from_file_location(f"gate_cases_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        cases |= {f"{path.stem}.{name}": case for name, case in module.CASES.items()}
    return cases


def specialised(name: str, arch: int, kernel: Any, args: tuple[Any, ...], constants: dict[str, Any]) -> Variant:
    """What Triton's JIT makes of one start on aligned memory (a meta tensor's address is 0, plus its offset)."""
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{kernel} is no JITFunction: is TRITON_INTERPRET set?")
    backend = make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = bind(*args, **constants)
    options, signature, constexprs, attributes = kernel._pack_args(backend, constants, bound, specialisation, None)
    return Variant(name, arch, kernel, signature, constexprs, attributes, options)


def variants(cases: Mapping[str, Callable[[], None]], arch: int) -> tuple[list[Variant], list[str]]:
    """Every different binary that the cases start on `arch`, named after the first that starts it; and what failed."""
    found: dict[str, Variant] = {}
    names: set[str] = set()
    failures = []
    for case, call in cases.items():
        starts: list[Variant] = []

        def record(kernel: Any, grid: Any, args: Any, constants: Any, case: str = case, starts: Any = starts) -> None:
            if not all(0 < size < limit for size, limit in zip(grid, (2**31, 2**16, 2**16), strict=False)):
                raise ValueError(f"{kernel.__name__}: no GPU takes the grid {grid}")
            starts.append(specialised(f"{kernel.__name__} {case}", arch, kernel, args, constants))

        try:
            with launching.recording(record), tuning.pretend(arch):
                call()
        except Exception:
            failures.append(f"sm_{arch} {case}: the launcher failed on meta tensors\n{traceback.format_exc(limit=-4)}")
            continue
        for variant in starts:
            if variant.identity in found:
                continue
            name, count = variant.name, 1
            while name in names:
                count += 1
                name = f"{variant.name} #{count}"
            names.add(name)
            found[variant.identity] = Variant(**{**vars(variant), "name": name})
    return list(found.values()), failures


def some_of(all_of_them: list[Variant], table: Mapping[str, Mapping[str, int]]) -> list[Variant]:
    """The first of each kernel, and what takes more than 90 % of this architecture's shared memory on the other."""
    firsts: dict[str, Variant] = {}
    for variant in all_of_them:
        firsts.setdefault(f"{variant.kernel.__module__}.{variant.kernel.__name__}", variant)
    chosen = list(firsts.values())
    for variant in all_of_them:
        there = table.get(f"sm_{FULL} {variant.name}", {}).get("shared", 0)
        if variant not in chosen and there > 0.9 * SHARED[variant.arch]:
            chosen.append(variant)
    return chosen


def build(variant: Variant) -> dict[str, int]:
    """Compiles one variant; registers, stack and shared memory (bytes), and how often the instructions stand in it."""
    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
    target = GPUTarget("cuda", variant.arch, 32)
    compiled = triton.compile(source, target=target, options=variant.options.__dict__)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output([tools / "cuobjdump", "--dump-resource-usage", file.name])
        sass = _output([tools / "nvdisasm", "-c", file.name])
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump names no registers: {usage}")
    figures = {"registers": int(match[1]), "stack": int(match[2]), "shared": compiled.metadata.shared}
    return figures | {name: len(re.findall(pattern, sass)) for name, pattern in SASS.items()}


def complaints(name: str, arch: int, now: Mapping[str, int], before: Mapping[str, int] | None) -> Iterator[str]:
    """What is worse than in the table, or impossible on the architecture; the table is None for another Triton."""
    if now["shared"] > SHARED[arch]:
        yield f"{name}: {now['shared']} bytes of shared memory, sm_{arch} has {SHARED[arch]}"
    if before is None:
        return
    for what, slack in GROWN.items():
        if now[what] > before[what] + slack:
            yield f"{name}: {what} grew from {before[what]} to {now[what]}"
    for what in KEPT:
        if now[what] < before[what]:
            yield f"{name}: {what} instructions fell from {before[what]} to {now[what]}"


_work: list[Variant] = []  # what the forked workers build; kernels cannot be pickled


def _build(index: int) -> tuple[int, dict[str, int] | str, float]:
    start = time.perf_counter()
    try:
        return index, build(_work[index]), time.perf_counter() - start
    except Exception:
        return index, traceback.format_exc(limit=-3), time.perf_counter() - start


def _output(command: list[Any]) -> str:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True, timeout=120).stdout


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="part of a kernel's or case's name; repeatable")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED), help="default: all")
    parser.add_argument("--write", action="store_true", help="rewrite the table's rows instead of comparing")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--cases", type=Path, default=HERE / "gate_cases")
    parser.add_argument("--table", type=Path, default=HERE / "compile_gate.json")
    return parser.parse_args()


def main() -> int:
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("The compile gate needs the compiler: unset TRITON_INTERPRET", file=sys.stderr)
        return 2
    if not hasattr(JITFunction, "_pack_args"):
        print(f"The compile gate needs Triton 3.4 or newer, and this is {triton.__version__}", file=sys.stderr)
        return 2
    os.environ.pop("UNIKE_TUNING", None)  # a file of this machine's measurements is not what ships
    options = _options()
    archs = options.arch or sorted(SHARED)
    started = time.perf_counter()

    def chosen(key: str) -> bool:  # key: "sm_90 kernel file.case"
        arch, _, name = key.partition(" ")
        return int(arch[3:]) in archs and (not options.only or any(part in name for part in options.only))

    stored = json.loads(options.table.read_text()) if options.table.exists() else {"triton": None, "variants": {}}
    table = stored["variants"]
    cases = read_cases(options.cases)
    failures: list[str] = []
    for arch in archs:
        found, failed = variants(cases, arch)
        found = found if arch == FULL else some_of(found, table)
        _work.extend(variant for variant in found if chosen(f"sm_{arch} {variant.name}"))
        failures += [f for f in failed if not options.only or any(part in f.split(":")[0] for part in options.only)]

    comparable = stored["triton"] == triton.__version__
    rows: dict[str, dict[str, int]] = {}
    print(f"{len(_work)} variants of {len(cases)} cases, triton {triton.__version__}, {options.jobs} processes")
    print(f"{'':60} {'regs':>5} {'stack':>5} {'spills':>6} {'shared':>7} {'wide':>5} {'wgmma':>5} {'mma':>5} {'s':>5}")
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for index, built, seconds in pool.imap_unordered(_build, range(len(_work))):
            variant = _work[index]
            key = f"sm_{variant.arch} {variant.name}"
            if isinstance(built, str):
                failures.append(f"{key}: does not compile\n{built}")
                continue
            rows[key] = built
            figures = [built[k] for k in ("registers", "stack", "spills", "shared", "wide", "wgmma", "mma")]
            print("{:60} {:5} {:5} {:6} {:7} {:5} {:5} {:5} {:5.1f}".format(key, *figures, seconds), flush=True)
            before = table.get(key) if comparable and not options.write else None
            failures += complaints(key, variant.arch, built, before)

    rewrite = "accept it with: python tests/compile_gate.py --write"
    if options.write:
        if table and not comparable and (options.only or options.arch):
            failures.append(f"the table was made with triton {stored['triton']}: rewrite all of it at once")
        if not failures:
            kept = {key: row for key, row in table.items() if not chosen(key)}
            _write(options.table, {**kept, **rows})
    elif comparable:
        broken = {f.split(":")[0] for f in failures}
        failures += [f"{key}: not in the table; {rewrite}" for key in sorted(rows.keys() - table.keys())]
        gone = {key for key in table if chosen(key)} - rows.keys() - broken
        failures += [f"{key}: in the table, but no case starts it; {rewrite}" for key in sorted(gone)]
    else:
        print(f"NOT COMPARED: the table is of triton {stored['triton']}, this is {triton.__version__}")
    print(f"\n{len(rows)} built in {time.perf_counter() - started:.0f} s, {len(failures)} failures")
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


def _write(path: Path, rows: Mapping[str, Mapping[str, int]]) -> None:
    """One line per variant, sorted, so that a change of one kernel is a small diff."""
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items()))
    path.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "variants": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    sys.exit(main())
