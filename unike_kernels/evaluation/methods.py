"""What an editing method offers in order to be evaluated: UniKE and everything that it is compared with."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

from ..editing.inputs import Batch, Sample
from .records import Record


class Edited:
    """A model that carries edits, as a protocol sees it: what has to happen around its passes; by default, nothing.

    The passes themselves are the model's own, `batch.model(**batch.inputs)` and its `generate`.
    """

    def prompt(self, sample: Sample) -> Sample:
        """The question as the edited model is asked: the same, or with demonstrations before it. The target stays."""
        return sample

    def running(self, batch: Batch) -> AbstractContextManager[Any]:
        """Entered around each pass over a batch, teacher-forced (padded right) or generating (padded left, no target).

        A method that acts by the question finds each row's last prompt token at `batch.case_position`, never at the
        last token, which is the answer's.
        """
        return nullcontext()

    def acting(self) -> list[list[int]] | None:
        """For each row of the pass just run, inside `running`, the requests (by index) that acted on it.

        None where the method does not choose among its edits.
        """
        return None


class Method(Protocol):
    """An editing method on one base model. Subclass it: only `name` and `apply` have no default.

    Methods are deterministic: the same requests, after the same `fit`, give the same edits, bit for bit, in a new
    process too. A run that was stopped relies on it.
    """

    name: str

    def settings(self) -> dict[str, Any]:
        """Every setting that changes its results, as plain JSON values; a run is not resumed with other ones."""
        return {}

    def fit(self, records: Sequence[Record], *, seed: int = 0, cache: Path | None = None) -> None:
        """Learns from the training split whatever the method learns beforehand. The base model stays as it is.

        cache: a folder of the caller's for what was learned, so that the next call with the same records and seed
        loads it; nothing half-written may be left there.
        """
        return

    @abstractmethod
    def apply(self, requests: Sequence[Sample]) -> AbstractContextManager[Edited]:
        """Inside, the model carries all requests, made one after another in their order; afterwards it is the base.

        The base comes back bit for bit, also when an exception leaves the block. Of two requests with the same picture
        and prompt the later one counts.
        """
        ...

    def one_step(self, requests: Sequence[Sample]) -> Iterator[AbstractContextManager[Edited]]:
        """Every request on its own, in order: to be entered and left one after another.

        A method that can make many independent edits together overrides it.
        """
        for request in requests:
            yield self.apply([request])
