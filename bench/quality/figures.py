"""The paper's Figures 4a to 4c and 5a as PNG files, drawn from saved results."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.quality.cells import Found, Store
from bench.quality.claims import GENERALITY, LOCALITY
from bench.quality.differences import difference
from bench.quality.rows import ALPHAS, FIGURES, ITEMS
from bench.quality.tables import HEADS, KINDS
from unike_kernels.files import replacing

NAMES = ("4a", "4b", "4c", "5a")
LINES = {"generality (T-Gen, M-Gen)": GENERALITY, "locality A (T-Loc, M-Loc)": LOCALITY}
COLORS = ("#0072b2", "#d55e00", "#009e73", "#999999")  # told apart by colour-blind eyes, too
NOTHING = Found(metrics=dict.fromkeys(KINDS, 0.0), errors=dict.fromkeys(KINDS, 0.0))


def draw(name: str, folder: Path) -> Path | None:
    """Writes figure-<name>.png into the folder; None where nothing is saved for it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = PANELS[name](folder)
    if not panels:
        return None
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(max(6.4, 5.0 * across), 4.2 * down), layout="constrained", squeeze=False
    )
    for panel, axis in itertools.zip_longest(panels, axes.flat):
        panel(axis) if panel else axis.set_axis_off()
    path = folder / f"figure-{name}.png"
    with replacing(path) as half:
        figure.savefig(half, format="png", dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return path


Panel = Callable[[Any], None]


def found(folder: Path, base: int, rows: Sequence[str]) -> dict[str, Found]:
    """Those of the figure's rows that are saved."""
    store = Store(folder)
    named = {row: store.found(base, "one-step", 1, "name", row) for row in rows}
    first = next((f for row, f in named.items() if f is not None and row != "UniKE"), None)
    if "UniKE" in named:  # which is measured on more edits elsewhere
        named["UniKE"] = store.found(base, "one-step", 1, "name", "UniKE", first)
    return {row: f for row, f in named.items() if f is not None and not f.reason}


def whole(f: Found, kinds: Sequence[str]) -> tuple[float, float]:
    """The mean of these metrics with its standard error."""
    d = difference(f, Found(metrics=NOTHING.metrics, errors=NOTHING.errors), kinds)
    assert d is not None
    return d.value, d.error


def title(base: int, rows: dict[str, Found]) -> str:
    """Which model, and how much was measured."""
    return f"base model {base}, {min(f.edits for f in rows.values())} one-step edits of names"


def items(folder: Path) -> list[Panel]:
    """4a: generality and locality against the number of items."""

    def panel(axis: Any, base: int, rows: dict[str, Found]) -> None:
        for (label, kinds), color in zip(LINES.items(), COLORS, strict=False):
            points = [
                (n, *whole(rows[row.name], kinds))
                for n, row in zip(ITEMS, FIGURES["4a"], strict=True)
                if row.name in rows
            ]
            x, y, e = zip(*points, strict=True)
            axis.errorbar(x, y, e, marker="o", capsize=3, color=color, label=label)
        axis.set(xscale="log", xlabel="items retrieved", ylabel="percent", title=title(base, rows))
        axis.set_xticks(ITEMS, [str(n) for n in ITEMS])
        axis.minorticks_off()
        axis.set_xlim(0.9, 45)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)

    return _panels(folder, "4a", panel)


def alphas(folder: Path) -> list[Panel]:
    """4b: fixed alphas against adaptive alpha."""

    def panel(axis: Any, base: int, rows: dict[str, Found]) -> None:
        for (label, kinds), color in zip(LINES.items(), COLORS, strict=False):
            points = [(a, *whole(rows[n], kinds)) for a in ALPHAS if (n := f"UniKE, alpha {a:g}") in rows]
            if points:
                x, y, e = zip(*points, strict=True)
                axis.errorbar(x, y, e, marker="o", capsize=3, color=color, label=f"{label}, fixed")
            if "UniKE" in rows:
                y, e = whole(rows["UniKE"], kinds)
                axis.axhline(y, color=color, linestyle="--", label=f"{label}, adaptive")
                axis.axhspan(y - e, y + e, color=color, alpha=0.12, linewidth=0)
        axis.set(xlabel="alpha", ylabel="percent", title=title(base, rows))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)

    return _panels(folder, "4b", panel)


def zetas(folder: Path) -> list[Panel]:
    """4c: no, random, semantic and truthful zeta."""

    def panel(axis: Any, base: int, rows: dict[str, Found]) -> None:
        width, lowest = 0.8 / len(FIGURES["4c"]), 100.0
        for n, (row, color) in enumerate(zip(FIGURES["4c"], reversed(COLORS), strict=True)):
            if row.name not in rows:
                continue
            f = rows[row.name]
            values, errors = [f.metrics[k] for k in KINDS], [f.errors[k] for k in KINDS]
            lowest = min(lowest, *(v - (e if e == e else 0.0) for v, e in zip(values, errors, strict=True)))
            at = [i + (n - 1.5) * width for i in range(len(KINDS))]
            label = {"UniKE": "truthful zeta"}.get(row.name, row.name.removeprefix("UniKE, "))
            axis.bar(at, values, width, yerr=errors, capsize=2, color=color, label=label)
        axis.set_xticks(range(len(KINDS)), [HEADS[k] for k in KINDS])
        axis.set(
            ylabel="percent (the axis is cut)", title=title(base, rows), ylim=(max(0.0, 10 * (lowest // 10) - 5), 103)
        )
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=4)

    return _panels(folder, "4c", panel)


def spaces(folder: Path) -> list[Panel]:
    """5a: t-SNE of encoded right and wrong answers, in the semantic and in the truthfulness space."""

    def panel(axis: Any, result: dict[str, Any], name: str) -> None:
        space = result["spaces"][name]
        for part, label, color in (("pos", "right answers", COLORS[0]), ("neg", "wrong answers", COLORS[1])):
            x, y = zip(*(map(float, point.split(",")) for point in space[part].split()), strict=True)
            axis.scatter(x, y, s=7, color=color, label=label, alpha=0.7, linewidths=0)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_title(
            f"base model {result['seed']}, layer {result['layer']}, {name} space\n"
            f"{result['held_out']} held-out triplets, AUC of right over wrong {space['auc']:.2f} (mixed: 0.50)",
            fontsize=9,
        )
        axis.legend(fontsize=8)

    return [
        lambda axis, result=result, name=name: panel(axis, result, name)
        for path in sorted(folder.glob("tsne-seed*.json"))
        for result in [json.loads(path.read_text())]
        for name in result["spaces"]
    ]


def _panels(folder: Path, name: str, panel: Callable[[Any, int, dict[str, Found]], None]) -> list[Panel]:
    """One panel a base model that has rows of the figure."""
    out: list[Panel] = []
    for base in Store(folder).bases():
        rows = found(folder, base, [row.name for row in FIGURES[name]])
        if any(row.name in rows for row in FIGURES[name] if row.name != "UniKE"):
            out.append(lambda axis, base=base, rows=rows: panel(axis, base, rows))
    return out


PANELS: dict[str, Callable[[Path], list[Panel]]] = {"4a": items, "4b": alphas, "4c": zetas, "5a": spaces}
