"""Builds the CUDA module of csrc/ for no GPU at all: g++, and fibers for threads. See README.md beside this file."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = ROOT / "csrc"
# No contraction: a sum of products is fused where the source says fmaf, as nvcc may do anywhere.
FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-strict-aliasing")
FLAGS += ("-Wall", "-Wno-unknown-pragmas", "-x", "c++", '-DUNIKE_ARCHS="emulator"')


def compiler() -> str | None:
    """g++, or another C++ compiler that the environment names."""
    return shutil.which(os.environ.get("CXX") or "g++")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-6000:]}")


def build(sources: list[Path], name: str, include: tuple[str, ...] = ()) -> Path:
    """The shared library of these sources, each compiled once for what stands in it and in all headers."""
    cxx = compiler()
    if cxx is None:
        pytest.skip("no C++ compiler: set CXX, or install g++", allow_module_level=True)
    headers = sorted([*CSRC.glob("*.cuh"), *HERE.glob("*.cuh"), *HERE.glob("*.h")])
    flags = [*FLAGS, f"-I{HERE}", f"-I{CSRC}", *(f"-I{path}" for path in include)]
    common = hashlib.sha256(repr([cxx, flags]).encode() + b"".join(path.read_bytes() for path in headers))
    folder = ROOT / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: Path) -> Path:
        key = common.copy()
        key.update(source.read_bytes())
        target = folder / f"{source.stem}-{key.hexdigest()[:20]}.o"
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}.part")
            _run([cxx, *flags, "-c", str(source), "-o", str(part)])
            part.replace(target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [*sources, HERE / "emulator.cpp"]))
    key = hashlib.sha256("".join(path.name for path in objects).encode()).hexdigest()[:20]
    library = folder / f"{name}-{key}.so"
    if not library.exists():
        part = library.with_suffix(f".{os.getpid()}.part")
        _run([cxx, "-shared", *map(str, objects), "-o", str(part)])
        part.replace(library)
    return library


@lru_cache
def module() -> ModuleType:
    """csrc/bindings.cpp and every csrc/*.cu as a module: the functions of unike_kernels._cuda, on CPU tensors."""
    pybind11 = pytest.importorskip("pybind11", reason="the extra 'test' brings it")
    include = (pybind11.get_include(), sysconfig.get_paths()["include"])
    library = build([*sorted(CSRC.glob("*.cpp")), *sorted(CSRC.glob("*.cu"))], "_cuda", include)
    spec = spec_from_file_location("_cuda", library, loader=ExtensionFileLoader("_cuda", str(library)))
    assert spec is not None and spec.loader is not None
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@lru_cache
def _library(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)


def seed(value: int, of: ModuleType | None = None) -> None:
    """Draws another order of blocks, warps and copies for all launches from now on."""
    _library(str((of or module()).__file__)).emulator_seed(ctypes.c_uint64(value))


def device(multiprocessors: int = 3, shared_bytes: int = 227 * 1024, of: ModuleType | None = None) -> None:
    """What `current_device` says: few multiprocessors, so that small inputs keep every one of them busy for long."""
    _library(str((of or module()).__file__)).emulator_device(multiprocessors, shared_bytes)


def bulk_copies(of: ModuleType | None = None) -> int:
    """How many rows the copy engine has brought since this was asked last."""
    return int(_library(str((of or module()).__file__)).emulator_bulk_copies())
