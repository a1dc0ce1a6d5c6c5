"""Two rows compared, edit by edit where they are of the same edits: by how much, and how sure that is."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.quality.cells import Found
from bench.quality.errors import error_of

SURE = 2.0  # standard errors from zero that count as a direction


@dataclass(frozen=True)
class Difference:
    """In points, with its standard error (nan where it cannot be estimated)."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:+.1f}" + ("" if self.error != self.error else f" ± {self.error:.1f}")

    @property
    def sign(self) -> int:
        """1 or -1 where it is more than two standard errors from zero, otherwise 0."""
        if not abs(self.value) > SURE * self.error:
            return 0
        return 1 if self.value > 0 else -1


def difference(a: Found | None, b: Found | None, kinds: Sequence[str]) -> Difference | None:
    """a minus b, of the mean of these metrics; None where one was not measured.

    Of the same edits: from each edit's own difference, its error as `cells.Found` has it. Otherwise the two errors add
    up as independent ones, each that of fully correlated metrics, which is the largest it can be.
    """
    if a is None or b is None or a.reason or b.reason:
        return None
    value = sum(a.metrics[k] - b.metrics[k] for k in kinds) / len(kinds)
    if a.labels and a.labels == b.labels:
        rows = zip(*(zip(a.values[k], b.values[k], strict=True) for k in kinds), strict=True)
        each = [sum(x - y for x, y in row) / len(kinds) for row in rows]
        return Difference(value, error_of(each, a.labels, a.sequences, b.sequences))
    errors = [sum(f.errors.get(k, 0.0) for k in kinds) / len(kinds) for f in (a, b)]
    return Difference(value, (errors[0] ** 2 + errors[1] ** 2) ** 0.5)
