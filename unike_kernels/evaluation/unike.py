"""UniKE itself as a method: the paper's always-on neurons, or routed edits."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from ..editing.editor import Editor
from ..editing.inputs import Batch, Sample, image_digest
from ..edits import Edits
from ..patching import PatchHandle, patch
from .methods import Edited, Method
from .records import LOCAL, Record

SAVED_EVERY = 32  # edits of a sequence: what a stop loses


class UnikeEdited(Edited):
    """A model patched with UniKE's edits; ids: of the requests in order."""

    def __init__(self, handle: PatchHandle, ids: Sequence[str]) -> None:
        self.handle = handle
        place = {name: i for i, name in enumerate(ids)}
        self.requests = [place[name] for name in handle.edits.ids]  # of each group on the model

    @contextmanager
    def running(self, batch: Batch) -> Iterator[None]:
        """A teacher-forced batch has its cases named: its last token is the answer's. Generation finds them itself.

        ValueError for a batch of another model than the one that carries the edits: it would be asked unedited.
        """
        if all(part is not batch.model for part in self.handle.model.modules()):
            raise ValueError(
                f"the edits are on one {type(self.handle.model).__name__}, but a {type(batch.model).__name__} that is "
                "no part of it is asked: make the Examiner of the editor's own collator"
            )
        if not bool(batch.target_mask.any()):
            yield
            return
        self.handle.set_cases(batch.token_to_case(), batch.case_rows())
        try:
            yield
        finally:
            self.handle.set_cases()

    def acting(self) -> list[list[int]] | None:
        """Which requests acted in the pass just run; None where all always act."""
        cases = self.handle.record.runtime.tracker.current
        if cases is None or cases.selected is None:
            return None
        return [[self.requests[g] for g in row if g >= 0] for row in cases.selected.tolist()]


class Unike(Method):
    """UniKE through an `Editor`. routing: "always" (the paper) or "routed".

    Always-on edits are made one after another, all earlier ones active; routed ones, and those of one step, are
    independent and train in batches.
    """

    def __init__(
        self,
        editor: Editor,
        *,
        routing: Literal["always", "routed"] = "always",
        name: str | None = None,
        cache: str | Path | None = None,
        progress: bool = False,
    ) -> None:
        """editor: with its memory and encoders, or one that `fit` is still to be called for.

        cache: a folder where the edits of a long sequence are kept while it is made, so that a stopped run goes on.
        progress: a bar while a sequence is made.
        """
        if routing not in ("always", "routed"):
            raise ValueError(f"routing must be 'always' or 'routed', but is {routing!r}")
        self.editor, self.routing = editor, routing
        self.name = name or ("UniKE" if routing == "always" else "UniKE, routed")
        self.cache, self.progress = None if cache is None else Path(cache), progress

    def settings(self) -> dict[str, Any]:
        """The editor's whole config, and the routing."""
        return {"routing": self.routing, "config": self.editor.config.to_json()}

    def fit(self, records: Sequence[Record], *, seed: int = 0, cache: Path | None = None) -> None:
        """Memory and encoders from the records' requests; their locality questions calibrate routing.

        Where edits are routed, their rephrasings and other pictures do so too, and tell what routing has to look past.
        seed: unused; the editor's config holds its own.
        """
        triplets = [_request(r.request) | {"question": r.id} for r in records]
        self.editor.build_memory(triplets, cache=cache)
        self.editor.fit()
        cases: list[dict[str, Any]] = [_case(p.sample) for r in records for p in r.of(*LOCAL)]
        if self.routing == "routed":
            cases += [_case(p.sample) | {"question": r.id} for r in records for p in r.of("t_gen", "m_gen")]
        if cases:
            self.editor.calibrate(cases)

    @contextmanager
    def apply(self, requests: Sequence[Sample]) -> Iterator[Edited]:
        """Makes the edits and patches the model with them; what is kept of them goes once all was asked."""
        edits, folder = self._sequence(requests)
        with self.patched(edits) as handle:
            yield UnikeEdited(handle, _ids(range(len(requests))))
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def one_step(self, requests: Sequence[Sample]) -> Iterator[AbstractContextManager[Edited]]:
        """Trains the requests in batches, each from the base alone, and puts them on one by one."""
        size = self.editor.config.neurons.batch_size
        for at in range(0, len(requests), size):
            numbers = range(at, min(at + size, len(requests)))
            yield from (self._alone(*made) for made in self._many([requests[i] for i in numbers]))

    def patched(self, edits: Edits) -> PatchHandle:
        """The edits on the model. May be overridden."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the base is this very model
            return patch(self.editor.model, edits, routing=self.routing, backend=self.editor.backend)

    @contextmanager
    def _alone(self, edits: Edits, name: str) -> Iterator[Edited]:
        # Picked only now: each has its own copy of memory, encoders and calibration (computed: 0.5 GB at d = 2560).
        with self.patched(edits.select([name])) as handle:
            yield UnikeEdited(handle, [name])

    def _sequence(self, requests: Sequence[Sample]) -> tuple[Edits, Path | None]:
        """The edits of a sequence, made in parts that are kept on disk, and where."""
        folder = None
        if self.cache is not None and len(requests) > SAVED_EVERY:
            asked = [(r.prompt, r.target, image_digest(r.image)) for r in requests]
            told = [self.name, self.settings(), self.editor.base.to_json(), asked]
            folder = self.cache / f"sequence-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}"
        edits, at = self._kept(folder)
        with tqdm(
            total=len(requests), initial=at, desc="edits", unit="edit", leave=False, disable=not self.progress
        ) as bar:
            while at < len(requests):
                part = range(at, min(at + SAVED_EVERY, len(requests)))
                some = [requests[i] for i in part]
                edits = self._edit(some, part, independent=self.routing == "routed", onto=edits)
                at = part.stop
                bar.update(len(part))
                if folder is not None:
                    edits.save_pretrained(folder)
        assert edits is not None  # a sequence has a request
        return edits, folder

    def _kept(self, folder: Path | None) -> tuple[Edits | None, int]:
        """The edits that a stopped run of this editor left, and how many of the sequence's requests they stand for."""
        if folder is None or not folder.exists():
            return None, 0
        try:
            edits = self.editor.continued(Edits.from_pretrained(folder))
        except (OSError, ValueError):
            return None, 0  # not yet saved once, or made with another memory
        return edits, max(int(name) for name in edits.ids) + 1  # the newest of a part is never replaced within it

    def _many(self, requests: Sequence[Sample]) -> list[tuple[Edits, str]]:
        """Of each request, edits that hold it and its id there; one that repeats another's is trained apart."""
        out: dict[int, tuple[Edits, str]] = {}
        left = list(range(len(requests)))
        while left:
            edits = self._edit([requests[i] for i in left], left, independent=True)
            names = {str(i): i for i in left}
            out |= {names[i]: (edits, i) for i in edits.ids}
            left = [i for i in left if i not in out]
        return [out[i] for i in range(len(requests))]

    def _edit(
        self, requests: Sequence[Sample], numbers: Sequence[int], *, independent: bool, onto: Edits | None = None
    ) -> Edits:
        asked = [{"id": name, **_request(r)} for name, r in zip(_ids(numbers), requests, strict=True)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "request .* replaces|.* edits miss their target")  # the results tell
            return self.editor.edit(asked, onto=onto, independent=independent, progress=False)


def _request(sample: Sample) -> dict[str, Any]:
    return {"prompt": sample.prompt, "target": sample.target, "image": sample.image}


def _case(sample: Sample) -> dict[str, Any]:
    return {"prompt": sample.prompt, "image": sample.image}


def _ids(numbers: Sequence[int]) -> list[str]:
    return [str(i) for i in numbers]
