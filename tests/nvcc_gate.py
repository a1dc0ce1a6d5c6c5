"""The compile gate of csrc: every CUDA kernel, built by nvcc for GPUs that are not here, with setup.py's flags.

Holds registers, stack, spills, shared memory, wide, asynchronous and bulk loads and tensor-core instructions of each
kernel and architecture against tests/nvcc_gate.json, which is of one version of nvcc. Runs in its own process:

    python tests/nvcc_gate.py                       # compile everything, compare with the table
    python tests/nvcc_gate.py --only cosine_topk    # only the files with this in their names
    python tests/nvcc_gate.py --write               # accept what came out
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parent / "csrc"
ARCHS = ("80", "89", "90a", "100")
FLAGS = ("-O3", "-std=c++17", f"-I{CSRC}", "-cubin", "-Xptxas", "-v")
SASS = {
    "wide": r"\bLDG(?:\.\w+)*\.128\b",
    "async": r"\bLDGSTS(?:\.\w+)*\.128\b",
    "bulk": r"\bUBLKCP\b",
    "mma": r"\bHMMA\b|\bIMMA\b|\bUTC\w*MMA\b",
    "ldmatrix": r"\bLDSM\b",
}
GROWN = {"registers": 8, "stack": 0, "spills": 0, "shared": 0}  # by how much each may grow before it fails
KEPT = ("wide", "async", "bulk", "mma", "ldmatrix")  # these may not vanish
Row = dict[str, int]


def nvcc_version() -> str | None:
    """Such as "13.0"; None where there is no nvcc."""
    if shutil.which("nvcc") is None:
        return None
    found = re.search(r"release ([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    return found[1] if found else None


def disassembler() -> str | None:
    """nvdisasm of the toolkit, or the one that triton brings."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = find_spec("triton")
    bundled = Path(spec.origin or "").parent / "backends" / "nvidia" / "bin" / "nvdisasm" if spec else None
    return str(bundled) if bundled is not None and bundled.exists() else None


def readable(mangled: str) -> str:
    """kernel<Arguments> without namespaces: those of files without a name have a hash in them."""
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|unike::|\b_GLOBAL__N__\w+::", "", full)
    name = re.sub(r"\((?:(?!\)::).)*\)$", "", name).removeprefix("void ")
    return re.sub(r"\s+(?=>)", "", name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16"))


def figures(source: Path, arch: str) -> dict[str, Row]:
    """Those of `build`, kept under a hash of all that they depend on: what has not changed is not compiled again."""
    state = hashlib.sha256(repr([nvcc_version(), FLAGS, arch, SASS]).encode())
    for path in [Path(__file__), source, *sorted([*CSRC.glob("*.cuh"), *CSRC.glob("*.h")])]:
        state.update(path.read_bytes())
    kept = HERE.parent / "build" / "nvcc_gate" / f"{source.stem}-{arch}-{state.hexdigest()[:20]}.json"
    if not kept.exists():
        rows = build(source, arch)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(rows))
        part.replace(kept)
    return json.loads(kept.read_text())


def build(source: Path, arch: str) -> dict[str, Row]:
    """The figures of every kernel of a file, by name."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "x.cubin"
        command = ["nvcc", *FLAGS, f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(cubin), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"sm_{arch} {source.name}: does not compile\n{done.stdout}{done.stderr}")
        tool = disassembler()
        assert tool is not None
        sass = subprocess.run([tool, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S))
    rows = {}
    for said in re.split(r"Compiling entry function '", done.stdout + done.stderr)[1:]:
        mangled = said.split("'")[0]
        body = bodies[mangled]
        rows[readable(mangled)] = {
            "registers": _number(r"Used (\d+) registers", said),
            "stack": _number(r"(\d+) bytes stack frame", said),
            "spills": _number(r"(\d+) bytes spill stores", said) + _number(r"(\d+) bytes spill loads", said),
            "shared": _number(r"(\d+) bytes smem", said),  # what is declared; the rest is given at the launch
            **{name: len(re.findall(pattern, body)) for name, pattern in SASS.items()},
        }
    return rows


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def complaints(key: str, now: Mapping[str, int], before: Mapping[str, int] | None) -> Iterator[str]:
    """What is worse than in the table."""
    if before is None:
        yield f"{key}: not in the table; accept it with: python tests/nvcc_gate.py --write"
        return
    for what, slack in GROWN.items():
        if now[what] > before[what] + slack:
            yield f"{key}: {what} grew from {before[what]} to {now[what]}"
    for what in KEPT:
        if before[what] and not now[what]:
            yield f"{key}: no {what} instruction is left of {before[what]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="part of a file's name; repeatable")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--write", action="store_true", help="rewrite the table's rows instead of comparing")
    parser.add_argument("--sources", type=Path, default=CSRC)
    parser.add_argument("--table", type=Path, default=HERE / "nvcc_gate.json")
    options = parser.parse_args()
    version = nvcc_version()
    if version is None or disassembler() is None or shutil.which("c++filt") is None:
        print("nvcc, nvdisasm (triton brings one) and c++filt are needed", file=sys.stderr)
        return 2
    stored = json.loads(options.table.read_text()) if options.table.exists() else {"nvcc": None, "kernels": {}}
    table: dict[str, Row] = stored["kernels"]
    archs = options.arch or ARCHS
    sources = [
        p for p in sorted(options.sources.glob("*.cu")) if not options.only or any(o in p.name for o in options.only)
    ]

    def chosen(key: str) -> bool:  # key: "sm_90a file kernel"
        arch, file, _ = key.split(" ", 2)
        return arch.removeprefix("sm_") in archs and file in {path.stem for path in sources}

    failures: list[str] = []
    rows: dict[str, Row] = {}
    jobs = [(source, arch) for source in sources for arch in archs]
    print(f"{len(jobs)} compilations, nvcc {version}")
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for (source, arch), future in [(job, pool.submit(figures, *job)) for job in jobs]:
            try:
                rows |= {f"sm_{arch} {source.stem} {name}": row for name, row in future.result().items()}
            except RuntimeError as error:
                failures.append(str(error))
    columns = ("registers", "stack", "spills", "shared", *SASS)
    print(f"{'':90}" + "".join(f"{name:>10}" for name in columns))
    for key, row in sorted(rows.items()):
        print(f"{key:90}" + "".join(f"{row[name]:10}" for name in columns))
        if not options.write and stored["nvcc"] == version:
            failures += complaints(key, row, table.get(key))
    if options.write:
        if table and stored["nvcc"] != version and (options.only or options.arch):
            failures.append(f"the table was made with nvcc {stored['nvcc']}: rewrite all of it at once")
        if not failures:
            kept = {key: row for key, row in table.items() if not chosen(key)}
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted({**kept, **rows}.items()))
            options.table.write_text(f'{{"nvcc": {json.dumps(version)}, "kernels": {{\n{lines}\n}}}}\n')
    elif stored["nvcc"] == version:
        gone = {key for key in table if chosen(key)} - rows.keys()
        failures += [f"{key}: in the table, but not compiled" for key in sorted(gone) if not failures]
    else:
        print(f"NOT COMPARED: the table is of nvcc {stored['nvcc']}, this is {version}")
    print(f"{len(rows)} kernels, {len(failures)} failures")
    print("\n".join(failures), file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
