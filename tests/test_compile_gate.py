"""The compile gate, in its own process, and that it fails when it should."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unike_kernels import triton_kernels

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

HERE = Path(__file__).parent
KERNELS = Path(triton_kernels.__file__).parent
CASES = """
import torch
import triton
import triton.language as tl
from unike_kernels.triton_kernels import launching

@triton.jit
def toy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, v + tl.flip(tl.cumsum(v, 0), 0), mask=i < n)

def start():
    x = torch.empty({size}, dtype=torch.bfloat16, device="meta")[{offset}:]
    {extra}
    launching.launch(toy, (1,), x, torch.empty_like(x), x.shape[0], BLOCK={block}, num_warps={warps})

CASES = {{"{name}": start}}
"""
GOOD = {"size": 4096, "offset": 0, "extra": "", "block": 1024, "warps": 4, "name": "case"}


def gate(*args: object) -> subprocess.CompletedProcess[str]:
    if not hasattr(JITFunction, "_pack_args"):
        pytest.skip("the gate asks the JIT of Triton 3.4 and newer what it would compile")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(HERE / "compile_gate.py"), *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def test_every_kernel_compiles_and_none_is_worse_than_in_the_table() -> None:
    done = gate()
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    if "NOT COMPARED" in done.stdout:
        pytest.skip("compiled, but not compared: the table is another triton's (see the gate's output)")


def test_every_start_in_the_package_has_a_case() -> None:
    """The name of every kernel that a launcher hands to launching.launch stands in the table, for sm_90 at least."""
    table = json.loads((HERE / "compile_gate.json").read_text())["variants"]
    built = {key.split()[1] for key in table if key.startswith("sm_90 ")}
    started = set()
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "launch":
                if isinstance(node.args[0], ast.Name):
                    started.add(node.args[0].id)
    assert started, "no launcher starts a kernel: has launching.launch another name?"
    assert started <= built


def test_every_kernel_says_what_it_takes_what_it_moves_and_where_it_rounds() -> None:
    trees = [ast.parse(path.read_text()) for path in sorted(KERNELS.glob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    starts = [n for n in nodes if isinstance(n, ast.Call) and getattr(n.func, "attr", None) == "launch"]
    started = {n.args[0].id for n in starts if isinstance(n.args[0], ast.Name)}
    for node in nodes:
        if isinstance(node, ast.FunctionDef) and node.name in started:
            text = (ast.get_docstring(node) or "").lower()
            assert any(word in text for word in ("byte", "reads", "is read")), f"{node.name}: what does it move?"
            assert "round" in text, f"{node.name}: where does it round?"
            assert any(word in text for word in ("float", "int", "dtype")), f"{node.name}: which dtypes?"
            started.discard(node.name)
    assert not started


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with one good case, and its table."""
    folder = tmp_path_factory.mktemp("gate")
    (folder / "toy.py").write_text(CASES.format(**GOOD))
    table = folder / "table.json"
    done = gate("--cases", folder, "--table", table, "--arch", 90, "--write")
    assert done.returncode == 0, done.stderr
    return folder, table


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"block": 32768, "warps": 1, "size": 32768}, "spills grew from 0"),
        ({"block": 8192}, "registers grew from"),
        ({"offset": 1}, "wide instructions fell from"),
        ({"name": "other"}, "not in the table; accept it with: python tests/compile_gate.py --write"),
        ({"name": "other"}, "in the table, but no case starts it"),
        ({"extra": "x.sum().item()"}, "the launcher failed on meta tensors"),
        ({"block": 1000}, "does not compile"),
    ],
)
def test_the_gate_fails_when_it_should(
    toy: tuple[Path, Path], tmp_path: Path, change: dict[str, object], complaint: str | None
) -> None:
    _, table = toy
    (tmp_path / "toy.py").write_text(CASES.format(**{**GOOD, **change}))
    done = gate("--cases", tmp_path, "--table", table, "--arch", 90)
    if complaint is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 1 and complaint in done.stderr, done.stderr


def test_another_tritons_table_is_not_compared_but_everything_compiles(toy: tuple[Path, Path], tmp_path: Path) -> None:
    folder, table = toy
    other = tmp_path / "table.json"
    other.write_text(json.dumps(json.loads(table.read_text()) | {"triton": "0.0.0"}))
    done = gate("--cases", folder, "--table", other, "--arch", 90)
    assert done.returncode == 0 and "NOT COMPARED: the table is of triton 0.0.0" in done.stdout
    (tmp_path / "toy.py").write_text(CASES.format(**{**GOOD, "block": 1000}))
    assert gate("--cases", tmp_path, "--table", other, "--arch", 90).returncode == 1


def test_the_gate_refuses_the_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, str(HERE / "compile_gate.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "unset TRITON_INTERPRET" in done.stderr
