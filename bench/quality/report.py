"""The one writer of results/README.md: everything that is saved in a folder, as tables, figures and text."""

import json
import platform
from pathlib import Path
from typing import Any

import torch

from bench.commit import commit
from bench.quality import claims, figures, paper, paper_tables, speed, tables
from bench.quality.ablation import write
from bench.quality.cells import Store
from bench.quality.differences import SURE
from unike_kernels.files import replacing

RESULTS = Path(__file__).parent / "results"
QUICK = RESULTS / "quick"
COMMAND = "python -m bench.quality.run"
TABLES = {
    1: ("Table 1: one-step editing", paper_tables.table_1),
    2: ("Table 2: sequential editing", paper_tables.table_2),
    3: ("Table 3: cross-task editing", paper_tables.table_3),
}


LEGEND = """Rel: the edit itself. T-Gen: asked in other words. M-Gen: another artist's drawing. T-Loc, M-Loc: other
text, other pictures. Locality A: the share of answer tokens that stay as they were; B: the trained baselines'
stricter one, the order of the likeliest tokens at every position. "UniKE" is the paper's method, always on; routed,
an edit acts only on cases like its own. Missed route: its own edit did not act; wrong route: another did; M-Loc
claimed: any edit acted on a question that is none's. Intrinsic: the extra neurons alone; latent-IKE: the memory
alone, whose item has a key (h_sem) and a value (h_pos; h_neg for the wrong answer); h_know: what attending to the
memory gives. "-dirty" after a commit: with changes that were not committed."""


def environment(device: str = "cpu") -> dict[str, str]:
    """Where the figures were taken."""
    import transformers

    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    return {
        "commit": commit(Path(__file__).parent),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": machine if device == "cpu" else f"{machine}, {torch.cuda.get_device_name(device)}",
    }


def save(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes <name>.json into the folder, whole or not at all."""
    path = folder / f"{name}.json"
    write(path, result)
    return path


def saved(kind: str, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The saved results of a kind, by base model."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}-seed*.json"))]


def taken(*environments: dict[str, str]) -> str:
    """Where results were taken, as a sentence; several commits and machines side by side."""
    names = sorted({name for e in environments for name in e})
    told = (f"{n} {' and '.join(dict.fromkeys(e[n] for e in environments if n in e))}" for n in names)
    return f"Taken with {', '.join(told)}."


def write_report(folder: Path = RESULTS) -> Path:
    """README.md of the folder from all that is saved there, and its notes.md, which is written by hand."""
    parts = ["# Quality on the emoji world"]
    if folder.name == QUICK.name:
        parts.append(
            "**A quick run**: a few edits, a quarter of the memory, baselines trained for a fraction of their steps. "
            "It shows what the tables look like and that every row runs; its figures decide nothing."
        )
    parts += _paper(folder)
    ablations = paper_tables.ablations(folder)
    if ablations:
        parts += [
            "# Ablation with all controls",
            f"Made by `{COMMAND} --rows ablation`, captions with `--task caption`. h_know = 0: the shift stays, what "
            "it shifts towards is zero. Shuffled memory: every key has another item's value. Stacked: so many edits on "
            "the model at once.",
        ]
    for result in ablations:
        parts += [tables.report(result), taken(result["environment"])]
    notes = folder / "notes.md"
    parts += [notes.read_text(encoding="utf-8").rstrip()] if notes.exists() else []
    for result in saved("encoders", folder):
        parts += [tables.encoders(result), taken(result["environment"])]
    out = folder / "README.md"
    with replacing(out) as half:
        half.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return out


def _paper(folder: Path) -> list[str]:
    """The paper's tables and figures, its claims, and the speed of editing: what there is of them."""
    store, quick = Store(folder), " --quick" if folder.name == QUICK.name else ""
    rows = [row for base in store.bases() for row in store.rows(base).values()]
    parts: list[str] = []
    for number, (title, table) in TABLES.items():
        text = table(store)
        if text:
            parts += [f"### {title}", f"`{COMMAND} --table {number}{quick}`", text]
    text = paper_tables.table_4(folder)
    if text:
        parts += ["### Table 4: the parts of the method", f"`{COMMAND} --table 4{quick}`", text]
    for name in figures.NAMES:
        path = folder / f"figure-{name}.png"
        if path.exists():
            said = paper.FIGURES[name]
            if name != "5a":  # t-SNE: a picture, no number
                said += " What ours say of it stands under the paper's claims, below."
            parts += [f"### Figure {name}", f"`{COMMAND} --figure {name}{quick}`", said]
            parts.append(f"![Figure {name}]({path.name})")
            if name == "4a":
                parts.append(_in_context(store))
    for base in _models(folder):
        for task, named in paper_tables.TASKS.items():
            told = claims.claims(folder, base, task) if task in paper.ABLATION else []
            told = [c for c in told if task == "name" or c.ours is not None]  # figures are of names alone
            if any(c.ours is not None for c in told):
                parts += [f"### The paper's claims on base model {base}: {named}", claims.table(told)]
    if any(part.startswith("### The paper's claims") for part in parts):
        parts.append(
            f"Differences in points with standard errors, positive where the claim says so; a direction counts from "
            f"{SURE:g} standard errors. The paper's are MiniGPT-4's, on E-VQA and E-IC. A claim whose controls, from "
            "which the part it credits was taken away, gain as much has another cause. Rows of the same edits are "
            "compared edit by edit where their values were saved; otherwise the errors add up as if independent, which "
            "is too large."
        )
    speeds = saved("speed", folder) + saved("speed-gpu", folder)
    if speeds:
        parts += ["### Speed of editing", f"`{COMMAND} --speed{quick}`"]
        parts += [part for result in speeds for part in (speed.table(result), taken(result["environment"]))]
    if not parts:
        return []
    head = [
        "# The paper's tables and figures",
        "In percent, standard errors clustered by concept, locality A, token accuracy under teacher forcing beside "
        "exact match of greedy generation. Edits are names or captions of pictures that the base model does not know; "
        'drawings by other artists are the other pictures. The paper\'s columns are "Rel T-Gen M-Gen T-Loc M-Loc" of '
        "its own models, 1,000 times as large, on its own data: directions and gaps compare, levels do not.",
        LEGEND,
    ]
    if rows:
        head.append(taken(*(row["taken"] for row in rows)))
    return [*head, *parts]


def _models(folder: Path) -> list[int]:
    return sorted({*Store(folder).bases(), *(r["seed"] for r in paper_tables.ablations(folder))})


def _in_context(store: Store) -> str:
    """What Figure 4a says about IKE itself."""
    found = {base: store.found(base, "one-step", 1, "name", "IKE") for base in store.bases()}
    told = [f"base model {base}: {f.reason}" for base, f in found.items() if f is not None and f.reason]
    why = f" ({'; '.join(told)})" if told else ""
    return f"Intrinsic editing with IKE itself is n/a: it needs a model that follows demonstrations{why}."
