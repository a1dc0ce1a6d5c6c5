"""One-step edits under every row of the ablation, routed edits in stacks, and removal."""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench.quality.errors import larger
from bench.quality.rows import CONTROLS, ROWS, Row, RowEditor, default_config
from bench.quality.world import PlacedProbe, prepared, probes, request
from unike_kernels.config import UnikeConfig
from unike_kernels.editing.inputs import Sample
from unike_kernels.edits import Edits
from unike_kernels.evaluation.metrics import clustered_error, exact_match, mean_of_five
from unike_kernels.evaluation.records import KINDS
from unike_kernels.evaluation.scoring import Score, Scorer
from unike_kernels.files import replacing
from unike_kernels.patching import PatchHandle, patch
from unike_kernels.routing import Router

STACK = 20  # routed edits on one model at a time


class World:
    """A base model with its edits and probes; runs rows against it."""

    def __init__(
        self,
        seed: int,
        items: Sequence[dict[str, Any]],
        config: UnikeConfig,
        *,
        quick: bool = False,
        editor: RowEditor | None = None,
    ) -> None:
        """items: records to edit, one-step each; quick: a smaller memory; editor: of another model, prepared."""
        self.items = list(items)
        self.editor = prepared(seed, config, RowEditor, quick=quick) if editor is None else editor
        self.probes = probes(self.items)
        samples = [p.sample for p in self.probes]
        self.scorer = Scorer(self.editor.collator, self.editor.decoder, self.editor.layers[0], samples)

    @contextmanager
    def patched(self, editor: RowEditor, edits: Edits, routing: str = "always") -> Iterator[PatchHandle]:
        """The edits on the base model, with the row's control applied."""
        with patch(self.editor.model, edits, routing=routing) as handle:
            yield editor.controlled(handle)

    def row_editor(self, row: Row, mean_alpha: float | None) -> RowEditor:
        """An editor of the same base with the row's settings."""
        fresh = RowEditor(self.editor.model, self.editor.collator.processor, self.editor.config)
        return fresh.prepare(row, self.editor, mean_alpha)

    def make(self, row: Row, mean_alpha: float | None = None) -> tuple[RowEditor, Edits]:
        """The row's edits, each trained from the base alone; those that miss their target are told by the caller."""
        editor = self.row_editor(row, mean_alpha)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* miss their target")
            return editor, editor.edit([request(r) for r in self.items], independent=True, progress=False)

    def score_base(self) -> dict[str, Any]:
        """The unedited model: its measured accuracy on the targets, localities of 100 by definition."""
        return summary(self.probes, [Score(a, 1.0, 1.0) for a in self.scorer.base_accuracy()])

    def acting(self, row: Row, edits: Edits) -> list[int | None]:
        """Which edit acts on each probe in one step: its own; when routed, only if the probe is near enough."""
        own = [p.edit for p in self.probes]
        if not row.routed:
            return list(own)
        routes = self.one_step_routes(edits)
        return [e if hit else None for e, hit in zip(own, routes, strict=True)]

    def one_step_routes(self, edits: Edits) -> list[bool]:
        """Whether each probe is routed to its own edit when that edit is the only one on the model."""
        calibration, config = edits.calibration, edits.config.routing
        assert calibration is not None  # prepared() calibrates
        own: dict[int, list[int]] = {}
        for i, p in enumerate(self.probes):
            own.setdefault(p.edit, []).append(i)
        h_sem = edits.layers[calibration.layer].h_sem
        router = Router.fitting(calibration, config, 1, h_sem)
        acts = [False] * len(self.probes)
        for e, rows in own.items():
            router.load(h_sem[e : e + 1], calibration)
            _, selected = router(self.scorer.case_tap[rows])
            for i, group in zip(rows, selected[:, 0].tolist(), strict=True):
                acts[i] = group == 0
        return acts

    def score(self, row: Row, editor: RowEditor, edits: Edits) -> dict[str, Any]:
        """Everything the table says about one row."""
        acting = self.acting(row, edits)
        with self.patched(editor, edits) as handle:
            scores = self.scorer.score(handle, acting)
            exact = self.exact(handle, edits, acting)
        alphas = {k: mean(s.alpha for s, p in zip(scores, self.probes, strict=True) if p.kind == k) for k in KINDS}
        out = summary(self.probes, scores)
        return out | {"exact": exact, "alpha": alphas, "routed": self.routed_share(acting)}

    def routed_share(self, acting: Sequence[int | None]) -> dict[str, float]:
        """Share of each kind's probes (and of each part of m_loc) that an edit acts on, in percent."""
        named: dict[str, list[float]] = {}
        for p, a in zip(self.probes, acting, strict=True):
            for name in (p.kind, f"{p.kind}.{p.part}") if p.part else (p.kind,):
                named.setdefault(name, []).append(100.0 * (a is not None))
        return {name: sum(v) / len(v) for name, v in named.items()}

    def exact(self, handle: PatchHandle, edits: Edits, acting: Sequence[int | None]) -> dict[str, float]:
        """Exact match of greedy generation in percent: the edit, its first rephrasing, its first other picture."""
        first: dict[tuple[str, int], int] = {}
        for i, p in enumerate(self.probes):
            if p.kind in ("rel", "t_gen", "m_gen"):
                first.setdefault((p.kind, p.edit), i)
        hits: dict[str, list[float]] = {}
        index = list(first.values())
        answers = generate(
            self.editor, handle, [self.probes[i].sample for i in index], [acting[i] for i in index], edits
        )
        for i, answer in zip(index, answers, strict=True):
            p = self.probes[i]
            hits.setdefault(p.kind, []).append(100.0 * exact_match(answer, p.sample.target or ""))
        return {kind: sum(v) / len(v) for kind, v in hits.items()}

    def stacked(self, row: Row, editor: RowEditor, edits: Edits, size: int = STACK) -> dict[str, Any]:
        """Routed edits in stacks of `size` on one model: the patch's own router decides among them."""
        scores: list[Score] = []
        for at in range(0, len(edits), size):
            ids = edits.ids[at : at + size]
            mine = [p for p in self.probes if at <= p.edit < at + size]
            scorer = Scorer(self.editor.collator, self.editor.decoder, self.editor.layers[0], [p.sample for p in mine])
            with self.patched(editor, edits.select(ids), routing="routed") as handle:
                scores += scorer.score(handle)
        order = [p for at in range(0, len(edits), size) for p in self.probes if at <= p.edit < at + size]
        return summary(order, scores, size)

    def removal_is_exact(self, edits: Edits, size: int = STACK) -> bool:
        """Whether a model that loses one edit of a stack is the one that never had it, and unpatched the base again.

        Bit for bit.
        """
        stack = edits.select(edits.ids[:size])
        samples = [p.sample for p in self.probes if p.edit < size]
        scorer = Scorer(self.editor.collator, self.editor.decoder, self.editor.layers[0], samples)
        before = scorer.logits()
        others = stack.remove(stack.ids[0])
        with patch(self.editor.model, stack, routing="routed") as handle:
            handle.swap(others)
            removed = scorer.logits(handle)
        with patch(self.editor.model, others, routing="routed") as handle:
            never = scorer.logits(handle)
        same = all(torch.equal(a, b) for a, b in zip(removed, never, strict=True))
        return same and all(torch.equal(a, b) for a, b in zip(before, scorer.logits(), strict=True))


def generate(
    editor: RowEditor, handle: PatchHandle, samples: Sequence[Sample], acting: Sequence[int | None], edits: Edits
) -> list[str]:
    """Greedy answers, every prompt served with the one edit that acts on it (or none)."""
    out = [""] * len(samples)
    asked = [Sample(s.prompt, None, s.image) for s in samples]
    for batch in editor.collator.batches(asked, 64, side="left"):
        ids = [None if acting[r] is None else edits.ids[acting[r]] for r in batch.rows]
        with handle.choosing(ids):
            new = editor.collator.generate_ids(batch)
        for row, answer in zip(batch.rows, editor.collator.answers(new), strict=True):
            out[row] = answer
    return out


def mean(values: Any) -> float:
    """The mean, nan of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else float("nan")


def summary(asked: Sequence[PlacedProbe], scores: Sequence[Score], together: int = 1) -> dict[str, Any]:
    """Means in percent with standard errors clustered by concept: the five metrics (locality A), B, and the parts.

    Probes of one edit and kind count as one sample (their mean), as MMEdit counts one probe per edit and kind.
    together: edits that were on the model at a time, in their order.
    """
    metrics, errors, locality_b, parts, every = {}, {}, {}, {}, {}
    concepts = {p.edit: p.concept for p in asked if p.kind == "rel"}  # of every edit: a fact has no pictures
    sequences = {edit: i // together for i, edit in enumerate(concepts)}

    def per_edit(value: Callable[[Score], float], chosen: Callable[[PlacedProbe], bool]) -> dict[int, float]:
        found: dict[int, list[float]] = {}
        for p, s in zip(asked, scores, strict=True):
            if chosen(p):
                found.setdefault(p.edit, []).append(100.0 * value(s))
        return {edit: mean(v) for edit, v in found.items()}

    for kind in KINDS:
        local = kind.endswith("loc")
        found = per_edit(lambda s, a=local: s.locality_a if a else s.accuracy, lambda p, k=kind: p.kind == k)
        values = every[kind] = list(found.values())
        metrics[kind], errors[kind] = mean(values), clustered_error(values, [concepts[e] for e in found])
        if together > 1:  # what one sequence suffers, all in it do
            errors[kind] = larger(errors[kind], clustered_error(values, [sequences[e] for e in found]))
        if local:
            locality_b[kind] = mean(list(per_edit(lambda s: s.locality_b, lambda p, k=kind: p.kind == k).values()))
    for name in sorted({(p.kind, p.part) for p in asked if p.part}):
        found = per_edit(lambda s: s.locality_a, lambda p, n=name: (p.kind, p.part) == n)
        parts[f"{name[0]}.{name[1]}"] = mean(list(found.values()))
    metrics["mean"] = mean_of_five(*(metrics[k] for k in KINDS))
    out = {"metrics": metrics, "errors": errors, "locality_b": locality_b, "parts": parts}
    if together > 1:
        out["sequences"] = " ".join(map(str, sequences.values()))
    return out | compact(every, list(concepts.values()))


def compact(values: dict[str, list[float]], clusters: Sequence[str]) -> dict[str, Any]:
    """Every edit's value by kind in tenths of a percent, and its concept, as short texts: to compare edit by edit."""
    return {
        "values": {kind: " ".join(str(round(10 * v)) for v in found) for kind, found in values.items()},
        "clusters": " ".join(c.replace(" ", "_") for c in clusters),
    }


def run(
    seed: int,
    items: Sequence[dict[str, Any]],
    *,
    quick: bool,
    controls: bool = True,
    keep: Path | None = None,
    world: World | None = None,
    more: Sequence[Row] = (),
) -> dict[str, Any]:
    """All rows on base model `seed`; returns what `run.py` saves.

    keep: a file that holds the finished rows, where a stopped run goes on. world: of these items on another model.
    more: rows after the others; one of a name that is there is not measured again.
    """
    started = time.time()
    world = World(seed, items, default_config(), quick=quick) if world is None else world
    out: dict[str, Any] = {"seed": seed, "edits": len(items), "rows": {"base": world.score_base()}, "seconds": 0.0}
    out["fit"] = {str(i): fit_report(f) for i, f in world.editor.fits.items()}
    if keep is not None and keep.exists():
        out = json.loads(keep.read_text())
    before = out["seconds"]
    rows = [*ROWS, *(CONTROLS if controls else ()), *more]
    mean_alpha = out["rows"].get("UniKE", {}).get("alpha", {}).get("rel")
    for row in tqdm(rows, desc=f"model {seed}", unit="row"):
        if row.name in out["rows"]:
            continue
        editor, edits = world.make(row, mean_alpha)
        result = world.score(row, editor, edits)
        result["missed"] = sum(not e.success for e in edits.entries)
        out["rows"][row.name] = result | {"control": row.control}
        if row.name == "UniKE":
            mean_alpha = result["alpha"]["rel"]
        if row.routed:
            out["rows"][f"{row.name}, {STACK} stacked"] = world.stacked(row, editor, edits) | {"control": False}
        if row.name == "UniKE, routed":
            out["removal_is_exact"] = world.removal_is_exact(edits)
        out["seconds"] = before + time.time() - started
        if keep is not None:
            write(keep, out)
    return out


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes a result as JSON, whole or not at all."""
    with replacing(path) as half:
        half.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def fit_report(fit: Any) -> dict[str, float]:
    """What the encoders' fit reached on held-out triplets."""
    return {
        "truthfulness_auc": fit.truthfulness_auc,
        "semantic_recall": fit.semantic_recall,
        "untrained_auc": fit.untrained_auc,
        "untrained_recall": fit.untrained_recall,
    }
