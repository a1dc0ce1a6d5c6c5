"""The goals for speed, each printed as met or missed with its figure, or as not measured where nothing of it was.

GPU goals hold for the H200; figures are medians of captured graphs there, and the fastest runs on a CPU, where other
work on the machine only ever adds. A goal names its worst figure and where that stands.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.latency.case import CUDA, INDEXED, OURS, TRITON

Results = dict[str, Any]
Figure = tuple[float, str]
Figures = Callable[[Results], list[Figure]]
GATE = Path(__file__).resolve().parents[2] / "tests" / "compile_gate.json"


@dataclass(frozen=True)
class Goal:
    """`figures(results)`: what was measured of it, each with where it stands."""

    text: str
    device: str  # "cuda", "cpu" or "any"
    figures: Figures
    bound: float
    at_most: bool = False

    def line(self, results: Results) -> str:
        found = self.figures(results) if self.device in ("any", _device(results)) else []
        if not found:
            return f"not measured here: {self.text}"
        value, where = max(found) if self.at_most else min(found)
        met = value <= self.bound if self.at_most else value >= self.bound
        return f"{'met' if met else 'MISSED'}: {self.text}: {value:.3f} ({where})"


def goals(results: Results) -> Iterator[str]:
    """One line for every goal."""
    for goal in GOALS:
        yield goal.line(results)


def _device(results: Results) -> str:
    return "cuda" if "cuda" in results["environment"] else "cpu"


# ------------------------------------------------------------------------------------------------------------ figures


def time_of(timings: dict[str, Any], name: str, device: str) -> float | None:
    """Microseconds of a provider; None where it was not timed, or not from a graph though it should have been."""
    timing = timings.get(name)
    if timing is None or timing.get("why"):
        return None
    return timing["median" if device == "cuda" else "fastest"]


def ours(case: dict[str, Any], device: str) -> float | None:
    """The quicker of this package's own, which a user can choose between by `backend`."""
    found = [time_of(case["timings"], name, device) for name in (OURS, CUDA, TRITON)]
    return min((time for time in found if time is not None), default=None)


def _cases(
    results: Results, operator: str, shape: str | None, sizes: dict[str, tuple[int, ...]], dtype: str | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The cases of an operator whose sizes are among these; a size that is not named must not be there."""
    for name, case in results["cases"].items():
        if case["operator"] != operator or shape not in (None, case["shape"]):
            continue
        if (dtype or ("bfloat16" if _device(results) == "cuda" else "float32")) != case["dtype"]:
            continue
        if set(sizes) == set(case["sizes"]) and all(case["sizes"][key] in among for key, among in sizes.items()):
            yield name, case


def _over(
    rival: str,
    operator: str,
    shape: str | None = None,
    own: str | None = None,
    dtype: str | None = None,
    **sizes: tuple[int, ...],
) -> Figures:
    """The time of `rival` over ours (`own`: of that provider alone)."""

    def figures(results: Results) -> list[Figure]:
        device, found = _device(results), []
        for name, case in _cases(results, operator, shape, sizes, dtype):
            theirs = ours(case, device) if rival == OURS else time_of(case["timings"], rival, device)
            mine = ours(case, device) if own is None else time_of(case["timings"], own, device)
            if theirs is not None and mine is not None:
                found.append((theirs / mine, name))
        return found

    return figures


def _with_units(units: bool, figures: Figures) -> Figures:
    """Those of a CPU that has units for bfloat16, which torch's product then uses; or of one that has none."""

    def found(results: Results) -> list[Figure]:
        return figures(results) if results["environment"].get("bf16_units", False) == units else []

    return found


def _share_of_copy(operator: str, shape: str, **sizes: tuple[int, ...]) -> Figures:
    """Bytes that cannot be avoided, over our time and the copy bandwidth of the same run."""

    def figures(results: Results) -> list[Figure]:
        found = []
        for name, case in _cases(results, operator, shape, sizes):
            mine = ours(case, _device(results))
            if mine is not None:
                found.append((case["moved_bytes"] / (mine * 1e-6) / results["copy_bandwidth"], name))
        return found

    return figures


def _times_the_floor(operator: str, shape: str, **sizes: tuple[int, ...]) -> Figures:
    shares = _share_of_copy(operator, shape, **sizes)
    return lambda results: [(1 / share, name) for share, name in shares(results)]


def _microseconds(operator: str, shape: str | None = None, **sizes: tuple[int, ...]) -> Figures:
    def figures(results: Results) -> list[Figure]:
        cases = _cases(results, operator, shape, sizes)
        return [(time, name) for name, case in cases if (time := ours(case, _device(results))) is not None]

    return figures


def ratio(stack: dict[str, Any], device: str) -> float | None:
    """Patched over unpatched; None where one of them was not timed as it should."""
    patched, base = (time_of(stack.get("timings", {}), name, device) for name in ("patched", "unpatched"))
    return None if patched is None or base is None else patched / base


def _step(shape: str, rows: int, per: str = "case", edits: tuple[int, ...] | None = None, **wanted: Any) -> Figures:
    """Patched over unpatched decoding steps of these decoders, N = 10,000."""

    def figures(results: Results) -> list[Figure]:
        sizes = {"shape": shape, "rows": rows, "per": per, "items": 10_000, "prefill": 0} | wanted
        found = []
        for name, stack in results["stacks"].items():
            fits = all(stack["sizes"][key] == value for key, value in sizes.items())
            if fits and (edits is None or stack["sizes"]["edits"] in edits):
                value = ratio(stack, _device(results))
                if value is not None:
                    found.append((value, name))
        return found

    return figures


def _spread_over_edits(shape: str) -> Figures:
    """How far routed decoding steps lie apart, from 100 to 10,000 resident edits."""

    def figures(results: Results) -> list[Figure]:
        steps = _step(shape, 1, edits=(100, 1_000, 10_000), routed=True)(results)
        if len(steps) < 2:
            return []
        return [(max(steps)[0] - min(steps)[0], f"{min(steps)[1]} to {max(steps)[1]}")]

    return figures


def _compiled(what: str) -> Figures:
    """What the compile gate's committed table says: of every Triton kernel at the sizes that a launcher starts."""

    def figures(results: Results) -> list[Figure]:
        if not GATE.exists():
            return []
        variants = json.loads(GATE.read_text(encoding="utf-8"))["variants"]
        found = []
        for name, row in variants.items():
            if "back" in name or "grad" in name:
                continue  # training may spill a little; a decoding step may not
            found.append((float(row[what]), name))
        return found

    return figures


# -------------------------------------------------------------------------------------------------------------- goals

FEW, DECODE = (1, 4, 16), (1, 4, 16, 64)
VICUNA, OPT = "vicuna-7b", "opt-2.7b"

GOALS = [
    # The first of all: what a user pays for a token.
    Goal("Vicuna-7B decoding step, retrieval per case, <= 1.015", "cuda", _step(VICUNA, 1), 1.015, True),
    Goal("OPT-2.7B decoding step, retrieval per case, <= 1.03", "cuda", _step(OPT, 1), 1.03, True),
    *(
        Goal(
            f"{shape} decoding step at bs {rows}, retrieval per token, <= {bound}",
            "cuda",
            _step(shape, rows, "token"),
            bound,
            True,
        )
        for shape, rows, bound in ((VICUNA, 1, 1.04), (VICUNA, 16, 1.03), (VICUNA, 64, 1.02), (OPT, 1, 1.07))
    ),
    *(
        Goal(
            f"{shape} decoding step, 100 to 10,000 resident edits lie within 0.005",
            "cuda",
            _spread_over_edits(shape),
            0.005,
            True,
        )
        for shape in (VICUNA, OPT)
    ),
    Goal("tiny BLIP-2 decoding step on a CPU, 10,000 items, <= 1.10", "cpu", _step("tiny-blip2", 1), 1.10, True),
    Goal("LLaMA of 100 M decoding step on a CPU, 10,000 items, <= 1.10", "cpu", _step("llama-100m", 1), 1.10, True),
    # Goal 2
    Goal(
        "2: search and shift of one token, torch's captured over ours, >= 6",
        "cuda",
        _over("torch", "external path", T=(1,), N=(1_000, 10_000)),
        6.0,
    ),
    Goal(
        "2: search and shift of one token at 1,000 items, us, <= 9",
        "cuda",
        _microseconds("external path", VICUNA, T=(1,), N=(1_000,)),
        9.0,
        True,
    ),
    Goal(
        "2: search and shift of one token at 10,000 items, us, <= 27",
        "cuda",
        _microseconds("external path", T=(1,), N=(10_000,)),
        27.0,
        True,
    ),
    # Goal 3
    *(
        Goal(
            f"3: search at {items:,} items, d = 4096, T = 1, 4, 16, share of copy bandwidth >= {bound}",
            "cuda",
            _share_of_copy("cosine_topk", VICUNA, T=FEW, N=(items,)),
            bound,
        )
        for items, bound in ((1_000_000, 0.92), (100_000, 0.85), (10_000, 0.70))
    ),
    # Goal 4
    *(
        Goal(
            f"4: search, torch.mm + topk over ours at {' and '.join(f'{n:,}' for n in items)} items, >= {bound}",
            "cuda",
            _over("mm + topk", "cosine_topk", T=DECODE, N=items),
            bound,
        )
        for items, bound in (((1_000, 4_000), 4.0), ((10_000,), 3.0), ((100_000,), 1.3), ((1_000_000,), 1.08))
    ),
    # Goal 5
    Goal(
        "5: int8 search with exact re-rank over the one in bf16, 100,000 and 1,000,000 items, >= 1.8",
        "cuda",
        _over(OURS, "cosine_topk", VICUNA, own=INDEXED, T=FEW, N=(100_000, 1_000_000)),
        1.8,
    ),
    # Goal 9
    Goal(
        "9: shift of 64 tokens, share of copy bandwidth >= 0.80",
        "cuda",
        _share_of_copy("knowledge_shift", VICUNA, T=(64,), K=(40, 80)),
        0.80,
    ),
    Goal("9: shift of one token, us, <= 3", "cuda", _microseconds("knowledge_shift", T=(1,), K=(40, 80)), 3.0, True),
    Goal(
        "9: shift, torch.compile over ours, >= 5",
        "cuda",
        _over("step by step, compiled", "knowledge_shift", T=(1, 64), K=(40,)),
        5.0,
    ),
    Goal(
        "9: shift, eager torch over ours, >= 10",
        "cuda",
        _over("step by step, eager", "knowledge_shift", T=(1, 64), K=(40, 80)),
        10.0,
    ),
    # Goal 11
    Goal(
        "11: 64 edit sets at once, times the floor of their bytes, <= 1.6",
        "cuda",
        _times_the_floor("extra_neurons", VICUNA, T=(64,), sets=(64,)),
        1.6,
        True,
    ),
    Goal(
        "11: 64 edit sets at once, us, <= 12",
        "cuda",
        _microseconds("extra_neurons", VICUNA, T=(64,), sets=(64,)),
        12.0,
        True,
    ),
    Goal(
        "11: 64 edit sets at once, vLLM's LoRA kernels over ours, >= 1.5",
        "cuda",
        _over("vLLM LoRA", "extra_neurons", T=(64,), sets=(64,)),
        1.5,
    ),
    Goal(
        "11: 64 edit sets at once, a loop over requests over ours, >= 20",
        "cuda",
        _over("loop over requests", "extra_neurons", T=(64,), sets=(64,)),
        20.0,
    ),
    Goal("11: Vicuna-7B decoding step of 64 requests with 64 edits, <= 1.03", "cuda", _step(VICUNA, 64), 1.03, True),
    # Goal 12
    Goal(
        "12: 64 banks of about 1,000 items, share of copy bandwidth >= 0.80",
        "cuda",
        _share_of_copy("cosine_topk", VICUNA, T=(64,), bank=(1_000,)),
        0.80,
    ),
    # Goal 15
    *(
        Goal(
            f"15: int8 search on a CPU, torch.mm + topk in fp32 over it at T = 1, {items:,} items, >= 4",
            "cpu",
            _over("mm + topk", "cosine_topk", own=INDEXED, T=(1,), N=(items,)),
            4.0,
        )
        for items in (10_000, 100_000)
    ),
    Goal(
        "15: search on a CPU at T >= 8, torch.mm + topk over ours, >= 0.95",
        "cpu",
        _over("mm + topk", "cosine_topk", T=(8, 16), N=(1_000, 10_000, 100_000)),
        0.95,
    ),
    *(
        Goal(
            f"15: search of bf16 keys on a CPU {'with' if units else 'without'} units for bf16 at T >= 8, "
            f"torch's bf16 product over ours, >= {bound}",
            "cpu",
            _with_units(units, _over("mm + topk", "cosine_topk", dtype="bfloat16", T=(8,), N=(10_000,))),
            bound,
        )
        for units, bound in ((False, 20.0), (True, 0.95))
    ),
    # Goal 16
    Goal("16: forward kernels in Triton, spilled bytes, <= 0", "any", _compiled("spills"), 0.0, True),
    Goal("16: forward kernels in Triton, registers, <= 168", "any", _compiled("registers"), 168.0, True),
    Goal(
        "shift on a CPU at one token, torch by hand over ours, >= 1",
        "cpu",
        _over("gather + sdpa", "knowledge_shift", T=(1,), K=(40,)),
        1.0,
    ),
    Goal(
        "routed neurons on a CPU at one token, torch by hand over ours, >= 1",
        "cpu",
        _over("gather + bmm", "extra_neurons", T=(1,), edits=(100, 1_000)),
        1.0,
    ),
]
