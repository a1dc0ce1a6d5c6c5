"""What is known around a decoder: the labels of its pass, and which thread is in it."""

import inspect
import sys
import threading
import warnings
from typing import Any

from torch import nn
from torch.compiler import is_compiling

from .tracker import CaseTracker


def this_thread() -> int:
    """Which thread this is; -1 in compiled code, which cannot ask."""
    return -1 if is_compiling() else threading.get_ident()


def another_thread(name: str) -> str:
    """What a second thread is told."""
    return (
        f"another thread is within a pass of this model, and patch {name!r} keeps what belongs to one pass: run one at "
        "a time (a lock around model and generate), or a copy per thread"
    )


def within(thread: int, module: nn.Module) -> bool:
    """Whether a thread runs a method of the module now."""
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False


class LabelsHook:
    """Forward pre-hook on every module around the decoder: keeps `labels`, and whether logits of several tokens count.

    transformers' assisted generation asks for those of the prompt's end and of every guess behind it.
    """

    def __init__(self, tracker: CaseTracker, module: nn.Module) -> None:
        self.tracker = tracker
        self.inside: int | None = None  # the thread between this hook and the LabelsDoneHook after the module
        names = tuple(inspect.signature(module.forward).parameters)
        self.position = names.index("labels") if "labels" in names else None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        mine = this_thread()
        if self.inside not in (None, mine) and within(self.inside, module):
            raise RuntimeError(another_thread(self.tracker.name))
        self.inside = mine
        labels = kwargs.get("labels")
        if labels is None and self.position is not None and self.position < len(args):
            labels = args[self.position]
        if labels is not None:
            self.tracker.labels = labels
        wanted = kwargs.get("logits_to_keep")
        if isinstance(wanted, int) and wanted > 1:
            self.tracker.several_logits = True

    def warn_if_missed(self, module: nn.Module) -> None:
        """While the decoder runs: warns where what took the place of the module's forward did not call this hook."""
        if self.inside is None:
            warnings.warn(
                f"the forward of {type(module).__name__} was replaced after the patch was made: labels of this pass, "
                "if it has any, were not seen, so its last token is taken for the prompt's end. Later passes see them",
                stacklevel=3,
            )


class LabelsDoneHook:
    """Forward hook around the decoder, called even where the pass failed: what it kept is not the next pass's."""

    def __init__(self, before: LabelsHook) -> None:
        self.before, self.tracker = before, before.tracker

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self.before.inside not in (this_thread(), -1):
            return  # refused: the other thread's pass goes on
        self.before.inside = None
        self.tracker.labels, self.tracker.several_logits = None, False
