"""One base model of the emoji world, ready for experiments: its editor, its edit requests and their probes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.quality.emoji import data, model, records
from unike_kernels.config import UnikeConfig
from unike_kernels.editing.editor import Editor
from unike_kernels.editing.inputs import Sample
from unike_kernels.evaluation.records import Probe, Record

CACHE = Path(__file__).parent / ".cache"


@dataclass(frozen=True)
class PlacedProbe:
    """One probe of one of many edits: which edit (its index), which metric, which part of it."""

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
        "image": None if record["image"] is None else picture(record["image"]),
    }


def record(item: dict[str, Any]) -> Record:
    """An item of `records.records` as the library's Record: the edit, all rephrasings, artists and locality questions.

    task: "name", "caption" or "rename"; errors cluster by concept.
    """
    target, image = item["alt"], item["image"]
    found = [Probe("rel", sample(item["src"], target, image))]
    found += [Probe("t_gen", sample(prompt, target, image)) for prompt in item["rephrases"]]
    found += [Probe("m_gen", sample(item["src"], target, other)) for other in item["image_rephrases"]]
    found += [Probe("t_loc", sample(t["prompt"], t["target"]), t["part"]) for t in item["t_loc"]]
    found += [Probe("m_loc", sample(m["prompt"], m["target"], m["image"]), m["part"]) for m in item["m_loc_parts"]]
    return Record(item["id"], found[0].sample, tuple(found), item["id"].partition("-")[0], item["concept"])


def edits(split: str, task: str, n: int, seed: int = 0) -> list[Record]:
    """`n` edits of a task as Records: see `records.records`."""
    return [record(item) for item in records.records(split, task, n, seed)]


def probes(items: Sequence[dict[str, Any]]) -> list[PlacedProbe]:
    """Every probe of every item, with the item's index and concept."""
    return [
        PlacedProbe(i, p.kind, p.part, p.sample, item["concept"])
        for i, item in enumerate(items)
        for p in record(item).probes
    ]


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


def with_memory(
    seed: int,
    config: UnikeConfig,
    editor_class: type[Editor] = Editor,
    *,
    quick: bool = False,
    device: torch.device | str = "cpu",
) -> Editor:
    """An editor of base model `seed` on `device` with its memory built; quick: of a quarter of the triplets."""
    net, processor = model.load(seed)
    editor = editor_class(net.to(device), processor, config)
    editor.build_memory(triplets(260 if quick else None), cache=CACHE / f"seed{seed}")
    return editor


def prepared(*given: Any, quick: bool = False, **options: Any) -> Editor:
    """`with_memory` of the same arguments, its encoders fitted and routing calibrated; quick: also on a quarter of the
    calibration cases.
    """
    editor = with_memory(*given, quick=quick, **options)
    editor.fit()
    editor.calibrate(calibration(1000 if quick else 4000))
    return editor
