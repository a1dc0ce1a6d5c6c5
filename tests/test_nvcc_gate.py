"""The compile gate of the CUDA C++ kernels, in its own process, and that it fails when it should."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nvcc_gate
import pytest

if nvcc_gate.nvcc_version() is None:
    pytest.skip("no nvcc on the PATH", allow_module_level=True)
if nvcc_gate.disassembler() is None or shutil.which("c++filt") is None:
    pytest.skip("nvdisasm (triton brings one) and c++filt are needed", allow_module_level=True)

TOY = """
#include <device.cuh>
namespace {{
__global__ void toy(const float* x, float* y, int n) {{
    float v[8];
    for (int i = 0; i < 8; ++i) v[i] = x[n + i];
    {load}
    y[threadIdx.x] = v[0] + v[1] + v[2] + v[3] + v[4] + v[5] + v[6] + v[7];
}}
}}
void start(const float* x, float* y) {{ unike::launch(toy, unike::Launch{{}}, x, y, 3); }}
"""
LOAD = """
    const float4 four = unike::widen_four(x + 4 * threadIdx.x);
    v[0] += four.x + four.y + four.z + four.w;
"""
TABLE = """
    float table[64];
    for (int i = 0; i < 64; ++i) table[i] = x[i * n];
    for (int i = 0; i < n; ++i) v[1] += table[(i * n) & 63], table[(i * i) & 63] = v[1];
"""


def gate(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(nvcc_gate.__file__)), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def test_no_kernel_is_worse_than_in_the_table() -> None:
    done = gate()
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    if "NOT COMPARED" in done.stdout:
        pytest.skip("compiled, but not compared: the table is another nvcc's (see the gate's output)")


def test_what_ships_is_what_the_gate_compiles() -> None:
    """Only the gate builds for every architecture where there is no GPU (see the Makefile)."""
    (shipped,) = re.findall(r'^ARCHS = "(.+)"$', (nvcc_gate.HERE.parent / "setup.py").read_text(), re.M)
    assert tuple(shipped.split()) == nvcc_gate.ARCHS


def test_no_kernel_spills_and_those_that_stream_do_it_as_intended() -> None:
    table = json.loads((Path(nvcc_gate.__file__).with_suffix(".json")).read_text())["kernels"]
    assert all(row["spills"] == 0 and row["stack"] == 0 for row in table.values())
    streams = {key: row for key, row in table.items() if " cosine_topk_stream<" in key}
    assert len(streams) == 15 * len(nvcc_gate.ARCHS)
    for key, row in streams.items():
        assert row["async"], key
        assert bool(row["bulk"]) == (key.endswith("true>") and key[:5] in ("sm_90", "sm_10")), key
        assert bool(row["mma"] and row["ldmatrix"]) == ("TensorCores" in key), key


@pytest.mark.parametrize(
    ("load", "complaint"),
    [
        (LOAD, None),
        ("", "no wide instruction is left of 1"),
        (LOAD + TABLE, "stack grew from 0"),
        ("not C++", "does not compile"),
    ],
)
def test_the_gate_fails_when_it_should(tmp_path: Path, load: str, complaint: str | None) -> None:
    where = ("--sources", tmp_path, "--table", tmp_path / "table.json", "--arch", "90a")
    (tmp_path / "toy.cu").write_text(TOY.format(load=LOAD))
    done = gate(*where, "--write")
    assert done.returncode == 0, done.stderr
    (tmp_path / "toy.cu").write_text(TOY.format(load=load))
    done = gate(*where)
    if complaint is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1 and complaint in done.stderr, done.stderr + done.stdout
