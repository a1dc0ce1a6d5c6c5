"""The forward hooks of one patch: they read the site's tensors, ask the edit's modules and add what those return.

Hooks are objects, not closures, so that a patched model pickles and deep-copies with its patch.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .cases import Cases, all_missing
from .modules import ExtraNeurons, KnowledgeShift, Router
from .projections import Projections
from .tracker import CaseTracker


class Runtime:
    """What all hooks of one patch share: whether it is on, and the cases of the current pass."""

    def __init__(self, tracker: CaseTracker) -> None:
        self.enabled = True
        self.tracker = tracker

    def cases(self, like: Tensor) -> Cases:
        """The current pass's cases on `like`'s device."""
        if self.tracker.current is None:
            raise RuntimeError(
                "an edited layer ran outside its decoder, so its cases are unknown; call the decoder, or name them "
                "with handle.set_cases and run the decoder once"
            )
        return self.tracker.current.to(like.device)


def first(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module was called with."""
    return args[0] if args else kwargs["hidden_states"]


# ---------------------------------------------------------------------------------------------------------- sites


class AttentionHook:
    """Forward hook on `self_attn`: routes cases (at the first edited layer) and shifts the output."""

    def __init__(
        self, runtime: Runtime, router: Router | None, shift: KnowledgeShift | None, projections: Projections
    ) -> None:
        self.runtime, self.router, self.shift, self.projections = runtime, router, shift, projections

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.runtime.enabled:
            return None
        tap = first(args, kwargs)
        flat = tap.reshape(-1, tap.shape[-1])  # [T, d]
        cases = self.runtime.cases(tap)
        if self.router is not None:
            self._route(flat, cases)
        if self.shift is None:
            return None
        h_att = output[0] if isinstance(output, tuple) else output
        h = self.shift.shift(flat, h_att.reshape(-1, h_att.shape[-1]), module, self.projections, cases)
        h = h.reshape(h_att.shape)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _route(self, tap: Tensor, cases: Cases) -> None:
        """Decides once per case which edits act on it, for all layers and all later tokens."""
        state = cases.state
        if state.chosen or (cases.decided and state.selected is not None):
            return
        assert self.router is not None
        scores, selected = self.router(tap[cases.case_tokens.clamp(min=0)])
        if state.selected is not None and state.route_scores is not None:
            selected = cases.keep_decided(selected, state.selected, -1)
            scores = cases.keep_decided(scores, state.route_scores, -torch.inf)
        state.selected, state.route_scores = selected, scores


class FfnInputHook:
    """Forward pre-hook on an FFN's first module: keeps its input for the hook at the FFN's output."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.x: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.runtime.enabled:
            self.x = first(args, kwargs)

    def take(self) -> Tensor | None:
        """The kept input, given up so that it does not outlive its pass."""
        x, self.x = self.x, None
        return x

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "x": None}


class FfnOutputHook:
    """Forward hook on an FFN's last module: adds what the extra neurons compute from the FFN's input."""

    def __init__(self, runtime: Runtime, neurons: ExtraNeurons, source: FfnInputHook | None, positions: str) -> None:
        self.runtime, self.neurons, self.source, self.positions = runtime, neurons, source, positions

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        if not self.runtime.enabled:
            return None
        x = self.source.take() if self.source is not None else first(args, kwargs)
        if x is None:  # switched on between the FFN's first and last module
            return None
        cases = self.runtime.cases(x)
        selected = cases.selected
        if selected is None:  # always on: every group acts on every token (the paper)
            return output + self.neurons(x, None, None)
        if all_missing(selected):
            return None
        return output + self.neurons(x, cases.rows(self.positions), selected)


# -------------------------------------------------------------------------------------------------------- decoder


class BeginHook:
    """Forward pre-hook on the decoder: finds the cases of the pass."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        tracker = self.runtime.tracker
        (tracker.begin if self.runtime.enabled else tracker.skip)(args, kwargs)


class EndHook:
    """Forward hook on the decoder: leaves the decisions on the KV cache, and the cases for a recomputation."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self.runtime.enabled:
            return
        tracker = self.runtime.tracker
        tracker.end(output)
        if tracker.current is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        hidden = output if isinstance(output, Tensor) else output[0]
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(RestoreCases(tracker, tracker.current))


class RestoreCases:
    """Gradient hook on the decoder's output: gradient checkpointing runs its layers again, maybe after other passes."""

    def __init__(self, tracker: CaseTracker, cases: Cases) -> None:
        self.tracker, self.cases = tracker, cases

    def __call__(self, grad: Tensor) -> None:
        self.tracker.current = self.cases


class LabelsHook:
    """Forward pre-hook on every module around the decoder: keeps `labels` for the decoder's pass."""

    def __init__(self, tracker: CaseTracker, module: nn.Module) -> None:
        self.tracker = tracker
        names = tuple(inspect.signature(module.forward).parameters)
        self.position = names.index("labels") if "labels" in names else None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        labels = kwargs.get("labels")
        if labels is None and self.position is not None and self.position < len(args):
            labels = args[self.position]
        if labels is not None:
            self.tracker.labels = labels


class LabelsDoneHook:
    """Forward hook around the decoder, called even where the pass failed: its labels are not the next pass's."""

    def __init__(self, tracker: CaseTracker) -> None:
        self.tracker = tracker

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.tracker.labels = None


class LegacyReorder:
    """Stands in for `_reorder_cache` of a language model with tuple caches: decisions follow the new tuple.

    Beams of one case share their prompt and so their decisions, and a beam search reorders within a case only.
    """

    def __init__(self, reorder: Any) -> None:
        self.reorder = reorder
        self.trackers: list[CaseTracker] = []

    def __call__(self, past: tuple, beam_idx: Tensor) -> tuple:
        new = self.reorder(past, beam_idx)
        for tracker in self.trackers:
            state = tracker.kept(past)
            if state is not None:
                tracker.legacy[new[0][0]] = state
        return new
