"""Does a memory of (h_sem, h_pos) carry knowledge into a model that can use context?

No neurons: each edit is one memory item of its own, retrieved alone (K = 1), and the shift has a fixed alpha. What is
asked is how much likelier the target becomes, against the same with another edit's item and with h_know = 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from bench.quality.ablation import mean, write
from bench.quality.rows import Row, RowEditor
from bench.quality.tables import markdown
from bench.quality.world import PlacedProbe, probes, request
from unike_kernels.config import NeuronConfig, ShiftConfig, UnikeConfig
from unike_kernels.editing.extract import tap_rows
from unike_kernels.editing.inputs import Batch, Sample
from unike_kernels.editing.prefix import cases_named, run_tail
from unike_kernels.evaluation.metrics import clustered_error
from unike_kernels.evaluation.scoring import Scorer
from unike_kernels.patching import PatchHandle, patch

Value = Literal["answer", "predicting", "stated"]
VALUES: dict[Value, str] = {
    "answer": "last answer token",
    "predicting": "the token before it, which predicts it",
    "stated": "case token of the question asked again after the answer",
}
CONTROLS = ("own", "other edit's", "zero")
LAYERS = {"last four": (26, 27, 28, 29), "middle eight": tuple(range(10, 18)), "all": tuple(range(30))}


@dataclass(frozen=True)
class Point:
    """One setting of the experiment."""

    layers: str
    attention: Literal["projected", "raw"]
    value: Value
    alpha: float
    control: str  # of CONTROLS

    @property
    def key(self) -> str:
        """Its name in the results; without an item there is neither an attention nor a value."""
        if self.control == "zero":
            return f"{self.layers}|-|-|{self.alpha:g}|zero"
        return f"{self.layers}|{self.attention}|{self.value}|{self.alpha:g}|{self.control}"


class ValueEditor(RowEditor):
    """An editor whose own items hold another state, or another edit's."""

    value: Value = "answer"
    control: str = "own"

    def own_items(self, samples: list[Sample]) -> dict[int, tuple[Tensor, Tensor]]:
        """(h_sem, h_pos) of the edits, h_pos at the position that `value` names."""
        asked = samples
        if self.value == "stated":
            asked = [replace(s, prompt=f"{s.prompt} {s.target}\n{s.prompt}") for s in samples]
        here = self.collator.batch(samples, list(range(len(samples))), eos=False)
        there = self.collator.batch(asked, list(range(len(asked))), eos=False)
        (case,) = tap_rows(self.model, self.decoder, self.layers, here, [here.case_rows()])
        (found,) = tap_rows(self.model, self.decoder, self.layers, there, [self._position(there)])
        order = torch.arange(len(samples))
        if self.control == "other edit's":
            order = order.roll(2)  # capitals and languages come in turn: another country, the same relation
        return {i: (case["tap"][i].float().cpu(), found["tap"][i].float().cpu()[order]) for i in self.layers}

    def _position(self, batch: Batch) -> Tensor:
        b, s = batch.shape
        at = {"answer": batch.last_position, "predicting": batch.last_position - 1, "stated": batch.case_position}
        return torch.arange(b, device=batch.case_position.device) * s + at[self.value]


@torch.no_grad()
def log_likelihoods(scorer: Scorer, handle: PatchHandle | None, own: Sequence[int]) -> tuple[list[float], list[float]]:
    """(mean log-likelihood of a target token, token accuracy) of every probe, its own edit acting."""
    likely, right = [0.0] * len(own), [0.0] * len(own)
    for batch, prefix in scorer.batches:
        if handle is None:
            hidden = run_tail(scorer.collator.model, scorer.decoder, prefix)
        else:
            selected = torch.tensor([own[r] for r in batch.rows])[:, None]
            with cases_named(handle, batch, selected):
                hidden = run_tail(scorer.collator.model, scorer.decoder, prefix)
        for r, row in enumerate(batch.rows):
            at = batch.target_mask[r].nonzero()[:, 0]
            logits = scorer.logits_step(hidden[r, at - 1]).float()
            wanted = batch.inputs["input_ids"][r, at]
            likely[row] = float(logits.log_softmax(-1).gather(1, wanted[:, None]).mean())
            right[row] = float((logits.argmax(-1) == wanted).float().mean())
    return likely, right


class Experiment:
    """One model, one set of edits; every point's figures are written as soon as they are known."""

    def __init__(
        self, net: Any, processor: Any, items: Sequence[dict[str, Any]], fillers: Sequence[dict[str, Any]], keep: Path
    ) -> None:
        """fillers: triplets for the shared memory, which must not be empty; only the first stays, and none is used."""
        self.net, self.processor, self.items, self.fillers, self.keep = net, processor, list(items), fillers, keep
        self.probes = [p for p in probes(self.items) if p.kind != "m_loc"]
        self.results: dict[str, Any] = json.loads(keep.read_text()) if keep.exists() else {}

    def config(self, point: Point) -> UnikeConfig:
        """No neurons, one item, a fixed alpha."""
        shift = ShiftConfig(k=1, attention=point.attention, alpha=point.alpha)
        return UnikeConfig(LAYERS[point.layers], shift, neurons=NeuronConfig(enabled=False, batch_size=4096))

    def run(self, points: Sequence[Point]) -> dict[str, Any]:
        """All points that are not known yet; by layers, since the states below them are shared."""
        self._base()
        for layers in dict.fromkeys(p.layers for p in points):
            mine = [p for p in points if p.layers == layers and p.key not in self.results]
            mine.sort(key=lambda p: abs(p.alpha - 0.5))  # the middle of the range first, should time end
            if not mine:
                continue
            like = ValueEditor(self.net, self.processor, self.config(mine[0]))
            like.build_memory(self.fillers, progress=False)
            states = like.states
            assert states is not None
            one = {
                i: replace(s, h_sem=s.h_sem[:1], h_pos=s.h_pos[:1], h_neg=s.h_neg[:1], h_att=s.h_att[:1])
                for i, s in states.layers.items()
            }
            like.states = replace(states, layers=one, kept=states.kept[:1])
            scorer = Scorer(like.collator, like.decoder, like.layers[0], [p.sample for p in self.probes])
            for point in tqdm(mine, desc=layers, unit="point", mininterval=5):
                self.results[point.key] = self._point(point, like, scorer)
                write(self.keep, self.results)
        return self.results

    def _point(self, point: Point, like: ValueEditor, scorer: Scorer) -> dict[str, Any]:
        editor = ValueEditor(self.net, self.processor, self.config(point))
        row = Row("latent", neurons=False, alpha=point.alpha, zeta="none")
        editor.prepare(replace(row, memory="zero") if point.control == "zero" else row, like)
        editor.config = self.config(point)
        editor.value, editor.control = point.value, point.control
        edits = editor.edit([request(r) for r in self.items], independent=True, progress=False)
        with patch(self.net, edits, routing="always") as handle:
            return self._told(*log_likelihoods(scorer, editor.controlled(handle), [p.edit for p in self.probes]))

    def _told(self, likely: list[float], right: list[float]) -> dict[str, Any]:
        kinds: dict[str, dict[str, list[float]]] = {}
        for p, ll, ok in zip(self.probes, likely, right, strict=True):
            kind = kinds.setdefault(p.kind, {"likely": [], "right": []})
            kind["likely"].append(round(ll, 4))
            kind["right"].append(ok)
        return kinds

    def _base(self) -> None:
        """The unedited model, and the same with the fact stated before the question: what context alone does."""
        if "base" in self.results:
            return
        editor = ValueEditor(
            self.net, self.processor, self.config(Point("last four", "projected", "answer", 0.5, "own"))
        )
        for name, asked in (("base", self.probes), ("stated", [self._stated(p) for p in self.probes])):
            scorer = Scorer(editor.collator, editor.decoder, editor.layers[0], [p.sample for p in asked])
            self.results[name] = self._told(*log_likelihoods(scorer, None, [p.edit for p in asked]))
        write(self.keep, self.results)

    def _stated(self, probe: PlacedProbe) -> PlacedProbe:
        """The probe with its edit said before it: after the picture, where there is one."""
        item = self.items[probe.edit]
        return replace(
            probe, sample=replace(probe.sample, prompt=f"{item['src']} {item['alt']}\n{probe.sample.prompt}")
        )


def points() -> list[Point]:
    """The whole grid at the paper's layers, then other layers with fewer values."""
    grid: list[Point] = []
    for layers, strengths, values in (
        ("last four", (0.1, 0.5, 0.9), tuple(VALUES)),
        ("all", (0.1, 0.3), ("answer", "stated")),
        ("middle eight", (0.3, 0.6), ("answer", "stated")),
    ):
        for alpha in strengths:
            grid.append(Point(layers, "projected", "answer", alpha, "zero"))
            for attention in ("projected", "raw"):
                for value in values:
                    grid += [Point(layers, attention, value, alpha, c) for c in CONTROLS[:2]]
    return grid


def paired(results: dict[str, Any], one: str, other: str, kind: str, concepts: Sequence[str]) -> str:
    """Mean difference of the log-likelihoods with its standard error, clustered by concept."""
    a, b = (results[key][kind]["likely"] for key in (one, other))
    found = [x - y for x, y in zip(a, b, strict=True)]
    return f"{mean(found):+.2f} ± {clustered_error(found, list(concepts)):.2f}"


def table(results: dict[str, Any], items: Sequence[dict[str, Any]], kind: str) -> str:
    """Markdown: token accuracy and gains in log-likelihood of one kind of probe, for every setting."""
    concepts = [p.concept for p in probes(items) if p.kind == kind]

    def percent(key: str, of: str = kind) -> str:
        return f"{100 * mean(results[key][of]['right']):.1f}" if of in results[key] else "-"

    head = [
        "layers",
        "attention",
        "value",
        "alpha",
        "right",
        "gain over base",
        "own - other's",
        "own - zero",
        "T-Loc right",
    ]
    rows = [["(no memory)", "", "", "", percent("base"), "", "", "", percent("base", "t_loc")]]
    rows.append(
        [
            "(stated in the prompt)",
            "",
            "",
            "",
            percent("stated"),
            paired(results, "stated", "base", kind, concepts),
            "",
            "",
            percent("stated", "t_loc"),
        ]
    )
    for p in points():
        other, zero = replace(p, control=CONTROLS[1]).key, replace(p, control="zero").key
        if p.control != "own" or not {p.key, other, zero} <= results.keys():
            continue
        gains = [paired(results, p.key, than, kind, concepts) for than in ("base", other, zero)]
        rows.append(
            [p.layers, p.attention, VALUES[p.value], f"{p.alpha:g}", percent(p.key), *gains, percent(p.key, "t_loc")]
        )
    return markdown(head, rows)
