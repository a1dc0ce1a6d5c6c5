"""A benchmark's edits with the questions that judge them, whatever file they came from."""

from dataclasses import dataclass

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
