"""A user's own probes under a user's own edits, and the five metrics that come out."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..editing.checks import check_probe_inputs
from ..editing.inputs import Collator, Sample
from ..editing.requests import check_dicts
from ..edits import Edits
from ..models import Decoder
from ..patching import patch
from .metrics import exact_match, mean_of_five
from .records import KINDS, LOCAL
from .scoring import Scorer


@dataclass(frozen=True)
class CheckRow:
    """One probe: the answers generated before and after, and its scores as shares of 1.

    before, after: accuracy on the target; for locality 1 and the share of target tokens that stay (A). exact: whether
    the answer is the target; for locality whether it is the one of before. locality_b: None but for locality.
    """

    kind: str
    prompt: str
    target: str
    answer_before: str
    answer_after: str
    before: float
    after: float
    exact: float
    locality_b: float | None


@dataclass(frozen=True)
class CheckReport:
    """The five metrics on probes; prints as a table, and holds every probe's row."""

    rows: tuple[CheckRow, ...]

    @property
    def before(self) -> dict[str, float]:
        """Percent by kind, on the unedited model: the measured accuracy; locality starts at 100 by definition."""
        return self._mean("before")

    @property
    def metrics(self) -> dict[str, float]:
        """Percent by kind, edited: Rel, T-Gen and M-Gen by token accuracy, locality A; "mean" where all five are."""
        found = self._mean("after")
        return found | {"mean": mean_of_five(*(found[k] for k in KINDS))} if len(found) == len(KINDS) else found

    @property
    def locality_b(self) -> dict[str, float]:
        """Percent by kind of locality."""
        return self._mean("locality_b")

    @property
    def exact(self) -> dict[str, float]:
        """Percent by kind: greedy answers that are the target; for locality, that are those of before."""
        return self._mean("exact")

    def _mean(self, field: str) -> dict[str, float]:
        found: dict[str, list[float]] = {}
        for kind in KINDS:
            for row in self.rows:
                if row.kind == kind and getattr(row, field) is not None:
                    found.setdefault(kind, []).append(100.0 * getattr(row, field))
        return {kind: sum(values) / len(values) for kind, values in found.items()}

    def __str__(self) -> str:
        columns = (*KINDS, "mean")
        lines = [f"{'percent':10}" + "".join(f"{c:>8}" for c in columns)]
        for name, values in (
            ("before", self.before),
            ("after", self.metrics),
            ("locality B", self.locality_b),
            ("exact", self.exact),
        ):
            lines.append(f"{name:10}" + "".join(f"{values[c]:8.1f}" if c in values else " " * 8 for c in columns))
        counts = {kind: sum(row.kind == kind for row in self.rows) for kind in KINDS}
        lines.append(f"{'probes':10}" + "".join(f"{counts[k] or '':>8}" for k in KINDS))
        return "\n".join(line.rstrip() for line in lines)


def check(
    collator: Collator,
    decoder: Decoder,
    model: nn.Module,
    edits: Edits,
    probes: Sequence[dict[str, Any]],
    *,
    routing: str = "edits",
    backend: str = "auto",
) -> CheckReport:
    """The five metrics of `edits`, all on the model, over probes (dicts: kind, prompt, target, image: optional).

    routing, backend: as `patch` takes them. Locality's targets only say which positions are compared. ValueError on a
    bad probe.
    """
    samples = check_probes(probes)
    check_probe_inputs(collator, decoder, samples)
    scorer = Scorer(collator, decoder, min(edits.layers), samples)
    longest = collator.longest_target(samples) + 1  # one more, so that an answer that goes on is seen to
    answers_before = collator.generate(samples, max_new_tokens=longest)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other weights of the same architecture: said when the edits were loaded
        handle = patch(model, edits, name="unike_check", routing=routing, backend=backend)
    with handle:
        scores = scorer.score(handle)
        answers_after = collator.generate(samples, max_new_tokens=longest)
    rows = []
    for n, (probe, sample, score, base) in enumerate(zip(probes, samples, scores, scorer.base_accuracy(), strict=True)):
        said, says, target = answers_before[n], answers_after[n], sample.target or ""
        if probe["kind"] in LOCAL:
            values = (1.0, score.locality_a, float(says == said), score.locality_b)
        else:
            values = (base, score.accuracy, float(exact_match(says, target)), None)
        rows.append(CheckRow(probe["kind"], sample.prompt, target, said, says, *values))
    return CheckReport(tuple(rows))


def check_probes(probes: Sequence[dict[str, Any]]) -> list[Sample]:
    """The probes as samples; ValueError on one without a kind, a prompt or a target, or with an unknown key."""
    check_dicts(probes, "probe", ("prompt", "target"))
    for n, probe in enumerate(probes):
        if probe.get("kind") not in KINDS:
            raise ValueError(f"probe {n} needs a kind of {', '.join(KINDS)}, but has {probe.get('kind')!r}")
    return [Sample(probe["prompt"], probe["target"], probe.get("image")) for probe in probes]
