"""Importing changes nothing and loads little; the package installs offline and never brings another torch."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {
    *("accelerate", "huggingface_hub", "matplotlib", "peft", "PIL", "rich", "safetensors", "sklearn", "tqdm"),
    *("transformers", "triton", "typer"),
}


def python(code: str, cwd: Path, path: Path = ROOT) -> str:
    """What a fresh interpreter prints, with `path` in front of everything installed."""
    env = {**os.environ, "PYTHONPATH": str(path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


LOOK = """
import json, logging, os, signal, sys, time, warnings
import torch, torch.nn.functional

def look():
    return {
        "nn.Module": {k: id(v) for k, v in vars(torch.nn.Module).items()},
        "functional": {k: id(v) for k, v in vars(torch.nn.functional).items()},
        "Tensor": {k: id(v) for k, v in vars(torch.Tensor).items()},
        "hooks": len(torch.nn.modules.module._global_forward_hooks),
        "dtype": str(torch.get_default_dtype()),
        "grad": torch.is_grad_enabled(),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "precision": [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "seed": torch.initial_seed(),
        "warnings": repr(warnings.filters),
        "logging": [logging.root.level, len(logging.root.handlers)],
        "environment": dict(os.environ),
        "signals": str(signal.getsignal(signal.SIGINT)),
        "path": list(sys.path),
    }

before, loaded = look(), set(sys.modules)
start = time.process_time()
import unike_kernels
THEN
seconds = time.process_time() - start
after = look()
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "loaded": sorted(set(sys.modules) - loaded),
    "seconds": seconds,
}))
"""


# What is imported after the package itself: nothing, the specification, and all that patching needs.
@pytest.mark.parametrize("then", ["", "unike_kernels.reference", "unike_kernels.ops; unike_kernels.patch"])
def test_import_changes_nothing_and_loads_little(then, tmp_path):
    seen = json.loads(python(LOOK.replace("THEN", then), tmp_path))
    assert seen["changed"] == []
    assert not HEAVY & {name.split(".")[0] for name in seen["loaded"]}
    assert seen["seconds"] < 1.0  # of processor time, beyond torch's own
    if not then:
        assert [name for name in seen["loaded"] if name.startswith("unike_kernels")] == ["unike_kernels"]


def test_every_public_name_exists(tmp_path):
    import unike_kernels

    for name in unike_kernels.__all__:
        assert getattr(unike_kernels, name) is not None
    assert set(unike_kernels.__all__) <= set(dir(unike_kernels))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = unike_kernels.no_such_name


def test_without_torch_it_says_what_to_run(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\ntry: import unike_kernels\nexcept ImportError as error: print(error)"
    )
    assert "pip install torch" in python(code, tmp_path)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that pip builds offline, with the setuptools at hand, from a copy of the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("unike_kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps", "--wheel-dir", out]
    environment = {**os.environ, "UNIKE_BUILD_CPU": "0", "UNIKE_BUILD_CUDA": "0"}  # test_native_build.py builds these
    done = subprocess.run([*pip, source], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("unike_kernels-*.whl"))


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "unike_kernels").rglob("*.py")}
    assert ours | {"unike_kernels/py.typed"} <= names
    assert all(top == "unike_kernels" or top.endswith(".dist-info") for top in {name.split("/")[0] for name in names})
    assert any(name.endswith("/LICENSE") for name in names)


def test_wheel_imports_from_another_folder(wheel, tmp_path):
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target, wheel]
    subprocess.run(pip, check=True)
    code = "import unike_kernels as uk; from unike_kernels import config; print(config.__file__, uk.__version__)"
    where, version = python(code, tmp_path, path=target).split()
    assert Path(where).is_relative_to(target)
    assert f"-{version}-" in wheel.name


def test_nothing_makes_pip_choose_a_torch(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = Parser().parsestr(archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode())
    wanted = metadata.get_all("Requires-Dist", [])
    assert not [line for line in wanted if line.startswith(("torch", "triton", "nvidia"))]
    # These two want torch; whoever runs the tests has one.
    assert all(
        "extra == 'test'" in line.replace('"', "'") for line in wanted if line.startswith(("accelerate", "peft"))
    )
    requires = next(
        line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("requires =")
    )
    assert "torch" not in requires
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "torch" not in ast.unparse(node)
