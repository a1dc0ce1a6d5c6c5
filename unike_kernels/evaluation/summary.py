"""What a run's results come to: means with bootstrap intervals, what stayed by age, which edits acted."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .metrics import bootstrap_interval, mean_of_five
from .protocols import Asked, Result
from .records import KINDS, LOCAL

NAMES = {"rel": "Rel", "t_gen": "T-Gen", "m_gen": "M-Gen", "t_loc": "T-Loc", "m_loc": "M-Loc", "mean": "mean"}
NAMES |= {"port": "Port"}
AGES = 5  # parts into which the K edits of a sequence are divided, by age


@dataclass(frozen=True)
class Interval:
    """A mean in percent and its 95 % bootstrap interval over clusters (nan with fewer than two).

    The interval is for other records in the same sequences of edits; how another order or division would do, seeds say.
    """

    mean: float
    low: float
    high: float


def score_after(p: Asked) -> float:
    """What one question counts in its metric, a share of 1: locality A, or the accuracy on the target."""
    return p.outcome.locality_a if p.kind in LOCAL else p.outcome.after


def _before(p: Asked) -> float:
    return 1.0 if p.kind in LOCAL else p.outcome.before


def _exact(p: Asked) -> float | None:
    return None if p.outcome.exact is None else float(p.outcome.exact)


@dataclass(frozen=True)
class Summary:
    """All figures of some results, in percent, by kind; prints as a table.

    Probes of one record and kind count as one sample, their mean. after: the five metrics with locality A, and "mean"
    of the five where all are there. before: measured on the unedited model; locality is 100 by definition. exact:
    greedy answers that are the target (locality: that are those of before). own, others: how often a record's own edit
    acted on its probes, and how often another one did, where the method chooses.
    """

    records: int
    after: dict[str, Interval]
    before: dict[str, float]
    locality_b: dict[str, float]
    exact: dict[str, float]
    own: dict[str, float]
    others: dict[str, float]

    @classmethod
    def of(cls, results: Sequence[Result]) -> "Summary":
        """Of results in any order; ValueError where there are none."""
        if not results:
            raise ValueError("there are no results to sum up")
        after = {kind: _interval(results, kind) for kind in _kinds(results)}
        if all(kind in after for kind in KINDS):
            after["mean"] = _mean_interval(results, {kind: after[kind].mean for kind in KINDS})
        return cls(
            len(results),
            after,
            _means(results, _before),
            {k: v for k, v in _means(results, lambda p: p.outcome.locality_b).items() if k in LOCAL},
            _means(results, _exact),
            _means(results, lambda p: None if p.own is None else float(p.own)),
            _means(results, lambda p: None if p.others is None else float(p.others > 0)),
        )

    def rows(self) -> list[tuple[str, dict[str, str]]]:
        """(name, cell by kind) of every line that has a figure."""
        lines: list[tuple[str, dict[str, float]]] = [
            ("before", self.before),
            ("after", {k: i.mean for k, i in self.after.items()}),
            ("exact match", self.exact),
            ("locality B", self.locality_b),
            ("own edit acts", self.own),
            ("another acts", self.others),
        ]
        shown = [(name, {k: f"{v:.1f}" for k, v in values.items()}) for name, values in lines if values]
        interval = {k: f"{i.low:.1f}-{i.high:.1f}" for k, i in self.after.items() if i.low == i.low}
        return shown[:2] + ([("95 % interval", interval)] if interval else []) + shown[2:]

    def __str__(self) -> str:
        return table(self.rows(), f"percent, {self.records} edits")


def retention(results: Sequence[Result], k: int) -> list[tuple[str, dict[str, str]]]:
    """Rel, T-Gen and M-Gen of sequences of K by age, oldest edits first: (edits made since, cell by kind)."""
    parts = min(AGES, k)
    out = []
    for n in reversed(range(parts)):
        low, high = n * k // parts, (n + 1) * k // parts - 1
        some = [r for r in results if low <= r.age <= high]
        if some:
            name = f"{low}" if low == high else f"{low} to {high}"
            found = _means(some, score_after)
            out.append((name, {kind: f"{v:.1f}" for kind, v in found.items() if kind not in LOCAL}))
    return out


def table(rows: Sequence[tuple[str, dict[str, str]]], head: str) -> str:
    """Rows of cells by kind as aligned text, the columns in the metrics' order."""
    present = [k for k in NAMES if any(k in cells for _, cells in rows)]
    first = max(len(head), *(len(name) for name, _ in rows))
    widths = {k: max(len(NAMES[k]), *(len(cells.get(k, "")) for _, cells in rows)) for k in present}
    lines = [head.ljust(first) + "".join("  " + NAMES[k].rjust(widths[k]) for k in present)]
    lines += [name.ljust(first) + "".join("  " + c.get(k, "").rjust(widths[k]) for k in present) for name, c in rows]
    return "\n".join(line.rstrip() for line in lines)


def per_record(results: Iterable[Result], kind: str, value: Callable[[Asked], float | None]) -> dict[str, float]:
    """Record id -> mean in percent of its probes of one kind; records without a value are left out."""
    out = {}
    for r in results:
        found = [v for p in r.probes if p.kind == kind and (v := value(p)) is not None]
        if found:
            out[r.id] = 100.0 * sum(found) / len(found)
    return out


def _kinds(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(p.kind for r in results for p in r.probes))


def _means(results: Sequence[Result], value: Callable[[Asked], float | None]) -> dict[str, float]:
    found = {kind: list(per_record(results, kind, value).values()) for kind in _kinds(results)}
    return {kind: sum(values) / len(values) for kind, values in found.items() if values}


def _interval(results: Sequence[Result], kind: str) -> Interval:
    values, clusters = per_record(results, kind, score_after), {r.id: r.cluster for r in results}
    low, high = bootstrap_interval(list(values.values()), [clusters[i] for i in values])
    return Interval(sum(values.values()) / len(values), low, high)


def _mean_interval(results: Sequence[Result], means: dict[str, float]) -> Interval:
    """Of the mean of the five; its interval from the records that have all five."""
    found = [per_record(results, kind, score_after) for kind in KINDS]
    whole = [r for r in results if all(r.id in values for values in found)]
    low, high = bootstrap_interval(
        [mean_of_five(*(values[r.id] for values in found)) for r in whole], [r.cluster for r in whole]
    )
    return Interval(mean_of_five(*(means[kind] for kind in KINDS)), low, high)
