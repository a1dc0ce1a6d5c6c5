"""The goals for speed, each printed as met or missed with its figure, or as not measured where nothing of it was."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.latency.cases import INDEXED, OURS

Results = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """`figure(results)` gives the worst figure and where it stands, None where nothing was measured."""

    text: str
    device: str
    figure: Callable[[Results], tuple[float, str] | None]
    bound: float
    at_most: bool

    def line(self, results: Results) -> str:
        found = self.figure(results) if _device(results) == self.device else None
        if found is None:
            return f"not measured here: {self.text}"
        value, where = found
        met = value <= self.bound if self.at_most else value >= self.bound
        return f"{'met' if met else 'MISSED'}: {self.text}: {value:.3f} ({where})"


def goals(results: Results) -> Iterator[str]:
    """One line for every goal."""
    for goal in GOALS:
        yield goal.line(results)


def _device(results: Results) -> str:
    return "cuda" if "cuda" in results["environment"] else "cpu"


def _step(shape: str, rows: int, items: int = 10_000) -> Callable[[Results], tuple[float, str] | None]:
    """The worst patched / unpatched step of these decoders."""

    def figure(results: Results) -> tuple[float, str] | None:
        prefix = f"{shape} bs={rows} N={items} "
        found = [
            (timings["patched"]["median"] / timings["unpatched"]["median"], name)
            for name, timings in results["stacks"].items()
            if name.startswith(prefix)
        ]
        return max(found, default=None)

    return figure


def _faster(rival: str, items: tuple[int, ...], queries: tuple[int, ...]) -> Callable[[Results], Any]:
    """The smallest time of `rival` over ours among searches of these sizes."""

    def figure(results: Results) -> tuple[float, str] | None:
        found = [
            (case["timings"][rival]["fastest"] / case["timings"][OURS]["fastest"], name)
            for name, case in results["cases"].items()
            if case["operator"] == "cosine_topk"
            and case["sizes"]["N"] in items
            and case["sizes"]["T"] in queries
            and rival in case["timings"]
        ]
        return min(found, default=None)

    return figure


def _indexed(items: tuple[int, ...]) -> Callable[[Results], Any]:
    """The smallest time of torch.mm + topk over the int8 index's, for one query."""

    def figure(results: Results) -> tuple[float, str] | None:
        found = [
            (case["timings"]["mm + topk"]["fastest"] / case["timings"][INDEXED]["fastest"], name)
            for name, case in results["cases"].items()
            if INDEXED in case["timings"] and case["sizes"]["N"] in items and case["sizes"]["T"] == 1
        ]
        return min(found, default=None)

    return figure


def _of_copy(items: int) -> Callable[[Results], Any]:
    """The smallest share of the copy bandwidth that a search of `items` reaches, d = 4096."""

    def figure(results: Results) -> tuple[float, str] | None:
        found = [
            (case["moved_bytes"] / (case["timings"][OURS]["median"] * 1e-6) / results["copy_bandwidth"], name)
            for name, case in results["cases"].items()
            if case["operator"] == "cosine_topk"
            and case["shape"] == "vicuna-7b"
            and case["sizes"]["N"] == items
            and case["sizes"]["T"] in (1, 16)
        ]
        return min(found, default=None)

    return figure


GOALS = [
    Goal(
        "int8 search on a CPU, torch.mm + topk over it at T = 1, 10,000 items, >= 4",
        "cpu",
        _indexed((10_000,)),
        4.0,
        False,
    ),
    Goal("Vicuna-7B decoding step, retrieval per case, <= 1.015", "cuda", _step("vicuna-7b", 1), 1.015, True),
    Goal("OPT-2.7B decoding step, retrieval per case, <= 1.03", "cuda", _step("opt-2.7b", 1), 1.03, True),
    Goal("search at 1,000,000 items, share of copy bandwidth >= 0.92", "cuda", _of_copy(1_000_000), 0.92, False),
    Goal("search at 100,000 items, share of copy bandwidth >= 0.85", "cuda", _of_copy(100_000), 0.85, False),
    Goal("search at 10,000 items, share of copy bandwidth >= 0.70", "cuda", _of_copy(10_000), 0.70, False),
    Goal(
        "search, torch.mm + topk over ours at 1,000 items, >= 4",
        "cuda",
        _faster("mm + topk", (1_000,), (1, 16, 64)),
        4.0,
        False,
    ),
    Goal("tiny BLIP-2 decoding step on a CPU, 10,000 items, <= 1.10", "cpu", _step("tiny-blip2", 1), 1.10, True),
    Goal("LLaMA of 100 M decoding step on a CPU, 10,000 items, <= 1.10", "cpu", _step("llama-100m", 1), 1.10, True),
    Goal(
        "search on a CPU at T = 8, torch.mm + topk over ours, >= 0.95",
        "cpu",
        _faster("mm + topk", (1_000, 10_000), (8,)),
        0.95,
        False,
    ),
]
