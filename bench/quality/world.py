"""One base model of the emoji world, ready for experiments: its editor, its edit requests and their probes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from bench.quality.emoji import data, model, records
from unike_kernels.config import UnikeConfig
from unike_kernels.editing.editor import Editor
from unike_kernels.editing.inputs import Sample

CACHE = Path(__file__).parent / ".cache"


@dataclass(frozen=True)
class Probe:
    """One question asked after an edit: which edit (its index), which metric, which part of it."""

    edit: int
    kind: str  # "rel", "t_gen", "m_gen", "t_loc", "m_loc"
    part: str  # of a locality metric, "" otherwise
    sample: Sample
    concept: str


@cache
def picture(path: str) -> Image.Image:
    """A drawing as RGB pixels; path relative to the drawings."""
    return Image.open(data.DRAWINGS / path).convert("RGB")


def sample(prompt: str, target: str, image: str | None = None) -> Sample:
    """A sample whose picture, if any, is named by its path."""
    return Sample(prompt, target, None if image is None else picture(image))


def request(record: dict[str, Any]) -> dict[str, Any]:
    """What `Editor.edit` takes, from a record in MMEdit's format."""
    return {
        "id": record["id"],
        "prompt": record["src"],
        "target": record["alt"],
        "image": picture(record["image"]),
    }


def probes(items: Sequence[dict[str, Any]]) -> list[Probe]:
    """Every probe of every record: the edit itself, all rephrasings, all other artists, all locality questions."""
    out = []
    for i, r in enumerate(items):
        concept, image = r["concept"], r["image"]
        asked = [("rel", "", r["src"], r["alt"], image)]
        asked += [("t_gen", "", p, r["alt"], image) for p in r["rephrases"]]
        asked += [("m_gen", "", r["src"], r["alt"], other) for other in r["image_rephrases"]]
        asked += [("t_loc", t["part"], t["prompt"], t["target"], None) for t in r["t_loc"]]
        asked += [("m_loc", m["part"], m["prompt"], m["target"], m["image"]) for m in r["m_loc_parts"]]
        out += [Probe(i, kind, part, sample(p, t, im), concept) for kind, part, p, t, im in asked]
    return out


def triplets(limit: int | None = None, task: str = "name") -> list[dict[str, Any]]:
    """The memory's triplets with their pictures; `limit` takes every n-th so that all concepts stay represented."""
    found = records.triplets(task=task)
    step = max(1, len(found) // limit) if limit else 1
    return [
        {"prompt": t["prompt"], "target": t["target"], "image": picture(t["image"]) if t["image"] else None}
        for t in found[::step]
    ]


def calibration(n: int) -> list[dict[str, Any]]:
    """Training-side questions of all kinds, with and without a picture, that no edit should claim."""
    cases = records.calibration_prompts(n)
    return [{"prompt": prompt, "image": None if image is None else picture(image)} for image, prompt in cases]


def prepared(seed: int, config: UnikeConfig, editor_class: type[Editor] = Editor, *, quick: bool = False) -> Editor:
    """An editor of base model `seed` with its memory built, encoders fitted and routing calibrated.

    quick: a quarter of the triplets and of the calibration cases.
    """
    net, processor = model.load(seed)
    editor = editor_class(net, processor, config)
    editor.build_memory(triplets(260 if quick else None), cache=CACHE / f"seed{seed}")
    editor.fit()
    editor.calibrate(calibration(1000 if quick else 4000))
    return editor
