"""The forward hooks of one patch: they read the site's tensors, ask the edit's modules and add what those return.

Hooks are objects, not closures, so that a patched model pickles and deep-copies with its patch.
"""

from torch import Tensor, nn

from .cases import Cases, CaseTracker
from .modules import ExtraNeurons, KnowledgeShift, Projections, Router


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


def first(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states that a module was called with."""
    return args[0] if args else kwargs["hidden_states"]


class AttentionHook:
    """Forward hook on `self_attn`: routes cases (at the first edited layer) and shifts the output."""

    def __init__(
        self, runtime: Runtime, router: Router | None, shift: KnowledgeShift | None, projections: Projections
    ) -> None:
        self.runtime, self.router, self.shift, self.projections = runtime, router, shift, projections

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: object) -> object:
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
        h = self.shift(flat, h_att.reshape(-1, h_att.shape[-1]), module, self.projections, cases)
        h = h.reshape(h_att.shape)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _route(self, tap: Tensor, cases: Cases) -> None:
        """Decides once per case which edits act on it, for all layers and all later tokens."""
        state = cases.state
        if state.chosen or (cases.decided and state.selected is not None):
            return
        scores, selected = self.router(tap[cases.case_tokens.clamp(min=0)])
        if state.selected is not None and not cases.fresh:
            new = (cases.case_tokens >= 0)[:, None]
            selected, scores = selected.where(new, state.selected), scores.where(new, state.route_scores)
        state.selected, state.route_scores = selected, scores


class FfnInputHook:
    """Forward pre-hook on an FFN's first module: keeps its input for the hook at the FFN's output."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.x: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.runtime.enabled:
            self.x = first(args, kwargs)

    def take(self) -> Tensor | None:
        """The kept input, given up so that it does not outlive its pass."""
        x, self.x = self.x, None
        return x

    def __getstate__(self) -> dict:
        return {**self.__dict__, "x": None}


class FfnOutputHook:
    """Forward hook on an FFN's last module: adds what the extra neurons compute from the FFN's input."""

    def __init__(self, runtime: Runtime, neurons: ExtraNeurons, source: FfnInputHook | None, positions: str) -> None:
        self.runtime, self.neurons, self.source, self.positions = runtime, neurons, source, positions

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if not self.runtime.enabled:
            return None
        x = self.source.take() if self.source is not None else first(args, kwargs)
        if x is None:  # switched on between the FFN's first and last module
            return None
        cases = self.runtime.cases(x)
        if cases.state.selected is None:  # always on: every group acts on every token (the paper)
            return output + self.neurons(x, None, None)
        return output + self.neurons(x, cases.rows(self.positions), cases.state.selected)
