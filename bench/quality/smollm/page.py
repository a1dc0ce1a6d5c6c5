"""The page of the second model: results/smollm.md, from everything that is saved of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.quality import claims, tables
from bench.quality.differences import SURE
from bench.quality.report import RESULTS, taken

from . import baselines, latent, model, world

PAGE = RESULTS / "smollm.md"
TITLES = {
    "pictures": "names of things that were never named from a picture",
    "text": "counterfactual capitals and languages of countries, text only",
}


def where(name: str) -> Path:
    """The file of one experiment's results."""
    return RESULTS / f"smollm-{name}.json"


def read(path: Path) -> dict[str, Any]:
    """A saved result, or nothing."""
    return json.loads(path.read_text()) if path.exists() else {}


def knowledge_section(result: dict[str, Any]) -> str:
    """What the model knows, as a table."""
    parts = [(dtype, result[name]) for name, dtype in result["dtype"].items()]
    rows = [[label, tables.number(v), dtype] for dtype, part in parts for label, v in part.items()]
    return "\n\n".join(["## What it knows", tables.markdown(["asked", "right, %", "language model in"], rows)])


def latent_section(task: world.Task) -> list[str]:
    """What a memory item carries, on one task."""
    found = read(where(f"latent-{task}"))
    if not found:
        return []
    parts = [
        f"## Does the memory carry knowledge? ({task})",
        f"{found['edits']} edits, no neurons, K = 1, language model in {found['dtype']}; gains in mean "
        f"log-likelihood of a target token, paired, with standard errors. {taken(found['environment'])}",
    ]
    items = world.items(task, found["edits"])
    for kind in ("rel", "t_gen", "m_gen"):
        if kind in found["base"]:
            parts += [f"{tables.HEADS[kind]}:", latent.table(found, items, kind)]
    return parts


def ablation_section(result: dict[str, Any]) -> str:
    """One task's ablation and its edits in sequence."""
    rate = f", always on at a rate of {result['rate']:g}" if "rate" in result else ""
    parts = [
        f"## Edits: {TITLES[result['task']]}{rate}",
        f"{result['edits']} edits, language model in {result['dtype']}; in percent, standard errors clustered by "
        "concept, controls in italics, locality A unless B is named.",
        tables.five_metrics(result),
        "Locality A by part; alpha averaged over layers; how often an edit acted on a probe, in percent.",
        tables.localities(result),
        taken(*result.get("taken", [result["environment"]])),
    ]
    if result.get("sequential"):
        head = ["many edits on one model", *(tables.HEADS[k] for k in tables.KINDS)]
        rows = [
            [name, *(tables.number(row["metrics"][k], row["errors"][k]) for k in tables.KINDS)]
            for name, row in result["sequential"].items()
        ]
        parts += ["All edits of a chunk applied, then all tested.", tables.markdown(head, rows)]
    return "\n\n".join(parts)


def baselines_section(task: world.Task) -> list[str]:
    """One task's baselines and claims."""
    parts, found = read(where(f"ablation-{task}")), read(where(f"baselines-{task}"))
    if not parts or not found.get("rows"):
        return []
    told = [f"{name}: n/a, {row['na']}." for name, row in found["rows"].items() if "na" in row]
    told += [
        f"{name}: of the tokens of training-split edits {row['follows']:.1f} % are right with the answer in the "
        f"prompt, {row['without']:.1f} without."
        for name, row in found["rows"].items()
        if "follows" in row
    ]
    return [
        f"## Baselines: {TITLES[task]}",
        f"The {found['edits']} edits of the ablation, language model in {found['dtype']}; sequences in its order. "
        f"{taken(*found['taken'])}",
        baselines.table(task, parts, found),
        *told,
        *(["Settings, on development edits:", baselines.searched(task, found)] if found["search"] else []),
        f"## The paper's claims: {TITLES[task]}",
        "Differences in points with standard errors, positive where the claim says so; a direction counts from "
        f"{SURE:g} standard errors. The paper's are MiniGPT-4's on E-VQA, in the metrics that the task has.",
        claims.table(claims.of_rows(baselines.rows_of(task, parts, found))),
    ]


def write_page() -> Path:
    """results/smollm.md from everything that is saved, and results/smollm-notes.md, which is written by hand."""
    parts = [
        "# The second model: SmolLM2-135M-Instruct behind a MiniGPT-4 layout",
        "Made by `python -m bench.quality.smollm.run`.",
    ]
    notes = RESULTS / "smollm-notes.md"
    if notes.exists():
        parts.append(notes.read_text(encoding="utf-8").rstrip())
    if known := read(model.weights_file().with_suffix(".json")):
        parts.append(knowledge_section(known))
    for task in world.TASKS:
        parts += latent_section(task)
    for task in world.TASKS:
        for path in sorted(RESULTS.glob(where(f"ablation-{task}*").name), key=lambda path: len(path.name)):
            parts.append(ablation_section(read(path)))
    for task in world.TASKS:
        parts += baselines_section(task)
    PAGE.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return PAGE
