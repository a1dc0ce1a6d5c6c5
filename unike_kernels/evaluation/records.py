"""A benchmark's edits with the questions that judge them, whatever file they came from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..editing.inputs import Sample

KINDS = ("rel", "t_gen", "m_gen", "t_loc", "m_loc")  # the five metrics; other kinds are extras, such as portability
LOCAL = ("t_loc", "m_loc")


@dataclass(frozen=True)
class Probe:
    """One question asked after an edit. kind: which metric it counts for; part: a named part of that metric, or "".

    The target of a locality probe only says which positions are compared.
    """

    kind: str
    sample: Sample
    part: str = ""


@dataclass(frozen=True)
class Record:
    """One edit, `request`, and its probes; the first probe is the request itself (kind "rel").

    id: unique in its data set. task: such as "vqa" or "caption". cluster: records of one cluster (concept, picture)
    count as dependent when errors are estimated; "" is the record alone.
    """

    id: str
    request: Sample
    probes: tuple[Probe, ...]
    task: str = ""
    cluster: str = ""

    def of(self, *kinds: str) -> list[Probe]:
        """The probes of these kinds, in order."""
        return [p for p in self.probes if p.kind in kinds]


def without_seen(train: Sequence[Record], evaluation: Sequence[Record]) -> tuple[list[Record], int, int]:
    """(training records, how many were dropped, how many of their other probes): none asks what `evaluation` asks.

    What is asked is a picture (the same file or the same object) and a prompt. A record whose request is asked goes
    whole, otherwise only its probes. In MMEdit every evaluation M-Loc question also stands in the training files.
    """
    asked = {_asked(p) for r in evaluation for p in r.probes}
    kept, probes = [], 0
    for record in train:
        if _asked(Probe("rel", record.request)) in asked:
            continue
        left = tuple(p for p in record.probes if _asked(p) not in asked)
        probes += len(record.probes) - len(left)
        kept.append(replace(record, probes=left))
    return kept, len(train) - len(kept), probes


def _asked(probe: Probe) -> tuple[object, str]:
    image = probe.sample.image
    return (str(image) if isinstance(image, Path) else id(image)), probe.sample.prompt
