"""`make demo`: teaches a model that sees 20 things it cannot name, and shows what each part of UniKE does for that."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import unike_kernels as uk
from bench.quality.ablation import World
from bench.quality.emoji import model as emoji
from bench.quality.emoji import records
from bench.quality.rows import ROWS, default_config
from bench.quality.tables import HEADS, KINDS, number
from bench.quality.world import picture
from unike_kernels.editing.inputs import Collator, Sample
from unike_kernels.edits import Edits

EDITS = 20
WHAT = {
    "base": "the model as it was trained",
    "intrinsic only": "10 extra FFN neurons an edit and layer",
    "latent-IKE only": "retrieved states shift the attention, no neurons",
    "intrinsic + latent-IKE": "both, strength fixed at 0.5",
    "UniKE": "both, adaptive strength, truthful direction zeta",
    "UniKE, routed": "the same, acting only on questions near the edit",
    "UniKE, routed, 20 stacked": "all 20 edits on the model at once",
}


def main() -> None:
    """Runs the demo; about three minutes on two cores."""
    started = time.time()
    console = Console()
    items = records.records("reported", "name", EDITS)
    console.rule("UniKE: correct what a multimodal model believes, without retraining it")
    console.print(
        "A small BLIP-2 (2.6 M parameters, trained on emoji) sees these drawings but was never told their names. "
        f"We teach it {EDITS} names, from one picture and one question each. Is it then right (Rel), also when asked "
        "differently (T-Gen) or shown another artist's drawing (M-Gen), and is all else as before (T-Loc on text, "
        "M-Loc on pictures)? First, a memory of what the model gets wrong, and encoders that learn from it.\n"
    )
    world = World(0, items, default_config(), quick=True)
    found, routed = measured(world)
    console.print(legend(found), five_metrics(found))
    console.print(
        f"Percent over {EDITS} edits, each on its own unless stacked. T-Loc, M-Loc: share of answer tokens unchanged."
    )
    short = {name: row["missed"] for name, row in found.items() if row.get("missed")}
    if short:
        told = ", ".join(f"{n} of {name}" for name, n in short.items())
        console.print(f"Edits whose training stopped short of a clear margin, kept all the same: {told}.")
    console.print("\nThe same, asked more strictly:")
    console.print(strict(found))
    console.print(
        "B: unchanged at every position, not only in the answer. Exact: the whole answer, greedily generated, is the "
        "new name.\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        routed.save_pretrained(folder)
        size = sum(f.stat().st_size for f in Path(folder).iterdir())
        console.rule("Saved, loaded, patched into a freshly loaded model")
        console.print(f"{len(routed)} edits with their memory: {size / 1e6:.1f} MB on disk\n")
        answers(console, items, uk.Edits.from_pretrained(folder))
    console.print(f"\ndone in {time.time() - started:.0f} s")


def measured(world: World) -> tuple[dict[str, dict[str, Any]], Edits]:
    """What every row gives, by its name, and the edits of the last one, which is routed."""
    rows = [r for r in ROWS if r.name != "intrinsic only, routed"]
    found = {"base": world.score_base()}
    with tqdm(rows, desc="making and measuring edits", unit="row") as bar:
        for row in bar:
            bar.set_postfix_str(row.name)
            editor, edits = world.make(row)
            missed = sum(not e.success for e in edits.entries)
            found[row.name] = world.score(row, editor, edits) | {"missed": missed if row.neurons else 0}
    assert row.routed  # ROWS ends with the routed row
    found[f"{row.name}, 20 stacked"] = world.stacked(row, editor, edits)
    return found, edits


def legend(found: dict[str, Any]) -> Table:
    """What each row is."""
    table = Table.grid(padding=(0, 2))
    for name in found:
        table.add_row(name, WHAT[name])
    return table


def five_metrics(found: dict[str, Any]) -> Table:
    """The five metrics (locality A) and their mean, one line a row."""
    table = _table((*HEADS.values(), "mean"))
    for name, result in found.items():
        table.add_row(name, *(number(result["metrics"][k]) for k in (*KINDS, "mean")))
    return table


def strict(found: dict[str, Any]) -> Table:
    """Locality B, and exact match of greedy generation."""
    table = _table(("T-Loc\nB", "M-Loc\nB", "exact\nRel", "exact\nT-Gen", "exact\nM-Gen"))
    for name, result in found.items():
        exact = result.get("exact", {})
        cells = [number(result["locality_b"][k]) for k in ("t_loc", "m_loc")]
        table.add_row(name, *cells, *(number(exact.get(k)) for k in ("rel", "t_gen", "m_gen")))
    return table


def _table(heads: Sequence[str]) -> Table:
    table = Table()
    table.add_column("", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right")
    return table


def answers(console: Console, items: Sequence[dict[str, Any]], edits: Edits) -> None:
    """Three answers before and after, for edited, rephrased and unrelated inputs; then the base again."""
    model, processor = emoji.load(0)
    collator = Collator(model, processor)
    asked: list[tuple[str, Sample]] = []
    for kind in ("the edit itself", "asked differently", "another artist's drawing", "an unrelated picture", "a fact"):
        asked += [(kind, question(kind, r)) for r in items[:3]]
    samples = [s for _, s in asked]
    before = collator.generate(samples)
    base = logits(collator, samples)
    with uk.patch(model, edits, routing="routed") as handle:
        after = collator.generate(samples)
        first = collator.batch([Sample(samples[0].prompt, None, samples[0].image)], [0])
        why = handle.explain(**first.inputs)[0]
    table = Table("input", "question", "before", "after", "wanted")
    shown = ""
    for (kind, s), b, a in zip(asked, before, after, strict=True):
        asks = s.prompt.removeprefix("Question: ").removesuffix(" Answer:")
        table.add_row(kind if kind != shown else "", asks, b, a, s.target or "")
        shown = kind
    console.print(table)
    console.print(f"why, for the first answer: {why}\n")
    same = all(torch.equal(a, b) for a, b in zip(base, logits(collator, samples), strict=True))
    unchanged = before == collator.generate(samples)
    console.print(f"unpatched: answers as before: {unchanged}; logits equal bit for bit: {same}")
    if not (same and unchanged):
        raise SystemExit("unpatching did not give the base model back")


def question(kind: str, record: dict[str, Any]) -> Sample:
    """One question of a kind about a record's edit."""
    if kind == "a fact":
        return Sample(record["loc"], record["loc_ans"])
    if kind == "an unrelated picture":
        return Sample(record["m_loc_q"], record["m_loc_a"], picture(record["m_loc"]))
    prompt = record["rephrase"] if kind == "asked differently" else record["src"]
    image = record["image_rephrase"] if kind == "another artist's drawing" else record["image"]
    return Sample(prompt, record["alt"], picture(image))


@torch.no_grad()
def logits(collator: Collator, samples: Sequence[Sample]) -> list[torch.Tensor]:
    """The model's logits on the prompts, through its own forward."""
    asked = [Sample(s.prompt, None, s.image) for s in samples]
    return [b.model(**b.inputs).logits for b in collator.batches(asked, 16)]


if __name__ == "__main__":
    main()
