"""The native build: what is built where, what is said when something is not, and that one build serves any torch."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from unike_kernels import native

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on the PATH")

pytest.importorskip("pybind11", reason="the extra 'test' brings it")

# What an installation in `folder` says of itself. The finder of an editable installation of this tree, where tests run
# in one, would lend it the modules that it lacks.
ELSEWHERE = "import sys; sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in repr(finder)]"
SAY = """
from unike_kernels import native
cpu, cuda = native.cpu(), native.cuda()
print("cpu:", cpu.__file__ if cpu else native.no_cpu())
print("cuda:", f"{cuda.__file__} | {cuda.architectures}" if cuda else native.no_cuda())
print("no_cuda:", native.no_cuda())
"""


def tell(folder: Path, cwd: Path) -> str:
    return done(run([sys.executable, "-c", ELSEWHERE + SAY], cwd, PYTHONPATH=str(folder)))


# Nothing here runs a kernel: unoptimised, a file takes nvcc 3 s for one architecture instead of 8.
UNOPTIMISED = "-Xcicc=-O0 -Xptxas=-O0"


def run(command: list, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if not name.startswith("UNIKE_") and name != "PYTHONPATH"}
    env["NVCC_APPEND_FLAGS"] = UNOPTIMISED
    return subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**env, **environment}, capture_output=True, text=True
    )


def done(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy_of_tree(folder: Path) -> Path:
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    for name in ("unike_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return folder


@pytest.fixture
def tree(tmp_path) -> Path:
    (tmp_path / "tree").mkdir()
    return copy_of_tree(tmp_path / "tree")


@pytest.fixture(scope="module")
def kept_tree(tmp_path_factory) -> Path:
    """One tree for the tests that build CUDA code, so that what one has compiled is not compiled again."""
    return copy_of_tree(tmp_path_factory.mktemp("kept"))


def path_without(folder: Path, *hidden: str) -> str:
    """A PATH on which everything of this one is, but the programs named."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in sorted(Path(place).glob("*")) if Path(place).is_dir() else []:
            link = folder / program.name
            if not program.name.startswith(hidden) and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


def build(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, **environment)


def modules(tree: Path) -> set[str]:
    return {path.name.split(".")[0] for path in (tree / "unike_kernels").glob("*.so")}


def said(output: str, module: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith(f"unike_kernels: built without {module}: ")]
    assert len(lines) == 1, output
    return lines[0].split(": ", 2)[2]


def test_without_nvcc(tree, tmp_path):
    path = path_without(tmp_path / "bin", "nvcc")
    output = done(build(tree, PATH=path, UNIKE_BUILD_CPU="0"))
    assert said(output, "unike_kernels._cuda") == "nvcc is not on the PATH"
    refused = build(tree, PATH=path, UNIKE_BUILD_CPU="0", UNIKE_BUILD_CUDA="1")
    assert refused.returncode != 0
    assert "UNIKE_BUILD_CUDA=1, but unike_kernels._cuda cannot be built: nvcc is not on the PATH" in refused.stderr


@pytest.mark.parametrize("step", ["--list-gpu-code", "-c", "-shared"])
def test_nvcc_that_fails(tree, tmp_path, step):
    fake = tmp_path / "bin" / "nvcc"
    fake.parent.mkdir()
    # Fails at one step of the build; at the others it does as if it had worked.
    fake.write_text(
        '#!/bin/sh\nfor word in "$@"; do\n'
        f'  [ "$word" = {step} ] && echo "x.cu(3): error: it is broken" >&2 && exit 2\n'
        '  [ "$last" = -o ] && : > "$word"\n  last="$word"\ndone\necho sm_80\n'
    )
    fake.chmod(0o755)
    path = f"{fake.parent}{os.pathsep}{os.environ['PATH']}"
    old = tree / "unike_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.write_bytes(b"of an earlier build")
    output = done(build(tree, PATH=path, UNIKE_BUILD_CPU="0"))
    assert said(output, "unike_kernels._cuda") == "nvcc failed: x.cu(3): error: it is broken"
    assert not old.exists()
    refused = build(tree, PATH=path, UNIKE_BUILD_CPU="0", UNIKE_BUILD_CUDA="1")
    assert refused.returncode != 0 and "it is broken" in refused.stderr


def test_settings_that_mean_nothing_are_refused(tree):
    refused = build(tree, UNIKE_BUILD_CPU="0", UNIKE_BUILD_CUDA="yes")
    assert refused.returncode != 0 and "UNIKE_BUILD_CUDA must be auto, 0 or 1, but is 'yes'" in refused.stderr


@needs_nvcc
def test_an_architecture_that_nvcc_does_not_know(tree):
    output = done(build(tree, UNIKE_BUILD_CPU="0", UNIKE_CUDA_ARCHS="80 7777"))
    assert said(output, "unike_kernels._cuda") == "this nvcc knows no sm_7777 (UNIKE_CUDA_ARCHS)"


def test_with_neither_compiler_nor_network_it_installs(tree, tmp_path):
    path = path_without(tmp_path / "bin", "nvcc", "gcc", "g++", "c++", "cc", "clang", "x86_64-linux-gnu-g", "aarch64")
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-index", "--no-build-isolation", "--no-deps"]
    installed = run([*pip, "--target", tmp_path / "target", "."], tree, PATH=path, CC="no-cc", CXX="no-cxx")
    output = done(installed) + installed.stderr  # pip -v tells what a build prints on the second
    assert output.count("built without unike_kernels._cpu: ") == 1
    assert output.count("built without unike_kernels._cuda: nvcc is not on the PATH") == 1
    told = tell(tmp_path / "target", tmp_path)
    for name in ("cpu", "cuda"):
        assert f"{name}: this installation was built without unike_kernels._{name}" in told


@needs_compiler
def test_editable(tree, tmp_path):
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    packages = Path(done(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tree)).strip())
    found = [path for path in sys.path if path.endswith("-packages")]  # torch and setuptools, as here
    (packages / "of_the_tests.pth").write_text("\n".join(found))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-index",
        "--no-build-isolation",
        "--no-deps",
    ]
    done(run([*pip, "--ignore-installed", "-e", "."], tree, UNIKE_BUILD_CPU="1", UNIKE_BUILD_CUDA="0"))
    told = done(run([python, "-c", SAY], tmp_path))
    assert f"cpu: {tree}/unike_kernels/_cpu." in told
    assert "cuda: this installation was built without unike_kernels._cuda" in told


@needs_compiler
def test_isolated(tree, tmp_path):
    """What pyproject.toml asks for is enough to build: pip brings it, and nothing that is installed here is seen."""
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "-d",
        tmp_path / "wheels",
        "setuptools>=77",
        "pybind11>=2.13",
    ]
    if run(fetch, tmp_path).returncode != 0:
        pytest.skip("no package index answers")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--find-links", tmp_path / "wheels", "--no-deps", "."]
    done(run([*pip, "-w", tmp_path / "out"], tree, UNIKE_BUILD_CPU="1", UNIKE_BUILD_CUDA="0"))
    assert len(list((tmp_path / "out").glob("unike_kernels-*.whl"))) == 1


@needs_nvcc
def test_rebuild_after_a_change_of_architectures(kept_tree):
    def built_for(archs: str) -> str:
        done(build(kept_tree, UNIKE_BUILD_CPU="0", UNIKE_BUILD_CUDA="1", UNIKE_CUDA_ARCHS=archs))
        told = tell(kept_tree, kept_tree)
        return next(line for line in told.splitlines() if line.startswith("cuda:")).split(" | ")[1]

    def objects() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (kept_tree / "build" / "nvcc").glob("*.o")}

    assert built_for("sm_80") == "80 ptx80"
    first = objects()
    assert built_for("90a;80") == "80 90a ptx90"
    both = objects()
    assert len(both) == 2 * len(first) and first.items() <= both.items()
    assert built_for("8.0") == "80 ptx80" and objects() == both  # and nothing was compiled again
    done(build(kept_tree, UNIKE_BUILD_CPU="0", UNIKE_BUILD_CUDA="0"))
    assert modules(kept_tree) == set()


@needs_nvcc
@needs_compiler
def test_wheel_from_another_folder(kept_tree, tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps", "-w", tmp_path, "."]
    done(run(pip, kept_tree, UNIKE_BUILD_CPU="1", UNIKE_BUILD_CUDA="1", UNIKE_CUDA_ARCHS="80"))
    wheel = next(tmp_path.glob("unike_kernels-*.whl"))
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--target",
        tmp_path / "target",
        wheel,
    ]
    done(run(install, tmp_path))
    told = tell(tmp_path / "target", tmp_path)
    assert f"cpu: {tmp_path}/target/unike_kernels/_cpu." in told
    assert f"cuda: {tmp_path}/target/unike_kernels/_cuda." in told and "| 80 ptx80" in told
    for module in (tmp_path / "target" / "unike_kernels").glob("_*.so"):  # one build serves any torch
        code = module.read_bytes()
        assert not [name for name in (b"libtorch", b"libc10", b"libcudart.so") if name in code], module
    if not Path("/dev/nvidiactl").exists():  # it loads without a driver, and says so when it is to run
        assert "no_cuda: no CUDA driver answers: CUDA driver version is insufficient" in told
        launch = "from unike_kernels import native; native.cuda().probe(1 << 20, 0)"
        refused = run([sys.executable, "-c", launch], tmp_path, PYTHONPATH=str(tmp_path / "target"))
        assert refused.stderr.strip().splitlines()[-1].startswith("RuntimeError: launching probe: ")


def test_a_module_of_other_sources_is_not_called(monkeypatch):
    native._load.cache_clear()
    monkeypatch.setattr(native, "CPU_INTERFACE", -1)
    built = Path(native.__file__).parent.glob("_cpu.*")
    assert native.cpu() is None
    assert ("built from other sources" if any(built) else "built without") in native.no_cpu()
    native._load.cache_clear()


@pytest.fixture
def two_devices(monkeypatch):
    """A module built for sm_80 on device 0, without an image for device 1; tells where its kernel was tried."""
    asked, entered, full = [], [], set()

    @contextmanager
    def on(index):
        entered.append(index)
        yield
        entered.pop()

    def probe():
        asked.append(entered[-1])
        if entered[-1] == 1:
            raise native.NoImageError("launching probe: no kernel image")
        if entered[-1] in full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 80

    monkeypatch.setattr(native, "cuda", lambda: SimpleNamespace(architectures="80", device_count=lambda: 2))
    monkeypatch.setattr(native, "_probe", probe)
    monkeypatch.setattr(native, "_images", {})
    for name, value in {"is_available": True, "current_device": 0, "is_current_stream_capturing": False}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "device", on)
    return SimpleNamespace(asked=asked, full=full)


def test_a_device_is_asked_once_what_its_code_was_built_for(two_devices):
    """Where a module has no image for a device, the reason stays too; the device is that of the tensors."""
    for _ in range(2):
        assert native.built_for(torch.device("cuda:0")) == 80
        assert native.no_cuda(torch.device("cuda:0")) is native.no_cuda() is None
        assert native.built_for(torch.device("cuda:1")) is native.built_for(torch.device("cpu")) is None
        assert native.no_cuda(torch.device("cuda:1")).startswith(
            "launching probe: no kernel image; it was built for 80"
        )
    assert two_devices.asked == [0, 1]


def test_a_full_device_is_asked_again(two_devices):
    two_devices.full.add(0)
    with pytest.raises(torch.OutOfMemoryError):
        native.no_cuda()
    two_devices.full.clear()
    assert native.built_for(torch.device("cuda:0")) == 80


def test_nothing_is_tried_while_a_graph_is_captured(two_devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "a graph is captured" in native.no_cuda() and native.built_for(torch.device("cuda:0")) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert native.no_cuda() is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert native.no_cuda() is None and two_devices.asked == [0]


@needs_compiler
def test_without_a_compiler_what_was_demanded_fails(tree, tmp_path):
    refused = build(tree, UNIKE_BUILD_CPU="1", UNIKE_BUILD_CUDA="0", CC="no-such-cc", CXX="no-such-cxx")
    assert refused.returncode != 0
    assert "UNIKE_BUILD_CPU=1, but unike_kernels._cpu cannot be built" in refused.stderr
    assert modules(tree) == set()


def test_a_source_archive_holds_all_that_a_build_reads(tree):
    done(run([sys.executable, "setup.py", "-q", "sdist"], tree))
    with tarfile.open(next((tree / "dist").glob("*.tar.gz"))) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {str(path.relative_to(tree)) for path in (tree / "csrc").rglob("*") if path.is_file()}
    assert wanted | {"setup.py", "pyproject.toml", "unike_kernels/native.py"} <= held
    # Whatever is no source of its own is a dependency of all: a change of it compiles them again.
    parts = {name for name in wanted if not name.endswith((".cpp", ".cu", ".md"))}
    assert parts <= set(done(run([sys.executable, "-c", HEADERS], tree)).split())


HEADERS = """
import setuptools
setuptools.setup = lambda ext_modules, **rest: print(*ext_modules[0].depends)
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": __import__("os").path.abspath("setup.py")})
"""


def test_kernels_include_neither_torch_nor_pybind_and_nothing_is_built_with_fast_math():
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cu", ".cuh", ".h", ".inl", ".cpp") and not path.name.startswith("bindings"):
            included = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
            foreign = ("torch", "ATen", "c10", "pybind", "bindings")
            assert not [line for line in included if any(word in line for word in foreign)]
    flags = (ROOT / "setup.py").read_text()
    assert "fast-math" not in flags and "fast_math" not in flags and "march=native" not in flags
