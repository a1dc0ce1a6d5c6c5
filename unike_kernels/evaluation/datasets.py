"""MMEdit's and VLKEB's files: read, cleaned, checked, and made into records that a protocol can run.

MMEdit (Cheng et al., EMNLP 2023): E-VQA and E-IC, four JSON lists of records with eleven keys. VLKEB (Huang et al.,
NeurIPS 2024): the same keys, and portability questions in `port_new`. Nothing is dropped or changed but the white space
around strings; what looks odd is reported by record.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ..editing.inputs import Sample
from ..edits_schema import half_character
from ..files import read_json
from .pictures import resolve
from .prompts import PromptStyle
from .records import KINDS, Probe, Record

# a file's key -> the field here
STRINGS = {
    "src": "prompt",
    "alt": "target",
    "rephrase": "rephrase",
    "image": "image",
    "image_rephrase": "image_rephrase",
    "loc": "loc",
    "loc_ans": "loc_target",
    "m_loc": "m_loc_image",
    "m_loc_q": "m_loc",
    "m_loc_a": "m_loc_target",
}
CAPTION = "a photo of"  # the prompt of every E-IC record, and of no other
PORTABILITY = "port"  # kind of the probes made from `port_new`


class DatasetError(ValueError):
    """A file that is not what it should be; the message names the file, the record and the key."""


@dataclass(frozen=True)
class Hop:
    """One portability question about the edit's picture; part: "1-hop" to "4-hop".

    also: VLKEB's further edit (prompt, target) that the answer rests on, where the file names one.
    """

    part: str
    prompt: str
    target: str
    also: tuple[str, str] | None = None


@dataclass(frozen=True)
class Entry:
    """One record of a file, white space stripped; pictures are paths relative to their root.

    prediction: what the benchmark's model said before the edit. m_loc_target: one annotator's answer, often a rare one;
    like loc_target it only says which positions are compared.
    """

    id: str
    prompt: str
    target: str
    prediction: str
    rephrase: str
    image: str
    image_rephrase: str
    loc: str
    loc_target: str
    m_loc_image: str
    m_loc: str
    m_loc_target: str
    portability: tuple[Hop, ...] = ()

    def probes(self, style: PromptStyle, kinds: Collection[str]) -> list[tuple[str, str, str, str, str | None]]:
        """(kind, part, prompt, target, picture or None) of what is asked about this edit."""
        src, again = style.ask(self.prompt), style.ask(self.rephrase)
        found: list[tuple[str, str, str, str, str | None]] = [
            ("rel", "", src, self.target, self.image),
            ("t_gen", "", again, self.target, self.image),
            ("m_gen", "", src, self.target, self.image_rephrase),
            ("t_loc", "", style.ask_text(self.loc), self.loc_target, None),
            ("m_loc", "", style.ask_picture(self.m_loc), self.m_loc_target, self.m_loc_image),
        ]
        found += [(PORTABILITY, h.part, style.ask_picture(h.prompt), h.target, self.image) for h in self.portability]
        return [probe for probe in found if probe[0] in kinds]


@dataclass(frozen=True)
class Findings:
    """What is odd about a file, each as the ids of its records; nothing of it is changed but `stripped`."""

    stripped: list[str] = field(default_factory=list)  # targets that had white space around them
    unchanged: list[str] = field(default_factory=list)  # pred equals alt, apart from upper and lower case
    same_rephrase: list[str] = field(default_factory=list)  # the rephrasing is the prompt itself
    quoted: list[str] = field(default_factory=list)  # rephrasings that stand in quotation marks
    duplicates: list[str] = field(default_factory=list)  # picture and prompt of an earlier record, the same target
    contradictions: list[str] = field(default_factory=list)  # picture and prompt of an earlier record, another target

    def __str__(self) -> str:
        told = {
            "targets with white space around them (stripped)": self.stripped,
            "pred is alt, apart from case (nothing to edit)": self.unchanged,
            "the rephrasing is the prompt itself": self.same_rephrase,
            "rephrasings in quotation marks (kept)": self.quoted,
            "picture, prompt and target of an earlier record": self.duplicates,
            "picture and prompt of an earlier record, other target": self.contradictions,
        }
        lines = [f"{len(ids):6}  {what}: {_few(ids)}" for what, ids in told.items() if ids]
        return "\n".join(lines) or "nothing odd"


@dataclass(frozen=True)
class Dataset:
    """One file of edits. task: "caption" where every prompt is E-IC's, otherwise "vqa"."""

    name: str
    task: str
    entries: tuple[Entry, ...]
    findings: Findings

    def pictures(self, kinds: Collection[str] = KINDS) -> list[str]:
        """The pictures that these kinds of probes show, each once."""
        shown = (p[-1] for e in self.entries for p in e.probes(PromptStyle("raw"), {*kinds, "rel"}))
        return list(dict.fromkeys(name for name in shown if name is not None))

    def records(
        self, style: PromptStyle, root: str | Path, kinds: Collection[str] = (*KINDS, PORTABILITY)
    ) -> list[Record]:
        """Every entry as a Record, its pictures as files under `root`; MissingPicturesError names those that lack.

        kinds: of the probes wanted ("rel" always is); pictures of other kinds may be missing.
        """
        kinds = {*kinds, "rel"}
        files = resolve(self.pictures(kinds), root)

        def probe(kind: str, part: str, prompt: str, target: str, image: str | None) -> Probe:
            return Probe(kind, Sample(prompt, target, None if image is None else files[image]), part)

        out = []
        for e in self.entries:
            probes = tuple(probe(*p) for p in e.probes(style, kinds))
            out.append(Record(e.id, probes[0].sample, probes, self.task, e.image))
        return out

    def __str__(self) -> str:
        return f"{self.name}: {len(self.entries)} records of {self.task}\n{self.findings}"


@dataclass(frozen=True)
class Overlap:
    """How many of the evaluation file's records recur in the training file, by what recurs."""

    records: int
    counts: dict[str, int]

    def __str__(self) -> str:
        return f"of {self.records} evaluation records, in training: " + ", ".join(
            f"{what} {n}" for what, n in self.counts.items()
        )


def read(path: str | Path, *, name: str | None = None) -> Dataset:
    """The records of a MMEdit or VLKEB file. DatasetError, naming file, record and key, for a malformed one.

    name: what the records' ids begin with, where it is not to be the file's own (two files may have the same).
    """
    path = Path(path)
    try:
        rows = read_json(path)
    except ValueError as error:
        raise DatasetError(str(error)) from None
    if not isinstance(rows, list) or not rows:
        raise DatasetError(f"{path}: must hold a JSON list of records, but holds {_short(rows)}")
    entries = tuple(_entry(path, f"{name or path.stem}:{i}", i, row) for i, row in enumerate(rows))
    task = "caption" if all(e.prompt == CAPTION for e in entries) else "vqa"
    stripped = [e.id for e, row in zip(entries, rows, strict=True) if row["alt"] != e.target]
    return Dataset(path.name, task, entries, _findings(entries, stripped))


def overlap(train: Dataset, evaluation: Dataset) -> Overlap:
    """What of `evaluation` recurs in `train`: reported, since a method that learns from `train` has seen it."""
    keys: dict[str, Callable[[Entry], Any]] = {
        "picture": lambda e: e.image,
        "prompt": lambda e: e.prompt,
        "picture and prompt": lambda e: (e.image, e.prompt),
        "target": lambda e: e.target,
        "rephrased picture": lambda e: e.image_rephrase,
        "T-Loc question": lambda e: e.loc,
        "M-Loc picture and question": lambda e: (e.m_loc_image, e.m_loc),
    }
    counts = {}
    for what, key in keys.items():
        seen = {key(e) for e in train.entries}
        counts[what] = sum(key(e) in seen for e in evaluation.entries)
    return Overlap(len(evaluation.entries), counts)


def _entry(path: Path, record: str, index: int, row: Any) -> Entry:
    def wrong(message: str) -> NoReturn:
        raise DatasetError(f"{path}: record {index}: {message}")

    if not isinstance(row, dict):
        wrong(f"must be an object, but is {_short(row)}")
    found: dict[str, str] = {}
    for key, name in STRINGS.items():
        if key not in row:
            wrong(f"key {key!r} is missing")
        if not isinstance(row[key], str):
            wrong(f"key {key!r} must be a string, but is {_short(row[key])}")
        if not row[key].strip():
            wrong(f"key {key!r} is empty")
        if half_character(row[key]):
            wrong(f"key {key!r} holds half a character: {_short(row[key])}")
        found[name] = row[key].strip()
    prediction = row.get("pred", "")
    if not isinstance(prediction, str):
        wrong(f"key 'pred' must be a string, but is {_short(prediction)}")
    hops = row.get("port_new", [])
    if not isinstance(hops, list):
        wrong(f"key 'port_new' must be a list, but is {_short(hops)}")
    portability = tuple(_hop(hop, f"key 'port_new', item {n}", wrong) for n, hop in enumerate(hops))
    return Entry(record, prediction=prediction.strip(), portability=portability, **found)


def _hop(hop: Any, where: str, wrong: Callable[[str], NoReturn]) -> Hop:
    """VLKEB's two forms: {port_type, "Q&A": {Question, Answer}}, and {port_q, port_a, port_edit_q, port_edit_a}."""
    if not isinstance(hop, dict):
        wrong(f"{where} must be an object, but is {_short(hop)}")

    def text(holder: dict[str, Any], key: str) -> str:
        value = holder.get(key)
        if not isinstance(value, str) or not value.strip():
            wrong(f"{where}: {key!r} must be a string that is not empty, but is {_short(value)}")
        if half_character(value):
            wrong(f"{where}: {key!r} holds half a character: {_short(value)}")
        return value.strip()

    if "Q&A" in hop or "port_type" in hop:
        asked = hop.get("Q&A")
        if not isinstance(asked, dict):
            wrong(f"{where}: 'Q&A' must be an object, but is {_short(asked)}")
        return Hop(text(hop, "port_type"), text(asked, "Question"), text(asked, "Answer"))
    also = (text(hop, "port_edit_q"), text(hop, "port_edit_a")) if "port_edit_q" in hop else None
    return Hop("1-hop", text(hop, "port_q"), text(hop, "port_a"), also)


def _findings(entries: Sequence[Entry], stripped: list[str]) -> Findings:
    found = Findings(stripped)
    said: dict[tuple[str, str], set[str]] = defaultdict(set)
    for e in entries:
        if e.prediction.lower() == e.target.lower():
            found.unchanged.append(e.id)
        if e.rephrase == e.prompt:
            found.same_rephrase.append(e.id)
        if e.rephrase[0] == e.rephrase[-1] == '"' and len(e.rephrase) > 1:
            found.quoted.append(e.id)
        before = said[e.image, e.prompt]
        if before:
            (found.duplicates if e.target in before else found.contradictions).append(e.id)
        before.add(e.target)
    return found


def _few(ids: Sequence[str], most: int = 4) -> str:
    return ", ".join(ids[:most]) + (", ..." if len(ids) > most else "")


def _short(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
