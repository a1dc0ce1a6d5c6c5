"""Evaluation of edits on probes: what is asked, with which edits active, and the five metrics that come out."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..editing.inputs import Collator, Sample
from ..edits import Edits
from ..models import Decoder
from ..patching import patch
from .metrics import exact_match
from .scoring import Score, Scorer

KINDS = ("rel", "t_gen", "m_gen", "t_loc", "m_loc")


@dataclass(frozen=True)
class CheckRow:
    """One probe: the answers before and after, and its score (accuracy for rel and *_gen, locality for *_loc)."""

    kind: str
    prompt: str
    target: str
    before: str
    after: str
    score: float


@dataclass(frozen=True)
class CheckReport:
    """The five metrics in percent (locality A) of the kinds asked, with B, exact match and every probe's row."""

    metrics: dict[str, float]
    locality_b: dict[str, float]
    exact: dict[str, float]
    before: dict[str, float]
    rows: tuple[CheckRow, ...]

    def __str__(self) -> str:
        head = f"{'':10}" + "".join(f"{k:>8}" for k in KINDS)
        lines = [head]
        for name, values in (
            ("before", self.before),
            ("after", self.metrics),
            ("locality B", self.locality_b),
            ("exact", self.exact),
        ):
            cells = (f"{values[k]:8.1f}" if k in values and values[k] == values[k] else f"{'':>8}" for k in KINDS)
            lines.append(f"{name:10}" + "".join(cells))
        return "\n".join(lines)


def check(
    collator: Collator,
    decoder: Decoder,
    model: nn.Module,
    edits: Edits,
    probes: Sequence[dict[str, Any]],
    *,
    routing: str = "edits",
) -> CheckReport:
    """The five metrics of `edits`, all on the model, over probes (dicts: kind, prompt, target, image: optional).

    "before" is measured on the unedited model: accuracy for rel and generality; locality starts at 100 by definition.
    """
    for n, probe in enumerate(probes):
        if probe.get("kind") not in KINDS:
            raise ValueError(f"probe {n} needs a kind of {', '.join(KINDS)}, but has {probe.get('kind')!r}")
    samples = [Sample(p["prompt"], p["target"], p.get("image")) for p in probes]
    scorer = Scorer(collator, decoder, min(edits.layers), samples)
    base = scorer.base_accuracy()
    answers_before = collator.generate(samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the base is the model that the edits were just checked against
        handle = patch(model, edits, name="unike_check", routing=routing)
    with handle:
        scores = scorer.score(handle)
        answers = collator.generate(samples)
    kinds = [p["kind"] for p in probes]
    local = [k.endswith("loc") for k in kinds]
    values = [s.locality_a if is_local else s.accuracy for s, is_local in zip(scores, local, strict=True)]
    kept = [
        float(a == b) if is_local else float(exact_match(a, s.target or ""))
        for a, b, s, is_local in zip(answers, answers_before, samples, local, strict=True)
    ]
    rows = tuple(
        CheckRow(k, s.prompt, s.target or "", b, a, v)
        for k, s, b, a, v in zip(kinds, samples, answers_before, answers, values, strict=True)
    )
    return CheckReport(
        by_kind(kinds, values),
        {k: v for k, v in by_kind(kinds, [s.locality_b for s in scores]).items() if k.endswith("loc")},
        by_kind(kinds, kept),
        by_kind(kinds, [100.0 if is_local else b for b, is_local in zip(base, local, strict=True)], scale=None),
        rows,
    )


def by_kind(kinds: Sequence[str], values: Sequence[float], scale: float | None = 100.0) -> dict[str, float]:
    """Mean of `values` in percent for every kind that occurs; accuracies are shares unless they are above 1."""
    out = {}
    for kind in KINDS:
        mine = [v for k, v in zip(kinds, values, strict=True) if k == kind]
        if mine:
            mean = sum(mine) / len(mine)
            out[kind] = mean * scale if scale is not None else (mean if kind.endswith("loc") else mean * 100.0)
    return out


__all__ = ["KINDS", "CheckReport", "CheckRow", "Score", "check"]
