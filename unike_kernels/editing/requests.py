"""What edits are asked for, and how they and their tensors join an Edits."""

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..edits import EditEntry, Edits, LayerEdits
from ..edits_schema import half_character
from .inputs import Sample, image_digest
from .train import Rows

_ASKED = ("id", "prompt", "target", "image")
_LEARNED = (*_ASKED, "prediction", "question")
# What the dicts of each kind may hold. An unknown key is refused: a misspelt "image" would make an edit of text alone.
KEYS = {
    "request": _ASKED,
    "triplet": _LEARNED,
    "calibration case": _LEARNED,
    "probe": (*_ASKED, "kind"),
    "sample to exclude": (*_LEARNED, "kind"),  # any of the others
}


@dataclass
class Request:
    """One edit asked for; digest: of its picture, None for none."""

    id: str
    prompt: str
    target: str
    image: Any
    digest: str | None

    def sample(self) -> Sample:
        """The request as a question with its answer."""
        return Sample(self.prompt, self.target, self.image)

    def entry(self, layers: Sequence[int]) -> EditEntry:
        """Its entry while it has no neurons."""
        return EditEntry(self.id, self.prompt, self.target, self.digest, dict.fromkeys(layers, 0), None, False, 0)


def check_samples(samples: Sequence[dict[str, Any]], what: str) -> None:
    """ValueError unless there are samples, all with a prompt and a target."""
    if not samples:
        raise ValueError(f"no {what}s given")
    check_dicts(samples, what, ("prompt", "target"))


def check_dicts(samples: Sequence[dict[str, Any]], what: str, keys: Sequence[str]) -> None:
    """ValueError unless it is a list of dicts that all have text under these keys, and no key that `KEYS` lacks."""
    if isinstance(samples, dict | str) or not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
        kind = type(samples).__name__  # an iterator would be used up by this very check
        raise ValueError(f"{what}s must be a list of dicts, but are a {kind}")
    for n, s in enumerate(samples):
        if not isinstance(s, dict):
            raise ValueError(f"{what} {n} must be a dict, but is {s!r}")
        unknown = next((key for key in s if key not in KEYS[what]), None)
        if unknown is not None:
            raise ValueError(f"{what} {n} has an unknown key {unknown!r}; known: {', '.join(KEYS[what])}")
        for key in keys:
            if not isinstance(s.get(key), str) or not s[key].strip():
                raise ValueError(f"{what} {n} needs a non-empty string {key!r}, but has {s.get(key)!r}")
        for key in ("id", "prompt", "target", "prediction", "question"):
            if half := half_character(str(s.get(key))):
                raise ValueError(f"{what} {n}: {key} holds {half!r}, which is half a character")


def check_questions(samples: Sequence[dict[str, Any]], what: str) -> None:
    """ValueError unless what each sample names as its question, if anything, is a text."""
    for n, s in enumerate(samples):
        question = s.get("question")
        if question is not None and (not isinstance(question, str) or not question.strip()):
            raise ValueError(f"{what} {n}: question must be a non-empty string or left out, but is {question!r}")


def asked(sample: dict[str, Any]) -> tuple[str | None, str]:
    """(digest of the picture, prompt): what is asked, whatever the answer."""
    return image_digest(sample.get("image")), sample["prompt"]


def read_requests(requests: Sequence[dict[str, Any]], onto: Edits | None) -> tuple[list[Request], Edits | None]:
    """The requests with their ids, and `onto` without the edits that a request replaces.

    Of two that ask the same (picture and prompt) the newer one stays, said in a warning; two with one id are an error.
    """
    check_samples(requests, "request")
    latest: dict[tuple[str | None, str], Request] = {}
    replaced = []
    for n, r in enumerate(requests):
        if isinstance(r.get("id"), bool) or not isinstance(r.get("id"), str | Integral | None):
            raise ValueError(f"the id of request {n} must be a string or a whole number, but is {r['id']!r}")
        try:
            key = asked(r)
        except Exception as error:  # of PIL's readers, where a picture was opened, but not yet read
            raise OSError(f"the picture of request {n} cannot be read: {error}") from None
        made = hashlib.sha256(repr((*key, r["target"])).encode()).hexdigest()[:12]
        name = made if r.get("id") is None else str(r["id"])
        if not name:
            raise ValueError(f"the request of prompt {r['prompt']!r} has an empty id")
        new = Request(name, r["prompt"], r["target"], r.get("image"), key[0])
        if key in latest:
            replaced.append((new.id, latest.pop(key).id))
        latest[key] = new
    if onto is not None:
        gone = {e.id: latest[e.image, e.prompt].id for e in onto.entries if (e.image, e.prompt) in latest}
        replaced += [(new, old) for old, new in gone.items()]
        onto = onto.remove(list(gone))
    warn_of_replaced(replaced)
    check_unique([*(r.id for r in latest.values()), *(onto.ids if onto is not None else ())])
    return list(latest.values()), onto


def warn_of_replaced(pairs: Sequence[tuple[str, str]]) -> None:
    """A warning for each (newer, older) request, in the name of whoever called the caller."""
    for newer, older in pairs:
        warnings.warn(f"request {newer!r} replaces {older!r}: the same picture and prompt", stacklevel=4)


def check_unique(ids: Sequence[str]) -> None:
    """ValueError that names the ids that come more than once."""
    twice = sorted(name for name, n in Counter(ids).items() if n > 1)
    if twice:
        raise ValueError(f"edit ids must be unique, but these come twice: {', '.join(map(repr, twice))}")


def appended(edits: Edits, entries: Sequence[EditEntry], layers: dict[int, LayerEdits]) -> Edits:
    """`edits` with more edits behind the ones it has."""
    grown = {i: LayerEdits.cat([layer, layers[i]]) for i, layer in edits.layers.items()}
    return replace(edits, entries=[*edits.entries, *entries], layers=grown)


def new_layer(
    own: tuple[Tensor, Tensor], gated: bool, rows: Rows | None = None, zeta: Tensor | None = None
) -> LayerEdits:
    """E edits at one layer, all of one size, on the CPU in float32; without rows their groups are empty.

    own: (h_sem, h_pos), each [E, d]; rows: the neurons [E * ne, ...], those of one edit side by side; zeta [E, d].
    """
    h_sem, h_pos = own
    edits, d = h_sem.shape
    if rows is None:
        names = ("keys", "values", "up") if gated else ("keys", "values")
        biases = ("key_bias", "up_bias") if gated else ("key_bias",)
        rows = {name: h_sem.new_zeros(0, d) for name in names} | {name: h_sem.new_zeros(0) for name in biases}
    rows = {name: t.float().cpu() for name, t in rows.items()}
    size = len(rows["keys"]) // max(edits, 1)
    return LayerEdits(
        keys=rows["keys"],
        key_bias=rows["key_bias"],
        values=rows["values"],
        group_ptr=size * torch.arange(edits + 1, device="cpu"),
        zeta=h_sem.new_zeros(edits, d) if zeta is None else zeta.float().cpu(),
        up=rows.get("up"),
        up_bias=rows.get("up_bias"),
        h_sem=h_sem,
        h_pos=h_pos,
    )
