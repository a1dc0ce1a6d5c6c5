"""The results as plots: latency against tokens, items, extra neurons and the number of resident edits."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.latency.case import OURS

# What is drawn over what: file name, operator, the size on the x axis, its label.
PLOTS = (
    ("search-items", "cosine_topk", "N", "items in the memory"),
    ("search-tokens", "cosine_topk", "T", "queries at once"),
    ("ffn-neurons", "augmented_ffn", "extra", "extra neurons, always on"),
    ("routed-edits", "extra_neurons", "edits", "resident edits, one acts on each token"),
    ("shift-tokens", "knowledge_shift", "T", "tokens at once"),
)


def draw(results: dict[str, Any], stem: Path) -> Iterator[Path]:
    """Writes one PNG for every plot that has at least three points on a line: `<stem>-<name>.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    where = results["environment"]
    for name, operator, axis, label in PLOTS:
        chosen = series(results, operator, axis)
        if not chosen:
            continue
        figure, panel = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        for provider, points in chosen[1].items():
            style = {"linewidth": 2.5, "color": "black"} if provider == OURS else {"linewidth": 1.2}
            panel.plot(*zip(*points, strict=True), marker="o", label=provider, **style)
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel="microseconds")
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
        panel.set_title(
            f"{operator}, {chosen[0]}\n{where['device']}, torch {where['torch']}, {where['commit']}", fontsize=9
        )
        path = stem.parent / f"{stem.name}-{name}.png"
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
        yield path


def series(results: dict[str, Any], operator: str, axis: str) -> tuple[str, dict[str, list[tuple[int, float]]]] | None:
    """(what is fixed, {provider: [(size, microseconds)]}) of the most sizes along `axis`; None below three."""
    which = "median" if "cuda" in results["environment"] else "fastest"
    lines: dict[str, list[dict[str, Any]]] = {}
    for case in results["cases"].values():
        if case["operator"] != operator or axis not in case["sizes"]:
            continue
        fixed = " ".join(f"{key}={value}" for key, value in case["sizes"].items() if key != axis)
        lines.setdefault(f"{case['shape']} {case['dtype']} {fixed}", []).append(case)
    if not lines:
        return None
    title, cases = max(lines.items(), key=lambda line: len(line[1]))
    if len(cases) < 3:
        return None
    found: dict[str, list[tuple[int, float]]] = {}
    for case in sorted(cases, key=lambda case: case["sizes"][axis]):
        for provider, timing in case["timings"].items():
            if not timing.get("why"):
                found.setdefault(provider, []).append((case["sizes"][axis], timing[which]))
    return title, {provider: points for provider, points in found.items() if len(points) > 1}
