"""The second model ready for edits: its editor, and the ablation's rows on pictures and on text-only facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import torch
from tqdm import tqdm

from bench.quality.ablation import World, summary, write
from bench.quality.emoji import records
from bench.quality.rows import Row, RowEditor
from bench.quality.world import CACHE, calibration, request, triplets
from unike_kernels.config import UnikeConfig
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.evaluation.scoring import Score, Scorer

from . import facts, model

Task = Literal["pictures", "text"]
TASKS: tuple[Task, ...] = ("pictures", "text")
FOLDER = CACHE / "smollm"
PER_KIND = {"rephrases": 2, "image_rephrases": 1}  # of a record's rephrasings; each locality part has one probe


def thinned(record: dict[str, Any]) -> dict[str, Any]:
    """The record with fewer probes: a pass through 30 layers costs twenty times what the tiny model's costs."""
    out = record | {name: record[name][:n] for name, n in PER_KIND.items()}
    for name in ("t_loc", "m_loc_parts"):
        out[name] = list({probe["part"]: probe for probe in record[name]}.values())
    return out


def items(task: Task, n: int, split: str = "reported") -> list[dict[str, Any]]:
    """`n` edits of a task: names of things never named from a picture, or counterfactual facts of countries.

    Facts are asked without pictures throughout, so that they need no projector.
    """
    if task == "pictures":
        return [thinned(record) for record in records.records(split, "name", n)]
    return [thinned(record) | {"m_loc_parts": []} for record in facts.records(split, n)]


def first_phrase(text: str) -> str:
    """An answer cut where its first phrase ends: the language model goes on after a fact."""
    for end in (".", ",", ";", "\n"):
        text = text.split(end)[0]
    return text.strip()


def text_triplets(collator: Collator) -> list[dict[str, Any]]:
    """The facts' triplets with the model's own answers, which are asked once and kept."""
    found = facts.triplets()
    kept = FOLDER / f"answers-{str(next(collator.model.llama_model.parameters()).dtype).split('.')[-1]}.json"
    known = json.loads(kept.read_text()) if kept.exists() else {}
    unknown = [t["prompt"] for t in found if t["prompt"] not in known]
    if unknown:
        answers = collator.generate([Sample(prompt) for prompt in unknown], 32, max_new_tokens=6)
        known |= {p: first_phrase(a) or "unknown" for p, a in zip(unknown, answers, strict=True)}
        write(kept, known)
    return [t | {"prediction": known[t["prompt"]]} for t in found]


def prepared(
    task: Task, config: UnikeConfig, seed: int = 0, dtype: torch.dtype = torch.float32, *, quick: bool = False
) -> RowEditor:
    """An editor with memory, encoders and calibration; dtype: of the language model alone.

    quick: fewer triplets and calibration cases.
    """
    net, processor = model.load(seed, trained=task == "pictures")
    net.llama_model.to(dtype)
    editor = RowEditor(net, processor, config)
    cache = FOLDER / f"memory-{task}"
    if task == "pictures":
        # a thing's name is asked of several artists' drawings, each time in the same words
        asked = [t | {"question": t["target"]} for t in triplets(64 if quick else 260)]
        editor.build_memory(asked, cache=cache, batch_size=16)
        cases = calibration(64 if quick else 600)
    else:
        asked = text_triplets(editor.collator)
        editor.build_memory(asked[::3] if quick else asked, cache=cache, batch_size=16)
        cases = facts.calibration()
    editor.fit()
    editor.calibrate(cases)
    return editor


class SmolWorld(World):
    """The ablation's world on the second model."""

    def __init__(
        self,
        task: Task,
        asked: Sequence[dict[str, Any]],
        config: UnikeConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        quick: bool = False,
    ) -> None:
        """asked: from `items`."""
        super().__init__(seed, asked, config, editor=prepared(task, config, seed, dtype, quick=quick))

    def sequential(self, row: Row, size: int, mean_alpha: float | None = None) -> dict[str, Any]:
        """Edits one after another in chunks of `size`, all of a chunk applied, then all of it tested; all act."""
        editor = self.row_editor(row, mean_alpha)
        scores: list[Score] = []
        order = []
        for at in tqdm(range(0, len(self.items) - size + 1, size), desc=f"{row.name}, K = {size}", leave=False):
            chunk = [request(r) for r in self.items[at : at + size]]
            edits = editor.edit(chunk, independent=False, progress=False)
            mine = [p for p in self.probes if at <= p.edit < at + size]
            scorer = Scorer(self.editor.collator, self.editor.decoder, self.editor.layers[0], [p.sample for p in mine])
            with self.patched(editor, edits) as handle:
                scores += scorer.score(handle)
            order += mine
        return summary(order, scores, size)
