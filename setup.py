"""The native build; everything static stands in pyproject.toml. It imports no torch: one build serves any of them.

Two optional modules, written in csrc/: `unike_kernels._cpu` and, where nvcc is on the PATH, `unike_kernels._cuda`. What
cannot be built is left out with one line that says why, and the package works without it. Environment variables:

UNIKE_BUILD_CPU, UNIKE_BUILD_CUDA: auto (default), 0 (leave it out) or 1 (fail rather than leave it out).
UNIKE_CUDA_ARCHS: such as "80 90a" or "sm_80;sm_90a". The newest is also stored as PTX, for devices still to come.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHS = "80 89 90a 100"
HEADERS = [
    str(path.relative_to(ROOT)) for suffix in ("h", "inl", "cuh") for path in sorted(ROOT.glob(f"csrc/**/*.{suffix}"))
]


class Missing(Exception):
    """A module cannot be built here; the message says why."""


def wanted(name: str) -> str:
    """auto, 0 or 1: what the environment asks for."""
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name} must be auto, 0 or 1, but is {value!r}")
    return value


def architectures(known: set[str]) -> list[str]:
    """The architectures to build for, oldest first: those asked for, or of ours those that this nvcc knows."""
    asked = re.findall(r"[^\s,;]+", os.environ.get("UNIKE_CUDA_ARCHS", ""))
    archs = [arch.removeprefix("sm_").replace(".", "") for arch in asked]
    if unknown := [arch for arch in archs if re.sub(r"\D", "", arch) not in known]:
        raise Missing(f"this nvcc knows no sm_{', sm_'.join(unknown)} (UNIKE_CUDA_ARCHS)")
    archs = archs or [arch for arch in ARCHS.split() if re.sub(r"\D", "", arch) in known]
    if not archs:
        raise Missing("this nvcc is too old: it knows none of sm_" + ARCHS.replace(" ", ", sm_"))
    return sorted(set(archs), key=lambda arch: (int(re.sub(r"\D", "", arch)), arch))


class Build(build_ext):
    """Builds what can be built, the CUDA module by calling nvcc, and removes what an earlier build left of the rest."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True  # both modules at once
        self.into_source = bool(self.inplace or self.editable_mode)  # `inplace` is 0 while the extensions are built

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.rpartition("._")[2].upper()
        variable = f"UNIKE_BUILD_{name}"
        try:
            if wanted(variable) == "0":
                raise Missing(f"{variable}=0")
            try:
                import pybind11
            except ImportError:
                raise Missing("pybind11 is not installed") from None
            ext.include_dirs = [*ext.include_dirs, pybind11.get_include()]
            if name == "CUDA":
                self.build_cuda(ext)
            else:
                super().build_extension(ext)
        except Exception as error:
            self.remove(ext)
            if wanted(variable) == "1":
                raise SystemExit(f"{variable}=1, but {ext.name} cannot be built: {error}") from error
            # One write: both modules are built at once, and print() writes a line and its end apart.
            sys.stdout.write(f"unike_kernels: built without {ext.name}: {error}\n")

    def remove(self, ext: Extension) -> None:
        """No module of an earlier build stays in the place of one that was not built."""
        places = [Path(self.get_ext_fullpath(ext.name))]
        if self.into_source:
            places.append(ROOT / self.get_ext_filename(ext.name))
        for path in places:
            path.unlink(missing_ok=True)

    def build_cuda(self, ext: Extension) -> None:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            raise Missing("nvcc is not on the PATH")
        archs = architectures(set(re.findall(r"sm_(\d+)", run([nvcc, "--list-gpu-code"]))))  # lists no 90a, knows it
        newest = re.sub(r"\D", "", archs[-1])
        flags = ["-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += [f"-I{path}" for path in (*ext.include_dirs, *self.include_dirs)]
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        flags += [f"-gencode=arch=compute_{newest},code=compute_{newest}", f"--threads={len(archs) + 1}"]
        flags += [f'-DUNIKE_ARCHS="{" ".join(archs)} ptx{newest}"']
        # An object is kept under a hash of all that it depends on: nothing is compiled twice or used under other flags.
        state = hashlib.sha256(repr([run([nvcc, "--version"]), flags]).encode())
        for header in ext.depends:
            state.update((ROOT / header).read_bytes())

        def compiled(source: str) -> str:
            key = state.copy()
            key.update((ROOT / source).read_bytes())
            path = ROOT / "build" / "nvcc" / f"{Path(source).stem}-{key.hexdigest()[:20]}.o"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_suffix(f".{os.getpid()}.o")
                run([nvcc, *flags, "-c", source, "-o", str(part)])
                part.replace(path)
            return str(path)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, ext.sources))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        run([nvcc, "-shared", "-cudart=static", *objects, "-o", str(target)])


def run(command: list[str]) -> str:
    """What a command prints; Missing with its last words when it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
        said = next((line for line in lines if "error" in line.lower()), lines[-1])
        raise Missing(f"{Path(command[0]).name} failed: {said.strip()}")
    return done.stdout


def sources(pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob(pattern))]


cpu = Extension(
    "unike_kernels._cpu",
    sources("csrc/cpu/*.cpp"),
    depends=HEADERS,
    language="c++",
    extra_compile_args=[] if os.name == "nt" else ["-O3", "-std=c++17", "-fvisibility=hidden", "-pthread", "-g0"],
    extra_link_args=[] if os.name == "nt" else ["-pthread"],
    optional=True,
)
cuda = Extension(
    "unike_kernels._cuda",
    [*sources("csrc/*.cpp"), *sources("csrc/*.cu")],
    depends=HEADERS,
    include_dirs=["csrc"],
    language="c++",
    optional=True,
)
setup(ext_modules=[cpu, cuda], cmdclass={"build_ext": Build})
