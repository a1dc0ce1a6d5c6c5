"""Saved results as tables: markdown for the README, the same columns on the terminal."""

import statistics
from collections.abc import Sequence
from typing import Any

from bench.quality.rows import CONTROLS, ROWS
from unike_kernels.evaluation.records import KINDS

HEADS = {"rel": "Rel", "t_gen": "T-Gen", "m_gen": "M-Gen", "t_loc": "T-Loc", "m_loc": "M-Loc"}
PARTS = {
    "m_loc.other_concept": "other concept",
    "m_loc.same_subgroup": "same subgroup",
    "m_loc.same_picture": "same picture",
    "m_loc.other_question": "other question",
    "t_loc.random": "random fact",
    "t_loc.own": "own fact",
}
GOALS = {"rel": 95.0, "t_gen": 95.0, "m_gen": 75.0, "t_loc": 99.0, "m_loc": 90.0}  # of "UniKE, routed"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A markdown table, the first columns (`left`) to the left and the others to the right."""
    line = "| " + " | ".join(head) + " |"
    rule = "|" + "|".join(["---"] * left + ["---:"] * (len(head) - left)) + "|"
    return "\n".join([line, rule, *("| " + " | ".join(row) + " |" for row in rows)])


def number(value: float | None, error: float | None = None) -> str:
    """A percentage with its standard error; a dash where there is none."""
    if value is None or value != value:
        return "-"
    return f"{value:.1f}" if error is None or error != error else f"{value:.1f} ± {error:.1f}"


def ordered(rows: dict[str, Any]) -> list[tuple[str, Any]]:
    """Rows as the ablation defines them: the base, the method's parts, each stack after its row, then the controls."""
    names = ["base", *(row.name for row in (*ROWS, *CONTROLS))]

    def place(name: str) -> tuple[int, str]:
        known = [i for i, n in enumerate(names) if name == n or name.startswith(f"{n}, ") and name.endswith("stacked")]
        return (max(known) if known else len(names), name)

    return sorted(rows.items(), key=lambda item: place(item[0]))


def five_metrics(result: dict[str, Any]) -> str:
    """The five metrics (locality A) with clustered standard errors, their mean, locality B and exact match."""
    head = ["row", *(HEADS[k] for k in KINDS), "mean", "T-Loc B", "M-Loc B", "exact Rel", "exact T-Gen", "exact M-Gen"]
    rows = []
    for name, row in ordered(result["rows"]):
        m, e, exact = row["metrics"], row["errors"], row.get("exact", {})
        rows.append(
            [
                f"*{name}*" if row.get("control") else name,
                *(number(m[k], None if name == "base" else e[k]) for k in KINDS),
                number(m["mean"]),
                *(number(row["locality_b"][k]) for k in ("t_loc", "m_loc")),
                *(number(exact.get(k)) for k in ("rel", "t_gen", "m_gen")),
            ]
        )
    return markdown(head, rows)


def localities(result: dict[str, Any]) -> str:
    """Locality A by part, the mean alpha where it is not fixed, and how often an edit acted."""
    head = ["row", *PARTS.values(), "alpha Rel", "alpha M-Loc", "acts Rel", "acts M-Gen", "acts M-Loc"]
    rows = []
    for name, row in ordered(result["rows"]):
        if name == "base":
            continue
        alpha, acts = row.get("alpha", {}), row.get("routed", {})
        strength = [f"{alpha[k]:.2f}" if alpha.get(k, float("nan")) == alpha.get(k) else "-" for k in ("rel", "m_loc")]
        rows.append(
            [
                f"*{name}*" if row.get("control") else name,
                *(number(row["parts"].get(p)) for p in PARTS),
                *strength,
                *(number(acts.get(k)) for k in ("rel", "m_gen", "m_loc")),
            ]
        )
    return markdown(head, rows)


def variants(results: Sequence[dict[str, Any]]) -> str:
    """The alternatives: always on / routed / routed in stacks of 20, locality A; and how often a routed edit acted."""
    acts = {
        "m_gen": "acts M-Gen",
        "m_loc.same_subgroup": "acts same subgroup",
        "m_loc.same_picture": "acts same picture",
    }
    head = ["point", "variant", *(HEADS[k] for k in KINDS), "mean", "alpha Rel", *acts.values(), "missed"]
    rows = [
        [
            r["point"],
            r["variant"],
            *(" / ".join(f"{r[how][k]:.1f}" for how in ("always", "routed", "stacked")) for k in (*KINDS, "mean")),
            f"{r['alpha']['rel']:.2f}",
            *(number(r["acts"].get(k)) for k in acts),
            str(r["missed"]),
        ]
        for r in results
    ]
    return markdown(head, rows)


def goals(result: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """(goal, met, figure) of what a routed UniKE has to reach."""
    rows = result["rows"]
    routed, plain, stack = rows["UniKE, routed"], rows["UniKE"], rows["UniKE, routed, 20 stacked"]
    found = [
        (f"UniKE, routed: {HEADS[k]} >= {low:g}", routed["metrics"][k] >= low, f"{routed['metrics'][k]:.1f}")
        for k, low in GOALS.items()
    ]
    r, p, s = (x["metrics"]["rel"] for x in (routed, plain, stack))
    found.append(("Rel routed = Rel unrouted, one step", r == p, f"{r:.2f} and {p:.2f}"))
    found.append(("Rel of 20 stacked within two points of one step", abs(s - r) <= 2.0, f"{s:.1f} and {r:.1f}"))
    found.append(("removing an edit is exact", result["removal_is_exact"], str(result["removal_is_exact"])))
    return found


def encoders(result: dict[str, Any]) -> str:
    """What the encoders of one base model reach on held-out triplets: means over splits, deviation, the least."""
    head = ["layer"]
    for part in ("concepts held out", "triplets held out"):
        head += [f"{part}: AUC", "least", "untrained", "recall@1", "untrained"]
    rows = []
    for layer, of_concepts in result["splits"]["answer"].items():
        row = [layer]
        for fits in (of_concepts, result["splits"]["triplet"][layer]):
            values = {name: [f[name] for f in fits] for name in fits[0]}
            means = {name: f"{statistics.fmean(v):.3f}" for name, v in values.items()}
            auc = values["truthfulness_auc"]
            row += [f"{means['truthfulness_auc']} ± {statistics.stdev(auc):.3f}", f"{min(auc):.3f}"]
            row += [means[name] for name in ("untrained_auc", "semantic_recall", "untrained_recall")]
        rows.append(row)
    return f"### Base model {result['seed']}, {result['triplets']:,} triplets\n\n{markdown(head, rows)}"


def report(result: dict[str, Any]) -> str:
    """Everything about one base model, as markdown."""
    met = "\n".join(f"- {'met' if ok else '**missed**'}: {goal} ({figure})" for goal, ok, figure in goals(result))
    fits = markdown(
        ["layer", "truthfulness AUC", "untrained", "semantic recall@1", "untrained"],
        [
            [
                layer,
                f"{f['truthfulness_auc']:.3f}",
                f"{f['untrained_auc']:.3f}",
                f"{f['semantic_recall']:.3f}",
                f"{f['untrained_recall']:.3f}",
            ]
            for layer, f in result["fit"].items()
        ],
    )
    return "\n\n".join(
        [
            f"## Base model {result['seed']}: {result['edits']} one-step edits of {result.get('task', 'name')}s, "
            f"{result['seconds']:.0f} s",
            "In percent; standard errors clustered by concept; controls in italics; locality A unless B is named.",
            five_metrics(result),
            "Locality A by part; alpha averaged over layers; how often an edit acted on a probe, in percent.",
            localities(result),
            "Encoders on held-out triplets:",
            fits,
            "Goals:",
            met,
        ]
    )
