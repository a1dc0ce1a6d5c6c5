"""Launch choices: a table per kernel, architecture and shape. Never measured while a model runs.

A row is (kernel, architecture, {size: largest value it is for}, choice); the first row that fits wins. Architecture 0
means any, the interpreter included: every kernel ends with such a row. `unike-kernels tune` measures on the GPU at hand
and writes rows to a file. Rows in the file named by UNIKE_TUNING are asked before those below; it is JSON, a list of
{"kernel": name, "arch": 90, "at_most": {size: int}, "choice": {name: int}}.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

INTERPRETER = 1  # the "architecture" of CPU tensors
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may have; of others, the least
_pretended: int | None = None
_try: Any = None


class Row(NamedTuple):
    """One line of the table. choice: block sizes, num_warps, num_stages, as the kernel takes them."""

    kernel: str
    arch: int
    at_most: Mapping[str, int]
    choice: Mapping[str, int]


# Estimated from the H200's figures until a GPU has measured them; each kernel's rows stand in its own file.
ROWS: list[Row] = []


def architecture(device: torch.device) -> int:
    """80, 89, 90, 100, ... of a CUDA device; INTERPRETER for the CPU; what `pretend` says for meta tensors."""
    if _pretended is not None:
        return _pretended
    if device.type != "cuda":
        return INTERPRETER
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def choose(kernel: str, device: torch.device, **sizes: int) -> Mapping[str, int]:
    """The choice for `kernel` on `device` at these sizes; a copy, so that a launcher may drop or add a key."""
    arch = architecture(device)
    for row in rows():
        if row.kernel == kernel and row.arch in (0, arch):
            unknown = sorted(set(row.at_most) - set(sizes))
            if unknown:
                raise ValueError(
                    f"{row} asks for {', '.join(unknown)}, but {kernel} has {', '.join(sizes) or 'no sizes'}"
                )
            if all(sizes[size] <= most for size, most in row.at_most.items()):
                return dict(row.choice if _try is None else _try(row))
    raise LookupError(f"no launch choice for {kernel} on architecture {arch} at {sizes}")


def fitting(choice: Mapping[str, int], rows: int, size: int, device: torch.device) -> dict[str, int]:
    """`choice` with fewer stages, then narrower ones, where what they hold has no room in a block's shared memory.

    Each stage holds `rows` rows of BLOCK_D elements of `size` bytes; before sm_90 Triton takes one buffer less.
    """
    arch, out = architecture(device), dict(choice)
    if arch == INTERPRETER:
        return out
    room = SHARED.get(arch, min(SHARED.values()))
    while out["BLOCK_D"] > 16 and rows * size * out["BLOCK_D"] * (out["num_stages"] - (arch < 90)) > room:
        if out["num_stages"] > 2:
            out["num_stages"] -= 1
        else:
            out["BLOCK_D"] //= 2
    return out


def rows() -> tuple[Row, ...]:
    """All rows, in the order in which they are asked."""
    return (*_measured(os.environ.get("UNIKE_TUNING")), *ROWS)


@contextmanager
def trying(choice_of: Callable[[Row], Mapping[str, int]]) -> Iterator[None]:
    """Inside, `choice_of(row)` takes the place of the choice of a row that fits."""
    global _try
    before, _try = _try, choice_of
    try:
        yield
    finally:
        _try = before


@contextmanager
def pretend(arch: int) -> Iterator[None]:
    """Inside, every device counts as one of this architecture: how kernels are compiled for GPUs that are not here."""
    global _pretended
    before, _pretended = _pretended, arch
    try:
        yield
    finally:
        _pretended = before


@lru_cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


@lru_cache
def _measured(path: str | None) -> tuple[Row, ...]:
    """The rows of a file. ValueError, which names the file and the entry, when it is not as it should be."""
    if not path:
        return ()
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise ValueError(f"UNIKE_TUNING names {path}, which cannot be read: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"UNIKE_TUNING names {path}, which must hold a JSON list of rows")
    for i, entry in enumerate(entries):
        wrong = _wrong(entry)
        if wrong is not None:
            raise ValueError(f"UNIKE_TUNING names {path}, where row {i}, {json.dumps(entry)}, is wrong: {wrong}")
    return tuple(Row(**entry) for entry in entries)


def _wrong(entry: Any) -> str | None:
    """What is wrong with an entry of a file; None when it is a row."""
    if not isinstance(entry, dict) or set(entry) != set(Row._fields):
        return f"it must be an object with {', '.join(Row._fields)} and nothing else"
    if not isinstance(entry["kernel"], str):
        return "kernel must be a name"
    if type(entry["arch"]) is not int or entry["arch"] < 0:
        return "arch must be an integer such as 90, or 0 for any"
    for field, least in (("at_most", 0), ("choice", 1)):
        numbers = entry[field]
        if not isinstance(numbers, dict) or not all(type(n) is int and n >= least for n in numbers.values()):
            return f"{field} must be an object of integers, each at least {least}"
    return None
