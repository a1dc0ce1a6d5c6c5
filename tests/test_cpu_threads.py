"""The threads of the native code: where none is left, or one runs out of memory, the process lives and says so."""

import os
import subprocess
import sys
from pathlib import Path

import emulator
import pytest

from unike_kernels import native

if native.cpu() is None:
    pytest.skip(f"no CPU module: {native.no_cpu()}", allow_module_level=True)
if not sys.platform.startswith("linux"):
    pytest.skip("another loader takes no library in LD_PRELOAD", allow_module_level=True)

HERE = Path(__file__).resolve().parent
SEARCH = """
import ctypes, torch
from unike_kernels import native, ops

process, threads = ctypes.CDLL(None), 4
torch.get_num_threads = lambda: threads  # torch's own end the process where they cannot be started
keys, q = torch.randn(2**15, 256), torch.randn(2, 256)
norm = torch.linalg.vector_norm(keys, dim=1)
searches = {"int8": lambda: native.Int8Index(keys, norm).search(q, 20)}
if native.cpu().can_scan(native.LEVELS.index("best")):
    searches["scan"] = lambda: ops.cosine_topk(q, keys, 20, key_norm=norm, backend="cpu")

def set(name, value):
    ctypes.c_int.in_dll(process, name).value = value
"""
FEW_THREADS = """
for name, search in searches.items():
    expected = search()
    for left in range(threads):
        set("threads_left", left)
        found = search()
        assert all(map(torch.equal, found, expected)), name
        assert ctypes.c_int.in_dll(process, "threads_left").value == 0  # it took them all
        set("threads_left", -1)
print("done")
"""
LITTLE_MEMORY = """
for name, search in searches.items():
    expected = search()
    set("starved", 1)
    try:
        search()
    except MemoryError:
        set("starved", 0)
    else:
        raise AssertionError(name)
    assert all(map(torch.equal, search(), expected)), name
print("done")
"""


@pytest.fixture(scope="module")
def scarce(tmp_path_factory) -> Path:
    if emulator.compiler() is None:
        pytest.skip("no C++ compiler: set CXX, or install g++")
    library = tmp_path_factory.mktemp("scarce") / "scarce.so"
    command = [emulator.compiler(), "-std=c++17", "-shared", "-fPIC", "-o", library, HERE / "scarce.cpp", "-ldl"]
    subprocess.run(command, check=True)
    return library


@pytest.mark.parametrize("body", [FEW_THREADS, LITTLE_MEMORY], ids=["few threads", "little memory"])
def test_the_process_lives(body, scarce):
    environment = {**os.environ, "LD_PRELOAD": str(scarce), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SEARCH + body]
    done = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
