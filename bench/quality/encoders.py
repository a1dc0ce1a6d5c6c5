"""How sure the encoders' figures are: fitted again with other triplets held out."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from tqdm import tqdm

from bench.quality.ablation import fit_report
from unike_kernels.editing.editor import Editor


@dataclass(frozen=True)
class Splits:
    """What is held out: a share of the answers (all triplets of a concept) or of the triplets, drawn anew `times`."""

    by: Literal["answer", "triplet"]
    share: float
    times: int


SPLITS = (Splits("answer", 0.2, 5), Splits("triplet", 0.1, 3))


def held_out(editor: Editor, splits: Splits) -> dict[str, list[dict[str, float]]]:
    """By layer, what each of the splits measured; the editor's own fits and settings stay."""
    config, fits = editor.config, editor.fits
    found: dict[str, list[dict[str, float]]] = {}
    try:
        for seed in tqdm(range(splits.times), desc=f"held out by {splits.by}", unit="fit"):
            changed = replace(config.encoders, held_out=splits.share, held_out_by=splits.by, seed=seed)
            editor.config = replace(config, encoders=changed)
            for layer, fit in editor.fit(progress=False).items():
                found.setdefault(str(layer), []).append(fit_report(fit))
    finally:
        editor.config, editor.fits = config, fits
    return found


def run(editor: Editor, seed: int) -> dict[str, Any]:
    """All splits on base model `seed`, whose memory `editor` has built; returns what `run.py` saves."""
    triplets = len(editor.states.kept) if editor.states is not None else 0
    return {"seed": seed, "triplets": triplets, "splits": {s.by: held_out(editor, s) for s in SPLITS}}
