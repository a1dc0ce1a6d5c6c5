"""The house rules that a machine can check: who imports whom, how long a file may be, what a comment must say."""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "unike_kernels"

# A file imports only from its own or lower layers. A new file or folder of the package gets its line here.
LAYERS = {
    "config": 0,
    "reference": 0,
    "reference_routing": 0,
    "backends": 1,
    "cuda_kernels": 1,
    "cpu_kernels": 1,
    "files": 1,
    "native": 1,
    "triton_kernels": 1,
    "indexing": 2,
    "ops": 2,
    "caches": 3,
    "cases": 3,
    "choosing": 3,
    "edits": 3,
    "edits_io": 3,
    "edits_schema": 3,
    "folding": 3,
    "forwards": 3,
    "growth": 3,
    "keeping": 3,
    "memory": 3,
    "minigpt4": 3,
    "models": 3,
    "modules": 3,
    "naming": 3,
    "neurons": 3,
    "projections": 3,
    "room": 3,
    "routing": 3,
    "tracker": 3,
    "unchanged": 3,
    "attaching": 4,
    "fused": 4,
    "explain": 4,
    "handle": 4,
    "hooks": 4,
    "labels": 4,
    "patching": 4,
    "planning": 4,
    "records": 4,
    "statuses": 4,
    "editing": 5,
    "evaluation": 5,
    "__init__": 6,
    "cli": 6,
}
PATCH_NEEDS = 4  # `patch` and all below it must work where torch is the only other package
MAX_LINES = 500
MAY_PRINT = ("cli",)
SWITCHED_OFF = re.compile(r"type:\s*ignore(\[[^]]*\])?|noqa(:\s*([A-Z]+\d+[,\s]*)+)?")


class Import(NamedTuple):
    """One import: of a module of the package (dotted, from its root), or of a top-level package outside."""

    line: int
    inside: str | None
    outside: str | None
    runs_at_import: bool


def test_every_layer_is_of_something():
    there = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.rglob("*.py")}
    assert not set(LAYERS) - there


def module_name(path: Path, root: Path) -> str:
    """`ops/cosine_topk.py` -> `ops.cosine_topk`, `ops/__init__.py` -> `ops`, the package's own -> `__init__`."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """All imports of a file, those inside functions and under TYPE_CHECKING included."""
    inside = {module_name(file, root) for file in root.rglob("*.py")}
    here = path.relative_to(root).with_suffix("").parts

    def resolve(dotted: str) -> str:
        """The module that `dotted` names, or the one that owns it: `edits.Edits` -> `edits`."""
        while dotted and dotted not in inside:
            dotted = dotted.rpartition(".")[0]
        return dotted or "__init__"

    def targets(node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str | None, str | None]]:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            prefix = [root.name, *here[: len(here) - node.level]] if node.level else []
            base = ".".join(prefix + ([node.module] if node.module else []))
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            top, _, rest = name.partition(".")
            yield (resolve(rest), None) if top == root.name else (None, top)

    def walk(node: ast.AST, runs: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for target, outside in targets(child):
                    yield Import(child.lineno, target, outside, runs)
                continue
            deferred = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            )
            yield from walk(child, runs and not deferred)

    yield from walk(ast.parse(path.read_text()), True)


def check_directions(root: Path) -> list[str]:
    """Every file has a layer and imports from its own or lower ones."""
    wrong = []
    for path in sorted(root.rglob("*.py")):
        room = module_name(path, root).split(".")[0]
        if room not in LAYERS:
            wrong.append(f"{path.relative_to(root)}: no layer; add {room!r} to LAYERS in tests/test_layers.py")
            continue
        for found in imports_of(path, root):
            if found.inside is None:
                continue
            target = found.inside.split(".")[0]
            if LAYERS.get(target, 0) > LAYERS[room]:
                wrong.append(
                    f"{path.relative_to(root)}:{found.line}: layer {LAYERS[room]} imports {found.inside!r} "
                    f"of layer {LAYERS[target]}"
                )
    return wrong


def check_circles(root: Path) -> list[str]:
    """No file imports itself through others."""
    graph = {
        module_name(path, root): {found.inside for found in imports_of(path, root) if found.inside}
        for path in root.rglob("*.py")
    }
    wrong: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            wrong.append(" -> ".join([*trail[trail.index(module) :], module]))
        elif module not in done:
            for target in sorted(graph.get(module, ())):
                if target != module:
                    visit(target, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return wrong


def check_light(root: Path) -> list[str]:
    """Loading a module up to PATCH_NEEDS loads torch and nothing else from outside, through however many files."""
    graph = {module_name(path, root): list(imports_of(path, root)) for path in root.rglob("*.py")}
    allowed = {"torch", *sys.stdlib_module_names}
    wrong = []
    for module in sorted(graph):
        room = module.split(".")[0]
        if LAYERS.get(room, 0) > PATCH_NEEDS:
            continue
        reached, todo = set(), [module]
        while todo:
            name = todo.pop()
            if name in reached:
                continue
            reached.add(name)
            for found in graph.get(name, ()):
                if not found.runs_at_import:
                    continue
                if found.inside:
                    todo.append(found.inside)
                elif found.outside not in allowed | ({"triton"} if room == "triton_kernels" else set()):
                    wrong.append(f"{module}: loads {found.outside!r} at import, in {name} line {found.line}")
    return wrong


def check_text(root: Path) -> list[str]:
    """No file too long, no check switched off without a reason beside it, no print in a library."""
    wrong = []
    for path in sorted(root.rglob("*.py")):
        text, name = path.read_text(), path.relative_to(root)
        lines = len(text.splitlines())
        if lines > MAX_LINES:
            wrong.append(f"{name}: {lines} lines, more than {MAX_LINES}")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                rest, marks = SWITCHED_OFF.subn("", token.string)
                if marks and not re.search(r"[a-z]{2}", rest):
                    wrong.append(f"{name}:{token.start[0]}: {token.string!r} needs its reason beside it")
        if path.stem not in MAY_PRINT:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                    wrong.append(f"{name}:{node.lineno}: print in the library")
    return wrong


CHECKS = [check_directions, check_circles, check_light, check_text]


@pytest.mark.parametrize("check", CHECKS)
def test_house_rule(check):
    assert check(PACKAGE) == []


# Each rule must catch its violation: files of a small package, the rule, and a part of what it must say.
PLANTED = {
    "upward": ({"config.py": "from .patching import patch\n"}, check_directions, "'patching' of layer 4"),
    "upward, absolute": ({"config.py": "import unike_kernels.ops\n"}, check_directions, "'ops' of layer 2"),
    "upward, in a function": (
        {"ops/x.py": "def f():\n    from ..modules import M\n"},
        check_directions,
        "ops/x.py:2: layer 2 imports 'modules' of layer 3",
    ),
    "upward, the package": ({"edits.py": "from . import __version__\n"}, check_directions, "'__init__' of layer 6"),
    "no layer": ({"helpers.py": ""}, check_directions, "add 'helpers' to LAYERS"),
    "circle": (
        {"edits.py": "from . import memory\n", "memory.py": "from .edits import E\n"},
        check_circles,
        "edits -> ",
    ),
    "circle in a folder": (
        {"ops/a.py": "from .b import f\n", "ops/b.py": "def g():\n    from . import a\n"},
        check_circles,
        "ops.a -> ops.b -> ops.a",
    ),
    "heavy": ({"patching.py": "import transformers\n"}, check_light, "patching: loads 'transformers'"),
    "heavy, if it is there": (
        {"native.py": "try:\n    import numpy as np\nexcept ImportError:\n    pass\n"},
        check_light,
        "native: loads 'numpy'",
    ),
    "heavy, through a kernel": (
        {"ops/a.py": "from ..triton_kernels import a\n", "triton_kernels/a.py": "import triton\n"},
        check_light,
        "ops.a: loads 'triton' at import, in triton_kernels.a line 1",
    ),
    "long": ({"config.py": "x = 1\n" * 501}, check_text, "501 lines"),
    "type: ignore": ({"config.py": "x = 1  # type: ignore[attr-defined]\n"}, check_text, "needs its reason"),
    "noqa": ({"config.py": "import os  # noqa: F401\n"}, check_text, "needs its reason"),
    "print": ({"memory.py": "print('here')\n"}, check_text, "print in the library"),
}


def _write(root: Path, files: dict[str, str]) -> Path:
    modules = ["config", "edits", "memory", "modules", "patching"]
    for name, text in {**{f"{m}.py": "" for m in modules}, "__init__.py": "", "ops/__init__.py": "", **files}.items():
        path = root / "unike_kernels" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root / "unike_kernels"


@pytest.mark.parametrize("name", PLANTED)
def test_planted_violation_is_caught(name, tmp_path):
    files, check, message = PLANTED[name]
    assert any(message in line for line in check(_write(tmp_path, files)))


def test_allowed_things_pass(tmp_path):
    root = _write(
        tmp_path,
        {
            "config.py": "import json\nimport torch.nn.functional as F\n",
            "edits.py": "from typing import TYPE_CHECKING\n"
            "from .config import x\n"
            "if TYPE_CHECKING:\n    import numpy\n"
            "def save():\n    import safetensors.torch\n    from .memory import y\n",
            "triton_kernels/a.py": "import triton\nfrom triton import language as tl\n",
            "ops/a.py": "def launch():\n    from ..triton_kernels import a\n",
            "ops/__init__.py": "from .a import launch\nimport os  # noqa: F401 re-exported for old callers\n",
            "__init__.py": "from .patching import patch\nfrom . import ops\n",
            "cli.py": "import typer\nprint('help')\n",
        },
    )
    assert [line for check in CHECKS for line in check(root)] == []
