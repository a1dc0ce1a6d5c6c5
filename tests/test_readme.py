"""The README's Python runs, block after block, and what it asserts is true."""

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def blocks(text: str) -> list[tuple[int, str]]:
    """(line of its first statement, source) of every ```python block."""
    return [
        (text.count("\n", 0, found.start(1)) + 1, found.group(1))
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def test_blocks_are_found_with_their_lines():
    text = "a\n```python\nx = 1\n```\n```sh\nls\n```\n```python\ny = 2\n```\n"
    assert blocks(text) == [(3, "x = 1\n"), (9, "y = 2\n")]


def test_readme_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # an example may write files
    found = blocks(README.read_text())
    assert found
    names: dict[str, object] = {"__name__": "readme"}  # one namespace: a later block may use an earlier one's names
    for line, source in found:
        exec(compile("\n" * (line - 1) + source, str(README), "exec"), names)
