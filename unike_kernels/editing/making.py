"""Files of requests and triplets to saved edits: what `unike-kernels edit` does."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ..config import UnikeConfig
from ..edits import Edits
from ..edits_io import CONFIG_NAME
from ..evaluation.checking import CheckReport, check_probes
from ..evaluation.pictures import resolve
from ..evaluation.records import LOCAL
from ..files import read_json
from ..models import same_weights
from .checks import check_inputs, check_probe_inputs, check_triplets
from .editor import Editor
from .inputs import Sample
from .loading import load
from .requests import (
    Request,
    asked,
    check_dicts,
    check_questions,
    check_samples,
    check_unique,
    read_requests,
    warn_of_replaced,
)

SAVED_EVERY = 32  # edits that are made one after another: what a stop loses at most
SHOWN = 20  # edits, and probes answered wrong, that are told one by one


@dataclass(frozen=True)
class Job:
    """Everything that was asked for; paths as given, pictures relative to the file that names them.

    routing: None leaves it to the config. cache: where extracted states and fitted encoders are kept.
    """

    model: str
    requests: Path
    out: Path
    triplets: Path
    probes: Path | None = None
    routing: Literal["always", "routed"] | None = None
    config: UnikeConfig | None = None
    cache: Path | None = None
    dtype: str = "auto"
    device: str = "auto"
    progress: bool = True


def run(job: Job, say: Callable[[str], None]) -> Edits:
    """Makes the edits that `job.out` does not hold yet, saved there as they are made, and says what came out.

    Edits that are there stay, but for one that a request replaces (the same picture and prompt); one whose request has
    another id now takes it. Triplets that ask what a request, an edit or a probe asks are left out of the memory.
    Whatever can be wrong with files, folders, settings, pictures, prompts and targets is found before anything is
    computed. Raises ValueError, OSError and their kinds.
    """
    requests, known = _read(job.requests, "request"), _read(job.triplets, "triplet")
    probes = _read(job.probes, "probe") if job.probes is not None else []
    check_samples(requests, "request")
    check_samples(known, "triplet")
    check_questions(known, "triplet")
    questions = check_probes(probes)
    config, document, there = _config(job), _document(job.out), _there(job.out)
    _check_settings(config, there, job.out)
    left, named = _left(requests, there)
    edits = named
    if left or probes or _may_be_another(config, there, job.model):
        model, processor = load(job.model, dtype=job.dtype, device=job.device)
        editor = Editor(model, processor, config)
        _check_base(editor, there, job.out, joined=bool(left))
        saved = _saved(editor, known, job) if left else None
        wanted = [Sample(r["prompt"], r["target"], r["image"]) for r in requests]
        options: dict[str, Any] = {"progress": job.progress}
        check_inputs(editor.collator, editor.decoder, wanted, lambda n: f"request {n}", eos=True, **options)
        check_probe_inputs(editor.collator, editor.decoder, questions)
        if left and not (saved is not None and saved.exists()):
            check_triplets(editor.collator, editor.decoder, known, **options)
    if left:
        never = {asked(s) for s in (*requests, *probes)}
        never |= {(e.image, e.prompt) for e in there.entries} if there is not None else set()
        _learn(editor, known, never, saved, job, say)
        _check_memory(editor, there, job.out)
        edits = _made(editor, left, named, job, document)
    elif named is not None and there is not None and named.ids != there.ids:
        _save(named, job.out, document)
    assert edits is not None  # there are requests, so they are made or there

    others = len(requests) - len(left)
    told = f"; requests whose edit was there, or that a later one replaces: {others}" if others else ""
    say(f"\nedits made: {len(left)}{told}")
    if left:
        say(edits.select([r.id for r in left]).summary(limit=SHOWN))
    if probes:
        say(f"\n{_told(editor.check(edits, probes))}")
    say(f"\n{len(edits)} edits are in {job.out}; use them with:")
    say(f"unike_kernels.patch(model, unike_kernels.Edits.from_pretrained({str(job.out)!r}))")
    return edits


def _read(path: Path, what: str) -> list[dict[str, Any]]:
    """A JSON list of samples, their pictures as files beside it; all of them are there."""
    samples = read_json(path)
    if not isinstance(samples, list) or not all(isinstance(s, dict) for s in samples):
        raise ValueError(f"{path} must hold a JSON list of objects")
    check_dicts(samples, what, ())
    for n, s in enumerate(samples):
        if s.get("image") is not None and not (isinstance(s["image"], str) and s["image"]):
            raise ValueError(f"{path}: the image of entry {n} must be a path or null, but is {s['image']!r}")
    files = resolve([s["image"] for s in samples if s.get("image")], path.parent)
    return [s | {"image": files[s["image"]] if s.get("image") else None} for s in samples]


def _there(out: Path) -> Edits | None:
    """The edits that the folder holds already; ValueError or OSError where none could be saved into it."""
    parent = out
    while not parent.exists():
        parent = parent.absolute().parent
    if not parent.is_dir():
        raise ValueError(f"edits are saved into a folder, but {parent} is a file")
    if not os.access(parent, os.W_OK):
        raise PermissionError(f"{parent} cannot be written to")
    return Edits.from_pretrained(out) if (out / CONFIG_NAME).exists() else None


def _left(requests: Sequence[dict[str, Any]], there: Edits | None) -> tuple[list[Request], Edits | None]:
    """The requests that are still to be made, the newest of each question, and the edits there under their new ids.

    An edit that is asked for under another id is not made again: it takes the new one. One that a request will replace
    gives up its id where another edit is to have it: requests are made in parts, and that one may come first.
    """
    latest, _ = read_requests(requests, None)
    if there is None:
        return latest, None
    made = {(e.prompt, e.target, e.image): e.id for e in there.entries}
    left = [r for r in latest if (r.prompt, r.target, r.digest) not in made]
    ids = {made[key]: r.id for r in latest if (key := (r.prompt, r.target, r.digest)) in made}
    newer = {(r.digest, r.prompt): r.id for r in left}
    gone = {e.id: newer[e.image, e.prompt] for e in there.entries if (e.image, e.prompt) in newer}
    warn_of_replaced([(new, old) for old, new in gone.items()])
    ids = {e.id: ids.get(e.id, e.id) for e in there.entries if e.id not in gone}
    names = [*ids.values(), *(r.id for r in left)]
    check_unique(names)
    taken = set(names)
    for old, new in gone.items():
        name = old
        while name in taken and (name != old or old != new):
            name += " (replaced)"
        taken.add(name)
        ids[old] = name
    return left, replace(there, entries=[replace(e, id=ids[e.id]) for e in there.entries])


def _plain(request: Request) -> dict[str, Any]:
    return {"id": request.id, "prompt": request.prompt, "target": request.target, "image": request.image}


def _config(job: Job) -> UnikeConfig:
    config = job.config or UnikeConfig()
    return config if job.routing is None else replace(config, routing=replace(config.routing, mode=job.routing))


def _check_settings(config: UnikeConfig, there: Edits | None, out: Path) -> None:
    """ValueError where the folder's edits were made under other settings or, as far as they are named, other layers."""
    if there is None:
        return
    wrong = there.config.differences(config)
    if config.layers is not None and sorted(set(config.layers)) != sorted(there.layers):
        wrong.append(f"layers: {sorted(there.layers)} and {sorted(set(config.layers))}")
    _refuse(wrong, out)


def _may_be_another(config: UnikeConfig, there: Edits | None, model: str) -> bool:
    """Whether only the loaded model can tell that the folder's edits are its own, and of the layers asked for."""
    if there is None:
        return False
    return there.base.name_or_path != model or (config.layers is None and there.config.layers is not None)


def _check_base(editor: Editor, there: Edits | None, out: Path, *, joined: bool) -> None:
    """ValueError where the folder's edits are of another model or of other layers.

    joined: whether new edits are to join them, which takes the very same weights: states of a model in another dtype
    are others. Edits that are only asked may be on a base of another precision.
    """
    if there is None:
        return
    ours = editor.base
    wrong = there.base.mismatches(ours)
    if tuple(there.layers) != editor.layers:
        wrong.append(f"layers: {list(there.layers)} and {list(editor.layers)}")
    same = there.base.same_probe(ours) if joined else same_weights(there.base.probe, ours.probe)
    if not wrong and not same:
        names = f"of {there.base.name_or_path!r} and of {ours.name_or_path!r}"
        wrong.append(f"weights: a sampled probe {names} differs (another model, or the same in another dtype)")
    _refuse(wrong, out)


def _refuse(wrong: Sequence[str], out: Path) -> None:
    if wrong:
        raise ValueError(f"{out} holds edits that new ones cannot join (there, here): {'; '.join(wrong)}")


def _check_memory(editor: Editor, there: Edits | None, out: Path) -> None:
    if there is None:
        return
    try:
        editor.continued(there)
    except ValueError:
        assert editor.states is not None  # `_learn` has built the memory
        items = len(there.shared[editor.layers[0]].h_sem), len(editor.states.kept)
        raise ValueError(
            f"{out} holds edits with another memory or other encoders (items there, here: {items}): new ones can only "
            "join them with the triplets, the config, the dtype and the cache that they were made with. Without the "
            "cache, a new request or probe leaves out the triplets that ask what it asks, and a new fit may come out a "
            "little different"
        ) from None


def _saved(editor: Editor, known: Sequence[dict[str, Any]], job: Job) -> Path | None:
    """Where the cache keeps what the editor learns from these triplets; None without a cache."""
    if job.cache is None:
        return None
    config = editor.config
    told: list[Any] = [editor.base.to_json(), editor.collator.fingerprint()]
    told += [sorted({str(p.dtype) for p in editor.model.parameters()})]  # the probe's digits are too few to tell them
    told += [config.layers, asdict(config.encoders), config.shift.attention, asdict(config.neurons)]
    told += [[asked(t), *(t.get(k) for k in ("target", "prediction", "question"))] for t in known]
    return job.cache / f"editor-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}.safetensors"


def _learn(
    editor: Editor,
    known: Sequence[dict[str, Any]],
    never: set[tuple[str | None, str]],
    saved: Path | None,
    job: Job,
    say: Callable[[str], None],
) -> None:
    """Memory and encoders from the triplets, or as a former run with the same ones left them in `saved`.

    never: what no triplet may ask (digest, prompt), as long as the memory is not there yet.
    """
    if saved is not None and saved.exists():
        editor.load(saved)
        say(f"memory and encoders as saved in {saved}")
        if known_before := len(never & editor.remembered):
            say(f"{known_before} of its items ask what is edited or probed, so scores of it are flattered")
        return
    kept = [t for t in known if asked(t) not in never]
    if len(kept) < len(known):
        say(f"{len(known) - len(kept)} of {len(known)} triplets ask what is edited or probed and are left out")
    editor.build_memory(kept, cache=job.cache, progress=job.progress)
    say(str(editor.fit(progress=job.progress)))
    if saved is not None:
        editor.save(saved)


def _made(editor: Editor, left: Sequence[Request], there: Edits | None, job: Job, document: bytes | None) -> Edits:
    """All edits, those of `left` made part by part and saved after each. document: as `_save` takes it."""
    edits, routed = there, editor.config.routing.mode == "routed"
    size = editor.config.neurons.batch_size if routed else SAVED_EVERY
    with (
        tqdm(total=len(left), desc="edits", unit="edit", disable=not job.progress) as bar,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "request .* replaces|.* edits miss their target")  # both are told
        for at in range(0, len(left), size):
            part = [_plain(r) for r in left[at : at + size]]
            edits = editor.edit(part, onto=edits, progress=False)
            document = _save(edits, job.out, document)
            bar.update(len(part))
    assert edits is not None  # there was something left
    return edits


def _save(edits: Edits, out: Path, document: bytes | None) -> bytes | None:
    """Saves edits into the folder; ValueError where it no longer holds the document that it held before.

    Returns the document that it holds now.
    """
    if _document(out) != document:
        raise ValueError(f"{out} was written to by another process meanwhile: start again, edits are added")
    edits.save_pretrained(out)
    return _document(out)


def _document(out: Path) -> bytes | None:
    path = out / CONFIG_NAME
    return path.read_bytes() if path.exists() else None


def _told(report: CheckReport) -> str:
    """The report's table, and the probes that came out wrong."""
    wrong = [row for row in report.rows if row.exact < 1]
    lines = [str(report)]
    for row in wrong[:SHOWN]:
        wanted = row.answer_before if row.kind in LOCAL else row.target
        lines.append(f"{row.kind}: {row.prompt!r} is answered {row.answer_after!r}, not {wanted!r}")
    if len(wrong) > SHOWN:
        lines.append(f"... and {len(wrong) - SHOWN} more")
    return "\n".join(lines)
